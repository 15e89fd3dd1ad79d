"""Make a student ready for healing, and plain again afterwards."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedModel

from .._trl import restore_forward
from ..errors import LayerPruneError, NotANumber
from ..surgery import unshare_parameters


def lora_config(r: int | None, alpha: int = 32) -> Any:
    """The adapters `compress --lora_r` trains; `None` for none."""
    from peft import LoraConfig

    return None if r is None else LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def make_trainable(
    student: PreTrainedModel, blocks: list[int], everything: bool, peft_config: Any | None = None
) -> nn.Module:
    """Switch on the gradients of what healing trains, and give it memory of its own.

    Args:
        student ([`~transformers.PreTrainedModel`]): may share its weights with the teacher.
        blocks (`list[int]`): positions of the blocks to train.
        everything (`bool`): train all blocks, embeddings, norms and head.
        peft_config ([`~peft.PeftConfig`], *optional*): train adapters on `blocks` instead, and on nothing else.
    """
    in_blocks = [p for position in blocks for p in student.base_model.layers[position].parameters()]
    if peft_config is not None:
        unshare_parameters(in_blocks)  # merging the adapters changes them in place
        return _with_adapters(student, blocks, peft_config)
    trained = list(student.parameters()) if everything else in_blocks
    unshare_parameters(trained)
    for parameter in trained:
        parameter.requires_grad_(True)
    return student


def _with_adapters(student: PreTrainedModel, blocks: list[int], peft_config: Any) -> nn.Module:
    from peft import get_peft_model

    if not hasattr(peft_config, "layers_to_transform"):
        raise LayerPruneError(f"{type(peft_config).__name__} cannot be limited to layers; use LoRA")
    if peft_config.layers_to_transform is not None:
        raise LayerPruneError(
            "peft_config.layers_to_transform is set, but layers move as others are removed; say which layers to heal "
            "with trained_layers"
        )
    config = copy.deepcopy(peft_config)
    config.layers_to_transform = blocks
    if config.target_modules == "all-linear":  # PEFT would name each in full, and then ignore layers_to_transform
        parts = (part for position in blocks for part in student.base_model.layers[position].named_modules())
        names = {name.rsplit(".", 1)[-1] for name, part in parts if isinstance(part, nn.Linear)}
        config.target_modules = sorted(names)
    adapted = get_peft_model(student, config)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    for name in trained:
        if not any(f".layers.{position}." in name for position in blocks):
            raise LayerPruneError(
                f"peft_config trains {name}, outside the layers to heal; give target_modules as a list of module names"
            )
    return adapted


def round_weights(student: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round weights to the dtype they will be saved in; those that change get memory of their own."""
    for parameter in student.parameters():
        rounded = parameter.data.to(dtype).to(parameter.dtype)
        if not torch.equal(rounded, parameter.data):
            parameter.data = rounded


def make_plain(student: nn.Module, dtype: torch.dtype) -> PreTrainedModel:
    """The healed student as a plain model without gradients, its trained weights rounded to `dtype`.

    Those are the weights that will be saved, so they are what is measured. Raises [`NotANumber`] if one is not finite.
    """
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if is_peft_model(student):
        student = student.merge_and_unload()
        trained = list(student.parameters())
    restore_forward(student)
    with torch.no_grad():
        for parameter in trained:
            parameter.copy_(parameter.to(dtype))
            if not torch.isfinite(parameter).all():
                raise NotANumber(
                    f"healing left weights that are not numbers in {str(dtype).removeprefix('torch.')} after its last "
                    "step; lower the learning rate or train in higher precision"
                )
    return student.requires_grad_(False)
