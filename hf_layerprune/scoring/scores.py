"""What scoring gives: one cost per layer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import LayerPruneError


@dataclass(frozen=True)
class LayerScores:
    """The cost of leaving out each layer; lower is safer to remove.

    Attributes:
        criterion (`str`): what was measured.
        values (`dict[int, float]`): teacher layer index to cost, in the criterion's unit.
        baseline (`float`): the same measure with every layer in place.
        num_tokens (`int`): positions that were scored.
    """

    criterion: str
    values: dict[int, float]
    baseline: float
    num_tokens: int

    @property
    def ranking(self) -> tuple[int, ...]:
        """Layers, safest first. Equal costs go to the deeper layer; a cost that is no number comes last."""
        return tuple(
            sorted(self.values, key=lambda layer: (math.isnan(self.values[layer]), self.values[layer], -layer))
        )

    @property
    def safest(self) -> int:
        """The layer that costs least.

        Raises:
            [`LayerPruneError`]: if no layer has a finite cost.
        """
        layer = self.ranking[0]
        if not math.isfinite(self.values[layer]):
            raise LayerPruneError(
                f"every {self.criterion} score is {self.values[layer]}; the model's outputs are broken"
            )
        return layer

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"values": {str(layer): value for layer, value in self.values.items()}}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerScores:
        return cls(**data | {"values": {int(layer): value for layer, value in data["values"].items()}})
