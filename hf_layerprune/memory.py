"""Memory of a healing step, before it is taken.

A small copy of the model, of three or four layers, takes a few steps on the CPU. One factor divides its widths and the
length of its rows, so its weights and activations are smaller by the square of the factor. Memory is linear in layers
and rows, so these steps give every other step.
"""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from . import losses
from .losses import MAX_LOGITS_PER_CHUNK, MIN_ROWS_PER_CHUNK, divergence, next_token_loss, parts_of_loss
from .plan import LayerPlan
from .surgery import apply_plan, plan_of
from .trainer import IterativeLayerDistillConfig
from .trainer.healing import compared_states, run_towers
from .trainer.trainable import lora_config, make_trainable

DEFAULT_LENGTH = 1024  # tokens per row where `max_length` sets no bound
LEAST_WIDTH = 48  # of the small model's hidden states: norms and biases, which shrink by the factor alone, stay few
PRIMES = (7, 11, 13, 17, 19, 23, 29, 31, 37)  # rows of the small model: one that divides none of its sizes


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made, `now` and at their `peak`, until they are freed.

    Without `products`, matrix products are not computed; their results have the right size and no values.
    """

    def __init__(self, products: bool = True) -> None:
        super().__init__()
        self.products, self.storages = products, WeakIdKeyDictionary()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.products and function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            result = left.new_empty(len(left), right.shape[1])
        else:
            result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, Tensor) and (storage := part.untyped_storage()) not in self.storages:
                size = self.storages[storage] = storage.nbytes()
                self._count(size)
                weakref.finalize(storage, self._count, -size)
        return result

    def _count(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


class LiveBytesByRows(LiveBytes):
    """Counts apart what stays and what grows with the rows of a batch, `(2,)`: what their number, a prime, divides.

    Any number of rows can be solved for: `moments` has the bytes after every change. Computes no products.
    """

    def __init__(self, rows: int) -> None:
        super().__init__(products=False)
        self.rows, self.now, self.moments = rows, np.zeros(2), []

    def _count(self, size: int) -> None:
        self.now = self.now + (np.array([size, 0]) if size % self.rows else np.array([0, size / self.rows]))
        self.moments.append(self.now)


@dataclass(frozen=True)
class Way:
    """A way to heal."""

    trained: str | tuple[int, ...]  # a value of `trained_layers`
    lora_r: int | None  # rank of the adapters, where these are trained instead of the weights
    dtype: str  # of the weights in memory
    gradient_checkpointing: bool

    @property
    def everything(self) -> bool:
        """Whether embedding and head are trained too."""
        return self.trained == "all" and self.lora_r is None


@dataclass(frozen=True)
class StepShape:
    """How many layers a healing step has, by what they do."""

    trained: int  # blocks that are trained
    frozen: int  # other layers from the lowest trained one up, which gradients pass
    idle: int = 0  # that only take memory: the teacher's below or removed, and those healed in other rounds
    width: int = 1  # layers in a trained block


class StepNeeds(NamedTuple):
    """Bytes of teacher and student, of the weights that are trained, and the most that a step takes with AdamW."""

    weights: int
    trained: int
    peak: int


class StepMeter:
    """Solves for the memory of steps on a GPU, from a few that are measured. `config` is the teacher's."""

    def __init__(self, config: PretrainedConfig, args: IterativeLayerDistillConfig) -> None:
        self.config, self.args = config, args
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.factor = 1
        while config.hidden_size >= 2 * self.factor * LEAST_WIDTH and head_dim % (4 * self.factor) == 0:
            self.factor *= 2  # rotary positions turn halves of a head
        whole = args.max_length or DEFAULT_LENGTH
        self.length = math.ceil(whole / self.factor)
        self.rounding = whole / (self.length * self.factor)  # what a row should take over what it takes
        self.small = copy.deepcopy(config)
        self.small.pad_token_id, self.small.head_dim = None, head_dim // self.factor
        for name in ("hidden_size", "intermediate_size", "vocab_size"):
            setattr(self.small, name, getattr(config, name) // self.factor)
        heads = (config.num_attention_heads, config.num_key_value_heads, self.small.head_dim)
        sizes = (self.length, self.small.hidden_size, self.small.intermediate_size, self.small.vocab_size, *heads)
        self.rows = next(prime for prime in PRIMES if all(size % prime for size in sizes))
        self.live = LiveBytesByRows(self.rows)
        self.models, self.measure, self.logits = cache(self._models), cache(self._measure), cache(self._logits)

    def needs(self, way: Way, shape: StepShape, rows: int, accumulates: bool) -> StepNeeds:
        """Solve for a step; one that `accumulates` begins with the gradients of other micro-batches."""
        solved = self._solve(way, shape, rows * self.rounding)
        weights, trained, live, peak, of_last_block = (int(size * self.factor**2) for size in solved)
        if way.lora_r is not None:  # the small copy's adapters have whole ranks
            whole, trained = trained, int(trained * way.lora_r / (self._rank(way.lora_r) * self.factor))
            weights += trained - whole
        embedding = self.config.vocab_size * self.config.hidden_size * getattr(torch, way.dtype).itemsize
        logits = self.logits(round(rows * self.rounding * self.length), way.dtype, way.everything) * self.factor**2
        most = max(live + logits, peak + way.everything * embedding)
        return StepNeeds(
            weights, trained, weights + 2 * trained + max(most + accumulates * trained, of_last_block + trained)
        )

    def _solve(self, way: Way, shape: StepShape, rows: float) -> np.ndarray:
        """Add what further blocks and layers take to what a step of two trained blocks and a frozen layer does."""
        full = replace(way, trained="neighbours")
        (two, layer), (three, _) = (self.step(full, blocks, shape.width, rows) for blocks in (2, 3))
        block = three - two
        values = two + (shape.trained - 2) * block + (shape.frozen - 1) * layer
        values[0] += shape.idle * layer[0]
        if way.everything:
            values[:2] += two[0] - 2 * block[0] - layer[0]  # embedding, head and norm
        return np.append(values, two[3] - block[3])

    def step(self, way: Way, blocks: int, width: int, rows: float) -> tuple[np.ndarray, np.ndarray]:
        """Evaluate a step of `blocks` trained blocks below a frozen layer, whose gradients are in memory before.

        Returns the bytes of weights, of those trained, of all else before the divergence, and of the most of it on the
        way back; and what the frozen layer adds to each.
        """
        at_divergence, moments, layer = (part @ [1, rows] for part in self.measure(way, blocks, width))
        return np.append(at_divergence, moments.max()), layer

    def _measure(self, way: Way, blocks: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Run a step. Returns fixed bytes and bytes per row: of what [`step`] returns, and of all moments of the way
        back for the most of it."""
        live, after = self.live, []
        with live, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers 5.23 has another name for checkpointing
            teacher, student, weights = self.models(way.lora_r, way.dtype, blocks, width)
            layers = student.base_model.layers
            if way.gradient_checkpointing:
                student.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                student.gradient_checkpointing_disable()
            trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            before = live.now
            hooks = [layer.register_forward_hook(lambda *_: after.append(live.now)) for layer in layers]
            loss, at_divergence = self._forward(teacher, student, blocks)
            live.moments = [live.now]
            loss.backward()
            for hook in hooks:
                hook.remove()
            for parameter in trained:
                parameter.grad = None
        size = sum(parameter.nbytes for parameter in trained)
        of_layer, in_layer = sum(weight.nbytes for weight in layers[-1].parameters()), after[-1] - after[-2]
        return (
            np.array([weights, [size, 0], at_divergence - before]),
            np.array(live.moments) - before,
            np.array([[of_layer, 0], [0, 0], in_layer, in_layer]),
        )

    def _models(
        self, lora_r: int | None, dtype: str, blocks: int, width: int
    ) -> tuple[PreTrainedModel, PreTrainedModel, np.ndarray]:
        """Make a small teacher and its student, and count the bytes of both."""
        before, depth = self.live.now, blocks * width + 1
        config, plan = copy.deepcopy(self.small), LayerPlan.identity(depth)
        config.num_hidden_layers, config.layer_types = depth, ["full_attention"] * depth
        config.layer_plan = plan.to_dict()
        teacher = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        teacher.eval().requires_grad_(False)
        if width > 1:
            plan = plan.with_pairs(range(width * n, width * (n + 1)) for n in range(blocks))
        student = apply_plan(teacher, plan, share_weights=True)
        adapters = None if lora_r is None else lora_config(self._rank(lora_r))
        make_trainable(student, list(range(blocks)), False, adapters).train()
        return teacher, student, self.live.now - before

    def _forward(self, teacher: PreTrainedModel, student: PreTrainedModel, blocks: int) -> tuple[Tensor, np.ndarray]:
        """Run both models. Returns the loss without logits, and the bytes alive before these would be made."""
        batch = {"input_ids": torch.zeros(self.rows, self.length, dtype=torch.long)}
        valid = torch.ones(self.rows, self.length).nonzero(as_tuple=True)
        if not (self.args.packing and self.args.packing_strategy == "wrapped"):  # whose rows are full and need no mask
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][:, -1] = 0
        compared = compared_states(plan_of(student), plan_of(teacher), range(blocks))
        hidden_only = SimpleNamespace(kl_weight=0, lm_weight=0, loss_preset=None)
        with self._autocast():
            towers = run_towers(student, teacher, batch, valid, compared, 0)
            parts = parts_of_loss(towers, student.lm_head, teacher.lm_head, valid[0], hidden_only)
            return parts["hidden"] + parts["final_hidden"], self.live.now  # with the casts that autocast keeps

    def _rank(self, lora_r: int) -> int:
        """Rank of the small copy's adapters."""
        return max(1, round(lora_r / self.factor))

    def _autocast(self) -> torch.autocast:
        half = torch.float16 if self.args.fp16 else torch.bfloat16
        return torch.autocast("cpu", half, enabled=bool(self.args.bf16 or self.args.fp16))

    def _logits(self, tokens: int, dtype: str, trains_head: bool) -> int:
        """Run the divergence and the next-token loss alone, in chunks as on a GPU, and count what they take at most,
        with their gradients. Once there are several chunks, memory is linear in `tokens`."""
        args, live, size = self.args, LiveBytes(products=False), (self.small.hidden_size, self.small.vocab_size)
        chunk = max(MIN_ROWS_PER_CHUNK, MAX_LOGITS_PER_CHUNK["cuda"] // self.config.vocab_size)
        chunk = max(1, round(chunk / self.factor))
        if tokens > 4 * chunk:
            three, four = (self.logits(number * chunk, dtype, trains_head) for number in (3, 4))
            return four + (four - three) * (tokens - 4 * chunk) // chunk
        limits = dict.fromkeys(MAX_LOGITS_PER_CHUNK, chunk * size[1])
        with live, patch.multiple(losses, MAX_LOGITS_PER_CHUNK=limits, MIN_ROWS_PER_CHUNK=1):
            heads = [nn.Linear(*size, bias=False, dtype=getattr(torch, dtype)) for _ in range(1 + trains_head)]
            student, teacher = heads[0].requires_grad_(trains_head), heads[-1]
            states = torch.zeros(tokens, size[0], dtype=getattr(torch, dtype), requires_grad=True)
            parts, labels = [], torch.zeros(tokens, dtype=torch.long)
            before = live.peak = live.now
            with self._autocast():
                if args.kl_weight or args.loss_preset == "paper":
                    parts.append(divergence(states, student, states.detach(), teacher, args.temperature, args.beta))
                if args.lm_weight:
                    parts.append(next_token_loss(states, student, labels).sum())
            if parts:
                sum(parts).backward()
        return live.peak - before
