"""Infer from weights which teacher layers a student holds."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .errors import LayerPruneError
from .plan import LayerPlan
from .surgery import plan_of, prune

CLEARLY_NEARER = 0.7
"""Largest distance to the nearest layer of the teacher, as a share of that to the next; unrelated layers are at 1."""
NUMBERS_PER_TENSOR = 2**16  # that are compared, from all over it


def with_plan(student: PreTrainedModel, teacher: PreTrainedModel, plan: LayerPlan | None = None) -> PreTrainedModel:
    """A student whose config says which layers of `teacher` it holds: its own plan, else `plan`, else the one found.

    Raises:
        [`LayerPruneError`]: if `plan` does not fit the student, or none is given and none can be found.
    """
    depth = student.config.num_hidden_layers
    if getattr(student.config, "layer_plan", None) is not None:
        if plan not in (None, plan_of(student)):
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
    plan, last = plan_of(teacher), -1
    if plan.depth < len(plan.layers):
        raise LayerPruneError(
            "the teacher has blocks of several layers; say which layers the student holds with --plan plan.json"
        )
    teacher_samples, layers = _samples(teacher), []
    for number, sample in enumerate(_samples(student)):
        distances = torch.stack([_distance(sample, other) for other in teacher_samples])
        (nearest, second), order = distances.topk(2, largest=False)
        if not nearest < CLEARLY_NEARER * second.clamp(max=1) or order[0] <= last:
            raise LayerPruneError(
                f"layer {number} of the student is not clearly one of the teacher's: its weights differ by "
                f"{nearest:.2f} of their size from layer {plan.layers[order[0]]} and by {second:.2f} from layer "
                f"{plan.layers[order[1]]}; say which layers it holds with --plan plan.json"
            )
        last = int(order[0])
        layers.append(plan.layers[last])
    return LayerPlan(tuple((layer,) for layer in layers), plan.num_teacher_layers)


def _samples(model: PreTrainedModel) -> list[list[Tensor]]:
    """Some weights of every matrix of each layer."""
    layers = (
        [part.detach().flatten() for part in layer.parameters() if part.dim() > 1] for layer in model.base_model.layers
    )
    return [[part[:: max(1, len(part) // NUMBERS_PER_TENSOR)].float().cpu() for part in parts] for parts in layers]


def _distance(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean over the matrices of the norm of the difference over that of the teacher's."""
    if [part.shape for part in student] != [part.shape for part in teacher]:
        return torch.tensor(torch.inf)
    parts = [((a - b).norm(), b.norm()) for a, b in zip(student, teacher, strict=True)]
    return torch.stack([difference / norm if norm else (difference > 0).float() for difference, norm in parts]).mean()
