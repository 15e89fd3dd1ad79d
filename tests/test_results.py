"""The committed results of the demo, and the demo itself (slow)."""

import json
from pathlib import Path

import pytest

from hf_layerprune import cli
from hf_layerprune.record import read_run
from hf_layerprune.report import recovery, render_markdown

RECIPES = Path(__file__).parent.parent / "recipes"


def check(run):
    assert [record.depth for record in run.rounds] == [12, 8]
    three_quarters = next(record for record in run.rounds if record.depth == 12)
    assert recovery(run, three_quarters) >= 0.75
    for record in run.rounds:
        assert record.quality.loss < record.unhealed.loss
    plan = run.rounds[-1].plan
    assert plan.depth == 8 and plan.num_teacher_layers == 16


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/results/report.json")), ids=lambda path: path.parts[-3])
def test_committed_reports_are_read_and_rendered_as_they_are(path):
    run = read_run(path)
    assert json.loads(path.read_text()).items() <= json.loads(run.to_json()).items()  # younger fields may be missing
    assert path.with_name("report.md").read_text() == render_markdown(run)


def test_committed_results_reach_the_goals():
    run = read_run(RECIPES / "tiny" / "results" / "report.json")
    check(run)
    assert sum(record.seconds_scoring + record.healing.seconds for record in run.rounds) < 360


@pytest.mark.slow
def test_the_demo_reaches_the_goals(tmp_path):
    assert cli.main(["compress", "--output_dir", str(tmp_path / "demo")]) == 0
    check(read_run(tmp_path / "demo" / "report.json"))
