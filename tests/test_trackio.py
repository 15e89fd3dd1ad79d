"""A run on Jobs of the Hub and in Trackio: one page for all rounds, and what its card says of them."""

import os
import sqlite3
from pathlib import Path

import pytest
from conftest import byte_tokenizer, short_texts, tiny_config, tiny_model

from hf_layerprune import IterativeLayerDistillTrainer, load_run
from hf_layerprune.hub import run_card
from hf_layerprune.trainer.callbacks import LayerDistillCallback, hub_tags

URL = "https://huggingface.co/spaces/me/runs"


def trainer_of(folder, **changes):
    changes = {"target_num_layers": 4, "max_steps": 1, "measure_speed": False} | changes
    texts = short_texts()
    args = tiny_config(folder, **changes)
    return IterativeLayerDistillTrainer(tiny_model(6), args, texts, processing_class=byte_tokenizer())


class Tags(LayerDistillCallback):
    """Tags a model as transformers does when a Space of Trackio has its log."""

    def on_run_end(self, args, state, control, *, model):
        model.model_tags = ["trl", "trackio", f"trackio:{URL}"]


def test_where_it_ran_and_reported_to_is_on_the_card(tmp_path, monkeypatch):
    monkeypatch.setenv("JOB_ID", "66f")
    trainer = trainer_of(tmp_path, heal=False)
    trainer.add_callback(Tags())
    trainer.train()
    monkeypatch.delenv("JOB_ID")
    run = load_run(tmp_path)
    assert run.record.tags == ("hf_jobs", "trackio", f"trackio:{URL}") == hub_tags(trainer.model, run.record)
    card = run_card(run, 2, "me/student")
    assert {"hf_jobs", "trackio", f"trackio:{URL}"} <= set(card.data.tags) and "trl" not in card.data.tags
    assert all(f"badge.png)]({URL})" in text for text in (card.text, (tmp_path / "README.md").read_text()))
    trainer.model.model_tags = [f"trackio:{URL}-static"]  # where the log is kept in the end
    assert hub_tags(trainer.model, run.record) == ("hf_jobs", f"trackio:{URL}-static")


def test_a_run_that_reported_nowhere_has_no_badge(tmp_path):
    trainer = trainer_of(tmp_path, heal=False)
    trainer.train()
    assert trainer.run.tags == () and "badge" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("heal", [True, False])
def test_one_trackio_run_for_all_rounds(tmp_path, heal):
    pytest.importorskip("trackio", reason="trackio is not installed; `make test` does it")
    database = Path(os.environ["TRACKIO_DIR"])
    settings = {"report_to": "trackio", "project": f"heal-{heal}", "trackio_static_space_id": False}
    trainer_of(tmp_path / "tiny-4", heal=heal, logging_steps=1, **settings).train()
    with sqlite3.connect(database / f"heal-{heal}.db") as connection:
        assert connection.execute("select distinct run_name from metrics").fetchall() == [("tiny-4",)]
        logged = "\n".join(str(row[0]) for row in connection.execute("select metrics from metrics"))
    assert logged.count('"round/depth"') == 2 and '"round/kl"' in logged
    assert ("train/loss" in logged) == heal
    kept = [path.read_bytes() for path in (database / "artifacts" / f"heal-{heal}").rglob("*") if path.is_file()]
    assert (tmp_path / "tiny-4" / "plan.json").read_bytes() in kept
    assert any(content.startswith(b"\x89PNG") for content in kept)
