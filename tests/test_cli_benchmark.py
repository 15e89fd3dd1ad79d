import json

import pytest
import torch
from conftest import errors_of, tiny_model

import hf_layerprune.cli.benchmark as module
from hf_layerprune import cli, prune
from hf_layerprune.benchmark import BenchmarkReport, load_shape, random_models

QUICK = ["--prompt_tokens", "8", "--new_tokens", "4", "--repeats", "1"]


def run(*arguments):
    return cli.main([str(argument) for argument in ("benchmark", *arguments)])


@pytest.fixture
def student_folder(tmp_path):
    prune(tiny_model(), [2]).save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@pytest.fixture
def shape(tmp_path):
    """A `config.json` of five layers, in bfloat16."""
    config = tiny_model().config
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path / "shape")
    return tmp_path / "shape" / "config.json"


@pytest.fixture
def timed(monkeypatch):
    """The models of each call and its settings, in place of timing them."""
    calls = []

    def benchmark_models(models, prompt_tokens, new_tokens, batch_size, repeats, on_run, **options):
        calls.append((models, (prompt_tokens, new_tokens, batch_size, repeats), options))
        return [BenchmarkReport(543210.9, 12345.6, 145 * 2**30, 327_680, batch_size, 12.3456, 10.25, 0.5)
                for _ in models]  # fmt: skip

    monkeypatch.setattr(module, "benchmark_models", benchmark_models)
    return calls


def depths(calls):
    return [[model.config.num_hidden_layers for model in models] for models, _, _ in calls]


def test_measures_and_writes_every_model_at_every_batch_size(tmp_path, model_folder, student_folder, capsys):
    out = tmp_path / "a" / "out"
    assert run(model_folder, student_folder, *QUICK, "--batch_size", 1, 3, "--output_dir", out) == 0
    printed = capsys.readouterr().out
    assert "decode" in printed and "TTFT" in printed and "(1.00x)" in printed
    written = json.loads((out / "benchmark.json").read_text())
    assert written["settings"] == {
        "prompt_tokens": 8, "new_tokens": 4, "repeats": 1, "dtype": "auto", "cache_implementation": "dynamic",
        "compile": False, "random_weights": False,
    }  # fmt: skip
    assert {"hardware", "torch", "transformers"} <= set(written["environment"])
    names = [str(model_folder), str(student_folder)] * 2
    assert [entry["model"] for entry in written["reports"]] == names
    assert [(entry["num_layers"], entry["batch_size"]) for entry in written["reports"]] == [
        (5, 1), (4, 1), (5, 3), (4, 3)
    ]  # fmt: skip
    for entry in written["reports"]:
        assert entry["prefill_tokens_per_second"] > 0 and entry["time_to_first_token"] > 0
        assert entry["kv_bytes_per_token"] == entry["num_layers"] * 2 * 2 * 8 * 4
    assert [entry["decode_ratio"] == 1 for entry in written["reports"]][::2] == [True, True]
    assert [path.name for path in out.iterdir()] == ["benchmark.json"]


def test_models_can_stand_anywhere(tmp_path, model_folder, student_folder, timed):
    (tmp_path / "settings.yaml").write_text("repeats: 2\nmodels: elsewhere\n")
    assert run(model_folder, "--config", tmp_path / "settings.yaml", student_folder, "--prompt_tokens=9") == 0
    assert depths(timed) == [[5, 4]] and timed[0][1] == (9, 64, 1, 2)


def test_without_models_the_embedded_one_is_timed(timed):
    assert run() == 0
    assert depths(timed) == [[16]]


def test_settings_reach_the_measurement(model_folder, timed):
    assert run(model_folder, "--cache_implementation", "static", "--compile", "true", "--dtype", "bfloat16",
               "--prompt_tokens", 9, "--new_tokens", 7) == 0  # fmt: skip
    (((model,), settings, options),) = timed
    assert settings == (9, 7, 1, 3) and options == {"cache_implementation": "static", "compile": True}
    assert model.dtype == torch.bfloat16


def test_random_weights_of_a_shape_in_several_depths(cpu_with_bfloat16, tmp_path, shape, capsys):
    out = tmp_path / "out"
    assert run("--shape", shape, "--layers", 5, 3, "5/4", *QUICK, "--output_dir", out) == 0
    entries = json.loads((out / "benchmark.json").read_text())["reports"]
    assert [(entry["num_layers"], entry["layers"]) for entry in entries] == [(5, "5"), (3, "3"), (4, "5/4")]
    assert {entry["model"] for entry in entries} == {"config.json"}  # not its whole path
    size = 2 * 2 * 8 * 2  # keys and values, KV heads, head size, bfloat16
    assert [entry["kv_bytes_per_token"] for entry in entries] == [5 * size, 3 * size, 5 * size]
    assert "5/4" in capsys.readouterr().out


@pytest.mark.parametrize("dtype, expected", [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_the_dtype_of_a_shape_is_its_own_unless_asked_for(cpu_with_bfloat16, shape, timed, dtype, expected):
    assert run("--shape", shape, "--dtype", dtype) == 0
    assert depths(timed) == [[5]] and timed[0][0][0].dtype == expected


def test_a_shape_that_comes_with_the_package_is_named(monkeypatch, timed, capsys):
    def on_meta(config, sizes, dtype, device):
        return random_models(config, sizes, dtype, "meta")

    monkeypatch.setattr(module, "random_models", on_meta)
    assert load_shape("Qwen/Qwen2.5-3B").to_dict() == load_shape("Qwen2.5-3B").to_dict()
    assert run("--shape", "Qwen2.5-3B", "--layers", "36", "36/29") == 0
    assert depths(timed) == [[36, 29]] and timed[0][0][0].config.hidden_size == 2048
    printed = capsys.readouterr().out
    assert "36/29" in printed and "Qwen" in printed


def test_a_yaml_file_can_name_the_shape_and_its_depths(tmp_path, shape, timed):
    (tmp_path / "settings.yml").write_text(f"shape: {shape}\nlayers: [5, 5/4, 2]\nbatch_size: 2\n")
    assert run("--config", tmp_path / "settings.yml") == 0
    assert depths(timed) == [[5, 4, 2]] and timed[0][1] == (128, 64, 2, 3)
    assert run("--config", tmp_path / "settings.yml", "--layers", 3, "--batch_size", 1, 4) == 0
    assert depths(timed)[1:] == [[3], [3]]


def test_the_table_fits_80_columns(monkeypatch, shape, timed, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    shape = shape.rename(shape.with_name("a-name-that-is-too-long-for-its-column.json"))
    assert run("--shape", shape, "--layers", "5/4", "--batch_size", 1024) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80 and "…" not in printed
    assert "".join(line.split(" ", 1)[0] for line in printed.splitlines()[3:]) == shape.name  # folded, but all there
    for cell in ("5/4", "1024", "543211 (10.25x)", "12346 (0.50x)", "12346", "148480", "327680"):
        assert cell in printed


def test_what_was_measured_before_the_memory_ran_out_is_kept(tmp_path, monkeypatch, model_folder, timed, capsys):
    fake = module.benchmark_models

    def too_much(models, prompt_tokens, new_tokens, batch_size, *rest, **options):
        if batch_size == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return fake(models, prompt_tokens, new_tokens, batch_size, *rest, **options)

    monkeypatch.setattr(module, "benchmark_models", too_much)
    assert run(model_folder, "--batch_size", 1, 4, "--output_dir", tmp_path) == 2
    error = errors_of(capsys)
    assert error.count("\n") == 1 and "out of memory: CUDA" in error and "batch_size" in error
    assert len(json.loads((tmp_path / "benchmark.json").read_text())["reports"]) == 1


def bad_requests():
    """Arguments, and what the message must name."""
    return {
        "models and a shape": (["{model}", "--shape", "{shape}"], "both given"),
        "layers without a shape": (["{model}", "--layers", "3"], "--layers needs --shape"),
        "unknown shape": (["--shape", "Qwen9-3B"], "SmolLM2-135M, or a path to a config.json"),
        "more layers than there are": (["--shape", "{shape}", "--layers", "5", "6"], "num_layers=6"),
        "fewer blocks than pairs make": (["--shape", "{shape}", "--layers", "5/2"], "num_blocks=2"),
        "more blocks than layers": (["--shape", "{shape}", "--layers", "4/5"], "num_blocks=5"),
        "depth that is none": (["--shape", "{shape}", "--layers", "5/"], "'5/'"),
        "unknown cache": (["{model}", "--cache_implementation", "paged"], "choose from 'dynamic', 'static'"),
        "compiling a dynamic cache": (["{model}", "--compile", "true"], 'cache_implementation="static"'),
        "no prompts at once": (["{model}", "--batch_size", "1", "0"], "batch_size=0"),
        "prompts that are no number": (["--config", "{yaml}"], "invalid int value: 'many'"),
        "unknown dtype": (["{model}", "--dtype", "float7"], "float7"),
        "model that is nowhere": (["{model}/nothing"], "nothing"),
        "output folder that is a file": (["{model}", "--output_dir", "{shape}"], "config.json"),
    }


@pytest.mark.parametrize("name", bad_requests())
def test_bad_input_is_one_line_and_exit_status_2(name, tmp_path, model_folder, shape, timed, capsys):
    (tmp_path / "settings.yaml").write_text("batch_size: [1, many]\n")
    arguments, expected = bad_requests()[name]
    files = {"model": model_folder, "shape": shape, "yaml": tmp_path / "settings.yaml"}
    capsys.readouterr()
    assert run(*(argument.format(**files) for argument in arguments)) == 2
    error = errors_of(capsys)
    assert error.startswith("hf-layerprune: ") and error.count("\n") == 1 and expected in error
    assert not timed
