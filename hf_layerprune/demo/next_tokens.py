"""What two models expect next, at every position of a text, and how far apart they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..forward import final_states, inference

ROWS_AT_ONCE = 16
"""Positions whose distributions are in memory at a time."""
TOP = 5
"""Tokens to show of each model."""
Expected = tuple[tuple[str, float], ...]
"""The most likely next tokens and their probabilities."""


@dataclass(frozen=True)
class Position:
    """One position of a text.

    Attributes:
        token (`str`): the token there, as text.
        kl (`float`): KL(teacher || student) of what comes next, in nats.
        original (`tuple`): what the teacher expects next.
        compressed (`tuple`): what the student expects next.
    """

    token: str
    kl: float
    original: Expected
    compressed: Expected


def compare_next_tokens(
    teacher: PreTrainedModel, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]
) -> list[Position]:
    """Run a text through two models with the same vocabulary.

    Args:
        teacher ([`~transformers.PreTrainedModel`]): the teacher.
        student ([`~transformers.PreTrainedModel`]): the student.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of both.
        ids (`list[int]`): the text, T tokens.

    Returns:
        `list[Position]`: one for each token.
    """
    batch = torch.tensor([ids], device=teacher.device)
    positions: list[Position] = []
    with inference(teacher, student):
        states = [final_states(model, {"input_ids": batch})[0] for model in (teacher, student)]  # (T, H)
        for start in range(0, len(ids), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            logs = [
                model.get_output_embeddings()(state[rows]).float().log_softmax(-1)  # (rows, V)
                for model, state in zip((teacher, student), states, strict=True)
            ]
            kls = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).clamp(min=0).tolist()
            tokens = [tokenizer.decode([index]) for index in ids[rows]]
            positions += map(Position, tokens, kls, *(_expected(log, tokenizer) for log in logs))
    return positions


def _expected(log_probabilities: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[Expected]:
    values, indices = log_probabilities.exp().topk(min(TOP, log_probabilities.shape[-1]))
    rows = zip(indices.tolist(), values.tolist(), strict=True)
    return [tuple((tokenizer.decode([index]), share) for index, share in zip(*row, strict=True)) for row in rows]
