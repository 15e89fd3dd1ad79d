"""What the verbs that measure a model share: the model on its device, text and tasks, and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from datasets import Dataset
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data import EMBEDDED_MODEL, Batch, check_length, load_text_dataset, may_have, tokenized_batches
from ..errors import LayerPruneError
from ..loading import load_model, resolve
from ..progress import Phases
from .arguments import DataArguments, MeasureArguments


def device() -> torch.device:
    """The accelerator, if there is one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def load_on_device(name: str, dtype: str, phases: Phases, **kwargs: Any) -> PreTrainedModel:
    """Load a model onto that device, or where a `device_map` says."""
    phases.phase(f"loading {name}")
    model = load_model(name, dtype, device(), **kwargs)
    return model if kwargs.get("device_map") else model.to(device())


def check_sources(arguments: DataArguments, *others: str | None) -> None:
    """Raise [`LayerPruneError`] if no text is named for a model that brings none, or a split that no text has.

    Args:
        arguments ([`DataArguments`]): settings of the verb.
        others (`str`, *optional*): the further data sets they name.
    """
    if arguments.dataset is None and resolve(arguments.model) != EMBEDDED_MODEL:
        raise LayerPruneError(
            f"--dataset is missing: which text is {arguments.model} to read? (The English books that come with the "
            "package are embedded:healing, embedded:calibration and embedded:held_out)"
        )
    split, named = arguments.dataset_split, [name for name in (arguments.dataset, *others) if name is not None]
    if split != "train" and not any(may_have(name, split) for name in named):
        raise LayerPruneError(
            f"dataset_split={split!r} is not in {' and '.join(named) or 'the embedded text'}: a local file takes "
            "'train' or a slice such as 'train[:100]'; leave it out"
        )


def check_text(arguments: MeasureArguments, config: PretrainedConfig, *others: str | None) -> None:
    """Raise [`LayerPruneError`] unless text is named, and its rows fit the model; `others` are more data sets."""
    check_sources(arguments, *others)
    check_length(arguments.max_length, config, arguments.model)


def read_dataset(arguments: DataArguments, source: str) -> Dataset:
    """A data set that the settings of a verb name."""
    return load_text_dataset(source, arguments.dataset_split, arguments.dataset_config)


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


def print_table(names: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table on stdout, all columns but the first aligned to the right."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    for name in names:
        first = not table.columns
        table.add_column(
            name, justify="left" if first else "right", no_wrap=not first, overflow="fold", min_width=8 * first
        )
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)
