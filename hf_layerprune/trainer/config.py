"""Settings of iterative layer-wise distillation."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_liger_kernel_available
from trl import SFTConfig

from ..budget import TARGETS, Budget, EditSpace
from ..compensation import COMPENSATIONS
from ..environment import has_bf16
from ..errors import LayerPruneError
from ..scoring import CRITERIA, MEASURED, Race, criterion_of
from ..settings import check_at_least, option

TRAINED_LAYERS = ("neighbours", "all")
METRICS = ("loss", "perplexity", "kl", "agreement")  # that `evaluate` gives
CHOICES = {"compensation": COMPENSATIONS, "loss_preset": (None, "paper")}
AT_LEAST = {
    "layers_per_round": 1, "num_calibration_samples": 1, "num_repair_samples": 1, "num_eval_samples": 1,
    "kl_weight": 0.0, "hidden_weight": 0.0, "lm_weight": 0.0, "on_policy_steps": 0, "on_policy_tokens": 1,
    "learning_rate": 0.0, "on_policy_learning_rate": 0.0, "max_length": 2, "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1, "seed": 0, "dataloader_num_workers": 0,
    "weight_decay": 0.0,
}  # fmt: skip


def as_words(value: Any) -> str:
    """Several values as the command line takes them: `"3,4"`."""
    return str(value) if isinstance(value, str) or not isinstance(value, Iterable) else ",".join(map(str, value))


@dataclass
class IterativeLayerDistillConfig(SFTConfig):
    r"""
    Configuration of the [`IterativeLayerDistillTrainer`].

    Text handling, packing, precision, optimizer, logging and the rest are those of [`~trl.SFTConfig`]. `max_steps`,
    `num_train_epochs` and the learning-rate schedule hold for EACH round of healing. Other defaults than there:
    `learning_rate` 1e-4 (the paper's), no gradient checkpointing, and `bf16` only where the hardware computes in it.

    Once made, the settings are values: `edits` is a tuple, `trained_layers` a word or a tuple of layers, and `budget`,
    `edit_space` and `race` hold what the target, edit and race settings say. `given_bf16` is `bf16` as it was given.

    Parameters:
        target_num_layers (`int`, *optional*):
            Depth at which to stop; a block of parallel layers counts as one. A student that has it already is healed
            in one round.
        target_latency (`float`, *optional*):
            Instead: time per generated token to reach, as a share of the teacher's, measured on this machine.
        target_num_parameters (`int`, *optional*): instead: number of parameters; parallel layers save next to none.
        plan (`str`, *optional*):
            `plan.json` of a student whose config has none; by default its layers are found by comparing weights.
        edits (`str`, *optional*, defaults to `"remove"`):
            What a round may do, whichever costs less for what it saves: `"remove"` a layer, `"parallelize"` two
            neighbours ([paper](https://huggingface.co/papers/2502.02790)), `"merge"` two ([`merge`]); or several.
        max_group_size (`int`, *optional*, defaults to `2`): most layers in one block, in parallel or merged.
        layers_per_round (`int`, *optional*, defaults to `1`): layers removed (edits made) between two healings.
        criterion (`str`, *optional*, defaults to `"kl"`):
            What a layer costs; see [`score`]. `"angular_distance"` removes the layers of a round as one stretch.
        tasks (`str`, *optional*): data sets that score layers, see [`load_tasks`]; they imply `criterion="tasks"`.
        one_shot (`bool`, *optional*, defaults to `False`): score once and remove in that order.
        race_confidence (`float`, *optional*):
            Let layers race: the probability, such as 0.95, of the choice that all calibration data would make.
        protect_first_layers (`int`, *optional*, defaults to `0`): number of first teacher layers that no edit touches.
        protect_last_layers (`int`, *optional*, defaults to `0`): number of last teacher layers that no edit touches.
        num_calibration_samples (`int`, *optional*, defaults to `64`): rows of calibration data that score the layers.
        num_repair_samples (`int`, *optional*):
            Rows to fit repairs and merges to; by default those that score. A repair takes two passes over them,
            scoring one per layer: many rows are cheap here, and help.
        num_eval_samples (`int`, *optional*): rows of `eval_dataset` that measure quality; all by default.
        compensation (`str`, *optional*, defaults to `"none"`):
            `"least_squares"`: repair each removal before healing, see [`compensate`], and score after the repair.
        heal (`bool`, *optional*, defaults to `True`): whether rounds heal; without it layers are only removed.
        trained_layers (`str`, *optional*, defaults to `"neighbours"`):
            What healing trains: `"neighbours"` of the layers removed in the round (as in the paper) and the blocks
            made in it; `"all"` parameters; or named teacher layers, such as `"3,4,10"`.
        kl_weight (`float`, *optional*, defaults to `1.0`): weight of the divergence that `beta` chooses.
        beta (`float`, *optional*, defaults to `0.0`):
            0 is KL(teacher || student), 1 KL(student || teacher), between them the generalized Jensen-Shannon
            divergence of [GKD](https://huggingface.co/papers/2306.13649).
        hidden_weight (`float`, *optional*, defaults to `10.0`):
            Weight of the squared distance of the healed layers' outputs and of the final state from the teacher's,
            over the teacher's mean square: the mean over tokens and states.
        lm_weight (`float`, *optional*, defaults to `0.0`): weight of the next-token loss on the data, nats per token.
        temperature (`float`, *optional*, defaults to `1.0`): temperature of both distributions in the KL part.
        loss_preset (`str`, *optional*):
            `"paper"`: the loss of https://huggingface.co/papers/2511.05085 in its authors' units, which depends on the
            batch shape: KL summed over a micro-batch / 100 + MSE of the last healed layer + MSE of the final state. Of
            the settings of the loss only `temperature` counts.
        on_policy_steps (`int`, *optional*, defaults to `0`):
            Steps of a last round without an edit, in which [`~trl.DistillationTrainer`] heals the student on its own
            answers to `prompt_dataset` ([paper](https://huggingface.co/papers/2306.13649)).
        on_policy_tokens (`int`, *optional*, defaults to `128`): longest answer; the first have an eighth.
        on_policy_learning_rate (`float`, *optional*, defaults to `1e-5`): peak learning rate of that round.
        measure_speed (`bool`, *optional*, defaults to `True`): time the teacher and every depth at the end of a run.
        compile_layers (`bool`, *optional*, defaults to `False`):
            Compile the layers of student and teacher while a student heals: half the memory of a GPU, and less time.
            `torch_compile`, which compiles a whole model, is refused.

    Raises:
        [`LayerPruneError`]: for a value out of range.
    """

    target_num_layers: int | None = option(
        None, "Depth to stop at. The command line defaults to three quarters of the model's layers."
    )
    target_latency: float | None = option(
        None, "Instead: time per generated token to reach, as a share of the teacher's."
    )
    target_num_parameters: int | None = option(None, "Instead: number of parameters to reach.")
    plan: str | None = option(
        None, "plan.json of a student made elsewhere; by default its layers are found by comparing weights."
    )
    edits: str = option("remove", "What a round may do: one or more of 'remove', 'parallelize' and 'merge'.")
    max_group_size: int = option(2, "Most layers in one block, in parallel or merged.")
    layers_per_round: int = option(1, "Layers removed (edits made) between two healings.")
    criterion: str = option("kl", f"What a layer costs: {', '.join(CRITERIA)}, or your own as module:function.")
    tasks: str | None = option(None, "Data sets that score layers: 'default', 'paper', a YAML file or 'lm_eval:NAME'.")
    one_shot: bool = option(False, "Score once and remove in that order, instead of scoring in every round.")
    race_confidence: float | None = option(
        None, "Drop layers early that are worse with this confidence, such as 0.95."
    )
    protect_first_layers: int = option(0, "Number of first teacher layers that no edit touches.")
    protect_last_layers: int = option(0, "Number of last teacher layers that no edit touches.")
    num_calibration_samples: int = option(64, "Rows of calibration data that score the layers.")
    num_repair_samples: int | None = option(None, "Rows to fit repairs and merges to; by default those that score.")
    num_eval_samples: int | None = option(None, "Rows of the evaluation data that measure quality; all by default.")
    compensation: str = option(
        "none", "Repair in closed form after every removal: 'none' or 'least_squares'.", choices=COMPENSATIONS
    )
    heal: bool = option(True, "Whether rounds heal; without it layers are only chosen and removed.")
    trained_layers: str = option(
        "neighbours", "What healing trains: 'neighbours' of removed layers, 'all' weights, or layers such as '3,4,10'."
    )
    kl_weight: float = option(1.0, "Weight of KL(teacher || student), nats per token.")
    beta: float = option(0.0, "Divergence: 0 is KL(teacher || student), 1 KL(student || teacher).")
    hidden_weight: float = option(10.0, "Weight of the distance of hidden states from the teacher's.")
    lm_weight: float = option(0.0, "Weight of the next-token loss on the data.")
    temperature: float = option(1.0, "Temperature of both distributions in the KL part.")
    loss_preset: str | None = option(
        None, "'paper': the authors' own loss, KL summed over the micro-batch / 100 + MSE + MSE."
    )
    on_policy_steps: int = option(0, "Steps of a last round that heals the student on its own answers to prompts.")
    on_policy_tokens: int = option(128, "Longest of these answers, in tokens; the first ones have an eighth of it.")
    on_policy_learning_rate: float = option(1e-5, "Peak learning rate of these steps.")
    measure_speed: bool = option(True, "Whether to time the teacher and every depth at the end of a run.")
    learning_rate: float = option(1e-4, "Peak learning rate of each healing.")
    compile_layers: bool = option(False, "Compile layers while they heal, for a GPU: half the memory, less time.")
    gradient_checkpointing: bool | None = option(None, "Recompute activations in the backward pass to save memory.")

    def __post_init__(self) -> None:
        self.given_bf16, self._given_greater, self._settled_tasks = self.bf16, self.greater_is_better, None
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and has_bf16(self.use_cpu)
        self.report_to = self.report_to or "none"  # `null` in a recipe
        if getattr(self, "activation_checkpointing", None) is None:  # what transformers 5.23 calls it
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()
        self.include_num_input_tokens_seen = "non_padding"  # the report says how much text each healing took
        # the reentrant kind gives layers after frozen ones no gradient; transformers reads the second name
        kwargs = (self.gradient_checkpointing_kwargs or {}) | {"use_reentrant": False}
        self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs = kwargs
        self.settle()

    def settle(self) -> None:
        """Check the settings and derive what follows from them; again where some were changed since."""
        self._check_values()
        if (metric := self.metric_for_best_model) is not None:
            if (name := metric.removeprefix("eval_")) not in METRICS:
                raise LayerPruneError(
                    f"metric_for_best_model={metric!r} is not measured; choose one of {', '.join(METRICS)}"
                )
            if self._given_greater is None:
                self.greater_is_better = name == "agreement"
        self.trained_layers = parsed_layers(self.trained_layers)
        protected = (self.protect_first_layers, self.protect_last_layers)
        self.edit_space = EditSpace(self.edits, self.max_group_size, *protected)
        self.edits = self.edit_space.kinds
        targets = {unit: getattr(self, name) for unit, name in TARGETS.items() if getattr(self, name) is not None}
        self.budget = Budget.of(targets) if targets else None
        self.race = None if self.race_confidence is None else Race(self.race_confidence, self.seed)
        self._settle_choice()

    def init_kwargs(self, is_loaded: bool) -> dict[str, Any]:
        """How models given by name are loaded; refuse `model_init_kwargs` where all are loaded already."""
        given = dict(self.model_init_kwargs or {})
        if given and is_loaded:
            raise LayerPruneError(
                f"model_init_kwargs={given} has no effect on a loaded model; name the model, or leave it out"
            )
        if "torch_dtype" in given:
            given["dtype"] = given.pop("torch_dtype")
        return {"dtype": torch.float32, "trust_remote_code": self.trust_remote_code} | given

    def _check_values(self) -> None:
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise LayerPruneError(f"{name}={value!r} is unknown; choose {' or '.join(map(str, choices))}")
        check_at_least(self, AT_LEAST)
        if self.heal and (self.max_steps < -1 or self.max_steps == 0):  # by 0 a `Trainer` makes a step
            raise LayerPruneError(
                f"max_steps={self.max_steps} must be at least 1, or -1 for num_train_epochs; to heal nothing, set "
                "heal to False"
            )
        if self.heal and self.max_steps == -1 and not self.num_train_epochs > 0:
            raise LayerPruneError(f"num_train_epochs={self.num_train_epochs} must be above 0, or set max_steps")
        if self.heal and self.use_liger_kernel and not is_liger_kernel_available():
            raise LayerPruneError("use_liger_kernel needs the package liger-kernel, which is not installed")
        if not (0 < self.temperature < math.inf and 0 <= self.beta <= 1):
            raise LayerPruneError(f"temperature={self.temperature} must be above 0, beta={self.beta} between 0 and 1")
        if not self.on_policy_steps:
            for name in ("on_policy_tokens", "on_policy_learning_rate"):
                if (value := getattr(self, name)) != getattr(type(self), name):
                    raise LayerPruneError(f"{name}={value} has no effect without on_policy_steps; leave it out")
        if self.loss_preset == "paper":
            for name in ("kl_weight", "beta", "hidden_weight", "lm_weight"):
                if (value := getattr(self, name)) != getattr(type(self), name):
                    raise LayerPruneError(f"loss_preset='paper' is the authors' own loss; leave out {name}={value}")
        if self.loss_preset is None and not (self.kl_weight or self.hidden_weight or self.lm_weight):
            raise LayerPruneError("kl_weight, hidden_weight and lm_weight are all 0; healing needs one of them")
        template = self.chat_template_path or ""
        if template.endswith((".jinja", ".j2")) and not Path(template).is_file():  # TRL would look for it on the Hub
            raise LayerPruneError(f"chat_template_path={template!r} does not exist; give a file, or a model with one")
        if self.activation_offloading and self.use_cpu:
            raise LayerPruneError("activation_offloading moves activations off a GPU, and there is none; leave it out")
        for name in ("label_smoothing_factor", "loss_type"):
            if (value := getattr(self, name)) != getattr(SFTConfig, name):
                raise LayerPruneError(f"{name}={value!r} has no effect on distillation; leave it out")
        if self.neftune_noise_alpha and self.trained_layers != "all":
            raise LayerPruneError(
                f"neftune_noise_alpha={self.neftune_noise_alpha} adds noise to the embedding, which the teacher runs "
                "for both models; leave it out, or set trained_layers='all'"
            )

    def _settle_choice(self) -> None:
        """Let new `tasks` imply their criterion, and check that criterion, edits and repairs go together."""
        if callable(self.criterion):
            name = getattr(self.criterion, "__name__", type(self.criterion).__name__)
            raise LayerPruneError(
                f"criterion={name} is a function, which a run cannot record; give it as 'module:function'"
            )
        criterion_of(self.criterion)
        self.tasks = self.tasks and as_words(self.tasks)
        if self.tasks not in (None, self._settled_tasks) and self.criterion == type(self).criterion:
            self.criterion = "tasks"
        self._settled_tasks = self.tasks
        if self.tasks is not None and self.criterion != "tasks":
            raise LayerPruneError(f"tasks={self.tasks!r} are for criterion='tasks', not {self.criterion!r}")
        asked = [f"race_confidence={self.race_confidence}"] if self.race else []
        asked += [f"edits={','.join(self.edits)!r}"] if self.edits != ("remove",) else []
        if self.num_repair_samples is not None and self.compensation == "none" and "merge" not in self.edits:
            raise LayerPruneError(
                f"num_repair_samples={self.num_repair_samples} has no effect without compensation='least_squares' or "
                "edits='merge'"
            )
        if self.compensation != "none" and "remove" not in self.edits:
            raise LayerPruneError(f"compensation repairs removals, but edits={','.join(self.edits)!r} makes none")
        if self.one_shot and self.criterion == "angular_distance" and self.budget and self.budget.unit != "depth":
            raise LayerPruneError("criterion='angular_distance' with one_shot needs a depth; give target_num_layers")
        if asked and (self.one_shot or self.criterion not in MEASURED):
            raise LayerPruneError(
                f"{asked[0]} needs a criterion that is measured in every round; choose one of {', '.join(MEASURED)} "
                f"(now {self.criterion!r}), and leave out one_shot"
            )


def settled(args: IterativeLayerDistillConfig) -> IterativeLayerDistillConfig:
    """A copy of the settings that a trainer may change, checked again: some may have been set since they were made."""
    if not isinstance(args, IterativeLayerDistillConfig):
        raise LayerPruneError(f"args is of type {type(args).__name__}; give an IterativeLayerDistillConfig")
    args = copy.copy(args)
    args.settle()
    return args


def parsed_layers(trained_layers: Any) -> str | tuple[int, ...]:
    """What `trained_layers` says: one of `TRAINED_LAYERS`, or the teacher layers it names."""
    words = as_words(trained_layers)
    if words in TRAINED_LAYERS:
        return words
    try:
        return tuple(sorted({int(word) for word in words.split(",")}))
    except ValueError:
        raise LayerPruneError(
            f"trained_layers={trained_layers!r} must be one of {', '.join(TRAINED_LAYERS)}, or layers such as '3,4,10'"
        ) from None
