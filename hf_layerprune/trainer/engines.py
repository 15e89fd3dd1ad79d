"""Engines that split a model over processes, FSDP2 and DeepSpeed ZeRO, and the way back to a whole student.

Only a healing runs inside an engine. Scoring, evaluation and saving work on a whole student, the same on every
process: it is put together when a healing ends, and wrapped anew in the next round.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DynamoBackend, broadcast_object_list, is_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..errors import LayerPruneError

WRAPPER = "_checkpoint_wrapped_module."  # what FSDP's own activation checkpointing puts into names


def splits_model(accelerator: Accelerator) -> bool:
    """Whether the processes may hold parts of a model's weights or optimizer states instead of all of them."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def check_engine(accelerator: Accelerator, args: Any) -> None:
    """Raise [`LayerPruneError`] if a run cannot work in the engine it was launched with."""
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise LayerPruneError("FSDP1 flattens weights that are trained with those that are not; set fsdp_version: 2")
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:  # accelerate would also remove a DDP wrapper
        raise LayerPruneError("torch_compile (--dynamo_backend) compiles a whole model; set compile_layers instead")
    needs_whole = ["eval_strategy"] if args.eval_strategy != "no" else []
    needs_whole += [name for name in ("compile_layers", "on_policy_steps") if getattr(args, name)]
    if splits_model(accelerator) and needs_whole:
        raise LayerPruneError(
            f"{' and '.join(needs_whole)} cannot work where FSDP or DeepSpeed splits the student; leave either out "
            "(every round is measured before and after its healing anyway)"
        )


def autocast(accelerator: Accelerator) -> Any:
    """Mixed precision for student and teacher alike. DeepSpeed casts the student's weights only, and switches off
    within its forward pass what is switched on around it."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    if accelerator.distributed_type != DistributedType.DEEPSPEED or dtype is None:
        return accelerator.autocast()
    return torch.autocast(accelerator.device.type, dtype)


def outline(student: nn.Module) -> nn.Module:
    """Copy `student` with its frozen weights shared, and empty tensors, for [`fill_outline`], as its trained ones."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in student.buffers()}
    for parameter in student.parameters():
        data = parameter.new_empty(0) if parameter.requires_grad else parameter.detach()
        memo[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
    return copy.deepcopy(student, memo)


def without_adapters(student: nn.Module) -> PreTrainedModel:
    """The model that adapters were put on; a plain model as it is."""
    return student.get_base_model() if is_peft_model(student) else student


def frozen_head(empty: nn.Module) -> nn.Linear | None:
    """The head of an [`outline`], which holds it whole, unless it is trained."""
    head = without_adapters(empty).lm_head
    return None if any(parameter.requires_grad for parameter in head.parameters()) else head


@torch.no_grad()
def fill_outline(empty: nn.Module, trained: nn.Module, device: torch.device) -> nn.Module:
    """Put the weights that an engine trained into the [`outline`] of its model, on every process the whole of them;
    all processes must call this together, with the unwrapped model and the device they communicate on.

    Accelerate's `get_state_dict` gives whole weights to the main process alone, and in 16 bits under ZeRO-3.
    """
    found = {name.replace(WRAPPER, ""): parameter for name, parameter in trained.named_parameters()}
    for name, parameter in empty.named_parameters():
        if parameter.requires_grad:
            parameter.data = _whole(found[name], device).to(parameter.dtype)
    return empty


def _whole(parameter: nn.Parameter, device: torch.device) -> Tensor:
    if isinstance(parameter, DTensor):
        return parameter.detach().to(device).full_tensor()
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):  # DeepSpeed's optimizer has full precision
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).to(device)
    return parameter.detach().clone()


def broadcast_from_main(value: Any) -> Any:
    """Return the main process's value on every process."""
    return broadcast_object_list([value])[0]


def on_main(accelerator: Accelerator, act: Callable[[], Any]) -> Any:
    """Run `act` on the main process alone; every process returns its value or raises its error."""
    value, error = None, None
    if accelerator.is_main_process:
        try:
            value = act()
        except Exception as raised:
            error = raised
    value, refused = broadcast_from_main((value, None if error is None else str(error)))
    if refused is not None:
        raise error or LayerPruneError(refused)
    return value
