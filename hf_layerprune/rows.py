"""Rows of a data set as TRL reads them: only the columns it needs, without blank rows and padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .errors import LayerPruneError, located

if TYPE_CHECKING:
    from trl import SFTConfig

logger = logging.get_logger(__name__)

CHAT_COLUMNS = (["prompt", "completion"], ["messages"], ["conversations"])
SHAREGPT = {"from": "role", "value": "content"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
"""Chat templates leave out, without a word, what roles say that they do not know."""
OF_TEMPLATE = {"tools": None, "chat_template_kwargs": {}}
"""Columns that a chat template is given next to the messages, and what stands for nothing in them."""
NEXT_TO_CHATS = (*OF_TEMPLATE, "image", "images")  # TRL refuses images itself


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Columns of a data set; a stream that does not name them is asked for its first row."""
    return dataset.column_names or list(next(iter(dataset), {}))


def select_text_column(
    dataset: Dataset | IterableDataset, text_field: str | None, name: str
) -> Dataset | IterableDataset:
    """Keep the columns that TRL turns into tokens, so that no other column interferes, and leave out blank rows.

    These are token ids, without those that an attention mask hides; else the column `text_field`, unless that is
    `"text"`; else, in TRL's order, prompts with their completions, messages, or text. Without `text_field` (a
    formatting function writes the text) only token ids are touched.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise LayerPruneError(
            f"{name} is a {type(dataset).__name__}; give one datasets.Dataset, such as Dataset.from_list(rows)"
        )
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        return dataset  # TRL refuses it and says why
    dataset = dataset.with_format(None)
    columns = column_names(dataset)
    if _is_tokens(next(iter(dataset), {}).get("input_ids")):
        return _without_padding(dataset, columns, name)
    if text_field is None:
        return dataset
    kept = _text_columns(columns, text_field, name)
    more = [] if kept == [text_field] else [column for column in NEXT_TO_CHATS if column in columns]
    dataset = dataset.select_columns(kept + more)
    first = next((row for row in dataset if not _is_blank(row, kept)), None)
    if first is None:
        empty = [column for column in kept if all(_is_blank(row, [column]) for row in dataset)] or kept
        raise LayerPruneError(f"{name}: column {' and '.join(map(repr, empty))} holds no text, only blank rows")
    may_differ = dataset.features is None or "Json" in str(dataset.features)  # from row to row
    if kept == ["conversations"]:

        def with_messages(row: dict[str, Any]) -> dict[str, Any]:
            return {"messages": as_messages(row["conversations"])}

        first, dataset = with_messages(first), dataset.map(with_messages, remove_columns=kept)
        kept = ["messages"]
    is_chat = isinstance(first["prompt"], list) if "prompt" in kept else kept != [text_field]
    turns = [turn for column in kept if isinstance(first[column], list) for turn in first[column]]
    has_parts = any(isinstance(turn, dict) and isinstance(turn.get("content"), list) for turn in turns)
    if is_chat and (may_differ or has_parts):

        def as_text(row: dict[str, Any]) -> dict[str, Any]:
            with located(name):
                return row | {column: joined_parts(row[column]) for column in kept}

        first, dataset = as_text(first), dataset.map(as_text)
    _check_row(first, kept, is_chat, name)

    def says_something(row: dict[str, Any]) -> bool:
        blank = _is_blank(row, kept)
        if not blank:
            _check_row(row, kept, is_chat, name)
        return not blank

    return _filtered(dataset, says_something, f"{name}: blank rows left out")


def as_messages(turns: Any) -> Any:
    """Messages of `conversations`, whatever their keys and roles are called there."""
    if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        turns = [{SHAREGPT.get(key, key): part for key, part in turn.items() if part is not None} for turn in turns]
        turns = [turn | {"role": SHAREGPT_ROLES.get(turn.get("role"), turn.get("role"))} for turn in turns]
    return turns


def joined_parts(messages: Any) -> Any:
    """Messages whose content is text, where it was a list of parts of text, which not every chat template reads."""

    def joined(message: Any) -> Any:
        parts = message.get("content") if isinstance(message, dict) else None
        if not isinstance(parts, list):
            return message
        texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        if wrong := [part for part, text in zip(parts, texts, strict=True) if not isinstance(text, str)]:
            raise LayerPruneError(f"a message holds {wrong[0]!r:.80}, which is not text")
        return message | {"content": "".join(texts)}

    return [joined(message) for message in messages] if isinstance(messages, list) else messages


def is_message(value: Any) -> bool:
    """Whether this has a role and says something: text, parts, tool calls or thoughts, as its chat template knows."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    return value.get("content") is not None or any(part for key, part in value.items() if key != "role")


def warn_of_dropped_rows(name: str, dropped: int, total: int, max_length: int | None) -> None:
    """Warn of rows that are left out because none of their tokens counts; [`LayerPruneError`] if these are all."""
    if not dropped:
        return
    message = f"{name}: {dropped:,} of {total:,} rows have no token to score within max_length={max_length}"
    if dropped == total:
        raise LayerPruneError(f"{message}; raise it, or shorten the prompts that fill it")
    logger.warning(f"{message} and are left out; raise it, or shorten the prompts that fill it")


def check_special_tokens(
    datasets: Mapping[str, Dataset | IterableDataset], tokenizer: PreTrainedTokenizerBase, args: SFTConfig
) -> None:
    """Raise [`LayerPruneError`] if TRL needs what the tokenizer lacks: a chat template to tell who speaks, or an end
    token to put after rows of text."""
    is_chat = any({"messages", "prompt"} & {*column_names(rows)} for rows in datasets.values())
    if is_chat and args.assistant_only_loss and not (tokenizer.chat_template or args.chat_template_path):
        raise LayerPruneError("assistant_only_loss needs a chat template; name one with chat_template_path")
    if args.eos_token or tokenizer.eos_token or args.chat_template_path:  # a template's model has one
        return
    for name, dataset in datasets.items():
        row = next(iter(dataset), {})
        is_text = not row.keys() & {"input_ids", "messages", "conversations"} and any(
            isinstance(value, str) for value in row.values()
        )
        if is_text:
            raise LayerPruneError(
                f"the tokenizer has no end token to put after each text of {name}_dataset; name one of its tokens "
                "with eos_token"
            )


def _text_columns(columns: Sequence[str], text_field: str, name: str) -> list[str]:
    if any(text_field in chat for chat in CHAT_COLUMNS):
        raise LayerPruneError(
            f"dataset_text_field={text_field!r} is read as part of a chat; rename that column of {name} to 'text'"
        )
    choices = [[text_field]] if text_field in columns and text_field != "text" else [*CHAT_COLUMNS, [text_field]]
    for kept in choices:
        if set(kept) <= set(columns):
            return kept
    raise LayerPruneError(
        f"{name} has columns {list(columns)} but no text; name the text column with dataset_text_field (now "
        f"{text_field!r}), or bring messages or prompt and completion"
    )


def _is_blank(row: dict[str, Any], columns: Sequence[str]) -> bool:
    cells = (row.get(column) for column in columns)
    return any(cell is None or not (cell.strip() if isinstance(cell, str) else cell) for cell in cells)


def _check_row(row: dict[str, Any], columns: Sequence[str], is_chat: bool, name: str) -> None:
    """Raise [`LayerPruneError`] if a row is not of a form that TRL reads: messages, or text."""
    for column in columns:
        value = row[column]
        is_messages = isinstance(value, list) and all(map(is_message, value))
        if not (is_messages if is_chat else isinstance(value, str)):
            kind = "a list of messages, each with a role and content" if is_chat else "text"
            raise LayerPruneError(f"{name} has {value!r:.80} in column {column!r}, which is not {kind}")


def _filtered(
    dataset: Dataset | IterableDataset, condition: Callable[[dict[str, Any]], bool], warning: str
) -> Dataset | IterableDataset:
    """The rows that meet a condition; warn how many do not, except for a stream."""
    kept = dataset.filter(condition)
    if isinstance(dataset, IterableDataset) or len(kept) == len(dataset):
        return kept
    logger.warning(f"{warning}: {len(dataset) - len(kept):,} of {len(dataset):,}")
    return kept


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(token, int) for token in value)


def _without_padding(dataset: Dataset | IterableDataset, columns: list[str], name: str) -> Dataset | IterableDataset:
    """Rows of token ids that hold some, without the tokens that their attention mask hides."""
    if "attention_mask" in columns:
        dataset = dataset.map(_unpadded, remove_columns=["attention_mask"])

    def has_tokens(row: dict[str, Any]) -> bool:
        ids = row.get("input_ids")
        if ids and not _is_tokens(ids):
            raise LayerPruneError(f"{name} has {ids!r:.80} in column 'input_ids', which is not a list of token ids")
        return bool(ids)

    return _filtered(dataset, has_tokens, f"{name}: rows without a token left out")


def _unpadded(row: dict[str, Any]) -> dict[str, Any]:
    """A row with every list of its tokens (ids, labels, masks) cut to where the attention mask is 1."""
    mask = row["attention_mask"]
    if mask is None or all(mask):
        return row
    lists = {key: value for key, value in row.items() if isinstance(value, list) and len(value) == len(mask)}
    return row | {key: list(compress(value, mask)) for key, value in lists.items()}
