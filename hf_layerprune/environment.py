"""Versions and hardware that numbers were measured with, and short hashes of the models and texts they are of."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import is_torch_bf16_gpu_available

from . import __version__


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions and hardware; without a `device` those of the accelerator, or of the CPU if there is none."""
    return {
        "hardware": hardware(device or torch.accelerator.current_accelerator(check_available=True)),
        "python": platform.python_version(),
        "hf-layerprune": __version__,  # also where the package is only on the path, not installed
        **{name: version(name) for name in ("torch", "transformers", "trl")},
    }


def has_bf16(use_cpu: bool) -> bool:
    """Whether the hardware multiplies bfloat16 matrices itself; emulation is slower than float32."""
    if use_cpu:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return is_torch_bf16_gpu_available()


def native_dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """`dtype`, or float32 on a CPU that would have to emulate it, many times slower; `None` is not known yet."""
    native = {torch.float32, torch.float64} | ({torch.bfloat16} if has_bf16(use_cpu=True) else set())
    return dtype if device.type != "cpu" or dtype in native else torch.float32


def hardware(device: torch.device | None) -> str:
    """Product name of a device and its size; `None` is the CPU."""
    kind = "cpu" if device is None else device.type
    if kind in ("cuda", "xpu"):
        found = getattr(torch, kind).get_device_properties(device)
        return f"{found.name}, {found.total_memory / 2**30:.0f} GiB"
    if kind != "cpu":
        return f"{platform.processor() or platform.machine()} ({kind})"
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")  # on Linux
    if info.exists() and (found := re.search(r"^model name\s*: (.+)", info.read_text(errors="replace"), re.MULTILINE)):
        name = found[1]
    return f"CPU {name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def fingerprint(parts: Iterable[Any]) -> str:
    """Hash tensors, and anything else by how it prints."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(part.tolist() if isinstance(part, Tensor) else part).encode())
    return digest.hexdigest()[:16]


def fingerprint_model(model: PreTrainedModel) -> str:
    """Hash some weights from all over every tensor: cheap at any size, different after any training."""
    flat = (parameter.detach().flatten() for parameter in model.parameters())
    return fingerprint(weights[:: max(1, len(weights) // 8)].float().cpu() for weights in flat)
