"""What a model's outputs become under each of several other plans, by measurement.

A plan that leaves out layer i, or runs i beside i+1, feeds what follows with states that differ from layer i on only.
So the model runs once per batch, its states are kept, and each candidate runs from its first change on: to leave out
every layer in turn takes L(L-1)/2 + L layer passes instead of L(L-1) + L, with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..architectures import architecture_of
from ..compensation import Repair, apply_repair
from ..data import Batch
from ..forward import final_states
from ..plan import LayerPlan
from ..surgery import apply_plan, plan_of


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
        mlp_output (`str`): the name of a layer's projection that `repair` may change.
        repair ([`Repair`], *optional*): what makes up for the layer left out at `start`.
    """

    start: int
    blocks: list[list[nn.Module]]
    mlp_output: str
    repair: Repair | None = None

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
        return cls(start, blocks, architecture_of(model.config).mlp_output)

    def final_states(self, decoder: nn.Module, calls: LayerCalls, whole: Tensor) -> Tensor:
        """Hidden states behind the final norm, `(B, T, H)`; `whole` are those of the model itself."""
        if self.repair is not None and self.repair.weight is not None:  # the block before the gap is another one
            position = self.repair.position
            changed = {f"{self.mlp_output}.weight": self.repair.weight}
            args, kwargs = (calls.states[position],), calls.kwargs[position]
            state = functional_call(decoder.layers[position], changed, args, kwargs)
        elif self.start == len(calls.states):
            return whole
        else:
            state, kwargs = calls.states[self.start], calls.kwargs[self.start]
            state = state if self.repair is None else state * self.repair.scale
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


class CandidateRuns:
    """Runs a model as it is and by other plans made of its layers; index 0 is the model itself, 1, 2, ... the plans.

    Layers inside parallel blocks are taken apart once for all candidates, and only if one needs it.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model as it is.
        plans (`Iterable[LayerPlan]`): plans made of its layers.
        repairs (`Sequence[Mapping[LayerPlan, Repair]]`, *optional*): what makes up for the layers they leave out, for
            each fold of the data.
    """

    def __init__(
        self, model: PreTrainedModel, plans: Iterable[LayerPlan], repairs: Sequence[Mapping[LayerPlan, Repair]] = ()
    ) -> None:
        apart = cache(lambda: separate_layers(model))
        self.model, self.plans = model, list(plans)
        self.students: dict[int, PreTrainedModel] = {}
        both = [(Candidate.of(model, plan, apart), plan) for plan in self.plans]
        self.folds = [
            [replace(candidate, repair=of_fold.get(plan)) for candidate, plan in both] for of_fold in repairs or [{}]
        ]

    @property
    def candidates(self) -> list[Candidate]:
        """Those of the first fold, which is the only one unless text is split."""
        return self.folds[0]

    def student(self, index: int) -> PreTrainedModel:
        """A candidate as a model of its own; it shares the weights that are not changed.

        Kept where it has none of its own, so that memory does not grow with the number of candidates.
        """
        if index in self.students:
            return self.students[index]
        plan, repair = self.plans[index - 1], self.candidates[index - 1].repair
        student = apply_plan(self.model, plan, share_weights=True).eval()
        if repair is not None:
            apply_repair(student, repair)
        elif set(plan.blocks) <= set(plan_of(self.model).blocks):
            self.students[index] = student
        return student

    def first_change(self, index: int) -> int:
        """Position of the first block that a candidate runs otherwise than the model."""
        candidate = self.candidates[index - 1]
        if candidate.repair is not None and candidate.repair.weight is not None:
            return candidate.repair.position
        return candidate.start

    def final_states(self, batch: Batch, which: Iterable[int], fold: int = 0) -> Iterator[Tensor]:
        """Final hidden states `(B, T, H)` of the model as it is, then of each candidate in turn."""
        with recorded_layer_calls(self.model.base_model) as calls:
            whole = final_states(self.model, batch)
        yield whole
        for index in which:
            yield self.folds[fold][index - 1].final_states(self.model.base_model, calls, whole)
