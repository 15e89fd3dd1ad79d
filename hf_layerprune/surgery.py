"""Apply a layer plan to a model: remove layers, run them in parallel, take parallel layers apart.

A student without parallel blocks stays what it was, a plain model of its teacher's family, so that stock transformers,
vLLM, SGLang and llama.cpp load it. Its `config.layer_plan` says which teacher layers it holds. Merging layers depends
on data, and is in `merging.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .architectures import architecture_of, check_supported
from .errors import LayerPruneError
from .models import PrunedQwen2Config, PrunedQwen2ForCausalLM
from .models.configuration_pruned_qwen2 import older_rope
from .models.modeling_pruned_qwen2 import adopt_weights, is_tied
from .plan import LayerPlan, layer_groups, layer_indices


def check_model(model: PreTrainedModel) -> None:
    """Raise [`LayerPruneError`] unless `model` is a causal language model of a supported family, without a wrapper."""
    if not isinstance(model, PreTrainedModel) or not hasattr(model, "lm_head"):
        raise LayerPruneError(
            f"{type(model).__name__} is not a plain causal language model; unwrap it, merge its adapters into it "
            "(merge_and_unload), or load one by name with hf_layerprune.load_model"
        )
    # PEFT puts its layers around those of the model in place: also the base of a `PeftModel` has them
    if getattr(model, "_hf_peft_config_loaded", False) or any(hasattr(m, "base_layer") for m in model.modules()):
        raise LayerPruneError("the model carries adapters; merge them into it first (PEFT's merge_and_unload)")
    check_supported(model.config)
    if (found := len(model.base_model.layers)) != model.config.num_hidden_layers:
        raise LayerPruneError(
            f"the model has {found} layers but its config says num_hidden_layers={model.config.num_hidden_layers}; "
            "take layers out with prune, or correct the config (layer_types too)"
        )


def plan_of(model: PreTrainedModel | PretrainedConfig) -> LayerPlan:
    """The plan a model carries in its config; the identity plan for a model that was never pruned."""
    config = getattr(model, "config", model)
    recorded = getattr(config, "layer_plan", None)
    if recorded is None:
        return LayerPlan.identity(config.num_hidden_layers)
    plan = LayerPlan.from_dict(recorded)
    if plan.parallel_pairs and config.model_type != PrunedQwen2Config.model_type:
        raise LayerPruneError(
            f"layer_plan in config.json has {plan.parallel_pairs[0]} in parallel, which a model of type "
            f"{config.model_type} cannot have; correct it, or list merged layers under 'merged'"
        )
    if plan.depth != config.num_hidden_layers:
        raise LayerPruneError(
            f"config.json records a plan of {plan.depth} blocks but num_hidden_layers={config.num_hidden_layers}"
        )
    return plan


def prune(model: PreTrainedModel, layers: Iterable[int], *, share_weights: bool = False) -> PreTrainedModel:
    """A new model without some layers; `model` is left untouched.

    Args:
        model ([`~transformers.PreTrainedModel`]): a causal language model of a supported family.
        layers (`Iterable[int]`):
            Teacher layer indices to remove, 0-based: layer 7 of a student that lacks layer 3 is the teacher's layer 7.
        share_weights: see [`apply_plan`].

    Returns:
        A model of the same class (a plain one if no parallel block is left), dtype, device and mode, its
        `config.layer_plan` set.

    Raises:
        [`LayerPruneError`]: for an unsupported architecture, a layer the model does not have, or no layer left.
    """
    check_model(model)
    plan = plan_of(model)
    for layer in layer_indices(layers):
        plan = plan.remove(layer)
    return apply_plan(model, plan, share_weights=share_weights)


def parallelize(
    model: PreTrainedModel, pairs: Iterable[Iterable[int]], *, share_weights: bool = False
) -> PrunedQwen2ForCausalLM:
    """A new model that runs some consecutive layers in parallel, without training; `model` is left untouched.

    Each pair becomes one layer of twice the width: both read the same input and their outputs are added, as in
    [Leveraging the True Depth of LLMs](https://huggingface.co/papers/2502.02790).

    Args:
        model ([`~transformers.PreTrainedModel`]): the model, possibly pruned or parallelized before.
        pairs (`Iterable[tuple[int, ...]]`):
            Teacher layer indices, 0-based. Each pair (or longer group) must be neighbours in `model`, and name all
            layers of a block that runs in parallel already.
        share_weights: see [`apply_plan`].

    Returns:
        [`PrunedQwen2ForCausalLM`] with `config.layer_plan` set.

    Raises:
        [`LayerPruneError`]: for an unsupported architecture, or layers that are not neighbours or not in the model.
    """
    check_model(model)
    return apply_plan(model, plan_of(model).with_pairs(pairs), share_weights=share_weights)


def unparallelize(model: PreTrainedModel, pairs: Iterable[Iterable[int]] | None = None) -> PreTrainedModel:
    """A new model that runs parallel layers one after the other again; `model` is left untouched.

    Args:
        model ([`PrunedQwen2ForCausalLM`]): the model, possibly healed since it was parallelized.
        pairs (`Iterable[tuple[int, ...]]`, *optional*): the parallel blocks to take apart; all by default.

    Returns:
        A plain model if no parallel block is left. The gains of norms stay folded into the projections that follow.
    """
    check_model(model)
    plan = plan_of(model)
    apart = set(plan.parallel_pairs)
    if pairs is not None:
        apart = {*layer_groups(pairs)}
    if unknown := sorted(apart - set(plan.parallel_pairs)):
        raise LayerPruneError(f"{unknown} are not parallel blocks; the model's are {list(plan.parallel_pairs)}")
    blocks: list[tuple[int, ...]] = []
    for block in plan.blocks:
        blocks += [(layer,) for layer in block] if block in apart else [block]
    separate = apply_plan(model, replace(plan, blocks=tuple(blocks)))
    if isinstance(separate, PrunedQwen2ForCausalLM) and not plan_of(separate).parallel_pairs:
        return to_plain(separate)
    return separate


def restore(
    student: PreTrainedModel, teacher: PreTrainedModel, layers: Iterable[int], *, share_weights: bool = False
) -> PreTrainedModel:
    """A new model: `student` with some of its teacher's own layers put back, without training.

    After [Boomerang Distillation](https://huggingface.co/papers/2510.05064): a healed student and its teacher give
    models of every depth between them.

    Args:
        student ([`~transformers.PreTrainedModel`]): a model that lacks some layers of `teacher`.
        teacher ([`~transformers.PreTrainedModel`]): the model it was made from, of single layers.
        layers (`Iterable[int]`):
            Teacher layer indices, 0-based. One that the student lacks is put in; one that it has, healed or repaired,
            becomes the teacher's own again. Name the layer before a gap too if it was repaired or healed to do the
            missing layers' work, and all layers of a parallel or merged block.
        share_weights: see [`apply_plan`]; here with both models.
    """
    check_made_from(student, teacher)
    plan, teacher_plan, back = plan_of(student), plan_of(teacher), {*layer_indices(layers)}
    if missing := sorted(back - {block[0] for block in teacher_plan.blocks if len(block) == 1}):
        raise LayerPruneError(
            f"layers {missing} are not single layers of the teacher; it has {list(teacher_plan.blocks)}"
        )
    kept = {b: layer for b, layer in zip(plan.blocks, student.base_model.layers, strict=True) if not back & {*b}}
    if apart := sorted(block for block in plan.blocks if back & {*block} and not {*block} <= back):
        raise LayerPruneError(f"layers {sorted(back)} take {list(apart[0])} apart, which are one block; name them all")
    blocks = sorted([*kept, *((layer,) for layer in back)])
    after = LayerPlan(blocks, plan.num_teacher_layers, [block for block in plan.merged if block in kept])
    restored = apply_plan(teacher, after.shape, share_weights=share_weights)
    if is_tied(restored) and not is_tied(student):
        restored.lm_head.weight = nn.Parameter(restored.lm_head.weight.detach(), requires_grad=False)
        restored.config.tie_word_embeddings = False
    restored.config.layer_plan = after.to_dict()
    for mine, theirs in _parameter_pairs(restored, student, kept):
        mine.data = theirs.detach().to(mine, copy=not share_weights)
    return restored


def _parameter_pairs(
    model: PreTrainedModel, other: PreTrainedModel, layers: Mapping[tuple[int, ...], nn.Module]
) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Parameters of `model` and of `other` that have the same place; of the layers of `other` only those given."""
    pairs = [(model.base_model.embed_tokens, other.base_model.embed_tokens)]
    pairs += [(model.base_model.norm, other.base_model.norm), (model.lm_head, other.lm_head)]
    blocks = zip(plan_of(model).blocks, model.base_model.layers, strict=True)
    pairs += [(layer, layers[block]) for block, layer in blocks if block in layers]
    for mine, theirs in pairs:
        yield from zip(mine.parameters(), theirs.parameters(), strict=False)


def check_in_memory(*models: PreTrainedModel) -> None:
    """Raise [`LayerPruneError`] if weights are on disk or are moved to the device when they are needed."""
    if any(parameter.is_meta for model in models for parameter in model.parameters()):
        raise LayerPruneError("a model is partly on disk or in CPU memory; load it whole, on one device")


def check_made_from(student: PreTrainedModel, teacher: PreTrainedModel, *, by_layers: bool = False) -> None:
    """Raise [`LayerPruneError`] unless both are in memory, and alike in all but the layers that the student lacks.

    With `by_layers` only the numbering of the layers must match; layers may be narrower.
    """
    names = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    found, names = [], names[:2] if by_layers else names
    for model in (student, teacher):
        check_model(model)
        check_in_memory(model)
        values = {"layers": plan_of(model).num_teacher_layers} | {n: getattr(model.config, n, None) for n in names}
        weights = () if by_layers else model.base_model.layers[0].named_parameters()
        found.append((values, {name for name, _ in weights}))
    (ours, weights), (theirs, others) = found
    differences = [f"{name} {ours[name]} and {theirs[name]}" for name in ours if ours[name] != theirs[name]]
    differences += [f"{name} in one of them only" for name in sorted(weights ^ others)]
    extra = sorted({*plan_of(student).layers} - {*plan_of(teacher).layers})
    differences += [f"layers {extra} in the student only"] if extra else []
    if differences:
        raise LayerPruneError(
            f"the student was not made from this teacher: {', '.join(differences)}; use the model it was pruned from"
        )


def apply_plan(model: PreTrainedModel, plan: LayerPlan, *, share_weights: bool = False) -> PreTrainedModel:
    """A new model with the layers of `model` rearranged into `plan`; `model` is left untouched.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Any model that holds the plan's layers, in whatever blocks; those that the plan merges, merged.
        plan ([`LayerPlan`]): the wanted blocks, in teacher layer indices.
        share_weights (`bool`, *optional*, defaults to `False`):
            Whether what is not rearranged shares memory with `model` instead of being copied. The parameters are
            objects of their own that do not require gradients.

    Returns:
        `model`'s class while its parallel blocks stay as they are; otherwise a plain model without parallel blocks,
        [`PrunedQwen2ForCausalLM`] with them.

    Raises:
        [`LayerPruneError`]: for an unsupported architecture, or a plan that `model` does not have the layers for.
    """
    check_model(model)
    current = plan_of(model)
    if plan.num_teacher_layers != current.num_teacher_layers:
        raise LayerPruneError(
            f"the plan is for a teacher of {plan.num_teacher_layers} layers, not of {current.num_teacher_layers}"
        )
    if new := sorted(set(plan.merged) - set(current.merged)):
        raise LayerPruneError(
            f"the plan merges layers {new} into one, which takes data: apply the rest of it, then call "
            f"merge(model, {new}, batches)"
        )
    plan.check_kept_whole(current.merged)
    if set(plan.blocks) <= set(current.blocks) and (plan.parallel_pairs or not current.parallel_pairs):
        return _keep_blocks(model, current, plan, share_weights)
    try:
        student = PrunedQwen2ForCausalLM.from_plain(model, plan)
    except ValueError as error:
        raise LayerPruneError(str(error)) from None
    student = student if plan.parallel_pairs else to_plain(student)
    if share_weights:
        return student.requires_grad_(False)
    copy_requires_grad(model, student)
    theirs = {parameter.data_ptr() for parameter in model.parameters()}
    unshare_parameters(parameter for parameter in student.parameters() if parameter.data_ptr() in theirs)
    return student


def copy_requires_grad(model: PreTrainedModel, student: PreTrainedModel) -> None:
    """Let what `student` shares with `model` require gradients as it does there, and new blocks if a weight of the
    layers they are made of does."""
    theirs = {parameter.data_ptr(): parameter.requires_grad for parameter in model.parameters()}
    blocks = zip(plan_of(model).blocks, model.base_model.layers, strict=True)
    trained = {n for block, part in blocks for n in block if any(p.requires_grad for p in part.parameters())}
    for block, part in zip(plan_of(student).blocks, student.base_model.layers, strict=True):
        for parameter in part.parameters():
            parameter.requires_grad_(theirs.get(parameter.data_ptr(), not trained.isdisjoint(block)))
    for part in (student.base_model.embed_tokens, student.base_model.norm, student.lm_head):
        for parameter in part.parameters():
            parameter.requires_grad_(theirs.get(parameter.data_ptr(), False))


def _keep_blocks(model: PreTrainedModel, plan: LayerPlan, wanted: LayerPlan, share_weights: bool) -> PreTrainedModel:
    kept = [position for position, block in enumerate(plan.blocks) if block in wanted.blocks]
    decoder = model.base_model
    # The memo tells deepcopy what not to copy: the removed layers and, if shared, the weights.
    memo: dict[int, object] = {
        id(layer): nn.Identity() for position, layer in enumerate(decoder.layers) if position not in kept
    }
    if share_weights:
        memo |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
        memo |= {id(buffer): buffer for buffer in model.buffers()}
    student = copy.deepcopy(model, memo)
    for module in student.modules():
        bound = getattr(vars(module).get("forward"), "__self__", None) is module and module is not student
        if not (bound or hasattr(module, "_hf_hook")):  # these are bound to the copy
            vars(module).pop("forward", None)  # put there by TRL or a user, it would go on to run the original's
            vars(module).pop("_original_forward", None)

    config, student_decoder = student.config, student.base_model
    student_decoder.layers = nn.ModuleList(student_decoder.layers[position] for position in kept)
    for position, layer in enumerate(student_decoder.layers):
        layer.self_attn.layer_idx = position  # the KV cache is indexed by it
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[position] for position in kept]
    if hasattr(config, "max_window_layers"):  # the number of first layers that never have a sliding window
        config.max_window_layers = sum(position < config.max_window_layers for position in kept)
    config.num_hidden_layers = len(kept)
    config.layer_plan = wanted.to_dict()
    vars(config).pop("auto_map", None)  # names code that is not saved; a class of remote code writes its own
    config.tie_word_embeddings = is_tied(student)
    if not isinstance(config, PrunedQwen2Config):  # which does this itself
        vars(config).update(older_rope(config))  # past the property that sets `rope_parameters`
    return student


def unshare_parameters(parameters: Iterable[nn.Parameter]) -> None:
    """Give every parameter memory of its own, so that training it changes no other model."""
    for parameter in parameters:
        parameter.data = parameter.data.clone()


def share_equal_weights(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Let every tensor of `student` that equals the teacher's, bit by bit, be the teacher's in memory."""
    layers = dict(zip(plan_of(teacher).blocks, teacher.base_model.layers, strict=True))
    for mine, theirs in _parameter_pairs(student, teacher, layers):
        if (mine.dtype, mine.device) == (theirs.dtype, theirs.device) and torch.equal(mine, theirs):
            mine.data = theirs.data


def to_plain(model: PrunedQwen2ForCausalLM) -> PreTrainedModel:
    """The same model (weights shared) as a plain one; it must not have parallel blocks."""
    architecture = architecture_of(model.config)
    ours, theirs = ({field.name for field in fields(kind)} for kind in (PrunedQwen2Config, architecture.config_class))
    left_out = (ours - theirs - {"layer_plan"}) | {"model_type", "architectures", "auto_map"}
    values = {key: value for key, value in model.config.to_dict().items() if key not in left_out}
    values |= {"tie_word_embeddings": is_tied(model), "attn_implementation": model.config._attn_implementation}
    config = architecture.config_class(**values)
    with torch.device("meta"):
        plain = architecture.model_class(config)
    adopt_weights(plain, model, model.state_dict())
    vars(config).update(older_rope(config))
    return plain
