"""What a model's outputs become under each of several other plans, by measurement.

A plan that leaves out layer i, or runs i next to i+1, changes the states from layer i on only. So the model runs once
per batch, its states are kept, and each candidate runs from its first change on: leaving out every layer in turn takes
L(L-1)/2 + L layer passes instead of L(L-1) + L, with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..architectures import architecture_of
from ..compensation import Repair, apply_repair
from ..data import Batch
from ..forward import final_states, to_device
from ..plan import LayerPlan
from ..surgery import apply_plan, plan_of
from ..tasks import GenerationChunk
from ..tasks.evaluation import generated

LayerCall = tuple[Tensor, dict[str, Any]]
"""What a decoder layer was called with: its input state `(B, T, H)` and keyword arguments."""


@contextmanager
def recorded_layer_calls(decoder: nn.Module) -> Iterator[list[LayerCall]]:
    """Record what every decoder layer is called with."""
    calls: list[LayerCall] = []

    def record(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args[0], kwargs))

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in decoder.layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def separate_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Every teacher layer of `model` on its own; those inside parallel blocks are copies."""
    plan = plan_of(model)
    singles = LayerPlan(tuple((layer,) for layer in plan.layers), plan.num_teacher_layers)
    return dict(zip(plan.layers, apply_plan(model, singles, share_weights=True).base_model.layers, strict=True))


def changed_part(
    model: PreTrainedModel, plan: LayerPlan, apart: Callable[[], Mapping[int, nn.Module]]
) -> tuple[int, list[list[nn.Module]]]:
    """Position of the first block of `plan` that `model` has not, and what runs from there on.

    The layers of one entry run in parallel. All are the model's own; `apart` gives those inside its parallel blocks.
    """
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
    return start, blocks


def run_parallel(layers: list[nn.Module], state: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Run decoder layers on one input and add their outputs: `(B, T, H) -> (B, T, H)`.

    https://huggingface.co/papers/2502.02790
    """
    if len(layers) == 1:
        return layers[0](state, **kwargs)
    state = state + sum(layer.self_attn(layer.input_layernorm(state), **kwargs)[0] for layer in layers)
    return state + sum(layer.mlp(layer.post_attention_layernorm(state)) for layer in layers)


class CandidateRuns:
    """Runs a model as it is, index 0, and by other plans made of its layers, index 1, 2, ...

    Its methods run inside [`~forward.inference`].

    Args:
        model ([`~transformers.PreTrainedModel`]): the model as it is.
        plans (`Iterable[LayerPlan]`): plans made of its layers.
        repairs (`Sequence[Mapping[LayerPlan, Repair]]`, *optional*): for each fold of the data, what makes up for the
            layer that a plan leaves out.
    """

    def __init__(
        self, model: PreTrainedModel, plans: Iterable[LayerPlan], repairs: Sequence[Mapping[LayerPlan, Repair]] = ()
    ) -> None:
        self.model, self.plans, self.repairs = model, list(plans), list(repairs) or [{}]
        apart = cache(lambda: separate_layers(model))
        self.parts = [changed_part(model, plan, apart) for plan in self.plans]
        self.students: dict[int, PreTrainedModel] = {}

    def final_states(self, batch: Batch, which: Iterable[int], fold: int = 0) -> Iterator[Tensor]:
        """Hidden states after the final norm, `(B, T, H)`, of the model as it is, then of each candidate in turn."""
        decoder = self.model.base_model
        with recorded_layer_calls(decoder) as calls:
            whole = final_states(self.model, batch)
        yield whole
        for index in which:
            (start, blocks), repair = self.parts[index - 1], self._repair(index, fold)
            if repair is not None:  # the block before the gap changes too
                state, kwargs = calls[repair.position]
                weight = {f"{architecture_of(self.model.config).mlp_output}.weight": repair.weight}
                state = functional_call(decoder.layers[repair.position], weight, (state,), kwargs)
            elif start == len(calls):
                yield whole
                continue
            else:
                state, kwargs = calls[start]
            for layers in blocks:
                state = run_parallel(layers, state, kwargs)
            yield decoder.norm(state)

    def student(self, index: int) -> PreTrainedModel:
        """A candidate as a model of its own; it shares the weights that do not change.

        It is kept if it has no weights of its own, so memory does not grow with the number of candidates.
        """
        if index in self.students:
            return self.students[index]
        plan, repair = self.plans[index - 1], self._repair(index)
        student = apply_plan(self.model, plan, share_weights=True).eval()
        if repair is not None:
            apply_repair(student, repair)
        elif set(plan.blocks) <= set(plan_of(self.model).blocks):
            self.students[index] = student
        return student

    def texts(
        self, chunk: GenerationChunk, which: Sequence[int], tokenizer: PreTrainedTokenizerBase
    ) -> Iterator[list[str]]:
        """Greedy continuations of a chunk's E prompts by the model as it is, then by each candidate: E texts each.

        Below its first change a candidate has the keys and values of the model itself; above it, it runs the prompt
        from the model's state on. Only the new tokens run through all of a candidate.
        """
        batch = to_device(chunk.batch, self.model.device)
        if batch["input_ids"].shape[1] < 2:  # nothing of the prompt to share
            yield generated(self.model, chunk, tokenizer)
            yield from (generated(self.student(index), chunk, tokenizer) for index in which)
            return
        # all but the last token; positions as `generate` counts them, so that padding on the left shifts nothing
        mask = batch["attention_mask"][:, :-1]
        cache = DynamicCache(config=self.model.config)
        with recorded_layer_calls(self.model.base_model) as calls:
            self.model.base_model(
                input_ids=batch["input_ids"][:, :-1],
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
                past_key_values=cache,
                use_cache=True,
            )
        prompt = [(layer.keys, layer.values) for layer in cache.layers]  # `cache` itself grows with the text
        yield generated(self.model, chunk, tokenizer, cache)
        for index in which:
            repair, student = self._repair(index), self.student(index)
            start = self.parts[index - 1][0] if repair is None or repair.weight is None else repair.position
            yield generated(student, chunk, tokenizer, _prompt_cache(student, prompt, calls, start))

    def _repair(self, index: int, fold: int = 0) -> Repair | None:
        return self.repairs[fold].get(self.plans[index - 1])


def _prompt_cache(
    student: PreTrainedModel, prompt: Sequence[tuple[Tensor, Tensor]], calls: Sequence[LayerCall], start: int
) -> DynamicCache:
    """A student's own cache of the prompt; it differs from the model from block `start` on."""
    cache = DynamicCache(config=student.config)
    for position in range(start):
        cache.update(*prompt[position], position)
    if start < len(calls):
        state, kwargs = calls[start]
        for layer in student.base_model.layers[start:]:
            state = layer(state, **kwargs | {"past_key_values": cache})
    return cache
