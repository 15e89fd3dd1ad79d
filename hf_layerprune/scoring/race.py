"""Collect evidence on candidates: all data for all, or a race that the worse ones leave early.

In a race every candidate still in it is measured on the same rows. After each chunk of data those are dropped that
are worse than the best beyond doubt, by paired differences over rows; the rest go on until one is left or the data
ends. The confidence is that the race ends with the candidate that all data would choose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LayerPruneError
from .candidates import CandidateRuns
from .evidence import LEAST_ROWS, Evidence, difference_errors, price_factors, quantile
from .measures import Measure
from .sharding import gathered, shard


@dataclass(frozen=True)
class Race:
    """How a race is run.

    Args:
        confidence (`float`, *optional*, defaults to `0.95`): probability that the choice is that of all data.
        seed (`int`, *optional*, defaults to `0`): of the order the data is seen in.

    Raises:
        [`LayerPruneError`]: for a confidence that is no probability.
    """

    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise LayerPruneError(f"confidence={self.confidence} is out of range; it must lie between 0 and 1")


def collect(
    measures: Sequence[Measure],
    runs: CandidateRuns,
    race: Race | None = None,
    savings: Sequence[float] | None = None,
    on_chunk: Callable[[], None] = lambda: None,
) -> tuple[Evidence, dict[int, float]]:
    """Measure the model as it is (index 0) and its candidates (1, 2, ...).

    On several processes each measures every n-th chunk; all return the same.

    Args:
        measures (`Sequence[Measure]`): the kinds of data.
        runs ([`CandidateRuns`]): the candidates.
        race ([`Race`], *optional*): drop candidates on the way; by default all see all data.
        savings (`Sequence[float]`, *optional*): what each candidate saves; a race is for the least cost over the model
            as it is per unit saved, see [`price_factors`]. By default all save the same.
        on_chunk (`Callable[[], None]`, *optional*): called after every chunk of this process.

    Returns:
        The evidence, and the share of the data that each candidate that left had seen.
    """
    count = len(runs.candidates)
    saved = torch.tensor([1.0] * count if savings is None else list(savings), dtype=torch.float64)
    evidence = Evidence(count + 1, [measure.weight for measure in measures])
    alive, left = list(range(1, count + 1)), {}
    chunks = _order(measures, race)
    unseen = [measure.num_chunks for measure in measures]
    first, step = shard(runs.model)
    for start in range(0, len(chunks), step):
        own = chunks[start + first : start + first + 1]
        results = []
        for part, chunk in own:
            results.append((part, *measures[part](chunk, runs, alive)))
            on_chunk()
        for part, sums, counts in gathered(results, runs.model):
            evidence.add(part, [0, *alive], sums, counts)
            unseen[part] -= 1
        done = min(1.0, (start + step) / len(chunks))
        if race is not None and done < 1 and len(alive) > 1:
            to_come = [chunks_left / measure.num_chunks for chunks_left, measure in zip(unseen, measures, strict=True)]
            for index in _beaten(evidence, alive, saved, race.confidence, to_come):
                alive.remove(index)
                left[index] = done
            if len(alive) == 1:
                break
    return evidence, left


def _order(measures: Sequence[Measure], race: Race | None) -> list[tuple[int, int]]:
    """`(measure, chunk)`: every kind of data from the start on and evenly over the way, in a race shuffled."""
    generator = torch.Generator().manual_seed(0 if race is None else race.seed)
    order = []
    for part, measure in enumerate(measures):
        chunks = range(measure.num_chunks) if race is None else torch.randperm(measure.num_chunks, generator=generator)
        order += [(place / measure.num_chunks, part, int(chunk)) for place, chunk in enumerate(chunks)]
    return [(part, chunk) for _, part, chunk in sorted(order)] if len(measures) > 1 else [o[1:] for o in order]


def _beaten(
    evidence: Evidence, alive: list[int], savings: Tensor, confidence: float, to_come: Sequence[float]
) -> list[int]:
    """Which of `alive` are worse than the best of them beyond doubt, with `to_come` of each kind of data not yet seen.

    The doubt is shared out over all candidates, not over the looks at the data, which depend on each other:
    `benchmarks/scoring.py` counts how often the choice is another.
    """
    unsure = [len(part.counts) for part, share in zip(evidence.parts, to_come, strict=True) if share > 0]
    if min(unsure) < LEAST_ROWS:
        return []
    costs = evidence.costs(alive)
    factor = price_factors(costs, savings[torch.tensor(alive) - 1])
    prices = dict(zip(alive, (costs * factor).tolist(), strict=True))
    finite = [index for index in alive if math.isfinite(prices[index])]
    if not finite:
        return []
    best = min(finite, key=prices.__getitem__)
    others = [index for index in finite if index != best]
    errors = difference_errors(evidence, best, others, dict(zip(alive, factor.tolist(), strict=True)), to_come)
    least = quantile(1 - (1 - confidence) / len(savings), min(unsure))
    beaten = [
        other
        for other, error in zip(others, errors.tolist(), strict=True)
        if prices[other] - prices[best] > least * error
    ]
    return beaten + [index for index in alive if index not in finite]
