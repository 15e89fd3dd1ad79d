"""What candidates cost on each row of data, and how sure that makes a choice between them.

Tokens of one row of text depend on each other, so every standard error here is taken over rows. A value is a ratio:
the sum over the tokens of all rows over their number.

Shapes: C candidates, R rows of data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..errors import LayerPruneError
from ..plan import Edit, LayerPlan

Key = TypeVar("Key", int, Edit, LayerPlan)
CLEAR_MARGIN = 2.0  # standard errors between the best two


def price_factors(costs: Tensor, savings: Tensor) -> Tensor:
    """What to multiply costs by to compare candidates that save different amounts; the lowest price is best.

    A cost, the measure minus that of the unchanged model, is divided by the saving if it is above 0; else it is a gain
    and multiplied by it. Savings count as shares of the largest one, so prices have the unit of the costs.
    """
    shares = savings / max(savings.tolist(), default=1.0)
    return torch.where(costs > 0, 1 / shares, shares)


class Evidence:
    """Per-row measurements of `count` candidates on weighted kinds of data; candidate 0 is the unchanged model.

    A candidate that a race dropped saw only the first rows: `seen`, `(C, kinds)`, counts them.
    """

    def __init__(self, count: int, weights: Sequence[float] = (1.0,)) -> None:
        self.weights = [weight / sum(weights) for weight in weights]
        self.sums = [torch.empty(count, 0, dtype=torch.float64) for _ in weights]  # (C, R) each
        self.counts = [torch.empty(0, dtype=torch.float64) for _ in weights]  # (R,) each
        self.seen = torch.zeros(count, len(weights), dtype=torch.long)

    def add(self, kind: int, candidates: Sequence[int], sums: Tensor, counts: Tensor) -> None:
        """Add rows that `candidates` measured: `sums` `(len(candidates), R)` over the tokens `counts` `(R,)`."""
        sums, counts = sums.double().cpu(), counts.double().cpu()
        rows = torch.full((len(self.seen), len(counts)), math.nan, dtype=torch.float64)
        rows[list(candidates)] = sums
        self.sums[kind] = torch.cat([self.sums[kind], rows[:, counts > 0]], dim=1)
        self.counts[kind] = torch.cat([self.counts[kind], counts[counts > 0]])
        self.seen[list(candidates), kind] = len(self.counts[kind])

    def value(self, candidate: int) -> float:
        """The measure of one candidate over the rows it saw, a weighted mean over the kinds of data."""
        total = 0.0
        for weight, sums, counts, seen in zip(self.weights, self.sums, self.counts, self.seen[candidate], strict=True):
            total += weight * float(sums[candidate, :seen].sum() / counts[:seen].sum())
        return total

    def standard_error(self, candidate: int) -> float:
        """The standard error of `value`; `nan` where a kind of data has fewer than two rows."""
        return float(_errors(self._deviations([candidate])))

    def compare(
        self, candidates: Sequence[int], savings: Sequence[float], unseen: Sequence[float] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The price of each candidate, and the standard error of its paired difference to the lowest: `(C,)` each.

        A price is `(value - value of the unchanged model) x factor`, see [`price_factors`], row by row: noise common
        to all cancels. With `unseen`, the share of each kind of data that is still to come, errors are relative to
        what all of the data will show.
        """
        costs = torch.tensor([self.value(index) - self.value(0) for index in candidates], dtype=torch.float64)
        factors = price_factors(costs, torch.tensor(savings, dtype=torch.float64))
        prices = costs * factors
        best, parts = int(prices.nan_to_num(math.inf).argmin()), []
        for rows in self._deviations([0, *candidates]):
            of_price = (rows[1:] - rows[0]) * factors[:, None]
            parts.append(of_price - of_price[best])
        return prices, _errors(parts, unseen)

    def _deviations(self, candidates: Sequence[int]) -> list[Tensor]:
        """What each row adds to the deviation of the values, to first order: `(len(candidates), R)` per kind of data.

        All candidates must have seen the same rows.
        """
        found = []
        for kind, weight in enumerate(self.weights):
            rows = slice(0, int(self.seen[candidates[0], kind]))
            sums, counts = self.sums[kind][list(candidates), rows], self.counts[kind][rows]
            mean = sums.sum(1, keepdim=True) / counts.sum()
            found.append(weight * (sums - mean * counts) / counts.sum())
        return found


def _errors(deviations: Sequence[Tensor], unseen: Sequence[float] | None = None) -> Tensor:
    """Standard errors `(C,)` of sums over independent rows: `(C, R)` for each kind of data."""
    variance = torch.zeros(len(deviations[0]), dtype=torch.float64)
    for part, share in zip(deviations, unseen or [1.0] * len(deviations), strict=True):
        if share:
            rows = part.shape[1]
            variance += share * part.pow(2).sum(1) * (rows / (rows - 1) if rows > 1 else math.nan)
    return variance.sqrt()


@dataclass(frozen=True)
class Scores(Generic[Key]):
    """The cost of each candidate (a layer to remove, an edit or a plan), and which costs least for what it saves."""

    criterion: str  # what was measured
    values: dict[Key, float]  # the measure after each candidate; lower is better
    baseline: float = 0.0  # the measure of the unchanged model
    num_tokens: int = 0  # positions that were scored; rows, if `criterion` is "tasks"
    # of each value, over rows of data; `nan` with one row, empty for a criterion that is only an estimate
    standard_errors: dict[Key, float] = field(default_factory=dict)
    dropped: dict[Key, float] = field(default_factory=dict)  # by a race, with the share of the data each had seen
    savings: dict[Key, float] = field(default_factory=dict)  # of each, above 0; empty if all save the same
    # how far the best is ahead of the second, in standard errors of their paired difference; `nan` if there is too
    # little data, `None` if there was nothing to compare
    margin: float | None = None
    contenders: tuple[Key, ...] = ()  # the best two; one if a race dropped all others

    @classmethod
    def of(
        cls,
        criterion: str,
        keys: Sequence[Key],
        evidence: Evidence,
        dropped: Mapping[int, float] | None = None,
        savings: Sequence[float] | None = None,
    ) -> Scores[Key]:
        """What the evidence on candidates 1, 2, ... says of `keys`."""
        index = {key: number for number, key in enumerate(keys, 1)}
        scores = cls(
            criterion,
            values={key: evidence.value(number) for key, number in index.items()},
            baseline=evidence.value(0),
            num_tokens=sum(map(len, evidence.counts)) if criterion == "tasks" else int(evidence.counts[0].sum()),
            standard_errors={key: evidence.standard_error(number) for key, number in index.items()},
            dropped={keys[number - 1]: share for number, share in (dropped or {}).items()},
            savings={} if savings is None else dict(zip(keys, savings, strict=True)),
        )
        ranked = [key for key in scores.ranking if key not in scores.dropped and math.isfinite(scores.values[key])]
        scores = replace(scores, contenders=tuple(ranked[:2]))
        if len(ranked) < 2:
            return scores
        saved = [scores.savings.get(key, 1.0) for key in scores.contenders]
        prices, errors = evidence.compare([index[key] for key in scores.contenders], saved)
        ahead, error = float(prices.diff()), float(errors[1])
        margin = ahead / error if error > 0 else math.nan if math.isnan(error) else math.inf if ahead > 0 else 0.0
        return replace(scores, margin=margin)

    @property
    def ranking(self) -> tuple[Key, ...]:
        """Candidates by price, see [`price_factors`], the lowest first, and of equal ones the deeper layer.

        Those that a race dropped come after the others, the last dropped first, and those without a price last of all.
        """
        costs = torch.tensor(list(self.values.values()), dtype=torch.float64) - self.baseline
        savings = torch.tensor([self.savings.get(key, 1.0) for key in self.values], dtype=torch.float64)
        prices = (costs * price_factors(costs, savings)).tolist()

        def order(item: tuple[Key, float]) -> tuple[Any, ...]:
            key, price = item
            # the first layer that a candidate changes; the same for all plans, which change several
            layer = key.layers[0] if isinstance(key, Edit) else key if isinstance(key, int) else 0
            return math.isnan(price), -self.dropped.get(key, 1.0), price, -layer

        return tuple(key for key, _ in sorted(zip(self.values, prices, strict=True), key=order))

    @property
    def safest(self) -> Key:
        """The candidate that costs least for what it saves, or a [`LayerPruneError`] if none has a finite cost."""
        key = self.ranking[0]
        if not math.isfinite(self.values[key]):
            raise LayerPruneError(f"every {self.criterion} score is {self.values[key]}; the model's output is broken")
        return key

    @property
    def certainty(self) -> str:
        """One sentence on how sure the choice is; empty for a criterion that is only an estimate."""
        if len(self.contenders) == 1 and self.dropped:
            best, second = self.contenders[0], max(self.dropped, key=self.dropped.__getitem__)
            return f"{_label(best)} won the race against {_label(second)} after {self.dropped[second]:.0%} of the data"
        if self.margin is None or len(self.contenders) < 2:
            return ""
        best, second = map(_label, self.contenders)
        if math.isnan(self.margin):
            return f"too little data to tell how sure the choice of {best} is; more calibration data would"
        if self.margin < CLEAR_MARGIN:
            apart = f"cannot be told apart ({self.margin:.1f} standard errors)"
            return f"{best} and {second} {apart}; more calibration data would tell"
        return f"{best} is ahead of {second} by {self.margin:.1f} standard errors"

    def to_dict(self) -> dict[str, Any]:
        """The form written to JSON: candidates by their labels, and `certainty`."""
        by_label = {
            name: {_label(key): number for key, number in value.items()}
            for name, value in vars(self).items()
            if isinstance(value, dict)
        }
        return vars(self) | by_label | {"contenders": list(map(_label, self.contenders)), "certainty": self.certainty}


def _label(key: int | Edit | LayerPlan) -> str:
    return key.label if isinstance(key, Edit) else str(key)
