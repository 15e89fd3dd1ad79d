"""Let the candidates continue prompts: what they have in common of a prompt is computed once.

Below its first change a candidate has the keys and values of the model itself; above it, it runs the prompt from the
model's state on. Only the new tokens are a model's own from bottom to top.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..forward import to_device
from ..tasks import GenerationChunk
from ..tasks.evaluation import generated
from .candidates import CandidateRuns, LayerCalls, recorded_layer_calls


def candidate_texts(
    runs: CandidateRuns, which: Sequence[int], chunk: GenerationChunk, tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[str]]:
    """Greedy continuations of a chunk's prompts by the model as it is, then by each candidate: E texts each.

    Runs inside [`~forward.measuring`].
    """
    batch = to_device(chunk.batch, runs.model.device)
    if batch["input_ids"].shape[1] < 2:  # nothing of the prompt to share
        yield generated(runs.model, chunk, tokenizer)
        yield from (generated(runs.student(index), chunk, tokenizer) for index in which)
        return
    # all but the last token; positions as `generate` counts them, so that padding on the left shifts nothing
    mask = batch["attention_mask"][:, :-1]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = DynamicCache(config=runs.model.config)
    with recorded_layer_calls(runs.model.base_model) as calls:
        runs.model.base_model(
            input_ids=batch["input_ids"][:, :-1],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
    prompt = [(layer.keys, layer.values) for layer in cache.layers]  # `cache` itself grows with the text
    yield generated(runs.model, chunk, tokenizer, cache)
    for index in which:
        student = runs.student(index)
        yield generated(student, chunk, tokenizer, _prompt_cache(student, prompt, calls, runs.first_change(index)))


def _prompt_cache(
    student: PreTrainedModel, prompt: Sequence[tuple[Tensor, Tensor]], calls: LayerCalls, start: int
) -> DynamicCache:
    """A student's own cache of the prompt; it differs from the model from block `start` on."""
    cache = DynamicCache(config=student.config)
    layers: nn.ModuleList = student.base_model.layers
    for position in range(start):
        cache.update(*prompt[position], position)
    state = calls.states[start] if start < len(calls.states) else None
    for layer in layers[start:]:
        state = layer(state, **calls.kwargs[start] | {"past_key_values": cache})
    return cache
