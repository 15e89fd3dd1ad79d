"""Where two answers part: the words that one has and the other has not."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher

WORD = re.compile(r"\s+|\S+")


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer.

    Attributes:
        text (`str`): words and the white space between them.
        parts (`bool`): whether the other answer lacks it at this place.
    """

    text: str
    parts: bool


def difference(first: str, second: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts in pieces that they share and pieces that they do not, word by word."""
    words = [WORD.findall(text) for text in (first, second)]
    pieces: tuple[list[Piece], list[Piece]] = ([], [])
    for kind, *bounds in SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        for side, (start, end) in enumerate((bounds[:2], bounds[2:])):
            text = "".join(words[side][start:end])
            if text:
                pieces[side].append(Piece(text, kind != "equal" and not text.isspace()))
    return pieces


def words_in_common(first: str, second: str) -> int | None:
    """How many words both begin with; `None` if they are the same throughout."""
    one, other = first.split(), second.split()
    if one == other:
        return None
    same = (a == b for a, b in zip(one, other, strict=False))
    return next((number for number, equal in enumerate(same) if not equal), min(len(one), len(other)))
