"""The script for Jobs of the Hub keeps a run on what stands for a bucket, and the next job continues it."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from conftest import byte_tokenizer, read_report, tiny_model
from huggingface_hub.cli.extensions import ExtensionManifest, dispatch_unknown_top_level_extension

from hf_layerprune import __version__, cli
from hf_layerprune.cli.parsing import parse
from hf_layerprune.trainer.rounds import Rounds

ROOT = Path(__file__).parent.parent
PAGE, SCRIPT = ROOT / "recipes" / "jobs" / "README.md", ROOT / "recipes" / "jobs" / "compress.py"
LAUNCH = next(line for line in PAGE.read_text().replace("\\\n", " ").splitlines() if line.startswith("hf jobs uv run"))


class InThisProcess:
    """Stands for the process that the script starts; importing takes seconds."""

    def __init__(self, command):
        assert command[:3] == [sys.executable, "-m", "hf_layerprune.cli"]
        self.returncode = cli.main(command[3:])

    def poll(self):
        return self.returncode


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script as a module, its work in a folder of its own."""
    spec = importlib.util.spec_from_file_location("jobs_compress", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.subprocess, "Popen", InThisProcess)
    monkeypatch.setattr(module.signal, "signal", lambda number, handler: None)
    return module


def a_job(script, monkeypatch, place, settings):
    place.mkdir()
    monkeypatch.chdir(place)  # the disk of a job ends with it
    return script.main([str(place.parent / "bucket" / "run"), *map(str, settings)])


def test_the_next_job_continues(script, monkeypatch, tmp_path):
    teacher, text = tmp_path / "teacher", tmp_path / "text.txt"
    tiny_model(6).save_pretrained(teacher)
    byte_tokenizer().save_pretrained(teacher)
    text.write_text("\n".join(f"It was the best of times, {n} of them." for n in range(60)))
    settings = [
        "--model", teacher, "--dataset", text, "--max_length", 32, "--max_steps", 2, "--num_calibration_samples", 2,
        "--num_eval_samples", 2, "--per_device_train_batch_size", 2, "--save_strategy", "steps", "--save_steps", 1,
        "--measure_speed", "false", "--report_to", "none", "--target_num_layers", 4,
    ]  # fmt: skip
    kept = tmp_path / "bucket" / "run"
    end_round, ended = Rounds._end_round, []

    def interrupted(rounds, *arguments):
        end_round(rounds, *arguments)
        ended.append(len(rounds.run.rounds))
        if ended == [1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Rounds, "_end_round", interrupted)
    assert a_job(script, monkeypatch, tmp_path / "first", settings) == 130
    assert (kept / "run_state.json").is_file() and not (kept / "model").exists()
    assert a_job(script, monkeypatch, tmp_path / "second", settings) == 0
    assert ended == [1, 2] and [record["num_layers"] for record in read_report(kept)["rounds"]] == [5, 4]
    work = tmp_path / "second" / "run"
    files = {path.relative_to(work): path.read_bytes() for path in work.rglob("*") if path.is_file()}
    there = {path.relative_to(kept): path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    assert there == {name: content for name, content in files.items() if name.name != ".lock"}


def test_a_copy_that_is_cut_off_still_holds_what_its_state_names(script, tmp_path, monkeypatch):
    work, kept, copied = tmp_path / "work", tmp_path / "kept", {}
    (work / "healing").mkdir(parents=True)
    (work / "run_state.json").write_text("1")
    (work / "healing" / "checkpoint-1").write_text("one")
    script.keep(work, kept, copied)
    (work / "run_state.json").write_text("2")
    (work / "healing" / "checkpoint-1").unlink()
    (work / "healing" / "checkpoint-2").write_text("two")
    monkeypatch.setattr(script.shutil, "copyfile", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        script.keep(work, kept, copied)
    assert (kept / "run_state.json").read_text() == "1" and (kept / "healing" / "checkpoint-1").is_file()
    monkeypatch.undo()
    script.keep(work, kept, copied)
    assert {path.name for path in kept.rglob("*")} == {"run_state.json", "healing", "checkpoint-2"}


def test_the_launch_line_is_one(tmp_path):
    words = shlex.split(LAUNCH)
    place = words.index(f"recipes/jobs/{SCRIPT.name}")
    hf = str(Path(sys.executable).parent / "hf")
    result = subprocess.run(
        [hf, *words[1:4], "--dry-run", *words[4:]],
        cwd=ROOT,
        env=os.environ | {"HF_TOKEN": "hf_x", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and "timeout" in result.stdout and "hf://buckets/user/runs:/runs" in result.stdout
    arguments, config = parse("compress", words[place + 2 :])
    assert arguments.dataset_split == "train[:20000]" and config.target_num_layers == 18


def test_the_script_names_its_packages():
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", SCRIPT.read_text(), re.MULTILINE)[1]
    assert '"hf-layerprune[plots]"' in block and "requires-python" in block


def test_hf_runs_the_console_script_as_an_extension(tmp_path, monkeypatch, capfd):
    """As `hf extensions install OWNER/hf-layerprune` leaves it, without the download."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_UPDATE_CHECK", True)
    script = Path(sys.executable).parent / "hf-layerprune"
    manifest = ExtensionManifest(
        owner="owner", repo="hf-layerprune", repo_id="owner/hf-layerprune", short_name="layerprune", type="python",
        executable_path=str(script), installed_at=datetime(2026, 11, 29),
    )  # fmt: skip
    manifest.save(tmp_path / ".local/share/hf/extensions/hf-layerprune")
    assert dispatch_unknown_top_level_extension(["layerprune", "--version"], {"models"}) == 0
    assert capfd.readouterr().out == f"hf-layerprune {__version__}\n"
