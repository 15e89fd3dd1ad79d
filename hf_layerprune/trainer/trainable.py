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
    """Switch on the gradients of what healing trains, in memory of its own.

    Args:
        student ([`~transformers.PreTrainedModel`]): may share its weights with the teacher.
        blocks (`list[int]`): positions of the blocks to train.
        everything (`bool`): train embeddings, norms and head as well.
        peft_config ([`~peft.PeftConfig`], *optional*): train adapters on `blocks` instead.

    Raises:
        [`LayerPruneError`]: if the adapters would sit on other layers than `blocks`.
    """
    if peft_config is not None:
        return _add_adapters(student, blocks, peft_config)
    if everything:
        trained = list(student.parameters())
    else:
        trained = [p for position in blocks for p in student.base_model.layers[position].parameters()]
    unshare_parameters(trained)
    for parameter in trained:
        parameter.requires_grad_(True)
    return student


def _add_adapters(student: PreTrainedModel, blocks: list[int], peft_config: Any) -> nn.Module:
    from peft import get_peft_model

    if getattr(peft_config, "layers_to_transform", None) is not None:
        raise LayerPruneError(
            "peft_config.layers_to_transform is set, but layers move as others are removed; say which layers to heal "
            "with trained_layers"
        )
    if not hasattr(peft_config, "layers_to_transform"):
        raise LayerPruneError(f"{type(peft_config).__name__} cannot be limited to layers; use LoRA")
    config = copy.deepcopy(peft_config)
    config.layers_to_transform = blocks
    layers = student.base_model.layers
    if config.target_modules == "all-linear":  # PEFT would name each in full, and then not look at the layers
        parts = (part for position in blocks for part in layers[position].named_modules())
        config.target_modules = sorted(
            {name.rsplit(".", 1)[-1] for name, part in parts if isinstance(part, nn.Linear)}
        )
    unshare_parameters(
        p for position in blocks for p in layers[position].parameters()
    )  # merging changes them in place
    adapted = get_peft_model(student, config)
    allowed = tuple(f".layers.{position}." for position in blocks)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and not any(part in name for part in allowed):
            raise LayerPruneError(
                f"peft_config puts an adapter on {name}, outside the layers to heal; give target_modules as a list of "
                "module names"
            )
    return adapted


def round_weights(student: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round weights to the dtype they will be saved in, where they lose by it, in memory of their own."""
    for parameter in student.parameters():
        rounded = parameter.data.to(dtype).to(parameter.dtype)
        if not torch.equal(rounded, parameter.data):
            parameter.data = rounded


def make_plain(student: nn.Module, dtype: torch.dtype) -> PreTrainedModel:
    """The healed student as a plain model without gradients, its trained weights rounded to `dtype`.

    Those are the weights that will be saved, so they are what is measured.

    Raises:
        [`NotANumber`]: if a weight is no number any more, in `dtype`.
    """
    trained = None if is_peft_model(student) else [p for p in student.parameters() if p.requires_grad]
    student = student.merge_and_unload() if is_peft_model(student) else student
    restore_forward(student)
    with torch.no_grad():
        for parameter in student.parameters() if trained is None else trained:
            parameter.copy_(parameter.to(dtype))
            if not torch.isfinite(parameter).all():
                raise NotANumber(
                    f"healing left weights that are no numbers in {str(dtype).removeprefix('torch.')} after its last "
                    "step; lower the learning rate or train in higher precision"
                )
    return student.requires_grad_(False)
