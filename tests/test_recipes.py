"""Every recipe of the repository is parsed as strictly as the command line does."""

from pathlib import Path

import pytest
import yaml

from hf_layerprune import IterativeLayerDistillConfig
from hf_layerprune.cli.arguments import CompressArguments, parse

ROOT = Path(__file__).parent.parent
RECIPES = sorted(
    path
    for path in (*ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("hf_layerprune/assets/*.yaml"))
    if path.is_file() and path.parent.name != "accelerate"  # settings of accelerate, see test_engines.py
)


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_parses_strictly(path):
    arguments, config = parse((CompressArguments, IterativeLayerDistillConfig), ["--config", str(path)])
    recipe = yaml.safe_load(path.read_text())
    assert arguments.model == recipe["model"] and config.target_num_layers == recipe["target_num_layers"]
