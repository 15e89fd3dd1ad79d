"""Measure the speed of every depth of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from ..benchmark import benchmark_models, num_runs
from ..environment import native_dtype
from ..record import RunRecord, Speed
from ..surgery import apply_plan, prune

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 128, 64, 5


def speed_runs(run: RunRecord) -> int:
    """How often [`with_speed`] calls `on_run`."""
    return num_runs(1 + len(run.rounds), REPEATS)


def with_speed(
    run: RunRecord, teacher: PreTrainedModel, dtype: torch.dtype, on_run: Callable[[], None] = lambda: None
) -> RunRecord:
    """The run with the speed of every depth, measured side by side in the dtype the students are saved in (float32
    where the CPU would emulate it).

    Speed depends on shapes and dtype only: no student is loaded.
    """
    dtype = native_dtype(dtype, teacher.device) or dtype
    models = [teacher if teacher.dtype == dtype else prune(teacher, [], share_weights=True).to(dtype)]
    for record in run.rounds:  # each is made of the one before, so that common blocks are in memory once
        models.append(apply_plan(models[-1], record.plan, share_weights=True))
    reports = benchmark_models(models, PROMPT_TOKENS, NEW_TOKENS, repeats=REPEATS, on_run=on_run)
    name = str(dtype).removeprefix("torch.")
    teacher_speed, *speeds = (Speed(report, name, PROMPT_TOKENS, NEW_TOKENS) for report in reports)
    rounds = tuple(replace(record, speed=speed) for record, speed in zip(run.rounds, speeds, strict=True))
    return replace(run, teacher=replace(run.teacher, speed=teacher_speed), rounds=rounds)
