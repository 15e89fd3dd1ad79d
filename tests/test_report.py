import json
import platform
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_layerprune import Edit, LayerPlan, LayerPruneError, Scores
from hf_layerprune.benchmark import BenchmarkReport
from hf_layerprune.environment import environment
from hf_layerprune.evaluation import EvaluationReport
from hf_layerprune.record import Healing, RoundRecord, RunRecord, Speed, TeacherRecord, read_run
from hf_layerprune.report import plot_scores, recovery, render_markdown, table_rows, write_report


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
    rows = [list(row.values()) for row in table_rows(RUN)]
    assert rows[0] == ["4", "", "7.09M", "", "", "54.60", "0", "100.0 %", "1.00x"]
    assert rows[1] == ["3", "2", "6.50M", "81.50", "70.10", "60.30", "0.0512", "83.4 %", "1.24x"]
    run = replace(RUN, teacher=replace(TEACHER, speed=None), rounds=(replace(ROUNDS[0], speed=None),))
    assert not any("speed" in row for row in table_rows(run))


def test_files(tmp_path):
    write_report(tmp_path, RUN)
    report = json.loads((tmp_path / "report.json").read_text())
    assert read_run(tmp_path / "report.json") == RUN and report["settings"] == {"seed": 1}
    assert report["rounds"][0]["quality"]["kl"] == 0.0512
    assert report["rounds"][0]["before_healing"]["perplexity"] == 70.1
    assert report["environment"]["torch"]
    text = (tmp_path / "report.md").read_text()
    assert "4 layers to 2" in text and "75 % of the loss recovered" in text and "| 2 | **0.1000** |  |" in text
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("rounds",), None, "the run.rounds=None must be a list"),
        (("teacher",), [], "the run.teacher=[] must be an object"),
        (("teacher", "quality", "loss"), "low", "quality.loss='low' must be a number"),
        (("teacher", "name"), 3, "the run.teacher.name=3 must be a text"),
        (("rounds", 0, "number"), 10**400, "must be a whole number"),
        (("rounds", 0, "quality", "perplexity"), 10**400, "must be a whole number"),
        (("rounds", 0, "edits"), ["two"], "edits='two' must be a label such as"),
        (("rounds", 0, "plan"), {}, "the keys"),
        (("rounds", 0, "plan"), {"num_teacher_layers": 999_999_999_999, "blocks": [[0]]}, "it may have 1 to 10000"),
        (("rounds", 0, "healing"), {}, "rounds.healing lacks num_tokens"),
        (("rounds", 0, "scores"), [{"values": {"x": 1}}], "scores lacks criterion"),
        (("rounds", 0, "scores", 0, "values"), {"x": 1}, "must be a label"),
        (("current",), {"wanted": 1, "phase": "lost"}, "must be one of choosing, edited, healed"),
    ],
)
def test_a_report_from_outside_is_checked(path, value, message):
    report = json.loads(RUN.to_json())
    part = report
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(LayerPruneError) as error:
        RunRecord.from_json(json.dumps(report))
    assert message in str(error.value)


def test_an_unhealed_run_has_one_perplexity_and_a_bar_is_no_column(tmp_path):
    record = unhealed(ROUNDS[0], edits=(Edit.parallelize(1, 2),), scores=scores(**{"1|2": 0.2, "0": 3.0}))
    run = replace(RUN, rounds=(record,))
    teacher, first = (list(row.values()) for row in table_rows(run))
    assert first == ["3", "1|2", "6.50M", "60.30", "0.0512", "83.4 %", "1.24x"] and teacher[3] == "54.60"
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
    properties = SimpleNamespace(name="Big GPU", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert environment()["hardware"] == "Big GPU, 80 GiB"
    told = environment(torch.device("cpu"))["hardware"]
    assert told.startswith("CPU ") and told.endswith(torch.backends.cpu.get_cpu_capability())
    cpu = Path("/proc/cpuinfo")
    if cpu.is_file() and "model name" in cpu.read_text():
        assert platform.machine() not in told


def test_scores_plot_survives_zero_and_nan():
    figure = plot_scores(Scores("kl", {0: 0.0, 1: float("nan"), 2: 0.2}, 0.0, 5), "title")
    assert len(figure.axes[0].patches) == 3


def test_the_report_says_how_long_the_run_took(make, tmp_path):
    began = time.perf_counter()
    trainer = make(target_num_layers=4, measure_speed=True)
    trainer.train()
    took = time.perf_counter() - began
    seconds = read_run(tmp_path / "run" / "report.json").seconds
    assert set(seconds) == {
        "starting", "evaluating teacher", "scoring", "evaluating", "healing", "measuring speed", "writing",
    }  # fmt: skip
    total = sum(seconds.values())
    assert 0 < total < took
    told = (tmp_path / "run" / "report.md").read_text().splitlines()[-1]
    assert f"The run took {total:.1f} s: " in told and "measuring speed" in told
    again = make(target_num_layers=3)  # a session later: the times add up
    again.train(resume_from_checkpoint=True)
    later = read_run(tmp_path / "run" / "report.json").seconds
    assert all(later[name] >= value - 0.1 for name, value in seconds.items() if name != "writing")
