"""The supported families of models: one row of a table each, with what differs between them.

A family is a dense decoder with Qwen2's layout: `model.base_model` has `embed_tokens`, `layers`, `norm` and
`rotary_emb`, and `model.lm_head` reads the output of `norm`. Removing layers, scoring, healing and measuring need no
more than this row. To run layers in parallel, a family also needs a row in `PLAIN_MODELS`, which is shipped with
checkpoints: its layers differ from Qwen2's only in the attention that row describes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from .errors import LayerPruneError
from .models import PLAIN_MODELS, PrunedQwen2Config


@dataclass(frozen=True)
class Architecture:
    """One family of models.

    Args:
        name (`str`): what its classes begin with: `"Llama"` of `LlamaForCausalLM`.
        model_type (`str`): what its `config.json` calls it.
        attention (`str`, *optional*): the part of a layer that has a place in the KV cache, its `layer_idx`.
        attention_output (`str`, *optional*): the projection of a layer that adds what its attention found.
        mlp_output (`str`, *optional*): the projection of a layer that adds what its MLP found.
        per_layer (`tuple[str, ...]`, *optional*): entries of the config that list something for every layer.
        sliding (`Callable`, *optional*): whether a config asks for sliding windows, where `layer_types` does not say.
    """

    name: str
    model_type: str
    attention: str = "self_attn"
    attention_output: str = "self_attn.o_proj"
    mlp_output: str = "mlp.down_proj"
    per_layer: tuple[str, ...] = ("layer_types",)
    sliding: Callable[[PretrainedConfig], bool] = lambda config: False

    @property
    def config_class(self) -> type[PretrainedConfig]:
        return CONFIG_MAPPING[self.model_type]

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return MODEL_FOR_CAUSAL_LM_MAPPING[self.config_class]


ARCHITECTURES = {
    row.model_type: row
    for row in (
        Architecture("Qwen2", "qwen2"),
        Architecture("Qwen3", "qwen3"),
        Architecture("Llama", "llama"),
        Architecture("Mistral", "mistral", sliding=lambda config: config.sliding_window is not None),
    )
}


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The family of a model; that of a PrunedQwen2 is the first whose layers are its blocks.

    Raises:
        [`LayerPruneError`]: if it is not supported.
    """
    if isinstance(config, PrunedQwen2Config) or config.model_type == PrunedQwen2Config.model_type:
        attention = {"attention_bias": config.attention_bias, "qk_norm": config.qk_norm}
        return next(ARCHITECTURES[kind] for kind, fields in PLAIN_MODELS.items() if fields == attention)
    if config.model_type not in ARCHITECTURES:
        names = ", ".join(row.name for row in ARCHITECTURES.values())
        raise LayerPruneError(
            f"model_type={config.model_type!r} is not supported; hf_layerprune works on dense decoders: {names}"
        )
    return ARCHITECTURES[config.model_type]


def check_supported(config: PretrainedConfig) -> None:
    """Raise [`LayerPruneError`] unless `config` is of a supported family, not quantized, with full attention only."""
    architecture = architecture_of(config)
    if quantized := getattr(config, "quantization_config", None):
        method = dict(quantized).get("quant_method", "quant_method is missing")
        raise LayerPruneError(
            f"this {architecture.name} model is quantized ({method}), which works for GGUF files only; use the "
            "checkpoint it was made from"
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in kinds or architecture.sliding(config):
        hint = "; load it with use_sliding_window=False" if getattr(config, "use_sliding_window", False) else ""
        raise LayerPruneError(
            f"this {architecture.name} model uses sliding-window attention (sliding_window={config.sliding_window}), "
            f"which is not supported{hint}"
        )
    if other := kinds - {"full_attention"}:
        raise LayerPruneError(
            f"this {architecture.name} model has layers of kind {', '.join(sorted(other))}; only full attention is "
            "supported"
        )


def keep_layers(config: PretrainedConfig, positions: Sequence[int]) -> None:
    """Make `config` that of a model which has only the layers at `positions`, in place."""
    for name in architecture_of(config).per_layer:
        if (entries := getattr(config, name, None)) is not None:
            setattr(config, name, [entries[position] for position in positions])
    if hasattr(config, "max_window_layers"):  # the number of first layers that never have a sliding window
        config.max_window_layers = sum(position < config.max_window_layers for position in positions)
    config.num_hidden_layers = len(positions)


def output_projections(model: PreTrainedModel, position: int) -> tuple[nn.Linear, nn.Linear]:
    """The projections of a block that add to the residual stream: of its attention, and of its MLP.

    Raises:
        [`LayerPruneError`]: if one of them has a bias; Qwen2's have none.
    """
    architecture, block = architecture_of(model.config), model.base_model.layers[position]
    attention, mlp = (block.get_submodule(name) for name in (architecture.attention_output, architecture.mlp_output))
    if attention.bias is not None or mlp.bias is not None:
        raise LayerPruneError(
            f"the output projections of this {architecture.name} model have biases; a repair has no place for them"
        )
    return attention, mlp
