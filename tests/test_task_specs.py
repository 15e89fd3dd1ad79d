"""Tasks by name: YAML files, presets, folders."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import yaml
from transformers import AutoTokenizer

from hf_layerprune import EMBEDDED_MODEL, LayerPruneError, embedded_dataset
from hf_layerprune.tasks import MinimalPairsTask, PerplexityTask, load_tasks

PAIRS = [{"sentence_good": "Who has he hugged?", "sentence_bad": "Who has hugged he?"}] * 3


def test_tasks_of_a_yaml_file(write, tokenizer):
    write("pairs.jsonl", PAIRS)
    items = [
        {"kind": "minimal_pairs", "dataset": "pairs.jsonl", "weight": 2},
        {"kind": "perplexity", "dataset": "x/y"},
    ]
    pairs, text = load_tasks(write("mine.yaml", yaml.safe_dump(items)))
    assert isinstance(pairs, MinimalPairsTask) and (pairs.name, pairs.weight) == ("pairs", 2)
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
        ("- {kind: kl, dataset: a, limt: 3}", "task 1: limt unknown for kl; choose of dataset, name"),
        ("- {kind: kl}", "task 1: dataset=None"),
        ("- {kind: kl, dataset: a, limit: 0}", "task 1: task a: limit=0"),
        ("- {kind: kl, dataset: a}\n- {kind: kl, dataset: a}", "two tasks are named 'a'"),
    ],
)
def test_a_mistake_in_a_yaml_file(write, content, message):
    with pytest.raises(LayerPruneError, match=message):
        load_tasks(write("mine.yaml", content))


def test_kinds_of_ones_own(write):
    @dataclass(eq=False, kw_only=True)
    class HalfTask(PerplexityTask):
        kind: ClassVar[str] = "half"

    (task,) = load_tasks(write("mine.yaml", "- {kind: half, dataset: x/y}"))
    assert isinstance(task, HalfTask) and task.measure == "perplexity"


def test_unknown_tasks():
    with pytest.raises(LayerPruneError, match="'nothing' must be a preset \\(default, paper\\)"):
        load_tasks("default,nothing")
    with pytest.raises(LayerPruneError, match="there are no tasks"):
        load_tasks(" , ")
    with pytest.raises(LayerPruneError, match="'paper:nowhere': there is no folder nowhere"):
        load_tasks("paper:nowhere")
    with pytest.raises(LayerPruneError, match=r"there is no folder C:\\nowhere;"):
        load_tasks(r"paper:C:\nowhere")


def test_the_folder_and_the_file_may_hold_a_colon(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for drive in ("C:", "D:"):
        (tmp_path / drive).mkdir()
    write("D:/pairs.jsonl", PAIRS)
    write("C:/mine.yaml", "- {kind: minimal_pairs, name: pairs, dataset: x/y}")
    (task,) = load_tasks("C:/mine.yaml:D:")
    assert task.dataset == "D:/pairs.jsonl"
    (task,) = load_tasks("C:/mine.yaml")
    assert task.dataset == "x/y"


def test_the_paper_tasks_from_a_folder(write, tmp_path, tokenizer):
    tasks = load_tasks("paper")
    assert [task.name for task in tasks] == [
        "enMMLU", "ruMMLU", "treeway_abstractive", "cp_doc_ru", "cp_para_ru", "flores_en_ru", "flores_ru_en",
    ]  # fmt: skip
    assert all(task.num_few_shot == 5 for task in tasks)
    with pytest.raises(LayerPruneError, match=r"enMMLU.jsonl is missing; put the rows of RefalMachine/darumeru there"):
        load_tasks(f"paper:{tmp_path}")
    columns = {"question_en": "q", "choices_en": list("wxyz"), "question_ru": "в", "choices_ru": list("wxyz")}
    mmlu = [{"subject": "anatomy", "answer": number % 4} | columns for number in range(7)]
    rows = {
        "enMMLU": mmlu,
        "ruMMLU": mmlu,
        "treeway_abstractive": [{"src_sents": ["a b", "c"], "summary_sents": ["a"]}] * 7,
        "cp_doc_ru": [{"inputs": {"text": "Слово за слово"}}] * 7,
        "cp_para_ru": [{"inputs": {"text": "Слово"}}] * 7,
        "flores_en_ru": [{"inputs": {"en": "Good day", "ru": "Добрый день"}}] * 7,
        "flores_ru_en": [{"inputs": {"en": "Good day", "ru": "Добрый день"}}] * 7,
    }
    for name, content in rows.items():
        write(f"{name}.jsonl", content)
    write("flores_en_ru.few_shot.jsonl", rows["flores_en_ru"][:5])
    for task in load_tasks(f"paper:{tmp_path}"):
        count = sum(len(getattr(chunk, "sizes", None) or chunk.references) for chunk in task.prepare(tokenizer).chunks)
        assert count == (7 if task.name == "flores_en_ru" else 2)


def test_the_default_tasks_prepare_with_the_embedded_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    prepared = {task.name: task.prepare(tokenizer) for task in load_tasks("default")}
    assert {name: task.statistic for name, task in prepared.items()} == {
        "perplexity": "nll", "kl": "kl", "minimal_pairs": "nll", "copy": "nll",
    }  # fmt: skip
    pairs = embedded_dataset("minimal_pairs")
    assert len(pairs) == 612 and len(set(pairs["UID"])) == 34
