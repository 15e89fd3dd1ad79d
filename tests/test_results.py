"""The committed results of the demo, and the demo itself (slow)."""

import json
from pathlib import Path

import pytest

from hf_layerprune import LayerPlan, cli
from hf_layerprune.record_reader import parse_report
from hf_layerprune.report import recovery, render_markdown

RESULTS = Path(__file__).parent.parent / "recipes" / "tiny" / "results"


def check(report):
    assert [record["num_layers"] for record in report["rounds"]] == list(range(15, 7, -1))
    three_quarters = next(record for record in report["rounds"] if record["num_layers"] == 12)
    run = parse_report(report)
    assert recovery(run, run.rounds[report["rounds"].index(three_quarters)]) >= 0.75
    for record in report["rounds"]:
        assert record["loss"] < record["loss_unhealed"]
    plan = LayerPlan.from_dict(report["rounds"][-1]["plan"])
    assert plan.depth == 8 and plan.num_teacher_layers == 16


def test_committed_results_reach_the_goals():
    report = json.loads((RESULTS / "report.json").read_text())
    check(report)
    assert sum(record["seconds_scoring"] + record["seconds_healing"] for record in report["rounds"]) < 360
    assert (RESULTS / "report.md").read_text() == render_markdown(parse_report(report))


@pytest.mark.slow
def test_the_demo_reaches_the_goals(tmp_path):
    assert cli.main(["compress", "--output_dir", str(tmp_path / "demo")]) == 0
    check(json.loads((tmp_path / "demo" / "report.json").read_text()))
