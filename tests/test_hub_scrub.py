"""Nothing local leaves."""

import json
from pathlib import Path

import pytest

from hf_layerprune import LayerPruneError
from hf_layerprune.hub.scrub import check_nothing_local, hub_id, is_place, without_places


@pytest.mark.parametrize(
    "text, name",
    [
        ("/home/ford/texts.jsonl", "texts.jsonl"),
        ("~/texts", "texts"),
        ("../models/student", "student"),
        ("C:\\Users\\ford\\texts.txt", "texts.txt"),
        ("data/texts.parquet", "texts.parquet"),
        ("default,/home/ford/tasks.yaml", "default,tasks.yaml"),
        ("file:///home/ford/x", "x"),
        ("Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-3B"),
        ("embedded:held_out", "embedded:held_out"),
        ("kl", "kl"),
        ("", ""),
    ],
)
def test_of_a_place_the_name_is_told(text, name):
    assert without_places(text) == name


def test_settings_are_told_without_places_at_any_depth():
    adapters = json.dumps({"base_model_name_or_path": "/home/ford/model", "r": 4})
    settings = {
        "a": ["/x/y", {"b": "/x/z"}],
        "output_dir": "/x",
        "hub_token": "hf_x",
        "peft": adapters,
        "c": 3,
        "d": "{",
    }
    told = without_places(settings)
    assert told == {"a": ["y", {"b": "z"}], "peft": '{"base_model_name_or_path": "model", "r": 4}', "c": 3, "d": "{"}


def test_what_a_hub_id_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("me/model") == hub_id("me/model@4-layers") == "me/model"
    Path("me/model").mkdir(parents=True)
    assert hub_id("me/model") is None and is_place("me/model")
    for name in (None, "", "model", "a/b/c", "embedded", "me/texts.jsonl", "a b/c"):
        assert hub_id(name) is None


def test_the_last_look(tmp_path):
    staged, run = tmp_path / "staged", tmp_path / "run"
    staged.mkdir()
    (staged / "model.safetensors").write_bytes(str(run).encode())  # weights are not text
    (staged / "report.md").write_text(f"made in {run}-2 and https://host{run}, by hf_layerprune")
    check_nothing_local(staged, [run, Path("/")], "secret")
    for text, what in ((f"in {run}", "local path"), (f"{run}/x", "local path"), ("secret", "token"),
                       ("hf_abcdefghijklmnopqrstuv", "token")):  # fmt: skip
        (staged / "recipe.yaml").write_text(text)
        with pytest.raises(LayerPruneError, match=f"recipe.yaml holds .*{what}") as error:
            check_nothing_local(staged, [run], "secret")
        assert "secret" not in str(error.value)
