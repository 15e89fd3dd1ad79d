"""What healing needs of a device, before it starts: the step itself, run on tensors that have shapes and no memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from .edits import Edit
from .plan import LayerPlan
from .surgery import plan_of, prune
from .trainer import IterativeLayerDistillConfig
from .trainer.healing import parts_of_loss
from .trainer.targets import HiddenStateMap, trained_blocks
from .trainer.towers import run_towers
from .trainer.trainable import make_trainable


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that live at once, made while it is on; of real tensors or fake ones."""

    def __init__(self) -> None:
        super().__init__()
        self.storages = WeakIdKeyDictionary()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.storages:
            size = self.storages[storage] = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._let_go, size)

    def _let_go(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class StepNeeds:
    """What one micro-batch of healing needs.

    Attributes:
        weights (`int`): bytes of teacher and student together.
        trained (`int`): bytes of the weights that are trained; as many for gradients, twice as many for AdamW.
        peak (`int`): most bytes at once, all of these included.
        flops (`int`): floating point operations of matrix products and attention.
    """

    weights: int
    trained: int
    peak: int
    flops: int


def step_needs(
    config: PretrainedConfig, args: IterativeLayerDistillConfig, removed: int, rows: int, dtype: torch.dtype
) -> StepNeeds:
    """Heal a student without one layer for two steps, on fake tensors.

    Args:
        config ([`~transformers.PretrainedConfig`]): of the teacher.
        args ([`IterativeLayerDistillConfig`]): what is trained and how.
        removed (`int`): the layer; the lower, the more has to be stored.
        rows (`int`): rows of `args.max_length` tokens in the micro-batch.
        dtype (`torch.dtype`): of the weights in memory.
    """
    with FakeTensorMode(), LiveBytes() as live:
        teacher = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
        student = prune(teacher, [removed], share_weights=True)
        plan: LayerPlan = plan_of(student)
        trained = args.named_trained_layers() or args.trained_layers
        blocks = trained_blocks(plan, [Edit.remove(removed)], trained)
        everything = args.trained_layers == "all"
        student = make_trainable(student, blocks, everything).train()
        if args.gradient_checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        weights = live.now
        parameters = [p for p in student.parameters() if p.requires_grad]
        step = _step(teacher, student, parameters, args, blocks, None if everything else min(*blocks, removed), rows)
        step()
        live.peak = live.now
        with FlopCounterMode(display=False) as counter:
            step()  # with the optimizer's states there
    size = sum(p.numel() for p in parameters) * dtype.itemsize
    return StepNeeds(weights, size, live.peak, counter.get_total_flops())


def _step(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    parameters: list[torch.nn.Parameter],
    args: IterativeLayerDistillConfig,
    blocks: list[int],
    shared: int | None,
    rows: int,
) -> Callable[[], None]:
    """Forward, backward and AdamW on a full batch."""
    length = args.max_length or 1024
    ids = torch.zeros(rows, length, dtype=torch.long)
    valid = (torch.arange(rows).repeat_interleave(length - 1), torch.arange(length - 1).repeat(rows))
    labels = torch.zeros(len(valid[0]), dtype=torch.long)
    states = HiddenStateMap.of(plan_of(student), plan_of(teacher), blocks)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=False)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(args.bf16)):
            updates = args.hidden_target == "updates"
            towers = run_towers(student, teacher, {"input_ids": ids}, valid, states, shared, updates)
            parts = parts_of_loss(towers, student.lm_head, teacher.lm_head, labels, args)
            del towers
        (parts["hidden"] + parts["final_hidden"] + parts.get("kl", 0) + parts.get("lm", 0)).backward()
        del parts
        optimizer.step()
        optimizer.zero_grad()

    return step
