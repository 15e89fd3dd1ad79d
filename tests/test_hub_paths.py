"""Local paths: recorded in full, never pushed."""

from pathlib import Path

import pytest

from hf_layerprune import LayerPruneError
from hf_layerprune.hub.paths import (
    absolute_if_local,
    check_nothing_local,
    hub_id,
    with_absolute_paths,
    without_local_paths,
)


@pytest.mark.parametrize(
    "text, name",
    [
        ("/home/ford/texts.jsonl", "texts.jsonl"),
        ("~/texts", "texts"),
        ("../models/student", "student"),
        ("C:\\Users\\ford\\texts.txt", "texts.txt"),
        ("file:///home/ford/x", "x"),
        ("Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-3B"),
        ("embedded:held_out", "embedded:held_out"),
        ("kl", "kl"),
        ("", ""),
    ],
)
def test_a_local_path_becomes_a_name(text, name):
    assert without_local_paths(text) == name


def test_settings_are_public_at_any_depth():
    settings = {"a": ["/x/y", {"b": "/x/z"}], "output_dir": "/x", "hub_token": "hf_x", "c": 3, "d": "{"}
    assert without_local_paths(settings) == {"a": ["y", {"b": "z"}], "c": 3, "d": "{"}


def test_what_a_hub_id_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("me/model").mkdir(parents=True)
    assert hub_id("me/model") == hub_id("me/model@4-layers") == "me/model"  # whatever lies on this disk
    for name in (None, "", "model", "a/b/c", "embedded", "a b/c", str(tmp_path), "x" * 5000):
        assert hub_id(name) is None


def test_where_a_run_starts_the_disk_is_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("me/model", "embedded", "texts"):
        Path(name).mkdir(parents=True)
    for name in ("tasks.yaml", "own.yaml", "one, two.yaml"):
        Path(name).write_text("")
    settings = {"model": "me/model", "teacher": "embedded", "dataset": "embedded:healing", "eval_dataset": None,
                "tasks": "default, tasks.yaml,lm_eval:own.yaml,lm_eval:arc_easy", "output_dir": "texts"}  # fmt: skip
    here = str(tmp_path)
    recorded = with_absolute_paths(settings)
    assert recorded == settings | {
        "model": f"{here}/me/model",
        "tasks": f"default,{here}/tasks.yaml,lm_eval:{here}/own.yaml,lm_eval:arc_easy",
    }
    public = without_local_paths(recorded)
    assert (public["model"], public["tasks"]) == ("model", "default,tasks.yaml,lm_eval:own.yaml,lm_eval:arc_easy")
    assert with_absolute_paths({"tasks": "one, two.yaml"}) == {"tasks": f"{here}/one, two.yaml"}
    assert "output_dir" not in public and absolute_if_local("me/other@x") == "me/other@x"
    assert (
        without_local_paths({"model": "/home/ford/a,b/c"}) == {"model": "c"}
        and absolute_if_local("x" * 5000) == "x" * 5000
    )


def test_the_last_look(tmp_path):
    staged, run = tmp_path / "staged", tmp_path / "run"
    staged.mkdir()
    (staged / "model.safetensors").write_bytes(str(run).encode())  # weights are not text
    (staged / "tokenizer.json").write_text(f'{{"{run}": 3}}')  # a vocabulary holds all kinds of words
    (staged / "report.md").write_text(f"made in {run}-2 and https://host{run}, by hf_layerprune")
    check_nothing_local(staged, [run, Path("/")], "secret")
    for text, what in ((f"in {run}", "local path"), (f"{run}/x", "local path"), ("secret", "token"),
                       ("hf_abcdefghijklmnopqrstuv", "token")):  # fmt: skip
        (staged / "recipe.yaml").write_text(text)
        with pytest.raises(LayerPruneError, match=f"recipe.yaml holds .*{what}") as error:
            check_nothing_local(staged, [run], "secret")
        assert "secret" not in str(error.value)
    (staged / "recipe.yaml").unlink()
    (staged / "tokenizer.json").write_text('{"hf_abcdefghijklmnopqrstuv": 3}')
    with pytest.raises(LayerPruneError, match="tokenizer.json holds an access token"):
        check_nothing_local(staged, [run], "secret")
