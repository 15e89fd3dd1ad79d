"""What TRL can make text of is taken; what it would stumble over is put right or told."""

import pytest
from conftest import byte_tokenizer, tiny_config, tiny_model
from datasets import Dataset, IterableDataset
from trl import SFTConfig

from hf_layerprune import IterativeLayerDistillTrainer, LayerPruneError, load_model, parallelize, prune
from hf_layerprune.trainer.checks import with_text

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
    "token ids": {"input_ids": list(range(20))},
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_scored_and_healed(tmp_path, form, streaming):
    rows, tokenizer = Dataset.from_list([FORMS[form]] * 8), byte_tokenizer()
    tokenizer.chat_template = CHAT
    args = tiny_config(tmp_path, packing=False, target_num_layers=4, max_steps=1, measure_speed=False)
    trainer = IterativeLayerDistillTrainer(
        model=tiny_model(),
        args=args,
        train_dataset=rows.to_iterable_dataset() if streaming else rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.run.rounds[0]["train_tokens"] > 0
    whole = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("row", [{"prompt": "Hi"}, {"instruction": "Hi", "output": "Ho"}, {"completion": "Ho"}])
def test_columns_without_text_are_named(row):
    for rows in (Dataset.from_list([row]), IterableDataset.from_generator(lambda: iter([row]))):
        with pytest.raises(LayerPruneError, match=f"train_dataset has columns .*{list(row)[0]}.* but no text"):
            with_text(rows, "text", "train_dataset")


@pytest.mark.parametrize("texts, message", [([TEXT, None], "row 1 has None"), ([" ", "\n"], "only blank rows")])
def test_rows_without_text_are_named(texts, message):
    with pytest.raises(LayerPruneError, match=message):
        with_text(Dataset.from_dict({"text": texts}), "text", "train_dataset")


@pytest.mark.parametrize(
    "row", [{"prompt": "p", "completion": "c"}, {"messages": TURNS}, {"conversations": TURNS}], ids="+".join
)
def test_a_column_of_text_that_is_named_is_the_one_that_counts(row):
    rows = with_text(Dataset.from_list([row | {"body": TEXT, "text": "other"}]), "body", "train_dataset")
    assert rows.column_names == ["body"]


@pytest.mark.parametrize(
    "rows, number",
    [
        ([{"messages": TURNS}, {"messages": []}], 1),
        ([{"messages": [{"rol": "user", "content": "Hi"}]}], 0),
        ([{"messages": "Hi"}], 0),
        ([{"messages": None}, {"messages": None}], 0),
        ([{"prompt": "Hi", "completion": "Ho"}, {"prompt": "Hi", "completion": None}], 1),
        ([{"prompt": 1, "completion": 2}], 0),
        ([{"prompt": "Hi", "completion": TURNS}], 0),
        ([{"conversations": []}], 0),
    ],
)
def test_rows_that_cannot_be_read_are_named(rows, number):
    with pytest.raises(LayerPruneError, match=f"train_dataset: row {number} has "):
        with_text(Dataset.from_list(rows), "text", "train_dataset")


def test_what_is_no_data_set_is_named():
    for given, kind in (([{"text": TEXT}], "list"), ({"a": Dataset.from_list([{"text": TEXT}])}, "dict")):
        with pytest.raises(LayerPruneError, match=f"eval_dataset is a {kind}; give one datasets.Dataset"):
            with_text(given, "text", "eval_dataset")


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("optimizers", (object(), None), "give optimizer_cls_and_kwargs"),
        ("compute_loss_func", print, "the loss is that of distillation"),
        ("compute_metrics", print, "no logits are kept"),
        ("preprocess_logits_for_metrics", print, "no logits are kept"),
        ("peft_config", "lora", "is no PeftConfig"),
        ("args", SFTConfig(use_cpu=True, bf16=False), "args is SFTConfig; give an IterativeLayerDistillConfig"),
        ("processing_class", None, "processing_class is missing"),
    ],
)
def test_arguments_that_would_change_nothing_are_refused(tmp_path, name, value, message):
    given = {"args": tiny_config(tmp_path), "processing_class": byte_tokenizer()} | {name: value}
    with pytest.raises(LayerPruneError, match=message):
        IterativeLayerDistillTrainer(tiny_model(), train_dataset=Dataset.from_list([{"text": TEXT}] * 20), **given)


def test_a_stream_needs_a_number_of_steps(tmp_path):
    rows = Dataset.from_list([{"text": TEXT}] * 20).to_iterable_dataset()
    with pytest.raises(LayerPruneError, match="stream.* set max_steps"):
        IterativeLayerDistillTrainer(
            tiny_model(), tiny_config(tmp_path, max_steps=-1), rows, processing_class=byte_tokenizer()
        )


@pytest.mark.parametrize("criterion", ["taylor", "tail", "angular_distance"])
def test_a_guess_cannot_go_on_from_layers_in_parallel(tmp_path, criterion):
    with pytest.raises(LayerPruneError, match="tells nothing of layers in parallel"):
        IterativeLayerDistillTrainer(
            parallelize(tiny_model(), [(1, 2)]),
            tiny_config(tmp_path, criterion=criterion, target_num_layers=2),
            Dataset.from_list([{"text": TEXT}] * 20),
            processing_class=byte_tokenizer(),
        )


def test_a_student_from_disk_shares_what_is_the_teachers(tmp_path):
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
    assert trainer.shared_depth == 3  # of 5: the last went, and the one before it is trained
