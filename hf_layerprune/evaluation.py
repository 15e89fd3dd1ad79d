"""Perplexity of a model and, against a teacher, KL and top-1 agreement, all weighted by tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .data import Batch, check_batches, valid_next_tokens
from .forward import check_same_vocabulary, final_states, inference, to_device, unpadded
from .losses import perplexity_of, token_statistics


@dataclass(frozen=True)
class EvaluationReport:
    """How good a model is on token batches; without a teacher, `kl` and `agreement` are `None`."""

    loss: float  # mean next-token loss, nats per token
    perplexity: float  # exp(loss)
    kl: float | None  # mean KL(teacher || model), nats per token
    agreement: float | None  # share of positions where both models rank the same token first
    num_tokens: int  # positions that were scored

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_model(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    teacher: PreTrainedModel | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> EvaluationReport:
    """Measure a causal language model on token batches; padding never counts.

    Args:
        model ([`~transformers.PreTrainedModel`]): a causal language model of a supported family.
        batches (`Iterable[dict[str, Tensor]]`): `input_ids` `(B, T)`, *optional* `attention_mask` and `labels`.
        teacher ([`~transformers.PreTrainedModel`], *optional*): model to compare the next-token distributions with.
        on_batch (`Callable[[], None]`, *optional*): called after every batch, for progress bars.

    Raises:
        [`LayerPruneError`]: if there is no token to score, a model's family is not supported, or the vocabularies
            differ.
    """
    models = [model] if teacher is None else [model, teacher]
    check_same_vocabulary(model, model if teacher is None else teacher)
    batches = check_batches(batches, model.config.vocab_size, "evaluation data")
    totals = dict.fromkeys(["nll"] if teacher is None else ["nll", "kl", "agreement"], 0.0)
    num_tokens = 0
    with inference(*models):
        for batch in batches:
            batch = to_device(batch, model.device)
            valid, labels = valid_next_tokens(batch)
            if not len(labels):
                continue
            hidden, *reference = (final_states(m, batch)[valid] for m in models)
            heads = [m.lm_head for m in models]
            (statistics,) = token_statistics(
                [hidden], heads[0], labels, *reference, *heads[1:], with_agreement=teacher is not None
            )
            num_tokens += len(labels)
            for name in totals:
                totals[name] += statistics[name].double().sum().item()
            on_batch()
    means = {name: total / num_tokens for name, total in totals.items()}
    loss = means["nll"]
    return EvaluationReport(loss, perplexity_of(loss), means.get("kl"), means.get("agreement"), num_tokens)


def sums_by_row(
    model: PreTrainedModel,
    states: Iterable[Tensor],
    batch: Batch,
    statistic: str,
    teacher: PreTrainedModel | None = None,
) -> tuple[Tensor, Tensor]:
    """Nats summed over each row's scored tokens, `(C, B)`, and the number of these tokens, `(B,)`; on the CPU.

    Runs inside [`~forward.inference`]. `states` are the final states `(B, T, H)` of `model` itself, then of others
    with its head. `statistic` is `"nll"`, or `"kl"` to `teacher`.
    """
    valid, labels = valid_next_tokens(batch)
    counts, row_of_token = valid.sum(1).cpu().double(), valid.nonzero()[:, 0].cpu()
    hidden = [each[valid] for each in states]
    if not len(labels):
        return counts.new_zeros(len(hidden), len(counts)), counts
    reference = ()
    if statistic == "kl":
        teacher_states = hidden[0] if teacher is model else final_states(teacher, batch)[valid]
        reference = (teacher_states, teacher.lm_head)
    sums = []
    for statistics in token_statistics(hidden, model.lm_head, labels, *reference):
        sums.append(torch.zeros_like(counts).index_add_(0, row_of_token, statistics[statistic].cpu().double()))
    return torch.stack(sums), counts


def distinct_rows(batch: Batch) -> tuple[Batch, list[int]]:
    """The rows of a batch that a model must read, and for each row of `batch` which of them gives its states.

    Rows that differ in their last tokens alone, as choices of one letter do, have equal states before these, and the
    states of last tokens predict nothing that is scored.
    """
    found: dict[tuple[tuple[int, ...], ...], int] = {}
    mask = unpadded(batch)
    places = batch.get("position_ids", mask)
    parts = zip(batch["input_ids"], mask, places, strict=True)
    rows = [(tuple(ids[m][:-1].tolist()), tuple(m.tolist()), tuple(place.tolist())) for ids, m, place in parts]
    places = [found.setdefault(row, len(found)) for row in rows]
    first = [places.index(place) for place in range(len(found))]
    return {key: value[first] for key, value in batch.items()}, places
