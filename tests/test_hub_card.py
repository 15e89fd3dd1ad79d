"""The card: what it says, its metadata, and the committed example."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import byte_tokenizer, tiny_model
from hub_schema import metadata_errors
from huggingface_hub import ModelCard, ModelCardData
from test_report import ROUNDS, RUN, TEACHER, unhealed

from hf_layerprune import __version__, load_run, prune
from hf_layerprune.data import EMBEDDED_MODEL
from hf_layerprune.hub import Run, run_card
from hf_layerprune.hub.card import TEMPLATE, base_facts
from hf_layerprune.plan import Edit, LayerPlan
from hf_layerprune.record import read_run
from hf_layerprune.report import recovery, render_markdown, summary, write_report
from hf_layerprune.tasks import TaskReport, TaskResult

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "docs" / "example-card"
RECORD = read_run(ROOT / "recipes" / "tiny" / "results" / "report.json")
PAIRED = replace(ROUNDS[0], edits=(Edit.parallelize(1, 2),), plan=LayerPlan(((0,), (1, 2), (3,))))


def card_of(rounds=ROUNDS, base="Qwen/Qwen2.5-3B", teacher=TEACHER, settings=None, **options):
    record = replace(RUN, settings={}, teacher=teacher, rounds=tuple(rounds))
    run = Run("run/model", Path("run"), record, settings or {})
    return run_card(run, len(rounds), "me/student", base, **options)


def test_the_example_is_what_a_push_of_the_embedded_run_would_write(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "recipes" / "tiny"), *sys.path])
    from make_card import embedded_card

    card = (EXAMPLE / "README.md").read_text()
    assert card == embedded_card()
    assert metadata_errors(card) == []
    for name in ("layers.png", "quality.png"):
        assert f"({name})" in card
    assert (ROOT / "recipes/tiny/results/quality.png").read_bytes() == (EXAMPLE / "quality.png").read_bytes()


def test_every_number_of_the_example_is_from_the_report():
    card, last = (EXAMPLE / "README.md").read_text(), RECORD.rounds[-1]
    assert summary(RECORD) in card
    for record in (RECORD.teacher, *RECORD.rounds):
        assert f"| {record.depth} |" in card and f"{record.quality.perplexity:.2f}" in card
    for speed in (RECORD.teacher.speed.report, last.speed.report):
        assert f"{speed.decode_tokens_per_second:,.0f} ({speed.decode_ratio:.2f}x)" in card
        assert f"{speed.peak_memory_bytes / 1e6:,.1f}" in card
    assert RECORD.environment["hardware"] in card
    kept = {layer for block in last.plan.blocks for layer in block}
    strip = " ".join(f"{layer if layer in kept else '·':>2}" for layer in range(RECORD.teacher.depth))
    assert strip in card
    metadata = yaml.safe_load(card.split("---\n")[1])
    metrics = metadata["model-index"][0]["results"][0]["metrics"]
    assert [metric["value"] for metric in metrics] == [
        last.quality.perplexity,
        last.quality.kl,
        last.quality.agreement,
    ]
    assert metadata["license"] == "apache-2.0" and metadata["library_name"] == "transformers"
    assert {"layer-pruning", "pruned", "distillation", "hf_layerprune"} <= set(metadata["tags"])
    for part in ("vllm serve", "llama", "--config recipe.yaml", "2511.05085", "2502.02790", "recovers less"):
        assert part in card


def numbers_in(text):
    return set(re.findall(r"\d+(?:,\d{3})*(?:\.\d+)*", text))


def told_of(value):
    """Every number of a report, in all ways a card may tell it; of layers every one there is."""
    if isinstance(value, dict):
        return set().union(*(told_of(part) | numbers_in(key) for key, part in value.items()))
    if isinstance(value, list):
        return set().union(*map(told_of, value))
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return numbers_in(str(value))
    forms = (f"{value:.2f}", f"{value:.4f}", f"{value:,.0f}", f"{value:.0f}", f"{value / 1e6:.2f}",
             f"{1000 * value:.1f}", f"{value / 1e6:,.1f}", f"{100 * value:.1f}", f"{value:,}", str(value))  # fmt: skip
    return set(forms)


def test_every_number_of_the_card_is_from_the_report():
    measured = f"{100 * recovery(RECORD, RECORD.rounds[-1]):.0f}"
    known = told_of(json.loads(RECORD.to_json())) | numbers_in(TEMPLATE.read_text()) | {measured}
    card = (EXAMPLE / "README.md").read_text().replace("apache-2.0", "")
    assert numbers_in(card) <= known
    assert "1.84" not in known and "51.86" not in known  # else anything would pass


def test_what_is_measured_how_is_told():
    text = card_of().text
    assert "weights in float32, a prompt of 128 tokens and 64 new ones, batch 1" in text
    assert "median of the ratios run by run" in text
    assert "a prompt of 128 tokens and 64 new ones" in render_markdown(RUN)


def test_a_model_of_billions_and_one_word_for_the_original():
    large = {"num_parameters": 3_085_938_688}
    text = card_of([replace(ROUNDS[0], **large)], base=None, teacher=replace(TEACHER, **large)).text
    assert text.count("3.09B") == 4 and "3,085" not in text
    assert "teacher" not in text.replace("from teacher (4", "").replace("# teacher: 4", "").replace("teacher me/", "")
    assert f'pip install "hf-layerprune>={__version__}"' in text


def test_a_student_compared_with_itself_is_not_called_the_original():
    text = card_of([replace(ROUNDS[0], plan=LayerPlan(((0,), (1,), (2,)), 8))], base="me/four").text
    assert "| before this run | 4 |" in text and "| original |" not in text
    assert "made from [me/four](https://huggingface.co/me/four) (4 layers): 1 layer left out" in text
    assert "It holds 3 of the 8 layers of the original." in text


@pytest.mark.parametrize(
    "settings, criterion, told",
    [
        ({"dataset": "a/b"}, "kl", "scored on `a/b`, healed on `a/b`, measured on held-out rows of `a/b`."),
        ({"dataset": "a/b"}, "random", "healed on `a/b`, measured on held-out rows of `a/b`."),
        (
            {"dataset": "a/b", "eval_dataset": "/x/c.txt"},
            "kl",
            "scored on `a/b`, healed on `a/b`, measured on `c.txt`.",
        ),
        (
            {"dataset": "a/b", "calibration_dataset": "/x/c.txt", "tasks": "default,/x/d.yaml"},
            "tasks",
            "scored on the tasks `default,d.yaml`, healed on `a/b`, measured on held-out rows of `a/b`.",
        ),
        (
            {"dataset": None},
            "kl",
            "scored on `embedded:calibration`, healed on `embedded:healing`, measured on `embedded:held_out`. The "
            "texts called `embedded` come with hf_layerprune.",
        ),
    ],
)
def test_the_text_is_told(settings, criterion, told):
    text = card_of([replace(ROUNDS[0], criterion=criterion)], settings=settings).text
    assert f"\nText: {told}\n" in text


def test_metadata_survive_a_round_trip():
    link = "https://huggingface.co/x/y/blob/main/LICENSE"
    facts = ModelCardData(license="other", license_name="qwen-research", license_link=link, language=["en", "zh"])
    settings = {"eval_dataset": "user/held-out"}
    card = card_of(datasets=["user/texts"], facts=facts, tags=["mine"], settings=settings)
    assert metadata_errors(str(card)) == []
    again = ModelCard(str(card)).data
    assert again.to_dict() == card.data.to_dict() and isinstance(again, ModelCardData)
    assert again.base_model == "Qwen/Qwen2.5-3B" and again.base_model_relation == "finetune"
    assert (again.license, again.license_name) == ("other", "qwen-research")
    assert again.datasets == ["user/held-out", "user/texts"]
    assert {result.dataset_type for result in again.eval_results} == {"user/held-out"}


def test_quality_on_tasks_is_told_where_it_was_measured():
    tasks = TaskReport({"minimal pairs": TaskResult("accuracy", 0.75, 0.25, 0.1, 20, 1.0)})
    card = card_of([replace(ROUNDS[0], tasks=tasks)], base=None, teacher=replace(TEACHER, tasks=tasks))
    assert "| layers | mean cost | minimal pairs (accuracy) |" in card.text and "| 3 | 0.2500 | 0.7500 |" in card.text
    found = card.data.eval_results[-1]
    assert (found.dataset_type, found.metric_type, found.metric_value) == ("minimal-pairs", "accuracy", 0.75)
    assert metadata_errors(str(card)) == []


def test_a_card_of_parallel_layers():
    parallel, plain = card_of([PAIRED]), card_of()
    assert "trust_remote_code=True" in parallel.text and "serve me/student --trust-remote-code" in parallel.text
    assert "layer-parallelism" in parallel.data.tags and "0 (1 2)  3" in parallel.text
    assert "2 layers run in parallel, in 1 block" in parallel.text and "1&#124;2" in parallel.text
    assert "trust_remote_code" not in plain.text and "layer-parallelism" not in plain.data.tags
    assert "vllm serve me/student" in plain.text


def test_tags_say_what_was_done():
    unhealed_pair = card_of([unhealed(PAIRED)])
    assert unhealed_pair.data.tags == ["hf_layerprune", "layer-parallelism"]
    assert card_of([unhealed(ROUNDS[0])]).data.tags == ["hf_layerprune", "layer-pruning", "pruned"]
    merged = card_of([replace(ROUNDS[0], plan=LayerPlan(((0,), (1, 2), (3,)), merged=((1, 2),)))])
    assert {"layer-merging", "pruned", "distillation"} <= set(merged.data.tags)


def test_a_pushed_card_has_a_thumbnail():
    link = "https://huggingface.co/me/student/resolve/20-layers/quality.png"
    assert card_of(pushed=True, revision="20-layers").data.thumbnail == link
    assert "thumbnail" not in card_of().data.to_dict()


@pytest.mark.parametrize("template", [None, "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"])
def test_its_snippet_runs_and_uses_the_chat_template_if_there_is_one(tmp_path, capsys, template):
    write_report(tmp_path, RUN)
    student, tokenizer = prune(tiny_model(4), [1, 2]), byte_tokenizer()
    tokenizer.chat_template = template
    for part in (student, tokenizer):
        part.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {"layer_plan": ROUNDS[1].plan.to_dict()}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    card = run_card(load_run(tmp_path), 2, str(tmp_path / "model"))
    snippet = next(code for code in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL) if "generate" in code)
    assert ("apply_chat_template" in snippet) == (template is not None)
    exec(snippet.replace("max_new_tokens=50", "max_new_tokens=3"), {})
    assert ("Once upon a time" in capsys.readouterr().out) == (template is None)


def test_a_card_of_a_run_that_measured_less():
    text = card_of([unhealed(ROUNDS[0], speed=None, scores=())]).text
    assert "without training" in text and "did not heal" in text and "Not measured in this run" in text
    assert "Cost:" not in text and "## Reproduce" not in text


@pytest.mark.parametrize("base", ["embedded", "", None, "/home/somebody/model", "tests", "./x/y"])
def test_only_a_model_of_the_hub_is_a_base_model(base):
    data = card_of(base=base).data
    assert data.base_model is None and "base_model_relation" not in data.to_dict()


def test_a_revision_is_no_part_of_the_base_model():
    assert card_of(base="me/student@20-layers").data.base_model == "me/student"


def test_facts_of_a_base_model(tmp_path):
    def facts_of(base):
        facts, why = base_facts(base)
        return facts.to_dict(), why

    apache = ({"license": "apache-2.0", "language": "en"}, "")
    assert facts_of("embedded") == facts_of(EMBEDDED_MODEL) == apache
    for text, known, why in (
        ("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n",
         {"license": "other", "license_name": "mine"}, ""),
        ("# nothing", {}, "its card names none"),
    ):  # fmt: skip
        (tmp_path / "README.md").write_text(text)
        assert facts_of(str(tmp_path)) == (known, why)
    (tmp_path / "README.md").write_text("---\n[\n---\n")
    assert base_facts(str(tmp_path))[1] and base_facts(str(tmp_path / "nowhere"))[1]
    (tmp_path / "README.md").unlink()
    assert base_facts(str(tmp_path))[0].to_dict() == {}


@pytest.mark.parametrize(
    "block, message",
    [
        ("license: nonsense", "license"),
        ("license: other", "license_name"),
        ("base_model: [1]", "base_model"),
        ("base_model_relation: pruned", "base_model_relation"),
        ("language: English", "language"),
        ("model-index: [{results: []}]", "name"),
        ("model-index: [{name: x, results: [{task: {}, dataset: {type: a, name: b}, metrics: []}]}]", "task.type"),
        ("tags: [1]", "tags"),
    ],
)
def test_the_schema_refuses_what_the_hub_would(block, message):
    assert any(message in error for error in metadata_errors(f"---\n{block}\n---\n"))
