"""Batches of token ids, the text that comes with the package, and text of the user's own.

A batch is a dict of tensors: `input_ids` `(B, T)`, optionally `attention_mask` `(B, T)` (0 is padding), `labels`
`(B, T)` (-100 is not scored) and `position_ids` `(B, T)` (without a mask, 0 begins another document; such a batch has
one row). Position `t` predicts token `t + 1`.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ._trl import tokenized
from .errors import LayerPruneError, first_line
from .rows import column_names, tell_of_dropped, with_text

ASSETS = Path(str(files("hf_layerprune"))) / "assets"
EMBEDDED_MODEL = str(ASSETS / "teacher")
"""Folder of the small real teacher that comes with the package: 16 layers, 7.1M parameters, English books."""

EMBEDDED_TEXTS = ("calibration", "healing", "held_out")
EMBEDDED_PAIRS = "minimal_pairs"
"""Name of the embedded minimal pairs: some of BLiMP."""

FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}

logger = logging.get_logger(__name__)

Batch = Mapping[str, Tensor]
BATCH_KEYS = ("input_ids", "attention_mask", "labels", "position_ids")


def valid_next_tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """Which positions count, and what follows them: a boolean mask `(B, T)` and the labels `(N,)` of its true places.

    A position counts where it and the next one are no padding, of one document, and the next one is to be scored.
    """
    ids, positions = batch["input_ids"], batch.get("position_ids")
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    target = ids[:, 1:] if labels is None else labels[:, 1:]
    counts = target != -100
    if mask is not None:
        counts = counts & mask[:, :-1].bool() & mask[:, 1:].bool()
    elif positions is not None:  # what begins another document follows nothing
        counts = counts & (positions[:, 1:] != 0)
    valid = torch.nn.functional.pad(counts, (0, 1))
    return valid, target[counts]


def check_form(batches: Iterable[Batch], what: str = "calibration data") -> list[Batch]:
    """The batches as a list.

    Raises:
        [`LayerPruneError`]: if one of them is something else, such as a row of text.
    """
    if not isinstance(batches, Iterable):
        raise LayerPruneError(f"{what}: {batches!r:.80} is no list of batches; give dicts with input_ids")
    batches = list(batches)
    for number, batch in enumerate(batches):
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
            of = f" of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
            raise LayerPruneError(
                f"{what}: item {number} is no batch but a {type(batch).__name__}{of}; give a list of "
                "batches, dicts with token ids as a tensor input_ids of shape (rows, tokens), as "
                "hf_layerprune.tokenized_batches makes them of a data set"
            )
    return batches


def check_batches(batches: Iterable[Batch], vocab_size: int, what: str = "batches") -> list[Batch]:
    """The batches as a list, once they are known to hold something to score, without what a collator made beside them.

    Raises:
        [`LayerPruneError`]: if they are no batches, hold no position to score, or a token id outside the vocabulary.
    """
    batches = [
        {key: batch[key] for key in BATCH_KEYS if batch.get(key) is not None}
        for batch in check_form(batches, what)
        if batch["input_ids"].numel()
    ]
    for number, batch in enumerate(batches):
        _check_beside_ids(batch, vocab_size, f"{what}: batch {number}")
    if not any(valid_next_tokens(batch)[0].any() for batch in batches):
        raise LayerPruneError(
            f"{what}: no token to score; give text of two tokens or more, and a max_length that leaves as many"
        )
    for number, batch in enumerate(batches):
        low, high = int(batch["input_ids"].min()), int(batch["input_ids"].max())
        if low < 0 or high >= vocab_size:
            raise LayerPruneError(
                f"{what}: batch {number} holds token id {high if low >= 0 else low}, but the model's vocabulary has "
                f"{vocab_size} entries; was the text tokenized with another tokenizer?"
            )
    return batches


def _check_beside_ids(batch: Batch, vocab_size: int, where: str) -> None:
    """Raise [`LayerPruneError`] unless mask, labels and positions are tensors that fit the token ids."""
    shape = tuple(batch["input_ids"].shape)
    for key, value in batch.items():
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise LayerPruneError(
                f"{where}: {key} is {given}, but input_ids have the shape {shape}; give a tensor like it"
            )
    labels = batch.get("labels")
    if labels is not None:
        scored = labels[labels != -100]
        if labels.is_floating_point() or len(scored) and not 0 <= int(scored.min()) <= int(scored.max()) < vocab_size:
            raise LayerPruneError(
                f"{where}: labels must be token ids below {vocab_size}, or -100 where none is scored"
            )


@cache
def embedded_text(name: str) -> tuple[str, ...]:
    """The passages of one of the embedded texts: `"calibration"`, `"healing"` or `"held_out"`."""
    if name not in EMBEDDED_TEXTS:
        raise LayerPruneError(f"no embedded text {name!r}; choose one of {', '.join(EMBEDDED_TEXTS)}")
    return tuple(lzma.decompress((ASSETS / "text" / f"{name}.txt.xz").read_bytes()).decode().split("\n\n"))


def embedded_dataset(name: str) -> Dataset:
    """An embedded text as a [`~datasets.Dataset`] with one column, `text`; or `"minimal_pairs"`, with BLiMP's columns
    `sentence_good`, `sentence_bad`, `linguistics_term` and `UID`."""
    if name == EMBEDDED_PAIRS:
        lines = lzma.decompress((ASSETS / "text" / f"{name}.jsonl.xz").read_bytes()).decode().splitlines()
        return Dataset.from_list([json.loads(line) for line in lines])
    return Dataset.from_dict({"text": list(embedded_text(name))})


def may_have(source: str, split: str) -> bool:
    """Whether the data set a user names may have this split: a file is one, `"train"`, of which slices can be taken
    (`"train[:100]"`); an embedded text and a `Dataset` saved to disk have none."""
    if Path(source).is_file():
        return split.partition("[")[0] == "train"
    return not (source.startswith("embedded:") or Path(source, "state.json").is_file())


def load_text_dataset(source: str, split: str = "train", config_name: str | None = None) -> Dataset:
    """A [`~datasets.Dataset`] from what a user names: an embedded text, a local file or folder, or a Hub id.

    Args:
        source (`str`):
            `"embedded:calibration"`, `"embedded:healing"`, `"embedded:held_out"`, `"embedded:minimal_pairs"`; the path
            of a `.txt` (one text a line), `.json`, `.jsonl`, `.csv` or `.parquet` file; a folder that `save_to_disk`
            wrote or `datasets.load_dataset` understands; or the id of a data set on the Hub.
        split (`str`, *optional*, defaults to `"train"`): split, where the data set [`may_have`] it; else all is read.
        config_name (`str`, *optional*): configuration of a Hub data set.

    Raises:
        [`LayerPruneError`]: if there is nothing there, it cannot be read, or it is empty.
    """
    if source.startswith("embedded:"):
        return embedded_dataset(source.removeprefix("embedded:"))
    path = Path(source)
    if path.is_file() and path.suffix not in FILE_BUILDERS:
        raise LayerPruneError(f"dataset {source}: file type {path.suffix!r} is none of {', '.join(FILE_BUILDERS)}")
    if path.suffix in FILE_BUILDERS and not path.exists():
        raise LayerPruneError(f"dataset {source}: there is no such file")
    try:
        if path.is_file():
            if config_name is not None:
                logger.warning(
                    f"dataset {source} is a file, without a configuration {config_name!r}; it is read as it is"
                )
            part = split if may_have(source, split) else "train"
            dataset = load_dataset(FILE_BUILDERS[path.suffix], data_files=str(path), split=part)
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            dataset = load_from_disk(source)
        else:
            dataset = load_dataset(source, config_name, split=split)
    except (DatasetsError, OSError, ValueError, RuntimeError, ImportError, StopIteration) as error:
        cause = error.__cause__ or error  # datasets says itself only that an error occurred
        told = f"{source} is empty" if path.is_file() and not path.stat().st_size else first_line(cause)
        raise LayerPruneError(f"dataset {source} cannot be loaded: {told}") from error
    if path.is_file() and path.suffix == ".txt":
        dataset = dataset.filter(lambda row: bool(row["text"].strip()))
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise LayerPruneError(
                f"dataset {source} has no split {split!r}; choose one of {', '.join(dataset)} (dataset_split)"
            )
        dataset = dataset[split]
    if len(dataset) == 0:
        raise LayerPruneError(f"dataset {source} is empty")
    return dataset


def num_positions(config: PretrainedConfig) -> int:
    """Tokens of the longest row a model was made for."""
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
    return max(config.max_position_embeddings, int(original * (rope.get("factor") or 1)))


def check_length(max_length: int | None, config: PretrainedConfig, name: str) -> None:
    """Raise [`LayerPruneError`] if rows of `max_length` tokens are longer than the model called `name` can read."""
    positions = num_positions(config)
    if max_length is not None and max_length > positions:
        raise LayerPruneError(f"max_length={max_length} but {name} has {positions} positions; choose 2..{positions}")


def collated_batches(
    rows: Dataset | IterableDataset, collator: Callable[[list[Any]], Batch], batch_size: int, limit: int | None = None
) -> Iterable[Batch]:
    """Batches of tokenized rows, the first `limit` of them, as a trainer's collator makes them.

    One that puts all rows of a batch end to end (`padding_free`) gets one row at a time: rows are what is measured.
    """
    rows = rows.select_columns([name for name in ("input_ids", "labels", "seq_lengths") if name in column_names(rows)])
    if limit is not None:
        rows = rows.take(limit) if isinstance(rows, IterableDataset) else rows.select(range(min(limit, len(rows))))
    batch_size = 1 if getattr(collator, "padding_free", False) else batch_size
    return DataLoader(rows, batch_size=batch_size, collate_fn=collator)


def split_rows(batch: Batch, rows: int) -> list[Batch]:
    """A batch in pieces of at most `rows` rows."""
    if len(batch["input_ids"]) <= rows:
        return [batch]
    parts = {key: value.split(rows) for key, value in batch.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def tokenized_batches(
    dataset: Dataset | IterableDataset | Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    text_field: str = "text",
    max_length: int = 512,
    num_rows: int = 64,
    batch_size: int = 8,
) -> list[dict[str, Tensor]]:
    """Up to `num_rows` rows in batches, of the columns and the tokens that [`IterativeLayerDistillTrainer`] reads.

    Texts are packed end to end into full rows of `max_length` tokens. Prompts with completions (whose `labels` leave
    the prompts out), messages and rows of token ids are a row each, cut at `max_length` and padded with a mask.

    Args:
        dataset (`Dataset`, `IterableDataset` or `Iterable[dict]`): rows; read only as far as needed.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): an end token goes after each text.
        text_field (`str`, *optional*, defaults to `"text"`): column of the text.
        max_length (`int`, *optional*, defaults to `512`): T, tokens per row.
        num_rows (`int`, *optional*, defaults to `64`): rows in all.
        batch_size (`int`, *optional*, defaults to `8`): B, rows per batch.

    Raises:
        [`LayerPruneError`]: if there is no such column, a row that cannot be read, or not enough text for one row.
    """
    if min(num_rows, batch_size) < 1 or max_length < 2:
        raise LayerPruneError(f"rows={num_rows} of {max_length} tokens, {batch_size} at a time: all must be positive")
    try:
        stream = with_text(_as_stream(dataset, num_rows * max_length), text_field, "the data")
        columns = column_names(stream)
        rows = tokenized(stream, columns, tokenizer, text_field)
        return (_packed if columns == [text_field] else _padded)(rows, max_length, num_rows, batch_size)
    except LayerPruneError:
        raise
    except (TemplateError, ValueError) as error:  # of the tokenizer's chat template
        raise LayerPruneError(f"the data cannot be tokenized: {first_line(error)}") from error


def _as_stream(dataset: Iterable[Mapping[str, Any]], most: int) -> IterableDataset:
    """A data set or rows, at most so many, as a stream: what is done with it is done with the rows that are read."""
    if isinstance(dataset, IterableDataset):
        return dataset
    if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
        return dataset.with_format(None).to_iterable_dataset()
    return Dataset.from_list([dict(row) for row in islice(dataset, most)]).to_iterable_dataset()


def _packed(
    rows: Iterable[dict[str, list[int]]], max_length: int, num_rows: int, batch_size: int
) -> list[dict[str, Tensor]]:
    """Rows end to end in full ones."""
    ids: list[int] = []
    for row in rows:
        ids += row["input_ids"]
        if len(ids) >= num_rows * max_length:
            break
    count = min(num_rows, len(ids) // max_length)
    if count == 0:
        raise LayerPruneError(f"the data has {len(ids)} tokens, less than one row of {max_length}; give more text")
    full = torch.tensor(ids[: count * max_length]).view(count, max_length)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in full.split(batch_size)]


def _padded(
    rows: Iterable[dict[str, list[int]]], max_length: int, num_rows: int, batch_size: int
) -> list[dict[str, Tensor]]:
    """Rows each on its own, cut, as far as something of them is to be scored."""
    examples, dropped = [], 0
    for row in rows:
        example = {key: row[key][:max_length] for key in ("input_ids", "labels")}
        scored = any(label != -100 for label in example["labels"])
        examples, dropped = examples + [example] * scored, dropped + (not scored)
        if len(examples) == num_rows:
            break
    tell_of_dropped("the data", dropped, dropped + len(examples), max_length)
    collator = DataCollatorForLanguageModeling(pad_token_id=0)
    return [collator(examples[n : n + batch_size]) for n in range(0, len(examples), batch_size)]
