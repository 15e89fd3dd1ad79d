"""Events of a run of several rounds, beside those every `Trainer` has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..record import RoundRecord


class LayerDistillCallback(TrainerCallback):
    """Base class for callbacks that follow the rounds. Override what you need.

    The usual [`~transformers.TrainerCallback`] events (`on_step_end`, `on_log`, ...) come within each healing.
    """

    def on_round_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        number: int,
        depth: int,
        **_: Any,
    ) -> None:
        """Round `number` (from 1) starts on a student of `depth` layers."""

    def on_phase_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, phase: str, **_: Any
    ) -> None:
        """`phase` starts: `"evaluating teacher"`, `"scoring"`, `"repairing"`, `"evaluating"`, `"healing"`, `"measuring
        speed"` or `"writing"`. Phases of a round come with `num_layers`, the measuring of speed with `num_runs`."""

    def on_phase_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """One batch of a scoring or an evaluation is done."""

    def on_round_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        record: RoundRecord,
        **_: Any,
    ) -> None:
        """A round is done and on disk, with its record."""


def fire(
    callbacks: Iterable[TrainerCallback],
    event: str,
    args: TrainingArguments,
    state: TrainerState,
    control: TrainerControl,
    **details: Any,
) -> None:
    """Call an event of [`LayerDistillCallback`] on the callbacks that have it."""
    for callback in callbacks:
        if isinstance(callback, LayerDistillCallback):
            getattr(callback, event)(args, state, control, **details)
