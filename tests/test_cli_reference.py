"""docs/cli.md and `--help` say what the verbs take."""

import runpy
from dataclasses import fields
from pathlib import Path

from trl import SFTConfig

from hf_layerprune.cli.arguments import OF_TRL

DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_is_up_to_date():
    script = runpy.run_path(str(DOCS / "make_cli.py"))
    assert script["PAGE"].read_text() == script["reference"](), "run `python docs/make_cli.py`"


def test_settings_of_trl_are_settings():
    assert len(OF_TRL) == len(set(OF_TRL)) and set(OF_TRL) <= {item.name for item in fields(SFTConfig)}
