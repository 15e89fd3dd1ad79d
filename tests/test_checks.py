"""What TRL can make text of is taken; what it would stumble over is put right or told."""

import pytest
from conftest import byte_tokenizer, tiny_config, tiny_model
from datasets import Dataset, IterableDataset

from hf_layerprune import IterativeLayerDistillTrainer, LayerPruneError
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
