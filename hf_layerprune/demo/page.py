"""The page of the demo, made of Gradio's components, and its one API endpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import gradio as gr

from ..errors import LayerPruneError
from ..report import millions
from .catalog import Pairing
from .generation import RANGES, Answer, Position
from .service import Comparison, DemoService, Turn, first_difference, rate

TEXT, CHAT = "Continue a text", "Chat"
EXAMPLES = (
    "The old man looked out of the window and",
    "She opened the letter slowly, and when she had read it",
    "It was a dark and stormy night;",
)
CHAT_EXAMPLES = (
    "Why is the sky blue? Answer in two sentences.",
    "Write a short poem about a lighthouse.",
    "Name three differences between a list and a tuple in Python.",
)
SAMPLING = {
    "max_new_tokens": ("Longest answer", "tokens", 1),
    "temperature": ("Temperature", "0 takes the most likely token every time", 0.05),
    "top_p": ("Top-p", "sample from the tokens that hold this share of the probability", 0.01),
    "top_k": ("Top-k", "sample from this many tokens; 0 means all", 1),
    "repetition_penalty": ("Repetition penalty", "1 means none", 0.01),
    "seed": ("Seed", "the same random numbers for both models", 1),
}
"""Label, explanation and step of each setting."""
PROMPT, DIFFERENT = "prompt", "first difference"
COLORS = {PROMPT: "#bae6fd", DIFFERENT: "#fbbf24"}
"""Gradio blends each with the background; black text is readable on both, in light and dark mode."""
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", **PRIVATE}
ON_DEVICE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "device"}
"""One at a time, so that what is measured is measured alone."""
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
"""The system's: the page asks no other host for any."""
READABLE = {
    "block_info_text_color": "*neutral_600",
    "block_info_text_color_dark": "*neutral_300",
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
    "button_primary_background_fill_dark": "*primary_700",
}
WHOLE_WORDS = ".textfield { word-break: normal !important; overflow-wrap: anywhere; }"
WHITE_SPACE = str.maketrans({" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"})


def build_page(service: DemoService) -> gr.Blocks:
    """The app of a demo, not yet running."""
    with gr.Blocks(title=service.settings.title, analytics_enabled=False) as page:
        gr.Markdown(f"# {service.settings.title}\nA language model, and a copy of it with fewer layers.")
        DemoPage(service)
        add_api(service)
    return page.queue(max_size=service.limits.max_waiting, default_concurrency_limit=1)


def launch_page(page: gr.Blocks, **options: Any) -> Any:
    """Serve a page, with an MCP server where Gradio's extra for it is installed; `options` go to `launch`."""
    theme = gr.themes.Default(primary_hue="teal", neutral_hue="slate", **FONTS).set(**READABLE)
    fixed = {"theme": theme, "css": WHOLE_WORDS, "footer_links": ["api"], "ssr_mode": False}
    return page.launch(mcp_server=find_spec("mcp") is not None, **fixed, **options)


class DemoPage:
    """Widgets, and what they do."""

    def __init__(self, service: DemoService) -> None:
        self.service = service
        first, names = service.pairing(), list(service.catalog)
        with gr.Row():
            self.model = gr.Dropdown(
                names, value=first.name, label="Model", visible=len(names) > 1, elem_id="lp-model"
            )
            self.depth = gr.Radio(**depths_of(first), label="Layers of the compressed model", elem_id="lp-depth")
        self.about = gr.Markdown(first.description)
        with gr.Tab("Compare"):
            self._compare_tab(first)
        with gr.Tab("Look inside"):
            self._inside_tab(first)
        self._wire()

    def _compare_tab(self, first: Pairing) -> None:
        mode = CHAT if first.can_chat else TEXT
        self.turns = gr.State([])
        self.mode = gr.Radio([TEXT, CHAT], value=mode, show_label=False, visible=first.can_chat, elem_id="lp-mode")
        limit = self.service.limits.max_prompt_characters
        self.prompt = gr.Textbox(
            label="Prompt", info="Shift+Enter sends it", lines=2, max_length=limit, elem_id="lp-prompt"
        )
        with gr.Row():
            self.run = gr.Button("Compare", variant="primary", elem_id="lp-run")
            self.stop = gr.Button("Stop", variant="stop", elem_id="lp-stop")
            self.fresh = gr.Button("Clear", elem_id="lp-new")
        with gr.Row():
            self.original = answer_box("Original", "lp-original")
            self.compressed = answer_box("Compressed", "lp-compressed")
        self.facts = gr.Markdown(facts_of(Comparison()), elem_id="lp-facts")
        self.examples = gr.Dataset(components=[self.prompt], samples=examples_of(first, mode), label="Examples")
        with gr.Accordion("Sampling, the same for both", open=False, elem_id="lp-sampling"), gr.Row():
            self.sampling = [gr.Slider(**setting, min_width=260) for setting in self._settings(first)]

    def _inside_tab(self, first: Pairing) -> None:
        self.layers = gr.Markdown(first.about_layers(first.depths[-1]), elem_id="lp-layers")
        with gr.Row():
            self.layer_map, self.quality = plots_of(first, first.depths[-1])
        limit = f"at most {self.service.limits.max_inspected_tokens} tokens; Shift+Enter sends it"
        text = examples_of(first, TEXT)[0][0]
        label = "Where do they expect different words?"
        self.text = gr.Textbox(text, label=label, info=limit, lines=2, elem_id="lp-text")
        self.inspect = gr.Button("Compare next tokens", variant="primary", elem_id="lp-inspect")
        self.distance = gr.Markdown()
        self.positions = gr.State([])
        self.strip = gr.HighlightedText(
            label="KL from the original to the compressed model: red is 1 nat or more. Choose a token",
            elem_id="lp-positions",
        )
        with gr.Row():
            self.expected = [gr.Label(label=f"{name} expects next") for name in ("Original", "Compressed")]

    def _wire(self) -> None:
        chosen = [self.model, self.depth]
        answered = [self.turns, self.original, self.compressed, self.facts]
        inside = [self.layers, self.layer_map, self.quality, self.distance, self.positions, self.strip, *self.expected]
        compared = gr.on(
            [self.run.click, self.prompt.submit],
            self._compare,
            [self.prompt, *chosen, self.mode, self.turns, *self.sampling],
            [*answered, self.prompt],
            show_progress="minimal",
            **PRIVATE,
            **ON_DEVICE,
        )
        inspected = gr.on(
            [self.inspect.click, self.text.submit],
            self._inspect,
            [self.text, *chosen],
            [self.distance, self.positions, self.strip, *self.expected],
            **PRIVATE,
            **ON_DEVICE,
        )
        running = {"cancels": [compared, inspected], **AT_ONCE}  # an answer belongs to what was chosen at its start
        choice = [self.depth, self.about, self.mode, self.examples, *self.sampling]
        self.stop.click(None, cancels=[compared], **PRIVATE)
        self.fresh.click(self._empty, None, answered, **running)
        self.mode.input(self._on_mode, [self.model, self.mode], [*answered, self.examples], **running)
        self.model.input(self._on_model, self.model, [*answered, *inside, *choice], **running)
        self.depth.input(self._on_depth, chosen, [*answered, *inside], **running)
        self.examples.click(lambda sample: sample[0], self.examples, self.prompt, **AT_ONCE)
        self.strip.select(self._expect, self.positions, self.expected, **AT_ONCE)

    def _compare(
        self, prompt: str, model: str, depth: int, mode: str, turns: list[Turn], *sampling: float
    ) -> Iterator[list[Any]]:
        chat = mode == CHAT
        before, box = (turns, "") if chat else ([], gr.skip())  # a message leaves its box when it is accepted
        values = dict(zip(SAMPLING, sampling, strict=True))
        with shown_to_visitors():
            for comparison in self.service.stream(prompt, model, depth, chat, values, before):
                now = [*before, (prompt, comparison.original.text, comparison.compressed.text)]
                where = first_difference(*now[-1][1:]) if comparison.ended else None
                words = [words_of(now, side, where[side] if where else None) for side in (0, 1)]
                yield [now, *words, facts_of(comparison), box]
                box = gr.skip()

    def _inspect(self, text: str, model: str, depth: int) -> list[Any]:
        with shown_to_visitors():
            positions = self.service.inspect(text, model, depth)
        kls = [position.kl for position in positions]
        worst = max(range(len(kls)), key=kls.__getitem__)
        told = f"{sum(kls) / len(kls):.3f} nats per token on average; farthest apart after token {worst + 1}."
        strip = [(visible(position.token), 0.75 * min(1.0, position.kl)) for position in positions]
        return [told, positions, strip, *labels_of(positions[worst])]

    def _expect(self, positions: list[Position], event: gr.SelectData) -> list[dict[str, float]]:
        return labels_of(positions[event.index])

    def _empty(self) -> list[Any]:
        return [[], None, None, facts_of(Comparison())]

    def _on_mode(self, model: str, mode: str) -> list[Any]:
        return [*self._empty(), gr.Dataset(samples=examples_of(self.service.pairing(model), mode))]

    def _on_depth(self, model: str, depth: int) -> list[Any]:
        pairing = self.service.pairing(model)
        return [*self._empty(), pairing.about_layers(depth), *plots_of(pairing, depth), "", [], None, None, None]

    def _on_model(self, model: str) -> list[Any]:
        pairing = self.service.pairing(model)
        mode = CHAT if pairing.can_chat else TEXT
        return [
            *self._on_depth(model, pairing.depths[-1]),
            gr.Radio(**depths_of(pairing)),
            pairing.description,
            gr.Radio(value=mode, visible=pairing.can_chat),
            gr.Dataset(samples=examples_of(pairing, mode)),
            *(gr.Slider(**setting) for setting in self._settings(pairing)),
        ]

    def _settings(self, pairing: Pairing) -> Iterator[dict[str, Any]]:
        for name, (label, info, step) in SAMPLING.items():
            low, high = RANGES.get(name, (1, self.service.most_new_tokens(pairing)))
            value = getattr(pairing.sampling, name)
            yield {"minimum": low, "maximum": high, "value": value, "step": step, "label": label, "info": info}


def add_api(service: DemoService) -> None:
    """Add the endpoint for programs, `compare`, to the page that is being built; it is an MCP tool too."""

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
        sampling = {name: given[name] for name in SAMPLING}
        with shown_to_visitors():
            for comparison in service.stream(prompt, model, depth, chat, sampling):
                yield comparison.to_dict()

    gr.api(compare, api_name="compare", **ON_DEVICE)


@contextmanager
def shown_to_visitors() -> Iterator[None]:
    """Show a visitor what a [`LayerPruneError`] says; of any other error the log has it all, the page nothing."""
    try:
        yield
    except LayerPruneError as error:
        raise gr.Error(str(error), print_exception=False) from None


def answer_box(label: str, name: str) -> gr.HighlightedText:
    """The words of one model, which are shown as text and nothing else."""
    return gr.HighlightedText(label=label, color_map=COLORS, show_inline_category=False, elem_id=name, min_width=320)


def words_of(turns: list[Turn], side: int, where: int | None) -> list[tuple[str, str | None]]:
    """What the box of a side (0 is the original) shows of a conversation, the first different word of the last answer
    marked, which begins at `where`."""
    words: list[tuple[str, str | None]] = []
    for turn in turns:
        words += [(turn[0], PROMPT), (turn[1 + side], None), ("\n\n", None)]
    if where is None:
        return words[:-1]
    answer = words[-2][0]
    end = where + len(answer[where:].split(maxsplit=1)[0]) if answer[where:] else where
    parts = [(answer[:where], None), (answer[where:end], DIFFERENT), (answer[end:], None)]
    return words[:-2] + [part for part in parts if part[0]]


def facts_of(comparison: Comparison) -> str:
    """What was measured, as a Markdown table, and in words."""
    original, compressed = _facts(comparison.original), _facts(comparison.compressed)
    rows = [f"| {name} | {original[name]} | {compressed[name]} |" for name in original]
    return "\n".join(["| | Original | Compressed |", "|---|---:|---:|", *rows, "", comparison.summary])


def _facts(answer: Answer) -> dict[str, str]:
    numbers: dict[str, tuple[float | None, Callable[[Any], str]]] = {
        "tokens/s": (answer.tokens_per_second, rate),
        "first token": (answer.time_to_first_token, lambda seconds: f"{1000 * seconds:.0f} ms"),
        "tokens": (answer.num_tokens or None, str),
        "weights and KV cache": (answer.memory_bytes, lambda size: f"{size / 1e6:,.1f} MB"),
        "parameters": (answer.num_parameters, millions),
        "layers": (answer.num_layers, str),
    }
    return {name: "\u2013" if value is None else show(value) for name, (value, show) in numbers.items()}


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


def plots_of(pairing: Pairing, depth: int) -> tuple[gr.Plot, gr.Plot]:
    """The layer map of a depth and the quality curve of its run, hidden without a run."""
    layer_map, quality = pairing.layer_map(depth), pairing.quality()
    return (
        gr.Plot(layer_map, visible=layer_map is not None, show_label=False, elem_id="lp-map"),
        gr.Plot(quality, visible=quality is not None, show_label=False, elem_id="lp-quality"),
    )


def depths_of(pairing: Pairing) -> dict[str, Any]:
    """The depths to choose from, as options of the widget."""
    return {"choices": pairing.depths, "value": pairing.depths[-1], "visible": len(pairing.depths) > 1}


def examples_of(pairing: Pairing, mode: str) -> list[list[str]]:
    """Prompts to click, as `gr.Dataset` takes them."""
    return [[text] for text in pairing.examples or (CHAT_EXAMPLES if mode == CHAT else EXAMPLES)]
