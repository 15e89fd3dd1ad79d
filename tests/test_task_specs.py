"""Tasks by name: YAML files, presets, folders."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import yaml
from transformers import AutoTokenizer

from hf_layerprune import EMBEDDED_MODEL, LayerPruneError, embedded_dataset
from hf_layerprune.tasks import TASK_KINDS, MultipleChoiceTask, PerplexityTask, load_tasks

PAIRS = [{"sentence_good": "Who has he hugged?", "sentence_bad": "Who has hugged he?"}] * 3


def test_tasks_of_a_yaml_file(write, tokenizer):
    write("pairs.jsonl", PAIRS)
    items = [
        {
            "kind": "multiple_choice",
            "dataset": "pairs.jsonl",
            "weight": 2,
            "prompt": "",
            "choices": ["sentence_good", "sentence_bad"],
            "answer": "sentence_good",
        },
        {"kind": "perplexity", "dataset": "x/y"},
    ]
    pairs, text = load_tasks(write("mine.yaml", yaml.safe_dump(items)))
    assert isinstance(pairs, MultipleChoiceTask) and (pairs.name, pairs.weight) == ("pairs", 2)
    assert pairs.prepare(tokenizer).chunks[0].answers == (0, 0, 0)  # found next to the YAML file
    assert isinstance(text, PerplexityTask) and text.name == "y"


@pytest.mark.parametrize(
    "content, message",
    [
        ("a: [", "cannot be read as YAML"),
        ("kind: kl", "must be a list of tasks"),
        ("- kind: quiz", "task 1: kind 'quiz' is unknown"),
        ("- just text", "task 1: kind 'just text' is unknown"),
        ("- {kind: [kl], dataset: a}", r"task 1: kind \['kl'\] is unknown"),
        ("- {kind: {kl: 1}, dataset: a}", "task 1: kind {'kl': 1} is unknown"),
        ("[]", "must be a list of tasks"),
        ("- {kind: kl, dataset: a, limt: 3}", "task 1: kl has no setting limt; choose one of dataset, "),
        ("- {kind: kl}", "task 1: .*missing 1 required positional argument: 'dataset'"),
        ("- {kind: kl, dataset: a, limit: 0}", "task 1: task a: limit=0"),
        ("- {kind: kl, dataset: a, limit: ten}", "task 1: Field 'limit' with value 'ten' doesn't match any type"),
    ],
)
def test_a_mistake_in_a_yaml_file(write, content, message):
    with pytest.raises(LayerPruneError, match=message):
        load_tasks(write("mine.yaml", content))


def test_kinds_of_ones_own(write, monkeypatch):
    @dataclass(eq=False, kw_only=True)
    class HalfTask(PerplexityTask):
        kind: ClassVar[str] = "half"

    monkeypatch.setitem(TASK_KINDS, "half", HalfTask)
    (task,) = load_tasks(write("mine.yaml", "- {kind: half, dataset: x/y}"))
    assert isinstance(task, HalfTask) and task.measure == "perplexity"


def test_unknown_tasks():
    with pytest.raises(LayerPruneError, match="'nothing' must be a preset \\(default, paper\\)"):
        load_tasks("default,nothing")


def test_the_paper_tasks():
    tasks = load_tasks("paper")
    assert [task.name for task in tasks] == [
        "enMMLU", "ruMMLU", "treeway_abstractive", "cp_doc_ru", "cp_para_ru", "flores_en_ru", "flores_ru_en",
    ]  # fmt: skip
    assert all(task.num_few_shot == 5 and task.few_shot_split for task in tasks)  # test_recipes.py runs them


def test_the_default_tasks_prepare_with_the_embedded_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    prepared = {task.name: task.prepare(tokenizer) for task in load_tasks("default")}
    assert {name: task.statistic for name, task in prepared.items()} == {
        "perplexity": "nll", "kl": "kl", "minimal_pairs": "nll", "copy": "nll",
    }  # fmt: skip
    pairs = embedded_dataset("minimal_pairs")
    assert len(pairs) == 612 and len(set(pairs["UID"])) == 34
