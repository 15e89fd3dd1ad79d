"""Two answers side by side: where their words part, and what can honestly be said of their speeds."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from .generation import Answer

FEW_TOKENS = 16  # with fewer, a speed is a guess
SLOWEST, FASTEST = 0.7, 1.5  # a ratio of speeds farther from what the layers let expect comes of a busy machine
# without its punctuation; a letter of its own where words have no spaces between them
WORD = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\W_]+(?:['\u2019_-]\w+)*")
Span = tuple[int, int]


@dataclass(frozen=True)
class Comparison:
    """Two answers so far."""

    original: Answer = Answer()
    compressed: Answer = Answer()
    waiting: str = ""  # who is ahead in the line, and for how long

    @property
    def ended(self) -> bool:
        return bool(self.original.ending and self.compressed.ending)

    @property
    def smaller_by(self) -> float | None:
        """Share of the original's parameters that the student lacks."""
        teacher, student = self.original.num_parameters, self.compressed.num_parameters
        return 1 - student / teacher if teacher and student else None

    @property
    def doubt(self) -> str:
        """Why the speeds must not be compared; empty if they may."""
        teacher, student = self.original, self.compressed
        if teacher.dtype != student.dtype:
            return f"One runs in {teacher.dtype}, the other in {student.dtype}, so their speeds are not compared."
        if min(teacher.num_tokens, student.num_tokens) < FEW_TOKENS:
            return f"Speeds are compared from {FEW_TOKENS} tokens each."
        layers, is_smaller = teacher.num_layers / student.num_layers, teacher.num_parameters > student.num_parameters
        least = layers if is_smaller else 1.0  # layers in parallel need not be faster
        if not SLOWEST * least <= student.tokens_per_second / teacher.tokens_per_second <= FASTEST * layers:
            return "The machine was busy, so the speeds mean nothing; run it again."
        return ""

    @property
    def speed_ratio(self) -> float | None:
        """How many times as fast as the original the student wrote; `None` where that cannot be said."""
        if self.doubt or not self.ended:
            return None
        return self.compressed.tokens_per_second / self.original.tokens_per_second

    @property
    def summary(self) -> str:
        """What was measured, in words; empty before the end."""
        teacher, student, parts = self.original, self.compressed, []
        if not self.ended or not (teacher.num_tokens and student.num_tokens):
            return ""
        if (ratio := self.speed_ratio) is not None:
            speeds = f"{rate(student.tokens_per_second)} tokens/s instead of {rate(teacher.tokens_per_second)}"
            parts.append(f"The compressed model wrote at {ratio:.2f} times the speed of the original: {speeds}.")
        else:
            parts.append(self.doubt)
        if (smaller := self.smaller_by) is not None and student.num_layers != teacher.num_layers:
            share = f"{abs(smaller):.0%} {'fewer' if smaller > 0 else 'more'}" if abs(smaller) >= 0.005 else "as many"
            parts.append(
                f"It has {student.num_layers} layers instead of {teacher.num_layers}, and {share} parameters."
            )
        if spans := first_difference(teacher.text, student.text):
            parts.append(f"The answers part at word {len(WORD.findall(teacher.text[: spans[0][0]])) + 1}.")
        else:
            same = teacher.text == student.text
            parts.append("Both gave the same answer." if same else "Both answers have the same words.")
        return " ".join(parts)

    def stopped(self) -> Comparison:
        """The comparison after a visitor's Stop."""
        return replace(self, original=self.original.stopped(), compressed=self.compressed.stopped(), waiting="")

    def to_dict(self) -> dict[str, Any]:
        """The comparison as the API returns it."""
        return asdict(self) | {"ended": self.ended, "speed_ratio": self.speed_ratio, "summary": self.summary}


def first_difference(one: str, other: str) -> tuple[Span, Span] | None:
    """The first word of each text that the other does not have there, as start and end; `None` for the same words.

    Where a text is over, its span is empty.
    """
    spans = ([*(word.span() for word in WORD.finditer(text)), (len(text), len(text))] for text in (one, other))
    pairs = zip(*spans, strict=False)
    return next(((a, b) for a, b in pairs if one[slice(*a)] != other[slice(*b)]), None)


def rate(tokens_per_second: float) -> str:
    """Tokens per second, to three digits."""
    return f"{tokens_per_second:.0f}" if tokens_per_second >= 100 else f"{tokens_per_second:.3g}"
