"""`hf-layerprune estimate`: what a run of `compress` needs, before it starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import torch
from transformers import PretrainedConfig

from ..architectures import check_parallel
from ..benchmark import SHAPES, load_shape, short_name
from ..budget import Goal
from ..data import check_length
from ..errors import LayerPruneError
from ..estimate import SPARE, Estimate, HealingSetting, RunSizes, estimate_run, parse_size
from ..files import to_json, write_atomically
from ..loading import load_config
from ..plan import LayerPlan
from ..progress import Console, Phases, say
from ..report import millions
from ..surgery import plan_of
from ..trainer.config import as_words
from ..trainer.run import check_budget
from ..trainer.trainable import check_trained_layers
from .common import print_table, writable
from .compress import set_default_target, with_default_recipe
from .parsing import Parser


def estimate(argv: list[str]) -> None:
    """Print what fits in the memory of a GPU, and what the run takes of disk and time."""
    parser = Parser("estimate")
    # nothing runs here, so nothing has to be supported here
    arguments, args = parser.read([*with_default_recipe(argv), "--use_cpu", "true"])
    if parser.given.get("bf16") is None:
        args.bf16 = not args.fp16  # as on a GPU
    config = _config(arguments.model)
    if arguments.gpu_memory is not None:
        memory = parse_size(arguments.gpu_memory)
    elif torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        raise LayerPruneError("how much memory is there? give --gpu_memory, such as 24GiB; this machine has no GPU")
    set_default_target(args, config.num_hidden_layers)
    teacher = None if arguments.teacher is None else _config(arguments.teacher)
    run = RunSizes(config, args, teacher)
    _check(arguments.model, run, plan_of(teacher or config))
    path = None if arguments.output_file is None else Path(arguments.output_file)
    if path is not None and path.is_dir():
        raise LayerPruneError(f"output_file={path} is a folder; name a file in it")
    with writable(path and path.parent), Phases() as phases:
        phases.phase("measuring on tensors without memory")
        found = estimate_run(run, memory, arguments.dtype, arguments.lora_r, arguments.device_tflops)
    console = Console()
    start, budget = f"{config.num_hidden_layers} layers, {millions(found.parameters)} parameters", args.budget
    end = f"{budget.unit} {budget.target:g}; how many rounds that takes, only measuring tells"
    if found.rounds is not None:
        end = f"{millions(found.student_parameters)} in {found.rounds} round{'s' * (found.rounds > 1)}"
    say(console, f"{arguments.model}: {start} -> {end}")
    _print_settings(found.settings, memory)
    say(console, _fitting(found, memory))
    for line in _costs(found, "assumed; see --device_tflops" if arguments.device_tflops is None else "as given"):
        say(console, line)
    if path is not None:
        write_atomically(path, to_json({"model": arguments.model, "memory": memory} | asdict(found)))
        say(console, f"numbers: {path}")


def _config(name: str) -> PretrainedConfig:
    """Read the config of a folder, a file or a Hub id, without its weights; or that of a shape, unless a folder has
    its name."""
    return load_shape(name) if not Path(name).exists() and short_name(name) in SHAPES else load_config(name)


def _check(name: str, run: RunSizes, original: LayerPlan) -> None:
    """Refuse a run that would not start."""
    args, plan, budget = run.args, plan_of(run.config), run.args.budget
    if not args.heal:
        raise LayerPruneError("heal=False trains nothing, and what is estimated is training; leave it out")
    check_trained_layers(args.trained_layers, plan, name)
    if budget.unit != "latency":
        check_budget(name, Goal.of(budget, args.edit_space, run.model, original), plan, args.heal)
    elif "parallelize" in args.edit_space.kinds:
        check_parallel(run.config)
    check_length(args.max_length, run.config, name)


def _print_settings(settings: list[HealingSetting], memory: int) -> None:
    """Print a line for each way to heal; --output_file has the parts of its peak."""
    lines = []
    for _, group in groupby(settings, lambda one: (one.trained, one.lora_r, one.dtype, one.gradient_checkpointing)):
        of_way = list(group)
        fitting = [setting for setting in of_way if setting.fits(memory)]
        shown = of_way[0]
        name = as_words(shown.trained) + (f" LoRA {shown.lora_r}" if shown.lora_r else "")
        twice = "yes" if shown.gradient_checkpointing else "no"
        peaks = [_gib(setting.peak) for setting in of_way]
        lines.append([name, shown.dtype, twice, *peaks, str(fitting[-1].rows) if fitting else "no"])
    counts = [f"{n} row{'s' * (n > 1)}" for n in sorted({setting.rows for setting in settings})]
    names = ("trained", "dtype", "ckpt", *counts, "fits")
    print_table(names, lines, "peak in GiB on the GPU, by rows of a micro-batch, and the most rows that fit")


def _fitting(found: Estimate, memory: int) -> str:
    """Say which options of `compress` to take, or what would help."""
    best = found.recommended or min(found.settings, key=lambda setting: setting.peak)
    options = (
        f"--trained_layers {as_words(best.trained)}{f' --lora_r {best.lora_r}' if best.lora_r else ''} "
        f"--dtype {best.dtype} --gradient_checkpointing {str(best.gradient_checkpointing).lower()} "
        f"--per_device_train_batch_size {best.rows} --gradient_accumulation_steps {best.accumulation}"
    )
    if found.recommended:
        return f"Fits in {_gib(memory)} GiB with a tenth to spare ({_gib(best.peak)} GiB): {options}"
    return (
        f"Nothing fits in {_gib(memory)} GiB with a tenth to spare. The least, {_gib(best.peak)} GiB, is {options}\n"
        f"Shorter rows (--max_length), a smaller model, or a GPU with {_gib(best.peak / (1 - SPARE))} GiB would help; "
        f"the weights alone take {_gib(best.weights)} GiB"
    )


def _costs(found: Estimate, rate: str) -> Iterator[str]:
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in found.disk.items())
    yield f"Disk: {_gib(sum(found.disk.values()))} GiB{'' if found.rounds else ' for one round'} ({parts})"
    tokens, steps = found.tokens_per_step, found.steps_per_round
    healing = f"healing {_minutes(found.seconds_per_step * (steps or 1e6 / tokens))}"
    if steps is None:
        yield f"Tokens: up to {tokens:,} per step; how many steps a round has, the data tells (or --max_steps)"
        healing += " per million tokens"
    else:
        yield f"Tokens per round: up to {steps * tokens:,} ({steps:,} steps of {tokens:,})"
    scoring = f"scoring {_minutes(found.seconds_of_scoring)}"
    yield f"Time per round, rough ({found.device_tflops:g} TFLOP/s, {rate}): {healing}, {scoring}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.0f}" if size >= 100 * 2**30 else f"{size / 2**30:#.3g}"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.2g} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
