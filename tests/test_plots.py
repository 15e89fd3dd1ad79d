"""The layer map, as text and as a picture."""

from dataclasses import replace

import pytest
from test_report import ROUNDS, RUN, entry, scores

from hf_layerprune import LayerPlan
from hf_layerprune.report import layer_map_text, plot_layer_map


def test_text():
    plan = LayerPlan(((0,), (2,), (4, 5), (9, 10, 12)), 14)
    assert layer_map_text(plan) == "  0   ·   2   ·  (4  5)   ·   ·   ·  (9  10   · 12)   ·".replace("  (4", "  (4")
    assert layer_map_text(LayerPlan.identity(5), width=2) == "0 1\n2 3\n4"


def test_costs_are_those_of_the_last_scoring():
    both = scores(**{"0": 1.0, "1": float("nan")}) + scores(**{"0": 2.0})
    for run, expected in (
        (RUN, {1: 0.25, 2: 0.1}),
        (replace(RUN, rounds=(replace(ROUNDS[0], scores=both),)), {0: 2.0}),
    ):
        bars = plot_layer_map(run).axes[0].patches
        assert {round(bar.get_center()[0]): bar.get_height() for bar in bars} == expected


THREE = LayerPlan(((0,), (1,), (2,)), 4)


@pytest.mark.parametrize(
    "record, handles",
    [
        (entry(1, THREE, ["3"], {"1": 0.3, "2": 0.1}), {"kept", "removed"}),
        (entry(1, THREE, ["3"], {}), {"kept", "removed"}),
        (entry(1, THREE, ["3"], {"1": -0.1, "2": 0.0}), {"kept", "removed"}),
        (
            entry(1, LayerPlan(((0,), (1, 2)), 5), ["1|2"], {"1|2": 0.1, "0": 3.0}),
            {"kept", "removed before this run", "in parallel, as one layer", "cost of layers as one"},
        ),
    ],
)
def test_picture(record, handles):
    figure = plot_layer_map(replace(RUN, rounds=(record,)))
    assert {text.get_text() for text in figure.legends[0].get_texts()} == handles
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == [str(layer) for layer in range(record.plan.num_teacher_layers)]
    assert figure.axes[0].yaxis.get_visible() == bool(record.scores)
    shared = [lines for lines in figure.axes[0].collections if lines.get_linewidth() == [5]]
    assert len(shared) == sum(len(block) > 1 for block in record.plan.blocks)  # of the layers that became one
    figure.canvas.draw()
