"""Score a model whose layers lie on disk or in CPU memory in one sweep through its weights.

While a layer is loaded, everything that has to pass it does: the states of the model as it is, and those of each
candidate that left out a layer before. So each weight is read once, not once per candidate and batch. The states of
all calibration tokens are held instead, for each candidate; if that is too much, candidates are split over several
sweeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import psutil
import torch
from accelerate.hooks import ModelHook
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data import Batch, valid_next_tokens
from ..errors import LayerPruneError
from ..forward import call_of_layer, to_device
from ..losses import token_statistics
from ..plan import LayerPlan
from ..surgery import plan_of
from .measure import TOKEN_MEASURES
from .scores import Evidence


def is_offloaded(model: PreTrainedModel) -> bool:
    """Whether accelerate loads weights of layers when they are called (`device_map` with disk or CPU)."""
    return any(getattr(hook, "offload", False) for _, hook in _hooks(model.base_model.layers))


def needs_memory(what: str) -> LayerPruneError:
    """The error to raise where only a model that is in memory as a whole can be scored."""
    return LayerPruneError(
        "a model on disk or in CPU memory is read once, for all the text at a time, to measure 'kl' or 'loss'; leave "
        f"out {what}, or load it into memory as a whole"
    )


def sweep(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    plans: Sequence[LayerPlan],
    criterion: str,
    teacher: PreTrainedModel,
    on_batch: Callable[[], None] = lambda: None,
    max_state_bytes: int | None = None,
) -> Evidence:
    """Measure plans that leave out blocks of `model` by `"kl"` or `"loss"`. Runs inside [`~forward.inference`].

    `max_state_bytes` bounds the states held at a time, by default half of the memory that is free where the layers
    compute; if those of all candidates are more, there are several sweeps.

    Raises:
        [`LayerPruneError`]: if a plan does more than leave out blocks, or layers compute on several devices.
    """
    current = plan_of(model).blocks
    if not all(set(plan.blocks) <= set(current) for plan in plans):
        raise LayerPruneError(
            "a model on disk or in CPU memory is scored layer by layer, which tells what removing a layer costs, not "
            "running layers in parallel; load it into memory as a whole"
        )
    removed = [frozenset(n for n, block in enumerate(current) if block not in plan.blocks) for plan in plans]
    batches = [batch for batch in batches if len(valid_next_tokens(batch)[1])]
    device = execution_device(model)
    max_state_bytes = _free_memory(device) // 2 if max_state_bytes is None else max_state_bytes
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    bytes_each = tokens * model.config.hidden_size * model.dtype.itemsize
    others = 1 + (criterion == "kl")  # the model as it is, and what all are compared with
    at_once = max(1, max_state_bytes // bytes_each - others)
    references = None
    if criterion == "kl" and teacher is not model:
        references = _final_states(teacher, batches, [frozenset()], execution_device(teacher))[0]
    evidence, collected = Evidence(1 + len(plans)), []
    for start in range(0, max(1, len(plans)), at_once):
        skips = [frozenset(), *removed[start : start + at_once]]
        states = _final_states(model, batches, skips, device)
        if criterion == "kl" and references is None:
            references = states[0]
        collected.append(_row_sums(model, teacher, batches, states, references, criterion))
        del states  # before those of the next sweep are made
    for number, batch in enumerate(batches):
        sums = torch.cat([collected[0][number][:1], *(part[number][1:] for part in collected)])
        evidence.add(0, range(1 + len(plans)), sums, valid_next_tokens(batch)[0].sum(1))
        on_batch()
    return evidence


def execution_device(model: PreTrainedModel) -> torch.device:
    """Where the layers of a model compute, wherever their weights lie.

    Raises:
        [`LayerPruneError`]: if that is more than one device.
    """
    named = (getattr(hook, "execution_device", None) for _, hook in _hooks(model.base_model.layers))
    devices = {torch.device(device) for device in named if device is not None}
    if len(devices) > 1:
        raise LayerPruneError(
            f"layers compute on {', '.join(sorted(map(str, devices)))}; load the model with a device_map that names "
            "one device next to 'disk' or 'cpu'"
        )
    return devices.pop() if devices else next(model.base_model.layers.parameters()).device


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _final_states(
    model: PreTrainedModel, batches: Sequence[Batch], skips: Sequence[frozenset[int]], device: torch.device
) -> list[list[Tensor]]:
    """Hidden states after the final norm, `(B, T, H)`, for each candidate (the positions it skips) and batch."""
    decoder = model.base_model
    with _held(decoder.embed_tokens):
        inputs = [layer_inputs(model, to_device(batch, device)) for batch in batches]
    shared = [state for state, _ in inputs]  # of the candidates that have skipped nothing yet
    arguments = [kwargs for _, kwargs in inputs]
    del inputs
    own: dict[int, list[Tensor]] = {}
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
    with _held(decoder.norm):
        for states in (shared, *own.values()):
            _advance(states, decoder.norm, [{}] * len(states))
    return [own.get(index, shared) for index in range(len(skips))]


def _advance(states: list[Tensor], module: nn.Module, arguments: Sequence[dict[str, Any]]) -> None:
    """Replace each state by what `module` makes of it; only one batch has an old and a new state at a time."""
    for number, kwargs in enumerate(arguments):
        states[number] = module(states[number], **kwargs)


def _row_sums(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Batch],
    states: Sequence[Sequence[Tensor]],
    references: Sequence[Tensor] | None,
    criterion: str,
) -> list[Tensor]:
    """Per batch the measure summed over each row's scored tokens: `(candidates, B)`, float64, on the CPU."""
    found = []
    with _held(model.lm_head), _held(teacher.lm_head) if teacher is not model else ExitStack():
        for number, batch in enumerate(batches):
            device = states[0][number].device
            valid, labels = valid_next_tokens(to_device(batch, device))
            reference = () if references is None else (references[number].to(device)[valid], teacher.lm_head)
            hidden = [of_candidate[number][valid] for of_candidate in states]
            rows = valid.nonzero()[:, 0].cpu()
            sums = torch.zeros(len(states), len(valid), dtype=torch.float64)
            for index, statistics in enumerate(token_statistics(hidden, model.lm_head, labels, *reference)):
                sums[index].index_add_(0, rows, getattr(statistics, TOKEN_MEASURES[criterion]).double().cpu())
            found.append(sums)
    return found


def layer_inputs(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
    """The input state `(B, T, H)` of the first layer, and the keyword arguments of every layer."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return call_of_layer(model.base_model, inputs | {"use_cache": False}, 0)


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
