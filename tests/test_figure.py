"""The figure: every curve of its recipe can be run, and the committed page shows the committed numbers."""

import importlib.util
import json
import math
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from hf_layerprune import IterativeLayerDistillConfig

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def figure():
    spec = importlib.util.spec_from_file_location("figure", ROOT / "benchmarks" / "figure.py")
    module = sys.modules["figure"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_curve_is_a_run(figure, tmp_path):
    recipe = figure.FigureRecipe(**yaml.safe_load(figure.RECIPE.read_text()))
    known = {field.name for field in fields(IterativeLayerDistillConfig)}
    for name, settings in recipe.curves.items():
        if "same_choice_as" in settings:
            assert settings["same_choice_as"] in recipe.curves
        else:
            assert set(settings) <= known, name
            IterativeLayerDistillConfig(output_dir=str(tmp_path), target_num_layers=8, **settings)


def test_committed_page_shows_the_committed_numbers(figure):
    content = json.loads((RESULTS / "figure.json").read_text())
    assert (RESULTS / "figure.md").read_text() == figure.markdown(
        figure.rises(content["curves"]), content["teacher"], 3
    )


def test_measured_choice_and_healing_lead_beyond_two_layers(figure):
    curves = figure.rises(json.loads((RESULTS / "figure.json").read_text())["curves"])
    healed = {name: points for name, points in curves.items() if not name.endswith("not healed")}
    for count in (4, 6, 8):
        best = min(healed, key=lambda name: math.fsum(healed[name][count]))
        assert best.startswith(("KL", "block influence")), count
        assert math.fsum(healed["KL, healed"][count]) < math.fsum(curves["KL, not healed"][count]) / 4
