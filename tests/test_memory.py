"""What a healing step needs is told without taking it."""

from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_config, tiny_model
from families import FAMILIES, family_model
from healing_simulation import simulate_step
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_layerprune.memory import LiveBytes, StepMeter
from hf_layerprune.plan import Edit
from hf_layerprune.surgery import plan_of

SIZES = {"hidden_size": 64, "intermediate_size": 160}
HALF = {"bf16": True}
CHECKPOINTING = {"gradient_checkpointing": True}
TWO = {"gradient_accumulation_steps": 2}
UNTIED = {"tie_word_embeddings": False}


def both(folder, model, edits, dtype=torch.float32, lora_r=None, on_gpu=False, **settings):
    """What is put together from parts, and what a whole step takes."""
    args = tiny_config(folder, **{"max_length": 128, "per_device_train_batch_size": 4, "bf16": False} | settings)
    meter = StepMeter(model.config, args, on_gpu)
    told = meter.step(plan_of(model.config), edits, args, dtype, lora_r)
    return told, simulate_step(model.config, args, edits, dtype, lora_r, on_gpu)


def check(told, taken):
    assert (told.weights, told.trained) == (pytest.approx(taken.weights, rel=0.01), taken.trained)
    assert told.peak == pytest.approx(taken.peak, rel=0.05)
    assert told.flops == pytest.approx(taken.flops, rel=0.02)


@pytest.mark.parametrize(
    "trained, lora_r, dtype, settings",
    [
        ("neighbours", None, torch.float32, {}),
        ("neighbours", None, torch.bfloat16, HALF | TWO),
        ("neighbours", None, torch.float32, HALF | CHECKPOINTING),
        ("all", None, torch.float32, HALF),
        ("all", None, torch.float32, HALF | CHECKPOINTING),
        ("all", None, torch.bfloat16, HALF | CHECKPOINTING | TWO),
        ("all", 4, torch.float32, TWO),
        ("2,5", None, torch.bfloat16, HALF),
        ("neighbours", 4, torch.bfloat16, HALF | CHECKPOINTING),
    ],
)
def test_a_step_is_the_sum_of_its_parts(tmp_path, trained, lora_r, dtype, settings):
    settings = {"trained_layers": trained, "per_device_train_batch_size": 3, **settings}
    check(*both(tmp_path, tiny_model(8, **SIZES), [Edit.remove(1)], dtype, lora_r, **settings))


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("edit", [Edit.remove(1), Edit.parallelize(2, 3)], ids=str)
def test_every_family_and_edit(tmp_path, family, edit):
    packed = {"packing": True, "packing_strategy": "wrapped"} if edit.kind == "parallelize" else {}
    check(*both(tmp_path, family_model(family, 6), [edit], trained_layers="neighbours", **packed))


@pytest.mark.parametrize("settings", [{}, TWO], ids=["one", "two"])
def test_a_head_of_its_own(tmp_path, settings):
    model = tiny_model(4, vocab_size=4000, **SIZES, **UNTIED)
    check(*both(tmp_path, model, [Edit.remove(1)], on_gpu=True, trained_layers="all", **settings))


def test_fake_tensors_need_what_real_ones_do(tmp_path):
    args = tiny_config(tmp_path, trained_layers="all", max_length=128, bf16=False)
    config = tiny_model(6).config
    fake, real = (
        simulate_step(config, args, [Edit.remove(3)], torch.float32, mode=mode)
        for mode in (FakeTensorMode, nullcontext)
    )
    assert (fake.weights, fake.trained, fake.flops) == (real.weights, real.trained, real.flops)
    assert fake.peak == pytest.approx(real.peak, rel=0.15)  # kernels for tensors without memory make other buffers


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


def test_less_is_stored_above_a_higher_gap(tmp_path):
    args = tiny_config(tmp_path, trained_layers="neighbours", max_length=64, bf16=False)
    config = tiny_model(8).config
    low, high = (
        StepMeter(config, args).step(plan_of(config), [Edit.remove(layer)], args, torch.float32) for layer in (2, 6)
    )
    assert high.peak < low.peak


def test_a_gpu_holds_tiles_of_logits(tmp_path):
    args = tiny_config(tmp_path, max_length=64, per_device_train_batch_size=2)
    config = tiny_model(5, vocab_size=70_000).config
    gpu = StepMeter(config, args, on_gpu=True).step(plan_of(config), [Edit.remove(3)], args, torch.float32)
    tiles = 2 * 2 * 63 * 32768 * 4  # of two models, at 63 positions of two rows
    assert gpu.peak > gpu.weights + tiles
