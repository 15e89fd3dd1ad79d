import json
from pathlib import Path

import pytest
import yaml
from conftest import errors_of, tiny_config, tiny_model
from transformers import GPT2Config

from hf_layerprune import cli
from hf_layerprune.benchmark import load_shape
from hf_layerprune.cli.estimate import _config
from hf_layerprune.estimate import RunSizes
from hf_layerprune.memory import StepMeter, Way

QUICK = ["--max_length", "32", "--per_device_train_batch_size", "2"]


def run(*arguments):
    return cli.main([str(argument) for argument in ("estimate", *arguments)])


@pytest.fixture
def shape(tmp_path):
    tiny_model(4).config.save_pretrained(tmp_path / "shape")
    return tmp_path / "shape" / "config.json"


def test_says_what_fits_and_writes_every_number(tmp_path, shape, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    before = set(tmp_path.rglob("*"))
    file = tmp_path / "numbers" / "plan.json"
    assert run("--model", shape, "--target_num_layers", 2, "--gpu_memory", "24GiB", "--max_steps", 10,
               "--save_steps", 4, "--device_tflops", 50, "--output_file", file,
               *QUICK) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert set(tmp_path.rglob("*")) - before == {file.parent, file}
    plan = json.loads(file.read_text())
    model = tiny_model(4)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert plan["parameters"] == model.num_parameters()
    assert plan["student_parameters"] == model.num_parameters() - 2 * layer and plan["rounds"] == 2
    assert {(s["trained"], s["lora_r"]) for s in plan["settings"]} == {
        ("neighbours", None), ("neighbours", 16), ("all", None)
    }  # fmt: skip
    assert {(s["rows"], s["accumulation"]) for s in plan["settings"]} == {(1, 2), (2, 1)}
    for setting in plan["settings"]:
        assert setting["peak"] == setting["weights"] + setting["optimizer"] + setting["activations"]
        assert setting["activations"] > 0 and setting["flops"] > 0
    best = plan["recommended"]
    assert (best["trained"], best["dtype"], best["gradient_checkpointing"], best["rows"]) == (
        "neighbours", "float32", False, 2
    )  # fmt: skip
    assert plan["steps_per_round"] * plan["tokens_per_step"] == 10 * 2 * 32 and plan["device_tflops"] == 50
    assert plan["disk"]["rounds"] == 4 * (2 * model.num_parameters() - 3 * layer)
    assert plan["disk"]["checkpoints"] == 3 * best["checkpoint"]
    assert "--trained_layers neighbours --dtype float32 --gradient_checkpointing false" in printed
    assert "rough" in printed and "640" in printed and "in 2 rounds" in printed
    table = [line for line in printed.splitlines() if line.startswith(("neighbours", "all"))]
    assert len(table) == 12 and max(map(len, table)) <= 80 and "…" not in printed


def test_a_run_that_only_heals_scores_and_removes_nothing(tmp_path, capsys):
    file, shapes = tmp_path / "plan.json", {}
    for depth in (4, 6):
        tiny_model(depth).config.save_pretrained(tmp_path / str(depth))
        shapes[depth] = tmp_path / str(depth) / "config.json"
    common = ["--model", shapes[4], "--teacher", shapes[6], "--gpu_memory", "24GiB", "--output_file", file]
    common += [*QUICK[:3], 1]
    assert run(*common, "--target_num_layers", 4) == 0, errors_of(capsys)
    heals = json.loads(file.read_text())
    assert heals["seconds_of_scoring"] == 0 and heals["rounds"] == 1
    assert heals["student_parameters"] == heals["parameters"] == tiny_model(4).num_parameters()
    configs = [tiny_model(depth).config for depth in (4, 6)]
    args = tiny_config(tmp_path, target_num_layers=3, max_length=32, per_device_train_batch_size=1)
    removes = RunSizes(configs[0], args, configs[1])
    setting = removes.setting(Way("all", None, "float32", False), 1, StepMeter(configs[0], args))

    def gradients(trained):
        return next(s["optimizer"] for s in heals["settings"] if s["trained"] == trained and not s["lora_r"])

    assert removes.scoring_flops(4) > 0 and gradients("all") > setting.optimizer  # those of a deeper student are more
    layer = sum(p.numel() for p in tiny_model(4).model.layers[0].parameters())
    assert gradients("neighbours") == 4 * 12 * layer  # next to two gaps; a gradient and two moments in float32


def test_a_recipe_is_read_as_compress_reads_it(tmp_path, shape, capsys):
    recipe = {
        "model": str(shape), "output_dir": "x", "target_num_layers": 3, "trained_layers": "2,3", "max_length": 32,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "num_train_epochs": 2, "report_to": "none",
        "dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run("--config", tmp_path / "recipe.yaml", "--gpu_memory", "1GiB") == 0
    printed = capsys.readouterr().out
    assert "--trained_layers 2,3 --dtype bfloat16" in printed and "in 1 rounds" not in printed
    assert "96 per step" in printed and "per million tokens" in printed


@pytest.mark.parametrize("name", ["Qwen2.5-3B", "Qwen/Qwen2.5-3B"])
def test_what_lies_here_is_not_the_shape_of_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert _config(name).num_hidden_layers == 36
    tiny_model(4).config.save_pretrained(name)
    assert _config(name).num_hidden_layers == 4
    assert _config(f"{name}/config.json").num_hidden_layers == load_shape(f"{name}/config.json").num_hidden_layers == 4


def test_a_folder_is_no_file_to_write_which_is_said_before_measuring(tmp_path, shape, monkeypatch, capsys):
    monkeypatch.setattr("hf_layerprune.cli.estimate.estimate_run", pytest.fail)
    words = ("--model", shape, "--target_num_layers", 2, "--gpu_memory", "24GiB", *QUICK)
    assert run(*words, "--output_file", tmp_path) == 2
    assert errors_of(capsys) == f"hf-layerprune: output_file={tmp_path} is a folder; name a file in it\n"


def test_nothing_fits_is_an_answer(shape, capsys):
    assert (
        run("--model", shape, "--target_num_layers", 3, "--gpu_memory", "64KiB", "--dtype", "bfloat16", *QUICK[:3], 1)
        == 0
    )
    printed = capsys.readouterr().out
    assert "Nothing fits" in printed and "--max_length" in printed and "neighbours" in printed


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--gpu_memory", "24 bananas"], "24 bananas"),
        (["--gpu_memory", "1GiB", "--target_num_layers", "4"], "choose 1..3"),
        (["--gpu_memory", "1GiB", "--model", "nobody/nothing"], "nobody/nothing"),
        (["--gpu_memory", "1GiB", "--model", "{gpt2}"], "gpt2"),
        (["--gpu_memory", "1GiB", "--model", "{missing}"], "missing"),
        (["--gpu_memory", "1GiB", "--dtype", "float7"], "float7"),
        (["--gpu_memory", "1GiB", "--heal", "false"], "heal"),
        (["--gpu_memory", "1GiB", "--device_tflops", "0"], "device_tflops=0"),
        (["--gpu_memory", "1GiB", "--trained_layers", "3,9"], "[9]"),
        (["--model", "{missing}"], "missing"),  # which is said before memory is asked for
        ([], "--gpu_memory"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(tmp_path, shape, capsys, arguments, expected):
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    files = {"gpt2": tmp_path / "gpt2", "missing": tmp_path / "missing"}
    capsys.readouterr()
    given = [] if "--model" in arguments else ["--model", shape]
    assert run(*given, *(argument.format(**files) for argument in arguments)) == 2
    error = errors_of(capsys)
    assert error.startswith("hf-layerprune: ") and error.count("\n") == 1 and expected in error
    assert not Path("trainer_output").exists()
