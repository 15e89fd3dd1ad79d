"""Leave-one-out by measurement: what the model's outputs lose without each layer in turn.

Leaving out layer i feeds layer i+1 with the state the full model had before layer i. So the base run's states are
kept for one batch and only the suffixes are run: L(L-1)/2 + L layer passes instead of L(L-1) + L, same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data import Batch, valid_next_tokens
from ..forward import final_states, to_device
from ..losses import TokenStatistics, token_statistics


@dataclass
class LayerCalls:
    """What each decoder layer was called with in one forward pass."""

    states: list[Tensor] = field(default_factory=list)  # (B, T, H) per layer
    kwargs: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def recorded_layer_calls(decoder: torch.nn.Module) -> Iterator[LayerCalls]:
    """Record the input state and the keyword arguments of every decoder layer."""
    calls = LayerCalls()

    def record(_: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        calls.states.append(args[0])
        calls.kwargs.append(kwargs)

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in decoder.layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def candidate_states(model: PreTrainedModel, batch: Batch, positions: Iterable[int]) -> Iterator[Tensor]:
    """Final hidden states `(B, T, H)` of the whole model, then of the model without each of `positions` in turn."""
    decoder = model.base_model
    with recorded_layer_calls(decoder) as calls:
        yield final_states(model, batch)
    for position in positions:
        state = calls.states[position]
        for layer, kwargs in zip(decoder.layers[position + 1 :], calls.kwargs[position + 1 :], strict=True):
            state = layer(state, **kwargs)
        yield decoder.norm(state)


def leave_one_out(
    model: PreTrainedModel,
    batches: list[Batch],
    positions: list[int],
    teacher: PreTrainedModel | None,
    on_batch: Callable[[], None] = lambda: None,
) -> Iterator[list[TokenStatistics]]:
    """Per batch: the statistics of the whole model (against `teacher`, if any), then without each position.

    Runs inside [`~forward.measuring`].
    """
    for batch in batches:
        batch = to_device(batch, model.device)
        valid, labels = valid_next_tokens(batch)
        if not len(labels):
            continue
        hidden = [states[valid] for states in candidate_states(model, batch, positions)]
        if teacher is None:
            yield token_statistics(hidden, model.lm_head, labels)
        else:
            reference = hidden[0] if teacher is model else final_states(teacher, batch)[valid]
            yield token_statistics(hidden, model.lm_head, labels, reference, teacher.lm_head)
        on_batch()
