"""What the recipes of `compress` cost, from their settings alone: counted operations and bytes, no GPU.

Healing is counted by running one micro-batch on tensors that have shapes and no memory (`hf_layerprune.memory`), with
the layer in the middle removed (or run beside the next) and every row as long as `max_length`. Scoring is counted by
layer passes. GPU hours are these operations over what a GPU computes in an hour at `SHARE` of its peak, which is
assumed, not measured.

    python recipes/cost.py --output recipes/cost.md
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from hf_layerprune import IterativeLayerDistillConfig
from hf_layerprune.cli.parsing import parse
from hf_layerprune.files import write_atomically
from hf_layerprune.memory import StepMeter
from hf_layerprune.plan import Edit, LayerPlan
from hf_layerprune.shapes import load_shape

PEAK, SHARE = 989e12, 0.4  # operations a second of an H100 in bfloat16, and how much of it a run is taken to reach
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Cost:
    """
    Attributes:
        name (`str`): folder and file of the recipe.
        depths (`tuple[int, int]`): of the teacher and of the last student.
        rows (`int`): rows of an optimizer step, over all processes.
        tokens (`int`): token positions that healing reads, over all rounds.
        healing (`float`): GPU hours.
        scoring (`float`, *optional*): GPU hours; none where tasks score, whose length is not known before.
        memory (`float`): GiB of weights, gradients, optimizer and activations of one micro-batch.
    """

    name: str
    depths: tuple[int, int]
    rows: int
    tokens: int
    healing: float
    scoring: float | None
    memory: float


def scoring_operations(config: PretrainedConfig, args: IterativeLayerDistillConfig) -> float:
    """Operations of all rounds: each layer left out in turn, below it the model runs once."""
    width, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads + config.num_key_value_heads
    weights = 2 * heads * (width // config.num_attention_heads) * width + 3 * inner * width
    layer = 2 * weights + 2 * args.max_length * width  # a token through one layer; it sees half of the row
    head = 2 * width * config.vocab_size
    passes = [
        (depth * (depth + 1) / 2) * layer + depth * head + config.num_hidden_layers * layer
        for depth in range(args.target_num_layers + 1, config.num_hidden_layers + 1)
    ]
    return args.num_calibration_samples * args.max_length * sum(passes)


def cost_of(path: Path, processes: int) -> Cost:
    """What a recipe costs; `processes` is what its `gradient_accumulation_steps` is written for."""
    argv = ["--config", str(path), "--use_cpu", "true", "--bf16", "true"]
    arguments, args = parse("compress", argv)
    config, rows = load_shape(arguments.model), args.per_device_train_batch_size
    depth = config.num_hidden_layers
    middle = depth // 2
    edit = Edit.remove(middle) if "remove" in args.edit_space().kinds else Edit.parallelize(middle, middle + 1)
    meter, dtype = StepMeter(config, args), getattr(torch, arguments.dtype)
    needs = meter.step(LayerPlan.identity(depth), [edit], args, dtype)
    rounds = math.ceil((depth - args.target_num_layers) / args.layers_per_round)
    micro_batches = args.gradient_accumulation_steps * processes * args.max_steps * rounds
    hours = 3600 * SHARE * PEAK
    return Cost(
        f"{path.parent.name}/{path.name}",
        (depth, args.target_num_layers),
        rows * args.gradient_accumulation_steps * processes,
        micro_batches * rows * args.max_length,
        micro_batches * needs.flops / hours,
        None if args.tasks else scoring_operations(config, args) / hours,
        needs.peak / 2**30,
    )


def table(costs: list[Cost]) -> str:
    """The costs as Markdown."""
    lines = [
        f"GPU hours of an H100 at {SHARE:.0%} of its peak ({PEAK / 1e12:.0f} TFLOP/s in bfloat16): an assumption, not "
        "a measurement.\nMade by `python recipes/cost.py --output recipes/cost.md`.\n",
        "| recipe | layers | rows a step | tokens | healing, GPU hours | scoring, GPU hours | healing, GiB a GPU |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for cost in costs:
        scoring = "see its README" if cost.scoring is None else _hours(cost.scoring)
        lines.append(
            f"| `{cost.name}` | {cost.depths[0]} -> {cost.depths[1]} | {cost.rows} | {cost.tokens / 1e6:,.1f}M "
            f"| {_hours(cost.healing)} | {scoring} | {cost.memory:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _hours(hours: float) -> str:
    if hours < 0.01:
        return "< 0.01"
    return f"{hours:.2f}" if hours < 1 else f"{hours:.1f}" if hours < 10 else f"{hours:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=None)
    output = parser.parse_args().output
    paths = [path for path in sorted(HERE.glob("*/*.yaml")) if "hf-layerprune compress" in path.read_text()]
    text = table([cost_of(path, 8 if path.stem == "paper" else 1) for path in paths])
    print(text, end="")
    if output is not None:
        write_atomically(output, text)


if __name__ == "__main__":
    main()
