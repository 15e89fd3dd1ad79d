"""Metrics of written text, as [`~evaluate.Metric`]s that need no network and are never fetched by name.

`compute` gives the usual corpus value under the metric's name, and `scores`, one value in [0, 1] per text, which is
what layers are scored by. Exact match, ROUGE and prefix are in [0, 1], BLEU and chrF in [0, 100].
"""

from __future__ import annotations

import os.path
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import evaluate
import sacrebleu
from datasets import Features, Value
from rouge_score.rouge_scorer import RougeScorer

from ..errors import LayerPruneError


class TextMetric(evaluate.Metric, ABC):
    """A metric over pairs of texts; a subclass says how one pair is judged and, where it is no mean, all together."""

    name: str
    description: str
    citation: str = ""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("keep_in_memory", True)
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation=self.citation,
            inputs_description="predictions and references: lists of texts",
            features=Features({"predictions": Value("string"), "references": Value("string")}),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
        scores = self.samples(predictions, references)
        return {self.name: self.corpus(predictions, references, scores), "scores": scores}

    def samples(self, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """One score in [0, 1] per text."""
        return [self.sample(*pair) for pair in zip(predictions, references, strict=True)]

    @abstractmethod
    def sample(self, prediction: str, reference: str) -> float:
        """The score of one text, in [0, 1]."""

    def corpus(self, predictions: Sequence[str], references: Sequence[str], scores: Sequence[float]) -> float:
        """The value of all texts together: the mean of their scores, unless the metric has one of its own."""
        return sum(scores) / len(scores)


class ExactMatch(TextMetric):
    """Share of texts that equal the reference, space around them aside."""

    name = "exact_match"
    description = "share of texts that equal the reference, space around them aside"

    def sample(self, prediction: str, reference: str) -> float:
        return float(prediction.strip() == reference.strip())


class Prefix(TextMetric):
    """Share of the reference written before the first mistake, in characters."""

    name = "prefix"
    description = "share of the reference written before the first mistake, in characters"

    def sample(self, prediction: str, reference: str) -> float:
        prediction, reference = prediction.strip(), reference.strip()
        return len(os.path.commonprefix([prediction, reference])) / max(len(reference), 1)


class Words:
    """Lower-case words of any script; the tokenizer of `rouge_score` itself drops all letters but a to z."""

    def tokenize(self, text: str) -> list[str]:
        """Words and numbers of a text."""
        return re.findall(r"\w+", text.lower())


class Rouge(TextMetric):
    """ROUGE F1 over words, without stemming: `"rouge1"`, `"rouge2"` or `"rougeL"`.

    Equal to the `rouge_score` package for English, and defined for other scripts.
    """

    name = "rougeL"
    description = "ROUGE F1"
    citation = "https://aclanthology.org/W04-1013"

    def __init__(self, variant: str = "rougeL", **kwargs: Any) -> None:
        self.name = variant
        self.scorer = RougeScorer([variant], tokenizer=Words())
        super().__init__(**kwargs)

    def sample(self, prediction: str, reference: str) -> float:
        return self.scorer.score(reference, prediction)[self.name].fmeasure


class Bleu(TextMetric):
    """BLEU of sacrebleu (13a words, up to 4 in a row); a sample's own is over the orders it is long enough for."""

    name = "bleu"
    description = "BLEU"
    citation = "https://aclanthology.org/P02-1040"

    def sample(self, prediction: str, reference: str) -> float:
        return min(sacrebleu.sentence_bleu(prediction, [reference], use_effective_order=True).score / 100, 1.0)

    def corpus(self, predictions: Sequence[str], references: Sequence[str], scores: Sequence[float]) -> float:
        return sacrebleu.corpus_bleu(list(predictions), [list(references)]).score


class Chrf(TextMetric):
    """chrF of sacrebleu: F2 of character runs up to 6; for languages that inflect."""

    name = "chrf"
    description = "chrF2"
    citation = "https://aclanthology.org/W15-3049"

    def sample(self, prediction: str, reference: str) -> float:
        return min(sacrebleu.sentence_chrf(prediction, [reference]).score / 100, 1.0)

    def corpus(self, predictions: Sequence[str], references: Sequence[str], scores: Sequence[float]) -> float:
        return sacrebleu.corpus_chrf(list(predictions), [list(references)]).score


METRICS = {metric.name: metric for metric in (ExactMatch, Prefix, Bleu, Chrf)}
ROUGE_VARIANTS = ("rouge1", "rouge2", "rougeL")


def load_metric(name: str) -> TextMetric:
    """A metric by its name.

    Raises:
        [`LayerPruneError`]: if there is none of that name.
    """
    if name in ROUGE_VARIANTS:
        return Rouge(name)
    if name not in METRICS:
        raise LayerPruneError(f"metric {name!r} is unknown; choose one of {', '.join([*METRICS, *ROUGE_VARIANTS])}")
    return METRICS[name]()
