"""`hf-layerprune benchmark`: speed and memory of checkpoints, or of random weights of a named shape."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel

from ..benchmark import benchmark_models, check_settings, num_runs
from ..environment import native_dtype
from ..errors import LayerPruneError
from ..files import to_json, write_atomically
from ..loading import EMBEDDED
from ..progress import Phases, say
from ..report import environment
from ..shapes import load_shape, random_model, random_models, short_name
from ..surgery import plan_of
from .arguments import BenchmarkArguments
from .measure import device, load_on_device
from .parsing import parse

DTYPES = ("auto", "float32", "bfloat16", "float16")


def benchmark(argv: list[str]) -> None:
    """Print speed and memory of models, timed interleaved, for every batch size."""
    (arguments,) = parse("benchmark", _with_shape(argv))
    _check(arguments)
    folder = None if arguments.output_dir is None else Path(arguments.output_dir)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    with Phases() as phases:
        models = _random_models(arguments, phases) if arguments.shape else _checkpoints(arguments, phases)
        for batch_size in arguments.batch_size:
            runs = num_runs(len(models), arguments.repeats, arguments.compile)
            phases.phase(f"measuring speed of {len(models)} models, batch {batch_size}", runs)
            entries += _measure(models, batch_size, arguments, phases)
            if folder is not None:  # at every batch size: the next one may be too much for the memory
                write_atomically(folder / "benchmark.json", to_json(_content(entries, arguments)))
    console = Console()
    console.print(_table(entries))
    if folder is not None:
        say(console, f"numbers: {folder / 'benchmark.json'}")


def _with_shape(argv: list[str]) -> list[str]:
    """A `--config` that does not name a YAML file is a `--shape`."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if words[-1:] == ["--config"]:
        raise LayerPruneError("--config needs a shape, such as Qwen2.5-3B, or the path of a YAML file")
    for position, (option, value) in enumerate(pairwise(words)):
        if option == "--config" and not value.lower().endswith((".yaml", ".yml")):
            words[position] = "--shape"
    return words


def _check(arguments: BenchmarkArguments) -> None:
    """Everything that can be said before a model is loaded."""
    if arguments.models and arguments.shape:
        raise LayerPruneError(
            f"models ({', '.join(arguments.models)}) and --config {arguments.shape} are both given; time checkpoints "
            "or random weights"
        )
    if arguments.layers and not arguments.shape:
        raise LayerPruneError(
            f"--layers {' '.join(arguments.layers)} needs --config with a shape, such as Qwen2.5-3B; a checkpoint has "
            "the layers it has"
        )
    if arguments.dtype not in DTYPES:
        raise LayerPruneError(f"dtype={arguments.dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    for batch_size in arguments.batch_size:
        check_settings(
            arguments.prompt_tokens,
            arguments.new_tokens,
            batch_size,
            arguments.repeats,
            arguments.cache_implementation,
            arguments.compile,
        )


def _checkpoints(arguments: BenchmarkArguments, phases: Phases) -> list[tuple[str, PreTrainedModel]]:
    models = []
    for name in arguments.models or [EMBEDDED]:
        phases.phase(f"loading {name}")
        models.append((name, load_on_device(name, arguments.dtype)))
    return models


def _random_models(arguments: BenchmarkArguments, phases: Phases) -> list[tuple[str, PreTrainedModel]]:
    phases.phase(f"making random weights of the shape {arguments.shape}")
    config = load_shape(arguments.shape)
    sizes = [_layers_and_blocks(text) for text in arguments.layers]
    own = native_dtype(config.dtype or torch.float32, device()) or torch.float32
    dtype = own if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    name = _label(arguments.shape)
    if not sizes:
        return [(name, random_model(config, dtype=dtype, device=device()))]
    return [(name, model) for model in random_models(config, sizes, dtype, device())]


def _label(shape: str) -> str:
    """Short name of a shape, for the table: that of its file, or of the folder a `config.json` lies in."""
    if not shape.endswith(".json"):
        return short_name(shape)
    path = Path(shape).absolute()
    return path.parent.name if path.name == "config.json" else path.stem


def _layers_and_blocks(text: str) -> tuple[int, int | None]:
    """`"36"` or `"36/29"`: layers, and the blocks that hold them."""
    match = re.fullmatch(r"(\d+)(?:/(\d+))?", text)
    if match is None:
        raise LayerPruneError(f"--layers {text!r} is no depth; give N layers, or N/B for N layers in B blocks")
    layers, blocks = match.groups()
    return int(layers), None if blocks is None else int(blocks)


def _measure(
    models: Sequence[tuple[str, PreTrainedModel]], batch_size: int, arguments: BenchmarkArguments, phases: Phases
) -> list[dict[str, Any]]:
    """One entry of `benchmark.json` for each model."""
    try:
        reports = benchmark_models(
            [model for _, model in models],
            arguments.prompt_tokens,
            arguments.new_tokens,
            batch_size,
            arguments.repeats,
            cache_implementation=arguments.cache_implementation,
            compile=arguments.compile,
            on_run=phases.step,
        )
    except torch.OutOfMemoryError as error:
        raise LayerPruneError(
            f"batch_size={batch_size} is too much for the memory of the GPU; give a smaller one or fewer models"
        ) from error
    entries = []
    for (name, model), report in zip(models, reports, strict=True):
        plan = plan_of(model)
        layers = f"{len(plan.layers)}/{plan.depth}" if plan.parallel_pairs else str(plan.depth)
        dtype = str(model.dtype).removeprefix("torch.")
        facts = {"model": name, "num_layers": plan.depth, "layers": layers, "dtype": dtype}
        entries.append(facts | report.to_dict())
    return entries


def _content(entries: list[dict[str, Any]], arguments: BenchmarkArguments) -> dict[str, Any]:
    settings = {
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "repeats": arguments.repeats,
        "dtype": arguments.dtype,
        "cache_implementation": arguments.cache_implementation or "dynamic",
        "compile": arguments.compile,
        "random_weights": arguments.shape is not None,
    }
    return {"settings": settings, "environment": environment(), "reports": entries}


def _table(entries: list[dict[str, Any]]) -> Table:
    """The result as a table that fits a terminal of 80 columns; ratios are to the first model."""
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
