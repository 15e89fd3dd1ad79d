"""Metrics of written text: a score in [0, 1] for each text, by which layers are scored, and one value for all texts.

The value is the mean of the scores for exact match, prefix and ROUGE, and that of sacrebleu, in [0, 100], for BLEU and
chrF.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

# rouge_score and sacrebleu take a second to import: only a task that needs them waits for it.


def sample_scores(metric: str, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """One score in [0, 1] per text."""
    return [METRICS[metric](*pair) for pair in zip(predictions, references, strict=True)]


def corpus_score(metric: str, predictions: Sequence[str], references: Sequence[str]) -> float:
    """The value of all texts together."""
    if metric in ("bleu", "chrf"):
        import sacrebleu

        corpus = sacrebleu.corpus_bleu if metric == "bleu" else sacrebleu.corpus_chrf
        return corpus(list(predictions), [list(references)]).score
    scores = sample_scores(metric, predictions, references)
    return sum(scores) / len(scores)


def _exact_match(prediction: str, reference: str) -> float:
    return float(prediction.strip() == reference.strip())


def _prefix(prediction: str, reference: str) -> float:
    """Share of the reference written before the first mistake, in characters."""
    prediction, reference = prediction.strip(), reference.strip()
    return len(os.path.commonprefix([prediction, reference])) / max(len(reference), 1)


def _rouge(variant: str, prediction: str, reference: str) -> float:
    """F1 over words, without stemming."""
    return _rouge_scorer(variant).score(reference, prediction)[variant].fmeasure


@cache
def _rouge_scorer(variant: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    # words of any script; rouge_score's own tokenizer drops all letters but a to z
    return RougeScorer([variant], tokenizer=SimpleNamespace(tokenize=lambda text: re.findall(r"\w+", text.lower())))


def _bleu(prediction: str, reference: str) -> float:
    """Over 13a words and the orders, up to 4, that the text is long enough for."""
    import sacrebleu

    return min(sacrebleu.sentence_bleu(prediction, [reference], use_effective_order=True).score / 100, 1.0)


def _chrf(prediction: str, reference: str) -> float:
    import sacrebleu

    return min(sacrebleu.sentence_chrf(prediction, [reference]).score / 100, 1.0)


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": _exact_match,
    "prefix": _prefix,
    "bleu": _bleu,
    "chrf": _chrf,
    **{variant: partial(_rouge, variant) for variant in ("rouge1", "rouge2", "rougeL")},
}
