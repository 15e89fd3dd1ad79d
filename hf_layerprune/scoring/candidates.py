"""What a model's outputs become under each of several other plans, by measurement.

A plan that leaves out layer i, or runs i next to i+1, changes the states from layer i on only. So the model runs once
per batch, its states are kept, and each candidate runs from its first change on: leaving out every layer in turn takes
L(L-1)/2 + L layer passes instead of L(L-1) + L, with the same numbers.

A model whose layers are on disk or in CPU memory is measured in one sweep through its weights: while a layer is
loaded, every candidate and batch passes it. The states of all calibration tokens are held instead, for each candidate;
if that is too much, candidates are split over several sweeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..compensation import Repair, apply_plan_and_repair
from ..data import Batch, split_rows
from ..evaluation import distinct_rows, sums_by_row
from ..forward import record, replay, to_device
from ..plan import LayerPlan
from ..surgery import apply_plan, plan_of
from ..tasks.chunks import Chunk, ModelChunk

MAX_STATE_BYTES = 4 * 2**30  # of hidden states held at a time; rows beyond it run one after the other

Block = Callable[..., Tensor]
"""What runs as a block: a state `(B, T, H)` and keyword arguments to the next state."""


def changed_part(
    model: PreTrainedModel, plan: LayerPlan, repair: Repair | None, separate: Callable[[], Mapping[int, nn.Module]]
) -> tuple[int, list[Block]]:
    """The position of the first block where `model` and `plan` differ, and what runs from there on by the plan.

    `repair` has weights for the block before the first change, or of the block that layers are merged into; `separate`
    gives layers that are inside parallel blocks of `model`.
    """
    current, layers = plan_of(model).blocks, model.base_model.layers
    start = 0
    while start < min(len(current), plan.depth) and current[start] == plan.blocks[start]:
        start += 1
    blocks: list[Block] = []
    for block in plan.blocks[start:]:
        inside = [index for index, other in enumerate(current) if set(other) <= set(block)]
        whole = [layer for index in inside for layer in current[index]]
        parts = [separate()[layer] for layer in block if layer not in whole]  # of a larger block that loses layers
        blocks.append(partial(run_parallel, [layers[index] for index in inside] + parts))
    if repair is not None:
        if repair.position == start:
            del blocks[0]  # the layers are not in parallel, but merged
        start = repair.position
        blocks.insert(0, partial(_run_with, repair.tensors, layers[start]))
    return start, blocks


def run_parallel(layers: list[nn.Module], state: Tensor, **kwargs: Any) -> Tensor:
    """Run decoder layers on one input and add their outputs, after https://huggingface.co/papers/2502.02790"""
    if len(layers) == 1:
        return layers[0](state, **kwargs)
    state = state + sum(layer.self_attn(layer.input_layernorm(state), **kwargs)[0] for layer in layers)
    return state + sum(layer.mlp(layer.post_attention_layernorm(state)) for layer in layers)


def _run_with(weights: Mapping[str, Tensor], layer: nn.Module, state: Tensor, **kwargs: Any) -> Tensor:
    return functional_call(layer, weights, (state,), kwargs)


def separate_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Every teacher layer of `model` that is not merged, on its own; those inside parallel blocks are copies."""
    plan = plan_of(model)
    parts = ([block] if block in plan.merged else [(layer,) for layer in block] for block in plan.blocks)
    singles = replace(plan, blocks=tuple(block for part in parts for block in part))
    layers = apply_plan(model, singles, share_weights=True).base_model.layers
    return {block[0]: layer for block, layer in zip(singles.blocks, layers, strict=True) if len(block) == 1}


@dataclass
class CandidateRuns:
    """Runs a model as it is, index 0, and by other plans made of its layers, index 1, 2, ..., inside `inference`.

    `repairs` maps, for each fold of the data, a plan to its repair or to its merged layer.
    """

    model: PreTrainedModel
    plans: Sequence[LayerPlan]
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    repairs: Sequence[Mapping[LayerPlan, Repair]]

    def __post_init__(self) -> None:
        separate = cache(lambda: separate_layers(self.model))
        self.parts = [
            [changed_part(self.model, plan, of_fold.get(plan), separate) for plan in self.plans]
            for of_fold in self.repairs
        ]

    def measure(self, data: Chunk, statistic: str, fold: int, which: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Measure the model, and the candidates `which`, on a chunk of text or of a task; see [`~race.Measure`].

        `statistic` is the one of [`~losses.token_statistics`] to sum over each row's scored tokens.
        """
        if isinstance(data, ModelChunk):
            return data.reduce([self.model, *map(self.student, which)], self.tokenizer)
        bytes_of_row = self.model.dtype.itemsize * self.model.config.hidden_size * data.batch["input_ids"].shape[1]
        states_of_row = len(self.model.base_model.layers) + 1 + len(which)
        found = []
        for part in split_rows(data.batch, max(1, MAX_STATE_BYTES // (bytes_of_row * states_of_row))):
            rows, places = distinct_rows(part)
            rows, part = (to_device(each, self.model.device) for each in (rows, part))
            states = (state[places] for state in self.final_states(rows, which, fold))
            found.append(sums_by_row(self.model, states, part, statistic, self.teacher))
        sums, counts = zip(*found, strict=True)
        return data.reduce(torch.cat(sums, dim=1), torch.cat(counts))

    def final_states(self, batch: Batch, which: Sequence[int], fold: int = 0) -> Iterator[Tensor]:
        """Hidden states after the final norm, `(B, T, H)`, of the model as it is, then of each candidate in turn."""
        decoder = self.model.base_model
        run = record(self.model, batch, range(len(decoder.layers) + 1))
        yield run.final
        for index in which:
            start, blocks = self.parts[fold][index - 1]
            yield replay(run, start, blocks, decoder.norm).final

    def student(self, index: int) -> PreTrainedModel:
        """A candidate as a model of its own; it shares the weights that do not change."""
        plan = self.plans[index - 1]
        return apply_plan_and_repair(self.model, plan, self.repairs[0].get(plan)).eval()


def sweep(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    plans: Sequence[LayerPlan],
    statistic: str,
    teacher: PreTrainedModel,
) -> tuple[Tensor, Tensor]:
    """Measure `model`, and plans that leave out blocks of it, on all batches at once; see [`~race.Measure`].

    If the states of all candidates take more than `MAX_STATE_BYTES`, there are several sweeps.
    """
    current = plan_of(model).blocks
    batches = [to_device(batch, model.device) for batch in batches]
    removed = [frozenset(n for n, block in enumerate(current) if block not in plan.blocks) for plan in plans]
    bytes_each = sum(batch["input_ids"].numel() for batch in batches) * model.config.hidden_size * model.dtype.itemsize
    at_once = max(1, MAX_STATE_BYTES // bytes_each - 2)  # next to the model as it is, and what all are compared with
    found = []
    for start in range(0, len(plans), at_once):
        states = _final_states(model, batches, [frozenset(), *removed[start : start + at_once]])
        pairs = zip(zip(*states, strict=True), batches, strict=True)
        measured = [sums_by_row(model, each, batch, statistic, teacher) for each, batch in pairs]
        sums, counts = (torch.cat(parts, dim=-1) for parts in zip(*measured, strict=True))
        found.append(sums if not found else sums[1:])
        del states, pairs, measured  # before those of the next sweep are made
    return torch.cat(found), counts


def _final_states(
    model: PreTrainedModel, batches: Sequence[Batch], skips: Sequence[frozenset[int]]
) -> list[list[Tensor]]:
    """Hidden states after the final norm, `(B, T, H)`, for each candidate (the positions it skips) and batch."""
    decoder, shared, arguments = model.base_model, [], []
    for batch in batches:
        call = record(model, batch, [0], stop=True)
        shared.append(call.states[0])
        arguments.append(call.arguments[0])
    own: dict[int, list[Tensor]] = {}  # of the candidates that have skipped something; the others share theirs
    for position, layer in enumerate(decoder.layers):
        for index, skipped in enumerate(skips):
            if position in skipped and index not in own:
                own[index] = list(shared)
        with _held(layer):
            for index, states in own.items():
                if position not in skips[index]:
                    _advance(states, layer, arguments)
            if len(own) < len(skips):
                _advance(shared, layer, arguments)
    for states in (shared, *own.values()):
        _advance(states, decoder.norm, [{}] * len(states))
    return [own.get(index, shared) for index in range(len(skips))]


def _advance(states: list[Tensor], module: nn.Module, arguments: Sequence[dict[str, Any]]) -> None:
    """Replace the state of each batch by what `module` makes of it; only one batch has both at a time."""
    for number, kwargs in enumerate(arguments):
        states[number] = module(states[number], **kwargs)


@contextmanager
def _held(module: nn.Module) -> Iterator[None]:
    """Load what accelerate would load at every call, once, and let it go in the end."""
    parts = [part for part in module.modules() if hasattr(part, "_hf_hook")]
    forwards = [part.forward for part in parts]
    try:
        for part in parts:
            part._hf_hook.pre_forward(part)
            part.forward = part._old_forward
        yield
    finally:
        for part, forward in zip(parts, forwards, strict=True):
            part.forward = forward
            part._hf_hook.post_forward(part, None)
