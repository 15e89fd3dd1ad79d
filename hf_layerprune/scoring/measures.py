"""What is measured of candidates, chunk by chunk of data, with one sum per row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import Batch, split_rows
from ..forward import to_device
from ..tasks import GenerationChunk, LmEvalChunk, PreparedTask
from ..tasks.evaluation import sums_by_row
from .candidates import CandidateRuns
from .generation import candidate_texts

MAX_STATE_BYTES = 4 * 2**30  # of hidden states held at a time

TOKEN_MEASURES = {"kl": "kl", "loss": "nll"}  # criterion -> field of TokenStatistics
MEASURED = (*TOKEN_MEASURES, "tasks")


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
        folds (`Sequence[Sequence[dict[str, Tensor]]]`): rows of text, see [`score_layers`], for each fold of `runs`.
        criterion (`str`): `"kl"` or `"loss"`.
        teacher ([`~transformers.PreTrainedModel`]): what `"kl"` compares with; the model itself costs nothing.
        rows_per_chunk (`int`, *optional*): cut batches into smaller ones; by default each is one chunk.
        max_state_bytes (`int`, *optional*): see [`row_sums`].
    """

    weight = 1.0

    def __init__(
        self,
        folds: Sequence[Sequence[Batch]],
        criterion: str,
        teacher: PreTrainedModel,
        rows_per_chunk: int | None = None,
        max_state_bytes: int = MAX_STATE_BYTES,
    ) -> None:
        self.statistic, self.teacher, self.max_state_bytes = TOKEN_MEASURES[criterion], teacher, max_state_bytes
        self.batches = [
            (fold, part)
            for fold, batches in enumerate(folds)
            for batch in batches
            for part in (split_rows(batch, rows_per_chunk) if rows_per_chunk else [batch])
        ]
        self.num_chunks = len(self.batches)

    def __call__(self, chunk: int, runs: CandidateRuns, which: Sequence[int]) -> tuple[Tensor, Tensor]:
        fold, batch = self.batches[chunk]
        sums, counts = row_sums(runs, which, batch, self.statistic, self.teacher, self.max_state_bytes, fold)
        return sums[:, counts > 0], counts[counts > 0]


class TaskMeasure:
    """What a task costs: 1 - accuracy or score, or nats per token; lower is better.

    Args:
        task ([`PreparedTask`]): the task in tokens.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's own.
        teacher ([`~transformers.PreTrainedModel`]): what a task of KL compares with.
        max_state_bytes (`int`, *optional*): see [`row_sums`].
    """

    def __init__(
        self,
        task: PreparedTask,
        tokenizer: PreTrainedTokenizerBase,
        teacher: PreTrainedModel,
        max_state_bytes: int = MAX_STATE_BYTES,
    ) -> None:
        self.task, self.tokenizer, self.teacher = task, tokenizer, teacher
        self.max_state_bytes = max_state_bytes
        self.weight, self.num_chunks = task.weight, len(task.chunks)

    def __call__(self, chunk: int, runs: CandidateRuns, which: Sequence[int]) -> tuple[Tensor, Tensor]:
        part = self.task.chunks[chunk]
        if isinstance(part, LmEvalChunk):
            return part.reduce([runs.model, *(runs.student(index) for index in which)], self.tokenizer)
        if isinstance(part, GenerationChunk):
            return part.reduce(list(candidate_texts(runs, which, part, self.tokenizer)))
        return part.reduce(*row_sums(runs, which, part.batch, self.task.statistic, self.teacher, self.max_state_bytes))


def row_sums(
    runs: CandidateRuns,
    which: Sequence[int],
    batch: Batch,
    statistic: str,
    teacher: PreTrainedModel,
    max_state_bytes: int = MAX_STATE_BYTES,
    fold: int = 0,
) -> tuple[Tensor, Tensor]:
    """A field of [`TokenStatistics`] summed over each row's scored tokens: `(1 + len(which), B)`, and their number.

    Runs inside [`~forward.measuring`]. On the CPU, in float64. Of one row as many hidden states are held as the model
    has layers and candidates; `max_state_bytes` bounds how many rows run at a time.
    """
    config = runs.model.config
    states_of_row = batch["input_ids"].shape[1] * config.hidden_size * runs.model.dtype.itemsize
    rows = max(1, max_state_bytes // (states_of_row * (config.num_hidden_layers + 1 + len(which))))
    found = []
    for part in split_rows(batch, rows):
        part = to_device(part, runs.model.device)
        found.append(sums_by_row(runs.model, runs.final_states(part, which, fold), part, statistic, teacher))
    sums, counts = zip(*found, strict=True)
    return torch.cat(sums, dim=1), torch.cat(counts)


def halves(batches: Sequence[Batch]) -> list[list[Batch]]:
    """Every other row of all, and the rest."""
    found: list[list[Batch]] = [[], []]
    seen = 0
    for batch in batches:
        for number, half in enumerate(found):
            part = {key: value[(number - seen) % 2 :: 2] for key, value in batch.items()}
            half += [part] if len(part["input_ids"]) else []
        seen += len(batch["input_ids"])
    return found
