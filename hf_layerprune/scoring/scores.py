"""What scoring gives: one cost per layer, edit or plan."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..edits import Edit
from ..errors import LayerPruneError
from ..plan import LayerPlan

Key = TypeVar("Key")


@dataclass(frozen=True)
class Scores(Generic[Key]):
    """The cost of each candidate; lower is better.

    Attributes:
        criterion (`str`): what was measured.
        values (`dict[Key, float]`): candidate to cost, in the criterion's unit.
        baseline (`float`): the same measure with nothing changed.
        num_tokens (`int`): positions that were scored.
    """

    criterion: str
    values: dict[Key, float]
    baseline: float
    num_tokens: int

    @property
    def ranking(self) -> tuple[Key, ...]:
        """Candidates, cheapest first. Equal costs go to the deeper layer; a cost that is no number comes last."""
        return tuple(
            sorted(self.values, key=lambda key: (math.isnan(self.values[key]), self.values[key], -_depth_of(key)))
        )

    @property
    def safest(self) -> Key:
        """The candidate that costs least.

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
        return vars(self) | {"values": {_label(key): value for key, value in self.values.items()}}


@dataclass(frozen=True)
class LayerScores(Scores[int]):
    """The cost of leaving out each layer, by teacher layer index; lower is safer to remove."""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerScores:
        return cls(**data | {"values": {int(layer): value for layer, value in data["values"].items()}})


class EditScores(Scores[Edit]):
    """The cost of each edit of the plan."""


class PlanScores(Scores[LayerPlan]):
    """The cost of each of several plans."""


def _depth_of(key: Any) -> int:
    """How deep in the teacher a candidate's first change lies."""
    if isinstance(key, Edit):
        return key.layers[0]
    return key if isinstance(key, int) else 0


def _label(key: Any) -> str:
    return key.label if isinstance(key, Edit) else str(key)
