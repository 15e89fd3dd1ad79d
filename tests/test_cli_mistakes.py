"""A user's mistake is one line that says what to do; an error of ours keeps its traceback."""

import pytest
from conftest import tiny_model

import hf_layerprune
from hf_layerprune import LayerPruneError, cli
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
        (["compress", "--max_stps", "3"], "unknown option --max_stps; did you mean --max_steps?"),
        (["compress", "--target-layers=3"], "unknown option --target-layers; did you mean --target_num_layers?"),
        (["score", "--num_sample_rows", "3"], "unknown option --num_sample_rows; did you mean --num_samples?"),
        (["score", "--qqq"], "unknown option --qqq; see hf-layerprune score --help"),
        (["score", "embedded"], "'embedded' belongs to no option; see hf-layerprune score --help"),
        (
            ["compress", "--config", "{recipe}"],
            "{recipe}: unknown key 'target_layers'; did you mean target_num_layers?",
        ),
        (["score", "--num_samples", "few"], "invalid int value: 'few'; see hf-layerprune score --help"),
        (["demo", "--server_port", "99999"], "server_port=99999 is out of range; choose 1..65535"),
        (["score", "--config", "nowhere.yaml"], "--config nowhere.yaml is not a file; give the path of a YAML file"),
        (["push", "one", "two"], "one two are 2 words where one goes, as --output_dir"),
        (["push", "one", "--output_dir", "two"], "output_dir named twice: one and --output_dir; leave one out"),
        (
            ["compress", "--use_liger_kernel", "true"],
            "use_liger_kernel has no effect in hf-layerprune compress: each round builds its student anew, without "
            "such kernels; leave it out",
        ),
    ],
)
def test_a_wrong_name_is_one_line_with_the_nearest_right_one(words, expected, recipe, capsys):
    assert run(*(word.format(recipe=recipe) for word in words)) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-layerprune: ") and error.endswith(expected.format(recipe=recipe) + "\n")
    assert error.count("\n") == 1 and "Parser" not in error


def test_help_names_the_verb_and_every_setting(capsys):
    for verb in ("score", "estimate"):
        assert run(verb, "--help") == 0
        assert f"usage: hf-layerprune {verb} [-h]" in capsys.readouterr().out
    assert run("compress", "--help") == 0
    printed = capsys.readouterr().out
    for name in ("model", "dataset", "target_num_layers", "trained_layers", "learning_rate", "adam_beta1"):
        assert f"--{name}" in printed
    assert "--use_cache" not in printed and "--do_train" not in printed


def test_a_run_without_words_tells_its_verbs(capsys):
    assert run() == 0 and "compress" in capsys.readouterr().out


def test_a_switch_takes_no_word_that_follows_it():
    (arguments,) = parse("push", ["--private", "runs/one", "--depth_tags", "false", "--repo_id=me/one"])
    assert (arguments.output_dir, arguments.private, arguments.depth_tags) == ("runs/one", True, False)


def test_yaml_is_read_as_the_command_line_is(tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("batch_size: [1.0, 2.0]\nnew_tokens: 8.0\nlayers: [5, 5/4]\nmodels: one\n")
    (arguments,) = parse("benchmark", ["--config", str(settings)])
    assert arguments == BenchmarkArguments(models=["one"], layers=["5", "5/4"], batch_size=[1, 2], new_tokens=8)
    assert all(type(n) is int for n in (*arguments.batch_size, arguments.new_tokens))
    settings.write_text("trained_layers: 3\nmax_steps: 4.0\nmax_length: null\ntarget_num_layers: 3\n")
    parser = Parser("compress")
    _, config = parser.read([f"--config={settings}", "--target-latency", "0.5", "--no_heal"])
    assert (config.trained_layers, config.max_steps, config.max_length) == ((3,), 4, None)
    assert (config.target_num_layers, config.target_latency, config.heal) == (None, 0.5, False)
    assert parser.given == {"trained_layers", "max_steps", "max_length", "target_latency", "heal"}
    for text, message in (("max_steps: 2.5", "max_steps=2.5 is not a whole"), ("seed: .inf", "seed=inf is not a")):
        settings.write_text(text)
        with pytest.raises(LayerPruneError, match=message):
            parse("compress", ["--config", str(settings)])


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
        (OSError("raised by a library, about nothing the user named"), None),
        (FileNotFoundError(2, "No such file", f"{hf_layerprune.__path__[0]}/assets/recipe.yaml"), None),
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


@pytest.mark.parametrize("error", [ValueError, OSError, ImportError])
def test_an_error_while_a_trainer_is_made_keeps_its_traceback(error, tmp_path, monkeypatch):
    def fail(**_):
        raise error("ours")

    monkeypatch.setattr("hf_layerprune.cli.compress.IterativeLayerDistillTrainer", fail)
    with pytest.raises(error, match="ours"):
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
