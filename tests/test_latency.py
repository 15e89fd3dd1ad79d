"""`measure_latency` against models whose decoding speed is known, and once for real."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model

import hf_layerprune.budget as module
from hf_layerprune import LayerPlan, parallelize, prune
from hf_layerprune.budget import MOST_BLOCKS, BlockCosts, measure_latency

FIXED = 0.7
PER_WIDTH = (0.3, 0.41, 0.55, 0.6)  # seconds per token of a block of 1, 2, 3, 4 layers


def widths_of(model):
    """How many layers are in each block, read off the weights."""
    return [layer.mlp.up_proj.out_features // 48 for layer in model.model.layers]


def reports_of(seconds, batch_size):
    """What `benchmark_models` would report of models whose decoding steps take `seconds`."""
    speeds = [batch_size / s for s in seconds]
    return [SimpleNamespace(decode_tokens_per_second=s, decode_ratio=s / speeds[0]) for s in speeds]


@pytest.fixture
def timed(monkeypatch):
    """Let every model take exactly as long as its blocks say; gives the runs that were timed."""
    runs = []

    def fake(models, prompt_tokens=128, new_tokens=64, batch_size=1, repeats=3):
        settings = (prompt_tokens, new_tokens, batch_size, repeats)
        runs.append(SimpleNamespace(widths=[widths_of(m) for m in models], settings=settings))
        drift = 1.07 ** (len(runs) - 1)  # the machine grows slower: only models of one run can be compared
        seconds = [drift * (FIXED + sum(PER_WIDTH[width - 1] for width in widths_of(m))) for m in models]
        return reports_of(seconds, batch_size)

    monkeypatch.setattr(module, "benchmark_models", fake)
    return runs


MODELS = {
    "plain": lambda: tiny_model(9),
    "two layers": lambda: tiny_model(2),
    "deep": lambda: tiny_model(12),
    "pruned": lambda: prune(tiny_model(9), [0, 3, 4]),
    "parallelized": lambda: parallelize(tiny_model(9), [(1, 2), (4, 5, 6)]),
    "all in one block": lambda: parallelize(tiny_model(4), [(0, 1, 2, 3)]),
    "pruned and parallelized": lambda: parallelize(prune(tiny_model(9), [1, 5]), [(0, 2), (4, 6)]),
}


@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_costs_of_the_parts_are_found(timed, make, most):
    model = make()
    latency = measure_latency(model, most)
    layers = sum(widths_of(model))
    assert latency.fixed == pytest.approx(FIXED)
    assert latency.blocks == pytest.approx(PER_WIDTH[: min(most, layers)])


def test_every_form_is_timed_alike(timed):
    latency = measure_latency(tiny_model(5), 2, prompt_tokens=10, new_tokens=7, repeats=2)
    assert latency.fixed == pytest.approx(FIXED)
    assert latency.blocks == pytest.approx(PER_WIDTH[:2])
    assert {run.settings for run in timed} == {(10, 7, 1, 2)}


def test_a_model_of_one_layer_is_one_part(timed):
    model = prune(tiny_model(3), [0, 2])
    latency = measure_latency(model, 4)
    assert len(latency.blocks) == 1
    assert latency.of(LayerPlan(((1,),), 3)) == pytest.approx(FIXED + PER_WIDTH[0])


def test_wide_blocks_are_few_at_a_time_and_timed_beside_the_whole_model(timed):
    measure_latency(tiny_model(27), 3)
    assert sorted(timed[0].widths) == [[1] * 13, [1] * 27]
    wide = [[widths for widths in run.widths if set(widths) != {1}] for run in timed]
    assert sorted(widths for forms in wide for widths in forms) == [[2] * MOST_BLOCKS, [3] * MOST_BLOCKS]
    assert all(len(forms) <= 1 and [1] * 27 in run.widths for run, forms in zip(timed, wide, strict=True))


def test_a_step_takes_the_fixed_part_and_every_block():
    latency = BlockCosts(0.5, (0.25, 0.3125, 1.0))
    assert latency.of(LayerPlan.identity(3)) == 1.25
    assert latency.of(LayerPlan(((0,), (2, 3), (5, 6, 7), (9, 10)), 12)) == 0.5 + 0.25 + 0.3125 + 1.0 + 0.3125
    assert latency.of(LayerPlan(((0, 1, 2),), 3)) == 1.5


def test_what_was_measured_foretells_any_plan(timed):
    latency = measure_latency(tiny_model(9), 4)
    assert latency.of(LayerPlan(((0,), (1, 2), (3, 4, 5, 6), (8,)), 9)) == pytest.approx(0.7 + 0.3 + 0.41 + 0.6 + 0.3)


@pytest.mark.parametrize(
    "by_half, whole, pairs",
    [(2.0, 2.0, 1.5), (2.1, 2.0, 1.5), (1.0, 2.0, 0.001), (0.2, 2.0, 1.0), (1.0, 1.0, 1.0)],
    ids=["no difference", "half is slower", "pairs are free", "more than all", "all the same"],
)
def test_a_clock_that_is_too_coarse_gives_no_part_of_nothing_or_less(monkeypatch, by_half, whole, pairs):
    seconds = {(1, 1): by_half, (1, 1, 1, 1): whole, (2, 2): pairs}
    monkeypatch.setattr(
        module, "benchmark_models", lambda models, *_: reports_of([seconds[tuple(widths_of(m))] for m in models], 1)
    )
    latency = measure_latency(tiny_model(4), 2)
    assert latency.fixed >= 0 and min(latency.blocks) > 0
    assert latency.of(LayerPlan.identity(4)) > latency.of(LayerPlan.identity(3))


@pytest.mark.parametrize("name", ["plain", "pruned and parallelized"])
def test_measuring_for_real_gives_finite_times_and_changes_nothing(name):
    model = MODELS[name]().train()
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    generation = model.generation_config.to_dict()
    latency = measure_latency(model, 3, prompt_tokens=4, new_tokens=3, repeats=1)
    assert len(latency.blocks) == 3
    assert all(math.isfinite(seconds) and seconds > 0 for seconds in latency.blocks)
    assert math.isfinite(latency.fixed) and latency.fixed >= 0
    assert model.training and model.config.to_dict() == config
    assert model.generation_config.to_dict() == generation
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
