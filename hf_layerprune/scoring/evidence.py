"""What candidates measured on each row of data, and how sure that makes a choice between them.

Tokens of one row of text depend on each other, so a row is the unit of every error here; a measure is a ratio, the sum
over the tokens of all rows over their number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from torch import Tensor

from ..tasks.evaluation import standard_error

LEAST_ROWS = 6  # the spread of fewer is too uncertain to drop a candidate by


def price_factors(costs: Tensor, savings: Tensor) -> Tensor:
    """Multiply costs by these, and candidates that save different amounts can be compared: the lowest price is best.

    A cost above 0 is divided by what is saved. A cost of 0 or less is a gain and multiplied by it: any gain comes
    before any loss, and of equal gains the larger saving comes first. Savings count as shares of the largest one, so
    that prices have the unit of the costs.

    Args:
        costs (`Tensor`): `(C,)`, the measure of each candidate less that of the model as it is.
        savings (`Tensor`): `(C,)`, what each saves, above 0 in any unit.
    """
    shares = savings / max(savings.tolist(), default=1.0)
    return torch.where(costs > 0, 1 / shares, shares)


@dataclass
class Part:
    """One kind of data: what each candidate measured on the rows seen so far.

    Attributes:
        weight (`float`): share of this part in the mean over all parts.
        sums (`Tensor`): `(C, R)`, float64; the measure summed over the tokens (or whatever is counted) of each row.
        counts (`Tensor`): `(R,)`, float64; tokens per row.
    """

    weight: float = 1.0
    sums: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.float64))
    counts: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))


class Evidence:
    """What `count` candidates measured; row `0` of every part is the model as it is.

    Candidates that left a race saw the first rows only: `seen` says how many rows of each part.
    """

    def __init__(self, count: int, weights: Sequence[float] = (1.0,)) -> None:
        self.parts = [Part(weight, torch.empty(count, 0, dtype=torch.float64)) for weight in weights]
        self.seen = torch.zeros(count, len(weights), dtype=torch.long)

    def add(self, part: int, candidates: Sequence[int], sums: Tensor, counts: Tensor) -> None:
        """Rows that `candidates` measured: `sums` `(len(candidates), R)`, `counts` `(R,)`. The others saw them not."""
        rows = torch.full((len(self.seen), sums.shape[1]), math.nan, dtype=torch.float64)
        rows[list(candidates)] = sums.double().cpu()
        own = self.parts[part]
        own.sums = torch.cat([own.sums, rows], dim=1)
        own.counts = torch.cat([own.counts, counts.double().cpu()])
        self.seen[list(candidates), part] = len(own.counts)

    @property
    def num_rows(self) -> int:
        return sum(len(part.counts) for part in self.parts)

    def count(self, part: int = 0) -> int:
        """Tokens (or whatever is counted) of one part."""
        return int(self.parts[part].counts.sum())

    def value(self, candidate: int) -> float:
        """Weighted mean over the parts of the measure of one candidate, over the rows it saw."""
        total = 0.0
        for number, part in enumerate(self.parts):
            rows = slice(0, int(self.seen[candidate, number]))
            total += part.weight * float(part.sums[candidate, rows].sum() / part.counts[rows].sum())
        return total / sum(part.weight for part in self.parts)

    def costs(self, candidates: Sequence[int]) -> Tensor:
        """What each of `candidates` adds to the value of the model as it is: `(len(candidates),)`."""
        return torch.tensor([self.value(index) - self.value(0) for index in candidates], dtype=torch.float64)

    def standard_error(self, candidate: int) -> float:
        """Of `value`; `nan` where a part has fewer than two rows."""
        variance, all_weights = 0.0, sum(part.weight for part in self.parts)
        for number, part in enumerate(self.parts):
            rows = slice(0, int(self.seen[candidate, number]))
            error = standard_error(part.sums[candidate, rows], part.counts[rows])
            variance += math.nan if error is None else (part.weight / all_weights * error) ** 2
        return math.sqrt(variance)

    def influences(self, candidates: Sequence[int]) -> list[Tensor]:
        """What each row adds to the value's deviation, to first order: one `(len(candidates), R)` per part.

        Only for candidates that saw the same rows.
        """
        all_weights = sum(part.weight for part in self.parts)
        found = []
        for number, part in enumerate(self.parts):
            rows = slice(0, int(self.seen[candidates[0], number]))
            sums, counts = part.sums[list(candidates), rows], part.counts[rows]
            mean = sums.sum(1, keepdim=True) / counts.sum()
            found.append(part.weight / all_weights * (sums - mean * counts) / counts.sum())
        return found

    def half_agreement(self, candidates: Sequence[int], savings: Tensor, trials: int = 200) -> float:
        """How often two random halves of the rows choose the same of `candidates`, which all saw the same rows.

        Each chooses by the lowest price, see [`price_factors`]. `nan` where a part has only one row.
        """
        if any(len(part.counts) < 2 for part in self.parts):
            return math.nan
        generator, agreed, with_model = torch.Generator().manual_seed(0), 0, [0, *candidates]
        for _ in range(trials):
            totals = torch.zeros(2, len(with_model), dtype=torch.float64)
            for part in self.parts:
                rows = torch.randperm(len(part.counts), generator=generator)
                for half, chosen in enumerate(rows.tensor_split(2)):
                    sums = part.sums[with_model][:, chosen].sum(1)
                    totals[half] += part.weight * sums / part.counts[chosen].sum()
            costs = totals[:, 1:] - totals[:, :1]
            first, second = (costs * price_factors(costs, savings)).nan_to_num(math.inf).argmin(1).tolist()
            agreed += first == second
        return agreed / trials


def quantile(probability: float, rows: int) -> float:
    """One-sided quantile of Student's t with `rows - 1` degrees of freedom (Cornish-Fisher, to second order)."""
    z, n = NormalDist().inv_cdf(probability), max(1, rows - 1)
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)


def difference_errors(
    evidence: Evidence, best: int, others: Sequence[int], factors: Mapping[int, float], to_come: Sequence[float] = ()
) -> Tensor:
    """Standard errors of the paired differences `price of other - price of best`: `(len(others),)`.

    A price is `(value - value of the model as it is) x factor`, row by row: what moves all alike cancels out. With
    `to_come`, the share of each part that is still unseen, they are those from what all of the data will say.
    """
    parts = evidence.influences([0, best, *others])
    variance = torch.zeros(len(others), dtype=torch.float64)
    factor = torch.tensor([factors[other] for other in others], dtype=torch.float64)
    for part, unseen in zip(parts, to_come or [1.0] * len(parts), strict=True):
        if unseen == 0:
            continue
        over_model = part[1:] - part[0]
        difference = over_model[1:] * factor[:, None] - over_model[0] * factors[best]
        rows = part.shape[1]
        variance += unseen * difference.pow(2).sum(1) * (rows / (rows - 1) if rows > 1 else math.nan)
    return variance.sqrt()
