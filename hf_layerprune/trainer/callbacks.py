"""Callbacks of a run of several rounds: events next to those every `Trainer` has, and an orderly stop."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..record import RoundRecord


class LayerDistillCallback(TrainerCallback):
    """Base class for callbacks that follow the rounds. Override what you need.

    The usual [`~transformers.TrainerCallback`] events (`on_step_end`, `on_log`, ...) come within each healing.
    """

    def on_round_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, number: int, depth: int
    ) -> None:
        """Round `number` (from 1) starts on a student of `depth` layers."""

    def on_phase_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, phase: str, **details: Any
    ) -> None:
        """`phase` starts: `"evaluating teacher"`, `"scoring"`, `"merging"`, `"repairing"`, `"evaluating"`,
        `"healing"`, `"measuring speed"` or `"writing"`. Phases of a round come with `num_layers`, the measuring of
        speed with `num_runs`."""

    def on_phase_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """One step of a phase other than healing is done: a batch, or a timed run."""

    def on_round_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, record: RoundRecord
    ) -> None:
        """A round is done and on disk, with its record."""

    def on_run_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any) -> None:
        """All rounds are done, and `model` is the student; its card is not written yet, and shows its `model_tags` of
        Trackio."""


class StopOnSignal(LayerDistillCallback):
    """End a run on Ctrl-C or SIGTERM where it can resume, with a `KeyboardInterrupt`: after the step of a healing, of
    which a checkpoint is saved, or after the batch of a scoring. A second signal ends it at once. A context manager.
    """

    def __init__(self) -> None:
        self.requested = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        self.previous = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.__exit__()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if dist.is_available() and dist.is_initialized():  # all processes must stop at the same step
            asked = torch.tensor(int(self.requested), device="cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(asked)
            self.requested = bool(asked)
        if self.requested and state.global_step < state.max_steps:  # after the last step the student is saved
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.requested and state.global_step < state.max_steps:
            raise KeyboardInterrupt

    def on_phase_step(self, args: Any, state: TrainerState, control: TrainerControl) -> None:
        if self.requested:
            raise KeyboardInterrupt
