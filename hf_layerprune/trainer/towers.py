"""Run student and teacher on one batch; what they have in common is held once in memory and runs once.

Below the lowest block in which they differ, both are the same function of the same weights. The teacher runs that
part, without gradients, and the student continues from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data import Batch
from ..forward import Recording, record, replay
from ..losses import TowerStates
from ..surgery import plan_of
from .targets import HiddenStateMap


def without_adapters(student: nn.Module) -> PreTrainedModel:
    """The model that adapters were put on; a plain model as it is."""
    return student.get_base_model() if is_peft_model(student) else student


def why_nothing_is_shared(student: nn.Module, teacher: PreTrainedModel) -> str | None:
    """Why the teacher cannot run the first blocks for both models; `None` if it can. `student` may hold adapters."""
    student = without_adapters(student)
    if student.config.attention_dropout:
        return f"attention_dropout={student.config.attention_dropout} drops other weights in each of them"
    if not _same(student.get_input_embeddings(), teacher.get_input_embeddings()):
        return "the embedding is trained, or another one"
    own, its = student.config._attn_implementation, teacher.config._attn_implementation
    if own != its:  # each has masks of its own form
        return f"the student computes attention by {own}, the teacher by {its}"
    return None


def shared_depth(student: nn.Module, teacher: PreTrainedModel) -> int | None:
    """How many blocks, from the first, are the same weights in memory in both models and are not trained.

    `student` may hold adapters. `None` if both must run in full, see [`why_nothing_is_shared`].
    """
    if why_nothing_is_shared(student, teacher) is not None:
        return None
    student = without_adapters(student)
    own_blocks = zip(plan_of(student).blocks, student.base_model.layers, strict=True)
    its_blocks = zip(plan_of(teacher).blocks, teacher.base_model.layers, strict=True)
    depth = 0
    for (own, module), (its, of_teacher) in zip(own_blocks, its_blocks, strict=False):
        if own != its or not _same(module, of_teacher):
            break
        depth += 1
    return min(depth, len(teacher.base_model.layers) - 1)


def _same(module: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are the same weights in memory, which are not trained."""
    own, its = list(module.parameters()), list(other.parameters())
    return len(own) == len(its) and not any(
        a.requires_grad or a.data_ptr() != b.data_ptr() for a, b in zip(own, its, strict=True)
    )


def run_towers(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    inputs: Batch,
    valid: Tensor,
    states: HiddenStateMap,
    shared: int | None,
    updates: bool = False,
) -> TowerStates:
    """Run both models, without wrappers, on a batch; the student with gradients.

    Args:
        inputs (`dict[str, Tensor]`): what both are called with; labels are left out.
        valid (`Tensor` of shape `(B, T)`): the N positions that count.
        states ([`HiddenStateMap`]): the hidden states to compare.
        shared (`int`, *optional*): see [`shared_depth`]; without it the student runs from its embedding on.
        updates (`bool`, *optional*, defaults to `False`): compare what blocks add to the residual stream.
    """
    own_starts, its_starts = (states.student, states.teacher_start) if updates else ((), ())
    own_numbers = {*own_starts, *(position + 1 for position in states.student)}
    its_numbers = {*its_starts, *(position + 1 for position in states.teacher)}
    with torch.no_grad():
        its = record(teacher, inputs, its_numbers if shared is None else its_numbers | {shared})
    if shared is None:
        own = record(student, inputs, own_numbers)
    else:
        decoder = student.base_model
        own = replay(its, shared, decoder.layers[shared:], decoder.norm, own_numbers)
    return TowerStates(
        own.final[valid],
        its.final[valid],
        _compared(own, states.student, own_starts, valid),
        _compared(its, states.teacher, its_starts, valid),
    )


def _compared(recording: Recording, ends: Sequence[int], starts: Sequence[int], valid: Tensor) -> list[Tensor]:
    """`(N, H)` each: what the blocks at `ends` hand on, less what those at `starts` read, if there are any."""
    handed_on = [recording.states[position + 1][valid] for position in ends]
    if not starts:
        return handed_on
    return [state - recording.states[start][valid] for state, start in zip(handed_on, starts, strict=True)]
