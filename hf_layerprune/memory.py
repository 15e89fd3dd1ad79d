"""What healing needs of a device, before it starts: each kind of block is run once, on tensors that have shapes and no
memory, and the step is put together from them."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from . import losses
from ._trl import TOKEN_CHUNK_SIZE, VOCAB_CHUNK_SIZE
from .forward import call_of_layer
from .plan import Edit, LayerPlan
from .surgery import apply_plan
from .trainer import IterativeLayerDistillConfig
from .trainer.healing import parts_of_loss
from .trainer.targets import HiddenStateMap, trained_blocks
from .trainer.towers import TowerStates
from .trainer.trainable import lora_config, make_trainable

DEFAULT_LENGTH = 1024  # tokens per row where `max_length` sets no bound
FEW_AND_MANY = (1, 8)  # rows that blocks are measured at
Trained = str | int | None
"""How a block is trained: not at all, `"full"`, or by adapters of a rank."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that live at once, made while it is on; of real tensors or fake ones."""

    def __init__(self) -> None:
        super().__init__()
        self.storages = WeakIdKeyDictionary()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, Tensor):
                self._count(part)
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
        peak (`int`): most bytes at once, all of these included.
        flops (`int`): floating point operations of matrix products and attention.
    """

    weights: int
    trained: int
    peak: int
    flops: int

    @property
    def optimizer(self) -> int:
        """Bytes of gradients and AdamW's states."""
        return 3 * self.trained


@dataclass(frozen=True)
class BlockNeeds:
    """What one block of a student needs, in bytes.

    Attributes:
        trained (`int`): its parameters that want gradients.
        casts (`int`): these as autocast keeps them until the end of the forward pass.
        state (`int`): the hidden state it is called with.
        kept (`int`): what its forward pass leaves for the backward one.
        again (`int`): what checkpointing leaves for it at once: `kept` without `state`.
        backward (`int`): the most that its backward pass adds to that.
    """

    trained: int
    casts: int
    state: int
    kept: int
    again: int
    backward: int


@dataclass(frozen=True)
class LossNeeds:
    """What comes after the last block needs, in bytes.

    Attributes:
        forward, backward (`int`): the most that the final norm, the head and the loss take in either pass.
        held (`int`): what the backward pass hands on: gradients of hidden states, and of the head where it is trained.
    """

    forward: int
    backward: int
    held: int


class StepMeter:
    """Measures the parts of a healing step on fake tensors, each once, and puts steps together from them.

    Args:
        config ([`~transformers.PretrainedConfig`]): of the teacher.
        args ([`IterativeLayerDistillConfig`]): the settings of the run. What [`~StepMeter.step`] is given may differ
            in what is trained, rows, checkpointing and accumulation.
        on_gpu (`bool`, *optional*, defaults to `False`): take the tiles of logits a GPU would, not those of a CPU.
    """

    def __init__(self, config: PretrainedConfig, args: IterativeLayerDistillConfig, on_gpu: bool = False) -> None:
        self.config, self.args, self.on_gpu = config, copy.copy(args), on_gpu
        self.length = args.max_length or DEFAULT_LENGTH
        self.mode, self.live = FakeTensorMode(), LiveBytes()
        self.student, self.weights, self.outside = cache(self._student), cache(self._weights), cache(self._outside)
        self.block, self.loss, self.flops = cache(self._block), cache(self._loss), cache(self._flops)

    def step(
        self,
        teacher_plan: LayerPlan,
        edits: Sequence[Edit],
        args: IterativeLayerDistillConfig,
        dtype: torch.dtype,
        lora_r: int | None = None,
    ) -> StepNeeds:
        """What healing the student that `edits` make of a plan needs; the lower its layers, the more is stored.

        Args:
            teacher_plan ([`LayerPlan`]): of the teacher, whose layers are all alike.
            edits (`Sequence[Edit]`): what makes the student of it.
            args ([`IterativeLayerDistillConfig`]): what is trained and how.
            dtype (`torch.dtype`): of the weights in memory.
            lora_r (`int`, *optional*): train adapters of this rank.
        """
        plan, rows = teacher_plan, args.per_device_train_batch_size
        for edit in edits:
            plan = edit.apply(plan)
        chosen = trained_blocks(plan, list(edits), args.named_trained_layers() or args.trained_layers)
        everything = args.trained_layers == "all" and lora_r is None
        first = 0 if everything else min(chosen)  # of the blocks that gradients reach
        kinds = [(len(block), (lora_r or "full") if n in chosen else None) for n, block in enumerate(plan.blocks)]
        blocks = [_on_a_line(partial(self.block, *kind, dtype), FEW_AND_MANY, rows) for kind in kinds]
        compared = HiddenStateMap.of(plan, teacher_plan, chosen).student
        loss = _on_a_line(partial(self.loss, everything, dtype, rows), (1, 2), len(compared))
        outside, head, tied = self.outside(dtype)

        own = [kind for kind, block in zip(kinds, plan.blocks, strict=True) if kind[1] or len(block) > 1]
        weights = outside * (1 + everything) + sum(self.weights(*kind, dtype) for kind in own)
        weights += sum(self.weights(len(block), None, dtype) for block in teacher_plan.blocks)
        trained = sum(block.trained for block in blocks) + outside * everything

        checkpointing = bool(args.gradient_checkpointing)
        alone = args.gradient_accumulation_steps == 1  # other micro-batches than the first find gradients there
        live = weights + (2 if alone else 3) * trained  # AdamW's states; its fused step needs no more
        live += sum(block.state if checkpointing else block.kept for block in blocks[first:])
        casts = sum(block.casts for block in blocks[first:]) if checkpointing else 0  # else they are kept anyway
        peak = live + max(casts + loss.forward, loss.backward)
        live += loss.held
        if everything and not tied and not alone:
            live -= head
        for position in reversed(range(first, plan.depth)):
            block = blocks[position]
            peak = max(peak, live + block.backward + (block.again if checkpointing else 0))
            live += alone * block.trained - (block.state if checkpointing else block.kept)
            if position - 1 in compared:
                live -= block.state  # the gradient of a state that was compared has gone into the next one
        if everything:
            peak = max(peak, live + head)  # the gradient of the embedding
        flops = rows * self._flops_of_row(teacher_plan, plan, kinds, first, everything, args)
        return StepNeeds(weights, trained, peak, flops)

    def _flops_of_row(
        self, teacher_plan: LayerPlan, plan: LayerPlan, kinds: list[Any], first: int, everything: bool, args: Any
    ) -> int:
        """The teacher alone runs what is below the first block in which the student differs."""
        both = zip(plan.blocks, teacher_plan.blocks, strict=False)
        differs = next((position for position, (own, its) in enumerate(both) if own != its), plan.depth)
        total = sum(self.flops(len(block), None, False)[0] for block in teacher_plan.blocks)
        for position in range(0 if everything else min(first, differs), plan.depth):
            forward, backward = self.flops(*kinds[position], bool(args.gradient_checkpointing))
            total += forward + (backward if position >= first else 0)
        if _with_divergence(args):  # logits of both, and the gradient of one; a GPU makes the logits twice
            products = 3 + 2 * self.on_gpu + everything
            total += products * 2 * (self.length - 1) * self.config.hidden_size * self.config.vocab_size
        return total

    def _student(self, width: int, trained: Trained, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
        """A teacher of `width` layers, and a student that runs them in one block: frozen, trained in full or by
        adapters of a rank."""
        config = shallow(self.config, width)
        teacher = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_attention(self.args))
        teacher.eval().requires_grad_(False)
        student = apply_plan(teacher, LayerPlan((tuple(range(width)),), width), share_weights=True)
        with _modules_stay():
            adapters = lora_config(trained) if isinstance(trained, int) else None
            make_trainable(student, [0] if trained else [], False, adapters).train()
        return teacher, student

    def _weights(self, width: int, trained: Trained, dtype: torch.dtype) -> int:
        with self._measuring():
            return sum(p.nbytes for p in self.student(width, trained, dtype)[1].base_model.layers.parameters())

    def _outside(self, dtype: torch.dtype) -> tuple[int, int, bool]:
        """Bytes of what is outside the blocks, and of the head; whether that is the embedding too."""
        with self._measuring():
            model = self.student(1, None, dtype)[0]
            head, embedding = model.lm_head.weight, model.get_input_embeddings().weight
            outside = sum(p.nbytes for p in model.parameters()) - self.weights(1, None, dtype)
            return outside, head.nbytes, head is embedding

    def _call(self, width: int, trained: Trained, dtype: torch.dtype, rows: int) -> tuple[nn.Module, Tensor, Any]:
        """A block, and the state and keyword arguments it is called with."""
        student = self.student(width, trained, dtype)[1]
        ids = torch.zeros(rows, self.length, dtype=torch.long)
        state, kwargs = call_of_layer(student.base_model, {"input_ids": ids, "use_cache": False}, 0)
        return student.base_model.layers[0], state.detach().requires_grad_(), kwargs

    def _block(self, width: int, trained: Trained, dtype: torch.dtype, rows: int) -> BlockNeeds:
        with self._measuring() as live:
            block, source, kwargs = self._call(width, trained, dtype, rows)
            before = live.now
            with self._autocast():
                state = source.clone()
                out = block(state, **kwargs)
            size, edge = out.nbytes, get_gradient_edge(out)
            del out
            with_state = live.now
            del state
            kept = live.now - before
            again = kept - size * (live.now == with_state)
            live.take_peak()
            torch.autograd.backward(edge, torch.empty_like(source))
            backward = live.take_peak() - before - kept - size  # the gradient it begins with is there already
            wanted = sum(p.nbytes for p in block.parameters() if p.requires_grad)
            is_cast = dtype == torch.float32 and bool(self.args.bf16 or self.args.fp16)
            return BlockNeeds(wanted, is_cast * wanted // 2, size, kept, again, backward)

    def _flops(self, width: int, trained: Trained, checkpointing: bool) -> tuple[int, int]:
        """Operations of a block forward and backward, of one row."""
        with self._measuring():
            block, state, kwargs = self._call(width, trained, torch.bfloat16, 1)
            run = partial(checkpoint, block, use_reentrant=False) if checkpointing else block
            with FlopCounterMode(display=False) as forward, self._autocast():
                out = run(state, **kwargs)
            with FlopCounterMode(display=False) as backward:
                out.backward(torch.empty_like(out))
            return forward.get_total_flops(), backward.get_total_flops()

    def _loss(self, everything: bool, dtype: torch.dtype, rows: int, pairs: int) -> LossNeeds:
        """The loss over the final states and over `pairs` of hidden states."""
        shape, args = (rows, self.length, self.config.hidden_size), copy.copy(self.args)
        if self.on_gpu:
            args.kl_weight, args.loss_preset = 0, None
        with self._measuring() as live:
            teacher, student = self.student(1, None, dtype)
            own = [torch.empty(shape, dtype=dtype, requires_grad=True) for _ in range(pairs)]
            positions = torch.arange(rows).repeat_interleave(self.length - 1)
            valid = (positions, torch.arange(self.length - 1).repeat(rows))
            labels = torch.zeros(len(positions), dtype=torch.long)
            head = nn.Linear(*reversed(teacher.lm_head.weight.shape), bias=False, dtype=dtype)
            head.requires_grad_(everything)
            before = live.now
            live.take_peak()
            with self._autocast():
                its = [torch.empty(shape, dtype=dtype) for _ in range(pairs + 1)]
                final = student.base_model.norm(torch.empty(shape, dtype=dtype, requires_grad=True))
                states = [state[valid] for state in own], [state[valid] for state in its[1:]]
                towers = TowerStates(final[valid], its[0][valid], *states)
                del its, final, states
                parts = parts_of_loss(towers, head, teacher.lm_head, labels, args)
                if self.on_gpu and _with_divergence(self.args):
                    heads = (towers.student_final, head.weight, towers.teacher_final, teacher.lm_head.weight)
                    parts["kl"] = _DivergenceOnGpu.apply(*heads)
                del towers
            forward = live.take_peak() - before
            (parts["hidden"] + parts["final_hidden"] + parts.get("kl", 0) + parts.get("lm", 0)).backward()
            del parts
            return LossNeeds(forward, live.take_peak() - before, live.now - before)

    @contextmanager
    def _measuring(self) -> Iterator[LiveBytes]:
        """Tensors that have shapes and no memory, counted as if they had."""
        with self.mode, self.live, _tiles_of(self.on_gpu), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the other name that checkpointing has had
            yield self.live

    def _autocast(self) -> torch.autocast:
        half = torch.float16 if self.args.fp16 else torch.bfloat16
        return torch.autocast("cpu", half, enabled=bool(self.args.bf16 or self.args.fp16))


def _on_a_line(measure: Callable[[int], Any], points: tuple[int, int], at: int) -> Any:
    """What grows in a straight line, from two points."""
    (low, one), (high, other) = ((point, measure(point)) for point in points)
    both = zip(astuple(one), astuple(other), strict=True)
    return type(one)(*(a + (b - a) * (at - low) // (high - low) for a, b in both))


def shallow(config: PretrainedConfig, depth: int) -> PretrainedConfig:
    """The config of a model of `depth` layers like those of another."""
    config = copy.deepcopy(config)
    config.num_hidden_layers, config.layer_types = depth, ["full_attention"] * depth
    config.layer_plan = LayerPlan.identity(depth).to_dict()
    return config


def _attention(args: IterativeLayerDistillConfig) -> str:
    """Full rows of one text need no mask, but for tensors without memory models make one if attention takes it."""
    if not (args.packing and args.packing_strategy == "wrapped"):
        return "sdpa"
    AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
    return "sdpa_without_mask"


def _with_divergence(args: IterativeLayerDistillConfig) -> bool:
    return bool(args.kl_weight or args.loss_preset == "paper")


class _DivergenceOnGpu(torch.autograd.Function):
    """What TRL's kernels for the divergence allocate on a GPU; they do not run on tensors without memory."""

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
