"""Where the models run: a GPU, the CPU, or ZeroGPU, which lends a GPU to each call that is marked for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable)
Result = TypeVar("Result")
GPU_SECONDS = 60
"""Longest call on ZeroGPU: a longer one is refused to visitors whose share of the day is small."""
STARTING_SECONDS, SECONDS_PER_TOKEN = 15, 0.1
"""What it may take: to begin, and for each token of both models."""


def default_device() -> str:
    """The GPU, or the CPU where there is none."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def in_passing_thread(function: Callable[..., Result], *args: object) -> Result:
    """Call `function` in a thread that ends with the call.

    Every thread that ever computed on the CPU keeps a team of OpenMP threads for as long as it lives. Where the teams
    have more threads than there are cores, all of them wait by sleeping, and `generate` takes twice as long. So
    nothing computes in a thread that stays.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(function, *args).result()


def on_zero_gpu() -> bool:
    """Whether this is a Space on ZeroGPU hardware."""
    return bool(os.environ.get("SPACES_ZERO_GPU")) and find_spec("spaces") is not None


def prepare_zero_gpu() -> None:
    """Let `spaces` take over CUDA; it must come before anything touches a GPU."""
    if on_zero_gpu():
        import spaces  # noqa: F401


def seconds_on_gpu(num_tokens: int) -> int:
    """How long a call on ZeroGPU may take: the less is asked for, the sooner and the more often it is granted.

    Args:
        num_tokens (`int`): tokens that each of the two models may write.
    """
    return min(GPU_SECONDS, round(STARTING_SECONDS + SECONDS_PER_TOKEN * num_tokens))


def seconds_for_an_answer(limit: int, num_tokens: int) -> int:
    """The limit of a demo; on ZeroGPU at most what lets both answers end within their call."""
    return min(limit, (seconds_on_gpu(num_tokens) - 5) // 2) if on_zero_gpu() else limit


def gpu_call(function: Function, seconds: Callable[..., int]) -> Function:
    """`function`, marked as one that needs the GPU; itself where there is no ZeroGPU.

    There it runs in a forked process: arguments and results are pickled, and of an exception only its kind is left.

    Args:
        function (`Callable`): a generator function.
        seconds (`Callable`): for how long at most, given the same arguments.
    """
    if not on_zero_gpu():
        return function
    import spaces

    return spaces.GPU(duration=seconds)(function)
