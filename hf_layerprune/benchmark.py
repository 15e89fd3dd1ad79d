"""Speed and memory of text generation, several models side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from .errors import LayerPruneError
from .forward import measuring


@dataclass(frozen=True)
class BenchmarkReport:
    """
    Attributes:
        prefill_tokens_per_second (`float`): prompt tokens over the time to the first new token.
        decode_tokens_per_second (`float`): new tokens after the first over the time they took.
        peak_memory_bytes (`int`): the weights and the most memory that generating adds; on a GPU measured, elsewhere
            the KV cache, which is what must fit at least.
        kv_bytes_per_token (`int`): size of the KV cache per token of context.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int
    kv_bytes_per_token: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Stopwatch(StoppingCriteria):
    """Stamps the time behind every token, inside `generate`, and never stops it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def benchmark_model(
    model: PreTrainedModel, prompt_tokens: int = 128, new_tokens: int = 64, batch_size: int = 1, repeats: int = 3
) -> BenchmarkReport:
    """Time greedy `generate` of one model; see [`benchmark_models`]."""
    return benchmark_models([model], prompt_tokens, new_tokens, batch_size, repeats)[0]


def benchmark_models(
    models: Sequence[PreTrainedModel],
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    batch_size: int = 1,
    repeats: int = 3,
) -> list[BenchmarkReport]:
    """Time greedy `generate` of several models, interleaved, after one warm-up each; medians over `repeats`.

    Args:
        models (`Sequence[PreTrainedModel]`): models with one vocabulary size each; prompts are random tokens.
        prompt_tokens (`int`, *optional*, defaults to `128`): prompt length.
        new_tokens (`int`, *optional*, defaults to `64`): tokens generated, at least 2.
        batch_size (`int`, *optional*, defaults to `1`): prompts at once; speeds count the tokens of all of them.
        repeats (`int`, *optional*, defaults to `3`): timed runs of each model.
    """
    for name, value, least in (
        ("prompt_tokens", prompt_tokens, 1),
        ("new_tokens", new_tokens, 2),
        ("batch_size", batch_size, 1),
        ("repeats", repeats, 1),
    ):
        if value < least:
            raise LayerPruneError(f"{name}={value} is out of range; it must be at least {least}")
    prefill: list[list[float]] = [[] for _ in models]
    decode: list[list[float]] = [[] for _ in models]
    with measuring(*models):
        for repeat in range(repeats + 1):
            for index, model in enumerate(models):
                first, rest = _time_generate(model, prompt_tokens, new_tokens, batch_size)
                if repeat:
                    prefill[index].append(batch_size * prompt_tokens / first)
                    decode[index].append(batch_size * (new_tokens - 1) / rest)
        return [
            BenchmarkReport(
                statistics.median(prefill[index]),
                statistics.median(decode[index]),
                _peak_memory(model, prompt_tokens, new_tokens, batch_size),
                kv_bytes_per_token(model),
            )
            for index, model in enumerate(models)
        ]


def _time_generate(
    model: PreTrainedModel, prompt_tokens: int, new_tokens: int, batch_size: int
) -> tuple[float, float]:
    """Seconds to the first new token, and seconds for the rest."""
    ids = torch.randint(model.config.vocab_size, (batch_size, prompt_tokens), device=model.device)
    watch = _Stopwatch()
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    config.eos_token_id = None  # every run is equally long
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    start = time.perf_counter()
    _generate(model, ids, config, watch)
    return watch.times[0] - start, watch.times[-1] - watch.times[0]


def _generate(model: PreTrainedModel, ids: Tensor, config: GenerationConfig, watch: _Stopwatch) -> None:
    own, model.generation_config = model.generation_config, config
    try:
        model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=StoppingCriteriaList([watch]))
    finally:
        model.generation_config = own


def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of KV cache per token of context, read off a real cache."""
    cache = DynamicCache(config=model.config)
    with measuring(model):
        model(
            input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True
        )
    return sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))


def _peak_memory(model: PreTrainedModel, prompt_tokens: int, new_tokens: int, batch_size: int) -> int:
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    weights = sum(tensors.values())
    if model.device.type == "cuda":  # other models may lie on the device as well: only what generating adds counts
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
        _time_generate(model, prompt_tokens, new_tokens, batch_size)
        return weights + torch.cuda.max_memory_allocated(model.device) - before
    return weights + kv_bytes_per_token(model) * batch_size * (prompt_tokens + new_tokens)
