"""The terminal during a run: a bar with the round, what is happening and the time left; a line per finished round."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerControl, TrainerState, TrainingArguments

from .edits import Edit
from .report import was_healed
from .scoring.scores import CLEAR_MARGIN
from .surgery import plan_of
from .trainer import IterativeLayerDistillTrainer, LayerDistillCallback

HEAD_LAYERS = 2  # projecting to the vocabulary costs about as much as this many layers of a small model
BACKWARD = 2  # a backward pass costs about two forward passes


def say(console: Console, text: str) -> None:
    """Print a line as it is: names of files and tasks may hold brackets, and paths are copied whole."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


class RunProgress(LayerDistillCallback):
    """Follows an [`IterativeLayerDistillTrainer`]. Work is counted in layer passes over one row of data."""

    def __init__(self, trainer: IterativeLayerDistillTrainer, console: Console) -> None:
        args = trainer.args
        self.console = console
        self.notices = [task.notice for task in trainer.tasks if task.notice]
        self.target = _expected_depth(trainer)
        rounds = -(-(plan_of(trainer.start).depth - self.target) // args.layers_per_round)
        self.rounds = f"/{rounds}" if args.budget().unit == "depth" else ""  # else it shows on the way
        self.kinds = len(args.edit_space().kinds)
        self.teacher_depth = trainer.teacher.config.num_hidden_layers
        self.batch_rows = args.per_device_eval_batch_size
        self.calibration_rows = len(trainer.calibration_batches) * self.batch_rows
        self.eval_rows = len(trainer.eval_batches) * self.batch_rows
        self.step_rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        rows = args.max_steps * self.step_rows if args.max_steps > 0 else args.num_train_epochs * _length(trainer)
        self.healing_rows = rows if args.heal else 0
        self.evaluations = 3 if args.heal else 1  # of a round: before healing, never healed, after
        self.phase, self.depth, self.number, self.step_cost = "", self.teacher_depth, 0, 0.0
        self.layers_per_round = args.layers_per_round
        self.total = self._evaluation_cost(self.teacher_depth) + self._rounds_cost(plan_of(trainer.start).depth)
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.bar.add_task("starting", total=self.total)

    def __enter__(self) -> RunProgress:
        for notice in self.notices:
            say(self.console, notice)
        self.bar.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.bar.update(self.task, completed=self.bar.tasks[0].total)
        self.bar.stop()

    def _rounds_cost(self, depth: int) -> float:
        """Of all rounds from a student of `depth` layers on."""
        total = 0.0
        while depth > self.target:
            for _ in range(min(self.layers_per_round, depth - self.target)):
                total += self._scoring_cost(depth)
                depth -= 1
            total += self.evaluations * self._evaluation_cost(depth) + self._healing_cost(depth)
        return total

    def _scoring_cost(self, depth: int) -> float:
        candidates = self.kinds * depth
        return self.calibration_rows * (
            (candidates + 1) * depth / 2 + self.teacher_depth + HEAD_LAYERS * (candidates + 2)
        )

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
        self.bar.update(self.task, completed=self.total - self._rounds_cost(depth))

    def on_phase_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, phase: str, **details: Any
    ) -> None:
        self.phase = phase
        self.depth = details.get("num_layers", self.depth)
        cost = {"scoring": self._scoring_cost, "healing": self._healing_cost}.get(phase, self._evaluation_cost)(
            self.depth
        )
        steps = {"scoring": self.calibration_rows, "healing": self.healing_rows}.get(phase, self.eval_rows)
        self.step_cost = cost / max(1, steps)
        where = f"round {self.number}{self.rounds}, {self.depth} layers: " if self.number else ""
        self.bar.update(self.task, description=where + phase)

    def on_phase_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.advance(self.task, self.step_cost * self.batch_rows)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.advance(self.task, self.step_cost * self.step_rows)

    def on_round_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        record: dict[str, Any],
        **_: Any,
    ) -> None:
        edits = ", ".join(str(Edit.from_label(label)) for label in record["edits"])
        perplexity = f"{record['perplexity']:.2f}"
        if was_healed(record):
            perplexity = f"{record['perplexity_before_healing']:.2f} -> {perplexity} healed"
        say(
            self.console,
            f"round {record['round']}: {edits}; {record['num_layers']} layers; perplexity {perplexity}; "
            f"KL {record['kl']:.4f}",
        )
        for scores in record["all_scores"]:
            if scores["margin"] is not None and not scores["margin"] >= CLEAR_MARGIN:
                say(self.console, f"  {scores['certainty']}")


def _expected_depth(trainer: IterativeLayerDistillTrainer) -> int:
    """Depth at which the run will end: known for a target of depth, else guessed from the share that is to stay."""
    budget, depth = trainer.args.budget(), trainer.teacher.config.num_hidden_layers
    whole = {"depth": depth, "latency": 1, "parameters": trainer.teacher.num_parameters()}[budget.unit]
    return min(plan_of(trainer.start).depth - 1, max(1, round(depth * budget.target / whole)))


def _length(trainer: IterativeLayerDistillTrainer) -> int:
    rows = trainer.all_train_rows
    return len(rows) if hasattr(rows, "__len__") else 0
