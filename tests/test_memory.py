"""What a healing step needs is told without taking it."""

from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_config, tiny_model

from hf_layerprune import memory
from hf_layerprune.memory import LiveBytes, step_needs


@pytest.mark.parametrize("trained", ["neighbours", "all"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fake_tensors_need_what_real_ones_do(tmp_path, trained, checkpointing, monkeypatch):
    config = tiny_model(6).config
    args = tiny_config(
        tmp_path, trained_layers=trained, gradient_checkpointing=checkpointing, max_length=32, bf16=False
    )
    fake = step_needs(config, args, 3, 4, torch.float32)
    monkeypatch.setattr(memory, "FakeTensorMode", nullcontext)
    real = step_needs(config, args, 3, 4, torch.float32)
    assert (fake.weights, fake.trained, fake.flops) == (real.weights, real.trained, real.flops)
    assert fake.peak == pytest.approx(real.peak, rel=0.15)  # kernels for tensors without memory make other buffers
    model = tiny_model(6)
    assert fake.weights >= 4 * model.num_parameters() and fake.trained > 0
    assert fake.peak > fake.weights + 3 * fake.trained and fake.flops > 0


def test_bytes_are_counted_while_they_live():
    with LiveBytes() as live:
        first = torch.zeros(1000)
        second = first.view(10, 100) + 1
        assert live.now == live.peak == 8000
        del first
        third = second[:5]
        del second
        assert live.now == 4000
        del third
    assert live.now == 0 and live.peak == 8000


def test_less_is_stored_above_a_higher_gap_and_with_checkpointing(tmp_path):
    config = tiny_model(8).config

    def peak(removed, **changes):
        args = tiny_config(tmp_path, **{"trained_layers": "neighbours", "max_length": 64, "bf16": False} | changes)
        return step_needs(config, args, removed, 4, torch.float32).peak

    assert peak(6) < peak(2)
    assert peak(2, gradient_checkpointing=True) < peak(2)
