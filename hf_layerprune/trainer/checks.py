"""Does a request fit together? Asked once, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, get_scheduler

from ..architectures import check_supported
from ..budget import TARGETS, Budget, Goal
from ..data import check_length
from ..errors import LayerPruneError, first_line
from ..forward import check_same_vocabulary, check_tokenizer
from ..plan import LayerPlan
from ..scoring import MEASURED
from ..surgery import plan_of
from .config import IterativeLayerDistillConfig

NOT_TAKEN = {
    "optimizers": "each round makes its own; give optimizer_cls_and_kwargs",
    "compute_loss_func": "the loss is that of distillation; see the settings of IterativeLayerDistillConfig",
    "compute_metrics": "no logits are kept; evaluate() tells loss, perplexity, KL and agreement",
    "preprocess_logits_for_metrics": "no logits are kept; evaluate() tells loss, perplexity, KL and agreement",
}
"""Arguments of other trainers that would change nothing here, and what to do instead."""


def check_arguments(
    args: IterativeLayerDistillConfig,
    train_dataset: Dataset | IterableDataset,
    peft_config: Any,
    has_teacher: bool,
    others: Mapping[str, Any],
) -> None:
    """Raise [`LayerPruneError`] unless a trainer can be made of these, as far as no model is needed to tell."""
    if not isinstance(args, IterativeLayerDistillConfig):
        raise LayerPruneError(f"args is {type(args).__name__}; give an IterativeLayerDistillConfig")
    for name, instead in NOT_TAKEN.items():
        if others.get(name) not in (None, (None, None)):
            raise LayerPruneError(f"{name} is not taken: {instead}")
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise LayerPruneError(f"peft_config={peft_config!r:.80} is no PeftConfig; give a LoraConfig")
    if args.plan is not None and not has_teacher:
        raise LayerPruneError(
            f"plan={args.plan!r} says which of a teacher's layers the model holds, but no teacher is given; name it "
            "with teacher"
        )
    if args.heal and isinstance(train_dataset, IterableDataset) and args.max_steps < 1:
        raise LayerPruneError("train_dataset is a stream, whose length nobody knows; set max_steps")


def check_request(
    name: str,
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    args: IterativeLayerDistillConfig,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: tuple[Any, dict[str, Any]] | None = None,
) -> None:
    """Raise [`LayerPruneError`] unless `model` can be compressed against `teacher` as `args` ask."""
    check_supported(model.config)
    depth = model.config.num_hidden_layers
    if args.budget() is None:
        raise LayerPruneError(f"target_num_layers is missing; {name} has {depth} layers, choose 1..{depth - 1}")
    if args.one_shot and args.criterion == "angular_distance" and args.budget().unit != "depth":
        raise LayerPruneError("one_shot=True with criterion='angular_distance' needs target_num_layers")
    check_same_vocabulary(model, teacher)
    check_tokenizer(tokenizer, model, name)
    for reader, called in ((model, name), (teacher, "the teacher")):
        check_length(args.max_length, reader.config, called)
    if args.heal and args.deepspeed is None:
        _check_optimizer(args, optimizer)
    plan, teacher_plan = plan_of(model), plan_of(teacher)
    if plan.parallel_pairs and args.criterion not in MEASURED:
        raise LayerPruneError(
            f"criterion={args.criterion!r} tells nothing of layers in parallel, and {name} has {plan.parallel_pairs}; "
            f"choose one of {', '.join(MEASURED)}"
        )
    if plan.num_teacher_layers != teacher_plan.num_teacher_layers or not set(plan.layers) <= set(teacher_plan.layers):
        raise LayerPruneError(
            f"the student's layers {list(plan.layers)} of {plan.num_teacher_layers} are not all layers of the teacher "
            f"({list(teacher_plan.layers)} of {teacher_plan.num_teacher_layers}); use the model it was pruned from"
        )
    if missing := [layer for layer in args.named_trained_layers() or () if layer not in plan.layers]:
        raise LayerPruneError(f"trained_layers names {missing}; {name} has layers {list(plan.layers)}")
    if args.budget().unit != "latency":  # which is measured when the run is opened
        check_budget(name, Goal.of(args.budget(), args.edit_space(), model, teacher_plan), plan, args.heal)


def check_added_tokens(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, args: IterativeLayerDistillConfig
) -> None:
    """Raise [`LayerPruneError`] if the tokenizer has more tokens than the model since TRL prepared it."""
    if len(tokenizer) > model.config.vocab_size:
        raise LayerPruneError(
            f"with chat_template_path={args.chat_template_path!r} the tokenizer has {len(tokenizer)} tokens but the "
            f"model only {model.config.vocab_size}; save the template alone to a .jinja file and name that file"
        )


def _check_optimizer(args: IterativeLayerDistillConfig, given: tuple[Any, dict[str, Any]] | None) -> None:
    """Make one of a single weight, with its schedule; `given` is a class and its options, in place of `args.optim`."""
    weight, setting = torch.zeros(1, requires_grad=True), f"optim={getattr(args.optim, 'value', args.optim)!r}"
    needs_model = args.optim_target_modules is not None or "layerwise" in setting or "lomo" in setting
    try:
        optimizer: torch.optim.Optimizer = torch.optim.SGD([weight], lr=1.0)
        if not needs_model:
            kind, options = given or Trainer.get_optimizer_cls_and_kwargs(args)
            optimizer = kind([weight], **options)
        setting = f"lr_scheduler_type={args.lr_scheduler_type.value!r}"
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 10, args.lr_scheduler_kwargs or {})
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise LayerPruneError(f"{setting}: {first_line(error)}") from error


def check_budget(name: str, goal: Goal, plan: LayerPlan, heal: bool) -> None:
    """Raise [`LayerPruneError`] unless the allowed edits lead from `plan` to the target, not met yet.

    A student may have the depth that is asked for, to be healed without an edit.
    """
    setting, size = TARGETS[goal.budget.unit], goal.size(plan)
    if heal and goal.budget == Budget("depth", plan.depth) and plan.blocks != goal.original.blocks:
        return
    if goal.met(plan):
        what = f"{size:,} {goal.budget.unit}" if goal.budget.unit != "depth" else f"{plan.depth} layers"
        least = f"1..{plan.depth - 1}" if goal.budget.unit == "depth" else f"less than {size:.6g}"
        raise LayerPruneError(f"{setting}={goal.budget.target:g} but {name} has {what}; choose {least}")
    goal.check_reachable(plan, setting)


def check_enough_rows(rows: Dataset | IterableDataset, args: IterativeLayerDistillConfig) -> None:
    """Raise [`LayerPruneError`] unless the tokenized training rows make one batch, where they are needed."""
    if args.heal and not isinstance(rows, IterableDataset) and len(rows) < args.train_batch_size:
        raise LayerPruneError(
            f"the training data makes {len(rows)} rows of up to {args.max_length} tokens, less than one batch of "
            f"{args.train_batch_size}; give more text or lower per_device_train_batch_size"
        )
