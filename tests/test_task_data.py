"""Tasks on real files: rows of them in `data/`, and the whole ones where LAYERPRUNE_DATA names their folder; and on
files that are broken."""

import csv
import json
import math
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from task_reference import nll

from hf_layerprune import LayerPruneError, score_layers
from hf_layerprune.loading import load_model, load_tokenizer
from hf_layerprune.tasks import (
    CopyTask,
    GenerationTask,
    MinimalPairsTask,
    MultipleChoiceTask,
    PerplexityTask,
    evaluate_tasks,
)
from hf_layerprune.tasks.rows import read_rows

DATA = Path(__file__).parent / "data"
CHOICE = {
    "prompt": "{passage}\n{question}\nAnswer:",
    "choices": "options",
    "answer": "label",
    "normalize": "tokens",
}
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
        MinimalPairsTask(pairs, name="pairs", limit=limit),
        GenerationTask(written, name="written", limit=limit, **WRITTEN),
        PerplexityTask(text, name="text", max_length=128, limit=limit),
        CopyTask(text, name="copy", max_words=8, limit=limit),
    ]


def excerpts(limit=None):
    files = (DATA / name for name in ("logiqa.jsonl", "blimp.jsonl", "gsm8k.jsonl", "alice.txt"))
    return tasks_on(*files, limit)


def test_the_embedded_teacher_on_rows_of_every_kind(teacher, tokenizer):
    results = evaluate_tasks(teacher, excerpts(), tokenizer).results
    counts = {name: result.num_examples for name, result in results.items()}
    assert counts | {"text": 0} == {"choice": 6, "pairs": 17, "written": 3, "text": 0, "copy": 8}
    right = 0
    for line in (DATA / "logiqa.jsonl").read_text().splitlines():
        row = json.loads(line)
        costs = [
            nll(teacher, tokenizer, CHOICE["prompt"].format(**row), f" {text}")
            / len(tokenizer(f" {text}")["input_ids"])
            for text in row["options"]
        ]
        right += costs.index(min(costs)) == "ABCD".index(row["label"])
    assert results["choice"].quality == pytest.approx(right / 6)
    right = 0
    for line in (DATA / "blimp.jsonl").read_text().splitlines():
        row = json.loads(line)
        right += nll(teacher, tokenizer, "", row["sentence_good"]) < nll(teacher, tokenizer, "", row["sentence_bad"])
    assert results["pairs"].quality == pytest.approx(right / 17) and right > 17 / 2
    assert results["written"].quality == 0  # arithmetic is beyond it
    assert 4 < results["text"].quality < 100  # perplexity, of a book it was trained on
    assert 0 < results["copy"].cost <= 1


def test_layers_are_scored_by_real_rows(teacher, tokenizer):
    scores = score_layers(teacher, None, "tasks", layers=[0, 5], tasks=excerpts(limit=2), tokenizer=tokenizer)
    assert scores.safest == 5 and all(math.isfinite(value) for value in scores.values.values())
    choice = excerpts()[:1]
    scores = score_layers(teacher, None, "tasks", layers=[0, 5], tasks=choice, tokenizer=tokenizer)
    assert all(round(6 * value) / 6 == pytest.approx(value) for value in scores.values.values())


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
    expected = MinimalPairsTask(DATA / "blimp.jsonl").prepare(tokenizer)
    for source in (dataset, *tmp_path.iterdir()):
        chunks = MinimalPairsTask(source).prepare(tokenizer).chunks
        for chunk, other in zip(chunks, expected.chunks, strict=True):
            assert torch.equal(chunk.batch["input_ids"], other.batch["input_ids"])


# ------------------------------------------------------------------------------------------------ broken files


def rows_of(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_rows(path, "test", None, "task a")


def test_cells_of_a_csv_file_stay_as_they_are(tmp_path):
    before = csv.field_size_limit()
    chapter = "word, " * 50_000
    rows = rows_of(tmp_path, "a.csv", f'\ufeffa,b\n\n"x\ny","say ""hi"""\r\n3.10,NA\n"{chapter}",\n')
    assert [row.values for row in rows] == [
        {"a": "x\ny", "b": 'say "hi"'}, {"a": "3.10", "b": "NA"}, {"a": chapter, "b": ""},
    ]  # fmt: skip
    assert rows[1].where == f"task a: {tmp_path / 'a.csv'}, row 2" and csv.field_size_limit() == before


def test_columns_of_json_may_be_of_several_types_and_nested(tmp_path):
    lines = b'\xef\xbb\xbf{"a": 1, "b": {"c": "x"}}\n\n{"a": "B"}\n'
    rows = rows_of(tmp_path, "a.jsonl", lines)
    assert [row.values for row in rows] == [{"a": 1, "b": {"c": "x"}, "b_c": "x"}, {"a": "B"}]
    assert [row.values for row in rows_of(tmp_path, "a.json", '[{"a": 1}]')] == [{"a": 1}]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", 'a,b\n1,2\n"x" y,3\n', "a.csv cannot be read: after line 2: ',' expected after"),
        ("a.csv", 'a,b\n1,2\n"x,3\n4,5\n', "a.csv cannot be read: after line 2: unexpected end of data"),
        ("a.csv", "a,b\n1,2,3\n", "a.csv, row 1 has more cells than the first line; quote cells that hold commas"),
        ("a.csv", b"a\nx\n\xff\xfe\n", "a.csv cannot be read: 'utf-8' codec can't decode byte 0xff"),
        ("a.csv", "question,answer\n", "dataset .*a.csv is empty"),
        ("a.jsonl", '{"a": 0}\n\n{broken', "a.jsonl cannot be read: line 3: Expecting property name"),
        ("a.jsonl", "3", "a.jsonl, row 1 holds a int; write an object with named columns"),
        ("a.json", "[{]", "a.json cannot be read: Expecting property name"),
        ("a.jsonl", "", "dataset .*a.jsonl is empty"),
        ("a.parquet", "no parquet", "a.parquet cannot be loaded"),
        ("a.pdf", "x", "its type '.pdf' is not one of"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, message):
    with pytest.raises(LayerPruneError, match=f"^task a: .*{message}") as error:
        rows_of(tmp_path, name, content)
    assert "\n" not in str(error.value)


QUESTION = {"question": "q", "choices": ["x", "y"], "answer": 0}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"choices": ...}, "row 1: there is no column 'choices'; the columns are question"),
        ({"question": ...}, "row 1: there is no column 'question'"),
        ({"question": math.nan}, "row 1: column 'question' is empty"),
        ({"answer": 2}, "answer 2 is none of the 2 choices"),
        ({"answer": -1}, "answer -1 is none.*index 0..1"),
        ({"answer": "E"}, "answer 'E' is none.*letter A..B"),
        ({"answer": None}, "row 1: column 'answer' is empty"),
        ({"answer": math.nan}, "row 1: column 'answer' is empty"),
        ({"choices": ["1", "0"], "answer": "1"}, "index or text; set answer_form"),
        ({"choices": "xy"}, "must hold a list of choices"),
        ({"choices": ["x"]}, "1 choices with 1 labels; give 2 to 26 choices"),
        ({"choices": ["x"] * 27}, "27 choices with 26 labels"),
        ({"choices": ["x", " "]}, "row 1: choice 2 is empty"),
        ({"choices": [math.nan, "x"]}, "row 1: choice 1 is empty"),
        ({"choices": {"label": ["A"], "text": ["x", "y"]}}, "2 choices with 1 labels"),
    ],
)
def test_a_mistake_in_a_row_is_one_clear_line(tokenizer, write, changes, message):
    row = {name: value for name, value in (QUESTION | changes).items() if value is not ...}
    with pytest.raises(LayerPruneError, match=message) as error:
        MultipleChoiceTask(write("a.jsonl", [row])).prepare(tokenizer)
    assert str(error.value).startswith("task a: ") and "a.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_an_empty_cell_has_no_choice(tokenizer, write):
    path = write("a.csv", "question,x,y,answer\nq,one,,0\n")
    with pytest.raises(LayerPruneError, match="a.csv, row 1: choice 2 is empty"):
        MultipleChoiceTask(path, choices=("x", "y")).prepare(tokenizer)


def test_missing_values_of_a_table(tmp_path, tokenizer):
    Dataset.from_dict({"text": [1.5, float("nan")]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(LayerPruneError, match="a.parquet, row 2: column 'text' is empty"):
        PerplexityTask(tmp_path / "a.parquet").prepare(tokenizer)


def test_labels_may_be_left_out(tokenizer, write):
    for choices in ({"text": ["x", "y"]}, {"text": ["x", "y"], "label": None}):
        path = write("a.jsonl", [{"question": "q", "choices": choices, "answer": "B"}])
        assert MultipleChoiceTask(path).prepare(tokenizer).chunks[0].answers == (1,)
