"""What TRL can make text of is taken; what it would stumble over is put right or told."""

import pytest
import torch
from conftest import END, byte_tokenizer, rounds_of, tiny_config, tiny_model
from datasets import Dataset, IterableDataset

from hf_layerprune import (
    IterativeLayerDistillTrainer,
    LayerPruneError,
    load_model,
    prune,
    tokenized_batches,
)
from hf_layerprune.rows import select_text_column

TEXT, TURNS = "It was the best of times.", [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
FORMS = {
    "text": {"text": TEXT},
    "text and the prompt it was written by": {"prompt": "Write!", "text": TEXT, "score": 3},  # as in cosmopedia
    "messages": {"messages": TURNS},
    "messages and their prompt": {"prompt": "Hi", "prompt_id": "1", "messages": TURNS},  # as in ultrachat_200k
    "prompt and completion": {"prompt": "Hi", "completion": "Ho"},
    "prompt, completion and text": {"prompt": "Hi", "completion": "Ho", "text": TEXT},
    "conversational prompt and completion": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    "conversations of messages": {"conversations": TURNS},
    "text with labels of its own": {"text": TEXT, "labels": "fiction", "input_ids": "no ids"},
    "text rendered from messages": {"text": "<user>Hi", "messages": TURNS},
    "no text beside messages": {"text": None, "messages": TURNS},
    "token ids": {"input_ids": list(range(20))},
}
ALL_TURNS = "<user>Hi\n<assistant>Ho\n"
READ = {  # what is read, and what of it the loss is on
    "messages": (ALL_TURNS, ALL_TURNS),
    "messages and their prompt": (ALL_TURNS, ALL_TURNS),
    "prompt and completion": ("HiHo", "Ho"),
    "prompt, completion and text": ("HiHo", "Ho"),
    "conversational prompt and completion": (ALL_TURNS, "<assistant>Ho\n"),
    "ShareGPT": (ALL_TURNS, ALL_TURNS),
    "conversations of messages": (ALL_TURNS, ALL_TURNS),
    "text rendered from messages": (ALL_TURNS, ALL_TURNS),
    "no text beside messages": (ALL_TURNS, ALL_TURNS),
}


def tokens_and_labels(batches: list[dict]) -> list[tuple[int, int]]:
    """Every token that is no padding, and its label."""
    return [
        (int(token), int(label))
        for batch in batches
        for token, label, kept in zip(
            *(batch.get(key, batch["input_ids"]).flatten() for key in ("input_ids", "labels")),
            batch["attention_mask"].flatten(),
            strict=True,
        )
        if kept
    ]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_scored_and_healed(tmp_path, form, streaming):
    rows, tokenizer = Dataset.from_list([FORMS[form]] * 8), byte_tokenizer()
    tokenizer.chat_template = CHAT
    args = tiny_config(tmp_path, packing=False, target_num_layers=4, max_steps=1, measure_speed=False)
    given = rows.to_iterable_dataset() if streaming else rows
    trainer = IterativeLayerDistillTrainer(
        model=tiny_model(), args=args, train_dataset=given, eval_dataset=given, processing_class=tokenizer
    )
    measured = tokens_and_labels(tokenized_batches(given, tokenizer, max_length=32, num_rows=3))
    assert measured == tokens_and_labels(trainer.eval_batches)[: len(measured)]  # texts are packed, chats are not
    if form != "token ids":
        batch = trainer.eval_batches[0]
        ids, labels = batch["input_ids"][0], batch.get("labels", batch["input_ids"])[0]
        read = [tokenizer.decode(part, skip_special_tokens=True) for part in (ids, ids[labels != -100])]
        assert tuple(read) == READ.get(form, (TEXT, TEXT))
    trainer.train()
    assert rounds_of(trainer)[0]["train_tokens"] > 0
    whole = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("row", [{"prompt": "Hi"}, {"instruction": "Hi", "output": "Ho"}, {"completion": "Ho"}])
def test_columns_without_text_are_named(row):
    for rows in (Dataset.from_list([row]), IterableDataset.from_generator(lambda: iter([row]))):
        with pytest.raises(LayerPruneError, match=f"train_dataset has columns .*{list(row)[0]}.* but no text"):
            select_text_column(rows, "text", "train_dataset")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "form", ["text", "messages", "prompt and completion", "ShareGPT", "conversations of messages"]
)
def test_blank_rows_do_no_harm(form, streaming):
    row = FORMS[form]
    column = list(row)[-1]
    blank = [row | {column: None}, row | {column: "  " if isinstance(row[column], str) else []}]
    for rows, left in (([blank[0], row, blank[1], row], 2), (blank, 0)):
        dataset = Dataset.from_list(rows)
        dataset = dataset.to_iterable_dataset() if streaming else dataset
        if left:
            expected = {"messages": TURNS} if column == "conversations" else row
            assert list(select_text_column(dataset, "text", "train_dataset")) == [expected] * left
            continue
        with pytest.raises(LayerPruneError, match=f"train_dataset: .*'{column}' holds no text, only blank rows"):
            select_text_column(dataset, "text", "train_dataset")


@pytest.mark.parametrize(
    "row", [{"prompt": "p", "completion": "c"}, {"messages": TURNS}, {"conversations": TURNS}], ids="+".join
)
def test_a_column_of_text_that_is_named_is_the_one_that_counts(row):
    rows = select_text_column(Dataset.from_list([row | {"body": TEXT, "text": "other"}]), "body", "train_dataset")
    assert rows.column_names == ["body"]


def test_a_chat_template_is_needed_to_tell_who_speaks(tmp_path):
    rows, args = Dataset.from_list([{"messages": TURNS}] * 4), tiny_config(tmp_path, assistant_only_loss=True)
    with pytest.raises(LayerPruneError, match="assistant_only_loss needs a chat template; name one"):
        IterativeLayerDistillTrainer(tiny_model(), args, rows, processing_class=byte_tokenizer())


def test_a_row_that_the_chat_template_refuses_is_one_line(tmp_path):
    rows, tokenizer = Dataset.from_list([{"messages": [{"role": "system", "content": "Hi"}]}] * 4), byte_tokenizer()
    refusal = "raise_exception('no system') if m['role'] == 'system'"
    tokenizer.chat_template = "{% for m in messages %}{{ 'said: ' + m['content'] }}{{ " + refusal + " }}{% endfor %}"
    message = "a row does not fit the chat template: no system"
    with pytest.raises(LayerPruneError, match=message):
        tokenized_batches(rows, tokenizer, max_length=32)
    with pytest.raises(LayerPruneError, match=message):
        IterativeLayerDistillTrainer(tiny_model(), tiny_config(tmp_path), rows, processing_class=tokenizer)


@pytest.mark.parametrize(
    "row, column",
    [
        ({"messages": [{"rol": "user", "content": "Hi"}]}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"prompt": 1, "completion": 2}, "prompt"),
        ({"prompt": "Hi", "completion": TURNS}, "completion"),
    ],
)
def test_rows_that_cannot_be_read_are_named(row, column):
    with pytest.raises(LayerPruneError, match=f"train_dataset has .* in column '{column}', which is not"):
        select_text_column(Dataset.from_list([row]), "text", "train_dataset")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "good, bad, column",
    [
        ({"messages": TURNS}, {"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"prompt": TURNS, "completion": TURNS}, {"prompt": TURNS, "completion": [{"role": "user"}]}, "completion"),
    ],
)
def test_a_bad_row_after_good_ones_is_named(good, bad, column, streaming):
    dataset = Dataset.from_list([good, good, bad])
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    with pytest.raises(LayerPruneError, match=f"train_dataset has .* in column '{column}', which is not a list of"):
        list(select_text_column(dataset, "text", "train_dataset"))


def test_what_is_no_data_set_is_named():
    for given, kind in (([{"text": TEXT}], "list"), ({"a": Dataset.from_list([{"text": TEXT}])}, "dict")):
        with pytest.raises(LayerPruneError, match=f"eval_dataset is a {kind}; give one datasets.Dataset"):
            select_text_column(given, "text", "eval_dataset")


def test_arguments_that_would_change_nothing_are_refused(tmp_path):
    given = {"args": tiny_config(tmp_path), "processing_class": byte_tokenizer(), "compute_metrics": print}
    with pytest.raises(TypeError, match="compute_metrics"):
        IterativeLayerDistillTrainer(tiny_model(), train_dataset=Dataset.from_list([{"text": TEXT}] * 20), **given)


def test_a_stream_needs_a_number_of_steps(tmp_path):
    rows = Dataset.from_list([{"text": TEXT}] * 20).to_iterable_dataset()
    with pytest.raises(LayerPruneError, match="max_steps has to be specified"):
        IterativeLayerDistillTrainer(
            tiny_model(), tiny_config(tmp_path, max_steps=-1), rows, processing_class=byte_tokenizer()
        )


def test_a_student_from_disk_shares_what_is_the_teachers(tmp_path, healings):
    teacher, rows = tiny_model(6), Dataset.from_list([{"text": TEXT * 3}] * 20)
    for name, model in (("teacher", teacher), ("student", prune(teacher, [4]))):
        model.save_pretrained(tmp_path / name)
    trainer = IterativeLayerDistillTrainer(
        load_model(str(tmp_path / "student")),
        tiny_config(tmp_path / "out", target_num_layers=4, criterion="tail", trained_layers="neighbours", max_steps=1),
        rows,
        processing_class=byte_tokenizer(),
        teacher=str(tmp_path / "teacher"),
    )
    trainer.train()
    assert healings[-1].shared_depth == 3  # of 5: the last went, and the one before it is trained


def test_data_sets_in_other_forms(tmp_path):
    rows = Dataset.from_list([{"text": TEXT, "k": 1}] * 3)
    for form in ({"type": "torch", "columns": ["k"]}, {"type": "arrow"}, {"type": "numpy"}):
        assert select_text_column(rows.with_format(**form), "text", "train_dataset")[0] == {"text": TEXT}
    ids = Dataset.from_list([{"input_ids": [1, 2, 3]}] * 3).with_format("torch")
    assert select_text_column(ids, "text", "train_dataset").column_names == ["input_ids"]
    for rows in (IterableDataset.from_generator(lambda: iter([])), Dataset.from_dict({"conversations": []})):
        try:
            select_text_column(rows, "text", "train_dataset")
        except LayerPruneError as error:
            assert "no text" in str(error)


@pytest.mark.parametrize("field", ["prompt", "messages"])
def test_a_text_field_that_is_read_otherwise_is_refused(field):
    with pytest.raises(LayerPruneError, match=f"dataset_text_field='{field}'.* rename that column"):
        select_text_column(Dataset.from_list([{field: TEXT}]), field, "train_dataset")


@pytest.mark.parametrize(
    "said",
    [
        {"content": None, "tool_calls": [{"type": "function"}]},
        {"content": None, "function_call": {"name": "look"}},
        {"thinking": "Well"},
        {"content": ""},
        {"content": [{"type": "text", "text": "Ho"}]},
    ],
)
def test_what_a_message_says_is_the_templates_business(said):
    rows = Dataset.from_list([{"messages": [{"role": "assistant"} | said]}])
    assert select_text_column(rows, "text", "train_dataset").column_names == ["messages"]


def test_pictures_are_left_for_trl_to_refuse():
    rows = select_text_column(
        Dataset.from_list([{"messages": TURNS, "images": ["x"], "id": 1}]), "text", "train_dataset"
    )
    assert set(rows.column_names) == {"messages", "images"}


@pytest.mark.parametrize("formatting_func", [None, lambda row: row["body"]])
def test_a_formatting_func_writes_the_text(tmp_path, formatting_func):
    rows = Dataset.from_list([{"body": TEXT, "text": "other"}] * 20)
    settings = {"args": tiny_config(tmp_path), "processing_class": byte_tokenizer()}
    settings |= {"formatting_func": formatting_func, "train_dataset": rows}
    trainer = IterativeLayerDistillTrainer(tiny_model(), **settings)
    read = byte_tokenizer().decode(trainer.calibration_batches[0]["input_ids"][0])
    assert read.startswith("other" if formatting_func is None else TEXT)
    with pytest.raises(LayerPruneError, match="eval_dataset is a dict"):
        IterativeLayerDistillTrainer(tiny_model(), eval_dataset={"a": rows}, **settings)


def test_an_optimizer_that_is_given_is_the_one_that_is_checked(tmp_path):
    rows = Dataset.from_list([{"text": TEXT}] * 20)
    settings = {"train_dataset": rows, "processing_class": byte_tokenizer()}
    args = tiny_config(tmp_path, optim="lion_8bit")  # whose package is not installed
    given = (torch.optim.SGD, {"lr": 0.1})
    IterativeLayerDistillTrainer(tiny_model(), args, optimizer_cls_and_kwargs=given, **settings)
    IterativeLayerDistillTrainer(tiny_model(), tiny_config(tmp_path, optim="lion_8bit", heal=False), **settings)
    with pytest.raises(LayerPruneError, match="install `bitsandbytes`"):
        IterativeLayerDistillTrainer(tiny_model(), args, **settings)


def test_a_text_needs_a_token_to_end_with(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token, tokenizer.chat_template = None, CHAT
    forms = {form: FORMS[form] for form in ("text", "prompt and completion", "messages", "token ids")}
    forms["messages and tools"] = FORMS["messages"] | {"tools": "[]"}
    for form, row in forms.items():
        rows, settings = Dataset.from_list([row] * 8), {"processing_class": tokenizer}
        if form in ("text", "prompt and completion"):
            with pytest.raises(LayerPruneError, match="has no end token to put after .* with eos_token"):
                IterativeLayerDistillTrainer(tiny_model(), tiny_config(tmp_path), rows, **settings)
        else:
            IterativeLayerDistillTrainer(tiny_model(), tiny_config(tmp_path), rows, **settings)
    args, rows = tiny_config(tmp_path, eos_token=END, packing=False), Dataset.from_list([FORMS["text"]] * 8)
    trainer = IterativeLayerDistillTrainer(tiny_model(), args, rows, processing_class=tokenizer)
    assert trainer.calibration_batches[0]["input_ids"][0][-1] == tokenizer.convert_tokens_to_ids(END)


def test_a_chat_template_with_tokens_that_the_model_lacks_is_refused_before_the_first_step(tmp_path):
    other = byte_tokenizer()
    other.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    other.chat_template = CHAT
    other.save_pretrained(tmp_path / "other")
    rows = Dataset.from_list([{"messages": TURNS}] * 8)

    def make(path):
        args = tiny_config(tmp_path / "run", chat_template_path=str(path))
        return IterativeLayerDistillTrainer(tiny_model(), args, rows, processing_class=byte_tokenizer())

    with pytest.raises(LayerPruneError, match=r"the tokenizer has 320 tokens.*only 257.*chat template alone"):
        make(tmp_path / "other")
    (tmp_path / "chat.jinja").write_text(CHAT)
    assert make(tmp_path / "chat.jinja").processing_class.chat_template == CHAT
