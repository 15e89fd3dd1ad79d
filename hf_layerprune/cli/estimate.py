"""`hf-layerprune estimate`: what a run of `compress` needs, before it starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PretrainedConfig

from ..budget import Goal
from ..data import check_length
from ..errors import LayerPruneError
from ..estimate import (
    SPARE,
    HealingSetting,
    RunShape,
    assumed_tflops,
    disk_bytes,
    healing_settings,
    parse_size,
    rows_length,
    scoring_bytes,
    scoring_flops,
    tokens_per_step,
)
from ..files import to_json, write_atomically
from ..loading import is_gguf, load_config
from ..progress import Phases, say
from ..shapes import load_shape, shape_names, short_name
from ..surgery import plan_of
from ..trainer import IterativeLayerDistillConfig
from ..trainer.checks import check_budget
from .arguments import EstimateArguments
from .compress import set_default_target, with_default_recipe
from .parsing import parse

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class EstimatedRunConfig(IterativeLayerDistillConfig):
    """The settings of a run on a GPU that need not be here: `bf16` unless they say otherwise, or `use_cpu`."""

    def __post_init__(self) -> None:
        self.on_gpu = not self.use_cpu
        self.use_cpu = True  # nothing runs here, so nothing has to be supported here
        if self.on_gpu and self.bf16 is None:
            self.bf16 = not self.fp16
        super().__post_init__()


def estimate(argv: list[str]) -> None:
    """Print what fits in the memory of a device, and what the run takes of disk and time."""
    arguments, args = parse("estimate", with_default_recipe(argv))
    _check(arguments, args)
    memory = _memory(arguments)
    config = _config(arguments.model)
    set_default_target(args, config.num_hidden_layers)
    teacher = None if arguments.teacher is None else _config(arguments.teacher)
    _check_target(arguments.model, args, config, teacher or config)
    check_length(args.max_length, config, arguments.model)
    shape = RunShape(config, args, teacher, args.on_gpu)
    with Phases() as phases:
        phases.phase("measuring on tensors without memory")
        settings = healing_settings(shape, arguments.dtype, arguments.lora_r)
    best = recommended(settings, memory, arguments.dtype, args.trained_layers, arguments.lora_r)
    content = _content(arguments, shape, memory, settings, best)
    console = Console()
    say(console, _heading(content))
    console.print(_table(settings, memory))
    for line in _answers(content, settings, best):
        say(console, line)
    if arguments.output_file is not None:
        path = Path(arguments.output_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, to_json(content))
        say(console, f"numbers: {path}")


def recommended(
    settings: list[HealingSetting], memory: int, dtype: str, trained: str, lora_r: int | None
) -> HealingSetting | None:
    """The setting to take: of those that fit the one nearest to what was asked for, then the fastest."""
    fitting = [setting for setting in settings if setting.fits(memory)]

    def rank(setting: HealingSetting) -> tuple[Any, ...]:
        asked = (setting.trained, setting.lora_r) == (trained, lora_r)
        return asked, setting.dtype == dtype, not setting.gradient_checkpointing, setting.rows, -setting.peak

    return max(fitting, key=rank, default=None)


def _check(arguments: EstimateArguments, args: IterativeLayerDistillConfig) -> None:
    if not args.heal:
        raise LayerPruneError("heal=False trains nothing, and what is estimated is training; leave it out")
    if arguments.dtype not in DTYPES:
        raise LayerPruneError(f"dtype={arguments.dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    if arguments.lora_r is not None and arguments.lora_r < 1:
        raise LayerPruneError(f"lora_r={arguments.lora_r} is out of range; it must be at least 1")
    if arguments.device_tflops is not None and not arguments.device_tflops > 0:
        raise LayerPruneError(f"device_tflops={arguments.device_tflops} is out of range; it must be above 0")


def _memory(arguments: EstimateArguments) -> int:
    if arguments.gpu_memory is not None:
        return parse_size(arguments.gpu_memory)
    if not torch.cuda.is_available():
        raise LayerPruneError("how much memory is there? give --gpu_memory, such as 24GiB; this machine has no GPU")
    return torch.cuda.get_device_properties(0).total_memory


def _config(name: str) -> PretrainedConfig:
    """Read that of a named shape, a `config.json`, a GGUF file, or a model folder or Hub id, without the weights."""
    if short_name(name) in shape_names() or (Path(name).is_file() and not is_gguf(name)):
        return load_shape(name)
    return load_config(name)


def _check_target(
    name: str, args: IterativeLayerDistillConfig, config: PretrainedConfig, teacher: PretrainedConfig
) -> None:
    """Raise [`LayerPruneError`] unless the run can lead where it should."""
    budget, space = args.budget(), args.edit_space()
    layers = plan_of(config).layers
    if missing := [layer for layer in args.named_trained_layers() or () if layer not in layers]:
        raise LayerPruneError(f"trained_layers names {missing}; {name} has layers {list(layers)}")
    if budget.unit != "latency":
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        check_budget(name, Goal.of(budget, space, model, plan_of(teacher)), plan_of(config), args.heal)


def _content(
    arguments: EstimateArguments,
    shape: RunShape,
    memory: int,
    settings: list[HealingSetting],
    best: HealingSetting | None,
) -> dict[str, Any]:
    """What is written with `--output_file`; bytes, tokens and seconds."""
    args, chosen = shape.args, best or min(settings, key=lambda setting: setting.peak)
    tflops = arguments.device_tflops or assumed_tflops(args, chosen.dtype)
    steps = args.max_steps if args.max_steps > 0 else None
    per_step = chosen.flops * chosen.accumulation
    healing = per_step / (tflops * 1e12)  # seconds of an optimizer step
    return {
        "model": arguments.model,
        "num_layers": shape.depth,
        "parameters": shape.parameters,
        "target": dict(zip(("unit", "value"), (shape.args.budget().unit, shape.args.budget().target), strict=True)),
        "student_parameters": shape.students()[-1] if shape.rounds else None,
        "rounds": shape.rounds,
        "memory": memory,
        "spare_memory": SPARE,
        "max_length": rows_length(args),
        "settings": [asdict(setting) | {"fits": setting.fits(memory)} for setting in settings],
        "recommended": None if best is None else asdict(best),
        "scoring_memory": scoring_bytes(shape, chosen),
        "disk": disk_bytes(shape, chosen),
        "tokens_per_step": tokens_per_step(args),
        "tokens_per_round": None if steps is None else steps * tokens_per_step(args),
        "steps_per_round": steps,
        "device_tflops": tflops,
        "device_tflops_assumed": arguments.device_tflops is None,
        "seconds_per_million_tokens": healing * 1e6 / tokens_per_step(args),
        "seconds_of_healing": None if steps is None else steps * healing,
        "seconds_of_scoring": scoring_flops(shape) / (tflops * 1e12),
    }  # fmt: skip


def _heading(content: dict[str, Any]) -> str:
    name, depth = content["model"], content["num_layers"]
    text = f"{name}: {depth} layers, {_count(content['parameters'])} parameters"
    if content["rounds"] is None:
        unit, value = content["target"]["unit"], content["target"]["value"]
        return f"{text} -> {unit} {value:g}; how many rounds that takes, only measuring tells"
    rounds = content["rounds"]
    return f"{text} -> {_count(content['student_parameters'])} in {rounds} round{'s' * (rounds > 1)}"


def _table(settings: list[HealingSetting], memory: int) -> Table:
    """A line for each way to heal; the activations are those of the most rows that fit, or of the fewest."""
    title = "GiB on the device, by rows of a micro-batch, and the most rows that fit"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    rows = sorted({setting.rows for setting in settings})
    table.add_column("trained", overflow="fold", min_width=10)
    for column in ("dtype", "ckpt"):
        table.add_column(column, no_wrap=True)
    peaks = [f"peak,\n{rows[0]} row{'s' * (rows[0] > 1)}", *(f"\n{n}" for n in rows[1:])]
    for column in ("both\nmodels", "grad+\nAdamW", "act.+\nKL", *peaks):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True, justify="right")
    ways: dict[tuple[str, str, bool], list[HealingSetting]] = {}
    for setting in settings:
        ways.setdefault((setting.label, setting.dtype, setting.gradient_checkpointing), []).append(setting)
    for (label, dtype, checkpointing), of_way in ways.items():
        fitting = [setting for setting in of_way if setting.fits(memory)]
        shown = fitting[-1] if fitting else of_way[0]
        parts = (shown.weights, shown.optimizer, shown.activations, *(setting.peak for setting in of_way))
        table.add_row(
            label, dtype, "yes" if checkpointing else "no", *map(_gib, parts), str(shown.rows) if fitting else "no"
        )
    return table


def _answers(content: dict[str, Any], settings: list[HealingSetting], best: HealingSetting | None) -> list[str]:
    memory = _gib(content["memory"])
    if best is None:
        least = min(settings, key=lambda setting: setting.peak)
        lines = [
            f"Nothing fits in {memory} GiB with a tenth to spare. The least, {_gib(least.peak)} GiB, is {least.flags}",
            f"What would help: shorter rows (--max_length, now {content['max_length']}), a smaller model, or a device "
            f"with {_gib(int(least.peak / (1 - SPARE)))} GiB; the weights alone take {_gib(least.weights)} GiB",
        ]
    else:
        lines = [f"Fits in {memory} GiB with a tenth to spare ({_gib(best.peak)} GiB): {best.flags}"]
        if content["scoring_memory"] > best.peak:
            lines.append(f"Scoring needs more than that, {_gib(content['scoring_memory'])} GiB or so")
    return [*lines, _disk_line(content), *_time_lines(content)]


def _disk_line(content: dict[str, Any]) -> str:
    disk = content["disk"]
    names = {
        "rounds": "the student of every round", "model": "the last one again",
        "checkpoints": "checkpoints within a round",
    }  # fmt: skip
    parts = ", ".join(f"{name} {_gib(disk[key])}" for key, name in names.items() if disk[key])
    return f"Disk: {_gib(sum(disk.values()))} GiB{'' if content['rounds'] else ' for one round'} ({parts})"


def _time_lines(content: dict[str, Any]) -> list[str]:
    per_step, steps = content["tokens_per_step"], content["steps_per_round"]
    how = "assumed; --device_tflops says better" if content["device_tflops_assumed"] else "as given"
    rate = f"{content['device_tflops']:g} TFLOP/s, {how}"
    scoring = _duration(content["seconds_of_scoring"])
    if steps is None:
        return [
            f"Tokens: up to {per_step:,} per step; how many steps a round has, the data tells (or --max_steps)",
            f"Time, rough ({rate}): healing {_duration(content['seconds_per_million_tokens'])} per million tokens, "
            f"scoring {scoring} per round",
        ]
    return [
        f"Tokens per round: up to {content['tokens_per_round']:,} ({steps:,} steps of {per_step:,})",
        f"Time per round, rough ({rate}): healing {_duration(content['seconds_of_healing'])}, scoring {scoring}",
    ]


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"


def _gib(size: int) -> str:
    """Three digits of GiB."""
    return f"{size / 2**30:.0f}" if size >= 100 * 2**30 else f"{size / 2**30:#.3g}"


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} s"
