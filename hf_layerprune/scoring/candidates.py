"""What a model's outputs become under each of several other plans, by measurement.

A plan that leaves out layer i, or runs i beside i+1, feeds what follows with states that differ from layer i on only.
So the model runs once per batch, its states are kept, and each candidate runs from its first change on: to leave out
every layer in turn takes L(L-1)/2 + L layer passes instead of L(L-1) + L, with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, islice
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data import Batch, valid_next_tokens
from ..forward import final_states, to_device
from ..losses import TokenStatistics, token_statistics
from ..plan import LayerPlan
from ..surgery import apply_plan, plan_of

MAX_STATE_BYTES = 2**30  # of candidates' final states held at a time


@dataclass
class LayerCalls:
    """What each decoder layer was called with in one forward pass."""

    states: list[Tensor] = field(default_factory=list)  # (B, T, H) per layer
    kwargs: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def recorded_layer_calls(decoder: nn.Module) -> Iterator[LayerCalls]:
    """Record the input state and the keyword arguments of every decoder layer."""
    calls = LayerCalls()

    def record(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        calls.states.append(args[0])
        calls.kwargs.append(kwargs)

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in decoder.layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Candidate:
    """How to run a model by another plan.

    Attributes:
        start (`int`): position of the first block that differs.
        blocks (`list[list[nn.Module]]`): what runs from there on; the layers of one entry run in parallel.
    """

    start: int
    blocks: list[list[nn.Module]]

    @classmethod
    def of(cls, model: PreTrainedModel, plan: LayerPlan, apart: Callable[[], Mapping[int, nn.Module]]) -> Candidate:
        """`model` by `plan`, made of its own layers; `apart` gives those inside its parallel blocks, one by one."""
        current, layers = plan_of(model).blocks, model.base_model.layers
        start = 0
        while start < min(len(current), plan.depth) and current[start] == plan.blocks[start]:
            start += 1
        blocks = []
        for block in plan.blocks[start:]:
            inside = [index for index, other in enumerate(current) if set(other) <= set(block)]
            whole = [layer for index in inside for layer in current[index]]
            parts = [apart()[layer] for layer in block if layer not in whole]  # of a larger block that loses layers
            blocks.append([layers[index] for index in inside] + parts)
        return cls(start, blocks)

    def final_states(self, decoder: nn.Module, calls: LayerCalls, whole: Tensor) -> Tensor:
        """Hidden states behind the final norm, `(B, T, H)`; `whole` are those of the model itself."""
        if self.start == len(calls.states):
            return whole
        state, kwargs = calls.states[self.start], calls.kwargs[self.start]
        for layers in self.blocks:
            state = run_parallel(layers, state, kwargs)
        return decoder.norm(state)


def separate_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Every teacher layer of `model` on its own; those inside parallel blocks are copies."""
    plan = plan_of(model)
    singles = LayerPlan(tuple((layer,) for layer in plan.layers), plan.num_teacher_layers)
    return dict(zip(plan.layers, apply_plan(model, singles, share_weights=True).base_model.layers, strict=True))


def run_parallel(layers: list[nn.Module], state: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Decoder layers on one input, their outputs added: `(B, T, H) -> (B, T, H)`.

    https://huggingface.co/papers/2502.02790
    """
    if len(layers) == 1:
        return layers[0](state, **kwargs)
    state = state + sum(layer.self_attn(layer.input_layernorm(state), **kwargs)[0] for layer in layers)
    return state + sum(layer.mlp(layer.post_attention_layernorm(state)) for layer in layers)


def candidate_states(model: PreTrainedModel, batch: Batch, candidates: Iterable[Candidate]) -> Iterator[Tensor]:
    """Final hidden states `(B, T, H)` of the model as it is, then of each candidate in turn."""
    with recorded_layer_calls(model.base_model) as calls:
        whole = final_states(model, batch)
    yield whole
    for candidate in candidates:
        yield candidate.final_states(model.base_model, calls, whole)


def measure_candidates(
    model: PreTrainedModel,
    batches: list[Batch],
    plans: Iterable[LayerPlan],
    teacher: PreTrainedModel | None,
    on_batch: Callable[[], None] = lambda: None,
) -> Iterator[list[TokenStatistics]]:
    """Per batch: the statistics of the model as it is (against `teacher`, if any), then by each of `plans`.

    Runs inside [`~forward.measuring`].
    """
    apart = cache(lambda: separate_layers(model))  # made once for all candidates, and only if one needs it
    candidates = [Candidate.of(model, plan, apart) for plan in plans]
    for batch in batches:
        batch = to_device(batch, model.device)
        valid, labels = valid_next_tokens(batch)
        if not len(labels):
            continue
        hidden = (states[valid] for states in candidate_states(model, batch, candidates))
        first = next(hidden)
        reference: tuple[Any, ...] = ()
        if teacher is not None:
            reference = (first if teacher is model else final_states(teacher, batch)[valid], teacher.lm_head)
        at_once = max(1, MAX_STATE_BYTES // max(1, first.numel() * first.element_size()))
        statistics, hidden = [], chain([first], hidden)
        while some := list(islice(hidden, at_once)):  # the teacher is projected once for each of these parts
            statistics += token_statistics(some, model.lm_head, labels, *reference)
        yield statistics
        on_batch()
