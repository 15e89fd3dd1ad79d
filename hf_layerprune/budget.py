"""How far a search goes, and what an edit saves on the way: in depth, in measured latency, in parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from .edits import Edit, EditSpace
from .errors import LayerPruneError
from .latency import BlockLatency, measure_latency
from .plan import LayerPlan
from .surgery import plan_of

TARGETS = {"depth": "target_num_layers", "latency": "target_latency", "parameters": "target_num_parameters"}
"""The unit of a budget, and the setting of a run that gives it."""


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
        if self.latency is not None and not (isinstance(self.latency, float) and 0 < self.latency < 1):
            raise LayerPruneError(f"latency={self.latency!r} is out of range; it is a share of the original's, 0..1")
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
class Gauge:
    """What a search may do and how far: measures plans against a budget.

    Attributes:
        budget ([`Budget`]): where to stop; its unit is the size of a plan.
        space ([`EditSpace`]): the edits that are allowed.
        sizes ([`ModelSizes`]): parameters of the model's parts.
        original ([`LayerPlan`]): the plan a share of latency refers to.
        latency ([`BlockLatency`], *optional*): needed for a budget of latency.
    """

    budget: Budget
    space: EditSpace
    sizes: ModelSizes
    original: LayerPlan
    latency: BlockLatency | None = None

    @classmethod
    def of(
        cls,
        budget: Budget,
        space: EditSpace,
        model: PreTrainedModel,
        original: LayerPlan,
        latency: BlockLatency | None = None,
    ) -> Gauge:
        """Measures block latencies on `model` if the budget needs them and they are not given.

        Raises:
            [`LayerPruneError`]: if the latencies that are given are not of all blocks there can be.
        """
        if budget.unit == "latency":
            plan = plan_of(model)
            grown = min(space.max_group_size, len(plan.layers)) if "parallelize" in space.kinds else 1
            widest = max(grown, *(len(block) for block in (*original.blocks, *plan.blocks)))
            latency = measure_latency(model, widest) if latency is None else latency
            if len(latency.blocks) < widest:
                raise LayerPruneError(f"latency knows blocks of up to {len(latency.blocks)} layers, not of {widest}")
        return cls(budget, space, ModelSizes.of(model), original, latency)

    def size(self, plan: LayerPlan) -> float:
        """The plan in the budget's unit."""
        if self.budget.unit == "depth":
            return plan.depth
        if self.budget.unit == "parameters":
            return self.sizes.of_plan(plan)
        return self.latency.of(plan) / self.latency.of(self.original)

    def met(self, plan: LayerPlan) -> bool:
        return self.size(plan) <= self.budget.target

    def smallest(self, plan: LayerPlan) -> LayerPlan:
        """The plan of least size that edits can lead to from `plan`."""
        if self.budget.unit == "latency":
            return self.space.smallest(plan, lambda width: self.latency.blocks[width - 1])
        if self.budget.unit == "parameters" and "remove" not in self.space.kinds:
            return plan  # running layers in parallel saves none to speak of
        return self.space.smallest(plan)

    def useful_edits(self, plan: LayerPlan) -> list[Edit]:
        """Allowed edits that save something and leave the budget within reach.

        Where none saves anything (a pair must lose both its layers to save a block), those that are steps to one that
        does.
        """
        size = self.size(plan)
        edits = [edit for edit in self.space.edits(plan) if self.met(self.smallest(edit.apply(plan)))]
        if self.budget.unit == "parameters":
            edits = [edit for edit in edits if edit.kind == "remove"]
        return [edit for edit in edits if self.size(edit.apply(plan)) < size] or edits

    def check_reachable(self, plan: LayerPlan, setting: str | None = None) -> None:
        """Raise [`LayerPruneError`] unless edits can lead from `plan` into the budget; `setting` names it."""
        setting, target, smallest = setting or self.budget.unit, self.budget.target, self.smallest(plan)
        if not self.met(smallest):
            raise LayerPruneError(
                f"{setting}={target:g} is out of reach: {' and '.join(self.space.kinds)} can go from "
                f"{self.size(plan):.4g} to {self.size(smallest):.4g}; allow another kind of edit, larger groups "
                f"(max_group_size, now {self.space.max_group_size}) or protect fewer layers"
            )

    def savings(self, edits: Iterable[Edit], plan: LayerPlan) -> list[float]:
        """What each edit saves, in the budget's unit. What it saves beyond the budget does not count."""
        size = self.size(plan)
        return [size - max(self.size(edit.apply(plan)), self.budget.target) for edit in edits]
