"""What the healing of a round trains: the blocks, made ready before it and plain again afterwards."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedModel, get_scheduler

from .._trl import restore_forward
from ..errors import LayerPruneError, NotANumber
from ..plan import Edit, LayerPlan, edits_between
from ..surgery import unshare_parameters
from .config import IterativeLayerDistillConfig


def check_trained_layers(trained_layers: str | tuple[int, ...], plan: LayerPlan, name: str) -> None:
    """Raise [`LayerPruneError`] if `trained_layers` names layers that the model called `name` lacks."""
    named = trained_layers if isinstance(trained_layers, tuple) else ()
    if missing := [layer for layer in named if layer not in plan.layers]:
        raise LayerPruneError(f"trained_layers names {missing}; {name} has layers {list(plan.layers)}")


def trained_blocks(plan: LayerPlan, edits: list[Edit], trained_layers: str | tuple[int, ...]) -> list[int]:
    """Positions of the blocks whose weights healing changes; without `edits` all gaps of the student's plan count."""
    if trained_layers == "neighbours":
        return touched_blocks(plan, edits or edits_between(LayerPlan.identity(plan.num_teacher_layers), plan))
    if trained_layers == "all":
        return list(range(plan.depth))
    blocks = sorted({plan.position_of(layer) for layer in trained_layers if layer in plan.layers})
    if not blocks:
        raise LayerPruneError(f"trained_layers={list(trained_layers)}: all of them have been removed; name others")
    return blocks


def touched_blocks(plan: LayerPlan, edits: list[Edit]) -> list[int]:
    """Positions of the blocks next to the gap of each removal, and of the new blocks."""
    touched: set[int] = set()
    for edit in edits:
        if edit.kind != "remove":
            touched |= {plan.position_of(layer) for layer in edit.layers if layer in plan.layers}
        else:
            (layer,) = edit.layers
            before = sum(block[0] < layer for block in plan.blocks) - 1
            after = sum(block[-1] < layer for block in plan.blocks)
            touched |= {before, after} & set(range(plan.depth))
    return sorted(touched)


def lora_config(r: int | None, alpha: int = 32) -> Any:
    """The adapters `compress --lora_r` trains; `None` for none."""
    if r is None:
        return None
    from peft import LoraConfig

    return LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def make_trainable(
    student: PreTrainedModel, blocks: list[int], everything: bool, peft_config: Any | None = None
) -> nn.Module:
    """Switch on the gradients of `blocks`, or of everything, and give these weights memory of their own; with a
    `peft_config` train adapters on `blocks` instead, and nothing else."""
    # a model read from a file would not train its padding token, which often is its end token
    student.get_input_embeddings().padding_idx = None
    if any(getattr(part, "gradient_checkpointing", False) for part in student.modules()):
        # the reentrant kind gives layers after frozen ones no gradient
        enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    in_blocks = [p for position in blocks for p in student.base_model.layers[position].parameters()]
    trained = list(student.parameters()) if everything and peft_config is None else in_blocks
    unshare_parameters(trained)  # merging adapters changes them in place too
    if peft_config is not None:
        return _with_adapters(student, blocks, peft_config)
    for parameter in trained:
        parameter.requires_grad_(True)
    return student


def check_healing(model: PreTrainedModel, args: IterativeLayerDistillConfig, peft_config: Any | None) -> None:
    """Raise an error unless the adapters and the schedule of a healing can be made, and the weights be trained:
    DeepSpeed alone keeps those of float16 in float32 too."""
    if peft_config is not None:
        if getattr(peft_config, "bias", "none") == "all" and args.trained_layers != "all":
            raise LayerPruneError(
                "bias='all' trains the biases of every layer; set bias='lora_only', or trained_layers='all'"
            )
        with torch.device("meta"):
            empty = type(model)(copy.deepcopy(model.config))
        _check_targets(empty, getattr(peft_config, "target_modules", None))
        with suppress(RuntimeError):  # of those that begin with values computed from the weights
            _with_adapters(empty, list(range(len(empty.base_model.layers))), peft_config)
        if getattr(peft_config, "target_modules", ()) is None and "parallelize" in args.edits:
            raise LayerPruneError(
                "PEFT has no target_modules for layers that run in parallel; name them, such as q_proj and v_proj"
            )
    elif model.dtype == torch.float16 and args.deepspeed_plugin is None:
        raise LayerPruneError(
            "the model is in float16, which training turns into NaN; load it in float32 or bfloat16, or train adapters"
        )
    nothing = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    try:
        get_scheduler(args.lr_scheduler_type, nothing, 1, 2, args.lr_scheduler_kwargs)
    except TypeError as error:
        raise LayerPruneError(f"lr_scheduler_kwargs={args.lr_scheduler_kwargs}: {error}") from error


def check_optimizer(made_of: tuple[Any, Any]) -> None:
    """Make an optimizer of its class and options, for no weights of a model: it raises what it refuses."""
    kind, options = made_of
    if not {"params", "optimizer_dict", "model"} & options.keys():  # with which it brings the weights itself
        kind([nn.Parameter(torch.zeros(1))], **options)


def _check_targets(model: PreTrainedModel, names: Any) -> None:
    """Raise [`LayerPruneError`] if `target_modules` names what no layer has, such as the head: adapters are put on
    layers, and PEFT passes over names that it does not find as long as it finds one."""
    if names is None or isinstance(names, str):
        return
    found = [f".{name}" for name, _ in model.named_modules() if ".layers." in name]
    wrong = sorted(name for name in names if not any(full.endswith(f".{name}") for full in found))
    if wrong and len(wrong) < len(names):  # of none that is found it says so itself
        raise LayerPruneError(
            f"target_modules names {', '.join(wrong)}, which the layers do not have; modules_to_save trains the head"
        )


def _with_adapters(student: PreTrainedModel, blocks: list[int], peft_config: Any) -> nn.Module:
    from peft import get_peft_model

    if getattr(peft_config, "layers_to_transform", ()) is not None:
        raise LayerPruneError(
            f"a {type(peft_config).__name__} must support layers_to_transform; leave it unset, and set trained_layers"
        )
    changes: dict[str, Any] = {"layers_to_transform": blocks}
    if peft_config.target_modules == "all-linear":  # PEFT would name each in full, and ignore layers_to_transform
        parts = (part for position in blocks for part in student.base_model.layers[position].named_modules())
        names = {name.rsplit(".", 1)[-1] for name, part in parts if isinstance(part, nn.Linear)}
        changes["target_modules"] = sorted(names)
    return get_peft_model(student, replace(peft_config, **changes))


def cast_weights(student: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast weights to the dtype they will be saved in, and back; those that change get memory of their own."""
    for parameter in student.parameters():
        rounded = parameter.data.to(dtype).to(parameter.dtype)
        if not torch.equal(rounded, parameter.data):
            parameter.data = rounded


@torch.no_grad()
def fold_adapters(student: nn.Module, dtype: torch.dtype) -> PreTrainedModel:
    """Merge adapters into the healed student, and cast its trained weights to `dtype`, in which they will be saved.

    The result is a plain model without gradients. Raises [`NotANumber`] if a weight is not finite.
    """
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if is_peft_model(student):
        student = student.merge_and_unload()
        trained = list(student.parameters())
    restore_forward(student)
    for parameter in trained:
        parameter.copy_(parameter.to(dtype))
        if not torch.isfinite(parameter).all():
            raise NotANumber(f"healing left NaN in {dtype}; lower learning_rate or train in higher precision")
    return student.requires_grad_(False)
