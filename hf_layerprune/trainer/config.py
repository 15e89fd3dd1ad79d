"""Settings of iterative layer-wise distillation."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

import torch
from trl import SFTConfig

from ..budget import TARGETS, Budget, EditSpace
from ..compensation import COMPENSATIONS, check_compensation
from ..environment import has_bf16
from ..errors import LayerPruneError
from ..losses import HIDDEN_DISTANCES
from ..scoring import CRITERIA, MEASURED, Race, criterion_of
from .targets import named_layers

HIDDEN_TARGETS = ("states", "updates")
WHOLE_NUMBERS = {  # and the least they may be
    "target_num_layers": 1,
    "target_num_parameters": 1,
    "layers_per_round": 1,
    "protect_first_layers": 0,
    "protect_last_layers": 0,
    "num_calibration_samples": 1,
    "num_repair_samples": 1,
    "num_eval_samples": 1,
    "max_length": 2,
    "seed": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
}
NUMBERS = {  # the same
    "kl_weight": 0,
    "hidden_weight": 0,
    "lm_weight": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "num_train_epochs": 0,
}


def _joined(value: Any) -> Any:
    """A list, or a single number, as YAML reads it, in the form of the command line."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(value) if isinstance(value, int) else value


@dataclass
class IterativeLayerDistillConfig(SFTConfig):
    r"""
    Configuration of the [`IterativeLayerDistillTrainer`].

    Text handling, packing, precision, optimizer, logging and the rest are those of [`~trl.SFTConfig`]. `max_steps`,
    `num_train_epochs` and the learning-rate schedule hold for EACH round of healing.

    Other defaults than there: `learning_rate` 1e-4 (the paper's), no gradient checkpointing, and `bf16` only where the
    hardware computes in it.

    Parameters:
        target_num_layers (`int`, *optional*):
            Depth at which to stop: rounds of score, remove, heal, evaluate go on until the student has this many
            layers (parallel ones count as one). Below the model's depth; a student may stay at its own, and is healed
            in one round without an edit.
        target_latency (`float`, *optional*):
            In place of `target_num_layers`: time per generated token to reach, as a share of the teacher's, measured
            on this machine in the dtype in memory. Edits are then weighed by what they save of it.
        target_num_parameters (`int`, *optional*):
            In place of `target_num_layers`: number of parameters to reach. Running layers in parallel saves none to
            speak of.
        plan (`str`, *optional*):
            Where the model is a student whose config does not say which of its teacher's layers it holds: a file that
            does, such as `plan.json`. By default they are found by comparing weights.
        edits (`str`, *optional*, defaults to `"remove"`):
            What a round may do: `"remove"` a layer, `"parallelize"` two neighbours
            ([Leveraging the True Depth of LLMs](https://huggingface.co/papers/2502.02790)), or
            `"remove,parallelize"`, whichever costs less for what it saves.
        max_group_size (`int`, *optional*, defaults to `2`):
            Most layers that run in parallel in one block.
        layers_per_round (`int`, *optional*, defaults to `1`):
            Layers removed (edits made) between two healings. The last round makes fewer if needed.
        criterion (`str`, *optional*, defaults to `"kl"`):
            What a layer costs: `"kl"`, `"loss"`, `"tasks"` as in the paper, or an estimate to compare them with, such
            as `"block_influence"` or your own function as `"module:function"`; see [`score`]. `"angular_distance"`
            removes the layers of a round as one contiguous stretch.
        tasks (`str`, *optional*):
            Representative data sets that score layers, with `criterion="tasks"`, which is implied: `"default"`,
            `"paper"`, a YAML file, `"lm_eval:NAME"`, or several with commas between; see [`load_tasks`].
        one_shot (`bool`, *optional*, defaults to `False`):
            Score once, on the model the run starts from, and remove in that order; by default every round scores the
            healed student again.
        race_confidence (`float`, *optional*):
            Let layers race: those worse than the best beyond doubt see the first part of the calibration data only.
            The probability to choose the same layer as all data would, such as 0.95. By default all see all data.
        protect_first_layers (`int`, *optional*, defaults to `0`):
            Number of first teacher layers that no edit touches.
        protect_last_layers (`int`, *optional*, defaults to `0`):
            Number of last teacher layers that no edit touches.
        num_calibration_samples (`int`, *optional*, defaults to `64`):
            Rows of calibration data (of `max_length` tokens where packed) that score the layers.
        num_repair_samples (`int`, *optional*):
            Rows of calibration data that `compensation` repairs a student on; those that score the layers by default.
            A repair costs two passes over them, scoring one per layer: many rows are cheap here, and help.
        num_eval_samples (`int`, *optional*):
            Rows of `eval_dataset` that measure quality; all by default.
        compensation (`str`, *optional*, defaults to `"none"`):
            Repair the student in closed form after each removal, before it is healed: `"least_squares"`, see
            [`compensate`]. Measured scores are taken after the repair.
        heal (`bool`, *optional*, defaults to `True`):
            Whether rounds heal the student; without it layers are only chosen and removed.
        trained_layers (`str`, *optional*, defaults to `"neighbours"`):
            What healing trains: `"neighbours"`, the layers before and after each layer removed in the round (as in
            the paper) and the blocks merged in it; `"all"` parameters; or named teacher layers, such as
            `"3,4,10"`.
        kl_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the divergence of the next-token distributions, nats per token.
        beta (`float`, *optional*, defaults to `0.0`):
            Which divergence: 0 is KL(teacher || student), 1 is KL(student || teacher), between them the generalized
            Jensen-Shannon divergence of [GKD](https://huggingface.co/papers/2306.13649).
        hidden_weight (`float`, *optional*, defaults to `10.0`):
            Weight of the hidden-state part: the distance of the healed layers' outputs and of the final state from the
            teacher's, averaged over tokens and over the states compared.
        hidden_distance (`str`, *optional*, defaults to `"mse"`):
            `"mse"`, the squared error over the teacher's mean square, or `"cosine"`, 1 - cos.
        hidden_target (`str`, *optional*, defaults to `"states"`):
            What of the healed layers is compared: the `"states"` they hand on, or the `"updates"`, what they add to
            the residual stream (with what the removed layers next to them added).
        lm_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the next-token loss on the data, nats per token.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of both distributions in the KL part.
        loss_preset (`str`, *optional*):
            `"paper"`: the loss of [Iterative Layer-wise Distillation](https://huggingface.co/papers/2511.05085) in its
            authors' own units, KL summed over all tokens of a micro-batch / 100 + MSE of the last healed layer + MSE
            of the final state. It depends on the batch shape, and replaces all settings of the loss but
            `temperature`.
        measure_speed (`bool`, *optional*, defaults to `True`):
            Whether to time the teacher and every depth, side by side, at the end of a run.

    Raises:
        [`LayerPruneError`]: for a value out of range.
    """

    target_num_layers: int | None = field(
        default=None,
        metadata={
            "help": "Depth at which to stop: rounds go on until the student has this many layers. On the command line "
            "three quarters of the model's, if no target is given."
        },
    )
    target_latency: float | None = field(
        default=None,
        metadata={"help": "Instead: time per generated token to reach, as a share of the teacher's, measured here."},
    )
    target_num_parameters: int | None = field(
        default=None, metadata={"help": "Instead: number of parameters to reach."}
    )
    plan: str | None = field(
        default=None,
        metadata={"help": "Of a student made elsewhere: the plan.json of the teacher's layers it holds; else found."},
    )
    edits: str = field(
        default="remove",
        metadata={"help": "What a round may do: 'remove', 'parallelize' or 'remove,parallelize'."},
    )
    max_group_size: int = field(default=2, metadata={"help": "Most layers that run in parallel in one block."})
    layers_per_round: int = field(default=1, metadata={"help": "Layers removed (edits made) between two healings."})
    criterion: str = field(
        default="kl",
        metadata={"help": f"What a layer costs: {', '.join(CRITERIA)}, or your own function as module:function."},
    )
    tasks: str | None = field(
        default=None,
        metadata={"help": "Data sets that score layers: 'default', 'paper', a YAML file or 'lm_eval:NAME'."},
    )
    one_shot: bool = field(
        default=False, metadata={"help": "Score once and remove in that order, instead of scoring in every round."}
    )
    race_confidence: float | None = field(
        default=None,
        metadata={"help": "Drop layers early that are worse beyond doubt; confidence of the choice, such as 0.95."},
    )
    protect_first_layers: int = field(
        default=0, metadata={"help": "Number of first teacher layers that no edit touches."}
    )
    protect_last_layers: int = field(
        default=0, metadata={"help": "Number of last teacher layers that no edit touches."}
    )
    num_calibration_samples: int = field(
        default=64, metadata={"help": "Rows of calibration data that score the layers."}
    )
    num_repair_samples: int | None = field(
        default=None,
        metadata={"help": "Rows of calibration data to repair on; those that score the layers by default."},
    )
    num_eval_samples: int | None = field(
        default=None, metadata={"help": "Rows of the evaluation data that measure quality; all by default."}
    )
    compensation: str = field(
        default="none",
        metadata={
            "help": "Repair in closed form after every removal: 'none' or 'least_squares'.",
            "choices": COMPENSATIONS,
        },
    )
    heal: bool = field(
        default=True, metadata={"help": "Whether rounds heal; without it layers are only chosen and removed."}
    )
    trained_layers: str = field(
        default="neighbours",
        metadata={
            "help": "What healing trains: 'neighbours' of the removed layers, 'all' parameters, or named teacher "
            "layers such as '3,4,10'."
        },
    )
    kl_weight: float = field(default=1.0, metadata={"help": "Weight of KL(teacher || student), nats per token."})
    beta: float = field(
        default=0.0,
        metadata={"help": "Divergence: 0 KL(teacher || student), 1 KL(student || teacher), Jensen-Shannon between."},
    )
    hidden_weight: float = field(
        default=10.0,
        metadata={"help": "Weight of the hidden-state part: the distance of hidden states from the teacher's."},
    )
    hidden_distance: str = field(
        default="mse",
        metadata={"help": "'mse', over the teacher's mean square, or 'cosine'.", "choices": tuple(HIDDEN_DISTANCES)},
    )
    hidden_target: str = field(
        default="states",
        metadata={
            "help": "Compare the 'states' that healed layers hand on, or the 'updates' they add.",
            "choices": HIDDEN_TARGETS,
        },
    )
    lm_weight: float = field(default=0.0, metadata={"help": "Weight of the next-token loss on the data."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of both distributions in the KL part."})
    loss_preset: str | None = field(
        default=None,
        metadata={
            "help": "'paper': the authors' own loss, KL summed over the micro-batch / 100 + MSE + MSE, in place of "
            "kl_weight and hidden_weight."
        },
    )
    measure_speed: bool = field(
        default=True, metadata={"help": "Whether to time the teacher and every depth at the end of a run."}
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of each healing."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations in the backward pass to save memory."}
    )

    def __post_init__(self) -> None:
        self.trained_layers, self.tasks = _joined(self.trained_layers), _joined(self.tasks)
        self.as_given = {item.name: deepcopy(getattr(self, item.name)) for item in fields(self)}  # nothing derived yet
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and has_bf16(self.use_cpu)
        super().__post_init__()
        self.include_num_input_tokens_seen = "non_padding"  # the report says how much text each healing took
        self._check_numbers()
        self._check_loss()
        self._check_memory()
        self.named_trained_layers()
        self._check_choice()

    def _check_numbers(self) -> None:
        for name, least in (WHOLE_NUMBERS | NUMBERS).items():
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, Integral if name in WHOLE_NUMBERS else Real):
                raise LayerPruneError(f"{name}={value!r} is not a {'whole ' * (name in WHOLE_NUMBERS)}number")
            if not math.isfinite(value) or value < least:
                raise LayerPruneError(f"{name}={value} is out of range; it must be at least {least}")
        if not 0 < self.temperature < math.inf:
            raise LayerPruneError(f"temperature={self.temperature} is out of range; it must be above 0")
        if not 0 <= self.beta <= 1:
            raise LayerPruneError(f"beta={self.beta} is out of range; it must lie between 0 and 1")

    def _check_loss(self) -> None:
        """Do the settings of the loss fit together?"""
        if self.loss_preset not in (None, "paper"):
            raise LayerPruneError(f"loss_preset={self.loss_preset!r} is unknown; choose 'paper' or leave it out")
        for name, choices in (("hidden_distance", HIDDEN_DISTANCES), ("hidden_target", HIDDEN_TARGETS)):
            if getattr(self, name) not in choices:
                raise LayerPruneError(f"{name}={getattr(self, name)!r} is unknown; choose {' or '.join(choices)}")
        plain = (self.beta, self.hidden_distance, self.hidden_target, self.lm_weight) == (0, "mse", "states", 0)
        if self.loss_preset == "paper" and not plain:
            raise LayerPruneError(
                "loss_preset='paper' is the authors' own loss; leave out beta, hidden_distance, hidden_target and "
                "lm_weight"
            )
        for name in ("label_smoothing_factor", "loss_type"):
            if getattr(self, name) != getattr(SFTConfig, name):
                raise LayerPruneError(f"{name}={getattr(self, name)!r} belongs to another loss; leave it out")
        if self.neftune_noise_alpha and self.trained_layers != "all":
            raise LayerPruneError(
                f"neftune_noise_alpha={self.neftune_noise_alpha} adds noise to the embedding, which the teacher runs "
                "for both models; leave it out, or set trained_layers='all'"
            )
        if self.loss_preset is None and not (self.kl_weight or self.hidden_weight or self.lm_weight):
            raise LayerPruneError(
                "kl_weight, hidden_weight and lm_weight are all 0; healing needs at least one of them"
            )

    def _check_memory(self) -> None:
        """Can activations be kept and made again as is asked?"""
        if self.activation_offloading and self.use_cpu:
            raise LayerPruneError(
                "activation_offloading=True moves activations off a GPU, and there is none; leave it out"
            )
        if (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise LayerPruneError(
                "gradient_checkpointing_kwargs={'use_reentrant': True} gives layers after frozen ones no gradient; "
                "leave it out"
            )

    def _check_choice(self) -> None:
        """Do the settings that choose layers fit together?"""
        criterion_of(self.criterion)
        if self.criterion == "tasks" and self.tasks is None:
            self.tasks = "default"
        if self.tasks is not None and self.criterion != "tasks":
            if self.criterion != type(self).criterion:
                raise LayerPruneError(f"tasks={self.tasks!r} are for criterion='tasks', not {self.criterion!r}")
            self.criterion = "tasks"
        measured = " or ".join(repr(name) for name in MEASURED)
        if "parallelize" in self.edit_space().kinds:
            if self.criterion not in MEASURED:
                raise LayerPruneError(
                    f"criterion={self.criterion!r} tells nothing about running layers in parallel; choose {measured}"
                )
            if self.one_shot:
                raise LayerPruneError("one_shot=True removes layers in a fixed order; it cannot run them in parallel")
        if self.race_confidence is not None:
            if self.criterion not in MEASURED or self.one_shot:
                raise LayerPruneError(
                    f"race_confidence={self.race_confidence} needs a criterion that is measured ({measured}) and "
                    "every round scored for one choice; leave out one_shot"
                )
            Race(self.race_confidence)
        check_compensation(self.compensation)
        if self.num_repair_samples is not None and self.compensation == "none":
            raise LayerPruneError(
                f"num_repair_samples={self.num_repair_samples} are read by compensation='least_squares'; set both"
            )
        if self.compensation != "none" and "remove" not in self.edit_space().kinds:
            raise LayerPruneError(
                f"compensation={self.compensation!r} repairs the gap that a removed layer leaves, and edits="
                f"{self.edits!r} removes none; leave it out"
            )

    def edit_space(self) -> EditSpace:
        """The edits a round may make."""
        return EditSpace(self.edits, self.max_group_size, self.protect_first_layers, self.protect_last_layers)

    def budget(self) -> Budget | None:
        """What the rounds lead to; `None` where no target is set.

        Raises:
            [`LayerPruneError`]: if more than one target is set, or one is out of range.
        """
        targets = {unit: getattr(self, name) for unit, name in TARGETS.items() if getattr(self, name) is not None}
        if len(targets) > 1:
            raise LayerPruneError(f"{' and '.join(TARGETS[unit] for unit in targets)} are both set; choose one target")
        return Budget.of(targets) if targets else None

    def named_trained_layers(self) -> tuple[int, ...] | None:
        """The teacher layers `trained_layers` names, or `None` where it is a word.

        Raises:
            [`LayerPruneError`]: if it is neither a known word nor a list of integers.
        """
        return named_layers(self.trained_layers)
