"""Metrics of written text: a score in [0, 1] for each text, by which layers are scored, and one value for all texts.

The value is the mean of the scores for exact match, prefix and ROUGE, and that of sacrebleu, in [0, 100], for BLEU and
chrF. `"evaluate:NAME"` is a metric of the `evaluate` library, by its name on the Hub or the folder of its script.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

from ..errors import LayerPruneError, first_line

EVALUATE = "evaluate:"
# rouge_score and sacrebleu take a second to import: only a task that needs them waits for it.


def sample_scores(metric: str, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """One score in [0, 1] per text."""
    score = metric_of(metric)
    return [score(*pair) for pair in zip(predictions, references, strict=True)]


def corpus_score(metric: str, predictions: Sequence[str], references: Sequence[str]) -> float:
    """The value of all texts together."""
    if metric in ("bleu", "chrf"):
        import sacrebleu

        corpus = sacrebleu.corpus_bleu if metric == "bleu" else sacrebleu.corpus_chrf
        return corpus(list(predictions), [list(references)]).score
    if metric.startswith(EVALUATE):
        return _computed(metric, predictions, references)
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


@cache
def _loaded(metric: str) -> Any:
    import evaluate

    return evaluate.load(metric.removeprefix(EVALUATE), keep_in_memory=True)


def _computed(metric: str, predictions: Sequence[str], references: Sequence[str]) -> float:
    """The first number that a metric of `evaluate` gives."""
    results = _loaded(metric).compute(predictions=list(predictions), references=list(references))
    return float(next(value for value in results.values() if isinstance(value, (int, float))))


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": _exact_match,
    "prefix": _prefix,
    "bleu": _bleu,
    "chrf": _chrf,
    **{variant: partial(_rouge, variant) for variant in ("rouge1", "rouge2", "rougeL")},
}


def metric_of(name: str) -> Callable[[str, str], float]:
    """The metric of a name: from a prediction and a reference to a score in [0, 1].

    Raises:
        [`LayerPruneError`]: if there is none, or `evaluate` cannot load it.
    """
    if name.startswith(EVALUATE):
        try:
            _loaded(name)
        except Exception as error:  # no such metric, no network, a package that it needs: each raises its own
            raise LayerPruneError(f"metric {name!r} cannot be loaded: {first_line(error)}") from error
        return lambda prediction, reference: _computed(name, [prediction], [reference])
    if name not in METRICS:
        raise LayerPruneError(f"metric {name!r} is unknown; choose one of {', '.join(METRICS)}, or {EVALUATE}NAME")
    return METRICS[name]
