"""Which of a teacher's layers a student made elsewhere consists of, told by its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import LayerPruneError
from .plan import LayerPlan
from .surgery import plan_of, prune

CLEARLY_NEARER = 0.7
"""How far a layer may be from its teacher's, over how far the next nearest one is; unrelated layers are at 1."""
UNLIKE = 10.0  # the distance of layers of other shapes
NUMBERS_PER_TENSOR = 2**16  # that are compared, from all over it


def with_plan(student: PreTrainedModel, teacher: PreTrainedModel, plan: LayerPlan | None = None) -> PreTrainedModel:
    """A student whose config says which layers of `teacher` it holds: what it says itself, else `plan`, else found.

    Raises:
        [`LayerPruneError`]: if `plan` does not fit the student, or none is given and none can be found.
    """
    depth, recorded = student.config.num_hidden_layers, getattr(student.config, "layer_plan", None)
    if recorded is not None:
        if plan is not None and plan != plan_of(student):
            raise LayerPruneError(f"plan={plan.to_json()} is not that of the student's config.json; leave it out")
        return student
    if plan is None:
        if depth >= len(plan_of(teacher).layers):
            return student
        plan = find_plan(student, teacher)
    if plan.parallel_pairs or plan.depth != depth:
        raise LayerPruneError(
            f"plan has {plan.depth} blocks, {len(plan.layers)} layers; the student has {depth} layers"
        )
    student = prune(student, [], share_weights=True)
    student.config.layer_plan = plan.to_dict()
    return student


def find_plan(student: PreTrainedModel, teacher: PreTrainedModel) -> LayerPlan:
    """The plan by which every layer of `student` is nearest to its layer of `teacher`, in ascending order.

    Healing moves layers; they stay far nearer to what they were than to any other layer.

    Raises:
        [`LayerPruneError`]: if a layer is about as near to another one.
    """
    plan = plan_of(teacher)
    if plan.parallel_pairs:
        raise LayerPruneError("the teacher runs layers in parallel; say which layers the student holds with plan")
    teachers = _layers(teacher)
    distances = torch.tensor([[_distance(own, its) for its in teachers] for own in _layers(student)])
    chosen = _ascending(distances)
    for own, its in enumerate(chosen):
        others = distances[own].clone()
        others[its] = torch.inf
        other = int(others.argmin())
        if not distances[own, its] < CLEARLY_NEARER * others[other].clamp(max=1.0):
            raise LayerPruneError(
                f"layer {own} of the student is not clearly one of the teacher's: its weights differ from those of "
                f"layer {plan.layers[its]} by {distances[own, its]:.2f} of their size and from those of layer "
                f"{plan.layers[other]} by {others[other]:.2f}; say which layers it holds with --plan plan.json"
            )
    return LayerPlan(tuple((plan.layers[its],) for its in chosen), plan.num_teacher_layers)


def _layers(model: PreTrainedModel) -> list[list[Tensor]]:
    """Some weights of every matrix of each layer."""
    return [[_some(part) for part in layer.parameters() if part.dim() > 1] for layer in model.base_model.layers]


def _some(weights: nn.Parameter) -> Tensor:
    flat = weights.detach().flatten()
    return flat[:: max(1, len(flat) // NUMBERS_PER_TENSOR)].float().cpu()


def _distance(own: list[Tensor], its: list[Tensor]) -> float:
    """Mean over the matrices of the norm of the difference over that of the teacher's."""
    if [part.shape for part in own] != [part.shape for part in its]:
        return UNLIKE
    parts = [(float((a - b).norm()), float(b.norm())) for a, b in zip(own, its, strict=True)]
    return sum(difference / norm if norm else float(difference > 0) for difference, norm in parts) / len(parts)


def _ascending(distances: Tensor) -> list[int]:
    """Columns, one for each row, that ascend and have the least sum."""
    rows, columns = distances.shape
    totals = torch.full((rows, columns), torch.inf)  # of the best choice for rows up to here that ends in a column
    for row in range(rows):
        before = torch.zeros(columns) if row == 0 else torch.full((columns,), torch.inf)
        if row:
            before[1:] = totals[row - 1].cummin(0).values[:-1]
        totals[row] = before + distances[row]
    chosen: list[int] = []
    for row in reversed(range(rows)):
        end = chosen[0] if chosen else columns
        chosen.insert(0, int(totals[row, :end].argmin()))
    return chosen
