"""Measure candidates on data: all of them on all of it, or in a race that drops the worse ones early.

In a race, each chunk of data drops the candidates that are worse than the best beyond doubt, by paired differences
over rows. The race ends when one candidate is left, or when the data ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from ..errors import LayerPruneError
from ..forward import gathered
from .scores import Evidence

LEAST_ROWS = 6  # the spread of fewer is too uncertain to drop a candidate by

Measure = Callable[[Sequence[int]], tuple[Tensor, Tensor]]
"""Measures some candidates on a chunk of data: sums `(1 + candidates, R)` over each row, of the unchanged model first,
and what they are divided by, `(R,)`."""


@dataclass(frozen=True)
class Race:
    """How a race is run.

    Args:
        confidence (`float`, *optional*, defaults to `0.95`): probability that the choice is that of all data.
        seed (`int`, *optional*, defaults to `0`): of the order in which the data is seen.
    """

    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise LayerPruneError(f"confidence={self.confidence} is out of range; it must be between 0 and 1")


def collect(
    kinds: Sequence[tuple[float, Sequence[Measure]]],
    savings: Sequence[float],
    race: Race | None = None,
    processes: tuple[int, int] = (0, 1),
    on_chunk: Callable[[], None] = lambda: None,
) -> tuple[Evidence, dict[int, float]]:
    """Measure the unchanged model (index 0) and its candidates (1, 2, ...).

    `kinds` has the weight and the chunks of each kind of data, `savings` what each candidate saves, as a race is for
    the lowest price; for `processes` see [`~forward.shard`].

    Returns:
        The evidence, and the share of the data that each candidate that the race dropped had seen.
    """
    evidence = Evidence(1 + len(savings), [weight for weight, _ in kinds])
    alive, dropped = list(range(1, 1 + len(savings))), {}
    sizes = [len(chunks) for _, chunks in kinds]
    order, unseen = _order(sizes, race), list(sizes)
    first, step = processes
    for start in range(0, len(order), step):
        results = []
        for kind, number in order[start + first : start + first + 1]:
            results.append((kind, *kinds[kind][1][number](alive)))
            on_chunk()
        for kind, sums, counts in gathered(results, processes):
            evidence.add(kind, [0, *alive], sums, counts)
            unseen[kind] -= 1
        done = min(1.0, (start + step) / len(order))
        if race is not None and done < 1 and len(alive) > 1:
            shares = [to_come / size for to_come, size in zip(unseen, sizes, strict=True)]
            for index in _beaten(evidence, alive, savings, race.confidence, shares):
                alive.remove(index)
                dropped[index] = done
            if len(alive) == 1:
                break
    return evidence, dropped


def _order(sizes: Sequence[int], race: Race | None) -> list[tuple[int, int]]:
    """`(kind, chunk)`: every kind of data from the start and evenly all the way; shuffled in a race."""
    generator = torch.Generator().manual_seed(0 if race is None else race.seed)
    order = []
    for kind, size in enumerate(sizes):
        chunks = list(range(size)) if race is None else torch.randperm(size, generator=generator).tolist()
        order += [(place / size, kind, chunk) for place, chunk in enumerate(chunks)]
    return [(kind, chunk) for _, kind, chunk in sorted(order)]


def _beaten(
    evidence: Evidence, alive: list[int], savings: Sequence[float], confidence: float, unseen: Sequence[float]
) -> list[int]:
    """Which of `alive` are worse than the best of them beyond doubt; `unseen` is the share of each kind still to come.

    The probability of error is shared out over the candidates, not over the successive tests, which are dependent:
    `benchmarks/scoring.py` counts how often the choice is another.
    """
    rows = min(len(counts) for counts, share in zip(evidence.counts, unseen, strict=True) if share > 0)
    prices, errors = evidence.compare(alive, [savings[index - 1] for index in alive], unseen)
    if rows < LEAST_ROWS or not prices.isfinite().any():
        return []
    least = quantile(1 - (1 - confidence) / len(savings), rows)
    worse = ~prices.isfinite() | (prices - prices[prices.isfinite()].min() > least * errors)
    return [index for index, is_worse in zip(alive, worse.tolist(), strict=True) if is_worse]


def quantile(probability: float, rows: int) -> float:
    """One-sided quantile of Student's t with `rows - 1` degrees of freedom (Cornish-Fisher, to second order)."""
    z, n = NormalDist().inv_cdf(probability), max(1, rows - 1)
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
