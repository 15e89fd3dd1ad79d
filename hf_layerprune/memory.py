"""Memory of a healing step, before it is taken.

Whole steps of the shallowest models run on tensors that have shapes and no memory. Layers of a kind are alike, and
memory is linear in layers and rows, so a few of these steps give every other.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ._trl import TOKEN_CHUNK_SIZE, VOCAB_CHUNK_SIZE
from .losses import MAX_LOGITS_PER_CHUNK, parts_of_loss
from .plan import LayerPlan
from .surgery import apply_plan, plan_of
from .trainer import IterativeLayerDistillConfig
from .trainer.towers import HiddenStateMap, run_towers
from .trainer.trainable import lora_config, make_trainable

DEFAULT_LENGTH = 1024  # tokens per row where `max_length` sets no bound


class FakeBytes(FakeTensorMode):
    """Makes tensors without memory and counts the bytes they would take: `now`, and the most since `take_peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.storages = WeakIdKeyDictionary()
        self.now = self.peak = self.depth = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.prim.device.default and not self.in_kernel_invocation:  # two of three calls
            return args[0].fake_device
        self.depth += 1  # an operation may be made of others, which do not count
        try:
            result = super().__torch_dispatch__(function, types, args, kwargs)
        finally:
            self.depth -= 1
        if not self.depth:
            for part in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(part, Tensor):
                    self.count(part.untyped_storage())
        return result

    def take_peak(self) -> int:
        peak, self.peak = self.peak, self.now
        return peak

    def count(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        if storage not in self.storages:
            size = self.storages[storage] = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.now -= size


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
    """Measures steps on fake tensors, each once, for a GPU.

    Args:
        config ([`~transformers.PretrainedConfig`]): config of the teacher.
        args ([`IterativeLayerDistillConfig`]): settings of the run.
        rows (`Sequence[int]`): rows of a micro-batch, ascending; the first and the last are measured.
    """

    def __init__(self, config: PretrainedConfig, args: IterativeLayerDistillConfig, rows: Sequence[int]) -> None:
        self.config, self.args = config, copy.copy(args)
        self.few, self.many = rows[0], rows[-1]
        self.length = args.max_length or DEFAULT_LENGTH
        self.has_divergence = args.kl_weight > 0 or args.loss_preset == "paper"
        self.has_next_token = args.lm_weight > 0
        # a GPU's kernels do not run here; `_logits` counts what they take
        self.args.kl_weight, self.args.lm_weight, self.args.loss_preset = 0, 0, None
        self.fake = FakeBytes()
        self.models, self.measure = cache(self._models), cache(self._measure)

    def needs(self, way: Way, shape: StepShape, rows: int, accumulates: bool) -> StepNeeds:
        """Solve for a step; one that `accumulates` begins with the gradients of other micro-batches."""
        few, many = (self._solve(way, shape, number) for number in (self.few, self.many))
        values = few + (many - few) * (rows - self.few) / max(1, self.many - self.few)
        values[2:4] += self._logits(way, rows)
        weights, trained, *early, bottom = map(int, values)
        return StepNeeds(weights, trained, max(max(early) + accumulates * trained, bottom) + 2 * trained)

    def _solve(self, way: Way, shape: StepShape, rows: int) -> np.ndarray:
        """Add what further layers take to what a step of few layers does."""
        full = replace(way, trained="neighbours", lora_r=None)
        own = replace(way, trained="neighbours")
        frozen = self.measure(full, 1, 2, 1, rows) - self.measure(full, 1, 1, 1, rows)
        blocks = 2 if way.everything else min(shape.trained, 2)
        above = 0 if way.everything else 1
        values = self.measure(way if way.everything else own, blocks, above, shape.width, rows)
        if shape.trained != blocks:
            one, two = (self.measure(own, number, 1, shape.width, rows) for number in (1, 2))
            values = values + (shape.trained - blocks) * (two - one)
        idle = frozen[0] * np.array([1, 0, 1, 1, 1, 1, 1])
        return values + (shape.frozen - above) * frozen + shape.idle * idle

    def _measure(self, way: Way, trained: int, frozen: int, width: int, rows: int) -> np.ndarray:
        """Run a step of `trained` blocks below `frozen` ones.

        Returns bytes: of weights, of those trained, of all that lives before the divergence, forward and back, and the
        most that lives until the gradient reaches the top block, while it passes that, and while it passes the bottom.
        """
        fake, peaks = self.fake, []

        def watch(_: nn.Module, __: Any, state: Tensor) -> None:
            state.register_hook(lambda _: peaks.append(fake.take_peak()))

        with fake, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the other name that checkpointing has had
            teacher, student, weights = self.models(way.everything, way.lora_r, way.dtype, trained, frozen, width)
            if way.gradient_checkpointing:
                student.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                student.gradient_checkpointing_disable()
            handles = [layer.register_forward_hook(watch) for layer in student.base_model.layers]
            others = fake.now - weights  # other models
            fake.take_peak()
            divergence = self._step(teacher, student, trained, rows)
            peaks.append(fake.take_peak())
            for handle in handles:
                handle.remove()
            parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
            for parameter in parameters:
                parameter.grad = None
        size = sum(parameter.nbytes for parameter in parameters)
        return np.array([weights, size, *(live - others for live in (*divergence, *peaks[:2], peaks[-1]))])

    def _models(
        self, everything: bool, lora_r: int | None, dtype: str, trained: int, frozen: int, width: int
    ) -> tuple[PreTrainedModel, PreTrainedModel, int]:
        """Make a teacher and a student, and count the bytes of both."""
        before, depth = self.fake.now, trained * width + frozen
        config = copy.deepcopy(self.config)
        config.num_hidden_layers, config.layer_types = depth, ["full_attention"] * depth
        config.layer_plan = LayerPlan.identity(depth).to_dict()
        how = {"dtype": getattr(torch, dtype), "attn_implementation": _attention(self.args)}
        teacher = AutoModelForCausalLM.from_config(config, **how).eval().requires_grad_(False)
        plan = LayerPlan.identity(depth)
        if width > 1:
            plan = plan.with_pairs(range(width * n, width * (n + 1)) for n in range(trained))
        student = apply_plan(teacher, plan, share_weights=True)
        with patch.object(nn.Module, "to", lambda module, *_, **__: module):  # PEFT calls it
            make_trainable(student, list(range(trained)), everything, lora_config(lora_r)).train()
        return teacher, student, self.fake.now - before

    def _step(self, teacher: PreTrainedModel, student: PreTrainedModel, trained: int, rows: int) -> list[int]:
        """Go forward and back on a full batch; the gradients stay. Returns the bytes before the divergence, twice."""
        args, length = self.args, self.length - 1
        ids = torch.zeros(rows, self.length, dtype=torch.long)
        valid = torch.arange(rows).repeat_interleave(length), torch.arange(length).repeat(rows)
        states = HiddenStateMap.of(plan_of(student), plan_of(teacher), list(range(trained)))
        shared = None if student.get_input_embeddings().weight.requires_grad else 0
        half = torch.float16 if args.fp16 else torch.bfloat16
        with torch.autocast("cpu", half, enabled=bool(args.bf16 or args.fp16)):
            towers = run_towers(student, teacher, {"input_ids": ids}, valid, states, shared)
            parts = parts_of_loss(towers, student.lm_head, teacher.lm_head, torch.zeros_like(valid[0]), args)
            divergence = [self.fake.now]
            reached = (part for part in (towers.student_final, student.lm_head.weight) if part.requires_grad)
            stand_in = sum((part * 1.0).sum() for part in reached)  # makes gradients of the same size
            stand_in.register_hook(lambda _: divergence.append(self.fake.now))
            del towers
        (parts["hidden"] + parts["final_hidden"] + stand_in).backward()
        return divergence

    def _logits(self, way: Way, rows: int) -> np.ndarray:
        """Count what the divergence and the next-token loss take at once, forward and back."""
        args, hidden, vocabulary, tokens = (
            self.args,
            self.config.hidden_size,
            self.config.vocab_size,
            rows * self.length,
        )
        itemsize = 2 if args.bf16 or args.fp16 else getattr(torch, way.dtype).itemsize
        rows, columns = min(tokens, TOKEN_CHUNK_SIZE), min(vocabulary, VOCAB_CHUNK_SIZE)
        tiles = rows * columns * 2 * 4 + (2 * rows + columns) * hidden * itemsize  # of both models
        gradients = rows * columns * itemsize + 4 * hidden * (tokens + way.everything * vocabulary)
        chunk = 3 * 4 * min(tokens * vocabulary, MAX_LOGITS_PER_CHUNK["cuda"])
        return np.maximum(self.has_divergence * np.array([tiles, tiles + gradients]), self.has_next_token * chunk)


def _attention(args: IterativeLayerDistillConfig) -> str:
    """Name an attention that takes no mask where rows need none: without values to look at, models would make one."""
    if not (args.packing and args.packing_strategy == "wrapped"):
        return "sdpa"
    AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
    return "sdpa_without_mask"
