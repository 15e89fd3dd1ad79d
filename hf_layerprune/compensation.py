"""Repair without training: refit the block before a gap so that its output matches the teacher's after the gap.

Where layers are removed, the next block reads states it has never seen. After
[ReplaceMe](https://huggingface.co/papers/2505.02819), the `down_proj` of the block before the gap is refitted by ridge
regression, so that this block hands on what the teacher had after the removed layers. No parameter is added. Before
the first block there is nothing to refit.

Shapes: B batch, T positions, N unpadded tokens, H hidden, I neurons of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architectures import architecture_of, mlp_output
from .data import Batch, check_batches
from .errors import LayerPruneError
from .forward import Recording, inference, record, to_device, unpadded
from .plan import LayerPlan, layer_indices
from .regression import Regression
from .surgery import apply_plan, check_made_from, plan_of

COMPENSATIONS = ("none", "least_squares")
DEFAULT_RIDGE = 5.0  # on the embedded teacher near the best at 4 and at 16 tokens per neuron; fewer help little
MAX_BYTES = 2**32  # of equations held at a time, but at least one block's; solving these takes four times their size


class Repair(NamedTuple):
    """New weights of one block, which make up for what an edit takes away."""

    position: int  # the same before and after the edit: of the block before a gap, or of the first of those merged
    tensors: dict[str, Tensor]  # by name within the block


def find_repairs(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    layers: Iterable[int],
    teacher: PreTrainedModel | None = None,
    ridge: float = DEFAULT_RIDGE,
) -> dict[int, Repair]:
    """For each of `layers` alone, which run in no parallel block, the repair that removing it from `model` needs.

    One pass over the data fits all of them, since no two change the same block. The first layer has no block before it
    and gets no repair. Arguments as in [`compensate`].
    """
    teacher = model if teacher is None else teacher
    plan, layers = plan_of(model), list(dict.fromkeys(layers))
    batches = check_repairable(model, batches, teacher, layers)
    gaps = {layer: _gap(layer, plan.remove(layer), plan_of(teacher)) for layer in layers}
    gaps = {layer: gap for layer, gap in gaps.items() if gap.position >= 0}
    return dict(zip(gaps, _refit(model, teacher, batches, list(gaps.values()), ridge), strict=True))


def apply_repair(student: PreTrainedModel, repair: Repair) -> None:
    """Repair `student`, the model after the edit, in place, but not what it shares weights with."""
    block = student.base_model.layers[repair.position]
    for name, tensor in repair.tensors.items():
        parameter = block.get_parameter(name)
        parameter.data = tensor.to(parameter, copy=True)
    torch.clear_autocast_cache()  # which may hold copies of the old ones


def apply_plan_and_repair(model: PreTrainedModel, plan: LayerPlan, repair: Repair | None) -> PreTrainedModel:
    """`model` after one edit that leads to `plan`, weights shared but for those that `repair` has."""
    current, before = plan_of(model), plan
    for block in set(plan.merged) - set(current.merged) if repair else ():
        first = current.blocks[repair.position]  # whose weights `repair` replaces
        blocks = tuple(first if other == block else other for other in plan.blocks)
        merged = tuple(other for other in (*plan.merged, first) if other in blocks and len(other) > 1)
        before = LayerPlan(blocks, plan.num_teacher_layers, merged)
    student = apply_plan(model, before, share_weights=True)
    if repair is not None:
        apply_repair(student, repair)
        student.config.layer_plan = plan.to_dict()
    return student


def compensate(
    student: PreTrainedModel,
    batches: Iterable[Batch],
    method: str,
    teacher: PreTrainedModel,
    gaps: Iterable[int] | None = None,
    ridge: float = DEFAULT_RIDGE,
    on_batch: Callable[[], None] = lambda: None,
    *,
    share_weights: bool = False,
) -> PreTrainedModel:
    """A new model: `student` with its gaps repaired, from the bottom up, so that each repair sees those below it.

    Args:
        student ([`~transformers.PreTrainedModel`]): a model that lacks some layers.
        batches (`Iterable[dict[str, Tensor]]`): calibration data, read once for each gap. Padding never counts.
        method (`str`): `"none"` or `"least_squares"`.
        teacher ([`~transformers.PreTrainedModel`]): the model with those layers, whose states are to be matched.
        gaps (`Iterable[int]`, *optional*):
            Removed teacher layers to repair `student` for; all by default. Neighbouring layers are one gap. If a gap
            lies within a parallel block, that block is refitted.
        ridge (`float`, *optional*, defaults to `5.0`):
            How firmly the present weights are held: as if `ridge` tokens of mean energy had found them right.
        on_batch (`Callable[[], None]`, *optional*): called after every batch of every gap, for progress bars.
        share_weights: see [`apply_plan`].

    Raises:
        [`LayerPruneError`]: for an unknown method, a layer that `student` has or `teacher` lacks, or data without a
            token.
    """
    plan = plan_of(student)
    layers = sorted(set(plan.removed_layers if gaps is None else layer_indices(gaps, "gaps")))
    if wrong := sorted(set(layers) - set(plan.removed_layers)):
        raise LayerPruneError(f"gaps={layers}: layers {wrong} are not missing; {list(plan.removed_layers)} are")
    check_method(method)
    batches = check_repairable(student, batches, teacher, layers)
    repaired = apply_plan(student, plan, share_weights=share_weights)
    if method == "least_squares":
        for gap in dict.fromkeys(_gap(layer, plan, plan_of(teacher)) for layer in layers):  # neighbours have one gap
            if gap.position >= 0:
                apply_repair(repaired, *_refit(repaired, teacher, batches, [gap], ridge, on_batch))
    return repaired


def check_method(method: str) -> None:
    """Raise [`LayerPruneError`] unless there is this compensation."""
    if method not in COMPENSATIONS:
        raise LayerPruneError(f"compensation={method!r} is unknown; choose one of {', '.join(COMPENSATIONS)}")


def check_repairable(
    model: PreTrainedModel, batches: Iterable[Batch], teacher: PreTrainedModel, layers: Sequence[int]
) -> list[Batch]:
    """The batches, once `model` is known to be made from `teacher`, which has `layers`, and both to be in memory."""
    check_made_from(model, teacher)
    if unknown := sorted(set(layers) - set(plan_of(teacher).layers)):
        raise LayerPruneError(f"layers {unknown} are not in the teacher; it has {list(plan_of(teacher).layers)}")
    return check_batches(batches, model.config.vocab_size, "calibration data")


class _Gap(NamedTuple):
    """Where removed neighbouring layers were."""

    position: int  # of the block before them
    target: int  # number of the teacher's state which that block must hand on


def _gap(layer: int, plan: LayerPlan, teacher_plan: LayerPlan) -> _Gap:
    """The gap in `plan`, which lacks `layer`; its position is -1 where no block is before it."""
    position = sum(block[0] < layer for block in plan.blocks) - 1
    return _Gap(position, target_state(position, plan, teacher_plan))


def target_state(position: int, plan: LayerPlan, teacher_plan: LayerPlan) -> int:
    """The number of the teacher's state which block `position` of `plan` must hand on: what the next block reads."""
    following = plan.blocks[position + 1][0] if position + 1 < plan.depth else plan.num_teacher_layers
    return sum(block[-1] < following for block in teacher_plan.blocks)


def _refit(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Batch],
    gaps: Sequence[_Gap],
    ridge: float,
    on_batch: Callable[[], None] = lambda: None,
) -> list[Repair]:
    """The repairs of gaps with different blocks before them; `model` may have the removed layers or lack them.

    If the equations of all gaps take more than `MAX_BYTES`, the data is read several times.
    """
    num_tokens = sum(int(unpadded(batch).sum()) for batch in batches)
    name = f"{architecture_of(model.config).mlp_output}.weight"
    inner = {gap.position: mlp_output(model, gap.position) for gap in gaps}
    weights = {position: module.weight.detach() for position, module in inner.items()}
    num_bytes = (Regression.num_bytes(weight, num_tokens) for weight in weights.values())
    at_once = max(1, MAX_BYTES // max(num_bytes, default=1))
    repairs = []
    for start in range(0, len(gaps), at_once):
        fits = {gap: Regression(weights[gap.position], num_tokens) for gap in gaps[start : start + at_once]}
        modules = {gap.position: inner[gap.position] for gap in fits}
        outputs, targets = {position + 1 for position in modules}, {gap.target for gap in fits}
        for batch in batches:
            run, wanted = run_both(model, teacher, batch, outputs, targets, modules)
            valid = unpadded(batch).to(model.device)
            for gap, fit in fits.items():
                missing = wanted[gap.target][valid].float() - run.states[gap.position + 1][valid].float()
                fit.add(run.inner[gap.position][valid].float(), missing)
            if start + at_once >= len(gaps):
                on_batch()
        repairs += [Repair(gap.position, {name: fit.solve(ridge)}) for gap, fit in fits.items()]
    return repairs


def run_both(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: Batch,
    states: Collection[int],
    targets: Collection[int],
    inner: Mapping[int, nn.Module] | None = None,
) -> tuple[Recording, dict[int, Tensor]]:
    """Record `states` of `model`, and the states `targets` of its teacher, which then are on the device of `model`."""
    batch = to_device(batch, model.device)
    with inference(model, teacher):
        if teacher is model:
            run = record(model, batch, {*states, *targets}, inner, stop=True)
            return run, run.states
        run = record(model, batch, states, inner, stop=True)
        found = record(teacher, to_device(batch, teacher.device), targets, stop=True).states
    return run, to_device(found, model.device)
