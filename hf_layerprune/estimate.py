"""What a run needs before it starts: memory for every way to heal, disk, tokens and rough time."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from .budget import ModelSizes
from .errors import LayerPruneError
from .memory import DEFAULT_LENGTH, StepMeter, StepNeeds
from .plan import Edit, LayerPlan
from .scoring.measure import TOKEN_MEASURES
from .surgery import plan_of
from .trainer import IterativeLayerDistillConfig

UNITS = {"": 1, "b": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("kmgt", 1)
    for unit, base in (("", 1024), ("ib", 1024), ("b", 1000))
}
SPARE = 0.1  # of the memory: what the allocator cannot use, and the device's own
ROWS = (1, 2, 4, 8)
# TFLOP/s, where none is given: about a third of what an A100 names for bfloat16, most of what it names for float32.
ASSUMED_TFLOPS = {"half": 100.0, "float32": 15.0}
TILES_OF_SCORING = 4 * 4 * 2**27  # bytes: logits, probabilities and their like of a chunk, in float32


def parse_size(text: str) -> int:
    """Bytes of `"24GiB"`, `"80 GB"` or `"24G"` (which is GiB).

    Raises:
        [`LayerPruneError`]: if it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if match is None or match[2] not in UNITS or (size := int(float(match[1]) * UNITS[match[2]])) < 1:
        raise LayerPruneError(f"{text!r} is no size of memory; write it as 24GiB or 80GB")
    return size


@dataclass(frozen=True)
class HealingSetting:
    """One way to heal, and what it needs of a device.

    Attributes:
        trained (`str`): what is trained: a value of `trained_layers`, and whether by LoRA.
        dtype (`str`): of the weights in memory.
        gradient_checkpointing (`bool`): whether activations are computed twice.
        rows (`int`): rows of a micro-batch, on each device.
        accumulation (`int`): micro-batches of an optimizer step.
        weights, optimizer, activations, peak (`int`): bytes: of teacher and student, of gradients and AdamW, of
            activations and tiles of logits, and of all at the worst moment of the run.
        flops (`int`): of a micro-batch.
        checkpoint (`int`): bytes on disk of a checkpoint within a round.
    """

    trained: str
    lora_r: int | None
    dtype: str
    gradient_checkpointing: bool
    rows: int
    accumulation: int
    weights: int
    optimizer: int
    activations: int
    peak: int
    flops: int
    checkpoint: int

    def fits(self, memory: int) -> bool:
        """Whether `memory` bytes are enough, with a tenth to spare."""
        return self.peak <= (1 - SPARE) * memory

    @property
    def label(self) -> str:
        return f"{self.trained} LoRA {self.lora_r}" if self.lora_r else self.trained

    @property
    def flags(self) -> str:
        """As options of `compress`."""
        lora = f" --lora_r {self.lora_r}" if self.lora_r else ""
        return (
            f"--trained_layers {self.trained}{lora} --dtype {self.dtype} --gradient_checkpointing "
            f"{str(self.gradient_checkpointing).lower()} --per_device_train_batch_size {self.rows} "
            f"--gradient_accumulation_steps {self.accumulation}"
        )


@dataclass(frozen=True)
class RunShape:
    """The sizes of a run.

    Args:
        config ([`~transformers.Qwen2Config`]): of the model the run starts from.
        args ([`IterativeLayerDistillConfig`]): the settings of the run.
        teacher ([`~transformers.Qwen2Config`], *optional*): of the teacher, where it is another model.
        on_gpu (`bool`, *optional*, defaults to `True`): estimate for a GPU, not for a CPU.
    """

    config: PretrainedConfig
    args: IterativeLayerDistillConfig
    teacher: PretrainedConfig | None = None
    on_gpu: bool = True

    @property
    def depth(self) -> int:
        return self.config.num_hidden_layers

    @cached_property
    def sizes(self) -> ModelSizes:
        """Parameters of the parts, counted once on a model without memory."""
        with torch.device("meta"):
            return ModelSizes.of(AutoModelForCausalLM.from_config(self.config))

    @property
    def parameters(self) -> int:
        """Of the model the run starts from."""
        return self.sizes.of_plan(plan_of(self.config))

    @cached_property
    def teacher_parameters(self) -> int:
        """Of a teacher that is another model; 0 where it is the one the run starts from."""
        return 0 if self.teacher is None else RunShape(self.teacher, self.args).parameters

    @property
    def layer_parameters(self) -> int:
        return self.sizes.layer + self.sizes.norms

    @property
    def removes(self) -> bool:
        """Whether edits make the student smaller."""
        return "remove" in self.args.edit_space().kinds

    @property
    def edits(self) -> int | None:
        """How many the run makes; `None` where only measuring can tell."""
        budget = self.args.budget()
        if budget.unit == "depth":
            return self.depth - budget.target
        if budget.unit == "parameters" and self.removes:
            return math.ceil((self.parameters - budget.target) / self.layer_parameters)
        return None

    @property
    def gaps(self) -> int:
        """Layers of the teacher that the model lacks before the run."""
        plan = plan_of(self.config)
        whole = plan.num_teacher_layers if self.teacher is None else plan_of(self.teacher).depth
        return max(0, whole - plan.depth)

    @property
    def rounds(self) -> int | None:
        return None if self.edits is None else max(1, math.ceil(self.edits / self.args.layers_per_round))

    def students(self) -> list[int]:
        """Parameters of the student of every round; of the first one only, where there is no telling how many."""
        per_round = self.args.layers_per_round
        most = per_round if self.edits is None else self.edits
        done = [min(n * per_round, most) for n in range(1, (self.rounds or 1) + 1)]
        return [self.parameters - self.layer_parameters * edits * self.removes for edits in done]

    def first_edits(self, depth: int) -> list[Edit]:
        """The worst a first round can do: its edits as low as possible, and apart, so that most layers are trained."""
        wanted = min(self.args.layers_per_round, self.edits or self.args.layers_per_round)
        if self.removes:
            order = [*range(1, depth - 1, 3), *range(0, depth, 3), *range(2, depth, 3)]
            return [Edit.remove(layer) for layer in sorted(order[: min(wanted, depth - 1)])]
        return [Edit.parallelize(2 * n, 2 * n + 1) for n in range(min(wanted, depth // 2))]


def healing_settings(shape: RunShape, dtype: str, lora_r: int | None) -> list[HealingSetting]:
    """What can be healed how, the settings that are asked for first.

    Args:
        shape ([`RunShape`]): the run.
        dtype (`str`): the dtype asked for; bfloat16 is estimated as well.
        lora_r (`int`, *optional*): the rank asked for; LoRA is estimated anyway.
    """
    args = shape.args
    ways = dict.fromkeys([(args.trained_layers, lora_r), ("neighbours", None), ("all", None), ("neighbours", 16)])
    checkpointing = bool(args.gradient_checkpointing)
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    rows = [n for n in sorted({*ROWS, args.per_device_train_batch_size}) if per_step % n == 0]
    settings = []
    meter = StepMeter(shape.config, args, shape.on_gpu)
    for (trained, rank), name in product(ways, dict.fromkeys([dtype, "bfloat16"])):
        case = copy.copy(args)
        case.trained_layers = trained
        for case.gradient_checkpointing in (checkpointing, not checkpointing):
            for n in rows:
                case.per_device_train_batch_size, case.gradient_accumulation_steps = n, per_step // n
                settings.append(healing_setting(shape, case, rank, name, meter))
    return settings


def healing_setting(
    shape: RunShape, args: IterativeLayerDistillConfig, lora_r: int | None, dtype_name: str, meter: StepMeter
) -> HealingSetting:
    """What healing as `args` say needs at the worst moment of a run."""
    dtype = getattr(torch, dtype_name)
    alike = args.named_trained_layers() is None and not plan_of(shape.config).parallel_pairs

    def at(depth: int) -> StepNeeds:
        plan = LayerPlan.identity(depth) if alike else plan_of(shape.config)
        if shape.edits == 0:  # heals the layers next to the gaps that are there already: the worst is that all lie low
            case = copy.copy(args)
            if args.trained_layers == "neighbours":
                layers = plan.layers[: max(1, 2 * shape.gaps)]
                case.trained_layers = ",".join(map(str, layers))
            return meter.step(plan, [], case, dtype, lora_r)
        return meter.step(plan, _edits_of(shape, plan, depth), args, dtype, lora_r)

    first, layer = at(shape.depth), shape.layer_parameters * dtype.itemsize
    needs = [(first, first.weights, first.peak)]
    if shape.edits and args.trained_layers == "neighbours":
        before = (shape.rounds - 1) * args.layers_per_round  # edits of the rounds before the last
        gone = before if shape.removes else 0
        # what was healed before is no longer the teacher's, and takes memory of its own
        copies = min(2 * before, max(0, shape.depth - gone - 2 * args.layers_per_round))
        last = at(shape.depth - gone)
        more = layer * (gone + copies)  # the teacher keeps all its layers
        needs.append((last, last.weights + more, last.peak + more))
    worst, weights, peak = max(needs, key=lambda item: item[2])
    other = shape.teacher_parameters * dtype.itemsize
    weights, peak = weights + other, peak + other
    checkpoint = (0 if lora_r else shape.students()[0] * dtype.itemsize) + first.optimizer
    return HealingSetting(
        trained=args.trained_layers,
        lora_r=lora_r,
        dtype=dtype_name,
        gradient_checkpointing=bool(args.gradient_checkpointing),
        rows=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        weights=weights,
        optimizer=worst.optimizer,
        activations=peak - weights - worst.optimizer,
        peak=peak,
        flops=first.flops,
        checkpoint=checkpoint,
    )


def _edits_of(shape: RunShape, plan: LayerPlan, depth: int) -> Sequence[Edit]:
    """The first edits, of the layers a plan has."""
    if plan == LayerPlan.identity(depth):
        return shape.first_edits(depth)
    edits: list[Edit] = []
    while len(edits) < shape.args.layers_per_round and (possible := shape.args.edit_space().edits(plan)):
        edits.append(possible[1] if len(possible) > 1 else possible[0])
        plan = edits[-1].apply(plan)
    return edits


def scoring_bytes(shape: RunShape, setting: HealingSetting) -> int:
    """Bytes that scoring and evaluating take at least: weights, and chunks of logits."""
    return setting.weights + (TILES_OF_SCORING if shape.on_gpu else 0)


def rows_length(args: IterativeLayerDistillConfig) -> int:
    """Tokens of a full row."""
    return args.max_length or DEFAULT_LENGTH


def tokens_per_step(args: IterativeLayerDistillConfig) -> int:
    """Tokens of an optimizer step whose rows are full, on one device."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * rows_length(args)


def scoring_flops(shape: RunShape) -> int:
    """Operations that choosing the layer of the first round takes, about; 0 for guesses and tasks, and where
    nothing is chosen."""
    args, config = shape.args, shape.config
    if args.criterion not in TOKEN_MEASURES or shape.edits == 0:
        return 0
    tokens = args.num_calibration_samples * rows_length(args)
    attention = 2 * rows_length(args) * config.hidden_size  # of a token in a layer, over half of the row on average
    layers = (2 * shape.layer_parameters + attention) * shape.depth**2 // 2  # each candidate runs what is behind it
    return tokens * (layers + 2 * config.hidden_size * config.vocab_size * (shape.depth + 1)) * args.layers_per_round


def disk_bytes(shape: RunShape, setting: HealingSetting) -> dict[str, int]:
    """Bytes in the output folder at the end of the run, by what takes them; checkpoints go with their round.

    Students are saved in the dtype of the checkpoint the run starts from.
    """
    args = shape.args
    itemsize = (shape.config.dtype or getattr(torch, setting.dtype)).itemsize
    students = [parameters * itemsize for parameters in shape.students()]
    return {
        "rounds": sum(students),
        "model": students[-1],
        "checkpoints": setting.checkpoint * _checkpoints(args) if args.heal else 0,
    }


def _checkpoints(args: IterativeLayerDistillConfig) -> int:
    """Checkpoints that lie beside each other within a round; at least one where their number depends on the data."""
    if args.save_strategy == "no":
        return 0
    every = args.save_steps if args.save_strategy == "steps" and args.save_steps >= 1 else 1
    number = math.ceil(args.max_steps / every) if args.max_steps > 0 and args.save_strategy == "steps" else 1
    return max(1, min(number, args.save_total_limit or number))


def assumed_tflops(args: IterativeLayerDistillConfig, dtype: str) -> float:
    """TFLOP/s of a device nobody told us about."""
    return ASSUMED_TFLOPS["half" if args.bf16 or args.fp16 or dtype != "float32" else "float32"]
