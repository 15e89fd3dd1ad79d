"""Does a request fit together? Asked once, before anything is written."""

from __future__ import annotations

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from ..architectures import check_supported
from ..budget import TARGETS, Gauge
from ..data import column_names
from ..errors import LayerPruneError, first_line
from ..forward import check_same_vocabulary
from ..plan import LayerPlan
from ..surgery import plan_of
from .config import IterativeLayerDistillConfig

TEXT_COLUMNS = ("input_ids", "messages", "conversations")


def check_request(
    name: str,
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    args: IterativeLayerDistillConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Raise [`LayerPruneError`] unless `model` can be compressed against `teacher` as `args` ask."""
    check_supported(model.config)
    depth = model.config.num_hidden_layers
    if args.budget() is None:
        raise LayerPruneError(f"target_num_layers is missing; {name} has {depth} layers, choose 1..{depth - 1}")
    if args.one_shot and args.criterion == "angular_distance" and args.budget().unit != "depth":
        raise LayerPruneError("one_shot=True with criterion='angular_distance' needs target_num_layers")
    check_same_vocabulary(model, teacher)
    if len(tokenizer) > model.config.vocab_size:
        raise LayerPruneError(
            f"the tokenizer has {len(tokenizer)} tokens but {name} only {model.config.vocab_size}; use the model's own"
        )
    try:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 10, args.lr_scheduler_kwargs or {})
    except (ValueError, TypeError) as error:
        raise LayerPruneError(f"lr_scheduler_type={args.lr_scheduler_type.value!r}: {first_line(error)}") from error
    plan, teacher_plan = plan_of(model), plan_of(teacher)
    if plan.num_teacher_layers != teacher_plan.num_teacher_layers or not set(plan.layers) <= set(teacher_plan.layers):
        raise LayerPruneError(
            f"the student's layers {list(plan.layers)} of {plan.num_teacher_layers} are not all layers of the teacher "
            f"({list(teacher_plan.layers)} of {teacher_plan.num_teacher_layers}); use the model it was pruned from"
        )
    if missing := [layer for layer in args.named_trained_layers() or () if layer not in plan.layers]:
        raise LayerPruneError(f"trained_layers names {missing}; {name} has layers {list(plan.layers)}")
    if args.budget().unit != "latency":  # which is measured when the run is opened
        check_budget(name, Gauge.of(args.budget(), args.edit_space(), model, teacher_plan), plan)


def check_budget(name: str, gauge: Gauge, plan: LayerPlan) -> None:
    """Raise [`LayerPruneError`] unless the allowed edits lead from `plan` to the target, not met yet."""
    setting, size = TARGETS[gauge.budget.unit], gauge.size(plan)
    if gauge.met(plan):
        what = f"{size:,} {gauge.budget.unit}" if gauge.budget.unit != "depth" else f"{plan.depth} layers"
        least = f"1..{plan.depth - 1}" if gauge.budget.unit == "depth" else f"less than {size:.6g}"
        raise LayerPruneError(f"{setting}={gauge.budget.target:g} but {name} has {what}; choose {least}")
    gauge.check_reachable(plan, setting)


def with_text(dataset: Dataset | IterableDataset, text_field: str, name: str) -> Dataset | IterableDataset:
    """The data set as TRL can make text of it: without prompts that no completion belongs to, where it has more.

    Raises:
        [`LayerPruneError`]: if there is no column to make text of, or none of its rows holds any.
    """
    columns = column_names(dataset)
    if text_field in columns and not isinstance(dataset, IterableDataset):
        texts = dataset[text_field]
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise LayerPruneError(f"{name}: row {number} has {text!r} in column {text_field!r}, which is no text")
        if not any(text.strip() for text in texts):
            raise LayerPruneError(f"{name}: column {text_field!r} holds no text, only blank rows")
    pairs = {"prompt", "completion"} <= set(columns)
    if not pairs and text_field not in columns and not set(TEXT_COLUMNS) & set(columns):
        raise LayerPruneError(
            f"{name} has columns {columns} but no text; name the text column with dataset_text_field (now "
            f"{text_field!r}), or bring messages or prompt and completion"
        )
    return dataset.remove_columns("prompt") if "prompt" in columns and not pairs else dataset


def check_enough_rows(rows: Dataset | IterableDataset, args: IterativeLayerDistillConfig) -> None:
    """Raise [`LayerPruneError`] unless the tokenized training rows make one batch, where they are needed."""
    if args.heal and not isinstance(rows, IterableDataset) and len(rows) < args.train_batch_size:
        raise LayerPruneError(
            f"the training data makes {len(rows)} rows of up to {args.max_length} tokens, less than one batch of "
            f"{args.train_batch_size}; give more text or lower per_device_train_batch_size"
        )
