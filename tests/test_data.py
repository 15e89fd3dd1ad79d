import gzip
import json

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from datasets import Dataset, DatasetDict

from hf_layerprune import LayerPruneError, data, embedded_dataset, evaluate_model, score_layers
from hf_layerprune.data import check_batches, load_text_dataset, tokenized_batches, valid_next_tokens
from hf_layerprune.tasks import PerplexityTask, evaluate_tasks, prepare_tasks


def test_valid_next_tokens_needs_both_sides_and_a_label():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]]),
        "labels": torch.tensor([[5, 6, 7, -100], [-100, 6, 7, 8], [-100, -100, 7, -100]]),
    }
    valid, labels = valid_next_tokens(batch)
    assert valid.int().tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0]]
    assert labels.tolist() == [6, 7, 7, 8, 7]
    valid, labels = valid_next_tokens({"input_ids": batch["input_ids"][:1]})
    assert valid.int().tolist() == [[1, 1, 1, 0]] and labels.tolist() == [6, 7, 8]


def test_what_begins_another_document_follows_nothing(model):
    ids, positions = torch.randint(250, (1, 12)), torch.tensor([[0, 1, 2] * 4])
    packed = evaluate_model(model, [{"input_ids": ids, "position_ids": positions}])
    apart = evaluate_model(model, [{"input_ids": ids.view(4, 3)}])
    assert packed.num_tokens == apart.num_tokens == 8
    assert packed.loss == pytest.approx(apart.loss, rel=1e-5)


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    "beside, message",
    [
        ({"attention_mask": torch.ones(2, 2)}, r": attention_mask must be .* shape of input_ids, \(2, 3\)"),
        ({"attention_mask": [[1, 1, 1]] * 2}, ": attention_mask must be"),
        ({"labels": torch.ones(1, 3, dtype=torch.long)}, ": labels must be"),
        ({"labels": IDS + 300}, " holds token id 301"),
        ({"labels": IDS * 0 - 1}, " holds token id -1"),
    ],
)
def test_what_does_not_fit_the_token_ids_is_named(model, beside, message):
    for act in (evaluate_model, score_layers):
        with pytest.raises(LayerPruneError, match=f"batch 0{message}"):
            act(model, [{"input_ids": IDS} | beside])


def test_what_is_nothing_is_left_out(model):
    whole = evaluate_model(model, [{"input_ids": IDS}])
    empty = {"input_ids": torch.zeros(0, 3, dtype=torch.long)}
    given = [{"input_ids": IDS.int(), "attention_mask": None, "labels": None}, empty]
    assert evaluate_model(model, given).loss == pytest.approx(whole.loss)
    with pytest.raises(LayerPruneError, match="3 is not a list of batches"):
        evaluate_model(model, 3)


def test_batches_are_validated_once(model, monkeypatch):
    batches = check_batches([{"input_ids": IDS}], model.config.vocab_size)
    with monkeypatch.context() as patched:
        patched.setattr("hf_layerprune.data._checked", lambda *_: pytest.fail("validated again"))
        assert check_batches(batches, model.config.vocab_size) is batches
        evaluate_model(model, batches)
        score_layers(model, batches)
    with pytest.raises(LayerPruneError, match="token id 6"):
        check_batches(batches, 6)  # a smaller vocabulary than they were checked for


def test_batches_without_a_token_or_from_another_tokenizer_are_refused():
    for nothing in ([], None):
        with pytest.raises(LayerPruneError, match="no token to score"):
            check_batches(nothing, 10)
        assert check_batches(nothing, 10, required=False) == []
    with pytest.raises(LayerPruneError, match="no token to score"):
        check_batches([{"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[1, 0]])}], 10)
    with pytest.raises(LayerPruneError, match="token id 10.* 10 entries"):
        check_batches([{"input_ids": torch.tensor([[1, 10]])}], 10)


@pytest.mark.parametrize(
    "batches, what",
    [
        (embedded_dataset("held_out"), "a dict of text;"),
        (Dataset.from_dict({"input_ids": [[1, 2, 3]]}), "a dict of input_ids;"),
        ({"input_ids": torch.tensor([[1, 2, 3]])}, "a str;"),
        ([{"input_ids": torch.tensor([1, 2, 3])}], "a dict of input_ids;"),
        ([{"input_ids": torch.rand(2, 3)}], "a dict of input_ids;"),
        ([torch.tensor([[1, 2, 3]])], "a Tensor;"),
    ],
    ids=["data set", "tokenized data set", "one batch", "one row", "no integers", "bare tensor"],
)
def test_what_is_no_batches_is_refused_with_the_remedy(model, batches, what):
    for act in (evaluate_model, score_layers, lambda *given: score_layers(*given, compensation="least_squares")):
        with pytest.raises(LayerPruneError, match=f"batch 0 is {what}.* hf_layerprune.tokenized_batches"):
            act(model, batches)


def test_a_batch_is_validated_once(model, batches, tokenizer, monkeypatch):
    seen, check = [], data._checked
    monkeypatch.setattr(data, "_checked", lambda *args: seen.append(args) or check(*args))
    score_layers(model, batches, compensation="least_squares")
    assert len(seen) == len(batches)
    tasks = prepare_tasks([PerplexityTask(Dataset.from_list([{"text": "one row of text"}]))], model, tokenizer)
    seen.clear()
    evaluate_tasks(model, tasks, tokenizer)
    score_layers(model, None, "tasks", tasks=tasks, tokenizer=tokenizer)
    assert not seen
    with pytest.raises(LayerPruneError, match="holds token id"):
        evaluate_tasks(tiny_model(vocab_size=50, eos_token_id=49), tasks, tokenizer)


def test_embedded_texts():
    held_out, healing = embedded_dataset("held_out"), embedded_dataset("healing")
    assert len(held_out) > 500 and len(healing) > 3000
    assert not set(held_out["text"]) & set(healing["text"])
    with pytest.raises(LayerPruneError, match="no embedded text"):
        embedded_dataset("train")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])  # with a mark, as editors on Windows write
@pytest.mark.parametrize("suffix", ["txt", "json", "jsonl", "csv", "parquet"])
def test_local_files(tmp_path, suffix, encoding):
    texts = ["It was the best of times.", "It was the worst of times."]
    path = tmp_path / f"texts.{suffix}"
    if suffix == "txt":
        path.write_text("\n\n".join(texts), encoding)
    elif suffix in ("json", "jsonl"):
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding)
    elif suffix == "csv":
        path.write_text("text\n" + "\n".join(texts), encoding)
    else:
        Dataset.from_dict({"text": texts}).to_parquet(path)
    assert load_text_dataset(str(path))["text"] == texts
    assert load_text_dataset(str(path), "train[:1]")["text"] == texts[:1]


@pytest.mark.parametrize("name", ["a?b.jsonl", "a [1].jsonl", "A.JSONL", "a.arrow", "a.jsonl.gz"])
def test_a_file_is_read_whatever_its_name(tmp_path, name):
    rows, path = Dataset.from_dict({"text": ["one", "two"]}), tmp_path / name
    Dataset.from_dict({"text": ["another file"]}).to_json(tmp_path / "axb.jsonl")
    if name.endswith("arrow"):
        rows.save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(path)
    else:
        rows.to_json(str(path), compression="gzip" if name.endswith("gz") else None)
    assert load_text_dataset(str(path))["text"] == ["one", "two"]


@pytest.mark.parametrize("name", ["texts [1].csv", "texts.csv.gz"])
def test_a_csv_file_whose_rows_have_more_fields_than_columns_is_refused(tmp_path, name):
    path, write_bytes = tmp_path / name, gzip.compress if name.endswith("gz") else bytes
    path.write_bytes(write_bytes(b"text\nIt was the best of times, it was the worst\nOnce upon a time, there was\n"))
    with pytest.raises(LayerPruneError, match="rows have more fields than its header; put text with"):
        load_text_dataset(str(path))
    path.write_bytes(write_bytes(b"text,__index_level_0__\nIt was the best of times,7\n"))
    assert load_text_dataset(str(path))["text"] == ["It was the best of times"]


@pytest.mark.parametrize("source", ["", "*.csv", "*.csv.gz"])
def test_csv_files_of_a_folder_or_a_pattern_are_held_to_their_headers_too(tmp_path, source):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, write_bytes in (("a.csv", bytes), ("b.csv.gz", gzip.compress)):
        (folder / name).write_bytes(write_bytes(b"text\nIt was the best, it was the worst\nOnce upon, there was\n"))
    with pytest.raises(LayerPruneError, match="rows have more fields than its header; put text with"):
        load_text_dataset(str(folder / source))
    for name, write_bytes in (("a.csv", bytes), ("b.csv.gz", gzip.compress)):
        (folder / name).write_bytes(write_bytes(b"text,__index_level_0__\nIt was the best of times,7\n"))
    assert set(load_text_dataset(str(folder / source))["text"]) == {"It was the best of times"}


@pytest.mark.parametrize("kind", ["file", "Dataset", "DatasetDict", "embedded"])
def test_slices_of_splits(tmp_path, kind):
    rows = Dataset.from_dict({"text": [f"text {n}" for n in range(10)]})
    source = str(tmp_path / "texts")
    if kind == "file":
        source += ".jsonl"
        rows.to_json(source)
    elif kind == "embedded":
        source, rows = "embedded:held_out", embedded_dataset("held_out")
    else:
        (rows if kind == "Dataset" else DatasetDict({"train": rows, "test": rows})).save_to_disk(source)
    texts = list(rows["text"])
    assert load_text_dataset(source)["text"] == texts
    assert load_text_dataset(source, "train[:2]+train[-1:]")["text"] == texts[:2] + texts[-1:]
    assert load_text_dataset(source, "train[50%:]")["text"] == texts[round(len(texts) / 2) :]
    if kind == "DatasetDict":
        assert load_text_dataset(source, "test[:3]")["text"] == texts[:3]
        with pytest.raises(LayerPruneError, match='Unknown split "dev"'):
            load_text_dataset(source, "dev")
    else:
        assert load_text_dataset(source, "test")["text"] == texts  # a source with one split is read whole
        assert load_text_dataset(source, "test[:2]+test[-1:]")["text"] == texts[:2] + texts[-1:]


@pytest.mark.parametrize(
    "name, content", [("a.pdf", "x"), ("a.txt", ""), ("a.txt", "\n\n"), ("a.jsonl", "{broken"), ("missing.txt", None)]
)
def test_what_is_no_data_set_is_refused_in_one_line(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(LayerPruneError) as error:
        load_text_dataset(str(tmp_path / name))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_bytes_that_are_not_utf_8_are_named_with_their_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff\xfe"}\n')
    with pytest.raises(LayerPruneError, match="a.jsonl cannot be loaded: line 2 is not UTF-8: invalid start byte"):
        load_text_dataset(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    "name, content, line",
    [("a.jsonl", '{"text": "a"}\n\n{"text":\n', 3), ("a.json", '[{"text": "a"},\n {"text" "b"}]', 2)],
)
def test_json_that_is_broken_is_named_once_with_its_line(tmp_path, capsys, name, content, line):
    (tmp_path / name).write_text(content)
    with pytest.raises(LayerPruneError, match=f"{name} cannot be loaded: line {line} is not valid JSON"):
        load_text_dataset(str(tmp_path / name))
    assert "JSON" not in capsys.readouterr().err


def test_tokenized_batches_are_full_rows(tokenizer):
    rows = [{"text": "abc"}, {"text": "defgh"}] * 20
    batches = tokenized_batches(rows, tokenizer, max_length=16, num_rows=5, batch_size=2)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 16), (2, 16), (1, 16)]
    assert tokenizer.decode(batches[0]["input_ids"][0], skip_special_tokens=True) == "abcdefghabcde"
    (batch,) = tokenized_batches(iter(rows), tokenizer, max_length=16, num_rows=1)
    assert torch.equal(batch["input_ids"], batches[0]["input_ids"][:1])
    with pytest.raises(LayerPruneError, match="less than one row"):
        tokenized_batches(rows, tokenizer, max_length=1000)
    with pytest.raises(LayerPruneError, match="no text; name the text column .*'content'"):
        tokenized_batches(rows, tokenizer, text_field="content")
    with pytest.raises(LayerPruneError, match="must be positive"):
        tokenized_batches(rows, tokenizer, num_rows=0)


@pytest.mark.parametrize("kind, positions", [("llama3", 256), ("yarn", 512), ("linear", 512)])
def test_a_model_has_the_positions_that_its_kind_of_scaling_gives(kind, positions):
    """Llama 3.2 has 131,072, not its factor of 32 times the original 8,192: that is of wavelengths."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    config = tiny_model(1, rope_parameters=rope).config
    data.check_length(positions, config, "it")
    with pytest.raises(LayerPruneError, match=f"it has {positions} positions"):
        data.check_length(positions + 1, config, "it")


@pytest.mark.parametrize("data", [DatasetDict({"train": Dataset.from_list([{"text": "a"}])}), ["a text"]])
def test_rows_of_the_wrong_kind_are_named(data):
    with pytest.raises(LayerPruneError, match="the data is a .*; give one datasets.Dataset"):
        tokenized_batches(data, byte_tokenizer())
