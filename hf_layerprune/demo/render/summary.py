"""The line that says what was measured, and nothing that was not."""

from __future__ import annotations

from ...report import millions
from ..comparison import AT_ONCE, Snapshot
from ..difference import words_in_common
from ..generation import DONE, FAILED, LOADING, STOPPED, Answer
from .text import rate

FEW_TOKENS = 16
"""With fewer, a speed is a guess."""


def summary_of(snapshot: Snapshot) -> str:
    """What a comparison has shown so far, as plain text."""
    original, compressed = snapshot.original, snapshot.compressed
    if not snapshot.ended:
        return _progress(snapshot)
    if FAILED in (original.state, compressed.state):
        names = [name for name, answer in _named(snapshot) if answer.state == FAILED]
        both = len(names) == 2
        return "Neither model could answer." if both else f"The {names[0]} could not answer; the other one did."
    parts = [_speed(original, compressed, snapshot.order), _size(original, compressed)]
    if original.state == compressed.state == DONE:
        parts.append(_words(original.text, compressed.text))
    if STOPPED in (original.state, compressed.state):
        parts.insert(0, "Stopped.")
    return " ".join(part for part in parts if part)


def _named(snapshot: Snapshot) -> list[tuple[str, Answer]]:
    return [("original", snapshot.original), ("compressed model", snapshot.compressed)]


def _progress(snapshot: Snapshot) -> str:
    if snapshot.order == AT_ONCE:
        loading = LOADING in (snapshot.original.state, snapshot.compressed.state)
        return "Loading the models \u2026" if loading else "Both models are writing \u2026"
    name, answer = next((name, answer) for name, answer in _named(snapshot) if not answer.ended)
    return f"Loading the {name} \u2026" if answer.state == LOADING else f"The {name} is writing \u2026"


def _speed(original: Answer, compressed: Answer, order: str) -> str:
    speeds = (original.tokens_per_second, compressed.tokens_per_second)
    if not speeds[0] or not speeds[1]:
        return ""
    ratio = speeds[1] / speeds[0]
    measured = f"{rate(speeds[1])} tokens/s against {rate(speeds[0])}"
    text = f"The compressed model ran at {ratio:.2f} times the speed of the original: {measured}."
    if min(original.num_tokens, compressed.num_tokens) < FEW_TOKENS:
        return text + " These were few tokens; longer answers measure better."
    if order == AT_ONCE:
        return text + " Both shared the device; one after the other is the fair measurement."
    return text


def _size(original: Answer, compressed: Answer) -> str:
    sizes = (original.num_parameters, compressed.num_parameters)
    if not sizes[0] or not sizes[1]:
        return ""
    depths = f"{compressed.num_layers} layers instead of {original.num_layers}"
    share = 1 - sizes[1] / sizes[0]
    if abs(share) < 0.005:
        return f"It has {depths} and as many parameters."
    more = "fewer" if share > 0 else "more"
    return f"It has {depths} and {abs(share):.0%} {more} parameters ({millions(sizes[1])})."


def _words(first: str, second: str) -> str:
    same = words_in_common(first, second)
    if same is None:
        return "Both gave the same answer."
    if same == 0:
        return "The answers part at the first word."
    return f"The answers part after {same} word{'s' * (same != 1)}."
