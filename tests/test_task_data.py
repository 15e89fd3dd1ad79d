"""Tasks on real files: rows of them in `data/`, and the whole ones where LAYERPRUNE_DATA names their folder."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from task_reference import nll

from hf_layerprune import LayerPruneError
from hf_layerprune.loading import load_model, load_tokenizer
from hf_layerprune.tasks import (
    GenerationTask,
    MultipleChoiceTask,
    PerplexityTask,
    evaluate_tasks,
)

DATA = Path(__file__).parent / "data"
CHOICE = {
    "prompt": "{passage}\n{question}\nAnswer:",
    "choices": "options",
    "answer": "label",
    "normalize": "tokens",
}
PAIRS = {"prompt": "", "choices": ("sentence_good", "sentence_bad"), "answer": "sentence_good", "choice": "{choice}"}
COPY = {"prompt": "{text}\n", "reference": "{text}", "metric": "prefix", "max_new_tokens": 8}
WRITTEN = {"prompt": "Question: {question}\nAnswer:", "after": "####", "max_new_tokens": 8, "num_few_shot": 1}


@pytest.fixture(scope="module")
def teacher():
    return load_model("embedded")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


def tasks_on(choice, pairs, written, text, limit=None):
    """One of every kind that a real file is for."""
    return [
        MultipleChoiceTask(choice, name="choice", limit=limit, **CHOICE),
        MultipleChoiceTask(pairs, name="pairs", limit=limit, **PAIRS),
        GenerationTask(written, name="written", limit=limit, **WRITTEN),
        PerplexityTask(text, name="text", max_length=128, limit=limit),
        GenerationTask(text, name="copy", limit=limit, **COPY),
    ]


def excerpts(limit=None):
    files = (DATA / name for name in ("logiqa.jsonl", "blimp.jsonl", "gsm8k.jsonl", "alice.txt"))
    return tasks_on(*files, limit)


def test_the_embedded_teacher_on_rows_of_every_kind(teacher, tokenizer):
    results = evaluate_tasks(teacher, excerpts(), tokenizer).results
    counts = {name: result.num_examples for name, result in results.items()}
    assert counts | {"text": 0} == {"choice": 6, "pairs": 17, "written": 3, "text": 0, "copy": 8}
    right = 0
    for line in (DATA / "blimp.jsonl").read_text().splitlines():
        row = json.loads(line)
        right += nll(teacher, tokenizer, "", row["sentence_good"]) < nll(teacher, tokenizer, "", row["sentence_bad"])
    assert results["pairs"].quality == pytest.approx(right / 17) and right > 17 / 2
    assert results["written"].quality == 0  # arithmetic is beyond it
    assert 4 < results["text"].quality < 100  # perplexity, of a book it was trained on
    assert 0 < results["copy"].cost <= 1


@pytest.mark.skipif("LAYERPRUNE_DATA" not in os.environ, reason="LAYERPRUNE_DATA names no folder of whole data sets")
def test_the_embedded_teacher_on_whole_files(teacher, tokenizer):
    folder = Path(os.environ["LAYERPRUNE_DATA"])
    names = ("agieval/logiqa-en.jsonl", "blimp/blimp_half.jsonl", "gsm8k/test.jsonl", "wikitext2/validation.txt")
    reading = MultipleChoiceTask(folder / "agieval/sat-en.jsonl", name="reading", limit=6, **CHOICE)
    results = evaluate_tasks(teacher, [*tasks_on(*(folder / n for n in names), 6), reading], tokenizer).results
    assert all(result.num_examples == 6 and math.isfinite(result.quality) for result in results.values())


def test_formats_hold_the_same_rows(tmp_path, tokenizer):
    rows = [json.loads(line) for line in (DATA / "blimp.jsonl").read_text().splitlines()]
    dataset = Dataset.from_list(rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    dataset.to_csv(tmp_path / "rows.csv")
    dataset.to_parquet(tmp_path / "rows.parquet")
    expected = MultipleChoiceTask(DATA / "blimp.jsonl", **PAIRS).prepare(tokenizer)
    for source in (dataset, *tmp_path.iterdir()):
        chunks = MultipleChoiceTask(source, **PAIRS).prepare(tokenizer).chunks
        for chunk, other in zip(chunks, expected.chunks, strict=True):
            assert torch.equal(chunk.batch["input_ids"], other.batch["input_ids"])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "question,answer\n", "task a: dataset .*a.csv"),
        ("a.jsonl", "{broken", "task a: dataset .*a.jsonl cannot be loaded"),
        ("a.pdf", "x", "task a: .*its type '.pdf' is not one of"),
        ("a.csv", "question,x,y,answer\nq,one,,0\n", "task a: row 1: column 'y' is empty"),
    ],
)
def test_a_broken_file_is_one_clear_line(tokenizer, write, name, content, message):
    with pytest.raises(LayerPruneError, match=f"^{message}") as error:
        MultipleChoiceTask(write(name, content), choices=("x", "y")).prepare(tokenizer)
    assert "\n" not in str(error.value)
