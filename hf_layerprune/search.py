"""Which layers to remove and which to run in parallel: searches over plans, without training.

`find_parallel_range` is the search of [Leveraging the True Depth of LLMs](https://huggingface.co/papers/2502.02790);
`search_plan` takes one edit at a time, of either kind, by what it costs for what it saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .budget import Budget, Gauge
from .data import Batch, check_batches
from .edits import EDIT_KINDS, Edit, EditSpace
from .errors import LayerPruneError
from .latency import BlockLatency
from .losses import perplexity_of
from .plan import LayerPlan
from .scoring import EditScores, Race, score_edits, score_plans
from .surgery import apply_plan, check_model, plan_of
from .tasks import PreparedTask, Task, prepare_tasks


@dataclass(frozen=True)
class SearchStep:
    """One edit of a search: `scores` are those it was chosen by, `plan` and `size` (budget's unit) what came of it."""

    edit: Edit
    scores: EditScores
    plan: LayerPlan
    size: float

    @property
    def cost(self) -> float:
        """The criterion after this edit."""
        return self.scores.values[self.edit]


@dataclass(frozen=True)
class PlanSearch:
    """What a search found.

    Attributes:
        plan ([`LayerPlan`]): meets the budget; one of latency by the estimate of [`measure_latency`].
        steps (`list[SearchStep]`): the edits in order; the plan of each is the search's answer to a larger budget.
        budget ([`Budget`]): what was asked for.
        latency ([`BlockLatency`], *optional*): what was measured for a budget of latency.
    """

    plan: LayerPlan
    steps: list[SearchStep]
    budget: Budget
    latency: BlockLatency | None = None


def search_plan(
    model: PreTrainedModel,
    batches: Iterable[Batch] | None,
    budget: Budget | Mapping[str, float],
    edits: Iterable[str] | str = EDIT_KINDS,
    max_group_size: int = 2,
    criterion: str = "kl",
    teacher: PreTrainedModel | None = None,
    protect_first_layers: int = 0,
    protect_last_layers: int = 0,
    latency: BlockLatency | None = None,
    race: Race | None = None,
    on_step: Callable[[SearchStep], None] = lambda step: None,
    tasks: Sequence[Task | PreparedTask] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> PlanSearch:
    """Greedy search over edits: each step takes the edit with the least quality lost per unit saved.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model to make shallower; never changed.
        batches (`Iterable[dict[str, Tensor]]`, *optional*):
            Calibration data, as in [`score_layers`]; `"tasks"` need none.
        budget ([`Budget`] or `dict`):
            Where to stop: `{"depth": blocks}`, `{"latency": share of the original's time per token}` or
            `{"parameters": count}`. Its unit is what edits are weighed by. Latency is measured on `model`'s device.
        edits (`Iterable[str]`, *optional*): `"remove"`, `"parallelize"` or both, the default.
        max_group_size (`int`, *optional*, defaults to `2`):
            Most layers in one parallel block; above 2, neighbouring blocks merge further.
        criterion (`str`, *optional*, defaults to `"kl"`): how an edit is scored; see [`score_edits`].
        teacher ([`~transformers.PreTrainedModel`], *optional*): what `"kl"` compares with; `model` by default.
        protect_first_layers, protect_last_layers (`int`, *optional*, defaults to `0`):
            Number of first and last teacher layers that no edit touches.
        latency ([`BlockLatency`], *optional*): measured before; saves the time to measure it.
        race ([`Race`], *optional*): drop edits early that are worse beyond doubt; see [`score_layers`].
        on_step (`Callable[[SearchStep], None]`, *optional*): called after every step.
        tasks (`Sequence[Task]`, *optional*): what `"tasks"` asks; tokenized once.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): the model's own, for `"tasks"`.
        on_batch (`Callable[[], None]`, *optional*): called after every batch of a step, for progress bars.

    Returns:
        [`PlanSearch`]: the plan and the steps to it; [`apply_plan`] builds it.

    Raises:
        [`LayerPruneError`]: if the budget is out of reach, met already, or the request makes no sense.
    """
    check_model(model)
    budget, plan, teacher = Budget.of(budget), plan_of(model), model if teacher is None else teacher
    space = EditSpace(edits, max_group_size, protect_first_layers, protect_last_layers)
    if batches is not None or criterion != "tasks":
        batches = check_batches(batches, model.config.vocab_size, "calibration data")
    gauge = Gauge.of(budget, space, model, plan_of(teacher), latency)
    if gauge.met(plan):
        raise LayerPruneError(
            f"the model meets {budget.unit}={budget.target:g} already: it has {gauge.size(plan):.4g}"
        )
    gauge.check_reachable(plan)
    if criterion == "tasks" and tokenizer is not None:  # else the first step says what is missing
        tasks = prepare_tasks(tasks, model, tokenizer)
    student, steps = model, []
    while not gauge.met(plan_of(student)):
        steps.append(
            next_step(student, batches, gauge, criterion, teacher, on_batch, race, tasks=tasks, tokenizer=tokenizer)
        )
        student = apply_plan(student, steps[-1].plan, share_weights=True)
        on_step(steps[-1])
    return PlanSearch(plan_of(student), steps, budget, gauge.latency)


def next_step(
    student: PreTrainedModel,
    batches: Iterable[Batch] | None,
    gauge: Gauge,
    criterion: str,
    teacher: PreTrainedModel,
    on_batch: Callable[[], None] = lambda: None,
    race: Race | None = None,
    **options: Any,
) -> SearchStep:
    """Score every useful edit of `student` and take the best; arguments as in [`search_plan`].

    `options` go to [`score_edits`]. There is no race between edits that save nothing.
    """
    plan = plan_of(student)
    edits = gauge.useful_edits(plan)
    savings: list[float] | None = gauge.savings(edits, plan)
    if not all(saving > 0 for saving in savings):
        race = savings = None
    scores = score_edits(student, batches, edits, criterion, teacher, on_batch, race, savings, **options)
    after = scores.safest.apply(plan)
    return SearchStep(scores.safest, scores, after, gauge.size(after))


@dataclass(frozen=True)
class ParallelRange:
    """Perplexity of every run of pairs.

    Attributes:
        perplexities (`dict[LayerPlan, float]`): of each plan that was tried.
        original (`float`): perplexity of the model as it was.
        target_depth (`int`, *optional*): depth that was asked for.
    """

    perplexities: dict[LayerPlan, float]
    original: float
    target_depth: int | None = None

    def best(self, depth: int) -> LayerPlan:
        """The plan of `depth` blocks with the lowest perplexity; of equal ones that with the later run.

        Raises:
            [`LayerPruneError`]: if none of that depth was tried.
        """
        plans = [plan for plan in self.perplexities if plan.depth == depth]
        if not plans:
            depths = sorted({plan.depth for plan in self.perplexities})
            raise LayerPruneError(f"no run of pairs leads to depth={depth}; tried were {depths}")
        return min(plans, key=lambda plan: (_nan_last(self.perplexities[plan]), -plan.parallel_pairs[0][0]))

    @property
    def plan(self) -> LayerPlan:
        """The best plan of the target depth."""
        if self.target_depth is None:
            raise LayerPruneError("no target_depth was given; choose one of the plans with best(depth)")
        return self.best(self.target_depth)


def find_parallel_range(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    target_depth: int | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> ParallelRange:
    """Score every contiguous run of parallel pairs by perplexity; first and last block stay sequential.

    The search of [Leveraging the True Depth of LLMs](https://huggingface.co/papers/2502.02790), which pairs up
    consecutive layers from a start to an end. Runs share the part of the model before their start.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model, possibly pruned before, without parallel blocks.
        batches (`Iterable[dict[str, Tensor]]`): calibration data, as in [`score_layers`].
        target_depth (`int`, *optional*):
            Number of blocks. Only runs of that depth are tried; by default all starts and ends are, and
            [`ParallelRange.best`] gives the best plan of each depth.
        on_batch (`Callable[[], None]`, *optional*): called after every batch, for progress bars.

    Returns:
        [`ParallelRange`]: the perplexity of every run that was tried.

    Raises:
        [`LayerPruneError`]: if no run of pairs leads to `target_depth`, or the model has parallel blocks.
    """
    check_model(model)
    plan = plan_of(model)
    if plan.parallel_pairs:
        raise LayerPruneError(f"the model runs layers {list(plan.parallel_pairs)} in parallel already")
    most = (plan.depth - 2) // 2
    if most < 1:
        raise LayerPruneError(f"no run of pairs lies between the first and the last of {plan.depth} layers")
    shallowest = plan.depth - most
    if target_depth is not None and not (type(target_depth) is int and shallowest <= target_depth < plan.depth):
        raise LayerPruneError(
            f"target_depth={target_depth!r}: pairs between the first and the last of {plan.depth} layers lead to "
            f"{shallowest}..{plan.depth - 1} blocks"
        )
    counts = range(1, most + 1) if target_depth is None else [plan.depth - target_depth]
    plans = [_run_of_pairs(plan, start, count) for count in counts for start in range(1, plan.depth - 2 * count)]
    scores = score_plans(model, batches, plans, "loss", on_batch=on_batch)
    _ = scores.safest  # raises where no loss is a number
    perplexities = {plan: perplexity_of(loss) for plan, loss in scores.values.items()}
    return ParallelRange(perplexities, perplexity_of(scores.baseline), target_depth)


def _run_of_pairs(plan: LayerPlan, start: int, count: int) -> LayerPlan:
    layers = plan.layers
    end = start + 2 * count
    pairs = [(layers[n], layers[n + 1]) for n in range(start, end, 2)]
    blocks: list[Any] = [*plan.blocks[:start], *pairs, *plan.blocks[end:]]
    return LayerPlan(tuple(blocks), plan.num_teacher_layers)


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value
