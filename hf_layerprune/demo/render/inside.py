"""The drawings of one depth: the layers, the quality of every round, the importance of every layer."""

from __future__ import annotations

from ..catalog import Pairing
from .charts import render_importance, render_quality
from .layers import render_layers


def render_inside(pairing: Pairing, depth: int) -> dict[str, str]:
    """The drawings by their titles.

    Args:
        pairing ([`Pairing`]): what is compared.
        depth (`int`): of the compressed model.
    """
    rounds, report = pairing.rounds(depth), pairing.report
    return {
        "Layer map": render_layers(pairing.plans[depth], rounds, report["settings"] if report else {}),
        "Quality against depth": render_quality(report, depth),
        "Importance of the layers": render_importance(rounds),
    }
