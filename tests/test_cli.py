import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import errors_of, read_report, tiny_model
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, GPT2Config

from hf_layerprune import LayerPlan, cli, load_tokenizer, prune
from hf_layerprune.cli.arguments import default_depth
from hf_layerprune.cli.compress import resume_line

UNHEALED = [
    "--target_num_layers", "4", "--num_calibration_samples", "2", "--num_eval_samples", "2",
    "--per_device_eval_batch_size", "2", "--max_length", "32", "--packing", "true", "--packing_strategy", "wrapped",
    "--report_to", "none", "--measure_speed", "false",
]  # fmt: skip
QUICK = [
    *UNHEALED, "--max_steps", "2", "--per_device_train_batch_size", "2", "--save_strategy", "no",
    "--learning_rate", "1e-3",
]  # fmt: skip


STORY = "\n".join(f"Once upon a time, {n} times over, there was a small house in a wood." for n in range(60))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(STORY)
    return path


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_compress_writes_everything_and_its_recipe_repeats_it(tmp_path, model_folder, text_file, capsys):
    out = tmp_path / "out"
    assert run("compress", "--model", model_folder, "--dataset", text_file, "--output_dir", out, *QUICK) == 0
    printed = capsys.readouterr().out
    for name in ("model/config.json", "model/model.safetensors", "model/tokenizer.json", "rounds/01/config.json",
                 "plan.json", "recipe.yaml", "report.json", "report.md", "quality.png"):  # fmt: skip
        assert (out / name).is_file(), name
    report = read_report(out)
    assert "round 1: remove " in printed and f"{report['rounds'][0]['perplexity']:.2f}" in printed
    assert AutoModelForCausalLM.from_pretrained(out / "model").config.num_hidden_layers == 4
    plan = LayerPlan.from_json((out / "plan.json").read_text())
    assert plan.removed_layers == (report["rounds"][0]["removed_layer"],)
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert (recipe["model"], recipe["dataset"], recipe["learning_rate"]) == (str(model_folder), str(text_file), 1e-3)

    assert run("compress", "--config", out / "recipe.yaml", "--output_dir", tmp_path / "again") == 0
    again = read_report(tmp_path / "again")
    assert again["rounds"][0]["scores"] == report["rounds"][0]["scores"]
    assert again["rounds"][0]["perplexity"] == pytest.approx(report["rounds"][0]["perplexity"], rel=1e-6)

    assert run("compress", "--config", out / "recipe.yaml", "--target_num_layers", 3, "--resume") == 0
    assert [r["num_layers"] for r in read_report(out)["rounds"]] == [4, 3]


def test_the_recipe_stores_what_was_given_and_nothing_that_was_derived(tmp_path, model_folder, text_file, monkeypatch):
    monkeypatch.setattr("hf_layerprune.trainer.config.has_bf16", lambda use_cpu: False)
    mine, flags = tmp_path / "mine.yaml", (*UNHEALED, "--criterion", "tail", "--heal", "false")
    mine.write_text(f"model: {model_folder}\ndataset: {text_file}\nlayers_per_round: 2\nkl_weight: 1.0\nseed: 3\n")
    assert run("compress", "--config", mine, "--output_dir", tmp_path / "out", *flags) == 0
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    expected = {flag[2:] for flag in flags if flag.startswith("--")}
    assert set(recipe) == expected | {"model", "dataset", "layers_per_round", "seed", "output_dir"}
    assert type(recipe["layers_per_round"]) is int and recipe["heal"] is False
    assert json.loads((tmp_path / "out" / "report.json").read_text())["settings"]["bf16"] is None


def test_a_length_without_limit_is_in_the_recipe(tmp_path, model_folder, text_file):
    recipe = tmp_path / "mine.yaml"
    secret = "model_init_kwargs: {token: hf_of_nobody_else}\n"
    renamed = str(model_folder.rename(tmp_path / "Модель"))
    recipe.write_text(f"model: {renamed}\ndataset: {text_file}\nmax_length: null\n{secret}", encoding="utf-8")
    length = QUICK.index("--max_length")
    quick = [*QUICK[:length], *QUICK[length + 2 :], "--packing", "false"]
    assert run("compress", "--config", recipe, "--output_dir", tmp_path / "out", *quick) == 0
    written = tmp_path / "out" / "recipe.yaml"
    text = written.read_text(encoding="utf-8")
    assert yaml.safe_load(text)["max_length"] is None and f"model: {renamed}\n" in text
    assert "pad_to_multiple_of" not in text  # which nobody chose
    for file in (tmp_path / "out").rglob("*.*"):
        assert b"hf_of_nobody_else" not in file.read_bytes(), file
    assert run("compress", "--config", written, "--output_dir", tmp_path / "again") == 0
    settings = [json.loads((tmp_path / name / "report.json").read_text())["settings"] for name in ("out", "again")]
    assert settings[0] == settings[1] and settings[0]["max_length"] is None
    assert run("compress", "--config", written, "--resume", "true", "--target_num_layers", 3) == 0


def test_without_a_target_three_quarters_are_kept(tmp_path, model_folder, text_file):
    arguments = [argument for argument in QUICK if argument not in ("--target_num_layers", "4")]
    assert (
        run("compress", "--model", model_folder, "--dataset", text_file, "--output_dir", tmp_path / "o", *arguments)
        == 0
    )
    assert len(json.loads((tmp_path / "o" / "report.json").read_text())["rounds"]) == 1  # 5 -> 4


def test_lora(tmp_path, model_folder, text_file):
    arguments = ["--dataset", text_file, "--output_dir", tmp_path / "out", "--lora_r", 4, *QUICK]
    assert run("compress", "--model", model_folder, *arguments) == 0
    assert not list((tmp_path / "out" / "model").glob("adapter*"))


def test_score(tmp_path, model_folder, text_file, capsys):
    out = tmp_path / "scores"
    assert run("score", "--model", model_folder, "--dataset", text_file, "--max_length", 32, "--num_samples", 4,
               "--output_dir", out) == 0  # fmt: skip
    scores = json.loads((out / "scores.json").read_text())
    assert set(scores["values"]) == {"0", "1", "2", "3", "4"}
    safest = min(scores["values"], key=scores["values"].get)
    line = next(line for line in capsys.readouterr().out.splitlines() if "safest" in line)
    assert line.split()[0] == safest
    assert (out / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_a_criterion_that_reads_no_text_asks_for_none(tmp_path, model_folder, monkeypatch, capsys):
    monkeypatch.setattr("hf_layerprune.cli.score.text_batches", None)
    for criterion in ("tail", "random"):
        out = tmp_path / criterion
        assert run("score", "--model", model_folder, "--criterion", criterion, "--output_dir", out) == 0
        assert json.loads((out / "scores.json").read_text())["num_tokens"] == 0
    assert run("score", "--model", model_folder, "--criterion", "tail", "--dataset", "embedded:healing") == 2
    assert "criterion tail reads no text; leave out dataset" in capsys.readouterr().err


def test_evaluate(tmp_path, model_folder, text_file, capsys):
    student = tmp_path / "student"
    prune(tiny_model(), [2]).save_pretrained(student)
    shutil.copy(model_folder / "tokenizer.json", student)
    arguments = ["--dataset", text_file, "--max_length", 32, "--num_samples", 4, "--output_dir", tmp_path / "out"]
    assert run("evaluate", "--model", student, "--teacher", model_folder, *arguments) == 0
    measured = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert measured["perplexity"] == pytest.approx(math.exp(measured["loss"])) and measured["kl"] > 0
    assert LayerPlan.from_dict(measured["plan"]).removed_layers == (2,)
    assert f"{measured['perplexity']:.5f}" in capsys.readouterr().out


def bad_requests():
    """Name, arguments, and what the message must name. `{...}` is filled in from the test's files."""
    return {
        "text that is a number": (["--dataset", "{number}"], "number.jsonl has 5"),
        "text that is null": (["--dataset", "{null}"], "only blank rows"),
        "no text for a model of the user's": (["--dataset", None], "--dataset is missing"),
        "split of a file": (["--dataset_split", "test"], "dataset_split='test' is not in"),
        "configuration of a file": (["--dataset_config", "main"], "dataset_config='main': "),
        "split that is not there": (["--dataset", "{saved}", "--dataset_split", "test"], 'Unknown split "test"'),
        "rows longer than the model": (["--max_length", "257"], "max_length=257 but"),
        "text that is blank": (["--dataset", "{blank}"], "only blank rows"),
        "output folder in a file": (["--output_dir", "{text}/x"], "Not a directory"),
        "tracker that is none": (["--report_to", "foo"], "foo"),
        "tracker that is not installed": (["--report_to", "comet_ml"], "comet"),
        "optimizer that is not installed": (["--optim", "lion_8bit"], "bitsandbytes"),
        "file of nothing": (["--dataset", "{nothing}"], "nothing.jsonl cannot be loaded: the file is empty"),
        "target not below the depth": (["--target_num_layers", "5"], "choose 1..4"),
        "folder that is no model": (["--model", "{empty}"], "no config.json"),
        "model that is nowhere": (["--model", "nobody/nothing"], "nobody/nothing"),
        "architecture not supported": (["--model", "{gpt2}"], "gpt2"),
        "data set without text": (["--dataset", "{no_text}"], "no text"),
        "data set that is nowhere": (["--dataset", "{empty}/nothing.txt"], "nothing.txt"),
        "data set of unknown type": (["--dataset", "{gpt2}/config.toml"], "config.toml"),
        "output folder of another run": (["--output_dir", "{used}"], "not empty"),
        "nothing to resume": (["--resume"], "holds no run"),
        "vocabularies that differ": (["--model", "{other_vocabulary}"], "257 tokens"),
        "no tokenizer": (["--model", "{no_tokenizer}"], "no tokenizer"),
        "unknown dtype": (["--dtype", "float7"], "float7"),
    }


def test_settings_that_cannot_work_are_one_line_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bad, broken = tmp_path / "bad.yaml", tmp_path / "broken.yaml"
    bad.write_text("traget_num_layers: 3\n")
    broken.write_text("a: [1\nb: }")
    for extra, expected in [
        (["--streaming", "true"], "--streaming"),
        (["--lora_r", "0"], "lora_r=0"),
        (["--lora_r", "4", "--lora_alpha", "0"], "lora_alpha=0"),
        (["--hidden_weight", "inf"], "hidden_weight=inf"),
        (["--label_smoothing_factor", "0.1"], "unknown setting --label_smoothing_factor"),
        (["--config"], "--config"),
        (["--target_num_layers", "few"], "few"),
        (["--criterion", "cosine"], "cosine"),
        (["--config", bad], "traget_num_layers"),
        (["--config", broken], ""),
        (["--config", "none.yaml"], "none.yaml"),
    ]:
        assert run("compress", "--model", "nobody/nothing", *extra) == 2
        error = capsys.readouterr().err
        assert error.startswith("hf-layerprune: ") and error.count("\n") == 1 and expected in error, error
    assert set(tmp_path.iterdir()) == {bad, broken}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory, saved_model):
    """What `bad_requests` names, and a text that is long enough."""
    folder = tmp_path_factory.mktemp("bad")
    files = {"text": folder / "story.txt", "empty": folder / "empty", "gpt2": folder / "gpt2", "used": folder / "used",
             "no_text": folder / "no_text.csv", "other_vocabulary": folder / "other", "no_tokenizer": folder / "bare",
             "number": folder / "number.jsonl", "null": folder / "null.jsonl", "blank": folder / "blank.jsonl",
             "nothing": folder / "nothing.jsonl", "saved": folder / "saved"}  # fmt: skip
    files["nothing"].write_text("")
    files["number"].write_text('{"text": 5}\n' * 20)
    files["null"].write_text('{"text": null}\n' * 20)
    DatasetDict({"train": Dataset.from_dict({"text": ["word"] * 20})}).save_to_disk(files["saved"])
    files["blank"].write_text('{"text": " "}\n' * 400)
    files["text"].write_text(STORY + "\n" + "long " * 60)
    files["empty"].mkdir()
    GPT2Config().save_pretrained(files["gpt2"])
    (files["gpt2"] / "config.toml").write_text("")
    files["used"].mkdir()
    (files["used"] / "run_state.json").write_text("{}")
    files["no_text"].write_text("number\n1\n2\n")
    tiny_model(vocab_size=200, eos_token_id=0).save_pretrained(files["other_vocabulary"])
    shutil.copy(saved_model / "tokenizer.json", files["other_vocabulary"])
    tiny_model().save_pretrained(files["no_tokenizer"])
    return files


@pytest.mark.parametrize("name", bad_requests())
def test_bad_input_is_one_line_and_exit_status_2_and_writes_nothing(name, tmp_path, saved_model, bad_files, capsys):
    extra, expected = bad_requests()[name]
    defaults = {"--model": saved_model, "--dataset": bad_files["text"], "--output_dir": tmp_path / "out"}
    arguments = [part for pair in defaults.items() if pair[0] not in extra for part in pair]
    extra = [] if None in extra else [argument.format(**bad_files) for argument in extra]

    def everything():
        return sorted(str(path) for folder in (tmp_path, bad_files["text"].parent) for path in folder.rglob("*"))

    before = everything()
    capsys.readouterr()
    status = run("compress", *QUICK, *arguments, *extra)
    error = errors_of(capsys)
    assert status == 2, error
    assert error.startswith("hf-layerprune: ") and error.count("\n") == 1 and expected in error
    assert everything() == before


def test_an_empty_folder_of_the_users_stays(tmp_path, model_folder, text_file):
    (tmp_path / "mine").mkdir()
    arguments = ["--model", model_folder, "--dataset", text_file, "--output_dir", tmp_path / "mine", *QUICK]
    assert run("compress", *arguments, "--target_num_layers", 5) == 2
    assert (tmp_path / "mine").is_dir() and not list((tmp_path / "mine").iterdir())


def test_a_run_killed_in_its_first_second_can_be_resumed(tmp_path, model_folder, text_file, monkeypatch, capsys):
    import hf_layerprune.trainer.rounds as module

    def die(*_, **__):
        raise KeyboardInterrupt

    arguments = ["--model", model_folder, "--dataset", text_file, "--output_dir", tmp_path / "out", *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate_model", die)
        assert run("compress", *arguments) == 130
    assert "--resume true" in errors_of(capsys)
    assert run("compress", "--config", tmp_path / "out" / "recipe.yaml", "--resume") == 0


def test_the_line_that_goes_on_can_be_pasted():
    assert resume_line(Path("a b"), 1) == "hf-layerprune compress --config 'a b/recipe.yaml' --resume true"
    several = resume_line(Path("run"), 2)
    assert several.startswith("accelerate launch --num_processes 2 -m hf_layerprune.cli compress --config run/recipe")


def test_unknown_verb(capsys):
    assert run("shrink") == 2
    assert "shrink" in errors_of(capsys)


def test_loss_that_is_no_number_names_the_step_and_keeps_what_is_done(tmp_path, model_folder, text_file, capsys):
    out = tmp_path / "out"
    arguments = ["--model", model_folder, "--dataset", text_file, "--output_dir", out, *QUICK]
    assert run("compress", *arguments) == 0
    capsys.readouterr()
    broken = [*arguments, "--learning_rate", "1e30", "--max_grad_norm", "1e30", "--trained_layers", "all",
              "--max_steps", "5", "--output_dir", tmp_path / "nan"]  # fmt: skip
    assert run("compress", *broken) == 2
    error = errors_of(capsys)
    assert error.count("\n") == 1 and "at step" in error and ("nan" in error or "inf" in error)
    assert AutoModelForCausalLM.from_pretrained(out / "rounds" / "01").config.num_hidden_layers == 4


def test_names_with_brackets_are_printed_as_they_are(tmp_path, model_folder, text_file, capsys, caplog):
    base = ("--model", model_folder, "--dataset", text_file)
    few = ("--max_length", 32, "--num_samples", 4)
    folders = [tmp_path / "all [x]" / f"[/{verb}]" for verb in ("score", "parallelize", "compress")]
    assert run("score", *base, *few, "--output_dir", folders[0]) == 0
    pairs = ("--num_eval_samples", 4, "--measure_speed", "false", "--pairs", "1,2")
    assert run("parallelize", *base, *few, *pairs, "--output_dir", folders[1]) == 0
    assert run("compress", *base, *QUICK, "--output_dir", folders[2]) == 0
    printed = capsys.readouterr().out
    for path in (folders[0] / "scores.json", folders[1] / "model", folders[2] / "model"):
        assert f"{path}   " in printed

    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "why? " * 80, "choices": ["a", "b"], "answer": 0}))
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text("- {kind: multiple_choice, dataset: rows.jsonl, prompt: '{q}', name: 'my [/x] rows'}")
    assert run("score", "--model", model_folder, "--tasks", tasks, "--output_dir", tmp_path / "scores") == 0
    assert "task my [/x] rows: prompts too long" in caplog.text
    assert run("evaluate", *base, *few, "--tasks", tasks) == 0
    assert "my [/x] rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), MemoryError(),
     RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["device", "python", "cpu"],
)  # fmt: skip
def test_out_of_memory_is_one_line(error, tmp_path, model_folder, text_file, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("hf_layerprune.cli.score.score_layers", fail)
    arguments = ["--model", model_folder, "--dataset", text_file, "--max_length", 32]
    assert run("score", *arguments, "--output_dir", tmp_path / "out") == 2
    told = errors_of(capsys)
    assert told.startswith("hf-layerprune: out of memory: ") and told.count("\n") == 1 and "batch_size" in told


@pytest.mark.parametrize(
    "found", ["InvalidCxxCompiler: No working C++ compiler found in\n\nSet", "Failed to find C compiler"]
)
def test_a_missing_compiler_is_one_line(found, tmp_path, monkeypatch, capsys):
    def fail(_):
        raise RuntimeError(found)

    monkeypatch.setattr("hf_layerprune.cli.compress.compress", fail)
    assert run("compress") == 2
    assert errors_of(capsys).endswith("to compile layers install gcc and g++, or leave compilation out\n")


def test_any_other_error_is_no_users_mistake(tmp_path, model_folder, text_file, monkeypatch):
    monkeypatch.setattr("hf_layerprune.cli.score.score_layers", lambda *_, **__: 1 / 0)
    arguments = ["--model", model_folder, "--dataset", text_file, "--max_length", 32]
    with pytest.raises(ZeroDivisionError):
        run("score", *arguments, "--output_dir", tmp_path / "out")


def test_a_place_that_cannot_be_written_to_is_known_before_the_work(text_file, capsys):
    assert run("evaluate", "--output_dir", text_file, "--model", "nobody/nothing") == 2
    assert run("evaluate", "--output_dir", text_file, "--num_samples", "1", "--max_length", "16") == 2
    assert "cannot be used: File exists" in errors_of(capsys)


def test_scores_that_cannot_be_taken_leave_no_folder(tmp_path, model_folder, text_file, capsys):
    arguments = ["--model", model_folder, "--dataset", text_file, "--max_length", "16", "--race_confidence", "0.9"]
    assert run("score", *arguments, "--criterion", "taylor", "--output_dir", tmp_path / "scores") == 2
    assert "race" in errors_of(capsys) and not (tmp_path / "scores").exists()


def test_the_default_depth_is_below_the_models():
    assert [default_depth(depth) for depth in (2, 3, 16, 36)] == [1, 2, 12, 27]


CHATS = {
    "messages": {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A cat."}]},
    "conversations": {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "A cat."}]},
    "prompt and completion": {"prompt": "Who was it? ", "completion": "A cat."},
}


@pytest.mark.parametrize("form", CHATS)
def test_every_verb_that_reads_text_reads_chats(tmp_path, model_folder, capsys, form):
    tokenizer = load_tokenizer(str(model_folder))
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(model_folder)
    saved = str(tmp_path / "saved")  # blank cells do no harm
    Dataset.from_list([CHATS[form]] * 8 + [dict.fromkeys(CHATS[form])]).save_to_disk(saved)
    base = ("--model", model_folder, "--dataset", saved)
    few = ("--max_length", 32, "--num_samples", 4)
    assert run("compress", *base, "--eval_dataset", saved, "--heal", "false", *UNHEALED, "--packing", "false",
               "--num_eval_samples", 4, "--output_dir", tmp_path / "run") == 0, capsys.readouterr().err  # fmt: skip
    assert run("score", *base, *few, "--output_dir", tmp_path / "scores") == 0
    assert run("evaluate", *base, *few, "--output_dir", tmp_path / "evaluated") == 0
    pairs = ("--num_eval_samples", 4, "--measure_speed", "false", "--pairs", "1,2", "--batch_size", 2)
    assert run("parallelize", *base, *few, *pairs, "--output_dir", tmp_path / "pairs") == 0, capsys.readouterr().err
    report, of_pairs = (read_report(tmp_path / name) for name in ("run", "pairs"))
    evaluated = json.loads((tmp_path / "evaluated" / "evaluation.json").read_text())
    assert evaluated["loss"] == pytest.approx(report["teacher"]["loss"], rel=1e-5)
    assert evaluated["loss"] == pytest.approx(of_pairs["teacher"]["loss"], rel=1e-5)
    assert evaluated["num_tokens"] == report["teacher"].get("num_tokens", evaluated["num_tokens"])


@pytest.mark.parametrize("verb", ["score", "evaluate", "parallelize", "generate", "estimate"])
def test_what_a_verb_cannot_read_is_one_line(tmp_path, model_folder, text_file, monkeypatch, capsys, verb):
    monkeypatch.chdir(tmp_path)
    text = ["--dataset", text_file]
    cases = [([], "--dataset is missing"), ([*text, "--dataset_split", "test"], "dataset_split='test' is not in")]
    cases += [([*text, "--dataset_config", "main"], "dataset_config='main': .* has no configurations")]
    if verb == "estimate":
        cases = [(["--max_length", "300", "--gpu_memory", "24GiB"], "max_length=300 but .* has 256 positions")]
    elif verb != "generate":
        cases.append(([*text, "--max_length", "300"], "max_length=300 but .* has 256 positions; choose 2..256"))
    for arguments, message in cases:
        assert run(verb, "--model", model_folder, *arguments) == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and error.count("\n") == 1, error
