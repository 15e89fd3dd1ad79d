"""What is loaded and read for the demo: while visitors stop it, wait for it, or it fails."""

import json
import threading
import time

import pytest
from demo_models import make_run, make_service
from transformers import GenerationConfig

from hf_layerprune import LayerPruneError, cli
from hf_layerprune.demo import (
    DemoService,
    DemoSettings,
    Limits,
    ModelEntry,
    facts,
    generation,
    open_catalog,
    settings_of,
    store,
)
from hf_layerprune.demo.comparison import Request
from hf_layerprune.demo.generation import DONE, STOPPED
from hf_layerprune.demo.render import render_inside


@pytest.fixture
def slow(monkeypatch):
    """Loading a model takes until this is set."""
    go, load = threading.Event(), store.load_model

    def load_slowly(*arguments, **options):
        assert go.wait(60)
        return load(*arguments, **options)

    monkeypatch.setattr(store, "load_model", load_slowly)
    yield go
    go.set()


def one_run(folder, **limits):
    settings = DemoSettings((ModelEntry("run", run=str(make_run(folder))),), limits=Limits(**limits))
    return DemoService(settings, open_catalog(settings))


def test_stop_does_not_wait_for_what_loads(tmp_path, slow):
    service, stop = one_run(tmp_path), threading.Event()
    stream = service.stream(Request("It was"), stop)
    assert next(stream).original.state == "loading"
    stop.set()
    *_, snapshot = stream
    assert not slow.is_set() and snapshot.original.state == snapshot.compressed.state == STOPPED
    slow.set()
    *_, snapshot = service.stream(Request("It was", sampling={"max_new_tokens": 4}))
    assert snapshot.original.state == snapshot.compressed.state == DONE


def test_what_is_in_memory_is_not_held_up_by_what_loads(tmp_path, slow):
    service = one_run(tmp_path, max_models=3)
    slow.set()
    service.warm_up()
    slow.clear()
    pairing = service.catalog.first
    loading = threading.Thread(target=service.store.get, args=(pairing.students[5],), daemon=True)
    loading.start()
    while not store.LOCKS.models.locked():
        time.sleep(0.01)
    assert service.comparer.facts(pairing).sampling and service.store.tokenizer(pairing)
    *_, snapshot = service.stream(Request("It was", depth=3, sampling={"max_new_tokens": 4}))
    assert snapshot.compressed.state == DONE and loading.is_alive()
    slow.set()
    loading.join()
    assert pairing.students[5] in service.store.loaded


def test_what_is_measured_was_warmed_up_with_the_prompt_and_nobody_sees_it(tmp_path, monkeypatch):
    service, lengths, warm_up = one_run(tmp_path, max_prompt_tokens=300), [], generation._warm_up

    def counted(model, ids):
        lengths.append(ids.shape[1])
        warm_up(model, ids)

    monkeypatch.setattr(generation, "_warm_up", counted)
    for prompt, order in (("It was", "one after the other"), ("a" * 200, "one after the other"), ("b", "at once")):
        *_, snapshot = service.stream(Request(prompt, order=order, sampling={"max_new_tokens": 4}))
        assert snapshot.original.num_tokens == snapshot.compressed.num_tokens == 4
    assert lengths == [6, 6, 128, 128]


def test_facts_are_read_once_and_again_only_where_something_could_not_be_read(tmp_path, monkeypatch):
    service, reads = one_run(tmp_path), []

    def from_pretrained(name, **options):
        reads.append(name)
        if len(reads) == 1:
            raise OSError("the connection was lost")
        return GenerationConfig(do_sample=True, temperature=0.5)

    monkeypatch.setattr(facts.GenerationConfig, "from_pretrained", from_pretrained)
    monkeypatch.setattr(facts, "resolve", lambda name: "user/model")
    pairing = service.catalog.first
    assert not service.comparer.facts(pairing).complete
    assert service.comparer.facts(pairing).complete and service.comparer.facts(pairing).context == 4096
    assert service.comparer.facts(pairing).sampling.temperature == 0.5
    assert len(reads) == 2


def test_prompt_and_answer_share_the_context(tmp_path):
    make_run(tmp_path)
    path = tmp_path / "teacher" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 64}))
    settings = DemoSettings((ModelEntry("run", run=str(tmp_path / "run")),))
    comparer = DemoService(settings, open_catalog(settings)).comparer
    assert comparer.facts(comparer.catalog.first).most_new_tokens(settings.limits) == 63
    for prompt, told in (
        ("abc", "has 3 tokens, and shares the 64 positions of this model with the answer. Ask for at most 61 new"),
        ("a" * 70, "has 70 tokens; at most 63 are read here. Shorten it."),
    ):
        with pytest.raises(LayerPruneError, match=told):
            comparer.prepare(Request(prompt, sampling={"max_new_tokens": 512}))
    assert comparer.prepare(Request("abc", sampling={"max_new_tokens": 61}))


@pytest.mark.parametrize(
    ("changes", "is_shown"),
    [
        ({"perplexity_unhealed": None}, True),
        ({"perplexity_unhealed": float("inf")}, False),
        ({"perplexity_before_healing": "much"}, False),
        ({"criterion": ["kl"]}, False),
        ({"scores": 3}, False),
    ],
    ids=str,
)
def test_a_report_that_cannot_be_drawn_is_left_out_and_told(tmp_path, changes, is_shown):
    runs = {name: make_run(tmp_path / name) for name in ("good", "odd")}
    path = runs["odd"] / "report.json"
    report = json.loads(path.read_text())
    report["rounds"][-1] |= changes
    path.write_text(json.dumps(report))
    settings, messages = DemoSettings(tuple(ModelEntry(n, run=str(run)) for n, run in runs.items())), []
    catalog = open_catalog(settings, messages.append, render_inside)
    assert catalog.names == ["good", "odd"][: 1 + is_shown]
    assert is_shown or messages[0].startswith("left out: odd: ")


def test_the_list_of_the_tests_can_be_drawn(tmp_path):
    service = make_service(tmp_path)
    assert open_catalog(service.settings, draw=render_inside).names == service.catalog.names


def test_the_original_of_a_run_is_the_model_it_was_made_from(tmp_path, model_folder, monkeypatch):
    """Not what happens to have the name of its folder, which is all that the report tells."""
    settings = ["--dataset", "embedded:held_out", "--max_length", "32", "--num_samples", "2"]
    settings += ["--num_eval_samples", "2", "--measure_speed", "false"]
    out = tmp_path / "out"
    assert cli.main(["parallelize", "--model", str(model_folder), "--output_dir", str(out), *settings]) == 0
    (tmp_path / "elsewhere" / "tiny-model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert open_catalog(settings_of([str(out)])).first.teacher.name == str(model_folder)
    service = one_run(tmp_path)
    assert service.catalog.first.teacher.name == str(tmp_path / "teacher")
    for run in (out, tmp_path / "run"):
        (run / "recipe.yaml").unlink()
        with pytest.raises(LayerPruneError, match="which is no model on the Hub; name its original, as teacher"):
            open_catalog(settings_of([str(run)]))
        entry = ModelEntry("named", run=str(run), teacher=str(model_folder))
        assert open_catalog(DemoSettings((entry,))).first.teacher.name == str(model_folder)
