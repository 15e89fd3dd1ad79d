import json
import math
import platform
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_layerprune import Edit, LayerPlan, LayerPruneError, Scores
from hf_layerprune.benchmark import BenchmarkReport
from hf_layerprune.environment import environment
from hf_layerprune.evaluation import EvaluationReport
from hf_layerprune.plots import plot_scores
from hf_layerprune.record import Healing, RoundRecord, RunRecord, Speed, TeacherRecord
from hf_layerprune.record_reader import parse_report
from hf_layerprune.report import columns, recovery, render_markdown, rich_table, table_rows, write_report


def speed(tokens_per_second, ratio):
    report = BenchmarkReport(1000.0, tokens_per_second, 2**24, 1024, 1, 0.1, ratio, ratio)
    return Speed(report, "float32", 128, 64)


def scores(**costs):
    return (Scores("kl", {Edit.from_label(label): cost for label, cost in costs.items()}, 0.0, 1000),)


def entry(number, plan, edits, costs):
    return RoundRecord(
        plan,
        "Qwen2",
        6_500_000,
        EvaluationReport(4.1, 60.3, 0.0512, 0.834, 1000),
        speed=speed(125.0, 1.24),
        number=number,
        edits=tuple(map(Edit.from_label, edits)),
        criterion="kl",
        scores=scores(**costs) if costs else (),
        unhealed=EvaluationReport(4.4, 81.5, 0.3, None, 1000),
        before_healing=EvaluationReport(4.25, 70.1, 0.2, None, 1000),
        healing=Healing(4096, 2.0),
    )


WHOLE = LayerPlan.identity(4)
TEACHER = TeacherRecord(
    WHOLE, "Qwen2", 7_089_344, EvaluationReport(4.0, 54.6, None, None, 1000), speed=speed(100.0, 1.0), name="teacher"
)
ROUNDS = (
    entry(1, WHOLE.remove(2), ["2"], {"1": 0.3, "2": 0.1}),
    entry(2, WHOLE.remove(2).remove(1), ["1"], {"1": 0.25}),
)
RUN = RunRecord({"seed": 1}, TEACHER, ROUNDS, environment=environment())


def unhealed(record, **changes):
    return replace(record, unhealed=None, before_healing=None, healing=None, **changes)


def test_recovery_is_the_share_of_the_lost_loss():
    assert recovery(RUN, ROUNDS[0]) == pytest.approx(0.75)
    assert recovery(RUN, replace(ROUNDS[0], unhealed=EvaluationReport(3.9, 49.4, 0.1, None, 1000))) is None


def test_rows_name_teacher_and_every_round():
    rows = table_rows(RUN)
    assert [len(row) for row in rows] == [len(columns(RUN))] * 3
    assert rows[0][0] == "4" and rows[0][-1] == "100 (1.00x)"
    assert rows[1] == ["3", "2", "6.50M", "81.50", "70.10", "60.30", "0.0512", "83.4 %", "125 (1.24x)"]
    assert rich_table(RUN).row_count == 3


def test_speed_is_blank_until_it_is_measured():
    run = replace(RUN, teacher=replace(TEACHER, speed=None), rounds=(replace(ROUNDS[0], speed=None),))
    assert [row[-1] for row in table_rows(run)] == ["", ""]


def test_files(tmp_path):
    write_report(tmp_path, RUN)
    report = json.loads((tmp_path / "report.json").read_text())
    assert parse_report(report) == RUN and report["settings"] == {"seed": 1}
    assert report["rounds"][0]["kl"] == 0.0512 and report["rounds"][0]["perplexity_before_healing"] == 70.1
    assert report["environment"]["torch"]
    text = (tmp_path / "report.md").read_text()
    assert "4 layers to 2" in text and "75 % of the loss recovered" in text and "| 2 | **0.1000** |  |" in text
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("rounds",), None, 'a list "rounds"'),
        (("teacher",), [], "an object for the teacher"),
        (("environment",), {}, "hardware"),
        (("teacher", "loss"), math.nan, "loss=nan; it must be a finite number"),
        (("teacher", "name"), 3, "needs a text 'name'"),
        (("rounds", 0, "round"), 2, "numbered by"),
        (("rounds", 0, "edits"), ["two"], "labels such as"),
        (("rounds", 0, "plan"), {}, "exactly the keys"),
        (("rounds", 0, "num_layers"), 10**9, "it must be 1.."),
        (("rounds", 0, "architecture"), "a b", "it must be a name"),
        (("rounds", 0, "decode_ratio"), "fast", "it must be a finite number"),
        (("rounds", 0, "all_scores"), 3, "must be a list"),
        (("rounds", 0, "all_scores"), [{"values": {"x": 1}}], "labels such as"),
        (("rounds", 0, "tasks"), {"results": {"a": {"oops": 1}}}, "tasks that cannot be read"),
    ],
)
def test_a_report_from_outside_is_checked(path, value, message):
    report = json.loads(json.dumps(RUN.to_dict()))
    part = report
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(LayerPruneError, match=message):
        parse_report(report)


def test_an_unhealed_run_has_one_perplexity_and_a_bar_is_no_column(tmp_path):
    record = unhealed(ROUNDS[0], edits=(Edit.parallelize(1, 2),), scores=scores(**{"1|2": 0.2, "0": 3.0}))
    run = replace(RUN, rounds=(record,))
    assert table_rows(run)[1] == ["3", "1|2", "6.50M", "60.30", "0.0512", "83.4 %", "125 (1.24x)"]
    assert table_rows(run)[0][3] == "54.60"
    write_report(tmp_path, run)
    text = (tmp_path / "report.md").read_text()
    assert "without training" in text and "unhealed" not in text.split("## Scores")[0]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows[:4]}) == 1 and "1&#124;2 | **0.2000**" in text
    assert "## Scores" not in render_markdown(replace(run, rounds=(replace(record, scores=()),)))


def test_without_rounds_there_is_a_teacher():
    assert "teacher: 4 layers" in render_markdown(replace(RUN, rounds=()))


def test_environment_names_no_machine():
    assert set(environment()) == {"hardware", "python", "hf-layerprune", "torch", "transformers", "trl"}


def test_hardware_is_that_of_the_device_that_was_timed(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Big GPU")
    assert environment()["hardware"] == "Big GPU"
    told = environment(torch.device("cpu"))["hardware"]
    assert told.startswith("CPU ") and "Big GPU" not in told
    cpu = Path("/proc/cpuinfo")
    if cpu.is_file() and "model name" in cpu.read_text():
        assert platform.machine() not in told


def test_only_edits_that_were_made_are_explained():
    def explained(*rounds, **changes):
        text = render_markdown(replace(RUN, rounds=rounds, **changes))
        return text.split("most likely token. ")[1].split("\n")[0]

    assert explained(*ROUNDS).startswith("Edit 2 removes layer 2. Speed is a median")
    assert explained(ROUNDS[0], replace(ROUNDS[1], edits=(Edit.parallelize(0, 1, 3),))).startswith(
        "Edit 2 removes layer 2; edit 0|1|3 runs layers 0, 1 and 3 in parallel, as one layer."
    )
    assert explained(ROUNDS[0], teacher=replace(TEACHER, speed=None)) == "Edit 2 removes layer 2."


def test_scores_plot_survives_zero_and_nan():
    figure = plot_scores(Scores("kl", {0: 0.0, 1: float("nan"), 2: 0.2}, 0.0, 5), "title")
    assert len(figure.axes[0].patches) == 3


def test_the_report_says_how_long_the_run_took(make, tmp_path):
    began = time.perf_counter()
    trainer = make(target_num_layers=4, measure_speed=True)
    trainer.train()
    took = time.perf_counter() - began
    seconds = json.loads((tmp_path / "run" / "report.json").read_text())["seconds"]
    assert set(seconds["phases"]) == {
        "starting", "evaluating teacher", "scoring", "evaluating", "healing", "measuring speed", "writing",
    }  # fmt: skip
    assert seconds["total"] == pytest.approx(sum(seconds["phases"].values()))
    assert 0 < seconds["total"] < took
    told = (tmp_path / "run" / "report.md").read_text().splitlines()[-1]
    assert f"The run took {seconds['total']:.1f} s: " in told and "measuring speed" in told
    again = make(target_num_layers=3)  # a session later: the times add up
    again.train(resume_from_checkpoint=True)
    later = json.loads((tmp_path / "run" / "report.json").read_text())["seconds"]
    assert all(later["phases"][name] >= value - 0.1 for name, value in seconds["phases"].items() if name != "writing")
