import json
import platform
import time
from pathlib import Path

import pytest
import torch

from hf_layerprune import Scores
from hf_layerprune.report import (
    columns,
    environment,
    plot_scores,
    recovery,
    render_markdown,
    report_of,
    rich_table,
    table_rows,
    write_report,
)

TEACHER = {
    "name": "teacher", "num_layers": 4, "num_parameters": 7_089_344, "loss": 4.0, "perplexity": 54.6,
    "num_tokens": 1000, "evaluated_on": "evaluation data", "decode_tokens_per_second": 100.0,
    "decode_ratio": 1.0,
}  # fmt: skip


def entry(number, layers, removed):
    return {
        "round": number, "criterion": "kl", "num_layers": layers, "edits": [str(removed)], "removed_layers": [removed],
        "num_parameters": 6_500_000, "loss_unhealed": 4.4, "perplexity_unhealed": 81.5,
        "perplexity_before_healing": 70.1, "loss": 4.1, "perplexity": 60.3, "kl": 0.0512, "agreement": 0.834,
        "scores": {"1": 0.3, "2": 0.1},
        "plan": {"num_teacher_layers": 4, "blocks": [[n] for n in range(layers)]},
        "decode_tokens_per_second": 125.0, "decode_ratio": 1.24,
    }  # fmt: skip


ROUNDS = [entry(1, 3, 2), {**entry(2, 2, 1), "scores": {"1": 0.25}}]


def test_recovery_is_the_share_of_the_way_back():
    assert recovery(TEACHER, ROUNDS[0]) == pytest.approx(0.75)
    assert recovery(TEACHER, {**ROUNDS[0], "loss_unhealed": 3.9}) is None


def test_rows_name_teacher_and_every_round():
    rows = table_rows(TEACHER, ROUNDS)
    assert [len(row) for row in rows] == [len(columns(ROUNDS))] * 3
    assert rows[0][0] == "4" and rows[0][-1] == "100 (1.00x)"
    assert rows[1] == ["3", "2", "6.50M", "81.50", "70.10", "60.30", "0.0512", "83.4 %", "125 (1.24x)"]
    assert rich_table(TEACHER, ROUNDS).row_count == 3


def test_speed_is_blank_until_it_is_measured():
    teacher = {key: value for key, value in TEACHER.items() if key != "decode_tokens_per_second"}
    rounds = [{key: value for key, value in ROUNDS[0].items() if key != "decode_tokens_per_second"}]
    assert [row[-1] for row in table_rows(teacher, rounds)] == ["", ""]


def test_files(tmp_path):
    write_report(tmp_path, TEACHER, ROUNDS, {"seed": 1})
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["teacher"] == TEACHER and report["rounds"] == ROUNDS and report["settings"] == {"seed": 1}
    assert report["environment"]["torch"]
    text = (tmp_path / "report.md").read_text()
    assert "4 layers to 2" in text and "75 % of the way back" in text and "| 2 | **0.1000** |  |" in text
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    assert not list(tmp_path.glob("*.tmp"))


def test_what_was_never_healed_has_one_perplexity_and_a_bar_is_no_column(tmp_path):
    record = {**ROUNDS[0], "edits": ["1|2"], "scores": {"1|2": 0.2, "0": 3.0}}
    record = {key: value for key, value in record.items() if "unhealed" not in key and "before" not in key}
    assert table_rows(TEACHER, [record])[1] == ["3", "1|2", "6.50M", "60.30", "0.0512", "83.4 %", "125 (1.24x)"]
    assert table_rows(TEACHER, [record])[0][3] == "54.60"
    write_report(tmp_path, TEACHER, [record], {})
    text = (tmp_path / "report.md").read_text()
    assert "without training" in text and "never" not in text.split("## Scores")[0]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows[:4]}) == 1 and "1&#124;2 | **0.2000**" in text
    assert "## Scores" not in render_markdown(report_of(TEACHER, [{**record, "scores": {}}], {}))


def test_without_rounds_there_is_a_teacher():
    assert "teacher: 4 layers" in render_markdown(report_of(TEACHER, [], {}))


def test_environment_names_no_machine():
    assert set(environment()) == {"hardware", "python", "hf-layerprune", "torch", "transformers", "trl"}


def test_hardware_is_that_of_the_device_that_was_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Big GPU")
    assert environment()["hardware"] == "Big GPU"
    write_report(tmp_path, TEACHER, ROUNDS, {}, torch.device("cpu"))
    told = json.loads((tmp_path / "report.json").read_text())["environment"]["hardware"]
    assert told.startswith("CPU ") and "Big GPU" not in told
    cpu = Path("/proc/cpuinfo")
    if cpu.is_file() and "model name" in cpu.read_text():
        assert platform.machine() not in told


def test_only_edits_that_were_made_are_explained():
    def explained(rounds):
        return render_markdown(report_of(TEACHER, rounds, {})).split("most likely token. ")[1].split("\n")[0]

    assert explained(ROUNDS).startswith("Edit 2 removed layer 2. Speed is a median")
    both = [ROUNDS[0], {**ROUNDS[1], "edits": ["0|1|3"]}]
    assert explained(both).startswith(
        "Edit 2 removed layer 2; edit 0|1|3 runs layers 0, 1 and 3 in parallel, as one layer."
    )
    without = [{key: value for key, value in ROUNDS[0].items() if "decode" not in key}]
    assert explained(without) == "Edit 2 removed layer 2."


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
