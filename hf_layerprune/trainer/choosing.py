"""How a round finds its next edit, scored on the student as it is or taken from an order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..budget import Gauge
from ..data import Batch
from ..edits import Edit
from ..errors import LayerPruneError
from ..record import RunRecord
from ..scoring import MEASURED, EditScores, Race, contiguous_block, score_edits
from ..search import next_step
from ..surgery import plan_of
from ..tasks import PreparedTask, load_tasks, prepare_tasks
from .config import IterativeLayerDistillConfig


@dataclass(frozen=True)
class Choice:
    """
    Attributes:
        edit ([`Edit`]): the edit to make next.
        scores ([`EditScores`], *optional*): what it was chosen by, if any were measured for it.
        order (`tuple[Edit, ...]`): where one scoring chooses several edits, all of them in order.
    """

    edit: Edit
    scores: EditScores | None = None
    order: tuple[Edit, ...] = ()


def next_edit(
    student: PreTrainedModel,
    batches: list[Batch],
    gauge: Gauge,
    teacher: PreTrainedModel,
    args: IterativeLayerDistillConfig,
    run: RunRecord,
    on_batch: Callable[[], None],
    tasks: Sequence[PreparedTask],
    tokenizer: PreTrainedTokenizerBase,
) -> Choice:
    """The edit to make next, and the scores it was chosen by.

    Raises:
        [`LayerPruneError`]: if a stretch was chosen once and all of it is gone.
    """
    options: dict[str, Any] = {"seed": args.seed + plan_of(student).depth}  # another draw of "random" in every round
    if args.criterion in MEASURED:  # the layer that will be repaired is the one to judge
        options |= {"compensation": args.compensation, "tasks": tasks, "tokenizer": tokenizer}
    if not args.one_shot and args.criterion != "angular_distance":
        race = None if args.race_confidence is None else Race(args.race_confidence, args.seed)
        step = next_step(student, batches, gauge, args.criterion, teacher, on_batch, race, **options)
        return Choice(step.edit, step.scores)
    made, order, scores = len(run.current.edits), run.current.order, None
    if args.one_shot:
        made, order = made + len(run.edits), run.order
    if not order:
        size = plan_of(student).depth - int(gauge.budget.target) if args.one_shot else run.current.wanted
        edits, scores = fixed_order(student, batches, gauge, teacher, args.criterion, size, on_batch, **options)
        order = tuple(edits)
    if made >= len(order):
        raise LayerPruneError(
            f"criterion={args.criterion!r} with one_shot=True chose a stretch of {len(order)} layers, which are gone; "
            "a new run with the lower target chooses another"
        )
    return Choice(order[made], scores, order)


def prepared_tasks(
    args: IterativeLayerDistillConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[PreparedTask]:
    """The tasks that score layers, tokenized; none where another criterion does."""
    if not args.tasks:
        return []
    return prepare_tasks(load_tasks(args.tasks), model, tokenizer, args.per_device_eval_batch_size)


def fixed_order(
    model: PreTrainedModel,
    batches: list[Batch],
    gauge: Gauge,
    teacher: PreTrainedModel,
    criterion: str,
    size: int,
    on_batch: Callable[[], None] = lambda: None,
    **options: Any,
) -> tuple[list[Edit], EditScores]:
    """Removals to make one after the other without scoring again, and the scores of all; options of `score_edits`.

    The cheapest layer first; by `"angular_distance"` the `size` layers of the best stretch, from its top down, of
    which the scores of single layers tell nothing certain.
    """
    edits: list[Any] = [edit for edit in gauge.space.edits(plan_of(model)) if edit.kind == "remove"]
    scores = score_edits(model, batches, edits, criterion, teacher, on_batch, **options)
    if criterion != "angular_distance":
        return list(scores.ranking), scores
    layers = contiguous_block(model, batches, min(size, len(edits)), [edit.layers[0] for edit in edits])
    scores = replace(scores, margin=None, half_agreement=None, contenders=())
    return [Edit.remove(layer) for layer in reversed(layers)], scores
