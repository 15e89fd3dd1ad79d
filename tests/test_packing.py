"""Healing on rows without padding: documents end to end in one row, told apart by positions that start again."""

import copy

import pytest
import torch
from conftest import rounds_of, tiny_config, tiny_model
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_layerprune import IterativeLayerDistillTrainer, evaluate_model, prune
from hf_layerprune.data import valid_next_tokens
from hf_layerprune.trainer.healing import HealingTrainer

LENGTHS = (9, 17, 5, 12)


def rows():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(250, (length,), generator=generator).tolist()} for length in LENGTHS]


def without_padding():
    return DataCollatorForLanguageModeling(256, padding_free=True)(rows())


def padded():
    return DataCollatorForLanguageModeling(256)(rows())


def packed():
    """Two documents a row, as `packing_strategy="bfd"` makes them."""
    first, second, third, fourth = (row["input_ids"] for row in rows())
    pairs = [
        {"input_ids": first + second, "seq_lengths": [len(first), len(second)]},
        {"input_ids": third + fourth, "seq_lengths": [len(third), len(fourth)]},
    ]
    return DataCollatorForLanguageModeling(256, padding_free=True)(pairs)


def make(tmp_path, tokenizer, texts=None, **changes):
    data = Dataset.from_list(texts or [{"text": "It was the best of times, " * n} for n in (1, 2, 3, 1, 2) * 3])
    return IterativeLayerDistillTrainer(
        model=tiny_model(6), args=tiny_config(tmp_path, measure_speed=False, **changes), train_dataset=data,
        processing_class=tokenizer,
    )  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("trained", ["neighbours", "all"])
def test_every_way_to_lay_out_documents_gives_the_same_loss_and_gradients(tmp_path, tokenizer, trained, attention):
    everything = trained == "all"
    blocks = list(range(5)) if everything else [2, 3]
    results = []
    for batch in (padded(), without_padding(), packed()):
        trainer = make(tmp_path, tokenizer, lm_weight=0.2, packing=False, trained_layers=trained)
        trainer.teacher.set_attn_implementation(attention)
        healing = HealingTrainer(
            trainer, prune(trainer.teacher, [3], share_weights=True), blocks, trainer.train_dataset, tmp_path
        )
        student = healing.model
        assert (healing.shared_depth is None) == everything
        valid, labels = valid_next_tokens(batch)
        assert valid.sum() == len(labels) == sum(LENGTHS) - len(LENGTHS)  # none looks into the next document
        loss = healing.compute_loss(student, copy.copy(batch))
        loss.backward()
        results.append((loss, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}))
    (expected, gradients), *others = results
    for loss, found in others:
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * scale + 1e-9, msg=name)


def test_quality_is_the_same_however_documents_are_laid_out():
    teacher = tiny_model()
    student = prune(teacher, [2])
    reports = [evaluate_model(student, [batch], teacher) for batch in (padded(), without_padding(), packed())]
    for report in reports[1:]:
        assert report.loss == pytest.approx(reports[0].loss, rel=1e-5)
        assert report.kl == pytest.approx(reports[0].kl, rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": True},
        {"packing": False, "padding_free": True, "max_length": None},
    ],
    ids=["packed", "padding-free"],
)
def test_rounds_run_on_rows_without_padding(tmp_path, tokenizer, changes):
    changes = {"packing_strategy": "bfd", "trained_layers": "neighbours", "learning_rate": 1e-4} | changes
    trainer = make(tmp_path, tokenizer, target_num_layers=4, **changes)
    assert trainer.padding_free
    assert "attention_mask" not in next(iter(trainer.get_train_dataloader()))
    trainer.train()
    assert [record["num_layers"] for record in rounds_of(trainer)] == [5, 4]
