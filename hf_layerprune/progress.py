"""The terminal during a verb: what is happening and the time left; of a run also the round and a line about each."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

import datasets
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .budget import Budget
from .record import RoundRecord
from .scoring.scores import CLEAR_MARGIN
from .surgery import plan_of
from .trainer import IterativeLayerDistillTrainer, LayerDistillCallback

HEAD_LAYERS = 2  # projecting to the vocabulary costs about as much as this many layers of a small model
BACKWARD = 2  # a backward pass costs about two forward passes
SECONDS_BETWEEN_LINES = 30
SPEED_SECONDS = 600  # the time left is estimated from the speed of the last ten minutes


def say(console: Console, text: str) -> None:
    """Print a line as it is: names of files and tasks may hold brackets, and paths are copied whole."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


class Phases:
    """Says on stderr what a verb is doing: in a terminal by a bar with the time left, elsewhere by a line per phase
    and, within a long one, one every 30 seconds.

    Args:
        console ([`~rich.console.Console`], *optional*): another place than stderr.
        quiet (`bool`, *optional*, defaults to `False`): say nothing, as one of several processes.

    Attributes:
        out ([`~rich.console.Console`]): for results that are printed meanwhile: stdout, by way of the bar where both
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
        """Begin a phase of so many steps; one whose length nobody knows has no bar but those of the libraries."""
        self.bar.reset(self.task, description=name)
        self.bar.tasks[0].total = total
        self.bar.advance(self.task, 0)  # speed counts from here
        if self.in_terminal and not self.console.quiet:
            for libraries in (logging, datasets.utils.logging):
                (libraries.enable_progress_bar if total is None else libraries.disable_progress_bar)()
        if total is not None:
            self.bar.start()
        else:
            self.bar.stop()
        if total is None or not self.in_terminal:
            self._say(f"{name} ...")

    def describe(self, name: str) -> None:
        """Go on with the same bar in another part of the phase."""
        self.bar.update(self.task, description=name)
        if not self.in_terminal:
            self._say(self._state())

    def step(self, count: float = 1.0) -> None:
        """So many steps of the phase are done."""
        self.bar.advance(self.task, count)
        if not self.in_terminal and time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self._say(self._state())

    def done(self, name: str, count: int, total: int) -> None:
        """So many of all steps of the phase `name` are done; the first call begins it, maybe with some from before."""
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
    """Follows an [`IterativeLayerDistillTrainer`]. Work is counted in layer passes over one row of data."""

    def __init__(self, trainer: IterativeLayerDistillTrainer, phases: Phases) -> None:
        args = trainer.args
        self.phases = phases
        self.notices = [task.notice for task in trainer.tasks if task.notice]
        depth = plan_of(trainer.start).depth
        self.heals_only = args.budget() == Budget("depth", depth)
        self.target = min(depth - (not self.heals_only), expected_depth(args.budget(), trainer.teacher))
        rounds = max(1, -(-(depth - self.target) // args.layers_per_round))
        self.rounds = f"/{rounds}" if args.budget().unit == "depth" else ""  # else it shows on the way
        self.kinds = len(args.edit_space().kinds)
        self.teacher_depth = trainer.teacher.config.num_hidden_layers
        self.batch_rows = args.per_device_eval_batch_size
        self.calibration_rows = len(trainer.calibration_batches) * self.batch_rows
        repairs = args.compensation != "none"
        self.repair_rows = len(trainer.repair_batches) * self.batch_rows * repairs
        self.eval_rows = len(trainer.eval_batches) * self.batch_rows
        self.step_rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        rows = args.max_steps * self.step_rows if args.max_steps > 0 else args.num_train_epochs * _length(trainer)
        self.healing_rows = rows if args.heal else 0
        self.evaluations = 3 if args.heal else 1  # of a round: before healing, never healed, after
        self.depth, self.number = self.teacher_depth, 0
        self.phase_step, self.healing_step = 0.0, 0.0  # work in one batch, and in one step of the optimizer
        self.layers_per_round = args.layers_per_round
        self.total = self._evaluation_cost(self.teacher_depth) + self._rounds_cost(plan_of(trainer.start).depth)

    def __enter__(self) -> RunProgress:
        for notice in self.notices:
            say(self.phases.console, notice)
        self.phases.phase("starting", self.total)
        return self

    def __exit__(self, *_: object) -> None:
        self.phases.bar.stop()

    def _rounds_cost(self, depth: int) -> float:
        """Of all rounds from a student of `depth` layers on."""
        if self.heals_only:
            return self.evaluations * self._evaluation_cost(depth) + self._healing_cost(depth)
        total = 0.0
        while depth > self.target:
            for _ in range(min(self.layers_per_round, depth - self.target)):
                total += self._scoring_cost(depth) + self._repair_cost(depth)
                depth -= 1
            total += self.evaluations * self._evaluation_cost(depth) + self._healing_cost(depth)
        return total

    def _scoring_cost(self, depth: int) -> float:
        candidates = self.kinds * depth
        return self.calibration_rows * (
            (candidates + 1) * depth / 2 + self.teacher_depth + HEAD_LAYERS * (candidates + 2)
        )

    def _repair_cost(self, depth: int) -> float:
        return self.repair_rows * (depth + self.teacher_depth)

    def _evaluation_cost(self, depth: int) -> float:
        return self.eval_rows * (depth + self.teacher_depth + 2 * HEAD_LAYERS)

    def _healing_cost(self, depth: int) -> float:
        return self.healing_rows * ((1 + BACKWARD) * (depth + HEAD_LAYERS) + self.teacher_depth + HEAD_LAYERS)

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
        self.number, self.depth = number, depth
        self.phases.bar.update(self.phases.task, completed=self.total - self._rounds_cost(depth))

    def on_phase_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, phase: str, **details: Any
    ) -> None:
        if phase == "measuring speed":  # at the end; its work is counted in runs
            self.phase_step = 1.0
            self.phases.phase(phase, details["num_runs"])
            return
        if phase == "writing":
            self.phases.describe(phase)
            return
        self.depth = details.get("num_layers", self.depth)
        work = {
            "scoring": (self._scoring_cost, self.calibration_rows),
            "repairing": (self._repair_cost, self.repair_rows),
            "healing": (self._healing_cost, self.healing_rows),
        }
        price, steps = work.get(phase, (self._evaluation_cost, self.eval_rows))
        cost = price(self.depth)
        self.phase_step, self.healing_step = (
            rows * cost / max(1, steps) for rows in (self.batch_rows, self.step_rows)
        )
        where = f"round {self.number}{self.rounds}, {self.depth} layers: " if self.number else ""
        self.phases.describe(where + phase)

    def on_phase_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.phases.step(self.phase_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.phases.step(self.healing_step)

    def on_round_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        record: RoundRecord,
        **_: Any,
    ) -> None:
        edits = ", ".join(map(str, record.edits)) or "no edit"
        perplexity = f"{record.quality.perplexity:.2f}"
        if record.before_healing is not None:
            perplexity = f"{record.before_healing.perplexity:.2f} -> {perplexity} healed"
        say(
            self.phases.out,
            f"round {record.number}: {edits}; {record.depth} layers; perplexity {perplexity}; "
            f"KL {record.quality.kl:.4f}",
        )
        for scores in record.scores:
            if scores.margin is not None and not scores.margin >= CLEAR_MARGIN:
                say(self.phases.out, f"  {scores.certainty}")


def expected_depth(budget: Budget, original: PreTrainedModel) -> int:
    """Depth at which a search will end: known for a budget of depth, else guessed from the share that is to stay."""
    depth = original.config.num_hidden_layers
    whole = {"depth": depth, "latency": 1, "parameters": original.num_parameters()}[budget.unit]
    return max(1, round(depth * budget.target / whole))


def _length(trainer: IterativeLayerDistillTrainer) -> int:
    rows = trainer.all_train_rows
    return len(rows) if hasattr(rows, "__len__") else 0
