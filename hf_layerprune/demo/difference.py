"""Where two answers part: the words that one has and the other has not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

WORD = re.compile(r"\s*\S+|\s+$")
MOST_PAIRS = 4000
"""Equal words of both answers that are tried against each other; matching more of them takes seconds."""


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer.

    Attributes:
        text (`str`): words and the white space before them.
        parts (`bool`): whether the other answer lacks it at this place.
    """

    text: str
    parts: bool


def difference(first: str, second: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts in pieces that they share and pieces that they do not, word by word.

    Where they share less than half of their words, or so many are repeated that a match would take long, only the word
    at which they part is marked: more would tell nothing.
    """
    if not (first.strip() and second.strip()):  # one has not begun: nothing parts yet
        return tuple([Piece(text, False)] if text else [] for text in (first, second))
    texts = [WORD.findall(text) for text in (first, second)]
    words = [[word.strip() for word in text] for text in texts]
    pieces: tuple[list[Piece], list[Piece]] = ([], [])
    for equal, *bounds in _runs(*words):
        for side, (start, end) in enumerate(bounds):
            text = "".join(texts[side][start:end])
            if text:
                pieces[side].append(Piece(text, not equal and not text.isspace()))
    return pieces


def words_in_common(first: str, second: str) -> int | None:
    """How many words both begin with; `None` if they are the same throughout."""
    one, other = first.split(), second.split()
    return None if one == other else _same(one, other)


Run = tuple[bool, tuple[int, int], tuple[int, int]]
"""Whether the words are the same, and where they stand in both texts."""


def _runs(one: Sequence[str], other: Sequence[str]) -> list[Run]:
    head = _same(one, other)
    tail = _same(one[head:][::-1], other[head:][::-1])
    ends = (len(one) - tail, len(other) - tail)
    middle = _matched(one[head : ends[0]], other[head : ends[1]])
    shared = head + tail + sum(end - start for equal, (start, end), _ in middle or [] if equal)
    if middle is None or 2 * shared < max(len(one), len(other)):
        marked = (min(head + 1, len(one)), min(head + 1, len(other)))
        rest = (False, (head, marked[0]), (head, marked[1])), (True, (marked[0], len(one)), (marked[1], len(other)))
        return [(True, (0, head), (0, head)), *rest]
    moved = [(equal, (a + head, b + head), (c + head, d + head)) for equal, (a, b), (c, d) in middle]
    return [(True, (0, head), (0, head)), *moved, (True, (ends[0], len(one)), (ends[1], len(other)))]


def _matched(one: Sequence[str], other: Sequence[str]) -> list[Run] | None:
    """The runs of two texts; `None` if that takes long."""
    counts = Counter(one), Counter(other)
    if sum(number * counts[1][word] for word, number in counts[0].items()) > MOST_PAIRS:
        return None
    codes = SequenceMatcher(None, one, other, autojunk=False).get_opcodes()
    return [(kind == "equal", (a, b), (c, d)) for kind, a, b, c, d in codes]


def _same(one: Sequence[str], other: Sequence[str]) -> int:
    """How many words both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(one), len(other)))
