"""`hf-layerprune benchmark`: speed and memory of checkpoints, or of random weights of a named shape."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..benchmark import Load, benchmark_models, load_shape, num_runs, random_models, short_name
from ..environment import environment, native_dtype
from ..errors import LayerPruneError
from ..files import to_json, write_atomically
from ..loading import EMBEDDED
from ..progress import Console, Phases, say
from ..surgery import plan_of
from .arguments import BenchmarkArguments
from .common import device, load_on_device, print_table, writable
from .parsing import parse

SETTINGS = ("prompt_tokens", "new_tokens", "repeats", "cache_implementation", "compile")
SPEEDS = ("prefill\ntokens/s", "decode\ntokens/s", "TTFT\nms", "memory\nMiB", "KV\nB/token")


def benchmark(argv: list[str]) -> None:
    """Print speed and memory of models, timed interleaved, for every batch size."""
    (arguments,) = parse("benchmark", argv)
    if arguments.layers and arguments.shape is None:
        raise LayerPruneError("--layers needs --shape, such as Qwen2.5-3B; a checkpoint has the layers it has")
    if arguments.models and arguments.shape is not None:
        raise LayerPruneError(
            f"models ({', '.join(arguments.models)}) and --shape {arguments.shape} are both given; time checkpoints "
            "or random weights"
        )
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    loads = [Load(batch_size=batch_size, **settings) for batch_size in arguments.batch_size]  # checked before loading
    settings |= {"dtype": arguments.dtype, "random_weights": arguments.shape is not None}
    folder = None if arguments.output_dir is None else Path(arguments.output_dir)
    entries: list[dict[str, Any]] = []
    with writable(folder), Phases() as phases:
        models = list(_models(arguments, phases))
        for load in loads:
            runs = num_runs(len(models), load.repeats, load.compile)
            phases.phase(f"measuring speed, batch {load.batch_size}", runs)
            reports = benchmark_models([model for _, model in models], **vars(load), on_run=phases.step)
            for (name, model), report in zip(models, reports, strict=True):
                plan, dtype = plan_of(model), str(model.dtype).removeprefix("torch.")
                layers = f"{len(plan.layers)}/{plan.depth}" if plan.parallel_pairs else str(plan.depth)
                facts = {"model": name, "num_layers": plan.depth, "layers": layers, "dtype": dtype}
                entries.append(facts | report.to_dict())
            if folder is not None:  # after every batch size: the next one may be too much for the memory
                content = {"settings": settings, "environment": environment(), "reports": entries}
                write_atomically(folder / "benchmark.json", to_json(content))
    print_table(("model", "layers", "batch", *SPEEDS), map(_cells, entries))
    if folder is not None:
        say(Console(), f"numbers: {folder / 'benchmark.json'}")


def _models(arguments: BenchmarkArguments, phases: Phases) -> Iterator[tuple[str, PreTrainedModel]]:
    """Load checkpoints, or make random weights; with what the table calls them."""
    if arguments.shape is None:
        for name in arguments.models or [EMBEDDED]:
            yield name, load_on_device(name, arguments.dtype, phases)
        return
    phases.phase(f"making random weights of the shape {arguments.shape}")
    config, name = load_shape(arguments.shape), Path(short_name(arguments.shape)).name
    own = native_dtype(config.dtype or torch.float32, device())
    dtype = own if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    sizes = []
    for text in arguments.layers:  # "36" or "36/29": layers, and the blocks that hold them
        match = re.fullmatch(r"(\d+)(?:/(\d+))?", text)
        if match is None:
            raise LayerPruneError(f"--layers {text!r} is not a depth; give N layers, or N/B for N layers in B blocks")
        sizes.append((int(match[1]), match[2] and int(match[2])))
    for model in random_models(config, sizes, dtype, device()):
        yield name, model


def _cells(entry: dict[str, Any]) -> list[str]:
    """A row of the table; ratios are to the first model."""
    return [
        entry["model"],
        entry["layers"],
        str(entry["batch_size"]),
        f"{entry['prefill_tokens_per_second']:.0f} ({entry['prefill_ratio']:.2f}x)",
        f"{entry['decode_tokens_per_second']:.0f} ({entry['decode_ratio']:.2f}x)",
        f"{1000 * entry['time_to_first_token']:.0f}",
        f"{entry['peak_memory_bytes'] / 2**20:.0f}",
        str(entry["kv_bytes_per_token"]),
    ]
