"""From text to padded batches: what is prompt, what is scored.

Shapes: B rows, T positions. Position `t` predicts token `t + 1`; labels are -100 where nothing is scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import LayerPruneError

NO_LIMIT = 10**6  # tokenizers that know no longest length claim one far above this


@dataclass(frozen=True)
class Encoded:
    """
    Attributes:
        ids (`list[int]`): the tokens of one row.
        start (`int`): index of the first token to score; the ones before are the prompt.
        truncated (`bool`): whether the beginning of the prompt was cut off.
    """

    ids: list[int]
    start: int
    truncated: bool = False


def length_limit(tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int:
    """T at most: `max_length`, else what the tokenizer says its model can take."""
    if max_length is not None:
        if max_length < 2:
            raise LayerPruneError(f"max_length={max_length}: a row needs at least two tokens")
        return max_length
    return tokenizer.model_max_length if tokenizer.model_max_length < NO_LIMIT else NO_LIMIT


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a prompt: behind the tokenizer's begin token, where it has one.

    The empty prompt is the begin token or, where there is none, the end token, behind which training texts start.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id, *ids]
    return ids or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str, max_length: int, where: str) -> Encoded:
    """Tokens of `prompt + continuation`; those that differ from the prompt's own tokens are scored.

    A row longer than `max_length` loses the beginning of its prompt.

    Raises:
        [`LayerPruneError`]: if the continuation has no token, or does not fit.
    """
    before = encode_prompt(tokenizer, prompt)
    # The two are one text to the tokenizer, as they will be when the model writes it.
    ids = encode_prompt(tokenizer, prompt + continuation)
    if not prompt and tokenizer.bos_token_id is None:
        ids = before + ids
    start = 0
    while start < min(len(before), len(ids)) and before[start] == ids[start]:
        start += 1
    scored = len(ids) - start
    if not continuation or scored == 0:
        raise LayerPruneError(f"{where}: there is nothing to score, the text is empty; give it a text")
    if scored >= max_length:
        raise LayerPruneError(
            f"{where}: {scored} tokens to score do not fit into {max_length}; shorten the text or raise max_length"
        )
    cut = max(0, len(ids) - max_length)
    # Without any prompt token the first one has nothing that predicts it.
    return Encoded(ids[cut:], max(start - cut, 1), cut > 0)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to fill rows with; it is masked, so any will do."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def right_padded(rows: Sequence[Encoded], padding: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each `(B, T)`; labels are -100 on prompt and padding."""
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), padding)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for number, row in enumerate(rows):
        end = len(row.ids)
        ids[number, :end] = torch.tensor(row.ids)
        mask[number, :end] = 1
        labels[number, row.start : end] = ids[number, row.start : end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def left_padded(rows: Iterable[Sequence[int]], padding: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, each `(B, T)`, every prompt ending at the last position."""
    rows = list(rows)
    length = max(map(len, rows))
    ids = torch.tensor([[padding] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
