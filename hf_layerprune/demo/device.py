"""Where the models run: a GPU, the CPU, or ZeroGPU, which lends a GPU to each call that is marked for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable)


def default_device() -> str:
    """The GPU, or the CPU where there is none."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def on_zero_gpu() -> bool:
    """Whether this is a Space on ZeroGPU hardware."""
    return bool(os.environ.get("SPACES_ZERO_GPU")) and find_spec("spaces") is not None


def prepare_zero_gpu() -> None:
    """Let `spaces` take over CUDA; it must come before anything touches a GPU."""
    if on_zero_gpu():
        import spaces  # noqa: F401


def gpu_call(function: Function, seconds: int) -> Function:
    """`function`, marked as one that needs the GPU for at most so many seconds; itself where there is no ZeroGPU."""
    if not on_zero_gpu():
        return function
    import spaces

    return spaces.GPU(duration=seconds)(function)
