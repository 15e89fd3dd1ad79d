"""Run student and teacher on one batch; what they have in common is held once in memory and runs once.

Below the lowest block in which they differ, both are the same function of the same weights. The teacher runs that
part, without gradients, and the student continues from there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data import Batch
from ..forward import record, replay
from ..losses import TowerStates
from ..plan import LayerPlan
from ..surgery import plan_of


@dataclass(frozen=True)
class HiddenStateMap:
    """Which hidden states are compared: what a block hands on, with what the next layer reads in the teacher.

    After a gap that is the state after the removed layers, since the block before the gap now does their work too;
    after a pair it is the state after the pair's second layer.

    Attributes:
        student (`tuple[int, ...]`): positions of blocks in the student.
        teacher (`tuple[int, ...]`): positions in the teacher of the layers whose outputs theirs are compared with.
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]

    @classmethod
    def of(cls, plan: LayerPlan, teacher_plan: LayerPlan, blocks: list[int]) -> HiddenStateMap:
        """Compare the outputs of `blocks` (positions in `plan`), but not the last one's: that is the final state."""
        compared = []
        for position in blocks:
            if position < plan.depth - 1:
                last, reader = plan.blocks[position][-1], teacher_plan.block_of(plan.blocks[position + 1][0])
                if teacher_plan.block_of(last) != reader:  # else the teacher has no state between them
                    compared.append((position, reader - 1))
        return cls(*zip(*compared, strict=True)) if compared else cls((), ())


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
) -> TowerStates:
    """Run both models, without wrappers, on a batch; the student with gradients.

    Args:
        inputs (`dict[str, Tensor]`): what both are called with; labels are left out.
        valid (`Tensor` of shape `(B, T)`): the N positions that count.
        states ([`HiddenStateMap`]): the hidden states to compare.
        shared (`int`, *optional*): see [`shared_depth`]; without it the student runs from its embedding on.
    """
    own_numbers = {position + 1 for position in states.student}
    its_numbers = {position + 1 for position in states.teacher}
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
        [own.states[position + 1][valid] for position in states.student],
        [its.states[position + 1][valid] for position in states.teacher],
    )
