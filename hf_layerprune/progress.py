"""The terminal during a verb: what is happening and the time left; of a run also the round and a line about each."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

import datasets
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel
from transformers.utils import logging

from .budget import Budget
from .record import RoundRecord
from .scoring.scores import CLEAR_MARGIN
from .surgery import plan_of
from .trainer import IterativeLayerDistillTrainer, LayerDistillCallback

BACKWARD = 2  # a backward pass costs about two forward passes
SECONDS_BETWEEN_LINES = 30
SPEED_SECONDS = 600  # the time left is estimated from the speed of the last ten minutes


def say(console: Console, text: str) -> None:
    """Print a line as it is: names of files and tasks may hold brackets, and paths are copied whole."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


class Phases:
    """Say on stderr what a verb is doing: in a terminal by a bar with the time left, elsewhere by a line per phase
    and, within a long one, a line every 30 seconds.

    Args:
        console ([`~rich.console.Console`], *optional*): where to say it, in place of stderr.
        quiet (`bool`, *optional*, defaults to `False`): say nothing, as one of several processes.

    Attributes:
        out ([`~rich.console.Console`]): for results that are printed meanwhile: stdout, through the bar where both
            are one terminal.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, quiet=quiet)
        self.in_terminal = self.console.is_terminal
        self.out = self.console if console or (self.in_terminal and sys.stdout.isatty()) else Console(quiet=quiet)
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

    def describe(self, name: str) -> None:
        """Continue the bar under another name."""
        self.bar.update(self.task, description=name)
        if not self.in_terminal:
            self._say(self._state())

    def step(self, count: float = 1.0) -> None:
        """Advance by `count` steps."""
        self.bar.advance(self.task, count)
        if not self.in_terminal and time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self._say(self._state())

    def done(self, name: str, count: int, total: int) -> None:
        """Report `count` of `total` steps of the phase `name` done; the first call begins it."""
        task = self.bar.tasks[0]
        if task.description == name:
            self.step(count - task.completed)
        else:
            self.phase(name, total)
            task.completed = count

    def _state(self) -> str:
        task = self.bar.tasks[0]
        left = task.time_remaining
        time_left = "" if left is None else f", {timedelta(seconds=round(left))} left"
        return f"{task.description}: {task.percentage:.0f} %{time_left}"

    def _say(self, text: str) -> None:
        say(self.console, text)
        self._said = time.monotonic()


class RunProgress(LayerDistillCallback):
    """Follow an [`IterativeLayerDistillTrainer`]. Work is counted in passes of a model over one row of data, and is
    taken to be the same in all rounds."""

    def __init__(self, trainer: IterativeLayerDistillTrainer, phases: Phases) -> None:
        args, budget, depth = trainer.args, trainer.args.budget, plan_of(trainer.start).depth
        self.phases, self.number = phases, 0
        self.rounds = max(1, -(-(depth - expected_depth(budget, trainer.teacher)) // args.layers_per_round))
        self.of_rounds = f"/{self.rounds}" if budget.unit == "depth" else ""  # else a guess
        batch = args.per_device_eval_batch_size
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        candidates = len(args.edits) * depth  # half of the layers runs for each
        passes = {"scoring": 1 + candidates / 2, "repairing": 2, "evaluating": 2, "healing": 2 + BACKWARD}
        self.step_work = {phase: count * (step if phase == "healing" else batch) for phase, count in passes.items()}
        rows, edits = trainer.all_train_rows, args.layers_per_round
        epoch = len(rows) / step if hasattr(rows, "__len__") else 0.0
        steps = {
            "scoring": edits * len(trainer.calibration_batches),
            "repairing": edits * len(trainer.repair_batches) * (args.compensation != "none"),
            "evaluating": len(trainer.eval_batches) * (3 if args.heal else 1),  # before healing, unhealed, after
            "healing": (args.max_steps if args.max_steps > 0 else args.num_train_epochs * epoch) * args.heal,
        }
        self.round_work = sum(count * self.step_work[phase] for phase, count in steps.items())
        self.teacher_work = len(trainer.eval_batches) * self.step_work["evaluating"]
        self.now = 0.0  # work of a step in this phase
        for notice in filter(None, (task.notice for task in trainer.tasks)):
            say(phases.console, notice)
        phases.phase("starting", self.teacher_work + self.rounds * self.round_work)

    def _rounds_done(self, number: int) -> None:
        done = self.teacher_work + min(number, self.rounds) * self.round_work
        self.phases.bar.update(self.phases.task, completed=done)

    def on_round_begin(self, *_: Any, number: int, **__: Any) -> None:
        self.number = number
        self._rounds_done(number - 1)

    def on_phase_begin(self, *_: Any, phase: str, num_layers: int = 0, num_runs: int = 0, **__: Any) -> None:
        if phase == "measuring speed":  # at the end; its work is counted in runs
            self.now = 1.0
            self.phases.phase(phase, num_runs)
            return
        self.now = self.step_work.get(phase.split()[0], 0.0)
        depth = f", {num_layers} layers" if num_layers else ""
        in_round = self.number and phase != "writing"
        self.phases.describe(f"round {self.number}{self.of_rounds}{depth}: {phase}" if in_round else phase)

    def on_phase_step(self, *_: Any, **__: Any) -> None:
        self.phases.step(self.now)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.phases.step(self.now)

    def on_round_end(self, *_: Any, record: RoundRecord, **__: Any) -> None:
        self._rounds_done(self.number)
        edits = ", ".join(map(str, record.edits)) or "no edit"
        perplexity = f"{record.quality.perplexity:.2f}"
        if record.before_healing is not None:
            perplexity = f"{record.before_healing.perplexity:.2f} -> {perplexity} healed"
        what = f"round {record.number}: {edits}; {record.depth} layers"
        say(self.phases.out, f"{what}; perplexity {perplexity}; KL {record.quality.kl:.4f}")
        for scores in record.scores:
            if scores.margin is not None and not scores.margin >= CLEAR_MARGIN:
                say(self.phases.out, f"  {scores.certainty}")


def expected_depth(budget: Budget, original: PreTrainedModel) -> int:
    """Depth at which a search will end: known for a budget of depth, else guessed from the share that is to stay."""
    depth = original.config.num_hidden_layers
    whole = {"depth": depth, "latency": 1, "parameters": original.num_parameters()}[budget.unit]
    return max(1, round(depth * budget.target / whole))
