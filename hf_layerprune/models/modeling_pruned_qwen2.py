"""PrunedQwen2: Qwen2 with one decoder layer per block of a layer plan, as wide as the block has teacher layers.

Layers a and b that run in parallel, each with its own norms N1, N2, attention A and MLP F
(https://huggingface.co/papers/2502.02790),

    y = x + A_a(N1_a(x)) + A_b(N1_b(x))
    z = y + F_a(N2_a(y)) + F_b(N2_b(y))

are exactly one Qwen2 layer: both norms of a kind see the same vector, so each gain folds into the projections that
follow, and what is left is one layer with the heads and the neurons of both. If queries and keys are normalised, as in
Qwen3, each head keeps the gain of the layer it is from.

This file is shipped inside checkpoints: it imports torch, transformers, its configuration and the
standard library.
"""

import re
from copy import copy, deepcopy

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from .configuration_pruned_qwen2 import PLAIN_MODELS, PrunedQwen2Config, checked_plan, plan_in, width

# Rows of the first kind of projection are heads or neurons, and read what the norm gives; columns of the second are.
INPUT_PROJECTIONS = {
    "input_layernorm.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm.weight": ("mlp.gate_proj", "mlp.up_proj"),
}
OUTPUT_PROJECTIONS = ("self_attn.o_proj", "mlp.down_proj")
HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")  # (D,) of a layer, (n, D) of a block of n layers


def join_layers(layers):
    """The tensors of one block that computes `layers` in parallel: `list[dict[str, Tensor]] -> dict[str, Tensor]`.

    Rows of input projections, with the gains `(H,)` folded in in float32, and of their biases are stacked, columns of
    output projections are put side by side, the gains become ones, and gains `(D,)` of heads become `(layers, D)`.
    Layers may be blocks of several layers themselves.
    """
    if len(layers) == 1:
        return layers[0]
    joined = {}
    for norm, projections in INPUT_PROJECTIONS.items():
        joined[norm] = torch.ones_like(layers[0][norm])
        for name in projections:
            weights = [layer[f"{name}.weight"] for layer in layers]
            folded = [(w.float() * layer[norm].float()).to(w.dtype) for w, layer in zip(weights, layers, strict=True)]
            joined[f"{name}.weight"] = torch.cat(folded)
            if f"{name}.bias" in layers[0]:
                joined[f"{name}.bias"] = torch.cat([layer[f"{name}.bias"] for layer in layers])
    for name in OUTPUT_PROJECTIONS:
        joined[f"{name}.weight"] = torch.cat([layer[f"{name}.weight"] for layer in layers], dim=1)
    for name in HEAD_NORMS:
        if name in layers[0]:
            joined[name] = torch.cat([layer[name].view(-1, layer[name].shape[-1]) for layer in layers])
    if unknown := set(layers[0]) - set(joined):
        raise ValueError(f"tensors {sorted(unknown)} of a layer have no place in a block of several layers")
    return joined


def split_layer(tensors, width):
    """The layers that a block of `width` layers was joined of, `join_layers` backwards: a list of `dict[str, Tensor]`.

    Each gets the gains of the block, and its own share of all else.
    """
    if width == 1:
        return [tensors]
    layers = [{} for _ in range(width)]
    for name, tensor in tensors.items():
        if name in INPUT_PROJECTIONS:
            pieces = [tensor] * width
        elif name in HEAD_NORMS:
            pieces = tensor.unbind()
        else:
            pieces = tensor.chunk(width, dim=int(name.removesuffix(".weight") in OUTPUT_PROJECTIONS))
        for layer, piece in zip(layers, pieces, strict=True):
            layer[name] = piece.clone()
    return layers


def rearrange(state_dict, blocks, wanted):
    """The tensors of a model with the layers of `blocks` for one with those of `wanted`; what both have is shared.

    `state_dict` names tensors as `[model.]layers.<block>.<name>`; both plans are lists of lists of layers.
    """
    layers, result = {}, {}
    for name, tensor in state_dict.items():
        match = re.fullmatch(r"(.*\blayers\.)(\d+)\.(.+)", name)
        if match is None:
            result[name] = tensor
        else:
            prefix = match[1]
            layers.setdefault(int(match[2]), {})[match[3]] = tensor
    had = {tuple(block): layers[position] for position, block in enumerate(blocks)}
    parts = {}
    kept, needed = {tuple(block) for block in wanted}, {layer for block in wanted for layer in block}
    for block, tensors in had.items():
        if block not in kept and not needed.isdisjoint(block):
            parts |= zip(block, split_layer(tensors, len(block)), strict=True)
    for position, block in enumerate(wanted):
        tensors = had.get(tuple(block)) or join_layers([parts[layer] for layer in block])
        result |= {f"{prefix}{position}.{name}": tensor for name, tensor in tensors.items()}
    return result


def is_tied(model):
    """Whether the language-model head of `model` is its embedding, whatever its config says."""
    head = model.get_output_embeddings()
    if head is None:
        return model.config.tie_word_embeddings
    return getattr(head, "weight", None) is model.get_input_embeddings().weight  # a quantized head may have none


def adopt_weights(rebuilt, model, tensors):
    """Fill `rebuilt`, made on the meta device, with `tensors` and with all that `model` has besides weights."""
    rebuilt.load_state_dict(tensors, strict=True, assign=True)
    rebuilt.tie_weights()
    rotary = model.base_model.rotary_emb  # its buffers are in no state dict
    # Cloned here: a deep copy of a fake tensor brings a fake mode of its own, and crashes Python.
    rebuilt.base_model.rotary_emb = deepcopy(rotary, {id(buffer): buffer.clone() for buffer in rotary.buffers()})
    if model.can_generate():
        rebuilt.generation_config = deepcopy(model.generation_config)
    rebuilt.train(model.training)


class HeadGroupRMSNorm(nn.Module):
    """RMSNorm of every head, where each of `width` equal groups of neighbouring heads has a gain of its own."""

    def __init__(self, width, heads, head_dim, eps, attention):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, head_dim))
        self.heads, self.variance_epsilon = heads, eps
        self.attention = (attention,)  # in a tuple: it holds this norm, not the other way round

    def forward(self, hidden_states):  # (B, T, heads, D)
        gain = self.weight.repeat_interleave(self.heads // len(self.weight), dim=0)
        here = hidden_states.shape[-2]
        if here != self.heads:  # before the norm, so that vLLM does not take this for an RMSNorm with a single gain
            first = self.first_head(here)
            gain = gain[first : first + here]
        states = hidden_states.float()
        states = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return gain * states.to(hidden_states.dtype)

    def first_head(self, here):
        """The first of the heads that this process has, `here` in number, read from how its weights are split."""
        output = self.attention[0].o_proj  # whose input are the heads
        rank, size = getattr(output, "tp_rank", 0), getattr(output, "tp_size", 1)  # as vLLM's layers know it
        for dimension, placement in enumerate(getattr(output.weight, "placements", ())):  # of a DTensor
            if placement.is_shard(1):
                mesh = output.weight.device_mesh
                rank, size = mesh.get_coordinate()[dimension], mesh.size(dimension)
        if here != max(self.heads // size, 1):
            raise ValueError(f"{here} of {self.heads} heads are here, but o_proj is split over {size} processes")
        return rank * self.heads // size


class PrunedQwen2DecoderLayer(Qwen2DecoderLayer):
    """One block: `n` teacher layers in parallel are one layer with `n` times the heads and neurons."""

    def __init__(self, config: PrunedQwen2Config, layer_idx: int):
        block = config.per_layer_config[layer_idx]
        super().__init__(block, layer_idx)
        if config.qk_norm:
            self.self_attn = Qwen3Attention(block, layer_idx)
            if (times := width(config.layer_plan, layer_idx)) > 1:
                shape = (block.head_dim, block.rms_norm_eps, self.self_attn)
                self.self_attn.q_norm = HeadGroupRMSNorm(times, block.num_attention_heads, *shape)
                self.self_attn.k_norm = HeadGroupRMSNorm(times, block.num_key_value_heads, *shape)
        elif not config.attention_bias:
            for projection in (self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj):
                projection.bias = None
        self.self_attn.config = config  # one shared object, so that `set_attn_implementation` reaches every block


def checked(load, name, *args, **kwargs):
    """A model and its loading info, or a `ValueError` that names the tensors that do not fit."""
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # they are reported here, by name
    model, info = load(name, *args, **kwargs)
    wrong = [f"{tensor} is missing" for tensor in sorted(info["missing_keys"])]
    for tensor, found, expected in sorted(info["mismatched_keys"]):
        wrong.append(f"{tensor} has shape {tuple(found)} instead of {tuple(expected)}")
    layers = sorted(tensor for tensor in info["unexpected_keys"] if re.search(r"\blayers\.\d+\.", tensor))
    wrong += [f"{tensor} belongs to no block" for tensor in layers]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        depth = model.config.num_hidden_layers
        raise ValueError(f"{name} does not fit its plan of {depth} blocks: {', '.join(wrong[:5])}{more}")
    return model, info


class PrunedQwen2Loading:
    """`from_pretrained` that leaves no tensor random and can rearrange the layers of the checkpoint it reads."""

    _can_record_outputs = {
        "hidden_states": PrunedQwen2DecoderLayer,
        "attentions": [Qwen2Attention, Qwen3Attention],
    }

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, layer_plan=None, **kwargs):
        r"""
        Load a checkpoint of PrunedQwen2, or of a plain model whose layers its blocks can hold.

        Args:
            layer_plan (`dict` or `LayerPlan`, *optional*):
                Build this plan from the checkpoint's weights: layers it does not name are left out, those of one
                block run in parallel. By default the plan recorded in the checkpoint.

        Raises:
            `ValueError`: if the checkpoint does not fit its plan, naming the tensors, or lacks layers of `layer_plan`.
        """
        with_info = kwargs.pop("output_loading_info", False)
        given = getattr(kwargs.get("config"), "layer_plan", None)
        recorded = {}
        if pretrained_model_name_or_path is not None:
            hub = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            recorded, _ = PrunedQwen2Config.get_config_dict(
                pretrained_model_name_or_path, **{key: kwargs[key] for key in hub if key in kwargs}
            )
        if layer_plan is None and given is not None and given != recorded.get("layer_plan", given):
            layer_plan = given  # Auto classes put the argument into the config, whatever the weights are
            kwargs["config"] = config = copy(kwargs["config"])
            for name in {"layer_plan", "num_hidden_layers", "layer_types", "max_window_layers"} & recorded.keys():
                setattr(config, name, recorded[name])  # Llama's has only the first two
        kind = recorded.get("model_type")
        if layer_plan is None and kind in PLAIN_MODELS and kind != "qwen2":  # whose config is not PrunedQwen2's
            blocks = [[layer] for layer in range(recorded["num_hidden_layers"])]
            layer_plan = recorded.get("layer_plan") or {"num_teacher_layers": len(blocks), "blocks": blocks}
        if layer_plan is None:
            model, info = checked(super().from_pretrained, pretrained_model_name_or_path, *model_args, **kwargs)
            model.config.tie_word_embeddings = is_tied(model)
        else:
            checked_plan(layer_plan)
            for name in ("tp_plan", "distributed_config", "device_mesh", "quantization_config"):
                if kwargs.get(name) is not None:
                    raise ValueError(f"layer_plan and {name} do not go together; save the model with its plan first")
            loaders = dict.fromkeys(PLAIN_MODELS, cls.plain_class.from_pretrained)
            loaders["pruned_qwen2"] = super().from_pretrained
            if kind not in loaders:
                raise ValueError(f"model_type={kind!r}; layer_plan works on {', '.join(loaders)}")
            source, info = checked(loaders[kind], pretrained_model_name_or_path, *model_args, **kwargs)
            model = cls.from_plain(source, layer_plan)
        return (model, info) if with_info else model

    @classmethod
    def from_plain(cls, model, layer_plan):
        """`model`, which stays as it is, with its layers rearranged into `layer_plan`, a `dict` or `LayerPlan`.

        Tensors that are not rearranged share memory with `model`'s.

        Raises:
            `ValueError`: if the plan does not fit `model`; if that is of a kind whose layers cannot be rearranged,
                quantized, carries adapters, or is spread over several devices.
        """
        config = PrunedQwen2Config.from_plain(model.config, layer_plan)
        config.tie_word_embeddings = is_tied(model)
        if getattr(model.config, "quantization_config", None) is not None:
            raise ValueError("the model is quantized; rearrange the original and quantize the result")
        if len(devices := {parameter.device for parameter in model.parameters()}) > 1:
            raise ValueError(f"the model is spread over {len(devices)} devices or is offloaded; load it on one")
        with torch.device("meta"):
            rebuilt = cls(config)
        names, given = ({re.sub(r"\d+", "", name) for name in one.state_dict()} for one in (rebuilt, model))
        if other := sorted(given ^ names):
            raise ValueError(f"the model carries adapters or a wrapper ({other[0]}); merge or unwrap them first")
        tensors = rearrange(model.state_dict(), plan_in(model.config)["blocks"], config.layer_plan["blocks"])
        adopt_weights(rebuilt, model, tensors)
        return rebuilt


class PrunedQwen2Model(PrunedQwen2Loading, Qwen2Model):
    """The decoder of [`PrunedQwen2ForCausalLM`]."""

    config_class = PrunedQwen2Config
    plain_class = AutoModel
    _no_split_modules = ["PrunedQwen2DecoderLayer"]

    def __init__(self, config: PrunedQwen2Config):
        super().__init__(config)  # its layers are thrown away; repeating what else it does would tie us to one version
        self.layers = nn.ModuleList(PrunedQwen2DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()


class PrunedQwen2ForCausalLM(PrunedQwen2Loading, Qwen2ForCausalLM):
    """A causal language model that runs some layers of a Qwen2, Qwen3, Llama or Mistral in parallel.

    Only a plan with parallel blocks needs it. A student from which layers were only removed stays a plain model of its
    teacher's family, and loads as such.
    """

    config_class = PrunedQwen2Config
    plain_class = AutoModelForCausalLM
    _no_split_modules = ["PrunedQwen2DecoderLayer"]

    def __init__(self, config: PrunedQwen2Config):
        super().__init__(config)
        self.model = PrunedQwen2Model(config)
        self.post_init()


__all__ = ["PrunedQwen2ForCausalLM", "PrunedQwen2Model"]
