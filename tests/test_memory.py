"""What a healing step takes is known without taking it."""

import copy

import pytest
import torch
from conftest import tiny_config, tiny_model
from families import FAMILIES, family_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_layerprune.estimate import RunSizes
from hf_layerprune.losses import MAX_LOGITS_PER_CHUNK, divergence, next_token_loss
from hf_layerprune.memory import LiveBytes, StepMeter, StepShape, Way

SIZES = {"hidden_size": 64, "intermediate_size": 160}
HALF = {"bf16": True}
MORE = {"lm_weight": 0.5}


def check_solved(folder, config, way, shape, **settings):
    """Compare what is solved with the same step measured at its whole depth."""
    args = tiny_config(folder, **{"max_length": 128, "bf16": False} | settings)
    solved = StepMeter(config, args).needs(way, shape, 3, accumulates=True)
    meter = StepMeter(config, args)
    (weights, trained, live, peak), _ = meter.step(way, shape.trained, shape.width, 3)
    whole = weights + 3 * trained + max(live + meter.logits(3 * 127, way.dtype, way.everything), peak)
    assert solved[:2] == pytest.approx((weights, trained), rel=0.01) and 0.97 < solved.peak / whole < 1.1


@pytest.mark.parametrize(
    "lora_r, dtype, again, shape, settings",
    [
        (None, "float32", True, StepShape(5, 1), HALF),
        (None, "bfloat16", False, StepShape(6, 1), HALF | MORE),
        (4, "float32", False, StepShape(6, 1), {}),
        (4, "bfloat16", True, StepShape(5, 1), HALF),
    ],
)
def test_a_deep_step_is_solved_from_shallow_ones(tmp_path, lora_r, dtype, again, shape, settings):
    way = Way("neighbours", lora_r, dtype, again)
    check_solved(tmp_path, tiny_model(8, **SIZES).config, way, shape, **settings)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_and_pairs(tmp_path, family):
    way = Way("neighbours", None, "float32", False)
    check_solved(tmp_path, family_model(family, 6).config, way, StepShape(3, 1, width=2))


def test_gradients_of_other_micro_batches_and_idle_layers_take_memory(tmp_path):
    model = tiny_model(8, **SIZES, tie_word_embeddings=False)
    meter = StepMeter(model.config, tiny_config(tmp_path, max_length=64))
    way, layer = Way("neighbours", None, "float32", False), sum(p.nbytes for p in model.model.layers[0].parameters())
    alone = meter.needs(way, StepShape(2, 4), 2, accumulates=False)
    more = meter.needs(way, StepShape(2, 4, idle=3), 2, accumulates=True)
    assert alone.trained == 2 * layer and more.weights == alone.weights + 3 * layer
    assert alone.peak + 3 * layer < more.peak <= alone.peak + 3 * layer + alone.trained


def test_operations_are_those_of_a_step(tmp_path):
    config = tiny_model(6, **SIZES).config
    args = tiny_config(tmp_path, max_length=16, kl_weight=0)
    run, meter = RunSizes(config, args), StepMeter(config, args)
    for lora_r in (None, 4):
        with FlopCounterMode(display=False) as counter:
            (_, trained, *_), _ = meter.step(Way("neighbours", lora_r, "float32", False), 5, 1, 2)
        way, shape = Way("neighbours", lora_r, "float32", False), StepShape(5, 1)
        flops = meter.rows * run.healing_flops(way, shape, trained // 4)
        assert flops == pytest.approx(counter.get_total_flops(), rel=0.06)


def test_bytes_are_counted_while_they_live():
    with LiveBytes() as live:
        first = torch.zeros(1000)
        second = first.view(10, 100) + 1
        assert live.now == live.peak == 8000
        del first
        third = second[:5]
        del second
        assert live.now == 4000 and live.peak == 8000
        del third
    assert live.now == 0


@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize(
    "dtype, settings, bytes_of_logit",
    [
        ("float32", {}, 12),
        ("float32", HALF, 14),
        ("float32", HALF | {"beta": 0.5}, 24),
        ("bfloat16", {}, 14),
        ("float32", MORE, 12),
        ("float32", MORE | HALF | {"kl_weight": 0}, 12),
    ],
)
def test_chunks_of_logits_take_what_they_do(tmp_path, monkeypatch, trains_head, dtype, settings, bytes_of_logit):
    tokens, hidden, vocabulary = 500, 16, 1500
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(MAX_LOGITS_PER_CHUNK, device, 80 * vocabulary)
    args = tiny_config(tmp_path, **{"bf16": False} | settings)
    config = tiny_model(2, hidden_size=hidden, vocab_size=vocabulary).config
    solved = StepMeter(config, args).logits(tokens, dtype, trains_head)
    with LiveBytes() as live:
        teacher = nn.Linear(hidden, vocabulary, bias=False, dtype=getattr(torch, dtype)).requires_grad_(False)
        student = copy.deepcopy(teacher).requires_grad_() if trains_head else teacher
        states = torch.randn(tokens, hidden, dtype=getattr(torch, dtype), requires_grad=True)
        labels, before, loss = torch.zeros(tokens, dtype=torch.long), live.now, 0
        live.peak = before
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(args.bf16)):
            if args.kl_weight:
                loss = divergence(states, student, states.detach(), teacher, beta=args.beta)
            if args.lm_weight:
                loss = loss + next_token_loss(states, student, labels).sum()
        loss.backward()
    assert solved == pytest.approx(live.peak - before, rel=0.01)
    assert solved >= 80 * vocabulary * bytes_of_logit  # the tensors of one chunk, by reading the functions
