"""Student and teacher on one batch: what they have in common is held once in memory and run once.

Below the lowest block in which they differ both are the same function of the same weights. The teacher runs that part,
without gradients, and the student goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data import Batch
from ..surgery import plan_of
from .targets import HiddenStateMap


@dataclass
class TowerStates:
    """What both models computed, at the valid positions only.

    Attributes:
        student_final, teacher_final (`Tensor` of shape `(N, H)`): states behind the final norm.
        student, teacher (`list[Tensor]`): `(N, H)` each, the pairs of a [`HiddenStateMap`]: states, or updates.
    """

    student_final: Tensor
    teacher_final: Tensor
    student: list[Tensor]
    teacher: list[Tensor]


def share_equal_weights(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Let every tensor of `student` that equals the teacher's, bit by bit, be the teacher's in memory."""
    theirs = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        other = theirs.get(_name_in_teacher(name, student, teacher))
        if other is not None and _like(parameter, other) and torch.equal(parameter.data, other.data):
            parameter.data = other.data


def _name_in_teacher(name: str, student: PreTrainedModel, teacher: PreTrainedModel) -> str | None:
    """What a parameter of the student is called in the teacher, if its block is there."""
    before, layers, rest = name.partition(".layers.")
    if not layers:
        return name
    position, _, inside = rest.partition(".")
    block, blocks = plan_of(student).blocks[int(position)], plan_of(teacher).blocks
    return f"{before}.layers.{blocks.index(block)}.{inside}" if block in blocks else None


def _like(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def why_nothing_is_shared(student: nn.Module, teacher: PreTrainedModel) -> str | None:
    """What keeps the teacher from running the first blocks for both models; `None` if nothing does.

    `student` may hold adapters.
    """
    student = student.get_base_model() if is_peft_model(student) else student
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

    `student` may hold adapters. `None` where both have to run in full, see [`why_nothing_is_shared`].
    """
    if why_nothing_is_shared(student, teacher) is not None:
        return None
    student = student.get_base_model() if is_peft_model(student) else student
    depth = 0
    layers = zip(student.base_model.layers, teacher.base_model.layers, strict=False)
    blocks = zip(plan_of(student).blocks, plan_of(teacher).blocks, strict=False)
    for (own, its), (block, other) in zip(layers, blocks, strict=True):
        if block != other or not _same(own, its):
            break
        depth += 1
    return min(depth, len(teacher.base_model.layers) - 1)


def _same(own: nn.Module, other: nn.Module) -> bool:
    mine, theirs = dict(own.named_parameters()), dict(other.named_parameters())
    return mine.keys() == theirs.keys() and all(
        not parameter.requires_grad and parameter.data_ptr() == theirs[name].data_ptr()
        for name, parameter in mine.items()
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
    """Run both models on a batch, the student with gradients.

    Args:
        student, teacher ([`~transformers.PreTrainedModel`]): without wrappers.
        inputs (`dict[str, Tensor]`): what both are called with; no labels.
        valid (`Tensor` of shape `(B, T)`): the N positions that count.
        states ([`HiddenStateMap`]): the hidden states to compare.
        shared (`int`, *optional*): see [`shared_depth`]; the student runs from its embedding on if there is none.
        updates (`bool`, *optional*, defaults to `False`): compare what blocks add to the residual stream.
    """
    inputs = inputs | {"use_cache": False}
    decoder, reference = student.base_model, teacher.base_model
    own = Recorder(decoder.layers, states.student, states.student if updates else ())
    its = Recorder(reference.layers, states.teacher, states.teacher_start if updates else ())
    with torch.no_grad(), its, captured_call(reference.layers, shared) as call:
        teacher_final = reference(**inputs).last_hidden_state
    with own:
        student_final = decoder(**inputs).last_hidden_state if shared is None else _run_from(decoder, shared, *call)
    return TowerStates(student_final[valid], teacher_final[valid], own.states(valid), its.states(valid))


def _run_from(decoder: PreTrainedModel, position: int, state: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The final state, from what the layer at `position` is called with."""
    for layer in decoder.layers[position:]:
        state = layer(state, **kwargs)
    return decoder.norm(state)


class Recorder:
    """Keeps what some layers hand on in one forward pass, or what they add: a context manager.

    Args:
        layers (`nn.ModuleList`): of a decoder.
        ends (`tuple[int, ...]`): positions whose outputs are kept.
        starts (`tuple[int, ...]`, *optional*): for each of them, the position whose input is taken off it.
    """

    def __init__(self, layers: nn.ModuleList, ends: tuple[int, ...], starts: tuple[int, ...] = ()) -> None:
        self.layers, self.ends, self.starts = layers, ends, starts
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> Recorder:
        for position in set(self.starts):
            self.handles.append(
                self.layers[position].register_forward_pre_hook(
                    lambda _, args, p=position: self.inputs.__setitem__(p, args[0])
                )
            )
        for position in set(self.ends):
            self.handles.append(
                self.layers[position].register_forward_hook(
                    lambda _, __, out, p=position: self.outputs.__setitem__(p, out)
                )
            )
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def states(self, valid: Tensor) -> list[Tensor]:
        """`(N, H)` each, at the valid positions."""
        kept = [self.outputs[position][valid] for position in self.ends]
        if not self.starts:
            return kept
        return [state - self.inputs[start][valid] for state, start in zip(kept, self.starts, strict=True)]


@contextmanager
def captured_call(layers: nn.ModuleList, position: int | None) -> Iterator[list[Any]]:
    """Collect the input state and the keyword arguments that the layer at `position`, if any, is called with."""
    call: list[Any] = []
    if position is None:
        yield call
        return
    handle = layers[position].register_forward_pre_hook(
        lambda _, args, kwargs: call.extend((args[0], kwargs)), with_kwargs=True
    )
    try:
        yield call
    finally:
        handle.remove()
