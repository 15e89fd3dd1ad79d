"""The layer map, as text and as a picture."""

import pytest
from test_report import ROUNDS, entry

from hf_layerprune import Edit, LayerPlan
from hf_layerprune.layer_map import last_costs, layer_map_text, plot_layer_map


def test_text():
    plan = LayerPlan(((0,), (2,), (4, 5), (9, 10, 12)), 14)
    assert layer_map_text(plan) == "  0   ·   2   ·  (4  5)   ·   ·   ·  (9  10   · 12)   ·".replace("  (4", "  (4")
    assert layer_map_text(LayerPlan.identity(5), width=2) == "0 1\n2 3\n4"


def test_costs_are_those_of_the_last_scoring():
    assert last_costs(ROUNDS) == {Edit.remove(1): 0.25, Edit.remove(2): 0.1}
    scores = [{"values": {"0": 1.0, "1": None}}, {"values": {"0": 2.0}}]
    assert last_costs([{**ROUNDS[0], "all_scores": scores}]) == {Edit.remove(0): 2.0}


@pytest.mark.parametrize(
    "changes, handles",
    [
        ({}, {"kept", "removed"}),
        ({"scores": {}}, {"kept", "removed"}),
        ({"scores": {"1": -0.1, "2": 0.0}}, {"kept", "removed"}),
        (
            {
                "edits": ["1|2"],
                "scores": {"1|2": 0.1, "0": 3.0},
                "plan": {"num_teacher_layers": 5, "blocks": [[0], [1, 2]]},
            },
            {"kept", "removed before this run", "in parallel, as one layer"},
        ),
    ],
)
def test_picture(changes, handles):
    figure = plot_layer_map(
        [entry(1, 2, 3) | {"plan": {"num_teacher_layers": 4, "blocks": [[0], [1], [2]]}} | changes]
    )
    legend = figure.axes[-1].get_legend()
    assert {text.get_text() for text in legend.get_texts()} == handles
    assert len(figure.axes) == (1 if changes.get("scores") == {} else 2)
