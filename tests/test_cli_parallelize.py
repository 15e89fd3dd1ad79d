"""`hf-layerprune parallelize`, and what it leaves on disk."""

import json

import forked
import pytest
import torch
from conftest import errors_of, read_report, tiny_model
from transformers import AutoModelForCausalLM

from hf_layerprune import (
    LayerPlan,
    PrunedQwen2ForCausalLM,
    cli,
    embedded_dataset,
    evaluate_model,
    parallelize,
    prune,
)
from hf_layerprune.data import tokenized_batches
from hf_layerprune.record import read_run
from hf_layerprune.surgery import plan_of

TEXTS = ["--dataset", "embedded:calibration", "--eval_dataset", "embedded:held_out"]
QUICK = ["--max_length", "32", "--num_samples", "4", "--num_eval_samples", "4", "--batch_size", "2"]


@pytest.fixture
def run(tmp_path, model_folder, capsys):
    """Run the verb on the tiny model; the exit status and what it wrote to stderr."""

    def call(*extra, model=model_folder, folder="out"):
        texts = [] if "--dataset" in extra else TEXTS
        arguments = ["--model", model, "--output_dir", tmp_path / folder, *texts, *QUICK, *extra]
        status = cli.main(["parallelize", *map(str, arguments)])
        return status, errors_of(capsys)

    return call


def test_a_search_leaves_model_plan_report_and_plot(run, tmp_path, model_folder):
    assert run("--target_num_layers", 3) == (0, "")
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "README.md", "layers.png", "model", "plan.json", "quality.png", "recipe.yaml", "report.json", "report.md",
    }  # fmt: skip
    report = read_report(out)
    assert [record["num_layers"] for record in report["rounds"]] == [4, 3]
    assert report["teacher"]["name"] == "tiny-model" and str(tmp_path) not in json.dumps(report)
    for record in report["rounds"]:
        assert record["edits"][0] == min(record["scores"], key=record["scores"].get)
        assert record["decode_tokens_per_second"] > 0 and record["kl"] > 0
    student = AutoModelForCausalLM.from_pretrained(out / "model")
    assert type(student) is PrunedQwen2ForCausalLM
    assert plan_of(student) == LayerPlan.from_json((out / "plan.json").read_text())
    expected = parallelize(AutoModelForCausalLM.from_pretrained(model_folder), plan_of(student).parallel_pairs)
    for a, b in zip(student.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (out / "model" / "modeling_pruned_qwen2.py").is_file() and (out / "model" / "tokenizer.json").is_file()


def test_a_depth_that_no_range_has_is_refused_before_weights_are_read(run, monkeypatch):
    monkeypatch.setattr("hf_layerprune.cli.parallelize.load_on_device", pytest.fail)
    status, error = run("--search", "range", "--target_num_layers", 2)
    assert status == 2 and "depth=2: no range of pairs" in error and "choose one of [4]" in error


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--plan", "{plan}"], "merges layers [(1, 2)], which takes data; run compress --edits merge --heal false"),
        (["--num_samples", "0"], "num_samples=0 must be a whole number of at least 1"),
        (["--num_eval_samples", "-3"], "num_eval_samples=-3 must be a whole number of at least 1"),
        (["--batch_size", "0"], "batch_size=0 must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_built_or_measured_is_refused_before_text_is_read(run, tmp_path, monkeypatch, extra, message):
    (tmp_path / "plan.json").write_text(LayerPlan(((0,), (1, 2), (3,), (4,)), 5, ((1, 2),)).to_json())
    monkeypatch.setattr("hf_layerprune.cli.parallelize.text_batches", pytest.fail)
    status, error = run(*(word.format(plan=tmp_path / "plan.json") for word in extra))
    assert status == 2 and message in error


def test_the_batch_size_changes_no_row_that_is_measured(run, tmp_path):
    found = []
    for size in (2, 3, 4, 8):
        words = ("--dataset", "embedded:calibration", "--num_samples", 3, "--num_eval_samples", 2)
        assert run(*words, "--batch_size", size, "--measure_speed", "false", folder=str(size)) == (0, "")
        report = read_report(tmp_path / str(size))
        found.append([report["teacher"]["loss"], *report["rounds"][0]["scores"].values()])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)


def test_a_full_disk_is_one_line_and_leaves_no_half(tmp_path, model_folder):
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000)); "
    words = ["parallelize", "--model", model_folder, *TEXTS, *QUICK, "--output_dir", tmp_path / "out"]
    failed = forked.run(limited + forked.CLI, *words, "--pairs", "1,2")
    assert failed.wait() == 2 and "Traceback" not in failed.stderr, failed.stderr
    assert "File too large" in failed.stderr.splitlines()[-1] and not (tmp_path / "out").exists()


def test_named_pairs_and_a_plan_of_an_earlier_run_give_the_same(run, tmp_path):
    assert run("--pairs", "1,2 3|4", "--measure_speed", "false") == (0, "")
    assert run("--plan", tmp_path / "out" / "plan.json", "--measure_speed", "false", folder="again") == (0, "")
    first, second = (read_report(tmp_path / name) for name in ("out", "again"))
    assert first["rounds"][0]["edits"] == second["rounds"][0]["edits"] == ["1|2", "3|4"]
    assert first["rounds"][0]["loss"] == second["rounds"][0]["loss"]
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["blocks"] == [[0], [1, 2], [3, 4]]
    assert second["settings"]["plan"] == "plan.json" and str(tmp_path) not in json.dumps(second)
    assert read_run(tmp_path / "again" / "report.json").start == LayerPlan.identity(5)
    assert "hf-layerprune parallelize --config recipe.yaml" in (tmp_path / "again" / "README.md").read_text()


def test_the_search_for_a_range(run, tmp_path):
    assert run("--search", "range", "--target_num_layers", 4, "--measure_speed", "false") == (0, "")
    found = json.loads((tmp_path / "out" / "range.json").read_text())
    best = min(found["runs"], key=lambda one: one["perplexity"])
    assert [one["pairs"] for one in found["runs"]] == [[[1, 2]], [[2, 3]]]
    plan = LayerPlan.from_json((tmp_path / "out" / "plan.json").read_text())
    assert [list(pair) for pair in plan.parallel_pairs] == best["pairs"]
    again = tmp_path / "again"
    repeat = ["--config", tmp_path / "out" / "recipe.yaml", "--output_dir", again]
    assert cli.main(["parallelize", *map(str, repeat)]) == 0
    assert (again / "plan.json").read_text() == (tmp_path / "out" / "plan.json").read_text()
    assert [record["criterion"] for record in read_report(again)["rounds"]] == ["loss"]


def test_on_a_cpu_that_emulates_bfloat16_it_computes_in_float32_and_saves_what_was_measured(
    run, tmp_path, tokenizer, monkeypatch
):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    tiny_model(num_layers=5).bfloat16().save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    assert run("--pairs", "1,2", model=tmp_path / "half")[0] == 0
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert student.dtype == torch.bfloat16
    report = read_report(tmp_path / "out")
    assert report["teacher"]["dtype"] == report["rounds"][0]["dtype"] == "float32"  # the speed
    batches = tokenized_batches(embedded_dataset("held_out"), tokenizer, max_length=32, num_rows=4, batch_size=2)
    assert report["rounds"][0]["loss"] == pytest.approx(evaluate_model(student.float(), batches).loss, abs=1e-6)


def test_both_kinds_of_edit_on_a_pruned_checkpoint_in_its_own_dtype(run, tmp_path, tokenizer):
    prune(tiny_model(num_layers=7).bfloat16(), [2]).save_pretrained(tmp_path / "pruned")
    tokenizer.save_pretrained(tmp_path / "pruned")
    extra = ["--edits", "remove,parallelize", "--target_num_layers", 4, "--max_group_size", 3]
    assert run(*extra, "--measure_speed", "false", model=tmp_path / "pruned") == (0, "")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert student.dtype == torch.bfloat16
    plan = plan_of(student)
    assert plan.depth == 4 and plan.num_teacher_layers == 7 and 2 in plan.removed_layers


def test_a_student_is_saved_in_the_checkpoints_dtype_and_measured_as_it_is_saved(run, tmp_path, tokenizer):
    half, out = tmp_path / "half", tmp_path / "out" / "model"
    tiny_model().bfloat16().save_pretrained(half)
    tokenizer.save_pretrained(half)
    assert run("--pairs", "1,2", "--dtype", "float32", "--measure_speed", "false", model=half)[0] == 0
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    arguments = ["--model", out, "--teacher", half, "--dtype", "float32", "--max_length", 32, "--num_samples", 4]
    arguments += ["--dataset", "embedded:held_out"]
    assert cli.main(["evaluate", *map(str, arguments), "--output_dir", str(tmp_path)]) == 0
    measured = read_report(tmp_path / "out")["rounds"][0]
    assert measured["kl"] == pytest.approx(json.loads((tmp_path / "evaluation.json").read_text())["kl"], rel=1e-5)


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--pairs", "1,3"], "name all layers of neighbouring blocks"),
        (["--pairs", "1-2"], "--pairs '1-2' is not a group"),
        (["--pairs", "1,9"], "layer 9 is not in the plan"),
        (["--pairs", "1,2", "--plan", "plan.json"], "choose one"),
        (["--pairs", "1,2", "--target_num_layers", "3"], "--target_num_layers has no meaning with --pairs"),
        (["--plan", "plan.json", "--criterion", "loss"], "--criterion has no meaning with --plan"),
        (["--search", "range", "--edits", "remove,parallelize"], "--edits has no meaning with --search range"),
        (["--plan", "nowhere.json"], "nowhere.json"),
        (["--plan", "{broken}"], "not JSON"),
        (["--plan", "{other}"], "teacher of 9 layers"),
        (["--target_num_layers", "0"], "depth=0"),
        (["--num_eval_samples", "0"], "num_eval_samples=0 must be"),
        (["--target_num_layers", "2"], "out of reach"),
        (["--target_num_layers", "5"], "meets depth=5 already"),
        (["--target_latency", "1.5"], "latency=1.5"),
        (["--target_latency", "0.5", "--target_num_layers", "3"], "give exactly one"),
        (["--criterion", "taste"], "invalid choice: 'taste'"),
        (["--dataset", "{text}"], "used up by 4 calibration rows"),
        (["--output_dir", "{used}"], "not empty"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2_and_writes_nothing(run, tmp_path, extra, message):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text(LayerPlan(((0,), (1, 2), (3,), (4,)), 9).to_json())
    (tmp_path / "text.txt").write_text("a few words, again and again\n" * 5)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    files = {"broken": tmp_path / "broken.json", "other": tmp_path / "other.json", "text": tmp_path / "text.txt",
             "used": tmp_path / "used"}  # fmt: skip
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    status, error = run(*(argument.format(**files) for argument in extra))
    assert status == 2, error
    assert error.startswith("hf-layerprune: ") and error.count("\n") == 1 and message in error
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


COMPRESS = ["--max_steps", "1", "--max_length", "32", "--num_calibration_samples", "4", "--num_eval_samples", "4",
            "--measure_speed", "false", "--report_to", "none", "--per_device_train_batch_size", "2"]  # fmt: skip


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"Line {n} of a text that is read again and again." for n in range(200)))
    return path


def test_compress_exposes_the_edits(tmp_path, model_folder, text, capsys):
    arguments = ["--model", model_folder, "--dataset", text, "--output_dir", tmp_path / "out", *COMPRESS, "--edits",
                 "remove,parallelize", "--max_group_size", 3, "--target_num_layers", 3]  # fmt: skip
    assert cli.main(["compress", *map(str, arguments)]) == 0, errors_of(capsys)
    plan = LayerPlan.from_json((tmp_path / "out" / "plan.json").read_text())
    assert plan.depth == 3
    assert "edits: remove,parallelize" in (tmp_path / "out" / "recipe.yaml").read_text()


def test_a_target_on_the_command_line_replaces_that_of_the_recipe(tmp_path, model_folder, text, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {model_folder}\ndataset: {text}\ntarget_num_layers: 2\n")
    target = prune(tiny_model(), [0]).num_parameters()
    arguments = ["--config", recipe, "--output_dir", tmp_path / "out", *COMPRESS, "--target_num_parameters", target]
    assert cli.main(["compress", *map(str, arguments)]) == 0, errors_of(capsys)
    assert LayerPlan.from_json((tmp_path / "out" / "plan.json").read_text()).depth == 4
    recipe.write_text(recipe.read_text() + "target_latency: 0.5\n")
    arguments = ["--config", recipe, "--output_dir", tmp_path / "again", *COMPRESS]
    assert cli.main(["compress", *map(str, arguments)]) == 2
    assert "give exactly one of" in errors_of(capsys)


def test_a_student_is_whole_when_its_timing_is_interrupted(run, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_layerprune.cli.parallelize.with_speed", interrupted)
    status, error = run("--pairs", "1,2")
    assert status == 130 and "is complete except for the speed" in error
    (record,) = read_run(tmp_path / "out" / "report.json").rounds
    assert record.depth == 4 and record.speed is None
    assert (tmp_path / "out" / "model" / "README.md").is_file()


def test_what_cannot_be_saved_is_known_before_the_search(run, tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise ValueError("no template")

    monkeypatch.setattr("hf_layerprune.cli.parallelize._steps", pytest.fail)
    monkeypatch.setattr("transformers.Qwen2Tokenizer.save_pretrained", refuse)
    status, error = run("--target_num_layers", 3)
    assert status == 2 and "students cannot be saved" in error and "no template" in error
    assert not (tmp_path / "out").exists()
