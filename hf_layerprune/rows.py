"""Rows of a data set as TRL reads them: which columns, without blank rows, and without padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

from datasets import Dataset, IterableDataset
from transformers.utils import logging

from .errors import LayerPruneError

logger = logging.get_logger(__name__)

OF_A_CHAT = ("tools", "chat_template_kwargs", "image", "images")  # next to messages; TRL refuses pictures, and says so
RESERVED = ("prompt", "completion", "messages", "conversations")


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    return dataset.column_names or list(next(iter(dataset), {}))


def with_text(dataset: Dataset | IterableDataset, text_field: str | None, name: str) -> Dataset | IterableDataset:
    """The data set with what TRL should make text of alone, so that other columns do no harm.

    That is token ids, cut to those an attention mask lets through; else a text column that was named (`text_field`, if
    not `"text"`); else, in TRL's order, prompts with their completions, messages, or text. Blank rows are left out.
    Without `text_field` (a formatting function makes the text) only token ids are touched.

    Raises:
        [`LayerPruneError`]: if it has none of these, only blank ones, or a row that is neither text nor messages, or
            not of the first one's kind; a stream raises it once it gets there.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise LayerPruneError(
            f"{name} is a {type(dataset).__name__}; give one datasets.Dataset, such as Dataset.from_list(rows)"
        )
    transformed = isinstance(dataset, Dataset) and dataset.format["type"] == "custom"  # TRL refuses it, and says why
    if isinstance(dataset, Dataset) and not transformed:
        dataset = dataset.with_format(None)
    columns, first = column_names(dataset), next(iter(dataset), {})
    if _are_ids(first.get("input_ids")):
        return dataset if transformed else _without_padding(dataset, columns, name)
    if text_field is None:
        return dataset
    kept = _read_columns(columns, text_field, name)
    more = [] if kept == [text_field] else [column for column in OF_A_CHAT if column in columns]
    dataset = dataset.select_columns(kept + more)
    first = next((row for row in dataset if not _is_blank(row, kept)), None)
    if first is None:
        raise LayerPruneError(f"{name}: column {' and '.join(map(repr, kept))} holds no text, only blank rows")
    sample = first[kept[0]]
    if kept == ["conversations"] and isinstance(sample, list) and _is_message(sample[0]):
        dataset, kept = dataset.rename_column("conversations", "messages"), ["messages"]
    if transformed:
        return dataset
    how = {"columns": kept, "text_field": text_field, "kind": type(sample), "name": name}
    return _some_rows(dataset, _is_readable, how, f"{name}: blank rows left out")


def _read_columns(columns: Sequence[str], text_field: str, name: str) -> list[str]:
    """The columns that TRL reads."""
    if text_field in RESERVED:
        raise LayerPruneError(
            f"dataset_text_field={text_field!r} names what TRL reads otherwise; rename that column of {name} to 'text'"
        )
    if text_field in columns and text_field != "text":
        return [text_field]
    for kept in (["prompt", "completion"], ["messages"], ["conversations"], [text_field]):
        if set(kept) <= set(columns):
            return kept
    raise LayerPruneError(
        f"{name} has columns {list(columns)} but no text; name the text column with dataset_text_field (now "
        f"{text_field!r}), or bring messages or prompt and completion"
    )


def _some_rows(
    dataset: Dataset | IterableDataset, condition: Any, options: dict[str, Any], what: str
) -> Dataset | IterableDataset:
    """The rows for which `condition(row, number, **options)` holds; warns how many do not, except for a stream."""
    some = dataset.filter(condition, with_indices=True, fn_kwargs=options)
    if isinstance(dataset, IterableDataset):
        return some
    if len(some) == len(dataset):
        return dataset
    logger.warning(f"{what}: {len(dataset) - len(some):,} of {len(dataset):,}")
    return some


def tell_of_dropped(name: str, dropped: int, total: int, max_length: int | None) -> None:
    """Warn of rows that are left out as none of their tokens counts.

    Raises:
        [`LayerPruneError`]: if they are all there are.
    """
    if total == 0:
        return
    told = f"{name}: {dropped:,} of {total:,} rows have no token to score within max_length={max_length}"
    if dropped == total:
        raise LayerPruneError(f"{told}; raise it, or shorten the prompts that fill it")
    if dropped:
        logger.warning(f"{told} and are left out; raise it, or shorten the prompts that fill it")


def _is_blank(row: dict[str, Any], columns: list[str]) -> bool:
    """Whether a cell of these columns is empty."""
    cells = (row[column] for column in columns)
    return any(cell is None or not (cell.strip() if isinstance(cell, str) else cell) for cell in cells)


def _is_readable(row: dict[str, Any], number: int, columns: list[str], text_field: str, kind: type, name: str) -> bool:
    if _is_blank(row, columns):
        return False
    for column in columns:
        value, what = row[column], "no text or messages"
        if column == text_field:
            good, what = isinstance(value, str), "no text"
        elif column == "conversations":
            good = isinstance(value, list)
        else:
            good = _are_messages(value) or (column != "messages" and isinstance(value, str))
        if good and not isinstance(value, kind):
            good, what = False, "of another kind than those before"
        if not good:
            raise LayerPruneError(f"{name}: row {number} has {value!r:.80} in column {column!r}, which is {what}")
    return True


def _without_padding(dataset: Dataset | IterableDataset, columns: list[str], name: str) -> Dataset | IterableDataset:
    """Rows of token ids that hold some, without the tokens that their attention mask leaves out."""
    if "attention_mask" in columns:
        how = {"with_indices": True, "fn_kwargs": {"name": name}, "remove_columns": ["attention_mask"]}
        dataset = dataset.map(_unpadded, **how)
    return _some_rows(dataset, _has_tokens, {}, f"{name}: rows without a token left out")


def _unpadded(row: dict[str, Any], number: int, name: str) -> dict[str, Any]:
    """The row with every list of its tokens (ids, labels, masks) cut to where the attention mask is 1."""
    ids, mask = row["input_ids"], row["attention_mask"]
    if not ids or mask is None or all(mask):
        return row
    if len(mask) != len(ids):
        raise LayerPruneError(f"{name}: row {number} has {len(ids)} input_ids but {len(mask)} in its attention_mask")
    of_tokens = {key: value for key, value in row.items() if isinstance(value, list) and len(value) == len(mask)}
    return row | {key: list(compress(value, mask)) for key, value in of_tokens.items()}


def _has_tokens(row: dict[str, Any], number: int) -> bool:
    return bool(row["input_ids"])


def _are_ids(value: Any) -> bool:
    value = value.tolist() if hasattr(value, "tolist") else value  # of a data set in the form of tensors
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(n, int) for n in value)


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    """What it says is between the row and the chat template: text, parts, calls of tools, or thoughts."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    return value.get("content") is not None or any(part for key, part in value.items() if key != "role")
