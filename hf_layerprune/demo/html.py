"""The parts of the page that are ours, as HTML, from `templates/demo/page.html.jinja`.

Words of visitors and models are escaped. Of Markdown, links and pictures stay text: an answer must not make the page
ask another host for anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markdown_it import MarkdownIt  # comes with rich
from markupsafe import Markup

from ..plan import LayerPlan
from ..report import millions
from .catalog import Pairing
from .comparison import Comparison, Span, first_difference, rate
from .service import Turn

TEMPLATES = Path(__file__).parent.parent / "templates" / "demo"
BEGIN, END = "\ue000", "\ue001"  # around the word to mark while Markdown is rendered
OWN = dict.fromkeys(map(ord, (BEGIN, END)), "\ufffd")  # a text that holds them shows that it cannot be shown
MARKS = str.maketrans({BEGIN: '<mark title="first difference">', END: "</mark>"})


MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable("table")
# without attributes, which a mark could break
MARKDOWN.options["highlight"] = lambda code, *_: f"<pre><code>{escape(code)}</code></pre>"
MARKDOWN.disable(["link", "image", "autolink", "reference"])
ENVIRONMENT = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
ENVIRONMENT.filters |= {"millions": millions, "rate": rate}
PARTS: Any = ENVIRONMENT.get_template("page.html.jinja").module  # the macros: headline, status, refusal, distance


def marked(text: str, span: Span | None, as_markdown: bool) -> Markup:
    """Words of a model as HTML, with the word at `span` marked."""
    text = text.translate(OWN)
    if span and span[0] < span[1]:
        text = f"{text[: span[0]]}{BEGIN}{text[slice(*span)]}{END}{text[span[1] :]}"
    return Markup((MARKDOWN.render(text) if as_markdown else escape(text)).translate(MARKS))


def cards(pairing: Pairing, depth: int, turns: Sequence[Turn], comparison: Comparison, chat: bool = False) -> str:
    """The answers of both models side by side: of each its name and size, its words, its speed."""
    shown = []
    for prompt, *said in turns:
        spans = (comparison.ended and len(shown) + 1 == len(turns) and first_difference(*said)) or (None, None)
        shown.append((prompt, *map(partial(marked, as_markdown=chat), said, spans)))
    return PARTS.cards(pairing.names(depth), (comparison.original, comparison.compressed), shown, chat)


def layer_strip(plan: LayerPlan) -> str:
    """The teacher's layers in a row: which are left, and which became one block."""
    cells, blocks = [], {block[0]: block for block in plan.blocks}
    for layer in range(plan.num_teacher_layers):
        if layer not in plan.layers:
            cells.append(("gone", (layer,)))
        elif block := blocks.get(layer):
            cells.append(("merged" if block in plan.merged else "parallel" if block[1:] else "kept", block))
    return PARTS.layers(plan, cells)


def map_label(pairing: Pairing) -> str:
    """What the bars and lines of the layer map mean."""
    rounds = pairing.run.rounds if pairing.run else ()
    edits = {edit for record in rounds for scores in record.scores for edit in scores.values}
    if not edits:
        return "What became of each layer"
    removed, one = "this layer is removed", "these layers become one"
    kinds = {edit.kind == "remove" for edit in edits}
    what = f"{removed} (bars), or {one} (lines)" if len(kinds) == 2 else removed if True in kinds else one
    is_kl = bool(rounds) and rounds[-1].criterion == "kl"
    return f"How much predictions change if {what}; log scale" if is_kl else f"What it costs if {what}"
