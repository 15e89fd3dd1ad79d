"""Random weights of a named shape: to time a depth, no checkpoint is needed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from .architectures import architecture_of, check_supported
from .data import ASSETS
from .errors import LayerPruneError, first_line
from .loading import LOADING_ERRORS
from .models import PrunedQwen2Config
from .plan import LayerPlan
from .surgery import apply_plan, plan_of

CONFIGS = ASSETS / "configs"
PUBLISHERS = re.compile(r"^(Qwen|meta-llama|mistralai|HuggingFaceTB)/")


def shape_names() -> list[str]:
    """Names of the shapes that come with the package: by family, small to large."""
    names = (path.stem.rsplit("-", 1) for path in CONFIGS.glob("*.json"))
    millions = {"M": 1, "B": 1000}
    families = sorted((family, float(size[:-1]) * millions[size[-1]], size) for family, size in names)
    return [f"{family}-{size}" for family, _, size in families]


def short_name(name_or_path: str) -> str:
    """The name of a model's shape: without its publisher, `-Instruct` and `-Coder`; a path stays as it is."""
    name = PUBLISHERS.sub("", name_or_path)
    shape = name.removesuffix("-Instruct").replace("-Coder-", "-")
    return shape if shape in shape_names() else name


def load_shape(name_or_path: str) -> PretrainedConfig:
    """The config of a named shape, such as `"Qwen2.5-3B"` or `"Qwen/Qwen2.5-3B"`, or of a `config.json` on disk.

    Raises:
        [`LayerPruneError`]: if there is none, or its architecture is not supported.
    """
    names, name = shape_names(), short_name(name_or_path)
    path = CONFIGS / f"{name}.json" if name in names else Path(name_or_path)
    if not path.is_file():
        raise LayerPruneError(
            f"there is no shape {name_or_path!r}; choose one of {', '.join(names)}, or a path to a config.json"
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        check_supported(config)
        plan_of(config)
    except LayerPruneError as error:
        raise LayerPruneError(f"{name_or_path}: {error}") from None
    except LOADING_ERRORS as error:
        raise LayerPruneError(f"{name_or_path} cannot be read as a config.json: {first_line(error)}") from error
    return config


def shape_plan(config: PretrainedConfig, num_layers: int | None = None, num_blocks: int | None = None) -> LayerPlan:
    """`num_layers` layers in `num_blocks` blocks: neighbours run in parallel pairs where there are fewer blocks.

    The pairs are one stretch in the later middle, as in arXiv 2502.02790: an eighth of the layers behind it stay
    single, or half of the single ones if those are fewer.

    Args:
        config ([`~transformers.PretrainedConfig`]): the shape; it says how many layers there are at most.
        num_layers (`int`, *optional*): layers; without it all that `config` has.
        num_blocks (`int`, *optional*): blocks; without it one per layer. Without either, the blocks of `config`.

    Raises:
        [`LayerPruneError`]: if there are too many layers, or blocks that pairs and single layers cannot make up.
    """
    own = plan_of(config)
    if num_layers is None and num_blocks is None:
        return own
    depth = len(own.layers)
    layers = depth if num_layers is None else num_layers
    if not 1 <= layers <= depth:
        raise LayerPruneError(f"num_layers={layers} is out of range; the shape has {depth} layers, choose 1..{depth}")
    blocks = layers if num_blocks is None else num_blocks
    least = (layers + 1) // 2
    if not least <= blocks <= layers:
        raise LayerPruneError(
            f"num_blocks={blocks} is out of range; {layers} layers, alone or in pairs, make {least}..{layers} blocks"
        )
    pairs = layers - blocks
    single = layers - 2 * pairs
    first = single - min(max(1, layers // 8), single // 2)  # layers in front of the pairs
    plan = LayerPlan.identity(layers)
    for layer in range(first, first + 2 * pairs, 2):
        plan = plan.parallelize(layer, layer + 1)
    return plan


def random_model(
    config: PretrainedConfig,
    num_layers: int | None = None,
    num_blocks: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """A model of the shape of `config` that computes finite nonsense as fast as a trained one computes sense.

    Args:
        config ([`~transformers.PretrainedConfig`]): the shape, of a supported family.
        num_layers (`int`, *optional*): layers; without it all that `config` has.
        num_blocks (`int`, *optional*): blocks that hold them, see [`shape_plan`].
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): dtype of the weights.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): where the weights are made.

    Returns:
        A plain model of that family, or a [`PrunedQwen2ForCausalLM`] where layers run in parallel.
    """
    check_supported(config)
    plan = shape_plan(config, num_layers, num_blocks)
    values = config.to_dict() | {"num_hidden_layers": plan.depth}
    if "layer_types" in values:
        values["layer_types"] = ["full_attention"] * plan.depth
    for key in ("model_type", "architectures", "auto_map", "layer_plan", "dtype"):
        values.pop(key, None)
    if plan.parallel_pairs:
        try:
            attention = PrunedQwen2Config.attention_of(config)
        except ValueError as error:
            raise LayerPruneError(str(error)) from None
        wanted = PrunedQwen2Config(**values | attention, layer_plan=plan.to_dict())
    else:
        wanted = architecture_of(config).config_class(**values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(wanted, dtype=dtype)
    rotary = type(model.base_model.rotary_emb)(model.config)  # its buffers are computed: `to_empty` would lose them
    model.to_empty(device=device)
    model.base_model.rotary_emb = rotary.to(device)
    model.tie_weights()
    _fill(model)
    return model.eval()


def random_models(
    config: PretrainedConfig,
    sizes: Sequence[tuple[int, int | None]],
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
) -> list[PreTrainedModel]:
    """One model per `(num_layers, num_blocks)`; what they have in common is one in memory. See [`random_model`]."""
    plans = [shape_plan(config, *size) for size in sizes]
    depth = max(len(plan.layers) for plan in plans)
    whole = random_model(config, depth, depth, dtype, device)
    return [apply_plan(whole, LayerPlan(plan.blocks, depth), share_weights=True) for plan in plans]


def _fill(model: PreTrainedModel) -> None:
    """Small random weights, norms of one. They are copies of one million numbers: drawing all would take minutes."""
    numbers = torch.empty(1_000_003, dtype=model.dtype, device=model.device).normal_(std=0.02)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1)
                continue
            for part in parameter.view(-1).split(len(numbers)):
                part.copy_(numbers[: len(part)])
