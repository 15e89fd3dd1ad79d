"""Random weights of a named shape: to time a depth, no checkpoint is needed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from .architectures import architecture_of, check_supported
from .data import ASSETS
from .errors import LayerPruneError
from .loading import load_config
from .plan import LayerPlan
from .surgery import apply_plan, plan_of

SHAPES = {path.stem: path for path in sorted((ASSETS / "configs").glob("*.json"))}
PUBLISHERS = re.compile(r"^(Qwen|meta-llama|mistralai|HuggingFaceTB)/")


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
        raise LayerPruneError(f"there is no shape {name_or_path!r}; choose one of {names}, or a path to a config.json")
    return load_config(str(path))


def shape_plan(config: PretrainedConfig, num_layers: int, num_blocks: int | None = None) -> LayerPlan:
    """Plan `num_layers` layers in `num_blocks` blocks: neighbours run in parallel pairs where there are fewer blocks.

    The pairs are one stretch in the later middle, as in https://huggingface.co/papers/2502.02790: an eighth of the
    layers after it stay single, or half of the single ones if those are fewer.
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
    """Make models that compute finite nonsense as fast as trained ones compute sense.

    `sizes` are the number of layers, and of the blocks that hold them, of each model, see [`shape_plan`]; by default
    there is one, of the blocks of `config`. What the models have in common is in memory once.
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
