"""Speed and memory of text generation, several models side by side.

To time a depth no checkpoint is needed: `random_models` have random weights of a named shape.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Cache,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers.initialization import no_init_weights

from .architectures import architecture_of, check_supported
from .data import ASSETS
from .errors import LayerPruneError
from .forward import CACHE, check_causal, inference
from .loading import load_config
from .plan import LayerPlan
from .settings import check_at_least
from .surgery import apply_plan, plan_of

SHAPES = {path.stem: path for path in sorted((ASSETS / "configs").glob("*.json"))}
PUBLISHERS = re.compile(r"^(Qwen|meta-llama|mistralai|HuggingFaceTB)/")


@dataclass(frozen=True)
class BenchmarkReport:
    """How fast a model generates, and the memory it takes."""

    prefill_tokens_per_second: float  # prompt tokens over the time to the first new token
    decode_tokens_per_second: float  # new tokens after the first over the time they took
    peak_memory_bytes: int  # the weights and what generating adds: on a GPU measured, elsewhere the KV cache
    kv_bytes_per_token: int  # of context
    batch_size: int  # prompts at once; the speeds count the tokens of all of them
    time_to_first_token: float  # seconds from the call to the first new token
    prefill_ratio: float  # speed over that of the first model measured, run by run
    decode_ratio: float  # likewise

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Load:
    """What is generated and how.

    Args:
        prompt_tokens (`int`, *optional*, defaults to `128`): prompt length.
        new_tokens (`int`, *optional*, defaults to `64`): tokens generated, at least 2.
        batch_size (`int`, *optional*, defaults to `1`): prompts at once.
        repeats (`int`, *optional*, defaults to `3`): timed runs of each model.
        cache_implementation (`str`, *optional*): KV cache: `"dynamic"`, which grows, by default; or `"static"`.
        compile (`bool`, *optional*, defaults to `False`): whether `generate` decodes with `torch.compile`; needs the
            static cache. Drops what was compiled before in this process.

    Raises:
        [`LayerPruneError`]: for a setting that cannot work.
    """

    prompt_tokens: int = 128
    new_tokens: int = 64
    batch_size: int = 1
    repeats: int = 3
    cache_implementation: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        check_at_least(self, {"prompt_tokens": 1, "new_tokens": 2, "batch_size": 1, "repeats": 1})
        if (cache := self.cache_implementation) not in (None, "dynamic", "static"):
            raise LayerPruneError(f'cache_implementation={cache!r} is unknown; choose "dynamic" or "static"')
        if self.compile and cache != "static":
            raise LayerPruneError('compile=True needs a cache of fixed size; set cache_implementation="static" too')


def benchmark_model(model: PreTrainedModel, *args: Any, **kwargs: Any) -> BenchmarkReport:
    """Time greedy `generate` of one model; takes what [`benchmark_models`] takes."""
    return benchmark_models([model], *args, **kwargs)[0]


def benchmark_models(
    models: Sequence[PreTrainedModel], *args: Any, on_run: Callable[[], None] = lambda: None, **kwargs: Any
) -> list[BenchmarkReport]:
    """Time greedy `generate` of several models on random tokens, interleaved, after a warm-up each.

    Numbers are medians over `repeats`. `args` and `kwargs` are the settings of [`Load`]; `on_run` is called after each
    of the [`num_runs`].

    Raises:
        [`LayerPruneError`]: for a setting that cannot work.
    """
    load = Load(*args, **kwargs)
    size, new = load.batch_size, load.new_tokens
    for model in models:
        check_causal(model)
    seconds: list[list[tuple[float, float]]] = [[] for _ in models]
    with inference(*models), _as_loaded(models), _compiling(models) if load.compile else nullcontext():
        # one cache for all runs of a model: `generate` would make new ones, at addresses a CUDA graph does not know
        static, length = load.cache_implementation == "static", load.prompt_tokens + new
        caches = [StaticCache(config=model.config, max_cache_len=length) if static else None for model in models]
        for _ in range(num_runs(1, load.repeats, load.compile)):
            for model, cache, runs in zip(models, caches, seconds, strict=True):
                runs.append(_time_generate(model, load, cache))
                on_run()
        peaks = [_peak_memory(model, load, cache) for model, cache in zip(models, caches, strict=True)]
        cached = [kv_bytes_per_token(model) for model in models]
    reports, base = [], seconds[0][-load.repeats :]  # without the warm-up
    for peak, bytes_per_token, runs in zip(peaks, cached, seconds, strict=True):
        runs = runs[-load.repeats :]
        prefill, decode = (median(part) for part in zip(*runs, strict=True))
        report = BenchmarkReport(
            prefill_tokens_per_second=size * load.prompt_tokens / prefill,
            decode_tokens_per_second=size * (new - 1) / decode,
            peak_memory_bytes=peak,
            kv_bytes_per_token=bytes_per_token,
            batch_size=size,
            time_to_first_token=prefill,
            prefill_ratio=median(first[0] / run[0] for first, run in zip(base, runs, strict=True)),
            decode_ratio=median(first[1] / run[1] for first, run in zip(base, runs, strict=True)),
        )
        reports.append(report)
    return reports


def num_runs(num_models: int, repeats: int, compile: bool = False) -> int:
    """Count the runs of [`benchmark_models`] with warm-ups: two where compiled, as the second records a CUDA graph."""
    return num_models * (repeats + (2 if compile else 1))


@contextmanager
def _as_loaded(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """Let every parameter require gradients, as `from_pretrained` leaves it, and freeze it again afterwards.

    On a CPU torch copies a frozen matrix before it multiplies part of a batch: each prompt would pay for the head.
    """
    frozen = [p for model in models for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _compiling(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """Compile a graph for every model and batch size, past dynamo's silent limit of 8, and free what was compiled."""
    torch.compiler.reset()
    try:
        with torch._dynamo.config.patch(recompile_limit=2**16, accumulated_recompile_limit=2**16):
            yield
    finally:
        for model in models:
            for name in ("_compiled_call", "_last_compile_config"):  # where `generate` keeps it
                model.__dict__.pop(name, None)
        torch.compiler.reset()


def _time_generate(model: PreTrainedModel, load: Load, cache: StaticCache | None) -> tuple[float, float]:
    """Measure the seconds to the first new token, and those of the rest."""
    ids = torch.randint(model.config.vocab_size, (load.batch_size, load.prompt_tokens), device=model.device)
    times: list[float] = []
    config = GenerationConfig(max_new_tokens=load.new_tokens, do_sample=False, disable_compile=not load.compile)
    config.eos_token_id, config.pad_token_id = None, 0  # every run is equally long
    if load.compile:
        # left open, sizes that differ between models would be compiled as unknown ones from the second model on
        config.compile_config = CompileConfig(dynamic=False)
        config.compile_config._compile_all_devices = True  # else a CPU would be left out
    if cache is not None:
        cache.reset()
    own, model.generation_config = model.generation_config, config

    def stamp(input_ids: Tensor, scores: Tensor | None = None) -> Tensor:
        """Note the time; of a token, as a criterion that never stops."""
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    stamp(ids)
    try:
        model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=[stamp], **{CACHE: cache})
    finally:
        model.generation_config = own
    return times[1] - times[0], times[-1] - times[1]


def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Read the bytes of KV cache per token of context off a real cache."""
    cache = DynamicCache(config=model.config)
    with inference(model):
        ids = torch.zeros((1, 1), dtype=torch.long, device=model.device)
        model(input_ids=ids, **{CACHE: cache}, use_cache=True)
    return _cache_bytes(cache)


def _cache_bytes(cache: Cache) -> int:
    return sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))


def _peak_memory(model: PreTrainedModel, load: Load, cache: StaticCache | None) -> int:
    weights = model.get_memory_footprint()
    if model.device.type != "cuda":
        return weights + kv_bytes_per_token(model) * load.batch_size * (load.prompt_tokens + load.new_tokens)
    torch.cuda.reset_peak_memory_stats(model.device)  # other models may be there too: what generating adds counts
    before = torch.cuda.memory_allocated(model.device) - (0 if cache is None else _cache_bytes(cache))
    _time_generate(model, load, cache)
    return weights + torch.cuda.max_memory_allocated(model.device) - before


def short_name(name_or_path: str) -> str:
    """Name the shape of a model: without publisher, `-Instruct` and `-Coder`; what has no shape stays as it is."""
    name = PUBLISHERS.sub("", name_or_path)
    shape = name.removesuffix("-Instruct").replace("-Coder-", "-")
    return shape if shape in SHAPES else name


def load_shape(name_or_path: str) -> PretrainedConfig:
    """Read the config of a `config.json` on disk, or of a named shape: `"Qwen2.5-3B"` or `"Qwen/Qwen2.5-3B"`."""
    path = Path(name_or_path)
    if not path.is_file() and not (path := SHAPES.get(short_name(name_or_path), path)).is_file():
        names = ", ".join(SHAPES)
        raise LayerPruneError(f"shape {name_or_path!r} is unknown; choose one of {names}, or a path to a config.json")
    return load_config(str(path))


def shape_plan(config: PretrainedConfig, num_layers: int, num_blocks: int | None = None) -> LayerPlan:
    """Plan `num_layers` layers in `num_blocks` blocks; where these are fewer, neighbours run in parallel pairs.

    The pairs are one stretch in the later middle, as in https://huggingface.co/papers/2502.02790, followed by an
    eighth of the layers, or half of the single ones if those are fewer.
    """
    depth, blocks = len(plan_of(config).layers), num_layers if num_blocks is None else num_blocks
    pairs, single = num_layers - blocks, 2 * blocks - num_layers
    if not 1 <= num_layers <= depth or min(pairs, single) < 0:
        raise LayerPruneError(
            f"num_layers={num_layers}, num_blocks={blocks} is out of range; the shape has {depth} layers, and a block "
            "holds one or two"
        )
    first = single - min(max(1, num_layers // 8), single // 2)  # layers before the pairs
    plan = LayerPlan.identity(num_layers)
    return plan.with_pairs((n, n + 1) for n in range(first, first + 2 * pairs, 2)) if pairs else plan


def random_models(
    config: PretrainedConfig,
    sizes: Sequence[tuple[int, int | None]] = (),
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
) -> list[PreTrainedModel]:
    """Make models of random weights, as fast as trained ones; what they have in common is in memory once.

    `sizes` are the number of layers and of blocks of each, see [`shape_plan`]; by default there is one, of `config`.
    """
    check_supported(config)
    if not sizes:
        return [_random_model(config, dtype, device)]
    plans = [shape_plan(config, *size) for size in sizes]
    depth = max(len(plan.layers) for plan in plans)
    values = config.to_dict() | {"num_hidden_layers": depth}
    if "layer_types" in values:
        values["layer_types"] = ["full_attention"] * depth
    for key in ("model_type", "architectures", "auto_map", "layer_plan", "per_layer_config", "dtype"):
        values.pop(key, None)
    whole = _random_model(architecture_of(config).config_class(**values), dtype, device)
    return [apply_plan(whole, LayerPlan(plan.blocks, depth), share_weights=True) for plan in plans]


def _random_model(config: PretrainedConfig, dtype: torch.dtype, device: str | torch.device) -> PreTrainedModel:
    """Fill a model with small weights and norms of one: copies of a million numbers, as drawing all takes minutes."""
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    numbers = torch.empty(1_000_003, dtype=dtype, device=device).normal_(std=0.02)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1)
                continue
            for part in parameter.view(-1).split(len(numbers)):
                part.copy_(numbers[: len(part)])
    return model.eval()
