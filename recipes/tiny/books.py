"""The public-domain books behind the embedded teacher, and how they are split.

Whole books are held out: no sentence of `HELD_OUT` is ever trained or healed on, and every quality number the
project reports on the embedded model comes from them.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

HELD_OUT = (
    "Sense-and-Sensibility_161",
    "The-Marvelous-Land-of-Oz_54",
    "The-Railway-Children_1874",
    "Through-the-Looking-Glass_12",
)

PARAGRAPHS_PER_PASSAGE = 8


def read_books(folder: str | Path) -> dict[str, str]:
    """Read `<folder>/*.txt` into `{name: text}`, one paragraph a line, runs of blanks collapsed."""
    books = {}
    for path in sorted(Path(folder).glob("*.txt")):
        lines = (re.sub(r"[ \t]+", " ", line).strip() for line in path.read_text(encoding="utf-8").splitlines())
        books[path.stem] = "\n".join(line for line in lines if line)
    missing = [name for name in HELD_OUT if name not in books]
    if missing:
        raise SystemExit(
            f"{folder} lacks the held-out books {missing}; point --books at the folder of Gutenberg texts"
        )
    return books


def passages(text: str) -> list[str]:
    """Cut a book into passages of `PARAGRAPHS_PER_PASSAGE` consecutive paragraphs."""
    lines = text.split("\n")
    return ["\n".join(lines[i : i + PARAGRAPHS_PER_PASSAGE]) for i in range(0, len(lines), PARAGRAPHS_PER_PASSAGE)]


def sample_passages(books: dict[str, str], num_chars: int, seed: int) -> list[str]:
    """Draw about `num_chars` characters of passages evenly from all `books`, in random order."""
    rng = random.Random(seed)
    pool = [passage for text in books.values() for passage in passages(text)]
    rng.shuffle(pool)
    chosen, total = [], 0
    for passage in pool:
        if total >= num_chars:
            break
        chosen.append(passage)
        total += len(passage)
    return chosen
