"""docs/cli.md says what the verbs take."""

import runpy
from dataclasses import fields
from pathlib import Path

import pytest

from hf_layerprune import cli

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(DOCS / "make_cli.py"))


def test_the_page_is_up_to_date(script):
    assert (DOCS / "cli.md").read_text() == script["reference"](), "run `python docs/make_cli.py`"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_verb_is_parsed_into_the_settings_the_page_names(verb, script, monkeypatch):
    """The types come from the verb itself: what it hands to `parse`."""
    seen = []

    class Stop(Exception):
        pass

    def spy(types, argv):
        seen.append(types)
        raise Stop

    module = __import__(f"hf_layerprune.cli.{_module_of(verb)}", fromlist=["parse"])
    monkeypatch.setattr(module, "parse", spy)
    with pytest.raises(Stop):
        getattr(module, verb.replace("-", "_"))([])
    (parsed,) = seen
    for given, named in zip(parsed, script["SETTINGS"][verb], strict=True):
        assert issubclass(given, named) and fields(given) == fields(named)


def _module_of(verb: str) -> str:
    return "measure" if verb in ("score", "evaluate") else verb.replace("-", "_")
