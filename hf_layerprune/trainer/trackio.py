"""A run in Trackio: one page for all rounds, with the quality of every depth, the plan and the map of the layers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TrackioCallback
from transformers.trainer_callback import TrainerCallback

from ..record import PLAN_FILE, RoundRecord, RunRecord
from .callbacks import LayerDistillCallback

ARTIFACTS = {PLAN_FILE: "plan", "layers.png": "layer-map"}
"""Files of an output folder that become artifacts, and their types."""


class TrackioRounds(TrackioCallback, LayerDistillCallback):
    """What `report_to="trackio"` stands for here: transformers' own callback, but the run goes on between healings."""

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


def use_trackio_rounds(callbacks: list[TrainerCallback]) -> None:
    """Let [`TrackioRounds`] take the place of the callback that `report_to` has brought, if it has."""
    for place, callback in enumerate(callbacks):
        if type(callback) is TrackioCallback:
            callbacks[place] = TrackioRounds()


def hub_tags(model: Any, run: RunRecord | None) -> tuple[str, ...]:
    """Where a run ran and reported to, as TRL and transformers tag its `model`: Jobs of the Hub, Trackio."""
    jobs = ["hf_jobs"] if "JOB_ID" in os.environ else []
    trackio = [tag for tag in getattr(model, "model_tags", None) or () if tag.startswith("trackio")]
    before = [tag for tag in (run.tags if run else ()) if not (trackio and tag.startswith("trackio"))]
    return tuple(dict.fromkeys([*before, *jobs, *trackio]))
