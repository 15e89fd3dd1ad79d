"""Which data sets a verb reads."""

from __future__ import annotations

from datasets import Dataset

from ..data import EMBEDDED_MODEL, load_text_dataset, may_have
from ..errors import LayerPruneError
from ..loading import resolve
from .arguments import DataArguments


def is_embedded(model: str) -> bool:
    """Whether the texts that come with the package are this model's own."""
    return resolve(model) == EMBEDDED_MODEL


def check_sources(arguments: DataArguments, *others: str | None) -> None:
    """Raise [`LayerPruneError`] if no text is named for a model that brings none, or a split of what has none.

    Args:
        arguments ([`DataArguments`]): settings of the verb.
        others (`str`, *optional*): the further data sets they name.
    """
    if arguments.dataset is None and not is_embedded(arguments.model):
        raise LayerPruneError(
            f"--dataset is missing: which text is {arguments.model} to read? (The English books that come with the "
            "package are embedded:healing, embedded:calibration and embedded:held_out)"
        )
    named = [source for source in (arguments.dataset, *others) if source is not None]
    whole = " and ".join(named) or "the embedded text"
    split = arguments.dataset_split
    if split != DataArguments.dataset_split and not any(may_have(source, split) for source in named):
        raise LayerPruneError(
            f"dataset_split={split!r} is not in {whole}: a local file takes 'train' or a slice such as 'train[:100]'; "
            "leave it out"
        )


def read_dataset(arguments: DataArguments, source: str) -> Dataset:
    """A data set that the settings of a verb name."""
    return load_text_dataset(source, arguments.dataset_split, arguments.dataset_config)
