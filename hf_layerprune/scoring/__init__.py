"""How much each layer matters: `score_layers`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from transformers import PreTrainedModel

from ..data import Batch, check_batches
from ..errors import LayerPruneError
from ..forward import check_same_vocabulary, measuring
from ..surgery import check_supported, plan_of
from .block_influence import block_influence
from .leave_one_out import leave_one_out
from .scores import LayerScores

CRITERIA = ("kl", "loss", "block_influence")

__all__ = ["CRITERIA", "LayerScores", "score_layers"]


def score_layers(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    criterion: str = "kl",
    teacher: PreTrainedModel | None = None,
    layers: Iterable[int] | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> LayerScores:
    """Score every layer of a model by what leaving it out costs.

    Args:
        model ([`~transformers.Qwen2ForCausalLM`]):
            The model to score; possibly a student that was pruned before.
        batches (`Iterable[dict[str, Tensor]]`):
            Calibration data: `input_ids` `(B, T)` and, *optional*, `attention_mask` `(B, T)` and `labels` `(B, T)`.
            Padding never counts.
        criterion (`str`, *optional*, defaults to `"kl"`):
            - `"kl"`: KL(teacher || model without the layer) of the next-token distributions, nats per token.
            - `"loss"`: next-token loss of the model without the layer, nats per token.
            - `"block_influence"`: 1 - cos(layer input, layer output), as in
              [ShortGPT](https://huggingface.co/papers/2403.03853).
        teacher ([`~transformers.PreTrainedModel`], *optional*):
            The model `"kl"` compares with; the ORIGINAL teacher when `model` is a student. Defaults to `model`.
        layers (`Iterable[int]`, *optional*):
            Teacher layer indices to score; defaults to all that `model` has. Leave out those you want to protect.
        on_batch (`Callable[[], None]`, *optional*):
            Called after every batch, for progress bars.

    Returns:
        [`LayerScores`]: `values` maps teacher layer index to cost; lower is safer to remove.

    Raises:
        [`LayerPruneError`]: for an unknown criterion or layer, an unsupported model, or data without a token to score.
    """
    if criterion not in CRITERIA:
        raise LayerPruneError(f"criterion={criterion!r} is unknown; choose one of {', '.join(CRITERIA)}")
    check_supported(model.config)
    plan, teacher = plan_of(model), model if teacher is None else teacher
    check_same_vocabulary(model, teacher)
    layers = list(plan.layers if layers is None else layers)
    if not layers:
        raise LayerPruneError("no layer to score: all are protected")
    for layer in layers:
        if len(block := plan.blocks[plan.block_of(layer)]) > 1:
            raise LayerPruneError(f"layer {layer} runs in the parallel block {block}; single layers only")
    batches = check_batches(batches, model.config.vocab_size, "calibration data")
    positions = [plan.block_of(layer) for layer in layers]
    with measuring(model, teacher):
        if criterion == "block_influence":
            values, num_tokens = block_influence(model, batches, positions, on_batch)
            return LayerScores(criterion, dict(zip(layers, values, strict=True)), 0.0, num_tokens)
        name = {"kl": "kl", "loss": "nll"}[criterion]
        totals, num_tokens = [0.0] * (1 + len(positions)), 0
        for statistics in leave_one_out(model, batches, positions, teacher if criterion == "kl" else None, on_batch):
            totals = [
                total + getattr(s, name).double().sum().item() for total, s in zip(totals, statistics, strict=True)
            ]
            num_tokens += len(statistics[0].nll)
    baseline, *values = (total / num_tokens for total in totals)
    return LayerScores(criterion, dict(zip(layers, values, strict=True)), baseline, num_tokens)
