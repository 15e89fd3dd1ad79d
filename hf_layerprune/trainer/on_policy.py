"""Heal a student on its own answers, as the last phase of a run: on-policy distillation.

The student answers prompts, and learns to continue its own answers as the teacher would. So it is corrected where its
own answers go wrong, which no given text shows. Answers are short at first and grow. The trainer is TRL's.
https://huggingface.co/papers/2306.13649, https://huggingface.co/papers/2607.13124
"""

from __future__ import annotations

import copy
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from trl import DistillationConfig, DistillationTrainer

from .._trl import forward_put_back
from ..data import num_positions
from ..errors import LayerPruneError, NotANumber
from ..healing_data import read_prompts
from ..record import Healing
from ..settings import HealingDataConfig
from .config import IterativeLayerDistillConfig
from .trainable import fold_adapters, make_trainable

if TYPE_CHECKING:
    from .iterative import IterativeLayerDistillTrainer

FIRST_SHARE = 0.125  # of the longest answers: how long the first ones are
GROWING = 0.75  # share of the steps until they are the longest
OFF = {
    "push_to_hub": False, "report_to": [], "enable_jit_checkpoint": False, "eval_strategy": "no",
    "load_best_model_at_end": False, "save_strategy": "no", "remove_unused_columns": False,
    "include_num_input_tokens_seen": "no",  # it counts them itself
}  # fmt: skip


class OnPolicyTrainer(DistillationTrainer):
    """TRL's trainer, with answers that grow from an eighth of the longest, and an error if the loss is not finite."""

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        grown = min(1.0, self.state.global_step / (GROWING * self.state.max_steps))
        share = FIRST_SHARE + (1 - FIRST_SHARE) * grown
        self.generation_config.max_new_tokens = max(1, round(share * self.max_completion_length))
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not self.accelerator.reduce(loss.detach(), "sum").isfinite():
            raise NotANumber(
                f"the loss on the student's own answers is not finite at step {self.state.global_step + 1} of "
                f"{self.state.max_steps}; lower on_policy_learning_rate (now {self.args.learning_rate:g})"
            )
        return loss

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """They are token ids already: TRL would give no row's own tools to the chat template."""
        return prompts, None, {}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save none, whoever asks for one, such as an interrupt: a run that resumes begins this healing again."""


def prompts_to_answer(
    rows: Dataset | None,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    args: IterativeLayerDistillConfig,
) -> Dataset | None:
    """The token ids of the prompts in a data set that leave room for the longest answer; where the tokenizer has a
    chat template, texts are a user's message."""
    if bool(args.on_policy_steps) != (rows is not None):
        raise LayerPruneError("on_policy_steps and prompt_dataset (--prompts) belong together; give both or neither")
    if rows is None:
        return None
    config = HealingDataConfig(as_chat=tokenizer.chat_template is not None, max_new_tokens=args.on_policy_tokens)
    prompts, _ = read_prompts(rows, tokenizer, config, num_positions(model.config))
    return Dataset.from_list([{"prompt": prompt.ids} for prompt in prompts])


def heal_on_policy(
    owner: IterativeLayerDistillTrainer, student: PreTrainedModel, blocks: list[int], folder: Path
) -> tuple[PreTrainedModel, Healing]:
    """Train `blocks` of a student, or all of its weights if the settings say so, on its own answers to the prompts of
    `owner`; what is trained is copied.

    Returns the healed student, and what its healing took; tokens are those of prompts and answers. Raises
    [`NotANumber`] if the loss or a weight is not finite.
    """
    args, config, generation = owner.args, copy.deepcopy(student.config), copy.deepcopy(student.generation_config)
    trained = make_trainable(student, blocks, args.trained_layers == "all", owner._peft_config)
    tokenizer = copy.deepcopy(owner.processing_class)
    tokenizer.padding_side = "left"
    shared = {item.name: getattr(args, item.name) for item in fields(TrainingArguments) if item.init}
    own = {
        "output_dir": str(folder),
        "max_steps": args.on_policy_steps,
        "max_completion_length": args.on_policy_tokens,
        "learning_rate": args.on_policy_learning_rate,
        "generation_kwargs": {"remove_invalid_values": True},  # what diverged shows in the loss
    }
    settings = DistillationConfig(**shared | OFF | own)
    with forward_put_back(owner.teacher):
        trainer = OnPolicyTrainer(trained, owner.teacher, settings, owner.prompts, processing_class=tokenizer)
        trainer.callback_handler.callbacks = owner.callback_handler.callbacks
        began, log_before = time.perf_counter(), owner.state.log_history
        try:
            trainer.train()
        finally:
            trainer.state.log_history = log_before + trainer.state.log_history
            owner.state, owner.control = trainer.state, trainer.control
    healed = fold_adapters(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False), owner.save_dtype)
    healed.config, healed.generation_config = config, generation  # the trainer sets tokens there
    return healed, Healing(int(trainer.state.num_input_tokens_seen), time.perf_counter() - began, on_policy=True)
