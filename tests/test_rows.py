"""What counts of a row, in healing and in measuring: no padding, and no prompt of a completion."""

import pytest
from conftest import rounds_of, tiny_config, tiny_model
from datasets import Dataset, Features, Json, List, Value

from hf_layerprune import IterativeLayerDistillTrainer, LayerPruneError, evaluate_model, tokenized_batches
from hf_layerprune.rows import select_text_column

TEXTS = [f"{n} times it was the best of times." for n in range(10)]
PAIR = {"prompt": "Which times?", "completion": "The best."}


@pytest.fixture
def trainer_of(tmp_path, tokenizer):
    def build(train, folder="run", eval_dataset=None, calibration_dataset=None, **changes):
        return IterativeLayerDistillTrainer(
            model=tiny_model(),
            args=tiny_config(tmp_path / folder, **{"packing": False, "target_num_layers": 4} | changes),
            train_dataset=train,
            eval_dataset=eval_dataset,
            calibration_dataset=calibration_dataset,
            processing_class=tokenizer,
        )

    return build


def test_the_column_that_is_blank_is_the_one_that_is_named():
    for column in PAIR:
        with pytest.raises(LayerPruneError, match=f"^mine: column '{column}' holds no text, only blank rows$"):
            select_text_column(Dataset.from_list([PAIR | {column: ""}] * 2), "text", "mine")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_tokenized_rows_changes_nothing(trainer_of, tokenizer, side):
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    width = 40  # more than max_length, so that what is cut is padding
    padded = []
    for ids in rows:
        pad = width - len(ids)
        before, after = (pad, 0) if side == "left" else (0, pad)
        padded.append({
            "input_ids": [7] * before + ids + [7] * after,
            "attention_mask": [0] * before + [1] * len(ids) + [0] * after,
            "labels": [-100] * (before + 3) + ids[3:] + [-100] * after,
        })  # fmt: skip
    bare = Dataset.from_list([{"input_ids": ids, "labels": [-100] * 3 + ids[3:]} for ids in rows])
    padded = Dataset.from_list(padded)
    runs = []
    for name, data in (("bare", bare), ("padded", padded), ("stream", padded.to_iterable_dataset())):
        trainer = trainer_of(data, name, eval_dataset=data, calibration_dataset=data)
        trainer.train()
        record = rounds_of(trainer)[0]
        runs.append([*record["scores"].values(), record["loss"], trainer.evaluate(data)["eval_loss"]])
        measured = evaluate_model(tiny_model(), tokenized_batches(data, tokenizer, max_length=32, num_rows=4))
        runs[-1] += [trainer.run.teacher.quality.loss - measured.loss, record["train_tokens"]]
    assert runs[1] == pytest.approx(runs[0], abs=1e-4) and runs[2][:5] == pytest.approx(runs[0][:5], abs=1e-4)


@pytest.mark.parametrize("streaming", [False, True])
def test_parts_of_text_are_read_as_text(streaming):
    plain = [{"role": "user", "content": "Which times?"}, {"role": "assistant", "content": "The best."}]
    parts = [turn | {"content": [{"type": "text", "text": part} for part in turn["content"]]} for turn in plain]
    shared = [{"from": "human", "value": ["Which ", "times?"]}, {"from": "gpt", "value": "The best."}]
    mixed = Features({"messages": List({"role": Value("string"), "content": Json()})})
    of_shared = Features({"conversations": List({"from": Value("string"), "value": Json()})})
    for rows in (
        Dataset.from_list([{"messages": parts}] * 2),
        Dataset.from_list([{"messages": plain}, {"messages": parts}], features=mixed),
        Dataset.from_list([{"conversations": shared}] * 2, features=of_shared),
    ):
        rows = rows.to_iterable_dataset() if streaming else rows
        assert [row["messages"] for row in select_text_column(rows, "text", "rows")] == [plain, plain]
    seen = Dataset.from_list([{"messages": [{"role": "user", "content": [{"type": "image", "text": None}]}]}])
    with pytest.raises(LayerPruneError, match="rows: a message holds .*image.*, which is not text"):
        select_text_column(seen.to_iterable_dataset() if streaming else seen, "text", "rows")


@pytest.mark.parametrize("packing", [False, True])
def test_rows_whose_prompt_fills_max_length_are_counted(trainer_of, tokenizer, caplog, packing):
    rows = Dataset.from_list([PAIR, PAIR | {"prompt": "Why? " * 20}] * 4)
    how = {"packing": packing, "packing_strategy": "bfd", "max_length": 32, "heal": False}
    trainer = trainer_of(rows, **how)
    assert "train data: 4 of 8 rows have no token to score within max_length=32 and are left out" in caplog.text
    trained = sum(len(row.get("seq_lengths", [0])) for row in trainer.train_dataset)
    caplog.clear()
    (batch,) = tokenized_batches(rows, tokenizer, max_length=32, num_rows=8)
    assert trained == len(batch["input_ids"]) == 4 and "the data: 4 of 8 rows have no token to score" in caplog.text
    with pytest.raises(LayerPruneError, match="train data: 8 of 8 rows .* max_length=12; raise it, or shorten"):
        trainer_of(rows, "none", **how | {"max_length": 12})
    with pytest.raises(LayerPruneError, match="the data: 8 of 8 rows .* max_length=12; raise it, or shorten"):
        tokenized_batches(rows, tokenizer, max_length=12)


def test_prompts_count_in_no_data_set_that_has_completions(trainer_of, tokenizer):
    text, pairs = Dataset.from_dict({"text": TEXTS}), Dataset.from_list([PAIR] * 4)
    trainer = trainer_of(text, eval_dataset=pairs, heal=False)
    labels = trainer.eval_batches[0]["labels"][0]
    assert tokenizer.decode(labels[labels != -100], skip_special_tokens=True) == "The best."
    assert (trainer.calibration_batches[0]["labels"][0] != -100).all()
