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
from hf_layerprune.tasks.sources import read_rows

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


def excerpts():
    return tasks_on(*(DATA / name for name in ("logiqa.jsonl", "blimp.jsonl", "gsm8k.jsonl", "alice.txt")))


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
    scores = score_layers(teacher, None, "tasks", layers=[0, 5], tasks=excerpts(), tokenizer=tokenizer)
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
    return read_rows(str(path), "test", None)


def test_a_csv_row_is_named_by_the_line_it_starts_on(tmp_path):
    rows = rows_of(tmp_path, "a.csv", 'a,b\n\n"x\ny","say ""hi"""\r\n1,2\n')
    assert [row.values for row in rows] == [{"a": "x\ny", "b": 'say "hi"'}, {"a": "1", "b": "2"}]
    assert [row.where.rpartition(", ")[2] for row in rows] == ["line 3", "line 5"]


def test_a_chapter_fits_into_a_csv_cell(tmp_path):
    before = csv.field_size_limit()
    (row,) = rows_of(tmp_path, "a.csv", f'text\n"{"word, " * 50_000}"\n')
    assert len(row.values["text"]) == 300_000 and csv.field_size_limit() == before


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", 'a,b\n1,2\n"x" y,3\n', r"a.csv, the row that starts on line 3 is no CSV: ',' expected"),
        ("a.csv", 'a,b\n1,2\n"x,3\n4,5\n', "a.csv, the row that starts on line 3 is no CSV: unexpected end of data"),
        ("a.csv", 'a,b\n"1\n1",2\n3\n', "a.csv, line 4 has 1 cells, but the first line names 2"),
        ("a.csv", b"a\nx\n\xff\xfe\n", "a.csv, line 3 is no UTF-8: invalid start byte; save the file as UTF-8"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9t\xe9"}\n', "a.jsonl, line 2 is no UTF-8"),
        ("a.json", b'\xef\xbb\xbf[{"a": 1},\n{"a": "\xff"}]', "a.json, line 2 is no UTF-8"),
    ],
)
def test_a_broken_file_is_named_with_the_line(tmp_path, name, content, message):
    before = csv.field_size_limit()
    with pytest.raises(LayerPruneError, match=message) as error:
        rows_of(tmp_path, name, content)
    assert "\n" not in str(error.value) and csv.field_size_limit() == before


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    assert rows_of(tmp_path, "a.csv", b"\xef\xbb\xbfa\nx\n")[0].values == {"a": "x"}
    assert rows_of(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"a": 1}\n')[0].values == {"a": 1}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"question": "q", "choices": ["x", "y"], "answer": 0}\n\n{broken', "a.jsonl, line 3 is no JSON"),
        ("a.jsonl", "[1, 2]", "row 1 holds a int"),
        ("a.json", "[{]", "a.json is no JSON"),
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.csv", "question,answer\n", "a.csv is empty"),
        ("a.csv", "question,answer\nq\n", "a.csv, line 2 has 1 cells, but the first line names 2"),
        (
            "a.jsonl",
            [{"question": "q", "answer": 0}],
            "line 1: there is no column 'choices'; the columns are question",
        ),
        ("a.jsonl", [{"choices": ["x", "y"], "answer": 0}], "line 1.*prompt: there is no column 'question'"),
        ("a.jsonl", [{"question": "q", "choices": ["x", "y"], "answer": 2}], "answer 2 is none of the 2 choices"),
        ("a.jsonl", [{"question": "q", "choices": ["x", "y"], "answer": -1}], "answer -1 is none.*index 0..1"),
        ("a.jsonl", [{"question": "q", "choices": ["x", "y"], "answer": "E"}], "answer 'E' is none.*letter A..B"),
        ("a.jsonl", [{"question": "q", "choices": ["1", "0"], "answer": "1"}], "index or text; set answer_form"),
        ("a.jsonl", [{"question": "q", "choices": ["x", "y"], "answer": None}], "line 1: column 'answer' is empty"),
        ("a.jsonl", [{"question": "q", "choices": "xy", "answer": 0}], "must hold a list of two or more choices"),
        ("a.jsonl", [{"question": 3, "choices": ["x"], "answer": 0}], "must hold a list of two or more choices"),
        ("a.parquet", "no parquet", "a.parquet cannot be loaded"),
        ("a.pdf", "x", "file type '.pdf'"),
    ],
)
def test_a_mistake_in_the_data_is_one_clear_line(tokenizer, write, name, content, message):
    with pytest.raises(LayerPruneError, match=message) as error:
        MultipleChoiceTask(write(name, content)).prepare(tokenizer)
    assert str(error.value).startswith("task a: ") and name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, content, settings, message",
    [
        ("a.csv", "question,x,y,answer\nq,one,,0\n", {"choices": ("x", "y")}, "a.csv, line 2: choice 2 is empty"),
        ("a.jsonl", '{"question": "q", "choices": ["x", " "], "answer": 0}', {}, "line 1: choice 2 is empty"),
        ("a.jsonl", '{"question": "q", "choices": [NaN, "x"], "answer": 1}', {}, "line 1: choice 1 is empty"),
        ("a.jsonl", '{"question": NaN, "choices": ["x", "y"], "answer": 1}', {}, "line 1.*column 'question' is empty"),
        ("a.jsonl", '{"question": "q", "choices": ["x", "y"], "answer": NaN}', {}, "line 1.*column 'answer' is empty"),
        (
            "a.jsonl",
            '{"question": "q", "choices": {"label": "AB", "text": ["x", "y"]}, "answer": 1}',
            {},
            "line 1: column 'choices': 'label' holds 'AB', not a list",
        ),
    ],
)
def test_what_is_missing_is_no_text(tmp_path, tokenizer, name, content, settings, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(LayerPruneError, match=message):
        MultipleChoiceTask(tmp_path / name, **settings).prepare(tokenizer)


def test_missing_values_of_a_table(tmp_path, tokenizer):
    Dataset.from_dict({"text": [1.5, float("nan")]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(LayerPruneError, match="a.parquet, row 2: text: column 'text' is empty"):
        PerplexityTask(tmp_path / "a.parquet").prepare(tokenizer)


def test_labels_may_be_left_out(tmp_path, tokenizer):
    for choices in ({"text": ["x", "y"]}, {"text": ["x", "y"], "label": None}):
        (tmp_path / "a.jsonl").write_text(json.dumps({"question": "q", "choices": choices, "answer": "B"}))
        assert MultipleChoiceTask(tmp_path / "a.jsonl").prepare(tokenizer).chunks[0].answers == (1,)
