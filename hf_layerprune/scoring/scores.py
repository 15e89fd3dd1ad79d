"""What scoring gives: one cost per layer, edit or plan, and how sure the choice is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from ..edits import Edit
from ..errors import LayerPruneError
from ..plan import LayerPlan
from .evidence import Evidence, difference_errors, price_factors

Key = TypeVar("Key")
CLEAR_MARGIN = 2.0  # standard errors between the best two


@dataclass(frozen=True)
class Scores(Generic[Key]):
    """The measure of each candidate, and which is best: the one that costs least for what it saves.

    Attributes:
        criterion (`str`): what was measured.
        values (`dict[Key, float]`): candidate to cost, in the criterion's unit.
        baseline (`float`): the same measure with nothing changed.
        num_tokens (`int`): positions that were scored; of several data sets, rows.
        standard_errors (`dict[Key, float]`): of each value, over rows of data; `nan` with one row. Empty for a
            criterion that is no measurement.
        left (`dict[Key, float]`): candidates that a race dropped, and the share of the data they had seen by then;
            their values are over that data only.
        savings (`dict[Key, float]`): what each saves, above 0; empty where all save the same.
        half_agreement (`float`, *optional*): how often two random halves of the data choose the same.
        margin (`float`, *optional*): how far the best is ahead of the second, in standard errors of their paired
            difference; `nan` where there is too little data to tell, `None` where nothing was left to compare.
        contenders (`tuple[Key, ...]`): these two; one if all others left.
    """

    criterion: str
    values: dict[Key, float]
    baseline: float
    num_tokens: int
    standard_errors: dict[Key, float] = field(default_factory=dict)
    left: dict[Key, float] = field(default_factory=dict)
    savings: dict[Key, float] = field(default_factory=dict)
    half_agreement: float | None = None
    margin: float | None = None
    contenders: tuple[Key, ...] = ()

    @property
    def ranking(self) -> tuple[Key, ...]:
        """Candidates by price, see [`price_factors`], the lowest first; those that left a race come after those that
        did not, the later the better.

        Equal prices go to the deeper layer; a price that is not a number comes last.
        """
        prices = self._prices()

        def order(key: Key) -> tuple[Any, ...]:
            return (math.isnan(prices[key]), -self.left.get(key, 1.0), prices[key], -_depth_of(key))

        return tuple(sorted(prices, key=order))

    def _prices(self) -> dict[Key, float]:
        costs = torch.tensor(list(self.values.values()), dtype=torch.float64) - self.baseline
        factors = price_factors(costs, self._savings(self.values))
        return dict(zip(self.values, (costs * factors).tolist(), strict=True))

    def _savings(self, keys: Iterable[Key]) -> torch.Tensor:
        return torch.tensor([self.savings.get(key, 1.0) for key in keys], dtype=torch.float64)

    @property
    def certainty(self) -> str:
        """One sentence on how sure the choice is; empty for a criterion that is no measurement."""
        if len(self.contenders) == 1 and self.left:
            best, second = self.contenders[0], max(self.left, key=self.left.__getitem__)
            return f"{_label(best)} won the race against {_label(second)} after {self.left[second]:.0%} of the data"
        if self.margin is None or len(self.contenders) < 2:
            return ""
        best, second = self.contenders
        if math.isnan(self.margin):
            return f"too little data to tell how sure the choice of {_label(best)} is; more calibration data would"
        halves = "" if self.half_agreement is None else f"; two halves of the data agree {self.half_agreement:.0%}"
        if self.margin < CLEAR_MARGIN:
            apart = f"cannot be told apart ({self.margin:.1f} standard errors{halves})"
            return f"{_label(best)} and {_label(second)} {apart}; more calibration data would tell"
        return f"{_label(best)} is ahead of {_label(second)} by {self.margin:.1f} standard errors{halves}"

    @property
    def safest(self) -> Key:
        """The candidate that costs least for what it saves.

        Raises:
            [`LayerPruneError`]: if none has a finite cost.
        """
        key = self.ranking[0]
        if not math.isfinite(self.values[key]):
            raise LayerPruneError(
                f"every {self.criterion} score is {self.values[key]}; the model's outputs are broken"
            )
        return key

    def to_dict(self) -> dict[str, Any]:
        by_key = {name: value for name, value in vars(self).items() if isinstance(value, dict)}
        return (
            vars(self)
            | {"certainty": self.certainty}
            | {name: {_label(key): value for key, value in values.items()} for name, values in by_key.items()}
            | {"contenders": [_label(key) for key in self.contenders]}
        )


@dataclass(frozen=True)
class LayerScores(Scores[int]):
    """The cost of leaving out each layer, by teacher layer index; lower is safer to remove."""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerScores:
        data = {name: value for name, value in data.items() if name != "certainty"}
        by_layer = {name: value for name, value in data.items() if isinstance(value, dict)}
        data |= {name: {int(k): v for k, v in values.items()} for name, values in by_layer.items()}
        return cls(**data | {"contenders": tuple(int(layer) for layer in data.get("contenders", ()))})


class EditScores(Scores[Edit]):
    """The cost of each edit of the plan."""


class PlanScores(Scores[LayerPlan]):
    """The cost of each of several plans."""


def scores_of(
    evidence: Evidence, left: dict[int, float], keys: Sequence[Key], savings: Sequence[float] | None = None
) -> dict[str, Any]:
    """The fields of [`Scores`] from what was measured of the model (index 0) and its candidates (1, 2, ...)."""
    indices = {key: index for index, key in enumerate(keys, 1)}
    fields: dict[str, Any] = {
        "values": {key: evidence.value(index) for key, index in indices.items()},
        "baseline": evidence.value(0),
        "num_tokens": evidence.count() if len(evidence.parts) == 1 else evidence.num_rows,
        "standard_errors": {key: evidence.standard_error(index) for key, index in indices.items()},
        "left": {keys[index - 1]: share for index, share in left.items()},
        "savings": {} if savings is None else dict(zip(keys, savings, strict=True)),
    }
    scores: Scores[Key] = Scores("", **fields)
    ranked = [key for key in scores.ranking if key not in scores.left and math.isfinite(scores.values[key])]
    if len(ranked) > 1:
        best, second = (indices[key] for key in ranked[:2])
        costs = evidence.costs([best, second])
        factors = price_factors(costs, scores._savings(ranked[:2]))
        ahead = float((costs * factors).diff())
        by_index = dict(zip((best, second), factors.tolist(), strict=True))
        error = float(difference_errors(evidence, best, [second], by_index))
        margin = ahead / error if error > 0 else math.nan if math.isnan(error) else math.inf if ahead > 0 else 0.0
        fields["margin"] = margin
        if not left and not math.isnan(margin):
            fields["half_agreement"] = evidence.half_agreement(list(indices.values()), scores._savings(indices))
    return fields | {"contenders": tuple(ranked[:2])}


def _depth_of(key: Any) -> int:
    """How deep in the teacher a candidate's first change lies."""
    if isinstance(key, Edit):
        return key.layers[0]
    return key if isinstance(key, int) else 0


def _label(key: Any) -> str:
    return key.label if isinstance(key, Edit) else str(key)
