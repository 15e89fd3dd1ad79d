"""Memory of a healing step, before it is taken.

Steps of students of two and three layers run on tensors that have shapes and no memory. Memory is linear in layers and
rows, so these give every other step. What grows with the rows is counted apart, so one number of rows is enough.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .losses import MAX_LOGITS_PER_CHUNK, MIN_ROWS_PER_CHUNK, divergence, next_token_loss, parts_of_loss
from .plan import LayerPlan
from .surgery import apply_plan, plan_of
from .trainer import IterativeLayerDistillConfig
from .trainer.healing import compared_states, run_towers
from .trainer.trainable import lora_config, make_trainable

DEFAULT_LENGTH = 1024  # tokens per row where `max_length` sets no bound
PRIMES = (101, 103, 107, 109, 113, 127, 131, 137, 139)  # rows of a step: one that divides no size of the model


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made, `now` and at their `peak`, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.storages = WeakIdKeyDictionary()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.prim.device.default:  # two of three calls
            return args[0].fake_device
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
    """Counts apart the bytes that stay and those that grow with the rows of a batch, `(2,)`.

    A tensor grows if the number of rows, a prime, divides its size. `moments` has the bytes after every change.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
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
        self.config, self.args, self.length = config, copy.copy(args), args.max_length or DEFAULT_LENGTH
        sizes = [value for value in config.to_dict().values() if type(value) is int and value > 1]
        self.rows = next(n for n in PRIMES if all(size % n for size in (*sizes, self.length)))
        # `_logits` measures these two
        self.args.kl_weight, self.args.lm_weight, self.args.loss_preset = 0, 0, None
        self.losses, self.fake, self.live = args, FakeTensorMode(), LiveBytesByRows(self.rows)
        self.models, self.measure, self.logits = cache(self._models), cache(self._measure), cache(self._logits)

    def needs(self, way: Way, shape: StepShape, rows: int, accumulates: bool) -> StepNeeds:
        """Solve for a step; one that `accumulates` begins with the gradients of other micro-batches."""
        full = replace(way, trained="neighbours", lora_r=None)
        (base, layer), (two, _) = (self.step(full, blocks, shape.width, rows) for blocks in (1, 2))
        of_layer, block = base[1] // shape.width, two - base
        if way.lora_r is not None:
            adapted, _ = self.step(replace(full, lora_r=way.lora_r), 1, shape.width, rows)
            block = block + (adapted - base)[[0, 1, 2, 2]]  # on the way back, one block at a time takes more
            base = adapted
        # what further blocks and layers take is added to what a step of one trained and one frozen block does
        values = base + (shape.trained - 1) * block + (shape.frozen - 1) * np.array([of_layer, 0, layer, layer])
        values[0] += shape.idle * of_layer
        if way.everything:
            outside = base[0] - (2 * shape.width + 1) * of_layer  # embedding, head and norm
            values[:2] += outside
        weights, trained, live, peak, of_last_block = map(int, (*values, base[3]))
        embedding = self.config.vocab_size * self.config.hidden_size * getattr(torch, way.dtype).itemsize
        logits = self.logits(rows * (self.length - 1), way.dtype, way.everything)
        most = max(live + logits, peak + way.everything * embedding)
        return StepNeeds(
            weights, trained, weights + 2 * trained + max(most + accumulates * trained, of_last_block + trained)
        )

    def step(self, way: Way, blocks: int, width: int, rows: int) -> tuple[np.ndarray, int]:
        """Evaluate a step of `blocks` trained blocks below a frozen layer, whose gradients are in memory before.

        Returns the bytes of weights, of those trained, of all else before the divergence, and of the most of it on the
        way back; and what the frozen layer adds to these two.
        """
        before_divergence, moments, layer = (part @ [1, rows] for part in self.measure(way, blocks, width))
        return np.append(before_divergence, moments.max()), layer

    def _measure(self, way: Way, blocks: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Run a step. Returns fixed bytes and bytes per row, `(..., 2)`, of what `step` evaluates."""
        live, after = self.live, []
        with self.fake, live, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the other name that checkpointing has had
            teacher, student, weights = self.models(way.lora_r, way.dtype, blocks, width)
            if way.gradient_checkpointing:
                student.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                student.gradient_checkpointing_disable()
            trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            before = live.now
            hooks = [
                layer.register_forward_hook(lambda *_: after.append(live.now)) for layer in student.base_model.layers
            ]
            loss, at_divergence = self._forward(teacher, student, blocks)
            live.moments = [live.now]
            loss.backward()
            for hook in hooks:
                hook.remove()
            for parameter in trained:
                parameter.grad = None
        size = sum(parameter.nbytes for parameter in trained)
        before_divergence = np.array([weights, [size, 0], at_divergence - before])
        return before_divergence, np.array(live.moments) - before, after[blocks] - after[blocks - 1]

    def _models(
        self, lora_r: int | None, dtype: str, blocks: int, width: int
    ) -> tuple[PreTrainedModel, PreTrainedModel, np.ndarray]:
        """Make a teacher and a student, and count the bytes of both."""
        before, depth = self.live.now, blocks * width + 1
        config, plan = copy.deepcopy(self.config), LayerPlan.identity(depth)
        config.num_hidden_layers, config.layer_types = depth, ["full_attention"] * depth
        config.layer_plan = plan.to_dict()
        full_rows = self.args.packing and self.args.packing_strategy == "wrapped"
        # without values to look at, models make a mask that full rows do not need
        AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
        attention = "sdpa_without_mask" if full_rows else "sdpa"
        teacher = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)
        teacher.eval().requires_grad_(False)
        if width > 1:
            plan = plan.with_pairs(range(width * n, width * (n + 1)) for n in range(blocks))
        student = apply_plan(teacher, plan, share_weights=True)
        with patch.object(nn.Module, "to", lambda module, *_, **__: module):  # PEFT calls it
            make_trainable(student, list(range(blocks)), False, lora_config(lora_r)).train()
        return teacher, student, self.live.now - before

    def _forward(self, teacher: PreTrainedModel, student: PreTrainedModel, blocks: int) -> tuple[Tensor, np.ndarray]:
        """Run both models on full rows. Returns the loss and the bytes that live before the divergence."""
        args, rows, length = self.args, self.rows, self.length - 1
        ids = torch.zeros(rows, self.length, dtype=torch.long)
        valid = torch.arange(rows).repeat_interleave(length), torch.arange(length).repeat(rows)
        compared = compared_states(plan_of(student), plan_of(teacher), range(blocks))
        with self._autocast():
            towers = run_towers(student, teacher, {"input_ids": ids}, valid, compared, 0)
            parts = parts_of_loss(towers, student.lm_head, teacher.lm_head, torch.zeros_like(valid[0]), args)
            return parts["hidden"] + parts["final_hidden"], self.live.now  # with the casts that autocast keeps

    def _autocast(self) -> torch.autocast:
        half = torch.float16 if self.args.fp16 else torch.bfloat16
        return torch.autocast("cpu", half, enabled=bool(self.args.bf16 or self.args.fp16))

    def _logits(self, tokens: int, dtype: str, trains_head: bool) -> int:
        """Run the divergence and the next-token loss alone, in chunks as on a GPU, and count what they take at most,
        with their gradients. Once there are several chunks, memory is linear in `tokens`."""
        args, live, size = self.losses, LiveBytes(), (self.config.hidden_size, self.config.vocab_size)
        chunk = max(MIN_ROWS_PER_CHUNK, MAX_LOGITS_PER_CHUNK["cuda"] // size[1])
        if tokens > 4 * chunk:
            three, four = (self.logits(number * chunk, dtype, trains_head) for number in (3, 4))
            return four + (four - three) * (tokens - 4 * chunk) // chunk
        with self.fake, live, patch.dict(MAX_LOGITS_PER_CHUNK, cpu=MAX_LOGITS_PER_CHUNK["cuda"]):
            heads = [nn.Linear(*size, bias=False, dtype=getattr(torch, dtype)) for _ in range(1 + trains_head)]
            student, teacher = heads[0].requires_grad_(trains_head), heads[-1]
            states = torch.zeros(tokens, size[0], dtype=getattr(torch, dtype), requires_grad=True)
            losses, labels = [], torch.zeros(tokens, dtype=torch.long)
            before = live.peak = live.now
            with self._autocast():
                if args.kl_weight or args.loss_preset == "paper":
                    losses.append(divergence(states, student, states.detach(), teacher, args.temperature, args.beta))
                if args.lm_weight:
                    losses.append(next_token_loss(states, student, labels).sum())
            if losses:
                sum(losses).backward()
        return live.peak - before
