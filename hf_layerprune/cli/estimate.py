"""`hf-layerprune estimate`: what a run of `compress` needs, before it starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PretrainedConfig

from ..budget import Goal
from ..data import check_length
from ..errors import LayerPruneError
from ..estimate import SPARE, Estimate, HealingSetting, RunSizes, estimate_run, parse_size
from ..files import to_json, write_atomically
from ..loading import is_gguf, load_config
from ..plan import LayerPlan
from ..progress import Phases, say
from ..shapes import SHAPES, load_shape, short_name
from ..surgery import plan_of
from ..trainer import IterativeLayerDistillConfig
from ..trainer.config import as_words
from ..trainer.run import check_budget
from .arguments import EstimateArguments
from .compress import set_default_target, with_default_recipe
from .parsing import parse


@dataclass
class EstimatedRunConfig(IterativeLayerDistillConfig):
    """The settings of a run on a GPU that need not be here: `bf16` unless they say otherwise."""

    def __post_init__(self) -> None:
        self.use_cpu = True  # nothing runs here, so nothing has to be supported here
        if self.bf16 is None:
            self.bf16 = not self.fp16
        super().__post_init__()


def estimate(argv: list[str]) -> None:
    """Print what fits in the memory of a GPU, and what the run takes of disk and time."""
    argv = with_default_recipe(argv)
    arguments, args = parse("estimate", argv)
    memory = _memory(arguments.gpu_memory)
    config = _config(arguments.model)
    set_default_target(args, config.num_hidden_layers)
    teacher = None if arguments.teacher is None else _config(arguments.teacher)
    _check(arguments, args, config, plan_of(teacher or config))
    run = RunSizes(config, args, teacher)
    with Phases() as phases:
        phases.phase("measuring on tensors without memory")
        found = estimate_run(run, memory, arguments.dtype, arguments.lora_r, arguments.device_tflops)
    console = Console()
    say(console, f"{arguments.model}: {config.num_hidden_layers} layers, {_target(found, args)}")
    console.print(_table(found.settings, memory))
    for line in (_fitting(found, memory), *_costs(found, assumed=arguments.device_tflops is None)):
        say(console, line)
    if arguments.output_file is not None:
        path = Path(arguments.output_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, to_json({"model": arguments.model, "memory": memory} | asdict(found)))
        say(console, f"numbers: {path}")


def _memory(given: str | None) -> int:
    if given is not None:
        return parse_size(given)
    if not torch.cuda.is_available():
        raise LayerPruneError("how much memory is there? give --gpu_memory, such as 24GiB; this machine has no GPU")
    return torch.cuda.get_device_properties(0).total_memory


def _config(name: str) -> PretrainedConfig:
    """Read that of a named shape, a `config.json`, a GGUF file, or a model folder or Hub id, without the weights."""
    is_shape = short_name(name) in SHAPES or (Path(name).is_file() and not is_gguf(name))
    return load_shape(name) if is_shape else load_config(name)


def _check(
    arguments: EstimateArguments, args: IterativeLayerDistillConfig, config: PretrainedConfig, original: LayerPlan
) -> None:
    """Raise [`LayerPruneError`] for a run that would not start."""
    if not args.heal:
        raise LayerPruneError("heal=False trains nothing, and what is estimated is training; leave it out")
    if arguments.dtype not in ("float32", "bfloat16", "float16"):
        raise LayerPruneError(f"dtype={arguments.dtype!r} is unknown; choose float32, bfloat16 or float16")
    for name in ("lora_r", "device_tflops"):
        if (value := getattr(arguments, name)) is not None and not value > 0:
            raise LayerPruneError(f"{name}={value} is out of range; it must be above 0")
    plan, budget = plan_of(config), args.budget
    named = args.trained_layers if isinstance(args.trained_layers, tuple) else ()
    if missing := [layer for layer in named if layer not in plan.layers]:
        raise LayerPruneError(f"trained_layers names {missing}; {arguments.model} has layers {list(plan.layers)}")
    if budget.unit != "latency":
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        goal = Goal.of(budget, args.edit_space, model, original)
        check_budget(arguments.model, goal, plan, args.heal)
    check_length(args.max_length, config, arguments.model)


def _target(found: Estimate, args: IterativeLayerDistillConfig) -> str:
    start, budget = f"{_count(found.parameters)} parameters", args.budget
    if found.rounds is None:
        return f"{start} -> {budget.unit} {budget.target:g}; how many rounds that takes, only measuring tells"
    return f"{start} -> {_count(found.student_parameters)} in {found.rounds} round{'s' * (found.rounds > 1)}"


def _table(settings: list[HealingSetting], memory: int) -> Table:
    """Make a line for each way to heal; its parts are those of the most rows that fit, or of the fewest."""
    title = "GiB on the GPU, by rows of a micro-batch, and the most rows that fit"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    rows = sorted({setting.rows for setting in settings})
    table.add_column("trained", overflow="fold", min_width=10)
    peaks = [f"peak,\n{rows[0]} row{'s' * (rows[0] > 1)}", *(f"\n{n}" for n in rows[1:])]
    for column in ("dtype", "ckpt", "both\nmodels", "grad+\nAdamW", "act.+\nKL", *peaks, "fits"):
        table.add_column(column, no_wrap=True, justify="left" if column in ("dtype", "ckpt") else "right")
    for _, group in groupby(settings, lambda one: (one.trained, one.lora_r, one.dtype, one.gradient_checkpointing)):
        of_way = list(group)
        fitting = [setting for setting in of_way if setting.fits(memory)]
        shown = (fitting or of_way[:1])[-1]
        name = as_words(shown.trained) + (f" LoRA {shown.lora_r}" if shown.lora_r else "")
        parts = (shown.weights, shown.optimizer, shown.activations, *(setting.peak for setting in of_way))
        twice = "yes" if shown.gradient_checkpointing else "no"
        table.add_row(name, shown.dtype, twice, *map(_gib, parts), str(shown.rows) if fitting else "no")
    return table


def _fitting(found: Estimate, memory: int) -> str:
    """Say which options of `compress` to take, or what would help."""
    best = found.recommended or min(found.settings, key=lambda setting: setting.peak)
    lora = f" --lora_r {best.lora_r}" if best.lora_r else ""
    options = (
        f"--trained_layers {as_words(best.trained)}{lora} --dtype {best.dtype} --gradient_checkpointing "
        f"{str(best.gradient_checkpointing).lower()} --per_device_train_batch_size {best.rows} "
        f"--gradient_accumulation_steps {best.accumulation}"
    )
    if found.recommended:
        return f"Fits in {_gib(memory)} GiB with a tenth to spare ({_gib(best.peak)} GiB): {options}"
    return (
        f"Nothing fits in {_gib(memory)} GiB with a tenth to spare. The least, {_gib(best.peak)} GiB, is {options}\n"
        f"Shorter rows (--max_length), a smaller model, or a GPU with {_gib(best.peak / (1 - SPARE))} GiB would help; "
        f"the weights alone take {_gib(best.weights)} GiB"
    )


def _costs(found: Estimate, assumed: bool) -> Iterator[str]:
    """Say what the run takes of disk, tokens and time."""
    names = {
        "rounds": "the student of every round",
        "model": "the last again",
        "checkpoints": "checkpoints in a round",
    }
    parts = ", ".join(f"{name} {_gib(found.disk[key])}" for key, name in names.items() if found.disk[key])
    yield f"Disk: {_gib(sum(found.disk.values()))} GiB{'' if found.rounds else ' for one round'} ({parts})"
    tokens, steps = found.tokens_per_step, found.steps_per_round
    if steps is None:
        yield f"Tokens: up to {tokens:,} per step; how many steps a round has, the data tells (or --max_steps)"
        healing = f"{_duration(found.seconds_per_step * 1e6 / tokens)} per million tokens"
    else:
        yield f"Tokens per round: up to {steps * tokens:,} ({steps:,} steps of {tokens:,})"
        healing = _duration(found.seconds_per_step * steps)
    rate = f"{found.device_tflops:g} TFLOP/s, {'assumed; --device_tflops says better' if assumed else 'as given'}"
    yield f"Time per round, rough ({rate}): healing {healing}, scoring {_duration(found.seconds_of_scoring)}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"


def _gib(size: float) -> str:
    """Three digits of GiB."""
    return f"{size / 2**30:.0f}" if size >= 100 * 2**30 else f"{size / 2**30:#.3g}"


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} s"
