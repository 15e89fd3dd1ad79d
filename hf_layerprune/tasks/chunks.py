"""Tasks as batches of tokens, and how what models did with them becomes costs.

Shapes: C models, B rows of a batch, T positions, E examples of a chunk (an example may be several rows). Position `t`
predicts token `t + 1`; labels are -100 where nothing is scored. A lower cost is better; the mean cost of a task is the
sum of its costs over the sum of their weights.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import pad_id, padded
from ..errors import LayerPruneError, first_line, needs_extra
from ..forward import to_device

METRICS = ("exact_match", "prefix", "rouge1", "rouge2", "rougeL", "bleu", "chrf")
"""Metrics that need no network; others are those of the `evaluate` library."""


@dataclass(frozen=True)
class Chunk:
    """Whole examples of a task.

    `batch` holds `input_ids` and `attention_mask`, each `(B, T)`: with `labels` and padded on the right to be scored,
    or padded on the left to be continued.
    """

    batch: dict[str, Tensor] = field(repr=False)


@dataclass(frozen=True)
class TokenChunk(Chunk):
    """Rows that are examples themselves; the cost is the sum over the scored tokens, the weight their number."""

    def reduce(self, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """`(C, B)` summed nats and `(B,)` scored tokens per row to `(C, E)` costs and `(E,)` weights."""
        return sums, counts


@dataclass(frozen=True)
class ChoiceChunk(Chunk):
    """Examples with a row per choice; the cost is 0 if the answer's row is the likeliest, else 1."""

    sizes: tuple[int, ...]  # (E,), rows per example; they add up to B
    answers: tuple[int, ...]  # (E,), the right row within each example
    divisors: tuple[int, ...]  # (B,), of each row's log-likelihood before they are compared

    def reduce(self, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """`(C, B)` summed nats and `(B,)` scored tokens per row to `(C, E)` costs, 0 or 1, and `(E,)` weights, 1.

        Ties and NaN are wrong: neither shows that the model knows the answer.
        """
        scores = sums / torch.tensor(self.divisors, dtype=torch.float64)
        costs = []
        for rows, answer in zip(scores.split(self.sizes, dim=1), self.answers, strict=True):
            others = torch.cat([rows[:, :answer], rows[:, answer + 1 :]], dim=1)
            costs.append(1 - (rows[:, answer, None] < others).all(1).double())
        return torch.stack(costs, 1), torch.ones(len(self.sizes), dtype=torch.float64)


class ModelChunk(Chunk):
    """Examples that need a whole model, one at a time."""

    def reduce(self, models: Iterable[PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
        """C models to `(C, E)` costs and `(E,)` weights."""
        raise NotImplementedError


@dataclass(frozen=True)
class GenerationChunk(ModelChunk):
    """Prompts to continue greedily, and the right texts, `references`; B = E. The rest is as in [`GenerationTask`]."""

    max_new_tokens: int
    stop_strings: tuple[str, ...]
    references: tuple[str, ...]
    metric: str
    after: str | None = None

    def reduce(self, models: Iterable[PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
        costs = torch.stack([self.costs(self.texts(model, tokenizer)) for model in models])
        return costs, torch.ones(len(self.references), dtype=torch.float64)

    def texts(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The greedy continuation of each of the E prompts, without the prompt."""
        batch = to_device(self.batch, model.device)
        stop = {"stop_strings": list(self.stop_strings), "tokenizer": tokenizer} if self.stop_strings else {}
        # the checkpoint's own settings (sampling, a repetition penalty) would hide what a layer costs
        ids = model.generate(
            **batch,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            pad_token_id=pad_id(tokenizer),
            **stop,
        )
        return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    def costs(self, texts: Sequence[str]) -> Tensor:
        """E continuations to `(E,)` costs, 1 - score."""
        scores = []
        for text, reference in zip(texts, self.references, strict=True):
            for stop in self.stop_strings:
                text = text.split(stop)[0]
            scores.append(text_score(self.metric, answer_part(text, self.after), reference))
        return 1 - torch.tensor(scores, dtype=torch.float64)


def answer_part(text: str, after: str | None) -> str:
    """What follows the last `after` in a text (all of it if there is none), without space around."""
    return (text if after is None else text.rpartition(after)[2]).strip()


def check_metric(metric: str) -> None:
    """Raise [`LayerPruneError`] unless the metric can be loaded."""
    try:
        _loaded(metric)
    except ModuleNotFoundError as error:
        package = str(error.name).split(".")[0]
        if package not in ("evaluate", "rouge_score", "sacrebleu"):  # what a metric of evaluate needs itself
            raise LayerPruneError(f"metric {metric!r}: {first_line(error)}") from error
        raise needs_extra(f"metric {metric!r}: {package}", "metrics") from None
    except Exception as error:  # no such metric, no network, a missing package: each raises its own
        raise LayerPruneError(
            f"metric {metric!r} is none of {', '.join(METRICS)}, and evaluate cannot load it: {first_line(error)}"
        ) from error


def text_score(metric: str, text: str, reference: str) -> float:
    """Score a text in [0, 1]."""
    if metric == "exact_match":
        return float(text == reference)
    if metric == "prefix":  # the share of the reference written before the first mistake, in characters
        return len(os.path.commonprefix([text, reference])) / max(len(reference), 1)
    if metric.startswith("rouge"):
        return _loaded(metric).score(reference, text)[metric].fmeasure
    if metric in METRICS:
        return min(_loaded(metric).sentence_score(text, [reference]).score / 100, 1.0)
    results = _loaded(metric).compute(predictions=[text], references=[reference])
    return float(next(value for value in results.values() if isinstance(value, (int, float))))


@cache
def _loaded(metric: str) -> Any:
    """The library's object for a metric; importing one takes a second, so only a task that needs it waits."""
    if metric in ("exact_match", "prefix"):
        return None
    if metric.startswith("rouge"):
        from rouge_score.rouge_scorer import RougeScorer

        # words of any script; rouge_score's own tokenizer drops all letters but a to z
        words = SimpleNamespace(tokenize=lambda text: re.findall(r"\w+", text.lower()))
        return RougeScorer([metric], tokenizer=words)
    if metric in METRICS:
        import sacrebleu

        return sacrebleu.BLEU(effective_order=True) if metric == "bleu" else sacrebleu.CHRF()
    import evaluate

    return evaluate.load(metric, keep_in_memory=True)


@dataclass(frozen=True)
class PreparedTask:
    """A task in tokens."""

    name: str
    weight: float  # among others
    measure: str  # "accuracy", "perplexity", "kl", a metric's name, or the "score" of lm-eval
    chunks: list[Chunk] = field(repr=False)  # its examples
    vocab_size: int = field(default=0, repr=False)  # the smallest its tokens are known to be in; 0 before a check

    @property
    def statistic(self) -> Literal["kl", "nll"]:
        """Which of [`~losses.token_statistics`] token and choice chunks take the sums of, per row."""
        return "kl" if self.measure == "kl" else "nll"


@dataclass(frozen=True)
class Encoded:
    """The tokens of one row, scored from `start` on; `truncated` if the beginning of the prompt was cut off."""

    ids: list[int]
    start: int
    truncated: bool = False


@dataclass(frozen=True)
class Example:
    """What a model reads for one example; what may follow its prompt, and the index of what should."""

    rows: list[Encoded]
    texts: Sequence[str] = ()
    answer: int = 0


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a prompt, after the begin token if there is one; an empty prompt without one is the end token."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id, *ids]
    return ids or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])


def cut_left(tokenizer: PreTrainedTokenizerBase, ids: list[int], length: int) -> list[int]:
    """Keep the last `length` tokens, the first of which stays the begin token if `ids` start with it."""
    if len(ids) <= length:
        return ids
    begin = [ids[0]] if length > 1 and ids[0] == tokenizer.bos_token_id else []
    return begin + ids[len(ids) - length + len(begin) :]


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str, max_length: int) -> Encoded:
    """Tokenize `prompt + continuation` as one text, of which the tokens that differ from the prompt's are scored.

    A row longer than `max_length` loses the beginning of its prompt, but not the begin token.

    Raises:
        [`LayerPruneError`]: if the continuation has no token, or does not fit.
    """
    before = encode_prompt(tokenizer, prompt)
    ids = encode_prompt(tokenizer, prompt + continuation)
    if not prompt and tokenizer.bos_token_id is None:
        ids = before + ids
    start = len(os.path.commonprefix([before, ids]))
    num_scored = len(ids) - start if continuation else 0
    if not 0 < num_scored < max_length:
        raise LayerPruneError(f"there are {num_scored} tokens to score; the model can score 1 to {max_length - 1}")
    cut = max(0, len(ids) - max_length)
    # without a prompt, nothing predicts the first token
    return Encoded(cut_left(tokenizer, ids, max_length), max(start - cut, 1), cut > 0)


def batched(examples: Sequence[Example], batch_size: int) -> Iterator[list[Example]]:
    """Whole examples of together at most `batch_size` rows (but at least one example)."""
    part: list[Example] = []
    for example in examples:
        if part and sum(len(other.rows) for other in (*part, example)) > batch_size:
            yield part
            part = []
        part.append(example)
    yield part


def scored(examples: Sequence[Example], padding: int) -> dict[str, Tensor]:
    """A batch whose labels are -100 on prompts and padding."""
    rows = [row for example in examples for row in example.rows]
    batch = padded([row.ids for row in rows], padding, "right")
    starts = torch.tensor([[row.start] for row in rows])
    is_scored = (torch.arange(batch["input_ids"].shape[1]) >= starts) & batch["attention_mask"].bool()
    return batch | {"labels": batch["input_ids"].where(is_scored, -100)}
