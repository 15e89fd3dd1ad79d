"""What the verbs that measure a model share: the model on its device, and the text in batches."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data import Batch, check_length, tokenized_batches
from ..loading import load_model
from ..tasks import PreparedTask
from .arguments import MeasureArguments
from .text import check_sources, read_dataset


def device() -> torch.device:
    """The accelerator, if there is one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def load_on_device(name: str, dtype: str, **kwargs: Any) -> PreTrainedModel:
    """Load a model onto that device, or where a `device_map` says."""
    model = load_model(name, dtype, device(), **kwargs)
    return model if kwargs.get("device_map") else model.to(device())


def check_text(arguments: MeasureArguments, config: PretrainedConfig, *others: str | None) -> None:
    """Raise [`LayerPruneError`] unless text is named, and its rows fit the model; `others` are more data sets."""
    check_sources(arguments, *others)
    check_length(arguments.max_length, config, arguments.model)


def text_batches(
    arguments: MeasureArguments, tokenizer: PreTrainedTokenizerBase, source: str, num_rows: int
) -> list[Batch]:
    """Rows of the data set `source`, read as the settings say."""
    return tokenized_batches(
        read_dataset(arguments, source),
        tokenizer,
        text_field=arguments.dataset_text_field,
        max_length=arguments.max_length,
        num_rows=num_rows,
        batch_size=arguments.batch_size,
    )


def num_chunks(tasks: list[PreparedTask]) -> int:
    """Pieces that tasks are measured in, for a progress bar."""
    return sum(len(task.chunks) for task in tasks)
