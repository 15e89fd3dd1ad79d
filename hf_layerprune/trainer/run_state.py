"""What a run has done so far, on disk: written after every step that cost time, in one atomic move."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from filelock import FileLock, Timeout
from transformers import PreTrainedModel

from ..budget import TARGETS, BlockLatency, Goal
from ..data import Batch
from ..errors import LayerPruneError
from ..files import round_folder, write_atomically
from ..fingerprint import fingerprint, fingerprint_model
from ..plan import LayerPlan
from ..surgery import plan_of
from ..tasks import PreparedTask
from .checkpoints import sealed_checkpoints
from .config import IterativeLayerDistillConfig

STATE_FILE = "run_state.json"
LOCK_FILE = ".lock"
ROWS_LOOKED_AT = 64  # of the text to heal on, to tell it from another
# What decides which layers go and how they heal. A lower target only makes a run longer, so it is not here.
DECISIVE = (
    "edits", "max_group_size", "criterion", "tasks", "one_shot", "race_confidence", "compensation", "layers_per_round",
    "heal", "protect_first_layers", "protect_last_layers", "trained_layers", "kl_weight", "beta", "hidden_weight",
    "hidden_distance", "hidden_target", "lm_weight", "temperature", "loss_preset", "weight_decay", "optim",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_steps", "num_train_epochs", "per_device_train_batch_size",
    "gradient_accumulation_steps", "max_length", "packing", "packing_strategy", "completion_only_loss",
    "assistant_only_loss", "seed", "data_seed", "optim_args",
)  # fmt: skip
# May change between two healings, so that one that diverged can be tried again.
PER_HEALING = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_grad_norm",
    "bf16",
    "fp16",
)


@dataclass
class RunState:
    """Progress of a run in its output folder.

    Attributes:
        settings (`dict`): what decides the result; a resumed run must have the same.
        teacher (`dict`): measurements of the teacher.
        rounds (`list[dict]`): records of the finished rounds.
        current (`dict`): what is known of the round in progress: scores and edits so far.
        order (`list[str]`): of a run that scores once: the edits in the order they are made.
        done (`dict`): what was finished last: `round`, `phase` and, within a healing, `step`.
        latency (`dict`, *optional*): what a block costs in time, where the target is one of latency.
        seconds (`dict`): wall time of each phase, over all sessions of the run.
    """

    settings: dict[str, Any]
    teacher: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    current: dict[str, Any] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    done: dict[str, Any] = field(default_factory=dict)
    latency: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        write_atomically(folder / STATE_FILE, json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, folder: Path) -> RunState | None:
        path = folder / STATE_FILE
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise LayerPruneError(f"{path} is damaged ({error}); move {folder} away and start again") from error


def lock_run(folder: Path) -> FileLock:
    """Make the folder and keep other runs out of it until the lock is released.

    Raises:
        [`LayerPruneError`]: if another run is working in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise LayerPruneError(
            f"output_dir={folder} is in use: another run is working in it; wait for it, or choose another folder"
        ) from None
    return lock


def open_run(folder: Path, found: RunState | None, settings: dict[str, Any], resume: str | bool | None) -> RunState:
    """The state to go on from: the one `found` in `folder` when resuming, else a new one.

    Raises:
        [`LayerPruneError`]: if a run is there and is not resumed, or the other way round; if it is another run than
            `settings` describe.
    """
    if resume and found is None:
        raise LayerPruneError(f"resume_from_checkpoint={resume!r} but {folder} holds no run; start without it")
    if isinstance(resume, str) and Path(resume).resolve() != folder.resolve():
        raise LayerPruneError(
            f"resume_from_checkpoint={resume!r} is not output_dir={folder}; a run resumes in its own folder"
        )
    if found is None:
        return RunState(settings)
    if not resume:
        raise LayerPruneError(
            f"output_dir={folder} holds another run of {len(found.rounds)} rounds; resume it "
            "(resume_from_checkpoint) or choose another folder"
        )
    healing = round_folder(folder, len(found.rounds) + 1)
    in_healing = "train_tokens" not in found.current and bool(sealed_checkpoints(healing))
    if set(found.settings) != set(settings):
        raise LayerPruneError(f"{folder} holds a run of another version of hf_layerprune; choose another output_dir")
    for key, value in found.settings.items():
        if key in PER_HEALING and not in_healing:
            continue
        if value != settings.get(key):
            start = f"delete {healing} to heal its round from the start, " if key in PER_HEALING else ""
            raise LayerPruneError(
                f"{folder} holds a run with {key}={value!r}, now it is {settings.get(key)!r}; resume with the same "
                f"settings, model and data, {start}or choose another output_dir"
            )
    found.settings = settings
    return found


def check_not_past_target(run: RunState, start: LayerPlan, goal: Goal) -> None:
    """Raise [`LayerPruneError`] if a run that started from `start` went further than its target already."""
    plans = [start, *(LayerPlan.from_dict(record["plan"]) for record in run.rounds)]
    size = goal.size(plans[-1])
    if goal.budget.unit == "depth":
        size -= run.current.get("wanted", 0)  # the round in progress is finished first
        too_far = size < goal.budget.target
    else:  # the last round may overshoot, but only the last
        too_far = bool(run.rounds) and goal.met(plans[-2])
    if too_far:
        raise LayerPruneError(
            f"{TARGETS[goal.budget.unit]}={goal.budget.target:g} but the run is at {size:.6g} already; its rounds/ "
            "hold the students before"
        )


def goal_of_run(run: RunState, args: IterativeLayerDistillConfig, teacher: PreTrainedModel) -> Goal:
    """What measures the students of a run; latencies are measured once and kept in `run`."""
    known = None if run.latency is None else BlockLatency(**run.latency)
    goal = Goal.of(args.budget(), args.edit_space(), teacher, plan_of(teacher), known)
    run.latency = None if goal.latency is None else asdict(goal.latency)
    return goal


def _some_rows(rows: Dataset | IterableDataset) -> list[Any]:
    if isinstance(rows, IterableDataset):
        return list(rows.take(ROWS_LOOKED_AT))
    spread = {number * (len(rows) - 1) // (ROWS_LOOKED_AT - 1) for number in range(ROWS_LOOKED_AT)}
    return [len(rows), rows[sorted(spread)]]


def decisive_settings(
    args: IterativeLayerDistillConfig,
    start: PreTrainedModel,
    teacher: PreTrainedModel,
    data: tuple[Dataset | IterableDataset, list[Batch], list[Batch], list[Batch], list[PreparedTask]],
    peft_config: Any | None,
) -> dict[str, Any]:
    """What must not change within a run: settings, models and data, the last two as short fingerprints.

    `data` are the rows to heal on, of which some from all over are looked at (of a stream the first), the batches that
    score, repair and evaluate, and the tasks that choose layers.
    """
    rows, calibration, repair, evaluation, tasks = data
    values = {name: getattr(args, name, None) for name in (*DECISIVE, *PER_HEALING)}
    values["bf16"] = args.as_given["bf16"]  # what was derived from the hardware here is nothing to repeat elsewhere
    values["target"] = args.budget().unit
    values["dtype"] = str(start.dtype)
    values |= {
        "plan": plan_of(start).to_dict(),
        "model": fingerprint_model(start),
        "teacher": fingerprint_model(teacher),
    }
    texts = {
        "healing": _some_rows(rows),
        "calibration": [tensor for batch in calibration for tensor in batch.values()],
        "repair": [tensor for batch in repair for tensor in batch.values()],
        "evaluation": [tensor for batch in evaluation for tensor in batch.values()],
        "tasks": [part for task in tasks for part in task.fingerprint()],
    }
    values |= {f"{name}_text": fingerprint(parts) for name, parts in texts.items()}
    values["peft"] = None if peft_config is None else json.dumps(peft_config.to_dict(), default=str, sort_keys=True)
    return json.loads(json.dumps(values, default=str))
