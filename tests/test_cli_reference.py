"""docs/cli.md and `--help` say what the verbs take."""

import runpy
from dataclasses import fields
from pathlib import Path

from hf_layerprune import IterativeLayerDistillConfig
from hf_layerprune.cli.arguments import NO_EFFECT

DOCS = Path(__file__).parent.parent / "docs"


def test_page_and_help_are_up_to_date():
    script = runpy.run_path(str(DOCS / "make_cli.py"))
    assert script["PAGE"].read_text() == script["reference"](), "run `python docs/make_cli.py`"
    assert script["RUN_SETTINGS"].read_text() == script["run_settings"](), "run `python docs/make_cli.py`"


def test_settings_without_effect_are_settings():
    names = [name for given in NO_EFFECT.values() for name in given]
    assert len(names) == len(set(names)) and set(names) <= {item.name for item in fields(IterativeLayerDistillConfig)}
