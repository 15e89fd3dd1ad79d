"""What a decode step should take, on paper: bytes of weights over bandwidth, plus so much for every kernel.

    python benchmarks/predictions.py                       # the table of docs/parallel.md, measured cells empty
    python benchmarks/predictions.py --measured runs/gpu   # with what `benchmarks/gpu.py` measured

A step reads every weight once, and the keys and values of all rows. In a CUDA graph each kernel adds the gap between
two kernels and what a small one takes; in an eager `generate` a step takes as long as Python needs to launch its
kernels, if that is more. Kernels are counted, not assumed: those that a step of a narrow model of the same family
launches. Only how many are left after torch.compile is assumed.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_sections.common import narrow  # noqa: E402
from gpu_sections.stepper import Stepper  # noqa: E402

from hf_layerprune.benchmark import load_shape, random_models, shape_plan  # noqa: E402
from hf_layerprune.plan import LayerPlan  # noqa: E402
from hf_layerprune.surgery import apply_plan  # noqa: E402

SHAPES = ("Qwen3-0.6B", "Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-3B", "Qwen3-8B")
BATCHES = (1, 32)
MODES = ("eager", "graphs", "compile")
CONTEXT = 160  # tokens in the cache: a prompt of 128 and half of 64 new ones
GOALS = (("Qwen2.5-3B", "36 in 29", "eager", 1.2), ("Qwen3-0.6B", "28 in 18", "graphs", 1.25))
FUSED_KERNELS = 14  # of a block after torch.compile: 7 products, attention, 2 norms, rotation, cache, activation, sum


@dataclass(frozen=True)
class Card:
    """
    Attributes:
        bandwidth (`float`): bytes/s that reading weights reaches.
        gap (`float`): seconds that a kernel in a CUDA graph adds to the reading of its bytes.
        launch (`float`): seconds that Python needs to launch a kernel.
    """

    bandwidth: float
    gap: float
    launch: float


H200 = Card(bandwidth=0.85 * 4.8e12, gap=1.7e-6, launch=10e-6)
"""Assumed: 85 % of the data sheet's bandwidth, the middle of 1.5 to 1.9 microseconds, and a usual launch."""


class Kernels(TorchDispatchMode):
    """Counts operations that compute or move something; views and empty tensors take no kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.count += not (
            function.is_view or name.startswith("empty") or name in ("detach", "_unsafe_view", "device")
        )
        return result


def variants(config: PretrainedConfig) -> dict[str, LayerPlan]:
    """The plans that are compared: as it is, 3/4 of the layers, pairs at 4/5 and 9/14 of the depth, groups."""
    depth = config.num_hidden_layers
    fewer, fifth, deep, groups = round(0.75 * depth), round(0.8 * depth), round(18 / 28 * depth), max(1, depth // 10)
    first = depth - max(1, depth // 8) - 4 * groups
    plans = {
        "as it is": shape_plan(config, depth),
        f"{fewer} layers": shape_plan(config, fewer),
        f"{depth} in {fifth}": shape_plan(config, depth, fifth),
        f"{depth} in {deep}": shape_plan(config, depth, deep),
    }
    grouped = plans["as it is"].with_pairs(range(n, n + 4) for n in range(first, first + 4 * groups, 4))
    plans[f"{depth} in {grouped.depth}, groups of 4"] = grouped
    return {name: LayerPlan(plan.blocks, depth) for name, plan in plans.items()}


@cache
def counted_kernels(shape: str) -> tuple[int, dict[int, int]]:
    """Kernels of a step outside the blocks, and of a block by its width, counted on narrow models on a CPU."""
    config = narrow(load_shape(shape), 5)
    (model,) = random_models(config, dtype=torch.float32)

    def step(*blocks: tuple[int, ...]) -> int:
        run = apply_plan(model, LayerPlan(blocks, 5), share_weights=True)
        stepper = Stepper(run, torch.zeros(1, 4, dtype=torch.long), 4)
        stepper.step()
        with Kernels() as kernels:
            stepper.step()
        return kernels.count

    one = step((0,), (1,)) - step((0,))
    blocks = {width: step((0,), tuple(range(1, width + 1))) - step((0,)) for width in (2, 4)}
    return step((0,)) - one, {1: one} | blocks


@cache
def counted_bytes(shape: str) -> tuple[int, int, int]:
    """Bytes in bfloat16 of a layer, of the head, and of the keys and values of a layer for each token."""
    config = load_shape(shape)
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    layer = model.model.layers[0]
    cached = 2 * config.num_key_value_heads * layer.self_attn.head_dim * 2
    return sum(p.nbytes for p in layer.parameters()), model.lm_head.weight.nbytes, cached


def step_bytes(shape: str, plan: LayerPlan, batch: int, context: int = CONTEXT) -> int:
    """Bytes that a decode step reads."""
    layer, head, cached = counted_bytes(shape)
    return len(plan.layers) * (layer + batch * context * cached) + head


def step_seconds(shape: str, plan: LayerPlan, batch: int, mode: str, card: Card = H200) -> float:
    """Seconds that a decode step should take; `mode` is one of `MODES`."""
    outside, of_width = counted_kernels(shape)
    kernels = outside + sum(of_width[len(block)] for block in plan.blocks)
    if mode == "compile":
        kernels = FUSED_KERNELS * (plan.depth + 1)
    device = step_bytes(shape, plan, batch) / card.bandwidth + kernels * card.gap
    return max(device, kernels * card.launch) if mode == "eager" else device


def predicted_ratio(shape: str, variant: str, batch: int, mode: str, card: Card = H200) -> float:
    """How much faster than the model as it is."""
    plans = variants(load_shape(shape))
    whole, changed = (step_seconds(shape, plan, batch, mode, card) for plan in (plans["as it is"], plans[variant]))
    return whole / changed


def measured_ratio(measured: dict[str, Any], shape: str, variant: str, batch: int, mode: str) -> float | None:
    case = measured.get("cases", {}).get(f"{shape}, batch {batch}, {mode}", {})
    return case.get("result", {}).get(variant, {}).get("ratio")


def table(measured: dict[str, Any] | None = None, which: tuple[int, ...] = (2, 3)) -> str:
    """Prediction / measurement by shape, batch and way to decode, as Markdown; pairs, or others of the `variants`."""
    lines = ["| | batch | layers in blocks | eager | CUDA graphs | compiled |", "|---|---:|---|---:|---:|---:|"]
    for shape in SHAPES:
        for batch in BATCHES:
            names = list(variants(load_shape(shape)))
            for variant in (names[number] for number in which):
                cells = []
                for mode in MODES:
                    found = measured_ratio(measured or {}, shape, variant, batch, mode)
                    right = "?" if found is None else f"{found:.2f}x"
                    cells.append(f"{predicted_ratio(shape, variant, batch, mode):.2f}x / {right}")
                lines.append(f"| {shape} | {batch} | {variant} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, help="folder with the decode.json of benchmarks/gpu.py")
    folder = parser.parse_args().measured
    measured = None if folder is None else json.loads((folder / "decode.json").read_text())
    print(table(measured), end="")


if __name__ == "__main__":
    main()
