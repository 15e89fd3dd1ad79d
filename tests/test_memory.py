"""What a healing step needs is told without taking it."""

from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_config, tiny_model
from families import FAMILIES, family_model
from peft import LoraConfig

from hf_layerprune import memory
from hf_layerprune.edits import Edit
from hf_layerprune.memory import LiveBytes, needs_at_depth, step_needs

REMOVED = [Edit.remove(3)]
LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.mark.parametrize("trained", ["neighbours", "all"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_fake_tensors_need_what_real_ones_do(tmp_path, trained, checkpointing, accumulation, monkeypatch):
    config = tiny_model(6).config
    changes = {"gradient_checkpointing": checkpointing, "gradient_accumulation_steps": accumulation}
    args = tiny_config(tmp_path, trained_layers=trained, max_length=32, bf16=False, **changes)
    fake = step_needs(config, args, REMOVED, 4, torch.float32)
    monkeypatch.setattr(memory, "FakeTensorMode", nullcontext)
    real = step_needs(config, args, REMOVED, 4, torch.float32)
    assert (fake.weights, fake.trained, fake.flops) == (real.weights, real.trained, real.flops)
    assert fake.peak == pytest.approx(real.peak, rel=0.15)  # kernels for tensors without memory make other buffers
    model = tiny_model(6)
    assert fake.weights >= 4 * model.num_parameters() and fake.trained > 0
    assert fake.peak > fake.weights + fake.optimizer and fake.flops > 0


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("packing, trained", [("wrapped", "neighbours"), ("wrapped", "all"), (None, "neighbours")])
@pytest.mark.parametrize("edit", [Edit.remove(3), Edit.parallelize(2, 3)], ids=str)
def test_every_family_and_edit(tmp_path, family, packing, trained, edit, monkeypatch):
    changes = {"packing": packing is not None, "packing_strategy": packing or "bfd"}
    args = tiny_config(tmp_path, trained_layers=trained, max_length=32, bf16=False, edits=edit.kind, **changes)
    config = family_model(family, 6).config
    fake = step_needs(config, args, [edit], 4, torch.float32)
    monkeypatch.setattr(memory, "FakeTensorMode", nullcontext)
    real = step_needs(config, args, [edit], 4, torch.float32)
    assert (fake.weights, fake.trained, fake.flops) == (real.weights, real.trained, real.flops)
    assert fake.peak == pytest.approx(real.peak, rel=0.15)


def test_bytes_are_counted_while_they_live():
    with LiveBytes() as live:
        first = torch.zeros(1000)
        second = first.view(10, 100) + 1
        assert live.now == live.peak == 8000
        del first
        third = second[:5]
        del second
        assert live.now == 4000
        assert live.take_peak() == 8000 and live.take_peak() == 4000
        del third
    assert live.now == 0


def test_less_is_stored_above_a_higher_gap_and_with_checkpointing(tmp_path):
    config = tiny_model(8).config

    def peak(removed, **changes):
        args = tiny_config(tmp_path, **{"trained_layers": "neighbours", "max_length": 64, "bf16": False} | changes)
        return step_needs(config, args, [Edit.remove(removed)], 4, torch.float32).peak

    assert peak(6) < peak(2)
    assert peak(2, gradient_checkpointing=True) < peak(2)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("trained, peft_config", [("neighbours", None), ("all", None), ("neighbours", LORA)])
def test_two_shallow_models_tell_of_a_deep_one(tmp_path, trained, peft_config, on_gpu):
    args = tiny_config(tmp_path, trained_layers=trained, max_length=64, bf16=True)

    def needs(depth):
        return step_needs(tiny_model(depth).config, args, [Edit.remove(1)], 4, torch.float32, peft_config, on_gpu)

    told, measured = needs_at_depth(needs(4), 4, needs(5), 5, 14), needs(14)
    assert (told.weights, told.trained, told.flops) == (measured.weights, measured.trained, measured.flops)
    assert told.peak == pytest.approx(measured.peak, rel=0.02)


def test_adapters_need_no_optimizer_to_speak_of(tmp_path):
    args = tiny_config(tmp_path, trained_layers="neighbours", max_length=64)
    config = tiny_model(6).config
    full, adapters = (step_needs(config, args, REMOVED, 2, torch.bfloat16, peft) for peft in (None, LORA))
    assert adapters.optimizer < full.optimizer / 4 and adapters.weights > full.weights


def test_a_gpu_holds_tiles_of_logits(tmp_path):
    args = tiny_config(tmp_path, max_length=64)
    config = tiny_model(5, vocab_size=70_000).config
    gpu = step_needs(config, args, REMOVED, 2, torch.float32, on_gpu=True)
    tiles = 2 * 2 * 63 * 32768 * 4  # of two models, at 63 positions of two rows
    assert gpu.peak > gpu.weights + tiles
