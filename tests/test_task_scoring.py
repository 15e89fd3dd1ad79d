"""Layers scored by tasks: the same costs as running every candidate as a model of its own."""

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from datasets import Dataset

from hf_layerprune import LayerPruneError, Race, parallelize, prune, score, score_layers
from hf_layerprune.compensation import compensate
from hf_layerprune.loading import load_tokenizer
from hf_layerprune.plan import Edit
from hf_layerprune.tasks import (
    GenerationTask,
    KLTask,
    MultipleChoiceTask,
    PerplexityTask,
    evaluate_tasks,
    load_tasks,
)

ROWS = Dataset.from_dict(
    {
        "q": ["hello there", "a much longer question than that one, is it not", "x", "why", "who", "no, no, no"] * 2,
        "a": ["b", "cc", "d", "e", "f", "g"] * 2,
        "wrong": ["x", "y", "zz", "u", "v", "w"] * 2,
    }
)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def all_kinds():
    return [
        MultipleChoiceTask(ROWS, name="choice", prompt="{q}:", choices=("a", "wrong"), answer="a", weight=2.0),
        MultipleChoiceTask(ROWS, name="pairs", prompt="", choices=("a", "wrong"), answer="a", choice="{choice}"),
        PerplexityTask(ROWS, name="text", text="{q}", max_length=16, weight=0.5),
        KLTask(ROWS, name="kl", text="{q}", max_length=16),
        GenerationTask(
            ROWS, name="write", prompt="{q} =>", reference="{a}", metric="chrf", max_new_tokens=5, weight=3.0
        ),
    ]


def test_scores_are_the_weighted_mean_costs_of_the_candidates(tokenizer):
    teacher = tiny_model(5)
    student = prune(teacher, [1])
    scores = score_layers(student, None, "tasks", teacher, tasks=all_kinds(), tokenizer=tokenizer)
    for layer, value in scores.values.items():
        expected = evaluate_tasks(prune(student, [layer]), all_kinds(), tokenizer, teacher)
        assert value == pytest.approx(expected.mean_cost, rel=1e-4)
    whole = evaluate_tasks(student, all_kinds(), tokenizer, teacher)
    assert scores.baseline == pytest.approx(whole.mean_cost, rel=1e-4)
    assert scores.num_tokens == sum(result.num_examples for result in whole.results.values())
    assert all(error > 0 for error in scores.standard_errors.values()) and scores.certainty


def test_the_error_of_one_task_is_that_of_its_report(tokenizer):
    model, task = tiny_model(5), all_kinds()[0]
    scores = score_layers(model, None, "tasks", tasks=[task], tokenizer=tokenizer)
    report = evaluate_tasks(prune(model, [2]), [task], tokenizer).results["choice"]
    assert scores.standard_errors[2] == pytest.approx(report.standard_error)


def test_a_prompt_with_choices_of_one_letter_is_run_once(tokenizer):
    rows = Dataset.from_dict({"q": ["one", "three three"], "options": [["a", "b", "c", "d"]] * 2, "right": ["B", "D"]})
    task = MultipleChoiceTask(rows, prompt="{q}:", choices="options", choice="{letter}", answer="right")
    model, other = tiny_model(4), prune(tiny_model(4), [2])
    shapes = []
    with model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape))):
        scores = score_layers(model, None, "tasks", tasks=[task], tokenizer=tokenizer)
        report = evaluate_tasks(model, [task], tokenizer)
    assert shapes == [(2, 13)] * 2  # two prompts, not eight rows
    prepared = task.prepare(tokenizer)
    for student, cost in ((model, report.results["multiple_choice"].cost), (other, scores.values[2])):
        batch = prepared.chunks[0].batch
        logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
        last = batch["attention_mask"].sum(1) - 1
        likelihood = logits[range(8), last - 1, batch["input_ids"][range(8), last]].view(2, 4)
        assert cost == (likelihood.argmax(1) != torch.tensor([1, 3])).double().mean()


def test_tasks_after_repair(tokenizer, batches):
    model, tasks = tiny_model(5), [all_kinds()[2], all_kinds()[4]]
    scores = score_layers(model, batches, "tasks", tasks=tasks, tokenizer=tokenizer, compensation="least_squares")
    after = compensate(prune(model, [2]), batches, "least_squares", model)
    assert scores.values[2] == pytest.approx(evaluate_tasks(after, tasks, tokenizer).mean_cost, rel=1e-3)


def test_edits_that_run_layers_in_parallel_are_scored_by_tasks_too(tokenizer):
    model, tasks = tiny_model(5), all_kinds()[:3]
    edit = Edit.parallelize(2, 3)
    scores = score(model, None, [edit], "tasks", tasks=tasks, tokenizer=tokenizer)
    expected = evaluate_tasks(parallelize(model, [(2, 3)]), tasks, tokenizer).mean_cost
    assert scores.values[edit] == pytest.approx(expected, rel=1e-4)


def test_races_over_tasks(tokenizer):
    model = tiny_model(5)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.mul_(0)
        model.model.layers[2].mlp.down_proj.weight.mul_(0)
    rows = Dataset.from_dict({"q": [text for text in ROWS["q"] for _ in range(8)]})
    settings = {"text": "{q}", "max_length": 16}
    tasks = [KLTask(rows, name="kl", weight=4, **settings), PerplexityTask(rows, name="text", **settings)]
    prepared = [task.prepare(tokenizer, batch_size=4) for task in tasks]
    options = {"tasks": prepared, "tokenizer": tokenizer}
    full = score_layers(model, None, "tasks", **options)
    scores = score_layers(model, None, "tasks", race=Race(0.9), **options)
    assert scores.safest == full.safest == 2
    assert scores.dropped and 2 not in scores.dropped and all(share < 1 for share in scores.dropped.values())


def test_what_is_missing_is_said(tokenizer, model):
    with pytest.raises(LayerPruneError, match="needs the model's tokenizer"):
        score_layers(model, None, "tasks", tasks=all_kinds())
    with pytest.raises(LayerPruneError, match="no tasks"):
        score_layers(model, None, "tasks", tokenizer=tokenizer)
    with pytest.raises(LayerPruneError, match="two tasks are named 'choice'"):
        score_layers(model, None, "tasks", tasks=all_kinds()[:1] * 2, tokenizer=tokenizer)


def test_the_default_tasks_score_the_embedded_teacher():
    from hf_layerprune.loading import load_model, load_tokenizer

    tasks = load_tasks("default")
    for task in tasks:
        task.limit = 4
    scores = score_layers(
        load_model("embedded"), None, "tasks", layers=[0, 5], tasks=tasks, tokenizer=load_tokenizer("embedded")
    )
    assert scores.safest == 5 and scores.values[0] > scores.values[5] + 0.5


def test_tasks_of_another_tokenizer(model):
    task = PerplexityTask(ROWS, name="text", text="{q}", max_length=16)
    with pytest.raises(LayerPruneError, match="tokenizer"):
        score_layers(model, None, "tasks", tasks=[task], tokenizer=load_tokenizer("embedded"))
