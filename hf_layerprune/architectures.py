"""The supported families of models: one row of a table each, with what differs between them.

A family is a dense decoder with Qwen2's layout: `model.base_model` has `embed_tokens`, `layers`, `norm` and
`rotary_emb`, and `model.lm_head` reads the output of `norm`. Removing layers, scoring, healing and measuring need no
more than this row. To run layers in parallel, a family also needs a row in `PLAIN_MODELS`, which is shipped with
checkpoints: its layers differ from Qwen2's only in the attention that row describes.
"""

from __future__ import annotations

from collections.abc import Callable
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
        mlp_output (`str`, *optional*): the projection of a layer that adds what its MLP found.
        sliding (`Callable`, *optional*): whether a config asks for sliding windows, where `layer_types` does not say.
    """

    name: str
    model_type: str
    mlp_output: str = "mlp.down_proj"
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
    """The family of a model, if it is supported; that of a PrunedQwen2 is the first whose layers are its blocks."""
    if isinstance(config, PrunedQwen2Config) or config.model_type == PrunedQwen2Config.model_type:
        attention = {"attention_bias": config.attention_bias, "qk_norm": config.qk_norm}
        return next(ARCHITECTURES[kind] for kind, fields in PLAIN_MODELS.items() if fields == attention)
    if config.model_type not in ARCHITECTURES:
        names = ", ".join(row.name for row in ARCHITECTURES.values())
        raise LayerPruneError(f"model_type={config.model_type!r} is not supported; use a dense decoder: {names}")
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
        off = '"use_sliding_window": false' if hasattr(config, "use_sliding_window") else '"sliding_window": null'
        raise LayerPruneError(
            f"this {architecture.name} model uses sliding-window attention (sliding_window={config.sliding_window}), "
            f"which is not supported; for full attention write {off} into its config.json, and remove layer_types"
        )
    if other := kinds - {"full_attention"}:
        raise LayerPruneError(
            f"this {architecture.name} model has layers of kind {', '.join(sorted(other))}; only full attention is "
            "supported"
        )


def check_parallel(config: PretrainedConfig) -> None:
    """Raise [`LayerPruneError`] unless layers of a model of `config` can run in parallel."""
    try:
        PrunedQwen2Config.attention_of(config)
    except ValueError as error:
        raise LayerPruneError(f"layers of this model cannot run in parallel or be merged: {error}") from None


def mlp_output(model: PreTrainedModel, position: int) -> nn.Linear:
    """The projection of a block that adds what its MLP found to the residual stream."""
    return model.base_model.layers[position].get_submodule(architecture_of(model.config).mlp_output)
