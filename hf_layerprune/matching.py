"""Find out from its weights which of a teacher's layers a student made elsewhere consists of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import LayerPruneError
from .plan import LayerPlan
from .surgery import plan_of, prune

CLEARLY_NEARER = 0.7
"""Largest distance to the nearest layer of the teacher, as a share of that to the next; unrelated layers are at 1."""
UNLIKE = 10.0  # the distance of layers of other shapes
NUMBERS_PER_TENSOR = 2**16  # that are compared, from all over it


def with_plan(student: PreTrainedModel, teacher: PreTrainedModel, plan: LayerPlan | None = None) -> PreTrainedModel:
    """A student whose config says which layers of `teacher` it holds: its own plan, else `plan`, else the one found.

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
    """The plan that gives every layer of `student` the nearest layer of `teacher`; they must ascend.

    Healing moves layers; they stay far nearer to what they were than to any other layer.

    Raises:
        [`LayerPruneError`]: if a layer is about as near to another one, or the layers do not ascend.
    """
    plan = plan_of(teacher)
    if plan.parallel_pairs:
        raise LayerPruneError("the teacher runs layers in parallel; say which layers the student holds with plan")
    teachers, chosen = _layers(teacher), []
    for number, own in enumerate(_layers(student)):
        distances = torch.tensor([_distance(own, its) for its in teachers])
        order = distances.argsort().tolist()
        nearest, next_one = (float(distances[index]) for index in order[:2])
        if not nearest < CLEARLY_NEARER * min(next_one, 1.0) or any(order[0] <= before for before in chosen):
            raise LayerPruneError(
                f"layer {number} of the student is not clearly one of the teacher's: its weights differ by "
                f"{nearest:.2f} of their size from layer {plan.layers[order[0]]} and by {next_one:.2f} from layer "
                f"{plan.layers[order[1]]}; say which layers it holds with --plan plan.json"
            )
        chosen.append(order[0])
    return LayerPlan(tuple((plan.layers[index],) for index in chosen), plan.num_teacher_layers)


def _layers(model: PreTrainedModel) -> list[list[Tensor]]:
    """Some weights of every matrix of each layer."""

    def some(weights: nn.Parameter) -> Tensor:
        flat = weights.detach().flatten()
        return flat[:: max(1, len(flat) // NUMBERS_PER_TENSOR)].float().cpu()

    return [[some(part) for part in layer.parameters() if part.dim() > 1] for layer in model.base_model.layers]


def _distance(own: list[Tensor], its: list[Tensor]) -> float:
    """Mean over the matrices of the norm of the difference over that of the teacher's."""
    if [part.shape for part in own] != [part.shape for part in its]:
        return UNLIKE
    parts = [(float((a - b).norm()), float(b.norm())) for a, b in zip(own, its, strict=True)]
    return sum(difference / norm if norm else float(difference > 0) for difference, norm in parts) / len(parts)
