"""A user's mistake is one line that says what to do; an error of ours keeps its traceback."""

import pytest
from conftest import tiny_model

import hf_layerprune
from hf_layerprune import cli
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
    ],
)
def test_a_wrong_name_is_one_line_with_the_nearest_right_one(words, expected, recipe, capsys):
    assert run(*(word.format(recipe=recipe) for word in words)) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-layerprune: ") and error.endswith(expected.format(recipe=recipe) + "\n")
    assert error.count("\n") == 1 and "Parser" not in error


def test_help_names_the_verb(capsys):
    for verb in ("score", "plan"):
        with pytest.raises(SystemExit) as stop:
            run(verb, "--help")
        assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: hf-layerprune score [-h]" in printed and "usage: hf-layerprune estimate [-h]" in printed


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

    monkeypatch.setattr("hf_layerprune.cli.measure.load_config", fail)
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
