"""What numbers were measured with: versions and hardware."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions and hardware the numbers come from; without a `device` that is the accelerator, if there is one."""
    return {
        "hardware": hardware(device or torch.accelerator.current_accelerator(check_available=True)),
        "python": platform.python_version(),
        **{name: version(name) for name in ("hf-layerprune", "torch", "transformers", "trl")},
    }


def hardware(device: torch.device | None) -> str:
    """What a device is sold as; `None` is the CPU."""
    kind = "cpu" if device is None else device.type
    if kind == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {_cpu_name()}, {os.cpu_count()} cores" if kind == "cpu" else kind


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), platform.processor() or platform.machine())
