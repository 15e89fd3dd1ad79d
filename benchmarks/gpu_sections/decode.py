"""Decoding: a model as it is, with layers removed, and in pairs and groups; eager `generate`, CUDA graphs, compiled.

Models of a shape share what they have in common. They take turns; ratios are medians of the ratios within a turn, to
the model as it is. Beside each ratio stands what `benchmarks/predictions.py` expects of this card.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import product
from typing import Any

import predictions
import torch
from transformers import PreTrainedModel

from gpu_sections.common import Case, Run, in_turns, median_ratio, narrow, random_rows, release, seconds_of
from gpu_sections.stepper import WARMUP, Stepper
from hf_layerprune.benchmark import benchmark_models, load_shape, random_models
from hf_layerprune.surgery import apply_plan

GIB = 2**30


def cases(run: Run) -> list[Case]:
    """The goals of docs/parallel.md first, then the rest by batch; the models of a shape are made once for each."""
    first = [("Qwen3-0.6B", 1, "graphs"), ("Qwen3-0.6B", 1, "eager"), ("Qwen2.5-3B", 1, "eager")]
    first += [("Qwen2.5-3B", 1, "graphs"), ("Qwen3-8B", 1, "graphs"), ("Qwen3-8B", 1, "eager")]
    order = product(predictions.BATCHES, predictions.SHAPES, ("graphs", "eager"))
    others = [(shape, batch, mode) for batch, shape, mode in order]
    wanted = list(dict.fromkeys([*first, *others]))
    if run.tiny:
        wanted = [("Qwen3-0.6B", 2, "graphs"), ("Qwen3-0.6B", 2, "eager")]
    compiled = [(shape, batch, "compile") for shape, batch in product(predictions.SHAPES, predictions.BATCHES)]
    wanted += [("Qwen3-0.6B", 1, "compile")] * run.on_gpu + compiled * run.full
    models = last_shape(run)
    measured = [
        (f"{shape}, batch {batch}, {mode}", partial(MEASURES[mode], run, models, shape, batch))
        for shape, batch, mode in dict.fromkeys(wanted)
    ]
    return [("card", partial(card, run)), *measured, ("kernels", partial(kernels_of_a_step, run, models))]


@lru_cache
def card(run: Run) -> dict[str, float]:
    """What this device reaches: bytes/s of a copy, operations/s of a product, seconds a kernel of a graph takes."""
    size, side = (2**20, 256) if run.tiny else (4 * GIB, 8192)
    source, target = (torch.empty(size, dtype=torch.uint8, device=run.device) for _ in range(2))
    a, b = (torch.randn(side, side, device=run.device, dtype=torch.bfloat16) for _ in range(2))
    turns = in_turns({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, 5, warmup=2)
    found = {"copy_bytes_per_second": 2 * size / statistics.median(turns["copy"])}
    found["bf16_operations_per_second"] = 2 * side**3 / statistics.median(turns["product"])
    return found | {"seconds_per_small_kernel": small_kernel(run)}


def small_kernel(run: Run) -> float:
    """Seconds of one of a thousand dependent kernels that compute next to nothing, in a CUDA graph."""
    number, count = torch.zeros(1, device=run.device), 10 if run.tiny else 1000

    def chain() -> None:
        for _ in range(count):
            number.add_(1)

    if run.on_gpu:
        chain()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain()
        chain = graph.replay
    return min(in_turns({"chain": chain}, 3)["chain"]) / count


def last_shape(run: Run) -> Callable[[str], dict[str, PreTrainedModel]]:
    """[`models_of`], which keeps the models of one shape until another is asked for."""
    held: dict[str, dict[str, PreTrainedModel]] = {}

    def models(shape: str) -> dict[str, PreTrainedModel]:
        if shape not in held:
            held.clear()
            release()
            held[shape] = models_of(run, shape)
        return held[shape]

    return models


def models_of(run: Run, shape: str) -> dict[str, PreTrainedModel]:
    """Every variant of a shape, the model as it is first."""
    config = load_shape(shape)
    if run.tiny:
        config = narrow(config, 8)
    (whole,) = random_models(config, dtype=torch.bfloat16 if run.on_gpu else torch.float32, device=run.device)
    plans = predictions.variants(config)
    return {name: apply_plan(whole, plan, share_weights=True) for name, plan in plans.items()}


def tokens_of(run: Run) -> tuple[int, int]:
    """Length of the prompt, and new tokens."""
    return (8, 4) if run.tiny else (128, 64 if run.full else 32)


def eager(run: Run, models: Any, shape: str, batch: int, compile: bool = False) -> dict[str, Any]:
    """`generate`, as `hf-layerprune benchmark` times it."""
    variants, (prompt, new) = models(shape), tokens_of(run)
    names = list(variants)
    if compile and not run.full:
        names = [name for name in names if name in ("as it is", "28 in 18")]  # each takes long to compile
    options = {"cache_implementation": "static", "compile": True} if compile else {}
    chosen = [variants[name] for name in names]
    reports = benchmark_models(chosen, prompt, new, batch_size=batch, repeats=run.repeats, **options)
    ratios = {name: report.decode_ratio for name, report in zip(names, reports, strict=True)}
    seconds = {n: batch / report.decode_tokens_per_second for n, report in zip(names, reports, strict=True)}
    return described(run, shape, batch, "compile" if compile else "eager", prompt + new // 2, seconds, ratios)


def graphs(run: Run, models: Any, shape: str, batch: int) -> dict[str, Any]:
    """A step of a static cache as one CUDA graph, nothing compiled."""
    variants, (length, new) = models(shape), tokens_of(run)
    steps = new * (run.repeats + 1) + WARMUP
    prompt = random_rows(run, 256, batch, length)
    steppers = {name: Stepper(model, prompt, steps) for name, model in variants.items()}

    def decode(stepper: Stepper) -> None:
        for _ in range(new):
            stepper.step()

    turns = in_turns({name: partial(decode, stepper) for name, stepper in steppers.items()}, run.repeats)
    seconds = {name: statistics.median(values) / new for name, values in turns.items()}
    ratios = {name: median_ratio(turns["as it is"], values) for name, values in turns.items()}
    return described(run, shape, batch, "graphs", length + steps, seconds, ratios)  # all of a static cache is read


MEASURES = {"eager": eager, "graphs": graphs, "compile": partial(eager, compile=True)}


def described(
    run: Run, shape: str, batch: int, mode: str, context: int, seconds: dict[str, float], ratios: dict[str, float]
) -> dict[str, Any]:
    """Every variant's speed, what of the card's bandwidth it is at `context` tokens, and the ratio predicted."""
    found, of_card = {}, card(run)
    here = predictions.Card(of_card["copy_bytes_per_second"], of_card["seconds_per_small_kernel"],
                            predictions.H200.launch)  # fmt: skip
    plans = predictions.variants(load_shape(shape))
    for name, taken in seconds.items():
        entry = found[name] = {"seconds_per_step": taken, "tokens_per_second": batch / taken, "ratio": ratios[name]}
        if not run.tiny:
            bandwidth = predictions.step_bytes(shape, plans[name], batch, context) / taken
            entry["bytes_per_second"] = bandwidth
            entry["share_of_copy_bandwidth"] = bandwidth / of_card["copy_bytes_per_second"]
            entry["predicted_ratio"] = predictions.predicted_ratio(shape, name, batch, mode)
            entry["predicted_of_this_card"] = predictions.predicted_ratio(shape, name, batch, mode, here)
    return found


def kernels_of_a_step(run: Run, models: Any) -> dict[str, Any]:
    """Kernels that a profiler sees in an eager step of Qwen3-0.6B, next to those counted on the CPU."""
    shape, device = "Qwen3-0.6B", torch.profiler.ProfilerActivity.CUDA
    outside, of_width = predictions.counted_kernels(shape)
    found = {}
    for name, model in models(shape).items():
        stepper = Stepper(model, random_rows(run, 256, 1, 8), WARMUP + 4)
        stepper.graph = None
        stepper.step()
        seconds = seconds_of(stepper.step)
        entry = found[name] = {"seconds_without_graph": seconds}
        if run.on_gpu:
            with torch.profiler.profile(activities=[device]) as profile:
                seconds_of(stepper.step)
            events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
            entry["kernels"] = len(events)
        if not run.tiny:
            plan = predictions.variants(load_shape(shape))[name]
            entry["counted"] = outside + sum(of_width[len(block)] for block in plan.blocks)
    return found
