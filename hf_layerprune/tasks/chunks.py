"""Tasks as batches of tokens, and how what models did with them becomes costs.

Shapes: C models, B rows of a batch, T positions, E examples of a chunk (an example may be several rows). Position `t`
predicts token `t + 1`; labels are -100 where nothing is scored. A lower cost is better. The mean cost of a task is the
sum of its costs over the sum of their weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..errors import LayerPruneError
from .metrics import sample_scores


@dataclass(frozen=True)
class Chunk:
    """Whole examples of a task.

    Attributes:
        batch (`dict[str, Tensor]`):
            `input_ids` and `attention_mask`, each `(B, T)`; with `labels` and padded on the right if they are scored,
            padded on the left if a model continues them.
    """

    batch: dict[str, Tensor]

    def fingerprint(self) -> list[Any]:
        """What the chunk asks, as tensors and plain values."""
        return [*self.batch.values(), *(value for name, value in vars(self).items() if name != "batch")]


@dataclass(frozen=True)
class TokenChunk(Chunk):
    """Rows that are examples themselves; the cost is the sum over the scored tokens, the weight their number."""

    def reduce(self, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """`(C, B)` summed nats and `(B,)` scored tokens per row to `(C, E)` costs and `(E,)` weights."""
        return sums.double(), counts.double()


@dataclass(frozen=True)
class ChoiceChunk(Chunk):
    """Examples with a row per choice; the cost is 0 if the answer's row is the likeliest, else 1.

    Attributes:
        sizes (`tuple[int, ...]` of length E): rows per example; they add up to B.
        answers (`tuple[int, ...]` of length E): the right row within each example.
        divisors (`Tensor` of shape `(B,)`): divide each row's log-likelihood before they are compared.
    """

    sizes: tuple[int, ...]
    answers: tuple[int, ...]
    divisors: Tensor

    def reduce(self, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """`(C, B)` summed nats and `(B,)` scored tokens per row to `(C, E)` costs, 0 or 1, and `(E,)` weights, 1.

        Ties and NaN are wrong: neither shows that the model knows the answer.
        """
        scores = sums.double() / self.divisors.to(sums.device)
        costs = []
        for rows, answer in zip(scores.split(self.sizes, dim=1), self.answers, strict=True):
            others = torch.cat([rows[:, :answer], rows[:, answer + 1 :]], dim=1)
            costs.append(1 - (rows[:, answer, None] < others).all(1).double())
        return torch.stack(costs, 1), sums.new_ones(len(self.sizes), dtype=torch.float64)


@dataclass(frozen=True)
class GenerationChunk(Chunk):
    """Prompts to continue greedily, and the texts that the continuations are compared with; B = E.

    Attributes:
        max_new_tokens (`int`): most tokens of a continuation.
        stop_strings (`tuple[str, ...]`): a continuation ends where one of them appears.
        references (`tuple[str, ...]` of length E): the right texts.
        metric (`str`): scores a text.
        after (`str`, *optional*): compare only what follows its last appearance.
    """

    max_new_tokens: int
    stop_strings: tuple[str, ...]
    references: tuple[str, ...]
    metric: str
    after: str | None = None

    def cleaned(self, texts: Sequence[str]) -> list[str]:
        """The texts as they are scored: cut at the first stop string, without space around."""
        for stop in self.stop_strings:
            texts = [text.split(stop)[0] for text in texts]
        return [answer_part(text, self.after) for text in texts]

    def reduce(self, texts: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """C lists of E continuations to `(C, E)` costs, 1 - score, and `(E,)` weights, 1."""
        scores = [sample_scores(self.metric, self.cleaned(part), self.references) for part in texts]
        return 1 - torch.tensor(scores, dtype=torch.float64), torch.ones(len(self.references), dtype=torch.float64)


def answer_part(text: str, after: str | None) -> str:
    """What follows the last `after` in a text (all of it if there is none), without space around."""
    return (text if after is None else text.rpartition(after)[2]).strip()


@dataclass(frozen=True)
class PreparedTask:
    """A task in tokens.

    Attributes:
        name (`str`): name of the task.
        weight (`float`): its weight among others.
        measure (`str`): `"accuracy"`, `"perplexity"`, `"kl"`, a metric's name, or the `"score"` of lm-eval.
        chunks (`list[Chunk]`): its examples.
        num_truncated (`int`): rows whose prompt did not fit and lost its beginning.
    """

    name: str
    weight: float
    measure: str
    chunks: list[Chunk] = field(repr=False)
    num_truncated: int = 0

    @property
    def statistic(self) -> Literal["kl", "nll"]:
        """The field of [`~losses.TokenStatistics`] whose sums per row token and choice chunks take."""
        return "kl" if self.measure == "kl" else "nll"

    def fingerprint(self) -> list[Any]:
        """What the task asks, as tensors and plain values: the same for two tasks that ask the same."""
        return [self.name, self.weight, self.measure, *(part for chunk in self.chunks for part in chunk.fingerprint())]

    @property
    def notice(self) -> str:
        """One sentence on prompts that were cut; empty if none was."""
        if not self.num_truncated:
            return ""
        return f"task {self.name}: prompts too long for the model lost their beginning ({self.num_truncated:,})"


@dataclass(frozen=True)
class Encoded:
    """The tokens of one row, scored from `start` on; `truncated` if the beginning of the prompt was cut off."""

    ids: list[int]
    start: int
    truncated: bool = False


@dataclass(frozen=True)
class Example:
    """One row, whose tokens are scored, or a row per choice, of which `rows[answer]` is right.

    `divisors`, one per row, divide log-likelihoods before they are compared.
    """

    rows: list[Encoded]
    answer: int = 0
    divisors: tuple[float, ...] = (1.0,)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a prompt, after the tokenizer's begin token if it has one.

    The empty prompt is the begin token or else the end token, after which training texts start.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id, *ids]
    return ids or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str, max_length: int, where: str) -> Encoded:
    """Tokens of `prompt + continuation`, tokenized as one text, as the model would write it.

    Tokens that differ from the prompt's own are scored. A row longer than `max_length` loses the beginning of its
    prompt.

    Raises:
        [`LayerPruneError`]: if the continuation has no token, or does not fit; it begins with `where`.
    """
    before = encode_prompt(tokenizer, prompt)
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
    # without a prompt, nothing predicts the first token
    return Encoded(ids[cut:], max(start - cut, 1), cut > 0)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to fill rows with; it is masked, so any will do."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def padded(rows: Sequence[Sequence[int]], padding: int, side: Literal["left", "right"]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, each `(B, T)`."""
    ids = [torch.tensor(row) for row in rows]
    masks = [torch.ones_like(row) for row in ids]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=padding, padding_side=side),
        "attention_mask": pad_sequence(masks, batch_first=True, padding_side=side),
    }


def scored_chunk(examples: Sequence[Example], padding: int) -> TokenChunk | ChoiceChunk:
    """Examples whose rows' tokens are scored; labels are -100 on prompt and padding."""
    rows = [row for example in examples for row in example.rows]
    batch = padded([row.ids for row in rows], padding, "right")
    starts = torch.tensor([[row.start] for row in rows])
    is_scored = (torch.arange(batch["input_ids"].shape[1]) >= starts) & batch["attention_mask"].bool()
    batch["labels"] = batch["input_ids"].where(is_scored, -100)
    if len(rows) == len(examples):
        return TokenChunk(batch)
    return ChoiceChunk(
        batch,
        sizes=tuple(len(example.rows) for example in examples),
        answers=tuple(example.answer for example in examples),
        divisors=torch.tensor([value for example in examples for value in example.divisors], dtype=torch.float64),
    )


def whole_examples(sizes: Sequence[int], batch_size: int) -> Iterator[slice]:
    """Slices over examples of `sizes` rows, each of at most `batch_size` rows (but of at least one example)."""
    start = rows = 0
    for number, size in enumerate(sizes):
        if rows and rows + size > batch_size:
            yield slice(start, number)
            start, rows = number, 0
        rows += size
    yield slice(start, len(sizes))
