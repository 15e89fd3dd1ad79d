"""What a run needs before it starts: memory for every way to heal, disk, tokens and rough time."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from itertools import product

import torch
from accelerate.utils import convert_file_size_to_int
from transformers import AutoModelForCausalLM, PretrainedConfig

from .budget import count_parameters
from .errors import LayerPruneError
from .memory import DEFAULT_LENGTH, StepMeter, StepShape, Way
from .scoring.estimates import TOKEN_MEASURES
from .surgery import plan_of
from .trainer import IterativeLayerDistillConfig

SPARE = 0.1  # of the memory: what the allocator cannot use, and the device's own
ROWS = (1, 2, 4, 8)
TFLOPS = {"half": 100.0, "float32": 15.0}  # of a device that is not named: a third of an A100's peak; most of it


def parse_size(text: str) -> int:
    """Read a size such as `"24GiB"`, `"80GB"`, `"80G"` or `"24"` (GiB) as bytes."""
    size = text.strip().upper()
    for unit in ("", "B", "GIB"):  # 24GiB, 24G and 24
        with suppress(ValueError):
            if (found := convert_file_size_to_int(size + unit)) > 0:
                return found
    raise LayerPruneError(f"{text!r} is not a size of memory; write it as 24GiB or 80GB")


@dataclass(frozen=True)
class HealingSetting(Way):
    """A way to heal with so many rows at a time, and the bytes it needs at the worst moment of the run."""

    rows: int  # of a micro-batch
    accumulation: int  # micro-batches of an optimizer step
    weights: int  # teacher and student
    optimizer: int  # gradients and AdamW
    activations: int  # all else
    peak: int
    flops: int  # operations of an optimizer step
    checkpoint: int  # on disk, within a round

    def fits(self, memory: int) -> bool:
        """Whether `memory` bytes are enough, with a tenth to spare."""
        return self.peak <= (1 - SPARE) * memory


@dataclass(frozen=True)
class Estimate:
    """What a run needs, in bytes, tokens and seconds."""

    parameters: int
    student_parameters: int | None  # of the last one; like `rounds`, `None` where only measuring can tell
    rounds: int | None
    settings: list[HealingSetting]  # every way to heal with every number of rows, as asked for first
    recommended: HealingSetting | None  # the first way that fits, with most rows
    disk: dict[str, int]  # in the output folder, by what takes it
    tokens_per_step: int  # where rows are full
    steps_per_round: int | None  # `None` where the data decides
    device_tflops: float
    seconds_per_step: float
    seconds_of_scoring: float  # of the first round


class RunSizes:
    """How large a run is, by the config of the model it starts from, its settings, and the config of its teacher."""

    def __init__(
        self, config: PretrainedConfig, args: IterativeLayerDistillConfig, teacher: PretrainedConfig | None = None
    ) -> None:
        plan, budget, most = plan_of(config), args.budget, args.layers_per_round
        self.config, self.args, self.layers = config, args, plan.layers
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config)  # shapes alone
            other = 0 if teacher is None else AutoModelForCausalLM.from_config(teacher).num_parameters()
        costs, self.teacher_parameters = count_parameters(self.model), other
        self.parameters, self.layer_parameters = costs.of(plan), costs.blocks[0]
        # layers of the teacher that the model lacks before the run
        self.gaps = max(0, (plan.num_teacher_layers if teacher is None else plan_of(teacher).depth) - plan.depth)
        self.length = args.max_length or DEFAULT_LENGTH
        self.per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps  # rows, on one device
        self.removed = int(args.edits != ("parallelize",))  # layers fewer after an edit; a parallel pair keeps both
        self.edits = plan.depth - budget.target if budget.unit == "depth" else None  # `None`: only measuring can tell
        if budget.unit == "parameters" and self.removed:
            self.edits = math.ceil((self.parameters - budget.target) / self.layer_parameters)
        self.edits_of_round = most if self.edits is None else min(most, self.edits)  # 0 where a run only heals
        self.rounds = None if self.edits is None else max(1, math.ceil(self.edits / most))
        last = self.edits_of_round if self.edits is None else self.edits
        done = (min(n * most, last) for n in range(1, (self.rounds or 1) + 1))  # edits, after each round
        self.students = [self.parameters - self.layer_parameters * edits * self.removed for edits in done]

    def steps(self, way: Way) -> list[StepShape]:
        """List the steps that may need most: of the first round, where gradients pass every layer, and of the last
        one, where layers healed before are no longer the teacher's."""
        last = (self.rounds - 1) * self.args.layers_per_round if self.edits and way.trained == "neighbours" else 0
        return [self._step(way, edits) for edits in dict.fromkeys((0, last))]

    def _step(self, way: Way, before: int) -> StepShape:
        gone, edits, width = before * self.removed, self.edits_of_round, 1
        copies = min(2 * before, max(0, len(self.layers) - gone - 2 * self.args.layers_per_round))
        reach = len(self.layers) - gone - edits * self.removed
        if way.trained == "all":
            trained = reach
        elif way.trained != "neighbours":
            named = way.trained
            trained, reach = len(named), min(reach, len(self.layers) - self.layers.index(min(named)))
            copies = 0 if self.removed else 2 * edits  # pairs have weights of their own, trained or not
        elif edits and not self.removed:
            trained, width = edits, 2
        else:  # next to the gaps of the round; where it only heals, to those that are there already
            trained = 2 * (edits or self.gaps)
        trained = max(1, min(trained, reach // width))
        return StepShape(trained, reach - trained * width, len(self.layers) - reach + copies, width)

    def setting(self, way: Way, rows: int, meter: StepMeter) -> HealingSetting:
        """Estimate what healing needs at the worst moment of the run; the rows of an optimizer step stay the same."""
        itemsize, steps = getattr(torch, way.dtype).itemsize, self.steps(way)
        needs = [meter.needs(way, step, rows, accumulates=self.per_step > rows) for step in steps]
        worst, other = max(needs, key=lambda need: need.peak), self.teacher_parameters * itemsize
        return HealingSetting(
            **vars(way),
            rows=rows,
            accumulation=self.per_step // rows,
            weights=worst.weights + other,
            optimizer=3 * worst.trained,
            activations=worst.peak - worst.weights - 3 * worst.trained,
            peak=worst.peak + other,
            flops=self.per_step * self.healing_flops(way, steps[0], needs[0].trained // itemsize),
            checkpoint=(0 if way.lora_r else self.students[0] * itemsize) + 3 * needs[0].trained,
        )

    def _forward_flops(self) -> int:
        """Count what a layer computes of a token, which sees half of its row on average."""
        config = self.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * self.layer_parameters + 2 * self.length * config.num_attention_heads * head_dim

    def healing_flops(self, way: Way, step: StepShape, trained: int) -> int:
        """Count roughly what healing computes on one row; `trained` parameters change."""
        own, args, layer = step.trained * step.width, self.args, self._forward_flops()
        passes = len(self.layers) + self.gaps + (own + step.frozen) * (2 + way.gradient_checkpointing)
        operations = layer * passes + (6 * trained if way.lora_r else own * layer)
        heads = (5 + way.everything) * bool(args.kl_weight or args.loss_preset == "paper")
        heads += (3 + way.everything) * bool(args.lm_weight)
        return self.length * (operations + heads * 2 * self.config.hidden_size * self.config.vocab_size)

    def scoring_flops(self, depth: int) -> int:
        """Count roughly what choosing one edit of `depth` layers computes; 0 for guesses and tasks."""
        if self.args.criterion not in TOKEN_MEASURES:
            return 0
        passes = depth * (depth + 1) // 2 + len(self.layers) * (depth < len(self.layers))
        head = 2 * self.config.hidden_size * self.config.vocab_size * (depth + 1)
        return self.args.num_calibration_samples * self.length * (passes * self._forward_flops() + head)

    def disk(self, setting: HealingSetting) -> dict[str, int]:
        """Count the bytes in the output folder; students are saved in the dtype of the checkpoint the run starts from.

        Checkpoints go with their round; where the data decides on their number, one is counted.
        """
        args, itemsize = self.args, (self.config.dtype or getattr(torch, setting.dtype)).itemsize
        kept = int(args.save_strategy != "no")
        if args.save_strategy == "steps" and args.max_steps > 0 and args.save_steps >= 1:
            kept = max(1, min(math.ceil(args.max_steps / args.save_steps), args.save_total_limit or args.max_steps))
        students = [parameters * itemsize for parameters in self.students]
        return {"rounds": sum(students), "model": students[-1], "checkpoints": setting.checkpoint * kept}


def estimate_run(run: RunSizes, memory: int, dtype: str, lora_r: int | None, tflops: float | None) -> Estimate:
    """Estimate what a run takes on a device with `memory` bytes that reaches `tflops` (assumed where not given).

    Next to the `dtype` and `lora_r` that are asked for, bfloat16 and LoRA of rank 16 are estimated too.
    """
    args, rank, settings, best = run.args, lora_r or 16, [], None
    rows = [n for n in sorted({*ROWS, args.per_device_train_batch_size}) if run.per_step % n == 0]
    meter = StepMeter(run.config, args)
    trained = dict.fromkeys([(args.trained_layers, lora_r), ("neighbours", None), ("all", None), ("neighbours", rank)])
    for how, name, twice in product(trained, dict.fromkeys([dtype, "bfloat16"]), (False, True)):
        of_way = [run.setting(Way(*how, name, twice), n, meter) for n in rows]
        best = best or next((setting for setting in reversed(of_way) if setting.fits(memory)), None)
        settings += of_way
    chosen = best or min(settings, key=lambda setting: setting.peak)
    half = args.bf16 or args.fp16 or chosen.dtype != "float32"
    tflops = tflops or TFLOPS["half" if half else "float32"]
    choices = range(len(run.layers), len(run.layers) - run.edits_of_round, -1)
    return Estimate(
        parameters=run.parameters,
        student_parameters=run.students[-1] if run.rounds else None,
        rounds=run.rounds,
        settings=settings,
        recommended=best,
        disk=run.disk(chosen),
        tokens_per_step=run.per_step * run.length,
        steps_per_round=args.max_steps if args.max_steps > 0 else None,
        device_tflops=tflops,
        seconds_per_step=chosen.flops / (tflops * 1e12),
        seconds_of_scoring=sum(map(run.scoring_flops, choices)) / (tflops * 1e12),
    )
