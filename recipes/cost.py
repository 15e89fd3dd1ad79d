"""What the recipes of `compress` cost, from their settings alone: counted operations and bytes, no GPU.

Healing is counted for the layer in the middle removed (or run in parallel with the next) and every row as long as
`max_length`: memory by `hf_layerprune.memory`, operations, like those of scoring, by layer passes. GPU hours are these
operations over what a GPU computes in an hour at `SHARE` of its peak, which is assumed, not measured.

    python recipes/cost.py --output recipes/cost.md
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_layerprune.benchmark import load_shape
from hf_layerprune.cli.parsing import parse
from hf_layerprune.estimate import RunSizes
from hf_layerprune.files import write_atomically
from hf_layerprune.memory import StepMeter, StepShape, Way

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


def cost_of(path: Path, processes: int) -> Cost:
    """Count what a recipe costs; `processes` is what its `gradient_accumulation_steps` is written for."""
    arguments, args = parse("compress", ["--config", str(path), "--use_cpu", "true", "--bf16", "true"])
    config, rows = load_shape(arguments.model), args.per_device_train_batch_size
    run, depth = RunSizes(config, args), config.num_hidden_layers
    middle = depth // 2
    trained, width = (2, 1) if run.removed else (1, 2)
    step = StepShape(trained, depth - middle - 2, middle, width)
    if args.trained_layers == "all":
        step = StepShape(depth - run.removed, 0, run.removed)
    way = Way(args.trained_layers, None, arguments.dtype, bool(args.gradient_checkpointing))
    needs = StepMeter(config, args).needs(way, step, rows, accumulates=run.per_step > rows)
    flops = rows * run.healing_flops(way, step, needs.trained // getattr(torch, arguments.dtype).itemsize)
    micro_batches = args.gradient_accumulation_steps * processes * args.max_steps * run.rounds
    hours = 3600 * SHARE * PEAK
    scoring = sum(map(run.scoring_flops, range(args.target_num_layers + 1, depth + 1))) / hours
    return Cost(
        f"{path.parent.name}/{path.name}",
        (depth, args.target_num_layers),
        run.per_step * processes,
        micro_batches * rows * args.max_length,
        micro_batches * flops / hours,
        None if args.tasks else scoring,
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
