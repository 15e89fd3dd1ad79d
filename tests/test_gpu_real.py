"""`benchmarks/gpu_real.sh` with a Python that only writes its commands down: they are valid, and as meant."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from hf_layerprune.cli.parsing import parse

ROOT = Path(__file__).parent.parent
RECORDER = """#!{python}
import json, pathlib, sys
with open("commands.jsonl", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1].endswith("get_model.py"):
    print("MODEL")
if sys.argv[1].endswith("carry.py"):
    import subprocess
    sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)
"""


@pytest.fixture
def clone(tmp_path):
    """A clone with what the scripts read, and a Python that writes its commands down."""
    for name in ("benchmarks/gpu_real.sh", "benchmarks/carry.py", "recipes/real_model.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for model in ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"):
        (tmp_path / "recipes" / model / "data").mkdir(parents=True)
        (tmp_path / "recipes" / model / "data" / "answers.jsonl").touch()
        for path in (ROOT / "recipes" / model).glob("*.yaml"):
            shutil.copy(path, tmp_path / "recipes" / model)
    python = tmp_path / "python"
    python.write_text(RECORDER.format(python=sys.executable))
    python.chmod(0o755)
    return tmp_path


def run(clone, *words, **settings):
    """Exit status, standard error, and the commands of a call."""
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(clone / "python")} | settings
    command = [clone / "benchmarks" / "gpu_real.sh", *words]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
    log = clone / "commands.jsonl"
    commands = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return done.returncode, done.stderr, commands


def of_the_package(commands):
    return [words[2:] for words in commands if words[:2] == ["-m", "hf_layerprune.cli"]]


def recipe_tokens(model):
    recipe = yaml.safe_load((ROOT / "recipes" / model / "recipe.yaml").read_text())
    return recipe["max_steps"] * recipe["per_device_train_batch_size"] * recipe["max_length"]


@pytest.mark.parametrize("model, fifth", [("smollm2-135m-instruct", 24), ("qwen2.5-coder-0.5b-instruct", 19)])
def test_a_run_is_the_recipe_with_more_tokens(clone, monkeypatch, model, fifth):
    status, error, commands = run(clone, "run", model, "results", DRAWS="3", AT_ONCE="")
    assert status == 0, error
    monkeypatch.chdir(clone)
    parsed = []
    for verb, *rest in of_the_package(commands):
        arguments, *config = parse(verb, rest)
        parsed.append((verb, arguments, *config))
    assert [verb for verb, *_ in parsed] == ["generate"] * 2 + ["compress"] * 10
    for _, arguments, config in parsed[2:]:
        tokens = config.max_steps * config.per_device_train_batch_size * config.max_length
        assert 1e6 <= tokens <= 2.05e6 and arguments.dataset == f"runs/{model}/data/healing.jsonl"
        assert 20 <= tokens / recipe_tokens(model) <= 50
        if config.loss_preset != "paper":
            assert config.learning_rate == {"smollm2-135m-instruct": 1e-4, "qwen2.5-coder-0.5b-instruct": 2e-5}[model]
    _, arguments, config = parsed[4]
    assert config.on_policy_steps == 100 and arguments.prompts == f"runs/{model}/data/prompts.jsonl"
    (mix,) = [words for words in commands if words[0].endswith("mix.py")]
    assert mix[-2:] == [f"runs/{model}/answers-{draw}.jsonl" for draw in (2, 3)]
    measured = [words for words in commands if words[0] == "benchmarks/real_models.py"]
    assert all(words[words.index("--output_dir") + 1] == "results/measured" for words in measured)
    labels = [word.split("=")[0] for words in measured for word in words if "=" in word]
    methods = ("ours", "block_influence", "paper", "kl", "shortgpt", "tail", "merge", "parallel", "lora")
    assert {"teacher", *(f"{method}-{fifth}" for method in methods)} < set(labels)
    assert len([label for label in labels if label.startswith("on_policy")]) == 1


def test_methods_at_once_run_the_same_commands(clone):
    found = []
    for at_once in ("", "1"):
        (clone / "commands.jsonl").unlink(missing_ok=True)
        status, error, commands = run(clone, "run", "smollm2-135m-instruct", "results", DRAWS="3", AT_ONCE=at_once)
        assert status == 0, error
        found.append(sorted(commands))
    assert found[0] == found[1] and len(found[0]) > 20
    assert (clone / "runs" / "smollm2-135m-instruct" / "lora.log").exists()


def test_a_method_that_fails_does_not_stop_the_others(clone):
    methods = {"METHODS": "ours nonsense lora", "AT_ONCE": "1"}
    status, error, commands = run(clone, "run", "smollm2-135m-instruct", "results", **methods)
    assert status == 1 and "ours nonsense lora" in error and "runs/smollm2-135m-instruct" in error
    assert "no method 'nonsense'" in (clone / "runs" / "smollm2-135m-instruct" / "nonsense.log").read_text()
    assert len([words for words in of_the_package(commands) if words[0] == "compress"]) == 2


def alive(group):
    """The processes of a group that have not ended."""
    found = []
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_a_script_that_is_stopped_stops_its_methods(clone):
    (clone / "python").write_text(
        RECORDER.format(python=sys.executable)
        + 'if "compress" in sys.argv:\n    import time\n    time.sleep(60)\n    pathlib.Path("done").touch()\n'
    )
    settings = {"PYTHON": str(clone / "python"), "METHODS": "ours lora", "AT_ONCE": "1", "DRAWS": "1"}
    script = subprocess.Popen(
        [clone / "benchmarks" / "gpu_real.sh", "run", "smollm2-135m-instruct", "results"], cwd=clone,
        env={"PATH": os.environ["PATH"]} | settings, start_new_session=True,
    )  # fmt: skip
    log, group = clone / "commands.jsonl", script.pid
    while not log.exists() or log.read_text().count('"compress"') < 2:
        time.sleep(0.1)
    inner = min(
        (process for process in alive(group) if "real_model.sh" in " ".join(process.cmdline())), key=lambda p: p.pid
    )
    inner.terminate()
    script.wait(20)
    time.sleep(1)
    assert not alive(group)


def test_the_recipe_alone_is_as_it_was(clone):
    command = [clone / "recipes" / "real_model.sh", "smollm2-135m-instruct"]
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(clone / "python")}
    subprocess.run(command, cwd=clone, env=environment, check=True)
    commands = [json.loads(line) for line in (clone / "commands.jsonl").read_text().splitlines()]
    (compress,) = of_the_package(commands)
    assert compress == [
        "compress", "--config", "recipes/smollm2-135m-instruct/recipe.yaml", "--model", "MODEL",
        "--dataset", "runs/smollm2-135m-instruct/data/healing.jsonl",
        "--eval_dataset", "runs/smollm2-135m-instruct/data/held_out_chat.jsonl",
        "--output_dir", "runs/smollm2-135m-instruct/ours",
    ]  # fmt: skip
    assert commands[-1] == ["benchmarks/real_table.py", "recipes/smollm2-135m-instruct/results"]


def test_parts_are_put_where_the_recipe_looks(clone):
    packed = clone / "packed"
    (packed / "wheels").mkdir(parents=True)
    (packed / "wheels" / "trl-1.0-py3-none-any.whl").touch()
    (packed / "tiny.gguf").write_bytes(b"GGUF" * 100)
    subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "carry.py", "split", packed / "wheels", packed / "tiny.gguf",
         "--output", clone / "runs" / "parts"], check=True, capture_output=True,
    )  # fmt: skip
    for _ in range(2):  # again after a transfer that broke off, say
        status, error, commands = run(clone, "unpack", "runs/parts")
        assert status == 0, error
    assert (clone / "runs" / "tiny" / "tiny.gguf").read_bytes() == b"GGUF" * 100
    assert commands[-1][:3] == ["-m", "pip", "install"] and "--no-index" in commands[-1]
    assert commands[-1][-1] == "runs/carried/wheels/trl-1.0-py3-none-any.whl"


def test_parts_that_are_missing_stop_it(clone):
    (clone / "runs" / "parts").mkdir(parents=True)
    status, error, _ = run(clone, "unpack", "runs/parts")
    assert status == 2 and "has no manifest.json" in error


@pytest.mark.parametrize("words", [[], ["travel"], ["run", "smollm2-135m-instruct"], ["pack"]], ids=str)
def test_a_mistake_shows_what_to_write(clone, words):
    status, error, commands = run(clone, *words)
    assert status == 2 and error and not commands
