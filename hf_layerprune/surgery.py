"""Apply a layer plan to a model: remove layers, and convert between plain Qwen2 and PrunedQwen2.

A student without parallel blocks stays what it was, a plain `Qwen2ForCausalLM`, so that stock transformers, vLLM,
SGLang and llama.cpp load it. Its `config.layer_plan` says which teacher layers it holds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from .errors import LayerPruneError
from .models import PrunedQwen2Config, PrunedQwen2ForCausalLM
from .plan import LayerPlan

SUPPORTED_MODEL_TYPES = ("qwen2", "pruned_qwen2")


def check_supported(config: PretrainedConfig) -> None:
    """Raise [`LayerPruneError`] unless `config` describes a dense Qwen2-family decoder with full attention."""
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise LayerPruneError(
            f"model_type={config.model_type!r} is not supported; hf_layerprune works on "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    if "sliding_attention" in (config.layer_types or []):
        raise LayerPruneError(
            "the model uses sliding-window attention, which is not supported; load it with use_sliding_window=False"
        )


def plan_of(model: PreTrainedModel | PretrainedConfig) -> LayerPlan:
    """The plan a model carries in its config; the identity plan for a model that was never pruned.

    Raises:
        [`LayerPruneError`]: if the recorded plan does not fit the model's depth.
    """
    config = getattr(model, "config", model)
    recorded = getattr(config, "layer_plan", None)
    if recorded is None:
        return LayerPlan.identity(config.num_hidden_layers)
    plan = LayerPlan.from_dict(recorded)
    if plan.depth != config.num_hidden_layers:
        raise LayerPruneError(
            f"config.json records a plan of {plan.depth} blocks but num_hidden_layers={config.num_hidden_layers}"
        )
    return plan


def prune(model: PreTrainedModel, layers: Iterable[int], *, share_weights: bool = False) -> PreTrainedModel:
    """A new model without some layers; `model` is left untouched.

    Args:
        model ([`~transformers.Qwen2ForCausalLM`] or [`PrunedQwen2ForCausalLM`]):
            The model to prune. One that was pruned before keeps its teacher's layer indices: removing layer 7 from a
            student that lacks layer 3 removes what was the teacher's layer 7.
        layers (`Iterable[int]`):
            Teacher layer indices to remove, 0-based.
        share_weights (`bool`, *optional*, defaults to `False`):
            Whether the student's parameters share memory with `model`'s instead of copying them. The parameters are
            distinct objects that do not require gradients; see [`unshare_parameters`].

    Returns:
        A model of the same class, dtype, device and mode, its `config.layer_plan` set.

    Raises:
        [`LayerPruneError`]: for an unsupported architecture, a layer the model does not have, or no layer left.
    """
    check_supported(model.config)
    plan, layers = plan_of(model), list(layers)
    if len(set(layers)) != len(layers):
        raise LayerPruneError(f"layers={layers} names a layer twice")
    wanted = plan
    for layer in layers:
        wanted = wanted.remove(layer)
    if any(len(block) > 1 and block not in wanted.blocks for block in plan.blocks):
        raise LayerPruneError(f"layers={layers} would break up a parallel block; remove whole blocks or none of one")
    return _keep_blocks(model, plan, wanted, share_weights)


def _keep_blocks(model: PreTrainedModel, plan: LayerPlan, wanted: LayerPlan, share_weights: bool) -> PreTrainedModel:
    kept = [position for position, block in enumerate(plan.blocks) if block in wanted.blocks]
    decoder = model.base_model
    # A memo filled beforehand tells deepcopy what not to copy: the removed layers and, if shared, the weights.
    memo: dict[int, object] = {
        id(layer): nn.Identity() for position, layer in enumerate(decoder.layers) if position not in kept
    }
    if share_weights:
        memo |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    student = copy.deepcopy(model, memo)

    config, student_decoder = student.config, student.base_model
    student_decoder.layers = nn.ModuleList(student_decoder.layers[position] for position in kept)
    for position, layer in enumerate(student_decoder.layers):
        layer.self_attn.layer_idx = position  # the KV cache is indexed by it
    config.max_window_layers = sum(position < config.max_window_layers for position in kept)
    config.layer_types = [config.layer_types[position] for position in kept]
    config.num_hidden_layers = len(kept)
    config.layer_plan = wanted.to_dict()
    return student


def unshare_parameters(parameters: Iterable[nn.Parameter]) -> None:
    """Give every parameter memory of its own, so that training it changes no other model."""
    for parameter in parameters:
        parameter.data = parameter.data.clone()


def to_pruned_qwen2(model: Qwen2ForCausalLM) -> PrunedQwen2ForCausalLM:
    """The same model as `PrunedQwen2ForCausalLM` (weights shared): bit-identical logits."""
    values = model.config.to_dict() | {"layer_plan": plan_of(model).to_dict()}
    return _rebuild(model, PrunedQwen2ForCausalLM, PrunedQwen2Config, values)


def to_qwen2(model: PrunedQwen2ForCausalLM) -> Qwen2ForCausalLM:
    """The same model as plain `Qwen2ForCausalLM` (weights shared), for a plan without parallel blocks.

    Raises:
        [`LayerPruneError`]: if the plan has parallel blocks, which plain Qwen2 cannot express.
    """
    if pairs := plan_of(model).parallel_pairs:
        raise LayerPruneError(f"the plan runs layers {list(pairs)} in parallel; plain Qwen2 cannot express that")
    return _rebuild(model, Qwen2ForCausalLM, Qwen2Config, model.config.to_dict())


def _rebuild(
    model: PreTrainedModel, model_class: type[PreTrainedModel], config_class: type[PretrainedConfig], values: dict
) -> PreTrainedModel:
    for key in ("model_type", "architectures", "auto_map"):
        values.pop(key, None)
    config = config_class(**values, attn_implementation=model.config._attn_implementation)
    with torch.device("meta"):
        rebuilt = model_class(config)
    rebuilt.load_state_dict(model.state_dict(), strict=True, assign=True)
    rebuilt.tie_weights()
    rebuilt.base_model.rotary_emb = copy.deepcopy(model.base_model.rotary_emb)  # its buffers are in no state dict
    rebuilt.generation_config = copy.deepcopy(model.generation_config)
    return rebuilt.train(model.training)
