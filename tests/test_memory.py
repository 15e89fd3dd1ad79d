"""What a healing step takes is known without taking it."""

import pytest
import torch
from conftest import tiny_config, tiny_model
from families import FAMILIES, family_model
from torch.utils.flop_counter import FlopCounterMode

from hf_layerprune.estimate import RunSizes
from hf_layerprune.memory import FakeBytes, StepMeter, StepShape, Way

SIZES = {"hidden_size": 64, "intermediate_size": 160}
HALF = {"bf16": True}
MORE = {"lm_weight": 0.5, "hidden_target": "updates"}


def check_solved(folder, config, way, shape, **settings):
    """Compare what is solved with the same step measured at its whole depth."""
    args = tiny_config(folder, **{"max_length": 128, "bf16": False} | settings)
    solved = StepMeter(config, args, [1, 4]).needs(way, shape, 3, accumulates=False)
    meter = StepMeter(config, args, [3])
    whole = meter.measure(way, shape.trained, shape.frozen, shape.width, 3)
    whole[2:4] += meter._logits(way, 3)
    assert solved.weights == pytest.approx(whole[0], rel=0.01) and solved.trained == pytest.approx(whole[1], rel=0.01)
    assert solved.peak == pytest.approx(max(whole[2:]) + 2 * whole[1], rel=0.05)


@pytest.mark.parametrize(
    "trained, lora_r, dtype, again, shape, settings",
    [
        ("neighbours", None, "float32", False, StepShape(2, 5), {}),
        ("neighbours", None, "float32", True, StepShape(4, 3), HALF),
        (
            "neighbours",
            None,
            "bfloat16",
            False,
            StepShape(1, 6),
            HALF | {"lm_weight": 0.5, "hidden_target": "updates"},
        ),
        ("all", None, "float32", True, StepShape(7, 0), HALF),
        ("all", None, "bfloat16", False, StepShape(7, 0), HALF),
        ("all", 4, "float32", False, StepShape(6, 1), {}),
        ("neighbours", 4, "bfloat16", True, StepShape(2, 5), HALF),
    ],
)
def test_a_deep_step_is_solved_from_shallow_ones(tmp_path, trained, lora_r, dtype, again, shape, settings):
    way = Way(trained, lora_r, dtype, again)
    check_solved(tmp_path, tiny_model(8, **SIZES).config, way, shape, **settings)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_and_pairs(tmp_path, family):
    packed = {"packing": True, "packing_strategy": "wrapped"}
    way = Way("neighbours", None, "float32", False)
    check_solved(tmp_path, family_model(family, 6).config, way, StepShape(2, 2, width=2), **packed)


def test_gradients_of_other_micro_batches_and_idle_layers_take_memory(tmp_path):
    model = tiny_model(8, **SIZES, tie_word_embeddings=False)
    meter = StepMeter(model.config, tiny_config(tmp_path, max_length=64), [1, 4])
    way, layer = Way("neighbours", None, "float32", False), sum(p.nbytes for p in model.model.layers[0].parameters())
    alone = meter.needs(way, StepShape(2, 4), 2, accumulates=False)
    more = meter.needs(way, StepShape(2, 4, idle=3), 2, accumulates=True)
    assert alone.trained == 2 * layer and more.weights == alone.weights + 3 * layer
    assert alone.peak + 3 * layer < more.peak <= alone.peak + 3 * layer + alone.trained


def test_operations_are_those_of_a_step(tmp_path):
    config = tiny_model(6, **SIZES).config
    args = tiny_config(tmp_path, max_length=16, kl_weight=0)
    run, meter = RunSizes(config, args), StepMeter(config, args, [2])
    for way, shape in ((Way("neighbours", None, "float32", False), StepShape(2, 4)),
                       (Way("all", None, "float32", False), StepShape(6, 0)),
                       (Way("neighbours", 4, "float32", False), StepShape(2, 4))):  # fmt: skip
        with meter.fake, FlopCounterMode(display=False) as counter:
            teacher, student, _ = meter.models(way.everything, way.lora_r, way.dtype, shape.trained, shape.frozen, 1)
            meter._step(teacher, student, shape.trained, 2)
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        assert 2 * run.healing_flops(way, shape, trained) == pytest.approx(counter.get_total_flops(), rel=0.06)


def test_bytes_are_counted_while_they_live():
    with FakeBytes() as live:
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


def test_a_gpu_holds_tiles_of_logits(tmp_path):
    config = tiny_model(5, vocab_size=70_000).config
    meter = StepMeter(config, tiny_config(tmp_path, max_length=64), [2])
    needs = meter.needs(Way("neighbours", None, "float32", False), StepShape(2, 2), 2, accumulates=False)
    assert needs.peak > needs.weights + 2 * 2 * 63 * 32768 * 4  # of two models, at 63 positions of two rows
