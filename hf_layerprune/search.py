"""Which layers to remove and which to run in parallel: searches over plans, without training.

`find_parallel_range` is the search of [Leveraging the True Depth of LLMs](https://huggingface.co/papers/2502.02790);
`search_plan` takes one edit at a time, of either kind, by what it costs for what it saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from .data import Batch, check_batches
from .edits import EDIT_KINDS, Edit, EditSpace
from .errors import LayerPruneError
from .latency import BlockLatency, measure_latency
from .plan import LayerPlan
from .scoring import EditScores, score_edits, score_plans
from .surgery import apply_plan, check_supported, plan_of


@dataclass(frozen=True)
class Budget:
    """Where a search stops; exactly one of the three.

    Args:
        depth (`int`, *optional*): number of blocks.
        latency (`float`, *optional*): measured time per generated token over that of the original, between 0 and 1.
        parameters (`int`, *optional*): number of parameters, embeddings included.

    Raises:
        [`LayerPruneError`]: if not exactly one is given, or it is out of range.
    """

    depth: int | None = None
    latency: float | None = None
    parameters: int | None = None

    def __post_init__(self) -> None:
        given = {unit: value for unit, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise LayerPruneError(f"the budget is {given or 'empty'}; give exactly one of depth, latency, parameters")
        if self.latency is not None and not 0 < self.latency < 1:
            raise LayerPruneError(f"latency={self.latency} is out of range; it is a share of the original's, 0..1")
        for unit in ("depth", "parameters"):
            if (value := given.get(unit)) is not None and (type(value) is not int or value < 1):
                raise LayerPruneError(f"{unit}={value!r} is out of range; it must be a whole number of at least 1")

    @classmethod
    def of(cls, budget: Budget | Mapping[str, float]) -> Budget:
        """A budget from `{"depth": 12}` and the like."""
        if isinstance(budget, Budget):
            return budget
        if not isinstance(budget, Mapping) or not set(budget) <= {"depth", "latency", "parameters"}:
            raise LayerPruneError(f"budget={budget!r}: give one of depth, latency, parameters, as {{'depth': 12}}")
        return cls(**budget)

    @property
    def unit(self) -> str:
        return next(unit for unit, value in vars(self).items() if value is not None)

    @property
    def target(self) -> float:
        return getattr(self, self.unit)


@dataclass(frozen=True)
class Gauge:
    """A budget with what is needed to measure plans against it.

    Attributes:
        budget ([`Budget`]): what is allowed.
        sizes ([`ModelSizes`]): parameters of the model's parts.
        original ([`LayerPlan`]): the plan a share of latency refers to.
        latency ([`BlockLatency`], *optional*): needed for a budget of latency.
    """

    budget: Budget
    sizes: ModelSizes
    original: LayerPlan
    latency: BlockLatency | None = None

    @classmethod
    def of(
        cls,
        budget: Budget,
        model: PreTrainedModel,
        original: LayerPlan,
        max_group_size: int,
        latency: BlockLatency | None = None,
    ) -> Gauge:
        """Measures block latencies on `model` if the budget needs them and they are not given."""
        if budget.unit == "latency" and latency is None:
            widest = max(max_group_size, *(len(block) for block in (*original.blocks, *plan_of(model).blocks)))
            latency = measure_latency(model, widest)
        return cls(budget, ModelSizes.of(model), original, latency)

    def size(self, plan: LayerPlan) -> float:
        """The plan in the budget's unit."""
        if self.budget.unit == "depth":
            return plan.depth
        if self.budget.unit == "parameters":
            return self.sizes.of_plan(plan)
        return self.latency.of(plan) / self.latency.of(self.original)

    def met(self, plan: LayerPlan) -> bool:
        return self.size(plan) <= self.budget.target

    def useful_edits(self, plan: LayerPlan, space: EditSpace) -> list[Edit]:
        """Allowed edits that save something and leave the budget within reach."""
        size = self.size(plan)
        edits = ((edit, edit.apply(plan)) for edit in space.edits(plan))
        return [e for e, after in edits if self.size(after) < size and self.met(space.smallest(after))]

    def check_reachable(self, plan: LayerPlan, space: EditSpace, setting: str | None = None) -> None:
        """Raise [`LayerPruneError`] unless `space` can lead from `plan` into the budget; `setting` names it."""
        setting, target, smallest = setting or self.budget.unit, self.budget.target, space.smallest(plan)
        if not self.met(smallest):
            raise LayerPruneError(
                f"{setting}={target:g} is out of reach: {' and '.join(space.kinds)} can go from {self.size(plan):.4g} "
                f"to {self.size(smallest):.4g}; allow another kind of edit, larger groups (max_group_size, now "
                f"{space.max_group_size}) or protect fewer layers"
            )

    def best(self, scores: EditScores, plan: LayerPlan) -> Edit:
        """The edit that costs least per unit saved. What it saves beyond the budget does not count.

        Raises:
            [`LayerPruneError`]: if no score is a finite number.
        """
        _ = scores.safest  # raises where no cost is a number
        size = self.size(plan)

        def price(edit: Edit) -> float:
            saved = size - max(self.size(edit.apply(plan)), self.budget.target)
            cost = scores.values[edit] - scores.baseline
            return cost / saved if math.isfinite(cost) else math.inf

        return min(scores.ranking, key=price)


@dataclass(frozen=True)
class ModelSizes:
    """Parameters of a model's parts, so that any plan of its layers can be counted."""

    outside: int
    layer: int  # without norms
    norms: int  # of one block, whatever its width

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelSizes:
        blocks = model.base_model.layers
        norms = sum(p.numel() for name, p in blocks[0].named_parameters() if "layernorm" in name)
        inside = sum(p.numel() for p in blocks.parameters())
        layer = (inside - len(blocks) * norms) // len(plan_of(model).layers)
        return cls(model.num_parameters() - inside, layer, norms)

    def of_plan(self, plan: LayerPlan) -> int:
        return self.outside + self.layer * len(plan.layers) + self.norms * plan.depth


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
        plan ([`LayerPlan`]): meets the budget.
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
    batches: Iterable[Batch],
    budget: Budget | Mapping[str, float],
    edits: Iterable[str] = EDIT_KINDS,
    max_group_size: int = 2,
    criterion: str = "kl",
    teacher: PreTrainedModel | None = None,
    protect_first_layers: int = 0,
    protect_last_layers: int = 0,
    latency: BlockLatency | None = None,
    on_step: Callable[[SearchStep], None] = lambda step: None,
) -> PlanSearch:
    """Greedy search over edits: each step takes the edit with the least quality lost per unit saved.

    Args:
        model ([`~transformers.Qwen2ForCausalLM`]): the model to make shallower; never changed.
        batches (`Iterable[dict[str, Tensor]]`): calibration data, as in [`score_layers`].
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
        on_step (`Callable[[SearchStep], None]`, *optional*): called after every step.

    Raises:
        [`LayerPruneError`]: if the budget is out of reach, met already, or the request makes no sense.
    """
    check_supported(model.config)
    budget, plan, teacher = Budget.of(budget), plan_of(model), model if teacher is None else teacher
    space = EditSpace(tuple(edits), max_group_size, protect_first_layers, protect_last_layers)
    batches = check_batches(batches, model.config.vocab_size, "calibration data")
    gauge = Gauge.of(budget, model, plan_of(teacher), max_group_size, latency)
    if gauge.met(plan):
        raise LayerPruneError(
            f"the model meets {budget.unit}={budget.target:g} already: it has {gauge.size(plan):.4g}"
        )
    gauge.check_reachable(plan, space)
    steps: list[SearchStep] = []
    while not gauge.met(plan):
        student = apply_plan(model, plan, share_weights=True)
        steps.append(next_step(student, batches, gauge, space, criterion, teacher))
        plan = steps[-1].plan
        on_step(steps[-1])
    return PlanSearch(plan, steps, budget, gauge.latency)


def next_step(
    student: PreTrainedModel,
    batches: Iterable[Batch],
    gauge: Gauge,
    space: EditSpace,
    criterion: str,
    teacher: PreTrainedModel,
    on_batch: Callable[[], None] = lambda: None,
) -> SearchStep:
    """Score every useful edit of `student` and take the best; arguments as in [`search_plan`]."""
    plan = plan_of(student)
    scores = score_edits(student, batches, gauge.useful_edits(plan, space), criterion, teacher, on_batch)
    edit = gauge.best(scores, plan)
    return SearchStep(edit, scores, edit.apply(plan), gauge.size(edit.apply(plan)))


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
            raise LayerPruneError(f"depth={depth}: tried were {sorted({plan.depth for plan in self.perplexities})}")
        return min(plans, key=lambda plan: (self.perplexities[plan], -plan.parallel_pairs[0][0]))

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
        model ([`~transformers.Qwen2ForCausalLM`]): the model, possibly pruned before, without parallel blocks.
        batches (`Iterable[dict[str, Tensor]]`): calibration data, as in [`score_layers`].
        target_depth (`int`, *optional*):
            Number of blocks. Only runs of that depth are tried; by default all starts and ends are, and
            [`ParallelRange.best`] gives the best plan of each depth.
        on_batch (`Callable[[], None]`, *optional*): called after every batch, for progress bars.

    Raises:
        [`LayerPruneError`]: if no run of pairs leads to `target_depth`, or the model has parallel blocks.
    """
    check_supported(model.config)
    plan = plan_of(model)
    if plan.parallel_pairs:
        raise LayerPruneError(f"the model runs layers {list(plan.parallel_pairs)} in parallel already")
    most = (plan.depth - 2) // 2
    shallowest = plan.depth - most
    if target_depth is not None and not shallowest <= target_depth < plan.depth:
        raise LayerPruneError(
            f"target_depth={target_depth}: pairs between the first and the last of {plan.depth} layers lead to "
            f"{shallowest}..{plan.depth - 1} blocks"
        )
    counts = range(1, most + 1) if target_depth is None else [plan.depth - target_depth]
    plans = [_run_of_pairs(plan, start, count) for count in counts for start in range(1, plan.depth - 2 * count)]
    if not plans:
        raise LayerPruneError(f"a model of {plan.depth} layers has no pair between its first and its last layer")
    scores = score_plans(model, batches, plans, "loss", on_batch=on_batch)
    perplexities = {plan: _exp(loss) for plan, loss in scores.values.items()}
    return ParallelRange(perplexities, _exp(scores.baseline), target_depth)


def _run_of_pairs(plan: LayerPlan, start: int, count: int) -> LayerPlan:
    layers = plan.layers
    end = start + 2 * count
    pairs = [(layers[n], layers[n + 1]) for n in range(start, end, 2)]
    blocks: list[Any] = [*plan.blocks[:start], *pairs, *plan.blocks[end:]]
    return LayerPlan(tuple(blocks), plan.num_teacher_layers)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
