"""The parts of the page that are ours: the headline, the card of an answer, the strip of layers, as HTML.

Words of visitors and models are escaped here. Of Markdown, links and pictures stay text: an answer must not make the
page ask another host for anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from urllib.parse import urlencode

from markdown_it import MarkdownIt  # comes with rich
from markdown_it.renderer import RendererHTML

from ..plan import LayerPlan
from ..report import millions
from .catalog import Pairing
from .comparison import Comparison, Span, first_difference, rate
from .generation import Answer
from .service import Turn

SIDES = ("Original", "Compressed")
BEGIN, END = "\ue000", "\ue001"
"""Stand around the word to mark while Markdown is rendered; no text holds them."""
MARKS = str.maketrans({BEGIN: '<mark title="first difference">', END: "</mark>"})
ENDINGS = {
    "length": "cut at {n} tokens",
    "time": "cut by the time limit after {n} tokens",
    "stopped": "stopped after {n} tokens",
    "not run": "not run",
}
EMPTY = '<p class="lp-empty">The answer appears here. Write a prompt below, or choose an example.</p>'
STATES = {
    "kept": "kept",
    "parallel": "in parallel, as one layer",
    "merged": "merged into one layer",
    "gone": "removed",
}
"""What became of a layer, in the words of `layers.png`."""


class Markdown(RendererHTML):
    """Blocks of code carry no attributes, which a mark could break."""

    def fence(self, tokens: Sequence, index: int, options: object, env: object) -> str:
        return f"<pre><code>{escape(tokens[index].content)}</code></pre>\n"


MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": True}, renderer_cls=Markdown).enable("table")
MARKDOWN.disable(["link", "image", "autolink", "reference"])


def marked(text: str, span: Span | None, as_markdown: bool) -> str:
    """Words of a model as HTML, with the word at `span` marked."""
    text = text.replace(BEGIN, "").replace(END, "") if BEGIN in text or END in text else text
    if span and span[0] < span[1] <= len(text):
        text = text[: span[0]] + BEGIN + text[slice(*span)] + END + text[span[1] :]
    return (MARKDOWN.render(text) if as_markdown else escape(text)).translate(MARKS)


def cards(pairing: Pairing, depth: int, turns: Sequence[Turn], comparison: Comparison, chat: bool = False) -> str:
    """The answers of both models side by side: of each its name and size, its words, its speed."""
    spans = first_difference(*turns[-1][1:]) if turns and comparison.ended else None
    both = (comparison.original, comparison.compressed)
    parts = []
    for side, (label, name, answer) in enumerate(zip(SIDES, pairing.names(depth), both, strict=True)):
        words = _words(turns, side, spans[side] if spans else None, chat) or EMPTY
        parts.append(
            f'<section class="lp-card" aria-label="{label}"><header><h2>{label}</h2>'
            f'<span class="lp-name">{linked(name)}</span><span>{_size(answer)}</span></header>'
            f'<div class="lp-body" tabindex="0" role="group" aria-label="{label} answer">'
            f'<div class="lp-words">{words}</div></div>{_footer(answer)}</section>'
        )
    return f'<div class="lp-cards">{"".join(parts)}</div>'


def _words(turns: Sequence[Turn], side: int, span: Span | None, chat: bool) -> str:
    parts = []
    for number, turn in enumerate(turns, 1):
        said = marked(turn[1 + side], span if number == len(turns) else None, as_markdown=chat)
        if chat:
            parts.append(f'<div class="lp-you">{escape(turn[0])}</div><div class="lp-said">{said}</div>')
        else:
            parts.append(f'<p class="lp-text"><span class="lp-you">{escape(turn[0])}</span>{said}</p>')
    return "".join(parts)


def linked(name: str) -> str:
    """A name, with a link to its card if it is a Hub id."""
    shown = escape(name)
    return (
        f'<a href="https://huggingface.co/{shown}" target="_blank" rel="noopener">{shown}</a>'
        if "/" in name
        else shown
    )


def _size(answer: Answer) -> str:
    known = [
        f"{answer.num_layers} layers" if answer.num_layers else "",
        f"{millions(answer.num_parameters)} parameters" if answer.num_parameters else "",
        answer.dtype or "",
    ]
    return " \u00b7 ".join(filter(None, known))


def _footer(answer: Answer) -> str:
    """What was measured of an answer; nothing before it has begun."""
    facts = [
        ("tokens/s", rate(answer.tokens_per_second) if answer.tokens_per_second else ""),
        ("first token", f"{1000 * answer.time_to_first_token:,.0f} ms" if answer.time_to_first_token else ""),
        ("tokens", str(answer.num_tokens or "")),
        ("weights and KV cache", f"{answer.memory_bytes / 1e6:,.0f} MB" if answer.memory_bytes else ""),
    ]
    shown = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts if value)
    ending = ENDINGS.get(answer.ending, "").format(n=answer.num_tokens)
    ending = f'<p class="lp-ending">{ending}</p>' if ending else ""
    return f"<footer>{f'<dl>{shown}</dl>' if shown else ''}{ending}</footer>"


def headline(pairing: Pairing, depth: int, comparison: Comparison) -> str:
    """Which models these are, and the numbers that matter: how much faster and smaller, and how much it costs."""
    teacher, student = comparison.original, comparison.compressed
    names = [linked(name) for name in pairing.names(depth)]
    tiles = [_speed_tile(pairing, depth, comparison)]
    layers = f"{student.num_layers} layers instead of {teacher.num_layers}"
    if (smaller := comparison.is_smaller) is not None:
        size = f"{millions(student.num_parameters)} parameters instead of {millions(teacher.num_parameters)}, {layers}"
        same = _tile(str(student.num_layers), f"layers instead of {teacher.num_layers}", "with as many parameters")
        tiles.append(_tile(f"{smaller:.0%}", "smaller", size) if smaller >= 0.005 else same)
    record = pairing.round(depth)
    if record and record.quality.kl is not None:
        about = "how far its predictions are from the original's, on average, in nats per token; 0 = identical"
        tiles.append(_tile(f"{record.quality.kl:.2g}", "KL divergence", about))
    about = f'<p class="lp-about">{escape(pairing.description)}</p>' if pairing.description else ""
    versus = f'<p class="lp-versus">{names[0]} <span>against</span> {names[1]}</p>'
    return f'{versus}{about}<div class="lp-tiles">{"".join(tiles)}</div>'


def _speed_tile(pairing: Pairing, depth: int, comparison: Comparison) -> str:
    record, ratio = pairing.round(depth), comparison.speed_ratio
    if ratio is not None:
        speeds = [rate(answer.tokens_per_second) for answer in (comparison.compressed, comparison.original)]
        about = f"{speeds[0]} tokens per second instead of {speeds[1]}, in these answers"
    elif record and record.speed:
        ratio, about = record.speed.report.decode_ratio, "tokens per second, as its run measured them"
    else:
        return ""
    faster = ratio >= 1.005
    return _tile(f"{ratio:.2f}\u00d7", "as fast" if faster else "the speed", about, "lp-good" if faster else "")


def _tile(number: str, unit: str, about: str, kind: str = "") -> str:
    return (
        f'<div class="lp-tile {kind}"><p class="lp-number"><strong>{number}</strong> {unit}</p>'
        f"<p>{escape(about)}</p></div>"
    )


def status(comparison: Comparison, link: dict[str, object] | None = None) -> str:
    """The line below the answers: what goes on, or what was found; `link` holds what a link to it must say."""
    if comparison.waiting:
        text = comparison.waiting
    elif not comparison.ended:
        writing = comparison.original.num_tokens or comparison.compressed.num_tokens
        text = (
            "Both write a token each in turn, on a clock each \u2026" if writing else "Getting the models ready \u2026"
        )
    else:
        text = escape(comparison.summary)
    more = f' <a href="?{escape(urlencode(link))}">Link to this comparison</a>' if link and comparison.ended else ""
    return f'<p role="status">{text}{more}</p>'


def refusal(text: str) -> str:
    """Why nothing was done."""
    return f'<p class="lp-refusal" role="alert">{escape(text[:1].upper() + text[1:])}</p>'


def layer_strip(plan: LayerPlan) -> str:
    """The teacher's layers in a row: which are left, and which became one block."""
    cells, blocks = [], {block[0]: block for block in plan.blocks}
    for layer in range(plan.num_teacher_layers):
        block = blocks.get(layer, ())
        if layer not in plan.layers:
            cells.append(f'<li class="lp-gone"><span title="removed">{layer}</span></li>')
        elif block:
            kind = "merged" if block in plan.merged else "parallel" if len(block) > 1 else "kept"
            inside = "".join(f"<span>{one}</span>" for one in block)
            cells.append(f'<li class="lp-{kind}" title="{STATES[kind]}">{inside}</li>')
    used = [kind for kind in STATES if f"lp-{kind}" in "".join(cells)]
    legend = "".join(f'<li class="lp-{kind}"><span></span> {STATES[kind]}</li>' for kind in used)
    strip = f'<ol class="lp-strip" aria-label="Layers">{"".join(cells)}</ol><ul class="lp-legend">{legend}</ul>'
    return f"<p>{plan.num_teacher_layers} layers of the original became {plan.depth}:</p>{strip}"


def differing(mean: float, token: str, most: float) -> str:
    """How far two models are apart in a text, in words."""
    return (
        f'<p role="status">Predictions differ by {mean:.2f} on average (0 = identical); most after '
        f"\u2018{escape(token)}\u2019, by {most:.2f}. The measure is the KL divergence, in nats.</p>"
    )


def map_label(pairing: Pairing) -> str:
    """What the bars and lines of the layer map mean."""
    groups = pairing.run and any(edit.kind != "remove" for edit in pairing.run.edits)
    lines = " (bars), or these become one (lines)" if groups else ""
    return f"How much predictions change if this layer is removed{lines}; log scale"
