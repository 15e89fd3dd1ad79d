"""Measure removals from a model whose layers lie on disk or in CPU memory in one sweep through its weights.

While a layer is loaded, everything that has to pass it does: the states of the model as it is, and those of each
candidate that left out a layer before. So each weight is read once, not once per candidate and batch. The states of
all calibration tokens are held instead, for each candidate; if that is too much, candidates are split over several
sweeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate.hooks import ModelHook
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data import Batch
from ..forward import advance, record, to_device
from ..plan import LayerPlan
from ..surgery import plan_of
from ..tasks.evaluation import sums_by_row


def is_offloaded(model: PreTrainedModel) -> bool:
    """Whether accelerate loads weights of layers when they are called (`device_map` with disk or CPU)."""
    return any(getattr(hook, "offload", False) for _, hook in _hooks(model.base_model.layers))


def sweep(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    plans: Sequence[LayerPlan],
    statistic: str,
    teacher: PreTrainedModel,
    max_state_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Measure `model`, and plans that leave out blocks of it, on all batches at once: sums `(1 + plans, R)` over each
    row, and its tokens, `(R,)`. Runs inside [`~forward.inference`].

    If the states of all candidates take more than `max_state_bytes`, there are several sweeps.
    """
    current = plan_of(model).blocks
    batches = [to_device(batch, model.device) for batch in batches]
    removed = [frozenset(n for n, block in enumerate(current) if block not in plan.blocks) for plan in plans]
    bytes_each = sum(batch["input_ids"].numel() for batch in batches) * model.config.hidden_size * model.dtype.itemsize
    at_once = max(1, max_state_bytes // bytes_each - 2)  # next to the model as it is, and what all are compared with
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
                    advance(states, layer, arguments)
            if len(own) < len(skips):
                advance(shared, layer, arguments)
    for states in (shared, *own.values()):
        advance(states, decoder.norm, [{}] * len(states))
    return [own.get(index, shared) for index in range(len(skips))]


def _hooks(module: nn.Module) -> Iterator[tuple[nn.Module, ModelHook]]:
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        if isinstance(hook, ModelHook):
            yield part, hook


@contextmanager
def _held(module: nn.Module) -> Iterator[None]:
    """Load what accelerate would load at every call, once, and let it go in the end."""
    hooks = list(_hooks(module))
    forwards = [part.forward for part, _ in hooks]
    try:
        for part, hook in hooks:
            hook.pre_forward(part)
            part.forward = part._old_forward
        yield
    finally:
        for (part, hook), forward in zip(hooks, forwards, strict=True):
            part.forward = forward
            hook.post_forward(part, None)
