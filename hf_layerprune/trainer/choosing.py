"""How a round finds its next edit: scored on the student as it is, or taken from an order that was fixed before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from ..budget import Gauge
from ..data import Batch
from ..edits import Edit
from ..scoring import EditScores, Race, contiguous_block, score_edits
from ..search import next_step
from ..surgery import plan_of
from .config import IterativeLayerDistillConfig
from .run_state import RunState


def next_edit(
    student: PreTrainedModel,
    batches: list[Batch],
    gauge: Gauge,
    teacher: PreTrainedModel,
    args: IterativeLayerDistillConfig,
    run: RunState,
    on_batch: Callable[[], None],
) -> tuple[str, EditScores | None]:
    """Label of the edit to make next, and the scores it was chosen by, if any were taken for it."""
    seed = args.seed + plan_of(student).depth  # of "random": another draw in every round
    if not args.one_shot and args.criterion != "angular_distance":
        race = None if args.race_confidence is None else Race(args.race_confidence, args.seed)
        step = next_step(student, batches, gauge, args.criterion, teacher, on_batch, race, seed=seed)
        return step.edit.label, step.scores
    made = len(run.current["edits"])
    order, scores = (run.order if args.one_shot else run.current.setdefault("order", [])), None
    if args.one_shot:
        made += sum(len(record["edits"]) for record in run.rounds)
    if not order:
        size = plan_of(student).depth - int(gauge.budget.target) if args.one_shot else run.current["wanted"]
        edits, scores = fixed_order(student, batches, gauge, teacher, args.criterion, size, seed, on_batch)
        order += [edit.label for edit in edits]
    return order[made], scores


def fixed_order(
    model: PreTrainedModel,
    batches: list[Batch],
    gauge: Gauge,
    teacher: PreTrainedModel,
    criterion: str,
    size: int,
    seed: int = 0,
    on_batch: Callable[[], None] = lambda: None,
) -> tuple[list[Edit], EditScores]:
    """Removals to make one after the other without scoring again, and the scores of all.

    The cheapest layer first; by `"angular_distance"` the `size` layers of the best stretch, from its top down.
    """
    edits: list[Any] = [edit for edit in gauge.space.edits(plan_of(model)) if edit.kind == "remove"]
    scores = score_edits(model, batches, edits, criterion, teacher, on_batch, seed=seed)
    if criterion != "angular_distance":
        return list(scores.ranking), scores
    layers = contiguous_block(model, batches, size, [edit.layers[0] for edit in edits])
    return [Edit.remove(layer) for layer in reversed(layers)], scores
