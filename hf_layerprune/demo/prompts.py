"""What a visitor wrote, as token ids: nothing in it can act as a control token."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import LayerPruneError, first_line
from .settings import Limits

Turn = tuple[str, str]
"""What the visitor wrote, and what one model answered."""


def clean(text: object, limits: Limits, what: str = "the prompt") -> str:
    """The text of a visitor, as it may be worked on.

    Raises:
        [`LayerPruneError`]: if it is no text, empty or too long.
    """
    if not isinstance(text, str):
        raise LayerPruneError(f"{what} is {type(text).__name__}, not text")
    if len(text) > limits.max_prompt_characters:
        raise LayerPruneError(
            f"{what} has {len(text):,} characters; at most {limits.max_prompt_characters:,} are read here. Shorten it."
        )
    if not text.strip():
        raise LayerPruneError(f"{what} is empty. Write something, or choose an example.")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a surrogate pair is no character


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text to be continued, with what the tokenizer puts in front of any text."""
    return tokenizer("")["input_ids"] + encode_plainly(tokenizer, text)


def encode_chat(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], message: str) -> list[int]:
    """Token ids of a conversation, up to where the model answers.

    The template is filled with marks, and only what is between them is read with control tokens; the words of visitor
    and model go in as plain text.

    Raises:
        [`LayerPruneError`]: if the tokenizer has no chat template, or its template alters messages or fails.
    """
    if not tokenizer.chat_template:
        raise LayerPruneError("this model has no chat template; let it continue a text instead")
    texts = [text for turn in turns for text in turn] + [message]
    marks = [f"mark{secrets.token_hex(12)}" for _ in texts]
    messages = [{"role": ("user", "assistant")[n % 2], "content": mark} for n, mark in enumerate(marks)]
    try:
        filled = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError) as error:
        raise LayerPruneError(f"the chat template of this model fails: {first_line(error):.200}") from error
    parts = re.split("|".join(marks), filled)
    if re.findall("|".join(marks), filled) != marks:
        raise LayerPruneError("the chat template of this model does not hold every message once, in order")
    ids = tokenizer(parts[0], add_special_tokens=False)["input_ids"]
    for text, part in zip(texts, parts[1:], strict=True):
        ids += encode_plainly(tokenizer, text) + tokenizer(part, add_special_tokens=False)["input_ids"]
    return ids


def encode_plainly(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text in which a control token is written out, like any other characters."""
    ids: list[int] = []
    for piece in _without_control_tokens(text, tokenizer):
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids


def _without_control_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text in pieces, cut after the first character of every control token's name, until no name is whole."""
    names = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    if not names:
        return [text]
    pattern, pieces, start, position = re.compile("|".join(map(re.escape, names)), re.IGNORECASE), [], 0, 0
    while (found := pattern.search(text, position)) is not None:
        pieces.append(text[start : found.start() + 1])
        start = position = found.start() + 1
    return [piece for piece in (*pieces, text[start:]) if piece]


def check_length(ids: list[int], context: int, max_new_tokens: int, limits: Limits, chat: bool) -> None:
    """Raise [`LayerPruneError`] unless the prompt is short enough for the limits and for the model's context.

    Args:
        ids (`list[int]`): the prompt.
        context (`int`): positions of the model, which prompt and answer share.
        max_new_tokens (`int`): longest answer.
        limits ([`Limits`]): of the demo.
        chat (`bool`): whether it is a conversation.
    """
    if not ids:
        raise LayerPruneError("the prompt holds no token. Write something else.")
    what, todo = ("the conversation", "Start a new one") if chat else ("the prompt", "Shorten it")
    most = min(limits.max_prompt_tokens, context - 1)
    if len(ids) > most:
        raise LayerPruneError(f"{what} has {len(ids):,} tokens; at most {most:,} are read here. {todo}.")
    if len(ids) + max_new_tokens > context:
        raise LayerPruneError(
            f"{what} has {len(ids):,} tokens, and shares the {context:,} positions of this model with the answer. Ask "
            f"for at most {context - len(ids):,} new tokens."
        )
