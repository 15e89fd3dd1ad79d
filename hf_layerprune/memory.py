"""What healing needs of a device, before it starts: the step itself, run on tensors that have shapes and no memory."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from . import losses
from ._trl import TOKEN_CHUNK_SIZE, VOCAB_CHUNK_SIZE
from .edits import Edit
from .surgery import apply_plan, plan_of
from .trainer import IterativeLayerDistillConfig
from .trainer.healing import parts_of_loss
from .trainer.targets import HiddenStateMap, trained_blocks
from .trainer.towers import run_towers
from .trainer.trainable import make_trainable

DEFAULT_LENGTH = 1024  # tokens per row where `max_length` sets no bound


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

    def take_peak(self) -> int:
        """The peak since the last call."""
        peak, self.peak = self.peak, self.now
        return peak

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
        peaks (`tuple[int, ...]`): most bytes at once, all of these included, in the parts of a step: the forward pass,
            the backward pass of the last layer, and that of the rest.
        flops (`int`): floating point operations of matrix products and attention; 0 where they were not counted.
    """

    weights: int
    trained: int
    peaks: tuple[int, ...]
    flops: int = 0

    @property
    def peak(self) -> int:
        """Most bytes at once."""
        return max(self.peaks)

    @property
    def optimizer(self) -> int:
        """Bytes of gradients and AdamW's states."""
        return 3 * self.trained

    @property
    def activations(self) -> int:
        """Bytes beside weights, gradients and optimizer: activations, and tiles of logits."""
        return self.peak - self.weights - self.optimizer


def step_needs(
    config: PretrainedConfig,
    args: IterativeLayerDistillConfig,
    edits: Sequence[Edit],
    rows: int,
    dtype: torch.dtype,
    peft_config: Any | None = None,
    on_gpu: bool = False,
    count_flops: bool = True,
) -> StepNeeds:
    """Heal a student for a step, on fake tensors.

    Args:
        config ([`~transformers.PretrainedConfig`]): of the teacher.
        args ([`IterativeLayerDistillConfig`]): what is trained and how.
        edits (`Sequence[Edit]`): what makes the student; the lower the layers, the more has to be stored.
        rows (`int`): rows of `args.max_length` tokens in the micro-batch.
        dtype (`torch.dtype`): of the weights in memory.
        peft_config ([`~peft.PeftConfig`], *optional*): train adapters.
        on_gpu (`bool`, *optional*, defaults to `False`): take the tiles of logits a GPU would, not those of a CPU.
        count_flops (`bool`, *optional*, defaults to `True`): count operations as well, which takes longer.
    """
    with FakeTensorMode(), LiveBytes() as live, _tiles_of(on_gpu), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the other name that checkpointing has had
        teacher = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_attention(args))
        teacher.eval().requires_grad_(False)
        plan = plan_of(teacher)
        for edit in edits:
            plan = edit.apply(plan)
        student = apply_plan(teacher, plan, share_weights=True)
        trained = args.named_trained_layers() or args.trained_layers
        blocks = trained_blocks(plan, list(edits), trained)
        everything = args.trained_layers == "all" and peft_config is None
        shared = None if everything else min(*blocks, _first_difference(student, teacher))
        with _modules_stay():
            trainable = make_trainable(student, blocks, everything, peft_config).train()
        if args.gradient_checkpointing:
            enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        weights = live.now
        parameters = [p for p in trainable.parameters() if p.requires_grad]
        states = [torch.empty_like(p) for p in parameters for _ in range(2)]  # AdamW's; its fused step needs no more
        step = _step(teacher, student, args, blocks, shared, rows, live, on_gpu)
        if args.gradient_accumulation_steps > 1:  # all micro-batches but the first find gradients there
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
        peaks = step()
        flops = 0
        if count_flops:
            with FlopCounterMode(display=False) as counter:  # it keeps tensors alive
                step()
            flops = counter.get_total_flops()
        del states
    if count_flops and on_gpu and _with_divergence(args):
        flops += _divergence_flops(student, rows * ((args.max_length or DEFAULT_LENGTH) - 1), everything)
    return StepNeeds(weights, sum(p.nbytes for p in parameters), tuple(peaks), flops)


def needs_at_depth(
    shallow: StepNeeds, shallow_depth: int, deeper: StepNeeds, deeper_depth: int, depth: int
) -> StepNeeds:
    """What a step needs at another depth: all layers are alike, so every number is a straight line in their count."""

    def at(one: int, other: int) -> int:
        return one + (other - one) * (depth - shallow_depth) // (deeper_depth - shallow_depth)

    return StepNeeds(
        at(shallow.weights, deeper.weights),
        at(shallow.trained, deeper.trained),
        tuple(at(*both) for both in zip(shallow.peaks, deeper.peaks, strict=True)),
        at(shallow.flops, deeper.flops),
    )


def _step(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    args: IterativeLayerDistillConfig,
    blocks: list[int],
    shared: int | None,
    rows: int,
    live: LiveBytes,
    on_gpu: bool,
) -> Callable[[], list[int]]:
    """Forward and backward on a full batch; gives the peaks of [`StepNeeds`]. Gradients are kept."""
    length = args.max_length or DEFAULT_LENGTH
    ids = torch.zeros(rows, length, dtype=torch.long)
    valid = (torch.arange(rows).repeat_interleave(length - 1), torch.arange(length - 1).repeat(rows))
    labels = torch.zeros(len(valid[0]), dtype=torch.long)
    states = HiddenStateMap.of(plan_of(student), plan_of(teacher), blocks)
    without_divergence = copy.copy(args)
    if on_gpu:
        without_divergence.kl_weight, without_divergence.loss_preset = 0, None
    inputs = {"input_ids": ids}
    half = torch.float16 if args.fp16 else torch.bfloat16

    def step() -> list[int]:
        live.take_peak()
        forward: list[int] = []
        peaks: list[int] = []

        def mark_backward(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].requires_grad and not forward:
                forward.append(0)
                inputs[0].register_hook(lambda _: peaks.append(live.take_peak()))

        handle = student.base_model.layers[-1].register_forward_pre_hook(mark_backward)
        with torch.autocast("cpu", half, enabled=bool(args.bf16 or args.fp16)):
            updates = args.hidden_target == "updates"
            towers = run_towers(student, teacher, inputs, valid, states, shared, updates)
            parts = parts_of_loss(towers, student.lm_head, teacher.lm_head, labels, without_divergence)
            if on_gpu and _with_divergence(args):
                heads = (towers.student_final, student.lm_head.weight, towers.teacher_final, teacher.lm_head.weight)
                parts["kl"] = _DivergenceOnGpu.apply(*heads)
            del towers
        handle.remove()
        peaks.append(live.take_peak())
        (parts["hidden"] + parts["final_hidden"] + parts.get("kl", 0) + parts.get("lm", 0)).backward()
        del parts
        peaks.append(live.take_peak())
        return peaks

    return step


def _attention(args: IterativeLayerDistillConfig) -> str:
    """Full rows of one text need no mask. For tensors without memory models make one, whatever is in them, unless
    their attention has no masks at all."""
    if not (args.packing and args.packing_strategy == "wrapped"):
        return "sdpa"
    AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
    return "sdpa_without_mask"


def _first_difference(student: PreTrainedModel, teacher: PreTrainedModel) -> int:
    """Position of the first block that is not the same in both."""
    both = zip(plan_of(student).blocks, plan_of(teacher).blocks, strict=False)
    depth = student.config.num_hidden_layers
    return next((position for position, (own, its) in enumerate(both) if own != its), depth)


def _with_divergence(args: IterativeLayerDistillConfig) -> bool:
    return bool(args.kl_weight or args.loss_preset == "paper")


class _DivergenceOnGpu(torch.autograd.Function):
    """What [`losses.divergence`] makes on a GPU, where TRL's kernels compute it: tiles of logits and gradients. The
    kernels themselves make nothing, and do not run on tensors without memory."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        ctx.dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        ctx.save_for_backward(hidden, weight, teacher_hidden, teacher_weight)
        _tiles_of_logits(hidden, teacher_hidden, teacher_weight, ctx.dtype)
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, teacher_hidden, teacher_weight = ctx.saved_tensors
        grads = [
            torch.zeros_like(tensor, dtype=torch.float32) if needed else None
            for tensor, needed in zip((hidden, weight), ctx.needs_input_grad, strict=False)
        ]
        tiles = _tiles_of_logits(hidden, teacher_hidden, teacher_weight, ctx.dtype)
        tiles += [tiles[0].to(ctx.dtype)]  # its gradient
        del tiles
        return (*(None if grad is None else grad.to(hidden.dtype) for grad in grads), None, None)


def _tiles_of_logits(hidden: Tensor, teacher_hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """A tile of both models' logits, and what they are multiplied from in `dtype`."""
    rows, columns = min(len(hidden), TOKEN_CHUNK_SIZE), min(len(weight), VOCAB_CHUNK_SIZE)
    made = [hidden.new_empty((rows, VOCAB_CHUNK_SIZE), dtype=torch.float32) for _ in range(2)]
    return [*made, hidden[:rows].to(dtype), teacher_hidden[:rows].to(dtype), weight[:columns].to(dtype)]


def _divergence_flops(student: PreTrainedModel, positions: int, trains_head: bool) -> int:
    """Two products forward, the same two again and those of the gradients backward."""
    return (5 + trains_head) * 2 * positions * student.config.hidden_size * student.config.vocab_size


@contextmanager
def _tiles_of(on_gpu: bool) -> Iterator[None]:
    """Chunks of logits as large as on a GPU."""
    before = losses.MAX_LOGITS_PER_CHUNK["cpu"]
    losses.MAX_LOGITS_PER_CHUNK["cpu"] = losses.MAX_LOGITS_PER_CHUNK["cuda"] if on_gpu else before
    try:
        yield
    finally:
        losses.MAX_LOGITS_PER_CHUNK["cpu"] = before


@contextmanager
def _modules_stay() -> Iterator[None]:
    """PEFT moves modules to where they are already; those without memory cannot be moved at all."""
    before = nn.Module.to
    nn.Module.to = lambda module, *_, **__: module
    try:
        yield
    finally:
        nn.Module.to = before
