"""How far a search goes, by which edits, and what is within reach, in depth, measured latency or parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real

from transformers import PreTrainedModel

from .architectures import check_parallel
from .benchmark import benchmark_models
from .errors import LayerPruneError
from .plan import DEFAULT_KINDS, EDIT_KINDS, Edit, LayerPlan
from .settings import check_at_least
from .surgery import apply_plan, plan_of

TARGETS = {"depth": "target_num_layers", "latency": "target_latency", "parameters": "target_num_parameters"}
"""The unit of a budget, and the setting of a run that gives it."""
MOST_BLOCKS = 8  # of one width at a time: enough for an average, and limits memory


@dataclass(frozen=True)
class Budget:
    """Where a search stops.

    Args:
        unit (`str`): `"depth"`, `"latency"` or `"parameters"`.
        target (`float`): number of blocks; time per generated token as a share of the original's, between 0 and 1; or
            number of parameters, embeddings included.
    """

    unit: str
    target: float

    def __post_init__(self) -> None:
        if self.unit not in TARGETS:
            raise LayerPruneError(f"a budget is in one of {', '.join(TARGETS)}, not {self.unit!r}")
        is_share = self.unit == "latency"
        kind = Real if is_share else Integral  # NumPy's too
        is_number = isinstance(self.target, kind) and not isinstance(self.target, bool)
        if not is_number or not (0 < self.target < 1 if is_share else self.target >= 1):
            form = "a share of the original's, between 0 and 1" if is_share else "a whole number of at least 1"
            name = TARGETS[self.unit]
            raise LayerPruneError(f"{self.unit}={self.target!r} ({name}) is out of range; it must be {form}")
        object.__setattr__(self, "target", float(self.target) if is_share else int(self.target))

    @classmethod
    def of(cls, budget: Budget | Mapping[str, float | None]) -> Budget:
        """A budget from `{"depth": 12}` and the like; units without a target do not count."""
        if isinstance(budget, Budget):
            return budget
        given = [item for item in budget.items() if item[1] is not None] if isinstance(budget, Mapping) else []
        if len(given) != 1:
            units = ", ".join(f"{unit} ({setting})" for unit, setting in TARGETS.items())
            raise LayerPruneError(f"budget={budget!r}: give exactly one of {units}, as {{'depth': 12}}")
        return cls(*given[0])


@dataclass(frozen=True)
class BlockCosts:
    """What a model costs in one unit: a fixed part, and one per block that depends on how many layers wide it is."""

    fixed: float  # all but the blocks, such as embedding and head
    blocks: tuple[float, ...]  # a block 1, 2, ... layers wide

    def of(self, plan: LayerPlan) -> float:
        """What a model of this plan costs; of latency, seconds per generated token."""
        return self.fixed + sum(self.blocks[plan.width(block) - 1] for block in plan.blocks)


def count_parameters(model: PreTrainedModel) -> BlockCosts:
    """The parameters of any plan made of `model`'s layers. A block has one layer's norms, whatever its width."""
    blocks, num_layers = model.base_model.layers, len(plan_of(model).shape.layers)
    norms = sum(p.numel() for name, p in blocks[0].named_parameters() if "layernorm" in name)
    inside = sum(p.numel() for p in blocks.parameters())
    layer = (inside - len(blocks) * norms) // num_layers
    return BlockCosts(model.num_parameters() - inside, tuple(norms + layer * n for n in range(1, num_layers + 1)))


def measure_latency(
    model: PreTrainedModel,
    max_group_size: int = 2,
    prompt_tokens: int = 64,
    new_tokens: int = 32,
    repeats: int = 7,
) -> BlockCosts:
    """Time greedy `generate` of `model` whole, by half, and with blocks of each width; solve for the parts.

    Returns:
        [`BlockCosts`]: an estimate for any plan of blocks of up to `max_group_size` layers, in seconds per decoding
        step on the device and in the dtype of `model`. If the clock is too coarse, no part is below a hundredth of its
        neighbour.
    """
    layers, depth = plan_of(model).shape.layers, plan_of(model).num_teacher_layers
    settings = (prompt_tokens, new_tokens, 1, repeats)
    model = apply_plan(model, plan_of(model), share_weights=True)
    model.config.layer_plan = plan_of(model).shape.to_dict()  # a merged block takes the time of one layer

    def form(width: int, count: int) -> PreTrainedModel:
        blocks = tuple(tuple(layers[width * n : width * (n + 1)]) for n in range(count))
        return apply_plan(model, LayerPlan(blocks, depth), share_weights=True)

    half = max(1, len(layers) // 2)
    whole = form(1, len(layers))
    report, report_of_half = benchmark_models([whole, form(1, half)], *settings)
    total = 1 / report.decode_tokens_per_second
    by_half = total / report_of_half.decode_ratio
    single = (total - by_half) / (len(layers) - half) if len(layers) > half else total
    single = max(single, total / len(layers) / 100)  # where the clock is too coarse to tell
    fixed = max(0.0, total - len(layers) * single)
    blocks = [single]
    for width in range(2, min(max_group_size, len(layers)) + 1):
        count = min(len(layers) // width, MOST_BLOCKS)
        ratio = benchmark_models([whole, form(width, count)], *settings)[1].decode_ratio
        blocks.append(max((total / ratio - fixed) / count, blocks[-1] / 100))
    return BlockCosts(fixed, tuple(blocks))


@dataclass(frozen=True)
class EditSpace:
    """Which edits of a plan are allowed.

    Args:
        kinds (`Iterable[str]` or `str`, *optional*, defaults to `"remove,parallelize"`):
            Some of `"remove"`, `"parallelize"` and `"merge"`; a string is split at commas.
        max_group_size (`int`, *optional*, defaults to `2`): most layers in one block, in parallel or merged.
        protect_first, protect_last (`int`, *optional*, defaults to `0`):
            Number of first and last teacher layers that no edit touches.
    """

    kinds: Iterable[str] | str = DEFAULT_KINDS
    max_group_size: int = 2
    protect_first: int = 0
    protect_last: int = 0

    def __post_init__(self) -> None:
        kinds = self.kinds.split(",") if isinstance(self.kinds, str) else self.kinds
        kinds = tuple(str(kind).strip() for kind in kinds)
        if not kinds or not set(kinds) <= set(EDIT_KINDS):
            raise LayerPruneError(f"edits={','.join(kinds)!r}: choose one or more of {', '.join(EDIT_KINDS)}")
        numbers = {"max_group_size": self.max_group_size} if kinds != ("remove",) else {}
        numbers |= {"protect_first_layers": self.protect_first, "protect_last_layers": self.protect_last}
        check_at_least(numbers, {"max_group_size": 2, "protect_first_layers": 0, "protect_last_layers": 0})
        object.__setattr__(self, "kinds", kinds)

    def edits(self, plan: LayerPlan) -> list[Edit]:
        """Every allowed edit of `plan`."""
        edits = []
        if "remove" in self.kinds and len(plan.layers) > 1:
            edits += [Edit.remove(layer) for layer in plan.unmerged_layers if self._is_free((layer,), plan)]
        for blocks in zip(plan.blocks, plan.blocks[1:], strict=False):
            edits += [Edit(kind, sum(blocks, ())) for kind in self._joins(blocks, plan)]
        return edits

    def smallest(self, plan: LayerPlan, cost: Callable[[int], float] = lambda width: 1.0) -> LayerPlan:
        """The cheapest plan that edits can lead to, if a block `width` layers wide costs `cost(width)`.

        By default every block costs the same: the shallowest plan.
        """
        for edit in [edit for edit in self.edits(plan) if edit.kind == "remove"]:
            plan = edit.apply(plan) if len(plan.layers) > 1 else plan
        best: list[tuple[float, LayerPlan]] = [(0.0, plan)]  # the first n blocks joined
        for end in range(1, plan.depth + 1):
            options = []
            for start in range(end):
                blocks, (so_far, joined) = plan.blocks[start:end], best[start]
                if len(blocks) == 1:
                    options.append((so_far + cost(plan.width(blocks[0])), joined))
                    continue
                layers = sum(blocks, ())
                for kind in self._joins(blocks, plan):
                    width = 1 if kind == "merge" else len(layers)
                    options.append((so_far + cost(width), Edit(kind, layers).apply(joined)))
            best.append(min(options, key=lambda option: option[0]))
        return best[-1][1]

    def _is_free(self, layers: tuple[int, ...], plan: LayerPlan) -> bool:
        return self.protect_first <= layers[0] and layers[-1] < plan.num_teacher_layers - self.protect_last

    def _joins(self, blocks: Sequence[tuple[int, ...]], plan: LayerPlan) -> list[str]:
        """The kinds of edits that may make one block of neighbouring ones."""
        layers = sum(blocks, ())
        if len(layers) > self.max_group_size or not self._is_free(layers, plan):
            return []
        others = {"parallelize": set(plan.merged), "merge": set(plan.parallel_pairs)}  # which a kind cannot join
        return [kind for kind, wrong in others.items() if kind in self.kinds and wrong.isdisjoint(blocks)]


@dataclass(frozen=True)
class Goal:
    """Where a search ends: a budget, the edits that may lead there, and the size of any plan on the way."""

    budget: Budget
    space: EditSpace
    costs: BlockCosts  # in blocks, parameters or seconds
    original: LayerPlan  # what a share of latency refers to

    @classmethod
    def of(
        cls,
        budget: Budget,
        space: EditSpace,
        model: PreTrainedModel,
        original: LayerPlan,
        latency: BlockCosts | None = None,
    ) -> Goal:
        """Measure block latencies on `model` if the budget needs them and they are not given."""
        plan = plan_of(model)
        if budget.unit == "parameters":  # a parallel pair saves only those of one set of norms
            space = replace(space, kinds=[kind for kind in space.kinds if kind != "parallelize"] or space.kinds)
        if space.kinds != ("remove",):
            check_parallel(model.config)
        if budget.unit == "depth":
            return cls(budget, space, BlockCosts(0, (1,) * len(plan.layers)), original)
        if budget.unit == "parameters":
            return cls(budget, space, count_parameters(model), original)
        grown = min(space.max_group_size, len(plan.layers)) if "parallelize" in space.kinds else 1
        widest = max(grown, *(each.width(block) for each in (original, plan) for block in each.blocks))
        latency = measure_latency(model, widest) if latency is None else latency
        if len(latency.blocks) < widest:
            raise LayerPruneError(f"latency knows blocks of up to {len(latency.blocks)} layers, not of {widest}")
        return cls(budget, space, latency, original)

    @property
    def latency(self) -> BlockCosts | None:
        """What was measured for a budget of latency."""
        return self.costs if self.budget.unit == "latency" else None

    def size(self, plan: LayerPlan) -> float:
        """The plan in the budget's unit."""
        size = self.costs.of(plan)
        return size / self.costs.of(self.original) if self.budget.unit == "latency" else size

    def met(self, plan: LayerPlan) -> bool:
        return self.size(plan) <= self.budget.target

    def smallest(self, plan: LayerPlan) -> LayerPlan:
        """The plan of least size that edits can lead to from `plan`."""
        return self.space.smallest(plan, lambda width: self.costs.blocks[width - 1])

    def check_reachable(self, plan: LayerPlan, setting: str | None = None) -> None:
        """Raise [`LayerPruneError`] unless edits can lead from `plan` into the budget; `setting` names it."""
        if not self.met(smallest := self.smallest(plan)):
            raise LayerPruneError(
                f"{setting or self.budget.unit}={self.budget.target:g} is out of reach: "
                f"{' and '.join(self.space.kinds)} can go from {self.size(plan):.4g} to {self.size(smallest):.4g}; "
                f"allow another kind of edit, larger groups (max_group_size, now {self.space.max_group_size}) or "
                "protect fewer layers"
            )

    def useful_edits(self, plan: LayerPlan) -> list[Edit]:
        """Allowed edits that save something and leave the budget within reach; if there are none, steps to such edits.

        So a pair can lose both its layers, which saves a block, one by one.
        """
        edits = [edit for edit in self.space.edits(plan) if self.met(self.smallest(edit.apply(plan)))]
        return [edit for edit in edits if self.size(edit.apply(plan)) < self.size(plan)] or edits

    def savings(self, edits: Iterable[Edit], plan: LayerPlan) -> list[float]:
        """What each edit saves, in the budget's unit. What it saves beyond the budget does not count."""
        size = self.size(plan)
        return [size - max(self.size(edit.apply(plan)), self.budget.target) for edit in edits]
