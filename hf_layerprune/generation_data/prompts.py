"""From the rows of a data set to what the teacher is asked, as text or messages and as tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import LayerPruneError, first_line
from .config import HealingDataConfig

COLUMNS = ("messages", "prompt", "text")

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Prompt:
    """
    Attributes:
        row (`int`): number of its row in the data set.
        content (`str` or `list[dict]`): text to continue, or messages to answer.
        ids (`list[int]`): its tokens.
    """

    row: int
    content: str | Messages
    ids: list[int]


def read_prompts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: HealingDataConfig, limit: int
) -> list[Prompt]:
    """The prompts of a data set, each of at most `limit` tokens; blank cells are left out.

    Raises:
        [`LayerPruneError`]: if there is no column of prompts or nothing in it, or a row cannot be a prompt.
    """
    column = column_of_prompts(dataset, config)
    count = len(dataset) if config.num_prompts is None else min(len(dataset), config.num_prompts)
    prompts = []
    for row, value in enumerate(dataset.select(range(count))[column]):
        where = f"prompts: row {row}"
        content = _content(value, column, tokenizer, config, where)
        if content is not None:
            prompts.append(Prompt(row, *_fitted(content, tokenizer, config, limit, where)))
    if not prompts:
        raise LayerPruneError(f"the prompts hold no text in column {column!r}; give at least one row with text")
    return prompts


def column_of_prompts(dataset: Dataset, config: HealingDataConfig) -> str:
    """The column named by `prompt_column`, or the first of `COLUMNS` that the data set has.

    Raises:
        [`LayerPruneError`]: if there is none.
    """
    columns = [config.prompt_column] if config.prompt_column else COLUMNS
    column = next((name for name in columns if name in dataset.column_names), None)
    if column is None:
        raise LayerPruneError(
            f"the prompts have columns {dataset.column_names} but no {' or '.join(map(repr, columns))}; name the one "
            "with messages or text with prompt_column"
        )
    return column


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Tokens that are no text, such as the end of a turn, by their ids."""
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def without_special_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A text without the names of special tokens, to which it would be tokenized."""
    names = [name for name in special_tokens(tokenizer).values() if name]
    while any(name in text for name in names):  # taking one out may put another together
        for name in names:
            text = text.replace(name, "")
    return text


def _content(
    value: Any, column: str, tokenizer: PreTrainedTokenizerBase, config: HealingDataConfig, where: str
) -> str | Messages | None:
    if value is None or value == []:
        return None
    if isinstance(value, list):
        return _messages(value, where)
    if not isinstance(value, str):
        raise LayerPruneError(f"{where} has {value!r} in column {column!r}; it must be a text or a list of messages")
    text = value if config.as_chat else without_special_tokens(value, tokenizer)
    if not text.strip():
        return None
    if config.as_chat:
        return [{"role": "user", "content": text}]
    return text if column == "prompt" else _opening(text, tokenizer, config.prompt_tokens)


def _messages(value: list[Any], where: str) -> Messages:
    """The messages up to the last that is not the assistant's."""
    for message in value:
        said = message.get("content") if isinstance(message, dict) else None
        if not (isinstance(said, str) and isinstance(message.get("role"), str)):
            raise LayerPruneError(f"{where}: {message!r} is no message; it needs a text as role and one as content")
    messages = [{key: part for key, part in message.items() if part is not None} for message in value]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise LayerPruneError(f"{where} has no message to answer; give it one of a user")
    return messages


def _opening(text: str, tokenizer: PreTrainedTokenizerBase, count: int) -> str:
    """The words in the first `count` tokens; behind a whole word, prompt and answer are tokenized alike together."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) <= count:
        return text
    opening = tokenizer.decode(ids[:count]).rstrip("\ufffd")
    whole = text[len(opening)].isspace() if text.startswith(opening) else False
    words = opening if whole else re.sub(r"\s+\S*$", "", opening)
    return words.rstrip() or opening


def _encoded(content: str | Messages, tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    if isinstance(content, str):
        return tokenizer(content)["input_ids"]
    if tokenizer.chat_template is None:
        raise LayerPruneError(
            f"{where} is a chat but the tokenizer has no chat template; use an instruct model, or plain text"
        )
    try:
        return tokenizer.apply_chat_template(content, add_generation_prompt=True, return_dict=False)
    except (TemplateError, ValueError, TypeError) as error:
        raise LayerPruneError(f"{where} does not fit the chat template: {first_line(error)}") from error


def _fitted(
    content: str | Messages, tokenizer: PreTrainedTokenizerBase, config: HealingDataConfig, limit: int, where: str
) -> tuple[str | Messages, list[int]]:
    """A prompt and its tokens, without the beginning of its text if it is too long."""
    ids = _encoded(content, tokenizer, where)
    length = len(ids)
    while (excess := len(ids) - limit) > 0:
        text = content if isinstance(content, str) else content[-1]["content"]
        kept = tokenizer(text, add_special_tokens=False)["input_ids"][excess:]
        if config.long_prompts == "refuse" or not kept:
            advice = "raise max_prompt_tokens, or shorten it"
            advice += " (long_prompts='truncate' does)" if config.long_prompts == "refuse" else ""
            raise LayerPruneError(f"{where} has {length} tokens, more than {limit}; {advice}")
        text = tokenizer.decode(kept).lstrip("\ufffd")
        content = text if isinstance(content, str) else [*content[:-1], content[-1] | {"content": text}]
        ids = _encoded(content, tokenizer, where)
    return content, ids
