"""What leaving out layers, or running them in parallel, costs: `score_layers`, `score_edits`, `score_plans`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from transformers import PreTrainedModel

from ..data import Batch, check_batches
from ..edits import Edit
from ..errors import LayerPruneError
from ..forward import check_same_vocabulary, measuring
from ..plan import LayerPlan
from ..surgery import check_supported, plan_of
from .block_influence import block_influence
from .candidates import measure_candidates
from .scores import EditScores, LayerScores, PlanScores, Scores

MEASURED = {"kl": "kl", "loss": "nll"}  # criterion -> field of TokenStatistics
CRITERIA = (*MEASURED, "block_influence")

__all__ = [
    "CRITERIA",
    "EditScores",
    "LayerScores",
    "PlanScores",
    "Scores",
    "score_edits",
    "score_layers",
    "score_plans",
]


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
            The model to score; possibly a student that was pruned or parallelized before.
        batches (`Iterable[dict[str, Tensor]]`):
            Calibration data: `input_ids` `(B, T)` and, *optional*, `attention_mask` `(B, T)` and `labels` `(B, T)`.
            Padding never counts.
        criterion (`str`, *optional*, defaults to `"kl"`):
            - `"kl"`: KL(teacher || model without the layer) of the next-token distributions, nats per token.
            - `"loss"`: next-token loss of the model without the layer, nats per token.
            - `"block_influence"`: 1 - cos(layer input, layer output), as in
              [ShortGPT](https://huggingface.co/papers/2403.03853); for layers that run in no parallel block.
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
    check_supported(model.config)
    layers = list(dict.fromkeys(plan_of(model).layers if layers is None else layers))
    if not layers:
        raise LayerPruneError("no layer to score: all are protected")
    scores = score_edits(model, batches, [Edit.remove(layer) for layer in layers], criterion, teacher, on_batch)
    values = dict(zip(layers, scores.values.values(), strict=True))
    return LayerScores(criterion, values, scores.baseline, scores.num_tokens)


def score_edits(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    edits: Iterable[Edit],
    criterion: str = "kl",
    teacher: PreTrainedModel | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> EditScores:
    """Score edits of a model's plan by what each one alone costs; arguments as in [`score_layers`].

    Args:
        edits (`Iterable[Edit]`): what to try; see [`EditSpace.edits`].

    Returns:
        [`EditScores`]: `values` maps each edit to the measure AFTER it; `baseline` is the model as it is.

    Raises:
        [`LayerPruneError`]: as [`score_layers`]; if there is no edit, or the criterion cannot judge one of them.
    """
    _check_criterion(criterion)
    check_supported(model.config)
    edits, plan = list(edits), plan_of(model)
    if not edits:
        raise LayerPruneError("no edit to score: all layers are protected")
    plans = [edit.apply(plan) for edit in edits]
    if criterion != "block_influence":
        scores = score_plans(model, batches, plans, criterion, teacher, on_batch)
        values = {edit: scores.values[after] for edit, after in zip(edits, plans, strict=True)}
        return EditScores(criterion, values, scores.baseline, scores.num_tokens)
    for edit in edits:
        if edit.kind != "remove" or (edit.layers[0],) not in plan.blocks:
            raise LayerPruneError(
                f"criterion='block_influence' tells nothing about '{edit}', only of removing a layer that runs alone; "
                f"choose one of {', '.join(MEASURED)}"
            )
    batches = check_batches(batches, model.config.vocab_size, "calibration data")
    with measuring(model):
        positions = [plan.block_of(edit.layers[0]) for edit in edits]
        values, num_tokens = block_influence(model, batches, positions, on_batch)
    return EditScores(criterion, dict(zip(edits, values, strict=True)), 0.0, num_tokens)


def score_plans(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    plans: Iterable[LayerPlan],
    criterion: str = "kl",
    teacher: PreTrainedModel | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> PlanScores:
    """Measure what `model` would be under each of several plans made of its layers, without building any of them.

    Arguments as in [`score_layers`], `criterion` `"kl"` or `"loss"`; `values` maps each plan to its measure.
    """
    if criterion not in MEASURED:
        raise LayerPruneError(f"criterion={criterion!r} cannot judge plans; choose one of {', '.join(MEASURED)}")
    check_supported(model.config)
    plans, teacher = list(plans), model if teacher is None else teacher
    check_same_vocabulary(model, teacher)
    layers = plan_of(model).layers
    if missing := {layer for plan in plans for layer in plan.layers} - set(layers):
        raise LayerPruneError(f"layers {sorted(missing)} are not in the model; it has {list(layers)}")
    batches = check_batches(batches, model.config.vocab_size, "calibration data")
    totals, num_tokens = [0.0] * (1 + len(plans)), 0
    with measuring(model, teacher):
        for statistics in measure_candidates(model, batches, plans, teacher if criterion == "kl" else None, on_batch):
            values = (getattr(s, MEASURED[criterion]).double().sum().item() for s in statistics)
            totals = [total + value for total, value in zip(totals, values, strict=True)]
            num_tokens += len(statistics[0].nll)
    baseline, *values = (total / num_tokens for total in totals)
    return PlanScores(criterion, dict(zip(plans, values, strict=True)), baseline, num_tokens)


def _check_criterion(criterion: str) -> None:
    if criterion not in CRITERIA:
        raise LayerPruneError(f"criterion={criterion!r} is unknown; choose one of {', '.join(CRITERIA)}")
