"""Heal one student: train some of its layers so that it matches its teacher again.

The loss is the divergence of the next-token distributions + the distance of hidden states (+ the next-token loss),
each per token, without padding: [`~losses.parts_of_loss`]. https://huggingface.co/papers/2511.05085
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
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
from ..losses import loss_of_parts, parts_of_loss
from ..rows import column_names, tell_of_dropped
from ..surgery import plan_of
from .checkpoints import Checkpoint, load_trained
from .config import IterativeLayerDistillConfig
from .engines import autocast, fill, frozen_head, outline, second_copy, splits_model
from .targets import HiddenStateMap
from .towers import run_towers, shared_depth, why_nothing_is_shared, without_adapters
from .trainable import make_plain, make_trainable

logger = logging.get_logger(__name__)


class LayerHealingTrainer(SFTTrainer):
    """[`~trl.SFTTrainer`] with the loss of layer-wise distillation from `self.teacher`.

    The teacher is a plain attribute: it is in no state dict, no optimizer and no wrapper. It runs the first
    [`~towers.shared_depth`] blocks for both models. `frozen_head` is the student's head if an engine splits the
    model's own and nothing trains it.
    """

    args: IterativeLayerDistillConfig
    loss_is_scaled_for_ga = True  # the loss is divided by the token count of the whole optimizer step

    teacher: PreTrainedModel
    hidden_state_map: HiddenStateMap
    shared_depth: int | None = None
    frozen_head: nn.Linear | None = None
    _peft_config: Any | None = None
    _step_loss: Tensor | int = 0  # sum over the micro-batches of the step in progress

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
            blocks (`list[int]`): positions of the blocks whose weights change; all weights if `args` say so.
            save_dtype (`torch.dtype`): what the trained weights are rounded to in the end.
            checkpoint ([`Checkpoint`], *optional*): to continue from.
        """
        everything = self.args.trained_layers == "all"
        self.hidden_state_map = HiddenStateMap.of(plan_of(student), plan_of(self.teacher), blocks)
        trained = make_trainable(student, blocks, everything, self._peft_config)
        self.shared_depth, self._step_loss = shared_depth(trained, self.teacher), 0
        reason = why_nothing_is_shared(trained, self.teacher)
        if reason is not None and not everything and self.accelerator.is_main_process:
            logger.warning_once(f"student and teacher both run in full, which takes longer: {reason}")
        if (copied := second_copy(self.accelerator, trained)) and self.accelerator.is_main_process:
            logger.warning_once(f"the engine holds a second copy of frozen weights, {copied >> 20:,} MiB a process")
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
        """Tokenize as TRL does, which leaves out rows without a token that counts: here with a warning, and also
        before rows are packed."""
        columns, name = set(column_names(dataset)), f"{dataset_name} data"
        has_completions = {"prompt", "completion"} <= columns
        if args.completion_only_loss is None and formatting_func is None:
            self.completion_only_loss = has_completions  # of each data set; TRL's is that of the training data
        is_marked = has_completions or columns & {"completion_mask", "labels"}
        if args.completion_only_loss and dataset_name == "train" and not is_marked:
            raise LayerPruneError(
                f"completion_only_loss=True, but the {name} has columns {sorted(columns)}; bring prompt and "
                "completion, or leave it out"
            )
        cut = packing and args.packing_strategy == "bfd"  # which cuts rows, whatever is left of them
        try:
            how = (packing and not cut, formatting_func, dataset_name)
            rows = super()._prepare_dataset(dataset, processing_class, args, *how)
        except TemplateError as error:
            raise LayerPruneError(f"{name} does not fit the chat template: {first_line(error)}") from error
        if isinstance(rows, Dataset):
            if cut or not packing:
                tell_of_dropped(name, len(dataset) - len(rows), len(dataset), args.max_length)
            positions = num_positions(self.teacher.config)
            if args.max_length is None and max(map(len, rows["input_ids"])) > positions:
                raise LayerPruneError(
                    f"the {name} has rows of more tokens than the model has positions ({positions}), and "
                    "max_length=None does not cut them; set it"
                )
        return super()._prepare_dataset(rows, processing_class, args, True, None, dataset_name) if cut else rows

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if splits_model(self.accelerator) or is_peft_model(self.model):  # they load only parts of their own
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trained(self.model, Path(resume_from_checkpoint))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model so that `from_pretrained` loads it; during healing, as of the last step."""
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
        args, student = self.args, self.accelerator.unwrap_model(model)

        def parts_of_batch() -> dict[str, Tensor]:
            with autocast(self.accelerator):
                return self.loss_parts(student, inputs)

        parts = redirect_forward(model, student, parts_of_batch)
        loss, num_tokens = loss_of_parts(parts, args), parts.pop("num_tokens")
        if args.loss_preset == "paper":
            loss = loss / getattr(self, "current_gradient_accumulation_steps", 1)
        else:
            loss = loss / (num_tokens if num_items_in_batch is None else max(num_items_in_batch, 1))  # 0: no text
            if args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes  # DDP averages the gradients over processes
        for name, value in parts.items():
            log_metric(self, f"{name}_loss", (value.detach() / num_tokens).item())
        return (loss, parts) if return_outputs else loss

    def loss_parts(self, student: PreTrainedModel, inputs: Batch) -> dict[str, Tensor]:
        """What [`~losses.parts_of_loss`] gives for a batch."""
        student = without_adapters(student)
        valid, labels = valid_next_tokens(inputs)
        updates = self.args.hidden_target == "updates"
        towers = run_towers(student, self.teacher, inputs, valid, self.hidden_state_map, self.shared_depth, updates)
        return parts_of_loss(towers, self.frozen_head or student.lm_head, self.teacher.lm_head, labels, self.args)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Stops all processes if the loss of a step is not a finite number in one of them."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._step_loss = self._step_loss + loss.detach()
        if self.accelerator.sync_gradients:
            value, self._step_loss = self.accelerator.reduce(self._step_loss, "sum").item(), 0
            if not math.isfinite(value):
                raise NotANumber(
                    f"the healing loss became {value} at step {self.state.global_step + 1} of {self.state.max_steps}; "
                    f"lower the learning rate (now {self.args.learning_rate:g}) or train in higher precision"
                )
        return loss
