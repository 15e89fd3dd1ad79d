"""What a run keeps on disk, so that it can go on from wherever it was cut off."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from filelock import FileLock
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._trl import swap_model
from ..budget import Goal
from ..data import Batch
from ..errors import LayerPruneError
from ..files import digests, replace_folder, round_folder
from ..loading import load_model
from ..report import write_report
from ..surgery import plan_of, prune
from ..tasks import PreparedTask
from .callbacks import LayerDistillCallback
from .checks import check_budget
from .config import IterativeLayerDistillConfig
from .run_state import STATE_FILE, RunState, check_not_past_target, decisive_settings, goal_of_run, lock_run, open_run
from .students import check_saving, check_student, drop_ignored, put_in_place, write_student
from .towers import share_equal_weights


class RunKeeping:
    """The part of the trainer of rounds that opens a run's folder, saves its state, and takes students from there."""

    args: IterativeLayerDistillConfig
    accelerator: Accelerator
    processing_class: PreTrainedTokenizerBase
    model_name: str
    start: PreTrainedModel
    teacher: PreTrainedModel
    save_dtype: torch.dtype
    all_train_rows: Dataset | IterableDataset
    calibration_batches: list[Batch]
    repair_batches: list[Batch]
    eval_batches: list[Batch]
    tasks: list[PreparedTask]
    goal: Goal
    run: RunState
    _peft_config: Any | None
    _round: int
    _opened: bool
    _lock: FileLock | None
    _doing: str = "starting"
    _since: float  # when the seconds begin that are in no phase yet
    seconds_before: float = 0.0  # what was spent on the run before it is opened

    def open_run(self, resume_from_checkpoint: str | bool | None = None) -> RunState:
        """Start a run in `args.output_dir`, or take up the one that is there; `train()` does it if you do not.

        Raises:
            [`LayerPruneError`]: see `train`; nothing has been written then.
        """
        self._since, self.seconds_before, self._doing = time.perf_counter() - self.seconds_before, 0.0, "starting"
        folder = Path(self.args.output_dir)
        self._on_main(lambda: check_saving(self._unpruned(), self.processing_class))
        data = (self.all_train_rows, self.calibration_batches, self.repair_batches, self.eval_batches, self.tasks)
        settings = decisive_settings(self.args, self.start, self.teacher, data, self._peft_config)
        settings |= {"save_dtype": str(self.save_dtype), "num_processes": self.accelerator.num_processes}
        self._on_main(lambda: self._take_lock(folder))  # before anything is read: what is read stays true
        try:
            self.run = self._on_main(lambda: open_run(folder, RunState.load(folder), settings, resume_from_checkpoint))
            self.goal = self._agreed(goal_of_run(self.run, self.args, self.teacher))
            check_budget(self.model_name, self.goal, plan_of(self.start), self.args.heal)
            check_not_past_target(self.run, plan_of(self.start), self.goal)
            self._save_run(self.run, folder, "opened")
        except BaseException:
            self._release_lock()
            raise
        self._opened = True
        return self.run

    def _take_lock(self, folder: Path) -> None:
        self._lock = lock_run(folder)

    def _release_lock(self) -> None:
        if self._lock is not None:
            path = Path(self._lock.lock_file)
            if not (path.parent / STATE_FILE).exists():  # refused: the folder is left as it was
                path.unlink(missing_ok=True)
            self._lock.release()
            self._lock = None

    def _agreed(self, value: Any) -> Any:
        """The main process's value, on every process."""
        return broadcast_object_list([value])[0]

    def _on_main(self, act: Callable[[], Any]) -> Any:
        """What `act` returns on the main process, which alone runs it, or the error it raises, on every process."""
        value, error = None, None
        if self.accelerator.is_main_process:
            try:
                value = act()
            except Exception as raised:
                error = raised
        value, refused = self._agreed((value, None if error is None else str(error)))
        if refused is not None:
            raise error or LayerPruneError(refused)
        return value

    def _unpruned(self) -> PreTrainedModel:
        student = prune(self.start, [], share_weights=True)
        drop_ignored(student)
        return student

    def _student_of(self, folder: Path, run: RunState) -> PreTrainedModel:
        """The student the next round starts from."""
        if not run.rounds:
            student = self._unpruned()
            share_equal_weights(student, self.teacher)
            return student
        return self._load_student(round_folder(folder, len(run.rounds)), run.rounds[-1].get("weights", {}))

    def _load_student(self, folder: Path, files: dict[str, str]) -> PreTrainedModel:
        check_student(folder, files)
        student = load_model(str(folder), dtype=self.start.dtype).to(self.args.device)
        share_equal_weights(student, self.teacher)
        return student

    def _keep(self, student: Any, run: RunState, folder: Path, tokens: int = 0, seconds: float = 0.0) -> Any:
        """Save the student of this round, which took so many tokens and seconds to heal.

        It takes the place of its healing's checkpoints, so the run says first that it is done and of which files;
        [`_kept`] finds it from there on, wherever a kill has left it.
        """
        target, current = round_folder(folder, self._round), run.current
        swap_model(self, student)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            written = write_student(student, self.processing_class, self.save_dtype, target)
            current["weights"] = digests(written)
        current |= {"seconds_healing": seconds, "train_tokens": tokens}
        self._save_run(run, folder, "healing")
        if self.args.should_save:
            replace_folder(written, target)
        self.accelerator.wait_for_everyone()
        return student

    def _kept(self, run: RunState, folder: Path) -> PreTrainedModel:
        """The student of this round, which was saved before the run was cut off."""
        target, files = round_folder(folder, self._round), run.current.get("weights", {})
        self._on_main(lambda: put_in_place(target, files))
        student = self._load_student(target, files)
        swap_model(self, student)
        return student

    def _save_run(self, run: RunState, folder: Path, done: str, **details: Any) -> None:
        self._count_seconds()
        if self.args.should_save:
            run.done = {"round": self._round, "phase": done, **details}
            run.save(folder)

    def _phase(self, phase: str, **details: Any) -> None:
        self._count_seconds()
        self._doing = phase
        self._event("on_phase_begin", phase=phase, **details)

    def _phase_step(self) -> None:
        self._event("on_phase_step")

    def _event(self, name: str, **details: Any) -> None:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, LayerDistillCallback):
                getattr(callback, name)(self.args, self.state, self.control, **details)

    def only_heals(self, run: RunState) -> bool:
        """Whether the round to come heals a student that is as deep as it shall be, before any edit."""
        return not run.rounds and self.goal.met(plan_of(self.start))

    def _count_seconds(self) -> None:
        """Add the time since the last call to the phase that is going on."""
        now = time.perf_counter()
        self.run.seconds[self._doing] = self.run.seconds.get(self._doing, 0.0) + now - self._since
        self._since = now

    def _write_report(self) -> None:
        self._count_seconds()
        folder, run = Path(self.args.output_dir), self.run
        write_report(folder, run.teacher, run.rounds, run.settings, self.args.device, run.seconds)
