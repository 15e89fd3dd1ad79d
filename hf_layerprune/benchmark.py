"""Speed and memory of text generation, several models side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

from .errors import LayerPruneError, first_line
from .forward import check_causal, measuring

CACHE_IMPLEMENTATIONS = ("dynamic", "static")


@dataclass(frozen=True)
class BenchmarkReport:
    """
    Attributes:
        prefill_tokens_per_second (`float`): prompt tokens over the time to the first new token.
        decode_tokens_per_second (`float`): new tokens after the first over the time they took.
        peak_memory_bytes (`int`): the weights and the most memory that generating adds; on a GPU measured, elsewhere
            the KV cache, which is what must fit at least.
        kv_bytes_per_token (`int`): size of the KV cache per token of context.
        batch_size (`int`): prompts at once; the speeds count the tokens of all of them.
        time_to_first_token (`float`): seconds from the call to the first new token.
        prefill_ratio (`float`): prefill speed over that of the first model measured, run by run; 1.0 for itself.
        decode_ratio (`float`): decode speed over that of the first model measured, run by run; 1.0 for itself.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int
    kv_bytes_per_token: int
    batch_size: int
    time_to_first_token: float
    prefill_ratio: float
    decode_ratio: float

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
    model: PreTrainedModel,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    batch_size: int = 1,
    repeats: int = 3,
    *,
    cache_implementation: str | None = None,
    compile: bool = False,
) -> BenchmarkReport:
    """Time greedy `generate` of one model; see [`benchmark_models`]."""
    return benchmark_models(
        [model],
        prompt_tokens,
        new_tokens,
        batch_size,
        repeats,
        cache_implementation=cache_implementation,
        compile=compile,
    )[0]


def benchmark_models(
    models: Sequence[PreTrainedModel],
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    batch_size: int = 1,
    repeats: int = 3,
    *,
    cache_implementation: str | None = None,
    compile: bool = False,
    on_run: Callable[[], None] = lambda: None,
) -> list[BenchmarkReport]:
    """Time greedy `generate` of several models, interleaved, after a warm-up each; medians over `repeats`.

    Args:
        models (`Sequence[PreTrainedModel]`): models with one vocabulary size each; prompts are random tokens. Ratios
            are to the first.
        prompt_tokens (`int`, *optional*, defaults to `128`): prompt length.
        new_tokens (`int`, *optional*, defaults to `64`): tokens generated, at least 2.
        batch_size (`int`, *optional*, defaults to `1`): prompts at once; speeds count the tokens of all of them.
        repeats (`int`, *optional*, defaults to `3`): timed runs of each model.
        cache_implementation (`str`, *optional*): KV cache: `"static"`, as long as prompt and new tokens from the
            start, or `"dynamic"`, which grows and is the default.
        compile (`bool`, *optional*, defaults to `False`): whether `generate` decodes with `torch.compile` (the prompt
            is never compiled); needs the static cache. Drops what was compiled before in this process.
        on_run (`Callable[[], None]`, *optional*): called after each of the `num_runs`, for progress bars.

    Raises:
        [`LayerPruneError`]: for a setting that cannot work, or a model that cannot be compiled.
    """
    check_settings(prompt_tokens, new_tokens, batch_size, repeats, cache_implementation, compile)
    for model in models:
        check_causal(model)
    length = prompt_tokens + new_tokens
    seconds: list[list[tuple[float, float]]] = [[] for _ in models]
    with measuring(*models), _as_loaded(models), _compiling(models) if compile else nullcontext():
        caches = [_static_cache(model, length) if cache_implementation == "static" else None for model in models]
        for repeat in range(repeats - num_runs(1, repeats, compile), repeats):
            for index, model in enumerate(models):
                run = _time_generate(model, prompt_tokens, new_tokens, batch_size, caches[index], compile)
                if repeat >= 0:
                    seconds[index].append(run)
                on_run()
        return [
            BenchmarkReport(
                prefill_tokens_per_second=batch_size * prompt_tokens / statistics.median(first for first, _ in runs),
                decode_tokens_per_second=batch_size * (new_tokens - 1) / statistics.median(rest for _, rest in runs),
                peak_memory_bytes=_peak_memory(model, prompt_tokens, new_tokens, batch_size, cache, compile),
                kv_bytes_per_token=kv_bytes_per_token(model),
                batch_size=batch_size,
                time_to_first_token=statistics.median(first for first, _ in runs),
                prefill_ratio=statistics.median(base[0] / run[0] for base, run in zip(seconds[0], runs, strict=True)),
                decode_ratio=statistics.median(base[1] / run[1] for base, run in zip(seconds[0], runs, strict=True)),
            )
            for model, cache, runs in zip(models, caches, seconds, strict=True)
        ]


def num_runs(num_models: int, repeats: int, compile: bool = False) -> int:
    """Runs of [`benchmark_models`], warm-ups included: two where compiled, the second records a CUDA graph."""
    return num_models * (repeats + (2 if compile else 1))


def check_settings(
    prompt_tokens: int,
    new_tokens: int,
    batch_size: int,
    repeats: int,
    cache_implementation: str | None = None,
    compile: bool = False,
) -> None:
    """Raise [`LayerPruneError`] unless [`benchmark_models`] can work with these settings."""
    for name, value, least in (
        ("prompt_tokens", prompt_tokens, 1),
        ("new_tokens", new_tokens, 2),
        ("batch_size", batch_size, 1),
        ("repeats", repeats, 1),
    ):
        if not isinstance(value, int) or value < least:
            raise LayerPruneError(f"{name}={value} is out of range; it must be a whole number of at least {least}")
    if cache_implementation is not None and cache_implementation not in CACHE_IMPLEMENTATIONS:
        raise LayerPruneError(
            f"cache_implementation={cache_implementation!r} is unknown; choose "
            + " or ".join(f'"{name}"' for name in CACHE_IMPLEMENTATIONS)
        )
    if compile and cache_implementation != "static":
        raise LayerPruneError('compile=True needs a cache of fixed size; set cache_implementation="static" too')


@contextmanager
def _as_loaded(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """Every parameter wants gradients, as `from_pretrained` leaves it; afterwards what was frozen is frozen again.

    On a CPU torch multiplies part of a batch by a frozen matrix in a way that copies the matrix: each prompt would pay
    for a copy of the head.
    """
    frozen = [p for model in models for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _compiling(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """Every model and batch size gets a graph of its own; what was compiled is freed afterwards.

    After 8 graphs of one function dynamo would go on uncompiled, without a word: the limit is lifted.
    """
    torch.compiler.reset()
    try:
        with torch._dynamo.config.patch(recompile_limit=2**16, accumulated_recompile_limit=2**16):
            yield
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise LayerPruneError(f"torch.compile failed: {first_line(error.inner_exception)}") from error
    finally:
        for model in models:
            for name in ("_compiled_call", "_last_compile_config"):  # where `generate` keeps it
                model.__dict__.pop(name, None)
        torch.compiler.reset()


def _static_cache(model: PreTrainedModel, length: int) -> StaticCache:
    """One for all runs of a model: `generate` makes a new one each time, at addresses a CUDA graph does not know."""
    return StaticCache(config=model.config, max_cache_len=length)


def _time_generate(
    model: PreTrainedModel,
    prompt_tokens: int,
    new_tokens: int,
    batch_size: int,
    cache: StaticCache | None,
    compile: bool,
) -> tuple[float, float]:
    """Seconds to the first new token, and seconds for the rest."""
    ids = torch.randint(model.config.vocab_size, (batch_size, prompt_tokens), device=model.device)
    watch = _Stopwatch()
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, disable_compile=not compile)
    config.eos_token_id = None  # every run is equally long
    if compile:
        # left open, sizes that differ between models would be compiled as unknown ones from the second model on
        config.compile_config = CompileConfig(dynamic=False)
        config.compile_config._compile_all_devices = True  # else a CPU would be left out
    if cache is not None:
        cache.reset()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    start = time.perf_counter()
    _generate(model, ids, config, watch, cache)
    return watch.times[0] - start, watch.times[-1] - watch.times[0]


def _generate(
    model: PreTrainedModel, ids: Tensor, config: GenerationConfig, watch: _Stopwatch, cache: StaticCache | None
) -> None:
    own, model.generation_config = model.generation_config, config
    options = {} if cache is None else {"past_key_values": cache}
    try:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), stopping_criteria=StoppingCriteriaList([watch]), **options
        )
    finally:
        model.generation_config = own


def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of KV cache per token of context, read off a real cache."""
    cache = DynamicCache(config=model.config)
    with measuring(model):
        model(
            input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True
        )
    return _cache_bytes(cache)


def _cache_bytes(cache: Cache) -> int:
    return sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of its parameters and buffers; what is shared counts once."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def _peak_memory(
    model: PreTrainedModel,
    prompt_tokens: int,
    new_tokens: int,
    batch_size: int,
    cache: StaticCache | None,
    compile: bool,
) -> int:
    weights = weight_bytes(model)
    if model.device.type == "cuda":  # other models may lie on the device as well: only what generating adds counts
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device) - (0 if cache is None else _cache_bytes(cache))
        _time_generate(model, prompt_tokens, new_tokens, batch_size, cache, compile)
        return weights + torch.cuda.max_memory_allocated(model.device) - before
    return weights + kv_bytes_per_token(model) * batch_size * (prompt_tokens + new_tokens)
