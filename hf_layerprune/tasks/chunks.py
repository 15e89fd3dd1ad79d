"""What a task hands to whoever runs the model: chunks of whole examples, each with how to turn results into costs.

Shapes: C candidate models, B rows of a batch, E examples of a chunk (one example may be several rows), T positions.
A cost is lower-is-better; the mean cost of a task is the sum of its costs over the sum of their weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import LayerPruneError
from ..losses import perplexity_of


@dataclass(frozen=True)
class TokenChunk:
    """Rows that are examples themselves: the cost is what the scored tokens cost together, the weight their number.

    Attributes:
        batch (`dict[str, Tensor]`): `input_ids`, `attention_mask`, `labels`, each `(B, T)`, padded on the right.
    """

    batch: dict[str, Tensor]

    @property
    def num_examples(self) -> int:
        return len(self.batch["input_ids"])

    def reduce(self, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """`(C, B)` summed nats and `(B,)` scored tokens per row to `(C, E)` costs and `(E,)` weights."""
        return sums.double(), counts.double()


@dataclass(frozen=True)
class ChoiceChunk:
    """Examples of several rows, one per choice; right where the answer's row is the likeliest of all.

    Attributes:
        batch (`dict[str, Tensor]`): `input_ids`, `attention_mask`, `labels`, each `(B, T)`, padded on the right.
        sizes (`tuple[int, ...]` of length E): rows per example; they add up to B.
        answers (`tuple[int, ...]` of length E): the right row within each example.
        divisors (`Tensor` of shape `(B,)`): what each row's log-likelihood is divided by before they are compared.
    """

    batch: dict[str, Tensor]
    sizes: tuple[int, ...]
    answers: tuple[int, ...]
    divisors: Tensor

    @property
    def num_examples(self) -> int:
        return len(self.sizes)

    def reduce(self, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """`(C, B)` summed nats and `(B,)` scored tokens per row to `(C, E)` costs, 0 or 1, and `(E,)` weights, 1.

        A tie is wrong, and so is a value that is no number: neither says that the model knows the answer.
        """
        scores = sums.double() / self.divisors.to(sums.device)
        costs = []
        for rows, answer in zip(scores.split(self.sizes, dim=1), self.answers, strict=True):
            others = torch.cat([rows[:, :answer], rows[:, answer + 1 :]], dim=1)
            costs.append(1 - (rows[:, answer, None] < others).all(1).double())
        return torch.stack(costs, 1), sums.new_ones(len(self.sizes), dtype=torch.float64)


class SampleMetric(Protocol):
    """What a generation chunk needs of a metric."""

    name: str

    def samples(self, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """One score in [0, 1] per text."""

    def compute(self, *, predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
        """The corpus value under the metric's name, and `scores`."""


@dataclass(frozen=True)
class GenerationChunk:
    """Prompts to continue greedily, and what the continuations are compared with.

    Attributes:
        batch (`dict[str, Tensor]`): `input_ids` and `attention_mask`, each `(B, T)`, padded on the left; B = E.
        max_new_tokens (`int`): length of a continuation at most.
        stop_strings (`tuple[str, ...]`): a continuation may end where one of them appears.
        references (`tuple[str, ...]` of length E): the right texts.
        metric (`SampleMetric`): judges a text.
        after (`str`, *optional*): compare only what follows its last appearance, in both texts.
    """

    batch: dict[str, Tensor]
    max_new_tokens: int
    stop_strings: tuple[str, ...]
    references: tuple[str, ...]
    metric: SampleMetric
    after: str | None = None

    @property
    def num_examples(self) -> int:
        return len(self.references)

    def cleaned(self, texts: Sequence[str]) -> list[str]:
        """The texts as they are judged: cut at the first stop string, without space around."""
        for stop in self.stop_strings:
            texts = [text.split(stop)[0] for text in texts]
        return [answer_part(text, self.after) for text in texts]

    def reduce(self, texts: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """C lists of E continuations to `(C, E)` costs, 1 - score, and `(E,)` weights, 1."""
        costs = [[1 - score for score in self.metric.samples(self.cleaned(part), self.references)] for part in texts]
        return torch.tensor(costs, dtype=torch.float64), torch.ones(self.num_examples, dtype=torch.float64)


Chunk = TokenChunk | ChoiceChunk | GenerationChunk


def answer_part(text: str, after: str | None) -> str:
    """What follows the last `after` in a text (all of it where there is none), without space around."""
    return (text if after is None else text.rpartition(after)[2]).strip()


@dataclass(frozen=True)
class PreparedTask:
    """A task in tokens.

    Attributes:
        name (`str`): name of the task.
        weight (`float`): its weight among others.
        statistic (`str`): what a chunk's `reduce` takes: `"nll"` or `"kl"` per row, or the texts of a `"generation"`.
        measure (`str`): what [`~PreparedTask.quality`] is: `"accuracy"`, `"perplexity"`, `"kl"` or a metric's name.
        chunks (`list[Chunk]`): batches of whole examples.
        num_truncated (`int`): rows whose prompt did not fit and lost its beginning.
    """

    name: str
    weight: float
    statistic: str
    measure: str
    chunks: list[Chunk] = field(repr=False)
    num_truncated: int = 0

    @property
    def num_examples(self) -> int:
        return sum(chunk.num_examples for chunk in self.chunks)

    def fingerprint(self) -> list[Any]:
        """What the task asks, as tensors and plain values: the same for two that ask the same."""
        parts: list[Any] = [self.name, self.weight, self.statistic]
        for chunk in self.chunks:
            settings = {name: value for name, value in vars(chunk).items() if name != "batch"}
            parts += [*chunk.batch.values(), *(getattr(value, "name", value) for value in settings.values())]
        return parts

    def quality(self, cost: float) -> float:
        """The task's measure for a mean cost: perplexity and KL lower is better, all others higher.

        For a generation task this is the mean score of its samples; the corpus value needs the texts.
        """
        if self.measure == "perplexity":
            return perplexity_of(cost)
        return cost if self.measure == "kl" else 1 - cost

    @property
    def notice(self) -> str:
        """One sentence on prompts that were cut; empty where none was."""
        if not self.num_truncated:
            return ""
        return f"task {self.name}: prompts too long for the model lost their beginning ({self.num_truncated:,})"


def check_fits(tasks: Iterable[PreparedTask], vocab_size: int) -> None:
    """Raise [`LayerPruneError`] for a token id that a model of `vocab_size` entries does not know."""
    for task in tasks:
        highest = max((int(chunk.batch["input_ids"].max()) for chunk in task.chunks), default=0)
        if highest >= vocab_size:
            raise LayerPruneError(
                f"task {task.name} holds token id {highest}, but the model's vocabulary has {vocab_size} entries; "
                "give the model's own tokenizer"
            )


def filled(sizes: Sequence[int], batch_size: int) -> Iterator[slice]:
    """Slices over examples of `sizes` rows, each of at most `batch_size` rows (but of one example at least)."""
    start = rows = 0
    for number, size in enumerate(sizes):
        if rows and rows + size > batch_size:
            yield slice(start, number)
            start, rows = number, 0
        rows += size
    yield slice(start, len(sizes))
