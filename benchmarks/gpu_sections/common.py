"""What the sections share: how to run, small models, and how to time."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

Case = tuple[str, Callable[[], dict[str, Any]]]
"""A name, and what measures it."""


@dataclass(frozen=True)
class Run:
    """How everything is run.

    Args:
        device (`torch.device`): of all models.
        tiny (`bool`): shapes of nothing, to prove the script.
        full (`bool`): everything, in place of what fits into nine minutes.
        scratch (`Path`): a folder for files that nobody needs later.
    """

    device: torch.device
    tiny: bool
    full: bool
    scratch: Path

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def repeats(self) -> int:
        return 1 if self.tiny else 7 if self.full else 3


def small_model(
    family: str, num_layers: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A random model whose layers matter: biases and norms are away from their initial values."""
    from hf_layerprune.architectures import ARCHITECTURES

    architecture = ARCHITECTURES[family]
    config = architecture.config_class(
        vocab_size=512, hidden_size=256, intermediate_size=384, num_hidden_layers=num_layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=True, initializer_range=0.06,
    )  # fmt: skip
    torch.manual_seed(0)
    model = architecture.model_class(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.3)
        elif "norm" in name:
            parameter.uniform_(0.5, 1.5)
    return model.to(device, dtype)


def narrow(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """The config of a model of the same family and almost no size."""
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": num_layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    values = config.to_dict() | sizes | heads | {"layer_types": ["full_attention"] * num_layers}
    return type(config)(**{name: value for name, value in values.items() if name not in ("model_type", "dtype")})


def random_rows(run: Run, vocabulary: int, rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (rows, length), generator=generator).to(run.device)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(act: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    act()
    synchronize()
    return time.perf_counter() - start


def in_turns(ways: dict[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every way in each of the repeats, taking turns, after some that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(-warmup, repeats):
        for name, way in ways.items():
            taken = seconds_of(way)
            if repeat >= 0:
                seconds[name].append(taken)
    return seconds


def median_ratio(values: Iterable[float], over: Iterable[float]) -> float:
    """Median of the ratios within each turn."""
    return statistics.median(a / b for a, b in zip(values, over, strict=True))


def release() -> None:
    """Give back the memory of what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over that of `expected`, in float64."""
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm()).item()
