"""Callbacks of a run of several rounds: events next to those every `Trainer` has, and one Trackio page for all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TrackioCallback

from ..record import PLAN_FILE, RoundRecord, RunRecord

ARTIFACTS = {PLAN_FILE: "plan", "layers.png": "layer-map"}  # files of an output folder, and their types


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
        """`phase` starts: `"evaluating teacher"`, `"evaluating tasks"`, `"scoring"`, `"merging"`, `"repairing"`,
        `"evaluating"`, `"healing"`, `"healing on policy"`, `"measuring speed"` or `"writing"`. Phases of a round come
        with `num_layers`, the measuring of speed with `num_runs`."""

    def on_phase_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """One step of a phase other than healing is done: a batch, or a timed run."""

    def on_round_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, record: RoundRecord
    ) -> None:
        """A round is done and on disk, with its record."""

    def on_run_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any) -> None:
        """All rounds are done, and `model` is the student; its card is not written yet, and shows its `model_tags` of
        Trackio."""


class TrackioRounds(TrackioCallback, LayerDistillCallback):
    """What `report_to="trackio"` stands for here: one page with the quality of every depth, the plan and the map of
    the layers. It takes the place of transformers' own callback; the run goes on between healings.
    """

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """A healing is done; the run may not be."""

    def on_round_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, record: RoundRecord
    ) -> None:
        if not self._initialized:  # no round was healed before
            self.setup(args, state, None)
        if state.is_world_process_zero:
            quality = {f"round/{name}": value for name, value in record.quality.to_dict().items() if value is not None}
            self._trackio.log({"round/number": record.number, "round/depth": record.depth} | quality)

    def on_run_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any) -> None:
        if self._initialized and state.is_world_process_zero:
            for name, kind in ARTIFACTS.items():
                if (path := Path(args.output_dir) / name).is_file():
                    self._trackio.log_artifact(path, name=kind, type=kind)
        TrackioCallback.on_train_end(self, args, state, control, model=model)


def hub_tags(model: Any, run: RunRecord | None) -> tuple[str, ...]:
    """Where a run ran and reported to, as TRL and transformers tag its `model`: Jobs of the Hub, Trackio."""
    jobs = ["hf_jobs"] if "JOB_ID" in os.environ else []
    trackio = [tag for tag in getattr(model, "model_tags", None) or () if tag.startswith("trackio")]
    before = [tag for tag in (run.tags if run else ()) if not (trackio and tag.startswith("trackio"))]
    return tuple(dict.fromkeys([*before, *jobs, *trackio]))
