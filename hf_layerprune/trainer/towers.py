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
from ..forward import record, replay
from ..losses import TowerStates
from ..plan import LayerPlan
from ..surgery import plan_of


def compared_states(plan: LayerPlan, teacher_plan: LayerPlan, blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of student and teacher hidden states to compare, by the positions of the blocks that output them.

    What a student's block hands on is compared with what the next layer reads in the teacher. After a gap that is the
    state after the removed layers, since the block before the gap now does their work too; after a pair it is the
    state after the pair's second layer. The last block's output is left out: that is the final state.
    """
    compared = []
    for position in blocks:
        if position < plan.depth - 1:
            last, reader = plan.blocks[position][-1], teacher_plan.position_of(plan.blocks[position + 1][0])
            if teacher_plan.position_of(last) != reader:  # else the teacher has no state between them
                compared.append((position, reader - 1))
    return compared


def without_adapters(student: nn.Module) -> PreTrainedModel:
    """The model that adapters were put on; a plain model as it is."""
    return student.get_base_model() if is_peft_model(student) else student


def shared_depth(student: nn.Module, teacher: PreTrainedModel) -> int | None:
    """How many blocks, from the first, are the same weights in memory in both models and are not trained.

    `student` may hold adapters. `None` if both must run in full: they differ in the embedding or in how attention is
    computed (each kind has its own masks), or dropout drops other weights in each of them.
    """
    student = without_adapters(student)
    same_attention = student.config._attn_implementation == teacher.config._attn_implementation
    same_start = _same(student.get_input_embeddings(), teacher.get_input_embeddings())
    if student.config.attention_dropout or not same_attention or not same_start:
        return None
    student_blocks = zip(plan_of(student).blocks, student.base_model.layers, strict=True)
    teacher_blocks = zip(plan_of(teacher).blocks, teacher.base_model.layers, strict=True)
    depth = 0
    for (block, module), (teacher_block, teacher_module) in zip(student_blocks, teacher_blocks, strict=False):
        if block != teacher_block or not _same(module, teacher_module):
            break
        depth += 1
    return min(depth, len(teacher.base_model.layers) - 1)


def _same(module: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are the same weights in memory, which are not trained."""
    ours, theirs = list(module.parameters()), list(other.parameters())
    return len(ours) == len(theirs) and not any(
        a.requires_grad or a.data_ptr() != b.data_ptr() for a, b in zip(ours, theirs, strict=True)
    )


def run_towers(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    inputs: Batch,
    valid: Tensor,
    compared: Sequence[tuple[int, int]],
    shared: int | None,
) -> TowerStates:
    """Run both models, without wrappers, on a batch; the student with gradients.

    Args:
        inputs (`dict[str, Tensor]`): what both are called with; labels are left out.
        valid (`Tensor` of shape `(B, T)`): the N positions that count.
        compared (`Sequence[tuple[int, int]]`): the hidden states to compare, see [`compared_states`].
        shared (`int`, *optional*): see [`shared_depth`]; without it the student runs from its embedding on.
    """
    student_numbers = {position + 1 for position, _ in compared}
    teacher_numbers = {position + 1 for _, position in compared}
    with torch.no_grad():
        of_teacher = record(teacher, inputs, teacher_numbers if shared is None else teacher_numbers | {shared})
    if shared is None:
        of_student = record(student, inputs, student_numbers)
    else:
        decoder = student.base_model
        of_student = replay(of_teacher, shared, decoder.layers[shared:], decoder.norm, student_numbers)
    return TowerStates(
        of_student.final[valid],
        of_teacher.final[valid],
        [of_student.states[position + 1][valid] for position, _ in compared],
        [of_teacher.states[position + 1][valid] for _, position in compared],
    )
