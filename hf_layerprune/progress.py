"""The terminal during a verb: what is happening, the time left, a line about each round, and how Ctrl-C ends a run."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from contextlib import suppress
from datetime import timedelta
from types import FrameType
from typing import Any, ClassVar

import datasets
import rich.console
import torch
import torch.distributed as dist
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .record import RoundRecord
from .scoring.scores import CLEAR_MARGIN
from .surgery import plan_of
from .trainer import IterativeLayerDistillTrainer, LayerDistillCallback

SECONDS_BETWEEN_LINES = 30
SPEED_SECONDS = 600  # the time left is estimated from the speed of the last ten minutes


class Console(rich.console.Console):
    """A console whose write errors never stop the work: where its stream is closed or full it goes quiet."""

    lost: ClassVar[OSError | None] = None  # why results were not printed, unless nobody reads them

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())  # what the stream still holds goes there

    def __exit__(self, *raised: Any) -> None:  # where lines and bars are written
        try:
            super().__exit__(*raised)
        except OSError as error:
            if not self.stderr:
                Console.lost = error
            self.on_broken_pipe()


def say(console: Console, text: str) -> None:
    """Print a line as it is: names of files and tasks may hold brackets, and paths are copied whole."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


class Phases:
    """Say on stderr what a verb is doing: in a terminal by a bar with the time left, elsewhere by a line per phase
    and, within a long one, every 30 seconds.

    `out` is for results: stdout, through the bar where both are one terminal. `quiet` says nothing.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, quiet=quiet)
        self.in_terminal = self.console.is_terminal
        share = self.in_terminal and sys.stdout is not None and sys.stdout.isatty()
        self.out = self.console if console or share else Console(quiet=quiet)
        self.bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            speed_estimate_period=SPEED_SECONDS,
            transient=True,
            disable=not self.in_terminal,
        )
        self.task = self.bar.add_task("starting", total=None)
        self._said = 0.0

    def __enter__(self) -> Phases:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def phase(self, name: str, total: float | None = None) -> None:
        """Begin a phase of `total` steps; one of unknown length has no bar but those of the libraries."""
        self.bar.reset(self.task, description=name)
        self.bar.tasks[0].total = total
        self.bar.advance(self.task, 0)  # speed counts from here
        if self.in_terminal and not self.console.quiet:
            for libraries in (logging, datasets.utils.logging):
                (libraries.enable_progress_bar if total is None else libraries.disable_progress_bar)()
        (self.bar.stop if total is None else self.bar.start)()
        if total is None or not self.in_terminal:
            self._say(f"{name} ...")

    def step(self, count: float = 1.0) -> None:
        """Advance by `count` steps."""
        self.bar.advance(self.task, count)
        if not self.in_terminal and time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            task = self.bar.tasks[0]
            left = task.time_remaining
            time_left = "" if left is None else f", {timedelta(seconds=round(left))} left"
            self._say(f"{task.description}: {task.percentage:.0f} %{time_left}")

    def done(self, name: str, count: int, total: int) -> None:
        """Report `count` of `total` steps of the phase `name` done; the first call begins it."""
        task = self.bar.tasks[0]
        if task.description == name:
            self.step(count - task.completed)
        else:
            self.phase(name, total)
            task.completed = count

    def _say(self, text: str) -> None:
        say(self.console, text)
        self._said = time.monotonic()


class RunProgress(LayerDistillCallback):
    """Follow an [`IterativeLayerDistillTrainer`]: a bar for each phase, and a line about each round."""

    def __init__(self, trainer: IterativeLayerDistillTrainer, phases: Phases) -> None:
        budget, depth = trainer.args.budget, plan_of(trainer.start).depth
        self.phases, self.name = phases, ""
        self.first = self.number = 0  # the round that this process began with, and the one it is in
        self.began = time.monotonic()
        self.rounds = None  # only measuring tells
        if budget.unit == "depth":
            self.rounds = max(1, math.ceil((depth - budget.target) / trainer.args.layers_per_round))
            self.rounds += bool(trainer.args.on_policy_steps)
        num_chunks = sum(len(task.chunks) for task in trainer.tasks)
        self.steps = {
            "scoring": len(trainer.calibration_batches) or num_chunks,
            "repairing": len(trainer.repair_batches),
            "merging": len(trainer.repair_batches),
            "evaluating": len(trainer.eval_batches),
            "evaluating teacher": len(trainer.eval_batches),
            "evaluating tasks": num_chunks,
        }

    def on_round_begin(self, *_: Any, number: int, **__: Any) -> None:
        self.number = number
        if not self.first:
            self.first, self.began = number, time.monotonic()

    def on_phase_begin(self, *_: Any, phase: str, num_layers: int = 0, num_runs: int = 0, **__: Any) -> None:
        self.name = phase
        if num_layers:
            of_rounds = f"/{max(self.rounds, self.number)}" if self.rounds else ""
            self.name = f"round {self.number}{of_rounds}, {num_layers} layers: {phase}"
        if not phase.startswith("healing"):  # whose steps are known when it starts
            self.phases.phase(self.name, num_runs or self.steps.get(phase))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        self.phases.phase(self.name, state.max_steps - state.global_step)

    def on_phase_step(self, *_: Any, **__: Any) -> None:
        self.phases.step()

    on_step_end = on_phase_step

    def on_round_end(self, *_: Any, record: RoundRecord, **__: Any) -> None:
        edits = ", ".join(map(str, record.edits)) or ("on policy" if record.is_on_policy else "no edit")
        perplexity = f"{record.quality.perplexity:.2f}"
        if record.before_healing is not None:
            perplexity = f"{record.before_healing.perplexity:.2f} -> {perplexity} healed"
        text = f"round {record.number}: {edits}; {record.depth} layers; perplexity {perplexity}"
        text += f"; KL {record.quality.kl:.4f}"
        if rounds_left := max(0, (self.rounds or 0) - self.number):
            seconds = (time.monotonic() - self.began) / (self.number - self.first + 1) * rounds_left
            text += f"; about {timedelta(seconds=round(seconds))} left"
        say(self.phases.out, text)
        for scores in record.scores:
            if scores.margin is not None and not scores.margin >= CLEAR_MARGIN:
                say(self.phases.out, f"  {scores.certainty}")


class StopOnSignal(LayerDistillCallback):
    """Raise `KeyboardInterrupt` on Ctrl-C or SIGTERM where a run can resume: after a step of a healing, with a
    checkpoint of it, or after a batch of a scoring. A second signal ends it at once. A context manager.
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
        if int(os.environ.get("RANK", 0)) == 0:  # straight to the terminal: the handler may interrupt another print
            with suppress(OSError):
                os.write(2, b"\nhf-layerprune: stopping after this step; Ctrl-C again stops now\n")

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
