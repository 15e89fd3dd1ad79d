"""Two answers beside each other, and under each what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...report import millions
from ..catalog import Pairing
from ..comparison import Snapshot
from ..difference import Piece, difference
from ..generation import DONE, FAILED, LOADING, STOPPED, WAITING, WRITING, Answer
from .summary import summary_of
from .text import duration, escaped, memory, notice, rate

STATES = {
    WAITING: "waits",
    LOADING: "loading",
    WRITING: "writing",
    DONE: "",
    STOPPED: "stopped",
    FAILED: "error",
}
CUT = "Cut: this took as long as an answer may."
NOTHING = "\u2013"
LEGEND = '<p class="lp-legend"><mark class="lp-first">Here</mark> the answers part'
MARKED = "; <mark>marked</mark> words are not in the other answer at that place"


def render_comparison(
    snapshot: Snapshot,
    prompt: str,
    chat: bool = False,
    history: Sequence[tuple[str, str, str]] = (),
    told: str = "",
) -> str:
    """A comparison: what it showed, and the two answers.

    Args:
        snapshot ([`Snapshot`]): the comparison.
        prompt (`str`): what the visitor wrote.
        chat (`bool`, *optional*, defaults to `False`): whether it was a message of a conversation.
        history (`Sequence[tuple]`, *optional*): the turns before.
        told (`str`, *optional*): a notice in the place of what it showed.
    """
    answers = (snapshot.original, snapshot.compressed)
    if snapshot.ended and all(answer.state in (DONE, STOPPED) for answer in answers):
        pieces = difference(answers[0].text, answers[1].text)
    else:
        pieces = tuple([Piece(answer.text, False)] for answer in answers)
    cards = []
    for side, (answer, parts) in enumerate(zip(answers, pieces, strict=True)):
        before = [(turn[0], turn[side + 1]) for turn in history]
        body = _chat(before, prompt, answer, parts) if chat else _text(prompt, answer, parts)
        cards.append(_card(side, _headline(answer), STATES[answer.state], body, _facts(answer, answers[0])))
    html = "".join(cards)
    legend = f"{LEGEND}{MARKED * ('<mark>' in html)}.</p>" if "<mark" in html else ""
    return f'{told or notice(summary_of(snapshot))}{legend}<div class="lp-pair">{html}</div>'


def render_empty(pairing: Pairing, depth: int, chat: bool = False, told: str = "") -> str:
    """The two columns before anything was asked, perhaps with a notice of its own above them."""
    doing = "answers your message" if chat else "continues your text"
    record = (pairing.rounds(depth) or [{}])[-1]
    teacher = pairing.report["teacher"] if pairing.report else {}
    layers = (pairing.plans[depth].num_teacher_layers, depth)
    sizes = (teacher.get("num_parameters"), record.get("num_parameters"))
    cards = []
    for side, who in enumerate(("the original", "the compressed model")):
        headline = _size_line(layers[side], sizes[side])
        body = f'<p class="lp-hint">Here {who} {doing}.</p>'
        cards.append(_card(side, headline, "", body, _facts(Answer(), Answer())))
    told = told or notice("Both models get the same words, the same settings and the same luck of the draw.")
    return f'{told}<div class="lp-pair">{"".join(cards)}</div>'


def _card(side: int, headline: str, state: str, body: str, facts: str) -> str:
    kind, title = (("original", "Original"), ("compressed", "Compressed"))[side]
    shown = f'<span class="lp-state lp-{state}">{state}</span>' if state else ""
    return (
        f'<section class="lp-card lp-{kind}" aria-label="{title}"><header><h3>{title}</h3>'
        f'<span class="lp-size">{headline}</span>{shown}</header><div class="lp-body" dir="auto">{body}</div>'
        f"{facts}</section>"
    )


def _headline(answer: Answer) -> str:
    return _size_line(answer.num_layers, answer.num_parameters)


def _size_line(layers: int | None, parameters: int | None) -> str:
    texts = [f"{layers} layers"] if layers else []
    texts += [f"{millions(parameters)} parameters"] if parameters else []
    return ", ".join(texts)


def _text(prompt: str, answer: Answer, pieces: list[Piece]) -> str:
    before = f'<span class="lp-prompt">{escaped(prompt)}</span>'
    return f'<p class="lp-words">{before}{_written(answer, pieces)}</p>{_end(answer)}'


def _chat(before: Sequence[tuple[str, str]], prompt: str, answer: Answer, pieces: list[Piece]) -> str:
    turns = "".join(
        f'<p class="lp-words lp-user">{escaped(asked)}</p><p class="lp-words">{escaped(said)}</p>'
        for asked, said in before
    )
    written = f'<p class="lp-words">{_written(answer, pieces)}</p>'
    return f'{turns}<p class="lp-words lp-user">{escaped(prompt)}</p>{written}{_end(answer)}'


def _written(answer: Answer, pieces: list[Piece]) -> str:
    first = next((piece for piece in pieces if piece.parts), None)
    words = "".join(_piece(piece, piece is first) for piece in pieces)
    return words + '<span class="lp-cursor" aria-hidden="true"></span>' * (answer.state == WRITING)


def _piece(piece: Piece, first: bool) -> str:
    if not piece.parts:
        return escaped(piece.text)
    if not first:
        return f"<mark>{escaped(piece.text)}</mark>"
    space = piece.text[: len(piece.text) - len(piece.text.lstrip())]
    word, *rest = piece.text.lstrip().split(maxsplit=1)
    after = piece.text[len(space) + len(word) :]
    return f'{escaped(space)}<mark class="lp-first">{escaped(word)}</mark>' + (
        f"<mark>{escaped(after)}</mark>" if rest else escaped(after)
    )


def _end(answer: Answer) -> str:
    if answer.state == FAILED:
        return f'<p class="lp-problem" role="alert">{escaped(answer.error)}</p>'
    if answer.state == DONE and not answer.text:
        return '<p class="lp-hint">It ended at once, without a word.</p>'
    return f'<p class="lp-hint">{CUT}</p>' if answer.cut == "time" else ""


def _facts(answer: Answer, original: Answer) -> str:
    """Six values; the speed of the compressed model with how often it has the original's."""

    def shown(value: float | None, form: Callable[[Any], str]) -> str:
        return NOTHING if value is None else form(value)

    own, base = answer.tokens_per_second, original.tokens_per_second
    known = answer is not original and answer.ended and original.ended and own and base
    times = f' <span class="lp-times">{own / base:.2f}\u00d7</span>' if known else ""
    facts = {
        "tokens/s": shown(own, rate) + times,
        "first token": shown(answer.time_to_first_token, duration),
        "tokens": str(answer.num_tokens) if answer.num_tokens else NOTHING,
        "peak memory" if answer.memory_measured else "memory (est.)": shown(answer.peak_memory_bytes, memory),
        "parameters": shown(answer.num_parameters, millions),
        "layers": NOTHING if answer.num_layers is None else str(answer.num_layers),
    }
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    return f'<dl class="lp-facts">{cells}</dl>'
