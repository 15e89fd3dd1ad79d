"""A run on disk: its lock and its record, its students, the speed of every depth, and what decides its result."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from filelock import FileLock, Timeout
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..benchmark import benchmark_models, num_runs
from ..budget import TARGETS, Budget, Goal
from ..data import Batch
from ..environment import environment, fingerprint, fingerprint_model, native_dtype
from ..errors import LayerPruneError
from ..files import replace_folder, write_atomically
from ..plan import LayerPlan
from ..record import PLAN_FILE, STATE_FILE, RunRecord, Speed, read_state
from ..report import write_report
from ..surgery import apply_plan, plan_of, prune
from ..tasks import PreparedTask
from .config import IterativeLayerDistillConfig

LOCK_FILE = ".lock"
REPLACED = ("model", "rounds", "healing")
"""Folders of an output folder that a run deletes or replaces."""
PROMPT_TOKENS, NEW_TOKENS, REPEATS = 128, 64, 5  # of the measured speed
FINGERPRINT_ROWS = 64
# What decides which layers go and how they heal. A lower target, or on-policy steps, only make a run longer.
DECISIVE = (
    "edits", "max_group_size", "criterion", "tasks", "one_shot", "race_confidence", "compensation", "layers_per_round",
    "heal", "protect_first_layers", "protect_last_layers", "trained_layers", "kl_weight", "beta", "hidden_weight",
    "lm_weight", "temperature", "loss_preset", "weight_decay", "max_steps",
    "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "packing",
    "packing_strategy", "completion_only_loss", "assistant_only_loss", "seed", "data_seed",
)  # fmt: skip
# May change when a run resumes, so that a healing that diverged or could not start can be tried again.
CHANGEABLE = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "optim",
    "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16",
)  # fmt: skip
# may change until the on-policy round is done
ON_POLICY = ("on_policy_steps", "on_policy_tokens", "on_policy_learning_rate")


class RunFile:
    """The run in an output folder, which no other run can open at the same time: its `record` so far."""

    def __init__(self, folder: Path, writes: bool, device: torch.device, seconds: float = 0.0) -> None:
        self.folder, self.record = folder, RunRecord(environment=environment(device))
        self.phase = "starting"
        self.is_done = False  # all rounds are done; at most the final files are missing
        self._writes, self._lock = writes, None
        self._since = time.perf_counter() - seconds

    def open(self, settings: dict[str, Any], resume: str | Path | bool | None) -> None:
        """Lock the folder and start a run in it, or continue the one that is there; see [`check_resume`]."""
        self._lock = lock_run(self.folder)  # before anything is read: what is read stays true
        found = read_state(self.folder)
        if found is not None:
            self.record = replace(found, environment=self.record.environment)
        check_resume(self.folder, found, settings, resume)

    def begin_run(self, settings: dict[str, Any], goal: Goal) -> None:
        """Save the settings the run continues with; a finished run keeps those it was made with.

        Raises [`LayerPruneError`] if the run is beyond the target, or has been healed on policy with other settings.
        """
        run, current = self.record, self.record.current
        edits, start = (*run.edits, *(current.edits if current else ())), LayerPlan.from_dict(settings["plan"])
        plans = [*accumulate(edits, lambda plan, edit: edit.apply(plan), initial=start)]
        if any(map(goal.met, plans[:-1])):
            raise LayerPruneError(
                f"{self.folder} holds a run that is at {plans[-1].depth} layers, beyond "
                f"{TARGETS[goal.budget.unit]}={goal.budget.target:g}; lower the target, or choose another output_dir"
            )
        is_there, on_policy = goal.met(plans[-1]), bool(run.rounds) and run.rounds[-1].is_on_policy
        if is_there and on_policy:
            check_same(self.folder, run.settings, settings, ON_POLICY)
        left = settings["on_policy_steps"] and not on_policy
        self.is_done = bool(run.rounds) and current is None and is_there and not left
        self.save(latency=goal.latency, settings=run.settings if self.is_done else settings)
        if self._writes and not self.is_done:
            (self.folder / PLAN_FILE).unlink(missing_ok=True)  # the mark of a finished run

    def close(self) -> None:
        if self._lock is not None:
            path = Path(self._lock.lock_file)
            if not (self.folder / STATE_FILE).exists():  # refused: leave the folder as it was
                path.unlink(missing_ok=True)
            self._lock.release()
            self._lock = None

    def begin(self, phase: str) -> None:
        """Count the time from now on for `phase`."""
        now = time.perf_counter()
        seconds = self.record.seconds
        seconds = seconds | {self.phase: seconds.get(self.phase, 0.0) + now - self._since}
        self.record = replace(self.record, seconds=seconds)
        self.phase, self._since = phase, now

    def save(self, **changes: Any) -> None:
        """Change fields of the record and write it."""
        self.begin(self.phase)
        self.record = replace(self.record, **changes)
        if self._writes:
            write_atomically(self.folder / STATE_FILE, self.record.to_json())

    def report(self) -> None:
        """Write the report of the run so far."""
        self.begin(self.phase)
        if self._writes:
            write_report(self.folder, self.record)


def lock_run(folder: Path) -> FileLock:
    """Make the folder and keep other runs out of it until the lock is released."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise LayerPruneError(f"output_dir={folder} is in use by another run; wait or choose another folder") from None
    return lock


def check_resume(
    folder: Path, found: RunRecord | None, settings: dict[str, Any], resume: str | Path | bool | None
) -> None:
    """Raise [`LayerPruneError`] unless the run `found` in `folder` is the one that `settings` describe."""
    if isinstance(resume, (str, Path)) and Path(resume).resolve() != folder.resolve():
        raise LayerPruneError(f"resume_from_checkpoint={resume!r} must be the output_dir of the run, {folder}")
    if found is None:
        if resume:
            raise LayerPruneError(
                f"{folder} holds no run to resume; name the run's folder with output_dir if it was moved, or start "
                "without --resume (resume_from_checkpoint)"
            )
        if foreign := [name for name in REPLACED if (folder / name).exists()]:
            raise LayerPruneError(
                f"output_dir={folder} holds {' and '.join(foreign)}, which a run would replace; choose another folder"
            )
        return
    if not resume:
        raise LayerPruneError(
            f"output_dir={folder} holds another run; resume it (--resume, resume_from_checkpoint) or choose another"
        )
    may_change = {*CHANGEABLE, *ON_POLICY}
    edits = [*found.edits, *(found.current.edits if found.current else ())]
    removed = {layer for edit in edits if edit.kind == "remove" for layer in edit.layers}
    if isinstance(named := found.settings.get("trained_layers"), list) and removed.issuperset(named):
        may_change |= {"trained_layers"}  # the run stopped because nothing is left to train
    check_same(folder, found.settings, settings, [key for key in found.settings | settings if key not in may_change])


def check_same(folder: Path, found: dict[str, Any], settings: dict[str, Any], keys: Iterable[str]) -> None:
    """Raise [`LayerPruneError`] if a setting in `keys` is not what the run in `folder` was `found` with."""
    for key in keys:
        if found.get(key) != settings.get(key):
            raise LayerPruneError(
                f"{folder} holds a run with {key}={found.get(key)!r}, now it is {settings.get(key)!r}; resume with "
                "the same settings, model and data, or choose another output_dir"
            )


def check_budget(name: str, goal: Goal, plan: LayerPlan, heal: bool) -> None:
    """Raise [`LayerPruneError`] unless the allowed edits lead from `plan`, that of the model called `name`, to the
    target. A student that has this depth already is healed without an edit."""
    setting, budget = TARGETS[goal.budget.unit], goal.budget
    if heal and budget == Budget("depth", plan.depth) and plan.blocks != goal.original.blocks:
        return
    if goal.met(plan):
        if plan.depth == 1:
            raise LayerPruneError(f"{name} has one layer, which a model needs; there is nothing to take out of it")
        least = f"1..{plan.depth - 1}" if budget.unit == "depth" else f"less than {goal.size(plan):.6g}"
        unit = "layers" if budget.unit == "depth" else budget.unit
        raise LayerPruneError(f"{setting}={budget.target:g} but {name} has {goal.size(plan):,} {unit}; choose {least}")
    goal.check_reachable(plan, setting)


def decisive_settings(
    args: IterativeLayerDistillConfig,
    start: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Dataset | IterableDataset,
    batches: dict[str, list[Batch]],
    tasks: list[PreparedTask],
    peft_config: Any | None,
) -> dict[str, Any]:
    """The settings of a run's record, and short fingerprints of models and data, as JSON values; `batches` by their
    use. The healing rows are sampled evenly; a stream contributes its first rows."""
    values = {name: getattr(args, name, None) for name in (*DECISIVE, *CHANGEABLE, *ON_POLICY)}
    values |= {
        "bf16": args.given_bf16,  # what was derived from the hardware here is nothing to repeat elsewhere
        "target": args.budget.unit,
        "dtype": str(start.dtype),
        "plan": plan_of(start).to_dict(),
        "model": fingerprint_model(start),
        "teacher": fingerprint_model(teacher),
        "healing_text": fingerprint(_sample(rows)),
        "tasks_text": fingerprint(
            part for task in tasks for chunk in task.chunks for part in (task, chunk, *chunk.batch.values())
        ),
        "peft": None if peft_config is None else json.dumps(peft_config.to_dict(), default=_to_text, sort_keys=True),
    }
    for use, given in batches.items():
        values[f"{use}_text"] = fingerprint(tensor for batch in given for tensor in batch.values())
    return json.loads(json.dumps(values, default=str))


def _to_text(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)  # the order of a set differs between processes


def _sample(rows: Dataset | IterableDataset) -> list[Any]:
    if isinstance(rows, IterableDataset):
        return list(rows.take(FINGERPRINT_ROWS))
    spread = {number * (len(rows) - 1) // (FINGERPRINT_ROWS - 1) for number in range(FINGERPRINT_ROWS)}
    return [len(rows), rows[sorted(spread)]]


def save_student(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, target: Path
) -> None:
    """Write a student in `dtype`, so that nothing half written is ever seen at `target`."""
    temporary = _cleared(target)
    prune(student, [], share_weights=True).to(dtype).save_pretrained(temporary)
    _save_tokenizer(tokenizer, temporary)
    replace_folder(temporary, target)


def publish_student(source: Path, target: Path, files: list[Path]) -> None:
    """Copy a saved student, and `files` next to it, so that no half of a copy is ever seen at `target`."""
    temporary = _cleared(target)
    shutil.copytree(source, temporary)
    for path in files:
        shutil.copy(path, temporary)
    replace_folder(temporary, target)


def _cleared(target: Path) -> Path:
    """A name next to `target`, without what a kill has left there."""
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    return temporary


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer so that transformers 4 reads it as well, which needs the names it had there."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if tokenizer._auto_class is None:
        values.pop("auto_map", None)  # names code that is not saved
    if "extra_special_tokens" in values:
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    ids = tokenizer("a").input_ids  # in tokenizer.json, but transformers 4 adds a BOS token to Llama's by default
    values["add_bos_token"] = ids[:1] == [tokenizer.bos_token_id]
    values["add_eos_token"] = ids[-1:] == [tokenizer.eos_token_id]
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def student_to_begin_with(model: PreTrainedModel) -> PreTrainedModel:
    """A student that holds every layer of `model`, in the same memory, and can be saved.

    The generation settings that transformers ignores, such as a temperature of greedy decoding, are unset: it saves
    them as they were loaded, but no more once a `Trainer` has set the special tokens.
    """
    student = prune(model, [], share_weights=True)
    try:
        student.generation_config.validate(strict=True)
    except ValueError as error:
        for name in re.findall(r"^- `(\w+)`: ", str(error), re.MULTILINE):
            setattr(student.generation_config, name, None)
    return student


def check_saving(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise [`LayerPruneError`] unless a student can be saved: all but its weights is, to a temporary folder."""
    with TemporaryDirectory(prefix="hf-layerprune-") as folder:
        try:
            student.config.save_pretrained(folder)
            student.generation_config.save_pretrained(folder)
            _save_tokenizer(tokenizer, Path(folder))
        except Exception as error:  # what transformers, or a class of the user's, cannot write
            reason = " ".join(str(error).split())
            raise LayerPruneError(
                f"students cannot be saved; correct the model's config, generation_config or tokenizer: {reason}"
            ) from error


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
