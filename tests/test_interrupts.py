"""Whatever ends a run in the middle, the last good round is on disk and the same command goes on from there."""

import json
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import forked
import pytest
import torch
import yaml
from conftest import rounds_of, tiny_config, tiny_model
from datasets import Dataset

from hf_layerprune import IterativeLayerDistillTrainer, cli
from hf_layerprune.loading import load_model
from hf_layerprune.trainer.healing import HealingTrainer

RECIPE = {
    "target_num_layers": 3, "max_steps": 6, "trained_layers": "all", "logging_steps": 1, "learning_rate": 1e-3,
    "num_calibration_samples": 4, "num_eval_samples": 4, "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2, "max_length": 32, "packing": True, "packing_strategy": "wrapped",
    "measure_speed": False, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "steps",
    "save_steps": 2,
}  # fmt: skip
SLOWLY = """
import sys, time
from hf_layerprune import LayerDistillCallback
from hf_layerprune.trainer import iterative
from hf_layerprune.cli import main

class Slow(LayerDistillCallback):
    def on_step_end(self, *_, **__):
        time.sleep(0.2)
    def on_phase_step(self, *_, **__):
        time.sleep(0.05)

start = iterative.IterativeLayerDistillTrainer.__init__
def slowly(self, *args, **kwargs):
    start(self, *args, **kwargs)
    self.add_callback(Slow())
iterative.IterativeLayerDistillTrainer.__init__ = slowly
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer, texts):
    """A folder with a model, texts and a recipe."""
    folder = tmp_path_factory.mktemp("place")
    tiny_model().save_pretrained(folder / "tiny-model")
    tokenizer.save_pretrained(folder / "tiny-model")
    texts.to_json(folder / "texts.jsonl")
    named = {"model": str(folder / "tiny-model"), "dataset": str(folder / "texts.jsonl")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | named))
    return folder


@pytest.fixture
def recipe(place, tmp_path):
    """One that a test may change."""
    return Path(shutil.copy(place / "recipe.yaml", tmp_path))


def words(recipe, folder, *more):
    return ["compress", "--config", str(recipe), "--output_dir", str(folder), *more]


def run(*args):
    """The exit status; only what is killed needs a process of its own."""
    return cli.main(words(*args))


def start(*args):
    return forked.Process(SLOWLY, *words(*args))


def until(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.stderr[-2000:]
        time.sleep(0.02)


def state(folder):
    path = folder / "run_state.json"
    return json.loads(path.read_text()) if path.is_file() else {"rounds": [], "teacher": None, "current": None}


def reached(folder):
    """What the run on disk has finished last."""
    run = state(folder)
    current = run["current"]
    if current is None:
        return "round" if run["rounds"] else "evaluating teacher" if run["teacher"] else None
    if current["phase"] == "healed":
        return "healing"
    return "checkpoint" if current["checkpoint"] else "scoring" if current["phase"] == "choosing" else "evaluating"


def assert_same_result(folder, whole):
    found, expected = (json.loads((path / "report.json").read_text())["rounds"] for path in (folder, whole))
    assert [record["edits"] for record in found] == [record["edits"] for record in expected]
    models = load_model(str(folder / "model")), load_model(str(whole / "model"))
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.fixture(scope="module")
def whole(place):
    """What a run that nothing ends leaves."""
    assert run(place / "recipe.yaml", place / "whole") == 0
    return place / "whole"


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(recipe, tmp_path, whole):
    folder = tmp_path / "cut"
    process = start(recipe, folder)
    until(lambda: len(state(folder)["rounds"]) == 1 and reached(folder) == "checkpoint", process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "hf-layerprune: stopping after this step; Ctrl-C again stops now" in process.stderr
    message = process.stderr.strip().splitlines()[-1]
    assert message.startswith(
        "hf-layerprune: stopped; what is done is kept; to continue: hf-layerprune compress --config"
    )
    assert len(state(folder)["rounds"]) == 1 and state(folder)["current"]["checkpoint"] >= 2
    assert cli.main(message.split("to continue: hf-layerprune ")[1].split()) == 0
    assert_same_result(folder, whole)


def test_a_second_run_in_the_folder_is_refused(recipe, tmp_path, capsys):
    folder = tmp_path / "shared"
    process = start(recipe, folder)
    until(lambda: (folder / "run_state.json").is_file(), process)
    assert run(recipe, folder, "--resume") == 2
    assert "in use by another run" in capsys.readouterr().err.strip().splitlines()[-1]
    process.kill()
    process.wait()
    assert run(recipe, folder, "--resume", "--target_num_layers", "4") == 0  # a lock dies with its process


PHASES = ("evaluating teacher", "scoring", "checkpoint", "healing", "round")
SETTINGS = {
    "all": {},
    "neighbours": {"trained_layers": "neighbours"},
    "checkpoints": {"save_steps": 1, "save_total_limit": 1},
    "adapters": {"lora_r": 4, "trained_layers": "neighbours"},
}


def kill_and_resume(recipe, folder, whole, phases, seed):
    """SIGKILL once a run has begun each of `phases`, at a random moment behind; a run that gets through before it has
    is compared, and another is started."""
    moments, killed = random.Random(seed), []
    while len(killed) < len(phases):
        path = folder / "run_state.json"
        opened = path.stat().st_mtime_ns if path.is_file() else 0
        process = start(recipe, folder, *(["--resume"] if opened else []))
        while process.poll() is None:
            fresh = path.is_file() and path.stat().st_mtime_ns > opened  # it writes its state once it is under way
            if fresh and reached(folder) == phases[len(killed)]:
                break
            time.sleep(0.005)
        with suppress(subprocess.TimeoutExpired):
            process.wait(moments.uniform(0, 0.4))
        if process.poll() is None:
            before = state(folder)["rounds"]
            process.kill()
            process.wait()
            killed.append(reached(folder))
            assert state(folder)["rounds"][: len(before)] == before, f"killed in {killed}: a round is lost"
        else:
            assert process.wait() == 0, process.stderr
            assert_same_result(folder, whole)
            shutil.rmtree(folder)
    assert run(recipe, folder, *(["--resume"] if (folder / "run_state.json").is_file() else [])) == 0
    assert_same_result(folder, whole)
    assert len(killed) == len(phases) and len(set(killed)) > 1, killed


def test_killed_at_random_moments(recipe, tmp_path, whole):
    kill_and_resume(recipe, tmp_path / "cut", whole, ("checkpoint", "healing", "scoring"), seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed, name", list(enumerate(SETTINGS, start=1)), ids=list(SETTINGS))
def test_killed_at_many_random_moments(recipe, tmp_path, seed, name):
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | SETTINGS[name]))
    assert run(recipe, tmp_path / "whole") == 0
    phases = random.Random(seed).sample(PHASES, len(PHASES))
    kill_and_resume(recipe, tmp_path / "cut", tmp_path / "whole", phases, seed)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_is_one_line(file, recipe, tmp_path, whole):
    size = 60_000 if file == "model.safetensors" else 10_000 + (whole / "rounds/01/model.safetensors").stat().st_size
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); "
    folder = tmp_path / "full"
    failed = forked.run(limited + forked.CLI, *words(recipe, folder))
    assert failed.wait() == 2, failed.stderr
    last = failed.stderr.strip().splitlines()[-1]
    assert "cannot be written" in last and "Traceback" not in failed.stderr
    assert run(recipe, folder, "--resume") == 0
    assert_same_result(folder, whole)


CLOSED = "ends = os.pipe(); os.dup2(ends[1], 1); [os.close(end) for end in ends]; "
OPENED = "sys.stdout = open(1, 'w', closefd=False, encoding="
OUTPUTS = {
    "closed": f"{CLOSED}{OPENED}'utf-8')",
    "both closed": f"{CLOSED}os.dup2(1, 2); {OPENED}'utf-8')",
    "full": f"os.dup2(os.open('/dev/full', os.O_WRONLY), 1); {OPENED}'utf-8')",
    "full, unbuffered": "os.dup2(os.open('/dev/full', os.O_WRONLY), 1); "
    "sys.stdout = type(sys.stdout)(open(1, 'wb', 0, closefd=False), write_through=True)",
    "ascii": f"{OPENED}'ascii')",
    "none": "sys.stdout = None",
}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("verb", ["score", "evaluate", "compress"])
def test_an_output_that_cannot_be_written_loses_no_work(verb, output, recipe, place, tmp_path):
    given = words(recipe, tmp_path / "out")
    if verb != "compress":
        given = [verb, "--model", place / "tiny-model", "--dataset", place / "texts.jsonl", "--num_samples", 2]
        given += ["--max_length", 32, "--output_dir", tmp_path / "out"]
    process = forked.run(f"import os, sys; {OUTPUTS[output]}\n{forked.CLI}", *given)
    assert process.wait() == (2 if "full" in output else 0), process.stderr
    file = {"score": "scores.json", "evaluate": "evaluation.json", "compress": "model/model.safetensors"}[verb]
    assert (tmp_path / "out" / file).is_file()
    if "full" in output:
        assert process.stderr.endswith(
            "stdout cannot be written: No space left on device; what was saved is complete\n"
        )


@pytest.fixture
def make(tmp_path, tokenizer):
    def build(**changes):
        rows = [{"text": "It was the best of times, it was the worst of times. " * 2}] * 12
        return IterativeLayerDistillTrainer(
            model=tiny_model(5), args=tiny_config(tmp_path / "run", **{"measure_speed": False} | changes),
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        )  # fmt: skip

    return build


def test_out_of_memory_stays_what_it_is_and_the_run_resumes(make, monkeypatch):
    trainer = make()

    def fail(*_, **__):
        if trainer.round == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return parts(*_, **__)

    parts = HealingTrainer.loss_parts
    with monkeypatch.context() as patch:
        patch.setattr(HealingTrainer, "loss_parts", fail)
        with pytest.raises(torch.OutOfMemoryError):
            trainer.train()
    again = make()
    again.train(resume_from_checkpoint=True)
    assert [record["num_layers"] for record in rounds_of(again)] == [4, 3]
