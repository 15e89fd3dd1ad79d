"""What two models expect next, at every position of a text, and how far apart they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..forward import final_states, measuring

ROWS_AT_ONCE = 16
"""Positions whose distributions are in memory at a time."""


@dataclass(frozen=True)
class Position:
    """One position of a text.

    Attributes:
        token (`str`): the token there, as text.
        kl (`float`): KL(original || compressed) of what comes next, in nats.
        original (`tuple`): the original's most likely next tokens and their probabilities.
        compressed (`tuple`): the compressed model's.
    """

    token: str
    kl: float
    original: tuple[tuple[str, float], ...]
    compressed: tuple[tuple[str, float], ...]


def compare_next_tokens(
    original: PreTrainedModel,
    compressed: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    top: int = 5,
) -> list[Position]:
    """Run a text through both models.

    Args:
        original ([`~transformers.PreTrainedModel`]): the original.
        compressed ([`~transformers.PreTrainedModel`]): the compressed model, with the same vocabulary.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of both.
        ids (`list[int]`): the text, T tokens.
        top (`int`, *optional*, defaults to 5): tokens to tell of each model.

    Returns:
        `list[Position]`: one for each token.
    """
    batch = torch.tensor([ids], device=original.device)
    positions: list[Position] = []
    with measuring(original, compressed):
        states = [final_states(model, {"input_ids": batch})[0] for model in (original, compressed)]  # (T, H)
        for start in range(0, len(ids), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            logs = [
                model.get_output_embeddings()(state[rows]).float().log_softmax(-1)  # (rows, V)
                for model, state in zip((original, compressed), states, strict=True)
            ]
            divergences = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
            best = [_best(log, tokenizer, top) for log in logs]
            for number, kl in enumerate(divergences.tolist()):
                token = tokenizer.decode([ids[start + number]])
                positions.append(Position(token, max(0.0, kl), best[0][number], best[1][number]))
    return positions


def _best(
    log_probabilities: Tensor, tokenizer: PreTrainedTokenizerBase, top: int
) -> list[tuple[tuple[str, float], ...]]:
    values, indices = log_probabilities.topk(min(top, log_probabilities.shape[-1]))
    return [
        tuple((tokenizer.decode([index]), probability) for index, probability in zip(row, shares, strict=True))
        for row, shares in zip(indices.tolist(), values.exp().tolist(), strict=True)
    ]
