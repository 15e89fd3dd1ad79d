"""Local paths: recorded in full, never pushed."""

from pathlib import Path

import pytest

from hf_layerprune import LayerPruneError
from hf_layerprune.cli.parsing import offered, settings_of
from hf_layerprune.hub.paths import (
    PUBLIC,
    absolute_if_local,
    check_nothing_local,
    hub_id,
    public_settings,
    with_absolute_paths,
    without_local_paths,
)
from hf_layerprune.trainer.run import CHANGEABLE, DECISIVE


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


def test_paths_are_found_at_any_depth():
    assert without_local_paths({"a": ["/x/y", {"b": "/x/z"}], "c": 3}) == {"a": ["y", {"b": "z"}], "c": 3}


def test_only_settings_that_are_known_to_be_harmless_are_public():
    private = {
        "output_dir": "/x", "hub_token": "hf_x", "hub_model_id": "ford/x", "run_name": "ford", "project": "acme",
        "trackio_space_id": "ford/runs", "trackio_bucket_id": "ford/b", "trackio_static_space_id": "ford/s",
        "report_to": "trackio", "logging_dir": "/x", "a_setting_of_next_year": "ford",
    }  # fmt: skip
    kwargs = {"revision": "main", "token": "hf_x", "cache_dir": "/x", "proxies": {"http": "ford"}}
    public = {"seed": 3, "dataset": "a/b", "lr_scheduler_kwargs": {"min_lr": 0.1}}
    expected = public | {"model_init_kwargs": {"revision": "main"}}
    assert public_settings(private | public | {"model_init_kwargs": kwargs}) == expected
    assert public_settings({"model_init_kwargs": "token=hf_x"}) == {}


def test_every_setting_of_a_recipe_was_looked_at():
    """A new setting of these verbs is not pushed; put it into `PUBLIC` if it names nothing of the author's."""
    known = {item.name for verb in ("compress", "parallelize") for kind in settings_of(verb) for item in offered(kind)}
    private = {"output_dir", "run_name", "report_to", "push_to_hub", "hub_model_id", "hub_private_repo", "project",
               "trackio_space_id", "resume", "gguf_file"}  # fmt: skip
    assert known - PUBLIC == private
    assert {*DECISIVE, *CHANGEABLE} <= PUBLIC


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
    public = public_settings(recorded)
    assert (public["model"], public["tasks"]) == ("model", "default,tasks.yaml,lm_eval:own.yaml,lm_eval:arc_easy")
    assert with_absolute_paths({"tasks": "one, two.yaml"}) == {"tasks": f"{here}/one, two.yaml"}
    assert "output_dir" not in public and absolute_if_local("me/other@x") == "me/other@x"
    assert (
        public_settings({"model": "/home/ford/a,b/c"}) == {"model": "c"}
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
