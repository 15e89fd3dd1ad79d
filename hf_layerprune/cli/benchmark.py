"""`hf-layerprune benchmark`: speed and memory of checkpoints, or of random weights of a named shape."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel

from ..benchmark import Load, benchmark_models, num_runs
from ..environment import environment, native_dtype
from ..errors import LayerPruneError
from ..files import to_json, write_atomically
from ..loading import EMBEDDED
from ..progress import Phases, say
from ..shapes import load_shape, random_models, short_name
from ..surgery import plan_of
from .arguments import BenchmarkArguments
from .measure import device, load_on_device
from .parsing import parse

SETTINGS = ("prompt_tokens", "new_tokens", "repeats", "cache_implementation", "compile")


def benchmark(argv: list[str]) -> None:
    """Print speed and memory of models, timed interleaved, for every batch size."""
    (arguments,) = parse("benchmark", _with_shape(argv))
    if arguments.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise LayerPruneError(f"dtype={arguments.dtype!r} is unknown; choose auto, float32, bfloat16 or float16")
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    loads = [Load(batch_size=batch_size, **settings) for batch_size in arguments.batch_size]  # checked before loading
    if arguments.shape is None and arguments.layers:
        raise LayerPruneError(
            f"--layers {' '.join(arguments.layers)} needs --config with a shape, such as Qwen2.5-3B; a checkpoint has "
            "the layers it has"
        )
    if arguments.models and arguments.shape:
        raise LayerPruneError(
            f"models ({', '.join(arguments.models)}) and --config {arguments.shape} are both given; time checkpoints "
            "or random weights"
        )
    file = None if arguments.output_dir is None else Path(arguments.output_dir) / "benchmark.json"
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    settings |= {"dtype": arguments.dtype, "cache_implementation": arguments.cache_implementation or "dynamic"}
    content = {"settings": settings | {"random_weights": arguments.shape is not None}, "environment": environment()}
    entries: list[dict[str, Any]] = []
    with Phases() as phases:
        models = _models(arguments, phases)
        for load in loads:
            runs = num_runs(len(models), load.repeats, load.compile)
            phases.phase(f"measuring speed of {len(models)} models, batch {load.batch_size}", runs)
            entries += _measure(models, load, phases)
            if file is not None:  # after every batch size: the next one may be too much for the memory
                write_atomically(file, to_json(content | {"reports": entries}))
    console = Console()
    console.print(_table(entries))
    if file is not None:
        say(console, f"numbers: {file}")


def _with_shape(argv: list[str]) -> list[str]:
    """Write a `--config` that does not name a YAML file as `--shape`."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if words[-1:] == ["--config"]:
        raise LayerPruneError("--config needs a shape, such as Qwen2.5-3B, or the path of a YAML file")
    for position, (option, value) in enumerate(pairwise(words)):
        if option == "--config" and not value.lower().endswith((".yaml", ".yml")):
            words[position] = "--shape"
    return words


def _models(arguments: BenchmarkArguments, phases: Phases) -> list[tuple[str, PreTrainedModel]]:
    """Load checkpoints, or make random weights; with what the table calls them."""
    if arguments.shape is None:
        models = []
        for name in arguments.models or [EMBEDDED]:
            phases.phase(f"loading {name}")
            models.append((name, load_on_device(name, arguments.dtype)))
        return models
    phases.phase(f"making random weights of the shape {arguments.shape}")
    config, path = load_shape(arguments.shape), Path(arguments.shape).absolute()
    own = native_dtype(config.dtype or torch.float32, device()) or torch.float32
    dtype = own if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    name = short_name(arguments.shape)
    if path.suffix == ".json":  # the file's, or that of the folder a `config.json` is in
        name = path.parent.name if path.name == "config.json" else path.stem
    sizes = [_layers_and_blocks(text) for text in arguments.layers]
    return [(name, model) for model in random_models(config, sizes, dtype, device())]


def _layers_and_blocks(text: str) -> tuple[int, int | None]:
    """Read `"36"` or `"36/29"`: layers, and the blocks that hold them."""
    match = re.fullmatch(r"(\d+)(?:/(\d+))?", text)
    if match is None:
        raise LayerPruneError(f"--layers {text!r} is not a depth; give N layers, or N/B for N layers in B blocks")
    return int(match[1]), match[2] and int(match[2])


def _measure(models: list[tuple[str, PreTrainedModel]], load: Load, phases: Phases) -> list[dict[str, Any]]:
    """Make an entry of `benchmark.json` for each model."""
    try:
        reports = benchmark_models([model for _, model in models], **vars(load), on_run=phases.step)
    except torch.OutOfMemoryError as error:
        raise LayerPruneError(
            f"batch_size={load.batch_size} is too much for the memory of the GPU; give a smaller one or fewer models"
        ) from error
    entries = []
    for (name, model), report in zip(models, reports, strict=True):
        plan, dtype = plan_of(model), str(model.dtype).removeprefix("torch.")
        layers = f"{len(plan.layers)}/{plan.depth}" if plan.parallel_pairs else str(plan.depth)
        facts = {"model": name, "num_layers": plan.depth, "layers": layers, "dtype": dtype}
        entries.append(facts | report.to_dict())
    return entries


def _table(entries: list[dict[str, Any]]) -> Table:
    """Show the result in 80 columns; ratios are to the first model."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("model", overflow="fold", min_width=5)
    for column in (
        "layers", "batch", "prefill\ntokens/s", "decode\ntokens/s", "TTFT\nms", "memory\nMiB", "KV\nB/token"
    ):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    for entry in entries:
        table.add_row(
            escape(entry["model"]),
            entry["layers"],
            str(entry["batch_size"]),
            f"{entry['prefill_tokens_per_second']:.0f} ({entry['prefill_ratio']:.2f}x)",
            f"{entry['decode_tokens_per_second']:.0f} ({entry['decode_ratio']:.2f}x)",
            _short(1000 * entry["time_to_first_token"]),
            _short(entry["peak_memory_bytes"] / 2**20),
            str(entry["kv_bytes_per_token"]),
        )
    return table


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}"
