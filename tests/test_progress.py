import io
import os

import pytest
from conftest import tiny_config, tiny_model
from rich.console import Console

import hf_layerprune.progress as module
from hf_layerprune import IterativeLayerDistillTrainer, cli
from hf_layerprune.progress import Phases, RunProgress


@pytest.mark.parametrize(
    "changes, names",
    [
        ({}, ["round 1/2, 5 layers: scoring", "round 2/2, 3 layers: healing", "round 2/2, 3 layers: evaluating"]),
        ({"heal": False, "layers_per_round": 2, "compensation": "least_squares"}, ["round 1/1, 4 layers: repairing"]),
    ],
    ids=["healed", "repaired"],
)
def test_each_phase_of_a_run_has_a_bar_that_ends_full(tmp_path, tokenizer, texts, changes, names):
    trainer = IterativeLayerDistillTrainer(
        model=tiny_model(), args=tiny_config(tmp_path, **changes), train_dataset=texts, eval_dataset=texts,
        processing_class=tokenizer,
    )  # fmt: skip
    console, ends = Console(file=io.StringIO(), width=120), {}
    phases = Phases(console)
    begin, task = phases.phase, phases.bar.tasks[0]

    def phase(name, total=None):
        ends[task.description] = (task.completed, task.total)
        begin(name, total)

    phases.phase = phase
    trainer.add_callback(RunProgress(trainer, phases))
    trainer.train()
    assert "evaluating teacher" in ends and set(names) <= set(ends)
    for name, (completed, total) in ends.items():
        assert total is None or completed == total, name
    printed = console.file.getvalue()
    rounds = len(trainer.run.rounds)
    assert printed.count("; perplexity ") == rounds and printed.count(" left\n") == rounds - 1


def test_away_from_a_terminal_a_line_begins_each_phase_and_a_long_one_says_more_every_half_minute(monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: seconds[0])
    console = Console(file=io.StringIO(), width=120)
    phases = Phases(console)
    phases.bar.get_time = lambda: seconds[0]
    with phases:
        phases.phase("loading [a model]")
        phases.phase("scoring", 10)
        for _ in range(9):
            seconds[0] += 10
            phases.step()
    assert console.file.getvalue().splitlines() == [
        "loading [a model] ...", "scoring ...", "scoring: 30 %, 0:01:10 left", "scoring: 60 %, 0:00:40 left",
        "scoring: 90 %, 0:00:10 left",
    ]  # fmt: skip


def test_in_a_terminal_a_phase_has_a_bar(monkeypatch):
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with Phases(console) as phases:
        phases.phase("loading")
        assert "loading ..." in console.file.getvalue() and not phases.bar.live.is_started
        phases.phase("scoring", 10)
        assert phases.bar.live.is_started
        phases.step(5)
        phases.bar.refresh()
        assert "50%" in console.file.getvalue()
    assert not phases.bar.live.is_started


@pytest.mark.parametrize(
    "argv, said",
    [
        (["score", "--num_samples", "4"], ["reading the text", "loading", "scoring 5 layers by kl"]),
        (["evaluate", "--num_samples", "4"], ["reading the text", "loading", "evaluating"]),
        (
            ["benchmark", "--prompt_tokens", "4", "--new_tokens", "3"],
            ["loading", "measuring speed, batch 1"],
        ),
        (
            ["parallelize", "--num_samples", "4", "--num_eval_samples", "4", "--measure_speed", "true"],
            ["reading the text", "loading", "searching", "writing", "evaluating the model and", "measuring speed"],
        ),
        (["generate", "--num_prompts", "4", "--max_new_tokens", "4"], ["reading the prompts", "loading", "answering"]),
    ],
    ids=lambda value: value[0],
)
def test_every_verb_says_what_it_is_doing_and_counts_its_steps(
    argv, said, tmp_path, model_folder, monkeypatch, capsys
):
    ends = []
    leave = Phases.__exit__
    monkeypatch.setattr(
        Phases, "__exit__", lambda self, *error: (ends.append(self.bar.tasks[0]), leave(self, *error))[1]
    )
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 3600)  # on a busy machine a phase takes long
    out = ["--output_file", tmp_path / "rows.jsonl"] if argv[0] == "generate" else ["--output_dir", tmp_path / "out"]
    model = [model_folder] if argv[0] == "benchmark" else ["--model", model_folder]
    short = [] if argv[0] in ("benchmark", "generate") else ["--max_length", "32"]
    short += [] if argv[0] == "benchmark" else ["--dataset", "embedded:calibration"]
    assert cli.main([*map(str, (*argv, *short, *model, *out))]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(said) and all(line.startswith(begin) for line, begin in zip(lines, said, strict=True))
    assert ends[-1].completed == pytest.approx(ends[-1].total)


def test_a_terminal_that_vanishes_stops_no_work():
    terminal, end = os.openpty()
    with open(end, "w") as file, Phases(module.Console(file=file, force_terminal=True)) as phases:
        phases.phase("scoring", 2)
        os.close(terminal)
        for name in ("scoring", "healing"):
            phases.phase(name, 2)
            phases.step()
            phases.bar.refresh()
        phases.phase("writing")
        assert phases.console.quiet
