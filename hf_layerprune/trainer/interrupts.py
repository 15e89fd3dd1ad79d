"""What ends a run in the middle: Ctrl-C, a full disk, no memory left. The last good round is always on disk."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..errors import LayerPruneError, first_line, is_out_of_memory
from .callbacks import LayerDistillCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NO_ROOM = ("no space left", "file too large", "disk quota", "pytorchstreamwriter failed", "read-only file system")


class StopWhereNothingIsLost(LayerDistillCallback):
    """Ctrl-C (or SIGTERM) ends a run with a `KeyboardInterrupt` where it can go on from: behind the step of a healing,
    of which a checkpoint is saved, or the batch of a scoring. The second one ends it at once. A context manager.
    """

    def __init__(self) -> None:
        self.requested = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopWhereNothingIsLost:
        self.previous = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step < state.max_steps and self._all_know():  # behind the last step the student is saved
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step < state.max_steps and self.requested:
            raise KeyboardInterrupt

    def on_phase_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt

    def _all_know(self) -> bool:
        """Whether any process was asked: they must stop at the same step."""
        if dist.is_available() and dist.is_initialized():
            asked = torch.tensor(int(self.requested), device="cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(asked)
            self.requested = bool(asked)
        return self.requested


def explained(error: Exception, folder: Path, doing: str) -> LayerPruneError | None:
    """What a user can do about an error of the machine; `None` for any other error."""
    if is_out_of_memory(error):
        return LayerPruneError(
            f"out of memory while {doing}: {first_line(error)}. Resume with gradient_checkpointing=True, or start "
            "in another folder with fewer rows per batch or a lower max_length; the rounds before are kept"
        )
    text = str(error).lower()
    if isinstance(error, (OSError, SafetensorError, RuntimeError)) and any(part in text for part in NO_ROOM):
        return LayerPruneError(
            f"{folder} cannot be written while {doing}: {first_line(error)}. Make room and resume; the rounds before "
            "are kept"
        )
    return None
