"""Choose the next edit, as rounds of healing do, and search for a plan that meets a budget, which trains nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from .architectures import check_parallel
from .budget import BlockCosts, Budget, EditSpace, Goal
from .data import Batch, check_batches
from .errors import LayerPruneError
from .merging import edited
from .plan import DEFAULT_KINDS, Edit, LayerPlan
from .scoring import Race, Scores, contiguous_stretch, score
from .surgery import check_model, plan_of


@dataclass(frozen=True)
class SearchStep:
    """One edit of a search."""

    edit: Edit
    scores: Scores[Edit]  # what it was chosen by
    plan: LayerPlan  # after it
    size: float  # of that plan, in the budget's unit

    @property
    def cost(self) -> float:
        """The criterion after this edit."""
        return self.scores.values[self.edit]


def next_edit(
    student: PreTrainedModel,
    batches: Iterable[Batch] | None,
    goal: Goal,
    criterion: str = "kl",
    teacher: PreTrainedModel | None = None,
    race: Race | None = None,
    **options: Any,
) -> SearchStep:
    """Choose the next edit of `student`: of all useful edits the one that costs least per unit saved.

    Args:
        student ([`~transformers.PreTrainedModel`]): the model as it is; never changed.
        batches, criterion, teacher, race, options: see [`score`].
        goal ([`Goal`]): where the edits should lead. There is no race between edits that save nothing.
    """
    plan = plan_of(student)
    edits = goal.useful_edits(plan)
    savings: list[float] | None = goal.savings(edits, plan)
    if not all(saving > 0 for saving in savings):
        race = savings = None
    scores = score(student, batches, edits, criterion, teacher, race=race, savings=savings, **options)
    after = scores.safest.apply(plan)
    return SearchStep(scores.safest, scores, after, goal.size(after))


def order_of_removals(
    student: PreTrainedModel,
    batches: Iterable[Batch] | None,
    space: EditSpace,
    criterion: str,
    teacher: PreTrainedModel | None,
    size: int,
    **options: Any,
) -> tuple[Scores[Edit], tuple[Edit, ...]]:
    """The scores of every layer of `student`, and the order in which to remove them.

    The cheapest layer is the first. By `"angular_distance"` the order is the best stretch of `size` layers, from its
    top down; other criteria do not read `size`. Arguments as in [`next_edit`].
    """
    edits = [edit for edit in space.edits(plan_of(student)) if edit.kind == "remove"]
    scores = score(student, batches, edits, criterion, teacher, **options)
    if criterion != "angular_distance":
        return scores, scores.ranking
    layers = contiguous_stretch(student, batches, min(size, len(edits)), [edit.layers[0] for edit in edits])
    # single layers say nothing certain about the best stretch
    return replace(scores, margin=None, contenders=()), tuple(Edit.remove(layer) for layer in reversed(layers))


@dataclass(frozen=True)
class PlanSearch:
    """What a search found."""

    plan: LayerPlan  # meets the budget
    steps: list[SearchStep]  # in order; the plan of each is the search's answer to a larger budget
    latency: BlockCosts | None = None  # what was measured for a budget of latency


def search_plan(
    model: PreTrainedModel,
    batches: Iterable[Batch] | None,
    budget: Budget | Mapping[str, float],
    edits: Iterable[str] | str = DEFAULT_KINDS,
    max_group_size: int = 2,
    criterion: str = "kl",
    teacher: PreTrainedModel | None = None,
    protect_first_layers: int = 0,
    protect_last_layers: int = 0,
    latency: BlockCosts | None = None,
    on_step: Callable[[SearchStep], None] = lambda step: None,
    **options: Any,
) -> PlanSearch:
    """Greedy search over edits: each step takes the edit with the least quality lost per unit saved.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model to make shallower; never changed.
        batches, criterion, teacher, options: see [`score`].
        budget ([`Budget`] or `dict`):
            Where to stop: `{"depth": blocks}`, `{"latency": share of the original's time per token}` or
            `{"parameters": count}`. Its unit is what edits are weighed by. Latency is measured on `model`'s device.
        edits (`Iterable[str]`, *optional*, defaults to `("remove", "parallelize")`): kinds of edit, see [`Edit`].
        max_group_size, protect_first_layers, protect_last_layers: see [`IterativeLayerDistillConfig`].
        latency ([`BlockCosts`], *optional*): measured before; saves the time to measure it.
        on_step (`Callable[[SearchStep], None]`, *optional*): called after every step.

    Returns:
        [`PlanSearch`]: the plan and the steps to it. [`apply_plan`] builds a plan without merges; make the edits of
        one with merges in turn, by [`prune`], [`parallelize`] and [`merge`].

    Raises:
        [`LayerPruneError`]: if the budget is out of reach or met already.
    """
    check_model(model)
    budget, plan, teacher = Budget.of(budget), plan_of(model), model if teacher is None else teacher
    space = EditSpace(edits, max_group_size, protect_first_layers, protect_last_layers)
    batches = check_batches(batches, model.config.vocab_size, "calibration data", required=criterion != "tasks")
    goal = Goal.of(budget, space, model, plan_of(teacher), latency)
    if goal.met(plan):
        raise LayerPruneError(f"the model meets {budget.unit}={budget.target:g} already: it has {goal.size(plan):.4g}")
    goal.check_reachable(plan)
    student, steps = model, []
    while not goal.met(plan_of(student)):
        steps.append(next_edit(student, batches, goal, criterion, teacher, **options))
        student = edited(student, steps[-1].edit, batches, teacher)
        on_step(steps[-1])
    return PlanSearch(plan_of(student), steps, goal.latency)


def parallel_ranges(plan: LayerPlan, target_depth: int | None = None) -> list[LayerPlan]:
    """Every plan that runs one contiguous range of pairs in parallel and has `target_depth` blocks, if that is given.

    The first and the last layer stay alone.
    """
    if several := [block for block in plan.blocks if len(block) > 1]:
        raise LayerPruneError(f"layers {several} are one block in the model already; a range pairs single layers")
    layers, plans = plan.layers, []
    for count in range(1, (plan.depth - 2) // 2 + 1):
        for start in reversed(range(1, plan.depth - 2 * count)):  # the order decides between equal ones
            plans.append(plan.with_pairs(layers[n : n + 2] for n in range(start, start + 2 * count, 2)))
    if not plans:
        raise LayerPruneError(
            f"the model has {plan.depth} layers; a range of pairs between the first and the last needs at least 4"
        )
    wanted = [paired for paired in plans if target_depth in (None, paired.depth)]
    if not wanted:
        raise LayerPruneError(
            f"depth={target_depth}: no range of pairs between the first and the last of {plan.depth} layers leads "
            f"there; choose one of {sorted({paired.depth for paired in plans})}"
        )
    return wanted


def find_parallel_range(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    target_depth: int | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> Scores[LayerPlan]:
    """Score every contiguous range of parallel pairs by loss; the first and the last layer stay alone.

    The search of [Leveraging the True Depth of LLMs](https://huggingface.co/papers/2502.02790).

    Args:
        model ([`~transformers.PreTrainedModel`]): the model, possibly pruned before, without parallel blocks.
        batches, on_batch: see [`score`].
        target_depth (`int`, *optional*): number of blocks; by default all starts and ends are tried.

    Raises:
        [`LayerPruneError`]: if no range of pairs leads to `target_depth`, or the model has parallel blocks.
    """
    check_model(model)
    check_parallel(model.config)
    return score(model, batches, parallel_ranges(plan_of(model), target_depth), "loss", on_batch=on_batch)
