"""What is an extra may be missing: reports come without plots, and everything else says which extra it needs."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_hub_card import card_of
from test_report import RUN

from hf_layerprune import LayerPruneError, __version__, cli, load_model, loading, report
from hf_layerprune import demo as demo_room
from hf_layerprune.report import plot_quality, write_report
from hf_layerprune.tasks import chunks

ROOT = Path(__file__).parent.parent


@pytest.fixture
def without(monkeypatch):
    """Makes a package one that is not installed."""

    def remove(package):
        def find(name):
            return None if name == package else find_spec(name)

        for module in (report, loading, demo_room):
            monkeypatch.setattr(module, "find_spec", find)
        for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
            monkeypatch.setitem(sys.modules, name, None)
        chunks._loaded.cache_clear()

    yield remove
    chunks._loaded.cache_clear()


def test_without_matplotlib_a_run_has_no_plots(tmp_path, without, capsys):
    without("matplotlib")
    write_report(tmp_path, RUN)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md"}
    for text in ((tmp_path / "report.md").read_text(), str(card_of(pushed=True))):
        assert ".png" not in text and "## Scores" in text or "## Which layers" in text
    with pytest.raises(LayerPruneError, match=r"matplotlib is not installed; pip install 'hf-layerprune\[plots\]'"):
        plot_quality(RUN)
    out = tmp_path / "scores"
    assert cli.main(["score", "--criterion", "tail", "--output_dir", str(out)]) == 0
    assert [path.name for path in out.iterdir()] == ["scores.json"]
    assert "no plot: pip install 'hf-layerprune[plots]'" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "package, metric", [("rouge_score", "rougeL"), ("sacrebleu", "chrf"), ("evaluate", "a_metric_of_the_hub")]
)
def test_a_metric_names_its_extra(without, package, metric):
    without(package)
    with pytest.raises(LayerPruneError, match=rf"{package} is not installed; pip install 'hf-layerprune\[metrics\]'"):
        chunks.check_metric(metric)


def test_gguf_and_demo_name_their_extras(tmp_path, without):
    without("gguf")
    with pytest.raises(LayerPruneError, match=r"pip install 'hf-layerprune\[gguf\]'"):
        load_model(str(tmp_path / "model.gguf"))
    without("gradio")
    with pytest.raises(LayerPruneError, match=r"pip install 'hf-layerprune\[demo\]'"):
        demo_room.launch(demo_room.settings_of([]))


def test_every_extra_that_is_named_is_there():
    project = (ROOT / "pyproject.toml").read_text()
    extras = set(
        re.findall(r"^([\w-]+) = \[", project.split("[project.optional-dependencies]")[1].split("[project.s")[0], re.M)
    )
    files = [*ROOT.glob("hf_layerprune/**/*.py"), *ROOT.glob("hf_layerprune/**/*.jinja"), *ROOT.glob("**/*.md")]
    text = "\n".join(path.read_text() for path in files if ".venv" not in path.parts)
    named = {
        name for found in re.findall(r"(?:hf-layerprune|'\.|\"\.)\[([\w,-]+)\]", text) for name in found.split(",")
    }
    named |= set(re.findall(r'needs_extra\([^)]*"([\w-]+)"\)', text))
    assert named <= extras and {"plots", "metrics", "gguf", "demo", "lm-eval"} <= named


def test_the_version_has_one_place():
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {__version__} " in (ROOT / "CHANGELOG.md").read_text()
