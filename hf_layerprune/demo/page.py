"""The page of the demo, made of Gradio's components, and its endpoint for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import gradio as gr

from ..errors import LayerPruneError
from . import html
from .catalog import Pairing
from .comparison import Comparison
from .generation import RANGES, Answer, Position, Sampling
from .service import DemoService, Turn

TEXT, CHAT = "Continue a text", "Chat"
SUBTITLE = "Compare a language model with a smaller, faster copy: same prompt, two answers."
MADE_WITH = """Made with [hf_layerprune](https://pypi.org/project/hf-layerprune), after [iterative layer-wise
distillation](https://huggingface.co/papers/2511.05085) and [layer
parallelism](https://huggingface.co/papers/2502.02790)."""
SETTINGS = {  # the sampling settings: label, explanation and step of each
    "max_new_tokens": ("Longest answer", "tokens", 1),
    "temperature": ("Temperature", "0 takes the most likely token every time", 0.05),
    "top_p": ("Top-p", "sample from the tokens that hold this share of the probability", 0.01),
    "top_k": ("Top-k", "sample from this many tokens; 0 means all", 1),
    "repetition_penalty": ("Repetition penalty", "1 means none", 0.01),
    "seed": ("Seed", "same random seed for both models", 1),
}
KEYS = "Enter sends, Shift+Enter breaks the line"
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
# the line is our own, so that it can say how long it is: all who wait in it run as far as Gradio knows
STREAMED: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", **PRIVATE}
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", **PRIVATE}
# the system's: the page asks no other host for any
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
COPY = """() => navigator.clipboard.writeText([...document.querySelectorAll('.lp-card')].map(card =>
  card.getAttribute('aria-label') + ':\\n' + card.querySelector('.lp-body').innerText).join('\\n\\n'))"""
WHITE_SPACE = str.maketrans({" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"})


def build_page(service: DemoService) -> gr.Blocks:
    """The app of a demo, not yet running."""
    demo = DemoPage(service)
    with gr.Blocks(title=service.settings.title, analytics_enabled=False) as page:
        gr.Markdown(f"# {service.settings.title}\n{SUBTITLE}")
        demo.lay_out()
        gr.Markdown(MADE_WITH)
        demo.wire(page)
        add_api(service)
    return page.queue(default_concurrency_limit=1)


def launch_page(page: gr.Blocks, **options: Any) -> Any:
    """Serve a page, with an MCP server where Gradio's extra for it is installed; `options` go to `launch`."""
    theme = gr.themes.Default(primary_hue="teal", neutral_hue="slate", **FONTS)
    look = {"theme": theme, "css_paths": html.TEMPLATES / "style.css", "favicon_path": html.TEMPLATES / "favicon.svg"}
    head = f'<meta name="description" content="{SUBTITLE}">'
    fixed = {"head": head, "footer_links": ["api"], "ssr_mode": False, "max_threads": 100}
    return page.launch(mcp_server=find_spec("mcp") is not None, **look, **fixed, **options)


def add_api(service: DemoService) -> None:
    """Add the one endpoint for programs, `compare`, which is an MCP tool too, to the page that is being built."""

    def compare(
        prompt: str,
        model: str = "",
        depth: int = 0,
        chat: bool = False,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Let a language model and a compressed copy of it answer the same prompt, and measure both.

        Args:
            prompt (str): Text to continue, or a message.
            model (str): Name on the list of models; the first by default.
            depth (int): Layers of the compressed model; the nearest there is. 0 is the shallowest.
            chat (bool): Whether the prompt is a message to a chat model rather than a text to continue.
            max_new_tokens (int): Longest answer, in tokens.
            temperature (float): 0 takes the most likely token every time.
            top_p (float): Sample from the most likely tokens that hold this share of the probability.
            top_k (int): Sample from this many of the most likely tokens; 0 means all.
            repetition_penalty (float): Above 1, tokens that were there before become less likely.
            seed (int): Seed of the random numbers, which are the same for both models.

        Returns:
            dict: "original" and "compressed", each with its text, speed, memory and size, and a "summary" in words.
        """
        given = dict(locals())
        sampling = {name: given[name] for name in SETTINGS}
        try:
            for comparison in service.stream(prompt, model, depth, chat, sampling):
                yield comparison.to_dict()
        except LayerPruneError as error:  # of any other the log has it all, and who asked nothing
            raise gr.Error(str(error), print_exception=False) from None

    gr.api(compare, api_name="compare", concurrency_limit=None)


@dataclass(frozen=True)
class Shown:
    """What a visitor sees: a conversation, or a text and how it goes on, and what was measured of the last answers."""

    turns: tuple[Turn, ...] = ()
    comparison: Comparison = Comparison()
    chat: bool = False
    sampling: dict[str, float] = field(default_factory=dict)


class DemoPage:
    """Widgets, and what they do."""

    def __init__(self, service: DemoService) -> None:
        self.service, first = service, service.pairing()
        shown, *widgets = self._look(first.name, first.depths[-1], CHAT if first.can_chat else TEXT)
        self.shown = gr.State(shown, render=False)
        self.wanted = gr.State({}, render=False)  # the depth chosen last, by which an older answer knows to stop
        self.headline, self.answers, self.told, *widgets = widgets
        self.layers, self.layer_map, self.quality, self.distance, self.found, *widgets = widgets
        self.model, self.depth, self.mode, self.prompt, self.again, self.examples, *self.sampling = widgets

    def _look(
        self, model: str, depth: int, mode: str, prompt: str | None = None, sampling: Sampling | None = None
    ) -> list[Any]:
        """All that depends on what was chosen: what is shown, and the widgets. With a `prompt` nobody answered yet;
        without, the first example is shown with its answers where they are known."""
        pairing, chat = self.service.pairing(model), mode == CHAT
        shown, own = Shown(comparison=self.service.blank(pairing, depth), chat=chat), pairing.samplings[chat]
        if prompt is None:
            shown, prompt = self._stored(pairing, depth, chat) or shown, "" if chat else pairing.prompts(chat)[0]
        headline, answers, told = self._view(pairing, depth, shown)[1:]
        layer_map, quality = pairing.layer_map(depth), pairing.quality()
        names, drawn = list(self.service.catalog), (sampling or own).temperature > 0
        depths: list[Any] = pairing.depths
        if pairing.students[0] == pairing.teacher:
            depths[0] = (f"{depths[0]}, the original", depths[0])
        kept, length = "Layers kept in the compressed model", self.service.limits.max_prompt_characters
        writing = {"info": KEYS, "lines": 1, "max_lines": 8, "max_length": length}
        samples: dict[str, Any] = {"components": ["textbox"], "component_props": [{}], "headers": [""]}
        samples["samples"] = [[text] for text in pairing.prompts(chat)]
        off = {"render": False}
        choice = {"min_width": 200, **off}  # below each other on a phone
        return [
            shown,
            gr.HTML(headline, elem_id="lp-headline", **off),
            gr.HTML(answers, elem_id="lp-answers", **off),
            gr.HTML(told, elem_id="lp-status", **off),
            gr.HTML(html.layer_strip(pairing.student(depth).plan), elem_id="lp-layers", **off),
            gr.Plot(layer_map, visible=bool(layer_map), label=html.map_label(pairing), elem_id="lp-map", **off),
            gr.Plot(quality, visible=bool(quality), show_label=False, elem_id="lp-quality", **off),
            gr.HTML("", elem_id="lp-distance", **off),
            gr.Column(visible=False, **off),
            gr.Dropdown(
                names, value=pairing.name, label="Model", visible=len(names) > 1, elem_id="lp-model", **choice
            ),
            gr.Radio(depths, value=depth, label=kept, visible=len(depths) > 1, elem_id="lp-depth", **choice),
            gr.Radio([TEXT, CHAT], value=mode, label="Mode", visible=pairing.can_chat, elem_id="lp-mode", **choice),
            gr.Textbox(prompt, label="Prompt", **writing, elem_id="lp-prompt", **off),
            gr.Button("Another seed", elem_id="lp-again", visible=drawn, **off),
            gr.Dataset(**samples, layout="gallery", label="Examples", elem_id="lp-examples", **off),
            *(gr.Slider(**setting, **off) for setting in self._settings(pairing, sampling or own)),
        ]

    def _settings(self, pairing: Pairing, sampling: Sampling) -> Iterator[dict[str, Any]]:
        for name, (label, info, step) in SETTINGS.items():
            low, high = RANGES.get(name, (1, self.service.most_new_tokens(pairing)))
            setting = {"minimum": low, "maximum": high, "value": getattr(sampling, name), "step": step}
            visible = name != "seed" or sampling.temperature > 0
            yield setting | {"label": label, "info": info, "visible": visible, "min_width": 260}

    def lay_out(self) -> None:
        """Place the widgets on the page that is being built."""
        _render(self.shown, self.wanted, self.headline)
        with gr.Row():
            _render(self.model, self.depth, self.mode)
        with gr.Tab("Compare"):
            _render(self.answers, self.told, self.prompt)
            with gr.Row(elem_id="lp-buttons"):
                self.run = gr.Button("Compare", variant="primary", elem_id="lp-run")
                self.stop = gr.Button("Stop", elem_id="lp-stop")
                self.again.render()
                self.copy = gr.Button("Copy answers", elem_id="lp-copy")
                self.fresh = gr.Button("Start over", elem_id="lp-new")
            self.examples.render()
            with gr.Accordion("Generation settings", open=False, elem_id="lp-sampling"), gr.Row():
                _render(*self.sampling)
        with gr.Tab("Look inside"):
            _render(self.layers, self.layer_map, self.quality)
            text, limit = self.service.pairing().prompts(chat=False)[0], self.service.limits.max_inspected_tokens
            about = {"label": "Where do they expect different words?", "info": f"at most {limit} tokens"}
            self.text = gr.Textbox(text, **about, lines=1, max_lines=8, elem_id="lp-text")
            self.inspect = gr.Button("Compare next tokens", variant="primary", elem_id="lp-inspect")
            self.distance.render()
            self.positions = gr.State([])
            self.found.render()
            with self.found:
                self.strip = gr.HighlightedText(elem_id="lp-positions")
                with gr.Row():
                    self.expected = [gr.Label(label=f"{name} expects next") for name in ("Original", "Compressed")]

    def wire(self, page: gr.Blocks) -> None:
        """Say what follows when a visitor does something."""
        answered = [self.shown, self.headline, self.answers, self.told]
        inside = [self.layers, self.layer_map, self.quality, self.distance, self.found]
        chosen = [self.model, self.depth, self.mode]
        everything = [*answered, *inside, *chosen, self.prompt, self.again, self.examples, *self.sampling]
        asked, given = [*chosen, self.shown, *self.sampling], [*answered, self.prompt]
        asking = [self.run.click, self.prompt.submit]
        running = [
            gr.on(asking, self._compare, [self.prompt, *asked], given, **STREAMED),
            self.examples.click(self._compare_example, [self.examples, *asked], given, **STREAMED),
            self.again.click(lambda seed: (seed + 1) % RANGES["seed"][1], *[self.sampling[-1]] * 2, **AT_ONCE).then(
                self._compare_again, asked, given, **STREAMED
            ),
        ]
        now = [*chosen, self.shown, self.wanted]
        moved = self.depth.input(self._on_depth, now, [*answered, *inside], cancels=running, **AT_ONCE)
        redone = moved.then(self._redo, now, answered, trigger_mode="multiple", **STREAMED)
        found = [self.distance, self.found, self.positions, self.strip, *self.expected]
        looking = [self.inspect.click, self.text.submit]
        inspected = gr.on(
            looking, self._inspect, [self.text, *chosen], found, show_progress_on=self.inspect, **PRIVATE
        )
        running += [redone, inspected]
        ends = [  # what runs is cancelled first: its last words would be shown over what follows
            (self.stop.click, self._stop, [*chosen, self.shown], answered),
            (self.fresh.click, self._empty, chosen, everything),
            (self.mode.input, self._look, chosen, everything),
            (self.model.input, self._on_model, self.model, everything),
        ]
        for happens, follow, inputs, outputs in ends:
            happens(None, cancels=running, **AT_ONCE).then(follow, inputs, outputs, **AT_ONCE)
        self.sampling[1].change(_on_temperature, self.sampling[1], [self.again, self.sampling[-1]], **AT_ONCE)
        self.strip.select(_expect, self.positions, self.expected, **AT_ONCE)
        self.copy.click(None, js=COPY, **PRIVATE)
        page.load(self._from_link, None, everything, **AT_ONCE)

    def _view(self, pairing: Pairing, depth: int, shown: Shown) -> list[Any]:
        """What the widgets that hold answers show."""
        answers = html.cards(pairing, depth, shown.turns, shown.comparison, shown.chat)
        told, record = "", pairing.round(depth)
        headline = html.PARTS.headline(pairing.names(depth), pairing.description, shown.comparison, record)
        if shown.turns:
            choice = {"model": pairing.name, "depth": depth, "mode": CHAT if shown.chat else TEXT}
            told = html.PARTS.status(shown.comparison, {"prompt": shown.turns[-1][0], **choice, **shown.sampling})
        return [shown, headline, answers, told]

    def _stored(self, pairing: Pairing, depth: int, chat: bool) -> Shown | None:
        """The first example with its answers, if somebody asked for it already."""
        found, own = self.service.stored.get((pairing.name, depth, chat)), pairing.samplings[chat]
        turn = found and (pairing.prompts(chat)[0], found.original.text, found.compressed.text)
        return found and Shown((turn,), found, chat, {name: getattr(own, name) for name in SETTINGS})

    def _answers(
        self, pairing: Pairing, depth: int, prompt: str, asked: Shown, original: Answer | None = None
    ) -> Iterator[Shown]:
        """What is shown while both answer a prompt, or one alone, after what was `asked` before."""
        growing = self.service.stream(prompt, pairing.name, depth, asked.chat, asked.sampling, asked.turns, original)
        for comparison in growing:
            turn = (prompt, comparison.original.text, comparison.compressed.text)
            yield replace(asked, turns=(*asked.turns, turn), comparison=comparison)

    def _compare(
        self, prompt: str, model: str, depth: int, mode: str, shown: Shown, *sampling: float
    ) -> Iterator[list[Any]]:
        chat, pairing = mode == CHAT, self.service.pairing(model)
        goes_on = chat and shown.chat and shown != self._stored(pairing, depth, chat)
        asked = Shown(shown.turns if goes_on else (), chat=chat, sampling=dict(zip(SETTINGS, sampling, strict=True)))
        box: Any = "" if chat else prompt  # a message leaves its box when it is accepted
        try:
            for now in self._answers(pairing, depth, prompt, asked):
                yield [*self._view(pairing, depth, now), box]
                box = gr.skip()
        except LayerPruneError as error:
            yield [*_refused(error), gr.skip()]

    def _compare_example(self, sample: list[str], *asked: Any) -> Iterator[list[Any]]:
        yield from self._compare(sample[0], *asked)

    def _compare_again(self, model: str, depth: int, mode: str, shown: Shown, *sampling: float) -> Iterator[list[Any]]:
        yield [gr.skip()] * 5
        if shown.turns:
            before = replace(shown, turns=shown.turns[:-1])
            yield from self._compare(shown.turns[-1][0], model, depth, mode, before, *sampling)

    def _on_depth(self, model: str, depth: int, mode: str, shown: Shown, wanted: dict[str, int]) -> list[Any]:
        """Show the other student at once, without its words; the original's answer stays."""
        wanted |= {"depth": depth, "number": wanted.get("number", 0) + 1}
        pairing, (_, *look) = self.service.pairing(model), self._look(model, depth, mode, "")
        turns = tuple((prompt, said, "") for prompt, said, _ in shown.turns)
        comparison = replace(self.service.blank(pairing, depth), original=shown.comparison.original)
        return [*self._view(pairing, depth, replace(shown, turns=turns, comparison=comparison)), *look[3:8]]

    def _redo(self, model: str, depth: int, mode: str, shown: Shown, wanted: dict[str, int]) -> Iterator[list[Any]]:
        """Let the other student answer all that was asked, until yet another depth is chosen. The original answers
        again only what it has not answered to the end."""
        pairing, turns, last = self.service.pairing(model), shown.turns, shown.comparison.original
        mine = wanted | {"depth": depth}
        yield [gr.skip()] * 4  # without a word Gradio empties what waits for one
        for number, (prompt, said, _) in enumerate(turns, 1):
            asked, is_last = replace(shown, turns=turns[: number - 1]), number == len(turns)
            original = last if is_last else Answer(text=said, ending="end")
            try:
                for now in self._answers(pairing, depth, prompt, asked, original):
                    if wanted != mine:
                        yield [gr.skip()] * 4  # Gradio shows once more what came last
                        return
                    turns = (*now.turns, *turns[number:])
                    comparison = now.comparison if is_last else replace(now.comparison, original=last)
                    yield self._view(pairing, depth, replace(now, turns=turns, comparison=comparison))
            except LayerPruneError as error:
                yield _refused(error)
                return

    def _stop(self, model: str, depth: int, mode: str, shown: Shown) -> list[Any]:
        stopped = replace(shown, comparison=shown.comparison.stopped()) if shown.turns else shown
        return self._view(self.service.pairing(model), depth, stopped)

    def _empty(self, model: str, depth: int, mode: str) -> list[Any]:
        return self._look(model, depth, mode, "")

    def _on_model(self, model: str) -> list[Any]:
        pairing = self.service.pairing(model)
        return self._look(model, pairing.depths[-1], CHAT if pairing.can_chat else TEXT)

    def _from_link(self, request: gr.Request) -> list[Any] | None:
        """Everything as a link to a comparison says, which the visitor may then ask for."""
        given = dict(request.query_params)
        if "prompt" not in given:
            return gr.skip()
        try:
            pairing = self.service.pairing(given.get("model", ""))
            depth = pairing.student(float(given.get("depth", 0))).plan.depth
            chat = pairing.can_chat and given.get("mode") == CHAT
            values = {name: float(given[name]) for name in SETTINGS if name in given}
            sampling = pairing.samplings[chat].changed(values, self.service.limits)
        except (LayerPruneError, ValueError):
            gr.Warning("This link is of another list of models.")
            return gr.skip()
        prompt = given["prompt"][: self.service.limits.max_prompt_characters]
        return self._look(pairing.name, depth, CHAT if chat else TEXT, prompt, sampling)

    def _inspect(self, text: str, model: str, depth: int, mode: str) -> list[Any]:
        try:
            positions = self.service.inspect(text, model, depth)
        except LayerPruneError as error:
            return [html.PARTS.refusal(str(error)), *[gr.skip()] * 5]
        kls = [position.kl for position in positions]
        worst, most = max(range(len(kls)), key=kls.__getitem__), sorted(kls)[round(0.95 * (len(kls) - 1))]
        strip = [(visible(position.token), 0.75 * min(1.0, position.kl / (most or 1.0))) for position in positions]
        label = f"The redder, the more they differ after a token; full red is {most:.2f} or more. Choose a token."
        told = html.PARTS.distance(sum(kls) / len(kls), visible(positions[worst].token), kls[worst])
        shown = gr.HighlightedText(strip, label=label)
        return [told, gr.Column(visible=True), positions, shown, *labels_of(positions[worst])]


def _render(*widgets: Any) -> None:
    for widget in widgets:
        widget.render()


def _refused(error: LayerPruneError) -> list[Any]:
    """What was shown before, and why nothing was done."""
    return [*[gr.skip()] * 3, html.PARTS.refusal(str(error))]


def _on_temperature(temperature: float) -> list[Any]:
    """A seed means nothing where nothing is drawn."""
    return [gr.Button(visible=temperature > 0), gr.Slider(visible=temperature > 0)]


def _expect(positions: list[Position], event: gr.SelectData) -> list[dict[str, float]]:
    return labels_of(positions[event.index])


def labels_of(position: Position) -> list[dict[str, float]]:
    """What both models expect after a token, as `gr.Label` takes it."""
    labels: list[dict[str, float]] = [{}, {}]
    for label, expected in zip(labels, (position.original, position.compressed), strict=True):
        for token, share in expected:
            name = visible(token)
            while name in label:  # tokens can look alike, such as parts of a character
                name += "\u200b"  # no one sees it
            label[name] = share
    return labels


def visible(token: str) -> str:
    """A token with its white space visible."""
    return token.translate(WHITE_SPACE) or "\u2205"
