"""Heal one student: train some of its layers to bring it back to its teacher.

Loss: divergence of the next-token distributions + distance of hidden states (+ next-token loss), each per token with
padding masked out. https://huggingface.co/papers/2511.05085
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging
from trl import SFTTrainer

from .._trl import leave_weights, log_metric, redirect_forward, swap_model
from ..data import Batch, num_positions, valid_next_tokens
from ..errors import LayerPruneError, NotANumber, first_line
from ..losses import cosine_distance, divergence, hidden_state_mse, next_token_loss, relative_hidden_state_mse
from ..rows import column_names, tell_of_dropped
from ..surgery import plan_of
from .checkpoints import Checkpoint, load_trained
from .config import IterativeLayerDistillConfig
from .engines import autocast, fill, frozen_head, outline, second_copy, splits_model
from .targets import HiddenStateMap
from .towers import TowerStates, run_towers, shared_depth, why_nothing_is_shared
from .trainable import make_plain, make_trainable

logger = logging.get_logger(__name__)

DISTANCES = {"paper": hidden_state_mse, "mse": relative_hidden_state_mse, "cosine": cosine_distance}


@dataclass
class Balance:
    """The weight that brings the hidden-state part of the loss to the size of the divergence.

    It is that of the whole step before, so that it depends neither on how a step is split nor on the processes.

    Attributes:
        weight (`float`): of the step in progress; 1 in the first.
    """

    weight: float = 1.0
    sums: Tensor | None = None

    def add(self, divergence: Tensor, hidden: Tensor) -> None:
        both = torch.stack([divergence.detach().float(), hidden.detach().float()])
        self.sums = both if self.sums is None else self.sums + both

    def step(self, accelerator: Accelerator) -> None:
        """At the end of each optimizer step."""
        if self.sums is not None:
            divergence, hidden = accelerator.reduce(self.sums, "sum").tolist()
            self.weight, self.sums = divergence / hidden if hidden > 0 else self.weight, None


def parts_of_loss(
    towers: TowerStates, student_head: nn.Linear, teacher_head: nn.Linear, labels: Tensor, args: Any
) -> dict[str, Tensor]:
    """The parts of the loss at N positions, each a sum over them, and their number; `labels` `(N,)` follow them."""
    paper = args.loss_preset == "paper"
    distance = DISTANCES["paper" if paper else args.hidden_distance]
    hidden = [distance(own, its).sum() for own, its in zip(towers.student, towers.teacher, strict=True)]
    hidden = hidden[-1:] if paper else hidden
    student_final, teacher_final = towers.student_final, towers.teacher_final
    parts = {
        "hidden": torch.stack(hidden).mean() if hidden else student_final.new_zeros((), dtype=torch.float32),
        "final_hidden": distance(student_final, teacher_final).sum(),
    }
    if args.kl_weight or paper:
        heads = (student_final, student_head, teacher_final, teacher_head)
        parts["kl"] = divergence(*heads, args.temperature, args.beta)
    if args.lm_weight:
        parts["lm"] = next_token_loss(student_final, student_head, labels).sum()
    return parts | {"num_tokens": torch.tensor(max(1, len(labels)), device=student_final.device)}


class LayerHealingTrainer(SFTTrainer):
    """[`~trl.SFTTrainer`] with the loss of layer-wise distillation from `self.teacher`.

    The teacher is a plain attribute: it is in no state dict, no optimizer and no wrapper. `shared_depth` says how many
    blocks it runs for both; see [`~towers.shared_depth`]. `frozen_head` is the student's head where an engine splits
    the model's own and nothing trains it.
    """

    args: IterativeLayerDistillConfig
    loss_is_scaled_for_ga = True  # the loss is divided by the token count of the whole optimizer step

    teacher: PreTrainedModel
    hidden_state_map: HiddenStateMap
    shared_depth: int | None = None
    frozen_head: nn.Linear | None = None
    _peft_config: Any | None = None
    _step_loss: Tensor | None = None  # sum of the micro-batches of the step in progress

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.balance = Balance()
        self._said: set[str] = set()
        super().__init__(*args, **kwargs)

    def heal(
        self,
        student: PreTrainedModel,
        blocks: list[int],
        save_dtype: torch.dtype,
        checkpoint: Checkpoint | None = None,
    ) -> tuple[PreTrainedModel, TrainOutput]:
        """Train a student on `self.train_dataset` against `self.teacher`.

        Args:
            student ([`~transformers.PreTrainedModel`]): may share weights with the teacher; what is trained is copied.
            blocks (`list[int]`): positions of the blocks whose weights change; all weights where `args` say so.
            save_dtype (`torch.dtype`): what the trained weights are rounded to in the end.
            checkpoint ([`Checkpoint`], *optional*): to go on from.

        Raises:
            [`NotANumber`]: if the loss or a weight is no number.
        """
        self.hidden_state_map = HiddenStateMap.of(plan_of(student), plan_of(self.teacher), blocks)
        trained = make_trainable(student, blocks, self.args.trained_layers == "all", self._peft_config)
        self.shared_depth = shared_depth(trained, self.teacher)
        self.balance, self._step_loss = Balance(1.0 if checkpoint is None else checkpoint.balance), None
        reason = why_nothing_is_shared(trained, self.teacher)
        if reason is not None and self.args.trained_layers != "all":  # which trains the embedding, as was asked for
            self._say_once("prefix", f"student and teacher both run in full, which takes longer: {reason}")
        if copied := second_copy(self.accelerator, trained):
            size = f"{copied / 2**30:.2f} GiB more on each process"
            self._say_once("copy", f"the engine splits weights that are not trained, beside the teacher's: {size}")
        empty = outline(trained) if splits_model(self.accelerator) else None
        self.frozen_head = None if empty is None else frozen_head(empty)
        swap_model(self, trained)
        leave_weights(self, trained)
        output = super().train(resume_from_checkpoint=None if checkpoint is None else checkpoint.folder)
        healed = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        healed = healed if empty is None else fill(empty, healed, self.args.device)
        return make_plain(healed, save_dtype), output

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: IterativeLayerDistillConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        """Tokenize as TRL does, which leaves out rows without a token that counts: here with a word, and also before
        they are packed."""
        columns, name = set(column_names(dataset)), f"{dataset_name} data"
        has_completions = {"prompt", "completion"} <= columns
        if args.completion_only_loss is None and formatting_func is None:
            self.completion_only_loss = has_completions  # of each data set; TRL's is that of the training data
        nothing_to_do = not (has_completions or columns & {"completion_mask", "labels"})
        if args.completion_only_loss and nothing_to_do and dataset_name == "train":
            raise LayerPruneError(
                f"completion_only_loss=True, but the {name} has columns {sorted(columns)}; bring prompt and "
                "completion, or leave it out"
            )
        cut = packing and args.packing_strategy == "bfd"  # which cuts rows, whatever is left of them
        try:
            rows = super()._prepare_dataset(
                dataset, processing_class, args, packing and not cut, formatting_func, dataset_name
            )
        except TemplateError as error:
            raise LayerPruneError(f"{name} does not fit the chat template: {first_line(error)}") from error
        if isinstance(rows, Dataset) and (cut or not packing):
            tell_of_dropped(name, len(dataset) - len(rows), len(dataset), args.max_length)
        positions = num_positions(self.teacher.config)
        if args.max_length is None and isinstance(rows, Dataset) and max(map(len, rows["input_ids"])) > positions:
            raise LayerPruneError(
                f"the {name} has rows of more tokens than the model has positions ({positions}), and max_length=None "
                "does not cut them; set it"
            )
        return super()._prepare_dataset(rows, processing_class, args, True, None, dataset_name) if cut else rows

    def _say_once(self, topic: str, message: str) -> None:
        """Warn of something in the first round it comes up in."""
        if self.accelerator.is_main_process and topic not in self._said:
            logger.warning(message)
        self._said.add(topic)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if splits_model(self.accelerator) or is_peft_model(self.model):  # they load parts of their own only
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trained(self.model, Path(resume_from_checkpoint))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model so that `from_pretrained` loads it; in a healing that of its last step."""
        if self.is_in_train or not splits_model(self.accelerator):
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir)  # no engine holds it now: it is whole on every process, and one writes it
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        student = self.accelerator.unwrap_model(model)

        def parts_of_batch() -> dict[str, Tensor]:
            with autocast(self.accelerator):
                return self.loss_parts(student, inputs)

        parts = redirect_forward(model, student, parts_of_batch)
        num_tokens = parts.pop("num_tokens")
        if self.args.loss_preset == "paper":
            loss = parts["kl"] / 100 + (parts["hidden"] + parts["final_hidden"]) / num_tokens
            loss = loss / getattr(self, "current_gradient_accumulation_steps", 1)
        else:
            args = self.args
            hidden = (parts["hidden"] + parts["final_hidden"]) / 2
            total = (self.balance.weight if args.loss_preset == "balanced" else args.hidden_weight) * hidden
            if args.kl_weight:
                total = total + args.kl_weight * parts["kl"]
            if args.loss_preset == "balanced":
                self.balance.add(args.kl_weight * parts["kl"], hidden)
            if args.lm_weight:
                total = total + args.lm_weight * parts["lm"]
            items = num_tokens if num_items_in_batch is None else max(num_items_in_batch, 1)  # 0: rows without text
            loss = total / items
            if args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes  # DDP averages the gradients over processes
        for name, value in parts.items():
            log_metric(self, f"{name}_loss", (value.detach() / num_tokens).item())
        return (loss, parts) if return_outputs else loss

    def loss_parts(self, student: PreTrainedModel, inputs: Batch) -> dict[str, Tensor]:
        """The parts of the loss, each a sum over the valid positions, and the number of these."""
        student = student.get_base_model() if is_peft_model(student) else student
        valid, labels = valid_next_tokens(inputs)
        forward_inputs = {key: value for key, value in inputs.items() if key != "labels"}
        towers = run_towers(
            student,
            self.teacher,
            forward_inputs,
            valid,
            self.hidden_state_map,
            self.shared_depth,
            updates=self.args.hidden_target == "updates",
        )
        return parts_of_loss(towers, self.frozen_head or student.lm_head, self.teacher.lm_head, labels, self.args)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._step_loss = loss.detach() if self._step_loss is None else self._step_loss + loss.detach()
        if self.accelerator.sync_gradients:
            self._check_step_loss()
            self.balance.step(self.accelerator)
        return loss

    def _check_step_loss(self) -> None:
        """All processes stop where the loss of one is no number."""
        value, self._step_loss = self.accelerator.reduce(self._step_loss, "sum").item(), None
        if not math.isfinite(value):
            raise NotANumber(
                f"the healing loss became {value} at step {self.state.global_step + 1} of {self.state.max_steps}; "
                f"lower the learning rate (now {self.args.learning_rate:g}) or train in higher precision"
            )
