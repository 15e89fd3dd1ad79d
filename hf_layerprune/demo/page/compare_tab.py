"""The tab `Compare`: one prompt, two answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from ...errors import LayerPruneError
from ..catalog import Pairing
from ..comparison import IN_TURN, ORDERS, Request, Snapshot
from ..generation import DONE, FAILED, Answer
from ..render import notice, render_comparison, render_empty
from ..sampling import RANGES, Sampling
from ..service import DemoService
from ..sessions import Sessions
from ..settings import CHAT_EXAMPLES, EXAMPLES
from .choice import ModelChoice

TEXT, CHAT = "Continue a text", "Chat"
HIDDEN = {"api_visibility": "private"}
ON_DEVICE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "device"}
"""One comparison at a time, so that what is measured is measured alone."""


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
        chat = service.comparer.can_chat(first)
        self.history = gr.State([])
        self.chatting = gr.Radio(
            [TEXT, CHAT], value=CHAT if chat else TEXT, show_label=False, container=False, visible=chat
        )
        self.prompt = gr.Textbox(**_prompt(chat), lines=2, max_lines=8, elem_id="lp-prompt", autofocus=True)
        with gr.Row(elem_classes="lp-buttons"):
            self.run = gr.Button("Compare", variant="primary", elem_id="lp-run", min_width=120)
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
        self.examples = gr.Dataset(
            components=[self.prompt], samples=_examples(first, chat), label="Examples", type="values"
        )
        with gr.Accordion("Sampling, the same for both", open=False, elem_id="lp-sampling"):
            self.sampling = self._sampling(service.comparer.defaults(first))
        self.answers = gr.HTML(
            render_empty(first, first.depths[-1], chat), elem_id="lp-answers", padding=False, apply_default_css=False
        )
        self._wire(choice)

    # -- what follows the choice of a model ------------------------------------------------------------------------

    @property
    def followers(self) -> list[Any]:
        """What `follow` fills."""
        own = [self.chatting, self.prompt, self.fresh, self.examples, self.history, self.answers]
        return [*own, *self.sampling.values()]

    def follow(self, pairing: Pairing, depth: int) -> list[Any]:
        """Another model was chosen."""
        chat = self.service.comparer.can_chat(pairing)
        defaults = self.service.comparer.defaults(pairing)
        return [
            gr.Radio(value=CHAT if chat else TEXT, visible=chat),
            gr.Textbox(**_prompt(chat)),
            gr.Button(visible=chat),
            gr.Dataset(samples=_examples(pairing, chat)),
            [],
            render_empty(pairing, depth, chat),
            *(getattr(defaults, name) for name in self.sampling),
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
        inputs = [self.prompt, choice.model, choice.depth, self.chatting, self.order, self.history]
        outputs = [self.answers, self.history, self.prompt, self.run, self.stop]
        for trigger in (self.run.click, self.prompt.submit):
            started = trigger(self._begin, None, [self.run, self.stop], queue=False, show_progress="hidden", **HIDDEN)
            started.then(
                self._compare,
                [*inputs, *self.sampling.values()],
                outputs,
                show_progress="minimal",
                **HIDDEN,
                **ON_DEVICE,
            )
        self.stop.click(self._halt, None, [self.stop], queue=False, show_progress="hidden", **HIDDEN)
        self.fresh.click(
            self._forget, [choice.model, choice.depth], [self.history, self.answers], queue=False, **HIDDEN
        )
        self.chatting.input(
            self._switch,
            [choice.model, choice.depth, self.chatting],
            [self.prompt, self.fresh, self.examples, self.history, self.answers],
            queue=False,
            **HIDDEN,
        )
        self.examples.click(lambda sample: sample[0], self.examples, self.prompt, queue=False, **HIDDEN)

    def _begin(self, request: gr.Request) -> list[Any]:
        self.sessions.begin(str(request.session_hash))
        return [gr.Button(interactive=False), gr.Button(interactive=True)]

    def _halt(self, request: gr.Request) -> Any:
        self.sessions.stop(str(request.session_hash))
        return gr.Button(interactive=False)

    def _compare(
        self,
        request: gr.Request,
        prompt: str,
        model: str,
        depth: float,
        mode: str,
        order: str,
        history: list[tuple[str, str, str]],
        *sampling: float,
    ) -> Iterator[list[Any]]:
        chat, stop = mode == CHAT, self.sessions.flag(str(request.session_hash))
        before = tuple(map(tuple, history or [])) if chat else ()
        ready = [gr.Button(interactive=True), gr.Button(interactive=False)]
        same = gr.skip()
        try:
            pairing = self.service.catalog[model]
            if stop.is_set():
                nothing = notice("Stopped before it began.")
                yield [nothing + render_empty(pairing, pairing.depth(depth), chat), same, same, *ready]
                return
            changes = dict(zip(self.sampling, sampling, strict=True))
            asked = Request(prompt, model, pairing.depth(depth), chat, order, changes, before)
            snapshot = None
            for snapshot in self.service.stream(asked, stop):
                yield [render_comparison(snapshot, prompt, chat, before), same, same, same, same]
        except LayerPruneError as error:
            yield [self._refused(model, depth, chat, before, _sentence(str(error))), same, same, *ready]
            return
        kept: Any = same
        answered = snapshot is not None and FAILED not in (snapshot.original.state, snapshot.compressed.state)
        if chat and snapshot is not None and answered:
            kept = [*before, (prompt, snapshot.original.text, snapshot.compressed.text)]
        yield [same, kept, "" if chat and answered else same, *ready]

    def _refused(
        self, model: str, depth: float, chat: bool, before: tuple[tuple[str, str, str], ...], problem: str
    ) -> str:
        """What was there before a request that cannot be met, and why it cannot."""
        if before:
            prompt, *texts = before[-1]
            answers = Snapshot(*(Answer(state=DONE, text=text) for text in texts))
            return render_comparison(answers, prompt, chat, before[:-1], problem)
        names = self.service.catalog.names
        pairing = self.service.catalog[model if model in names else ""]
        return render_empty(pairing, pairing.depth(depth), chat, problem)

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

    def _sampling(self, defaults: Sampling) -> dict[str, gr.Slider | gr.Number]:
        def slider(name: str, label: str, step: float, info: str, most: float | None = None) -> gr.Slider:
            least, top = RANGES.get(name, (1, self.service.limits.max_new_tokens))
            return gr.Slider(least, most or top, value=getattr(defaults, name), step=step, label=label, info=info)

        with gr.Row():
            longest = slider("max_new_tokens", "Longest answer", 1, "tokens")
            temperature = slider("temperature", "Temperature", 0.05, "0 takes the most likely token every time")
        with gr.Row():
            top_p = slider("top_p", "Top-p", 0.01, "draw from tokens that hold this share")
            top_k = slider("top_k", "Top-k", 1, "draw from so many tokens; 0 is all", 200)
        with gr.Row():
            penalty = slider("repetition_penalty", "Repetition penalty", 0.01, "1 is none")
            seed = gr.Number(
                value=defaults.seed, label="Seed", info="same luck for both models", precision=0, minimum=0
            )
        return {
            "max_new_tokens": longest,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "repetition_penalty": penalty,
            "seed": seed,
        }


def _prompt(chat: bool) -> dict[str, str]:
    if chat:
        return {"label": "Message", "placeholder": "Ask both models something. Shift+Enter sends it."}
    return {
        "label": "Text to continue",
        "placeholder": "Begin a sentence; both models go on. Shift+Enter starts them.",
    }


def _examples(pairing: Pairing, chat: bool) -> list[list[str]]:
    return [[text] for text in pairing.examples or (CHAT_EXAMPLES if chat else EXAMPLES)]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
