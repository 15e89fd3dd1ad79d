"""What is measured of candidates, chunk by chunk of data, with one sum per row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data import Batch, valid_next_tokens
from ..forward import final_states, to_device
from ..losses import token_statistics
from .candidates import CandidateRuns

MAX_STATE_BYTES = 2**30  # of candidates' final states held at a time

TOKEN_MEASURES = {"kl": "kl", "loss": "nll"}  # criterion -> field of TokenStatistics


class Measure(Protocol):
    """One kind of data, in chunks that are measured one at a time.

    Attributes:
        weight (`float`): share in the mean over all kinds.
        num_chunks (`int`): pieces the data comes in.
    """

    weight: float
    num_chunks: int

    def __call__(self, chunk: int, runs: CandidateRuns, which: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Sums `(1 + len(which), R)` over the rows of a chunk, of the model as it is first, and counts `(R,)`."""
        ...


class TextMeasure:
    """KL to a teacher, or next-token loss, of text: nats, summed over the tokens of each row.

    Args:
        batches (`Sequence[dict[str, Tensor]]`): rows of text, see [`score_layers`].
        criterion (`str`): `"kl"` or `"loss"`.
        teacher ([`~transformers.PreTrainedModel`]): what `"kl"` compares with; the model itself costs nothing.
        rows_per_chunk (`int`, *optional*): cut batches into smaller ones; by default each is one chunk.
    """

    weight = 1.0

    def __init__(
        self, batches: Sequence[Batch], criterion: str, teacher: PreTrainedModel, rows_per_chunk: int | None = None
    ) -> None:
        self.statistic, self.teacher = TOKEN_MEASURES[criterion], teacher
        self.batches = [part for batch in batches for part in _split(batch, rows_per_chunk)]
        self.num_chunks = len(self.batches)

    def __call__(self, chunk: int, runs: CandidateRuns, which: Sequence[int]) -> tuple[Tensor, Tensor]:
        sums, counts = row_sums(runs, which, self.batches[chunk], self.statistic, self.teacher)
        return sums[:, counts > 0], counts[counts > 0]


def row_sums(
    runs: CandidateRuns, which: Sequence[int], batch: Batch, statistic: str, teacher: PreTrainedModel
) -> tuple[Tensor, Tensor]:
    """A field of [`TokenStatistics`] summed over each row's scored tokens: `(1 + len(which), B)`, and their number.

    Runs inside [`~forward.measuring`]. On the CPU, in float64.
    """
    batch = to_device(batch, runs.model.device)
    valid, labels = valid_next_tokens(batch)
    counts = valid.sum(1).cpu().double()
    if not len(labels):
        return torch.zeros(1 + len(which), len(counts), dtype=torch.float64), counts
    hidden = (states[valid] for states in runs.final_states(batch, which))
    first = next(hidden)
    reference = ()
    if statistic == "kl":
        of_teacher = first if teacher is runs.model else final_states(teacher, batch)[valid]
        reference = (of_teacher, teacher.lm_head)
    at_once = max(1, MAX_STATE_BYTES // max(1, first.numel() * first.element_size()))
    hidden, row_of_token = chain([first], hidden), valid.nonzero()[:, 0].cpu()
    sums = []
    while some := list(islice(hidden, at_once)):  # the teacher is projected once for each of these parts
        for statistics in token_statistics(some, runs.model.lm_head, labels, *reference):
            values = getattr(statistics, statistic).double().cpu()
            sums.append(torch.zeros_like(counts).index_add_(0, row_of_token, values))
    return torch.stack(sums), counts


def _split(batch: Batch, rows: int | None) -> list[Batch]:
    if rows is None or len(batch["input_ids"]) <= rows:
        return [batch]
    parts = {key: value.split(rows) for key, value in batch.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
