"""The same function in another family's form: Llama as Qwen2 with biases of zero, and back.

Families differ in how attention begins, see `PLAIN_MODELS`; where one form holds all that another has, the conversion
is exact. No weight is changed or copied.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .architectures import ARCHITECTURES, architecture_of, check_supported
from .errors import LayerPruneError
from .models import PLAIN_MODELS, PrunedQwen2Config, PrunedQwen2ForCausalLM
from .surgery import plan_of, rebuilt_as, to_pruned_qwen2

FORMS = (*PLAIN_MODELS, PrunedQwen2Config.model_type)
"""What a model can be converted to."""
BIASED = ("q_proj", "k_proj", "v_proj")


def convert(model: PreTrainedModel, to: str | None = None) -> PreTrainedModel:
    """A new model that computes what `model` does, in the form of another family; weights are shared with `model`.

    Args:
        model ([`~transformers.PreTrainedModel`]): a causal language model without parallel blocks.
        to (`str`, *optional*):
            `model_type` of the result: `"qwen2"`, `"qwen3"`, `"llama"`, `"mistral"` or `"pruned_qwen2"`. By default
            `"qwen2"`; for a PrunedQwen2 the plain model whose layers its blocks are.

    Returns:
        The model; its `config.layer_plan` is that of `model`, if it has one.

    Raises:
        [`LayerPruneError`]: if the model is not supported, or has something that the other form has no place for:
            layers in parallel, norms of queries and keys, or biases that are not zero.
    """
    check_supported(model.config)
    name, kind = architecture_of(model.config).name, model.config.model_type
    if pairs := plan_of(model).parallel_pairs:
        raise LayerPruneError(
            f"the model runs layers {list(pairs)} in parallel, which only {PrunedQwen2Config.model_type} can express"
        )
    if to is None:
        to = architecture_of(model.config).model_type if kind == PrunedQwen2Config.model_type else "qwen2"
    if to not in FORMS:
        raise LayerPruneError(f"to={to!r} is no form a model can be converted to; choose one of {', '.join(FORMS)}")
    if to == kind:
        raise LayerPruneError(f"the model is of model_type={kind!r} already; there is nothing to convert")
    blocks = model if isinstance(model, PrunedQwen2ForCausalLM) else to_pruned_qwen2(model)
    if to == PrunedQwen2Config.model_type:
        return blocks
    if blocks.config.qk_norm != PLAIN_MODELS[to]["qk_norm"]:
        has, lacks = (name, ARCHITECTURES[to].name)[:: 1 if blocks.config.qk_norm else -1]
        raise LayerPruneError(f"{has} normalises queries and keys, {lacks} does not: neither can express the other")
    tensors = _with_biases(blocks, PLAIN_MODELS[to]["attention_bias"], to)
    converted = rebuilt_as(ARCHITECTURES[to], blocks, tensors)
    converted.config.converted_from = kind
    return converted


def _with_biases(model: PrunedQwen2ForCausalLM, wanted: bool, to: str) -> dict[str, torch.Tensor]:
    """The tensors of `model` with biases of attention, zero where it has none, or without them."""
    tensors = model.state_dict()
    if wanted == model.config.attention_bias:
        return tensors
    weights = {key: value for key, value in tensors.items() if key.endswith(tuple(f"{n}.weight" for n in BIASED))}
    for key, weight in weights.items():
        bias = key.removesuffix("weight") + "bias"
        if wanted:
            tensors[bias] = weight.new_zeros(len(weight))
        elif tensors.pop(bias).any():
            raise LayerPruneError(f"{bias} is not zero, and {ARCHITECTURES[to].name} has no biases there")
    return tensors
