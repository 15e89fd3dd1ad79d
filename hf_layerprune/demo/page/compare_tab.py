"""The tab `Compare`: one prompt, two answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from ..catalog import Pairing
from ..comparison import IN_TURN, ORDERS, Request, Snapshot
from ..facts import Facts
from ..generation import DONE, FAILED, Answer
from ..render import notice, render_comparison, render_empty
from ..sampling import RANGES
from ..service import DemoService
from ..sessions import Sessions
from ..settings import CHAT_EXAMPLES, EXAMPLES
from .choice import ModelChoice
from .errors import sentence_of

TEXT, CHAT = "Continue a text", "Chat"
HIDDEN = {"api_visibility": "private"}
ON_DEVICE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "device"}
"""One comparison at a time, so that what is measured is measured alone."""
SHOW = """() => {
  const notice = document.querySelector("#lp-answers .lp-notice")
  if (notice && notice.getBoundingClientRect().bottom > innerHeight - 120) notice.scrollIntoView({block: "center"})
  return []
}"""
"""Brings the answers in sight, on a screen that is too small for all."""


class CompareTab:
    """Widgets and what they do.

    Args:
        service ([`DemoService`]): answers.
        sessions ([`Sessions`]): who wants to stop.
        choice ([`ModelChoice`]): what is compared.
    """

    def __init__(self, service: DemoService, sessions: Sessions, choice: ModelChoice) -> None:
        self.service = service
        self.sessions = sessions
        first = service.catalog.first
        facts = service.comparer.facts(first)
        chat = facts.can_chat
        self.history = gr.State([])
        self.chatting = gr.Radio(
            [TEXT, CHAT], value=CHAT if chat else TEXT, show_label=False, container=False, visible=chat
        )
        self.prompt = gr.Textbox(**_prompt(chat), lines=2, max_lines=8, elem_id="lp-prompt", autofocus=True)
        with gr.Row(elem_classes="lp-buttons"):
            self.run = gr.Button("Compare", variant="primary", elem_id="lp-run", min_width=120)
            self.leave = gr.Button("Stop", variant="stop", elem_id="lp-leave", visible=False, min_width=80)
            self.stop = gr.Button("Stop", variant="stop", elem_id="lp-stop", interactive=False, min_width=80)
            self.fresh = gr.Button("New chat", elem_id="lp-new", visible=chat, min_width=100)
            self.order = gr.Radio(
                [(order.capitalize(), order) for order in ORDERS],
                value=IN_TURN,
                label="How the two run",
                show_label=False,
                container=False,
                elem_id="lp-order",
                min_width=260,
            )
        self.answers = gr.HTML(
            render_empty(first, first.depths[-1], chat), elem_id="lp-answers", padding=False, apply_default_css=False
        )
        self.examples = gr.Dataset(
            components=[self.prompt], samples=_examples(first, chat), label="Examples", type="values"
        )
        with gr.Accordion("Sampling, the same for both", open=False, elem_id="lp-sampling"):
            self.sampling = self._sampling(facts)
        self._wire(choice)

    # -- what follows the choice of a model ------------------------------------------------------------------------

    @property
    def followers(self) -> list[Any]:
        """What `follow` fills."""
        own = [self.chatting, self.prompt, self.fresh, self.examples, self.history, self.answers]
        return [*own, *self.sampling.values()]

    def follow(self, pairing: Pairing, depth: int) -> list[Any]:
        """Another model was chosen."""
        facts = self.service.comparer.facts(pairing)
        chat, sampling = facts.can_chat, {name: getattr(facts.sampling, name) for name in self.sampling}
        longest = gr.Slider(maximum=facts.most_new_tokens(self.service.limits), value=facts.sampling.max_new_tokens)
        return [
            gr.Radio(value=CHAT if chat else TEXT, visible=chat),
            gr.Textbox(**_prompt(chat)),
            gr.Button(visible=chat),
            gr.Dataset(samples=_examples(pairing, chat)),
            [],
            render_empty(pairing, depth, chat),
            *(sampling | {"max_new_tokens": longest}).values(),
        ]

    @property
    def depth_followers(self) -> list[Any]:
        """What `follow_depth` fills."""
        return [self.history, self.answers]

    def follow_depth(self, pairing: Pairing, depth: int, mode: str) -> list[Any]:
        """Another depth was chosen."""
        return [[], render_empty(pairing, depth, mode == CHAT)]

    # -- what happens ----------------------------------------------------------------------------------------------

    def _wire(self, choice: ModelChoice) -> None:
        quiet = {"queue": False, "show_progress": "hidden", **HIDDEN}
        chosen = [choice.model, choice.depth, self.chatting, self.history]
        buttons = [self.run, self.leave, self.stop]
        self.locked = [*choice.widgets, self.chatting, self.fresh]  # an answer belongs to what these said at its start
        began = gr.on(
            [self.run.click, self.prompt.submit], self._begin, None, [*buttons, *self.locked], js=SHOW, **quiet
        )
        compared = began.then(
            self._compare,
            [self.prompt, self.order, *chosen, *self.sampling.values()],
            [self.answers, self.history, self.prompt, self.leave, self.stop],
            show_progress="minimal",
            show_progress_on=self.prompt,
            **HIDDEN,
            **ON_DEVICE,
        )
        for ended in (compared.then, compared.failure):  # `then` does not come after an error
            ended(self._end, None, [*buttons, *self.locked], **quiet)
        self.leave.click(self._leave, chosen, self.answers, cancels=[compared], **quiet)
        self.stop.click(self._halt, None, [self.stop], **quiet)
        self.fresh.click(self._forget, [choice.model, choice.depth], [self.history, self.answers], **quiet)
        self.chatting.input(
            self._switch,
            [choice.model, choice.depth, self.chatting],
            [self.prompt, self.fresh, self.examples, self.history, self.answers],
            **quiet,
        )
        self.examples.click(lambda sample: sample[0], self.examples, self.prompt, **quiet)

    def _begin(self, request: gr.Request) -> list[Any]:
        """Asked again while it runs, which the page then does not pass on, it changes nothing."""
        locked = [gr.update(interactive=False) for _ in self.locked]
        if self.sessions.is_running(str(request.session_hash)):
            return [gr.skip()] * (3 + len(locked))
        return [gr.Button(interactive=False), gr.Button(visible=True), gr.Button(visible=False), *locked]

    def _end(self) -> list[Any]:
        """However it ended, or if it never began, the next one can."""
        free = [gr.update(interactive=True) for _ in self.locked]
        stop = gr.Button(visible=True, interactive=False)
        return [gr.Button(interactive=True), gr.Button(visible=False), stop, *free]

    def _leave(
        self, request: gr.Request, model: str, depth: float, mode: str, history: list[tuple[str, str, str]]
    ) -> str:
        """Stop before its turn came: the page takes the request back from the queue."""
        self.sessions.stop(str(request.session_hash))
        return self._refused(model, depth, mode == CHAT, history, notice("Stopped before it began."))

    def _halt(self, request: gr.Request) -> Any:
        self.sessions.stop(str(request.session_hash))
        return gr.Button(interactive=False)

    def _compare(
        self,
        request: gr.Request,
        prompt: str,
        order: str,
        model: str,
        depth: float,
        mode: str,
        history: list[tuple[str, str, str]],
        *sampling: float,
    ) -> Iterator[list[Any]]:
        chat, same, snapshot = mode == CHAT, gr.skip(), None
        before = tuple(map(tuple, history or [])) if chat else ()
        buttons = [gr.Button(visible=False), gr.Button(visible=True, interactive=True)]
        try:
            with self.sessions.running(str(request.session_hash)) as stop:
                changes = dict(zip(self.sampling, sampling, strict=True))
                asked = Request(prompt, model, depth, chat, order, changes, before)
                for snapshot in self.service.stream(asked, stop):
                    yield [render_comparison(snapshot, prompt, chat, before), same, same, *buttons]
                    buttons = [same, same]
        except Exception as error:
            refusal = notice(sentence_of(error), problem=True)
            yield [self._refused(model, depth, chat, before, refusal), same, same, same, same]
            return
        if chat and snapshot is not None and FAILED not in (snapshot.original.state, snapshot.compressed.state):
            kept = [*before, (prompt, snapshot.original.text, snapshot.compressed.text)]
            yield [same, kept, "", same, same]

    def _refused(self, model: str, depth: float, chat: bool, before: Sequence[tuple[str, str, str]], told: str) -> str:
        """What was there before a request that was not met, and why it was not."""
        if chat and before:
            prompt, *texts = before[-1]
            answers = Snapshot(*(Answer(state=DONE, text=text) for text in texts))
            return render_comparison(answers, prompt, chat, before[:-1], told)
        names = self.service.catalog.names
        pairing = self.service.catalog[model if model in names else ""]
        return render_empty(pairing, pairing.depth(depth), chat, told)

    def _forget(self, model: str, depth: float) -> list[Any]:
        pairing = self.service.catalog[model]
        return [[], render_empty(pairing, pairing.depth(depth), True)]

    def _switch(self, model: str, depth: float, mode: str) -> list[Any]:
        pairing, chat = self.service.catalog[model], mode == CHAT
        empty = render_empty(pairing, pairing.depth(depth), chat)
        return [
            gr.Textbox(**_prompt(chat)),
            gr.Button(visible=chat),
            gr.Dataset(samples=_examples(pairing, chat)),
            [],
            empty,
        ]

    # -- widgets ---------------------------------------------------------------------------------------------------

    def _sampling(self, facts: Facts) -> dict[str, gr.Slider | gr.Number]:
        widgets: dict[str, gr.Slider | gr.Number] = {}
        ranges = RANGES | {"max_new_tokens": (1, facts.most_new_tokens(self.service.limits)), "top_k": (0, 200)}

        def slider(name: str, label: str, step: float, info: str) -> None:
            value = getattr(facts.sampling, name)
            widgets[name] = gr.Slider(*ranges[name], value=value, step=step, label=label, info=info)

        with gr.Row():
            slider("max_new_tokens", "Longest answer", 1, "tokens")
            slider("temperature", "Temperature", 0.05, "0 takes the most likely token every time")
        with gr.Row():
            slider("top_p", "Top-p", 0.01, "draw from tokens that hold this share")
            slider("top_k", "Top-k", 1, "draw from so many tokens; 0 is all")
        with gr.Row():
            slider("repetition_penalty", "Repetition penalty", 0.01, "1 is none")
            luck = "same luck for both models"
            widgets["seed"] = gr.Number(value=facts.sampling.seed, label="Seed", info=luck, precision=0)
        return widgets


def _prompt(chat: bool) -> dict[str, str]:
    if chat:
        return {"label": "Message", "placeholder": "Ask both models something. Shift+Enter sends it."}
    return {
        "label": "Text to continue",
        "placeholder": "Begin a sentence; both models go on. Shift+Enter starts them.",
    }


def _examples(pairing: Pairing, chat: bool) -> list[list[str]]:
    return [[text] for text in pairing.examples or (CHAT_EXAMPLES if chat else EXAMPLES)]
