"""A user's mistake is one line that says what to do; an error of ours keeps its traceback."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_model
from safetensors import SafetensorError

import hf_layerprune
from hf_layerprune import LayerPruneError, cli
from hf_layerprune.cli import OncePerKind
from hf_layerprune.cli.arguments import BenchmarkArguments
from hf_layerprune.cli.parsing import Parser, parse
from hf_layerprune.data import load_text_dataset


def run(*words):
    return cli.main([str(word) for word in words])


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: embedded\ntarget_layers: 3\n")
    return path


@pytest.mark.parametrize(
    "words, expected",
    [
        (["compress", "--max_stps", "3"], "unknown setting --max_stps; did you mean max_steps?"),
        (["compress", "--target-layers=3"], "unknown setting --target-layers=3; did you mean target_num_layers?"),
        (["estimate", "--model", "./nowhere", "--target_num_layers", "3"], "the folder does not exist"),
        (["score", "--qqq"], "unknown setting --qqq; see hf-layerprune score --help"),
        (["score", "embedded"], "unknown setting embedded; did you mean --model embedded?"),
        (["score", "Qwen/Qwen2.5-0.5B"], "unknown setting Qwen/Qwen2.5-0.5B; did you mean --model Qwen/Qwen2.5-0.5B?"),
        (
            ["compress", "--torch_compile", "true"],
            "unknown setting --torch_compile; it compiles a whole model; --compile_layers true compiles every layer",
        ),
        (["compress", "--use_liger_kernel", "true"], "unknown setting --use_liger_kernel; see hf-layerprune compress"),
        (
            ["compress", "--config", "{recipe}"],
            "--config {recipe}: unknown setting target_layers; did you mean target_num_layers?",
        ),
        (["score", "--model", ""], "model is empty; give it a value, or leave it out"),
        (["benchmark", "embedded", ""], "models is empty; give it a value, or leave it out"),
        (["score", "--num_samples", "few"], "invalid int value: 'few'; see hf-layerprune score --help"),
        (["compress", "--model_init_kwargs", "{{subfolder: x}}"], "model_init_kwargs={{subfolder: x}} is not JSON: "),
        (["compress", "--model_init_kwargs", "subfolder=x"], "model_init_kwargs=subfolder=x is not JSON: "),
        (["compress", "--model_init_kwargs", "5"], "model_init_kwargs=5 is not a mapping; write it as {{"),
        (["compress", "--lora_alpha", "16"], "lora_alpha=16 has no effect without lora_r; leave it out"),
        (["compress", "--hub_model_id", "a/b"], "hub_model_id=a/b has no effect without push_to_hub; leave it out"),
        (
            ["compress", "--project", "p", "--report_to", "none"],
            "project=p has no effect without report_to; leave it out",
        ),
        (
            ["compress", "--on_policy_tokens", "9"],
            "on_policy_tokens=9 has no effect without on_policy_steps; leave it",
        ),
        (
            ["score", "--config", "a.yaml", "--config", "b.yaml"],
            "--config is given 2 times; put all settings into one",
        ),
        (["score", "--config="], "config is empty; give it a value, or leave it out"),
        (["score", "--config=~/nowhere.yaml"], "/home/me/nowhere.yaml cannot be used: No such file or directory"),
        (["compress", "--weight_decay=-1"], "weight_decay=-1.0 must be a number of at least 0"),
        (["demo", "--server_port", "99999"], "server_port=99999 is out of range; choose 1..65535"),
        (["score", "--config", "nowhere.yaml"], "nowhere.yaml cannot be used: No such file or directory"),
        (["push", "one", "two", "--repo_id", "me/x"], "unknown setting two; see hf-layerprune push --help"),
        (["push", "one"], "which run, and where to? hf-layerprune push OUTPUT_DIR --repo_id user/name"),
    ],
)
def test_a_wrong_name_is_one_line_with_the_nearest_right_one(words, expected, recipe, monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/me")
    assert run(*(word.format(recipe=recipe) for word in words)) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-layerprune: ") and expected.format(recipe=recipe) in error
    assert error.count("\n") == 1 and "Parser" not in error


def test_help_names_the_verb_and_every_setting(capsys):
    assert run("push", "--help") == 0
    printed = capsys.readouterr().out
    assert "usage: hf-layerprune push [-h]" in printed and "[output_dir]" in printed
    assert run("compress", "--help") == 0
    printed = capsys.readouterr().out
    for name in ("model", "dataset", "target_num_layers", "trained_layers", "learning_rate", "output_dir"):
        assert f"--{name}" in printed
    assert "--adam_beta1" not in printed and "  hf-layerprune compress --config recipe.yaml" in printed
    assert run("compress", "--help-all") == 0
    printed = capsys.readouterr().out
    assert printed.index("  --trained_layers") < printed.index("  --adam_beta1")
    assert "--use_cache" not in printed and "--do_train" not in printed


def test_a_run_without_words_tells_its_verbs(capsys):
    assert run() == 0 and "compress" in capsys.readouterr().out


def test_yaml_is_read_as_the_command_line_is(tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("batch_size: [1, 2]\nnew_tokens: 8\nlayers: [5, 5/4]\nmodels: one\ncompile: no\n")
    (arguments,) = parse("benchmark", [f"--config={settings}"])
    assert arguments == BenchmarkArguments(models=["one"], layers=["5", "5/4"], batch_size=[1, 2], new_tokens=8)
    (arguments,) = parse("benchmark", ["a", "--config", str(settings), "b", "--batch_size=4", "--new_tokens", "3"])
    assert (arguments.models, arguments.batch_size, arguments.new_tokens) == (["a", "b"], [4], 3)
    settings.write_text(
        "trained_layers: [3, 4]\nmax_steps: -1\nmax_length: null\ntarget_num_layers: 3\nwarmup_steps: 4\n"
        "lr_scheduler_kwargs: {min_lr: 0.1}\nlearning_rate: 1e-3\nteacher: 7\n"
    )
    parser = Parser("compress")
    arguments, config = parser.read([f"--config={settings}", "--target-latency", "0.5", "--no_measure_speed"])
    assert (config.trained_layers, config.max_steps, config.max_length) == ((3, 4), -1, None)
    assert (config.target_num_layers, config.target_latency, config.measure_speed) == (None, 0.5, False)
    assert arguments.teacher == "7"
    assert parser.given == {
        "trained_layers": "3,4", "max_steps": -1, "max_length": None, "target_latency": 0.5, "measure_speed": False,
        "warmup_steps": 4, "lr_scheduler_kwargs": {"min_lr": 0.1}, "learning_rate": 1e-3, "teacher": "7",
    }  # fmt: skip
    assert str(parser.given["warmup_steps"]) == "4"  # as it was given
    for text, message in (("layers_per_round: 2.0", "invalid int value: '2.0'"), ("seed: .inf", "invalid int value")):
        settings.write_text(text)
        with pytest.raises(LayerPruneError, match=f"--config {settings}: argument --.*{message}"):
            parse("compress", ["--config", str(settings)])


def test_a_run_that_does_not_heal_takes_no_settings_of_healing(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_steps: 3\nkl_weight: 2.0\noptim: sgd\nlayers_per_round: 2\n")
    parser = Parser("compress")
    parser.read(["--config", str(recipe), "--heal", "false"])  # one recipe for both
    assert parser.given == {"layers_per_round": 2, "heal": False}
    parser.read(["--config", str(recipe), "--heal", "false", "--on_policy_steps", "4"])
    assert parser.given == {"layers_per_round": 2, "optim": "sgd", "heal": False, "on_policy_steps": 4}
    with pytest.raises(LayerPruneError, match="heal=False leaves no use for learning_rate, warmup_steps; leave"):
        parser.read(["--no_heal", "--learning_rate", "1", "--warmup_steps", "2"])
    recipe.write_text("max_steps: 3\nheal: false\n")
    with pytest.raises(LayerPruneError, match="heal=False leaves no use for max_steps"):
        parser.read(["--config", str(recipe)])
    parser.read(["--config", str(recipe), "--heal", "true"])
    recipe.write_text("report_to: trackio\nproject: mine\non_policy_steps: 3\nprompts: a.jsonl\n")
    parser.read(["--config", str(recipe), "--report_to", "none", "--on_policy_steps", "0"])
    assert parser.given == {"report_to": "none", "on_policy_steps": 0}


def test_tasks_and_criterion_on_the_command_line_replace_those_of_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("criterion: loss\n")
    assert parse("compress", ["--config", str(recipe), "--tasks", "paper"])[1].criterion == "tasks"
    recipe.write_text("criterion: tasks\ntasks: paper\n")
    config = parse("compress", ["--config", str(recipe), "--criterion", "kl"])[1]
    assert (config.criterion, config.tasks) == ("kl", None)


def test_the_loss_of_the_paper_takes_the_place_of_a_recipes_weights(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("hidden_weight: 0.0\nlm_weight: 0.1\ntemperature: 2.0\n")
    config = parse("compress", ["--config", str(recipe), "--loss_preset", "paper"])[1]
    assert (config.hidden_weight, config.lm_weight, config.temperature) == (10.0, 0.0, 2.0)
    recipe.write_text("hidden_weight: 0.0\nloss_preset: paper\n")
    with pytest.raises(LayerPruneError, match="leave out hidden_weight=0.0"):
        parse("compress", ["--config", str(recipe)])


def test_a_setting_that_a_recipe_has_twice_is_refused(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 3\nmax_steps: 3\nseed: 4\n")
    with pytest.raises(LayerPruneError, match="recipe.yaml: seed is there twice; leave one out"):
        parse("compress", ["--config", str(recipe)])


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "settings.yaml").write_text("models: [~/one, two~/]\noutput_dir: ~/out\n")
    (arguments,) = parse("benchmark", ["--config", str(tmp_path / "settings.yaml")])
    assert (arguments.models, arguments.output_dir) == (["/home/me/one", "two~/"], "/home/me/out")
    (arguments,) = parse("score", ["--model=~/one", "--dataset", "~", "--output_dir=~/out"])
    assert (arguments.model, arguments.dataset, arguments.output_dir) == ("/home/me/one", "~", "/home/me/out")


@pytest.mark.parametrize(
    "verb, line, message",
    [
        ("compress", "model:", "model has no value; give it a value, or leave it out"),
        ("compress", "model: {a: b}", "model must not hold settings of its own"),
        ("compress", "learning_rate: ~", "learning_rate has no value"),
        ("compress", "bf16: {}", "bf16 must not hold settings"),
        ("score", "dataset_split:", "dataset_split has no value"),
        ("benchmark", "models:", "models has no value"),
        ("generate", "seed:", "seed has no value"),
        ("generate", "seed: 1\n\tmodel: a", "line 2: found character '.t' that cannot start any token"),
        ("compress", "model: [a", "line 1: expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_a_value_in_a_recipe_has_the_type_of_its_setting(tmp_path, verb, line, message):
    settings = tmp_path / "settings.yaml"
    settings.write_text(line)
    with pytest.raises(LayerPruneError, match=f"--config {settings}: {message}"):
        parse(verb, ["--config", str(settings)])


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"hf-layerprune {hf_layerprune.__version__}\n"


def test_debug_shows_the_traceback_as_well(capsys):
    assert run("score", "--debug", "--criterion", "cosine") == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and error.splitlines()[-1].startswith("hf-layerprune: ")


@pytest.mark.parametrize(
    "error, status",
    [
        (PermissionError(13, "Permission denied", "scores.json"), 2),
        (OSError(28, "No space left on device"), 2),
        (OSError(28, "No space left on device", str(Path(cli.__file__)), None, "model.tmp/code.py"), 2),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 104064 vs 103956"), 2),
        (Exception("No space left on device (os error 28)"), 2),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), 2),
        (FileNotFoundError(2, "No such file", str(Path(cli.__file__).parent / "gone.jinja")), None),
        (OSError("raised by a library, about nothing the user named"), None),
        (ConnectionRefusedError(111, "Connection refused"), None),
        (TimeoutError(110, "Connection timed out"), None),
        (BrokenPipeError(32, "Broken pipe"), None),
        (ValueError("too many values to unpack"), None),
        (RuntimeError("The size of tensor a (4) must match the size of tensor b (5)"), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_what_a_user_can_mend_is_one_line(error, status, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr("hf_layerprune.cli.score.load_config", fail)
    if status is None:
        with pytest.raises(type(error)):
            run("score")
    else:
        assert run("score") == status and capsys.readouterr().err.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    monkeypatch.setattr("hf_layerprune.cli.score.load_tokenizer", lambda *_: pytest.fail("it began"))
    assert run("score", "--output_dir", tmp_path) == 2
    assert capsys.readouterr().err == f"hf-layerprune: {tmp_path} cannot be used: Permission denied\n"


def test_an_error_while_a_trainer_is_made_keeps_its_traceback(tmp_path, monkeypatch):
    def fail(**_):
        raise ValueError("ours")

    monkeypatch.setattr("hf_layerprune.cli.compress.IterativeLayerDistillTrainer", fail)
    with pytest.raises(ValueError, match="ours"):
        run("compress", "--output_dir", tmp_path / "out")


def test_an_error_of_ours_is_not_blamed_on_the_model_or_the_data(model_folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyError("ours")

    monkeypatch.setattr("hf_layerprune.loading.plan_of", fail)
    with pytest.raises(KeyError, match="ours"):
        run("score", "--model", model_folder)
    monkeypatch.setattr("hf_layerprune.data.load_dataset", fail)
    with pytest.raises(KeyError, match="ours"):
        load_text_dataset("user/texts")


def test_a_run_stands_for_its_model(model_folder, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(model_folder)
    few = ("--dataset", "embedded:held_out", "--num_samples", 2, "--max_length", 16)
    assert run("evaluate", "--model", tmp_path / "run", "--teacher", tmp_path / "run", *few) == 0
    assert "kl " in capsys.readouterr().out
    tiny_model().save_pretrained(tmp_path / "run")  # a model itself, whatever lies in it
    assert run("evaluate", "--model", tmp_path / "run", *few) == 2
    assert "no tokenizer" in capsys.readouterr().err


def test_a_warning_of_every_row_is_shown_once():
    once = OncePerKind()
    start = "The tokenized prompt is not a prefix of the tokenized prompt+completion, usually because"
    texts = [f"{start} of 'a'", f"{start} of 'b'", "another"]
    assert [once.filter(logging.makeLogRecord({"msg": text})) for text in texts] == [True, False, True]


def test_the_configuration_of_a_recipes_own_data_is_not_that_of_other_data(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dataset: user/texts\ndataset_config: main\ndataset_split: test\n")
    (own,), (other,) = (
        parse("score", ["--config", str(recipe), *words]) for words in ([], ["--dataset", "mine.jsonl"])
    )
    assert (own.dataset, own.dataset_config, own.dataset_split) == ("user/texts", "main", "test")
    assert (other.dataset, other.dataset_config, other.dataset_split) == ("mine.jsonl", None, "test")


def test_a_recipe_may_write_numbers_as_json_does(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lr_scheduler_kwargs: {min_lr: 1e-6, names: [2E3, 1e-, '1e-6']}\nlearning_rate: 1e-5\n")
    _, args = parse("compress", ["--config", str(recipe), "--lr_scheduler_type", "cosine_with_min_lr"])
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-6, "names": [2000.0, "1e-", "1e-6"]}
    assert args.learning_rate == 1e-5


def test_what_was_imported_is_collected_in_the_end_where_triton_would_call_it_leaked():
    code = """if True:
        import atexit, gc, sys
        sys.argv[0] = "hf-layerprune"
        from hf_layerprune.cli import main
        atexit.register(lambda: print(gc.get_freeze_count()))  # runs last
        main(["export", "--help"])
        print(gc.get_freeze_count())
        sys.modules["triton"] = gc
        """
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    during, last = map(int, shown.splitlines()[-2:])
    assert during > 0 and last == 0
