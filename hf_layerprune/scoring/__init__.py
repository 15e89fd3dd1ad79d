"""What leaving out layers, or running them in parallel, costs: `score_layers`, `score_edits`, `score_plans`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from transformers import PreTrainedModel

from ..data import Batch, check_batches
from ..edits import Edit
from ..errors import LayerPruneError
from ..forward import check_same_vocabulary, measuring
from ..plan import LayerPlan
from ..surgery import check_supported, plan_of
from .angles import ANGLES, measure_angles
from .candidates import CandidateRuns
from .measures import TOKEN_MEASURES, TextMeasure
from .race import Race, collect
from .scores import EditScores, LayerScores, PlanScores, Scores, scores_of
from .sweep import is_offloaded, sweep
from .taylor import taylor

MEASURED = tuple(TOKEN_MEASURES)
PROXIES = (*ANGLES, "taylor", "tail", "random")
CRITERIA = (*MEASURED, *PROXIES)
CHUNKS_OF_A_RACE = 32  # at least as many, where there are as many rows

__all__ = [
    "CRITERIA",
    "MEASURED",
    "EditScores",
    "LayerScores",
    "PlanScores",
    "Race",
    "Scores",
    "contiguous_block",
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
    race: Race | None = None,
    seed: int = 0,
) -> LayerScores:
    """Score every layer of a model by what leaving it out costs.

    Args:
        model ([`~transformers.Qwen2ForCausalLM`]):
            The model to score; possibly a student that was pruned or parallelized before.
        batches (`Iterable[dict[str, Tensor]]`):
            Calibration data: `input_ids` `(B, T)` and, *optional*, `attention_mask` `(B, T)` and `labels` `(B, T)`.
            Padding never counts. Where `torch.distributed` is initialized every process is given all of it and
            measures its share; all return the same scores.
        criterion (`str`, *optional*, defaults to `"kl"`): measured, with everything else left as it is,
            - `"kl"`: KL(teacher || model without the layer) of the next-token distributions, nats per token.
            - `"loss"`: next-token loss of the model without the layer, nats per token.

            or guessed, for layers that run in no parallel block,
            - `"block_influence"`: 1 - cos(layer input, layer output), as in
              [ShortGPT](https://huggingface.co/papers/2403.03853).
            - `"angular_distance"`: the angle between them over pi, as in
              [The Unreasonable Ineffectiveness of the Deeper Layers](https://huggingface.co/papers/2403.17887).
            - `"taylor"`: sum of |weight x gradient of the loss|, as in
              [Shortened LLaMA](https://huggingface.co/papers/2402.02834).
            - `"tail"`: the last layer first, as in
              [Reassessing Layer Pruning](https://huggingface.co/papers/2411.15558).
            - `"random"`: drawn by `seed`.
        teacher ([`~transformers.PreTrainedModel`], *optional*):
            The model `"kl"` compares with; the ORIGINAL teacher when `model` is a student. Defaults to `model`.
        layers (`Iterable[int]`, *optional*):
            Teacher layer indices to score; defaults to all that `model` has. Leave out those you want to protect.
        on_batch (`Callable[[], None]`, *optional*):
            Called after every batch, for progress bars.
        race ([`Race`], *optional*):
            Drop layers that are worse than the best beyond doubt, by `"kl"` or `"loss"`, before all data is seen: the
            same choice in a fraction of the time.
        seed (`int`, *optional*, defaults to `0`):
            Of `"random"`.

    Returns:
        [`LayerScores`]: `values` maps teacher layer index to cost; lower is safer to remove.

    Raises:
        [`LayerPruneError`]: for an unknown criterion or layer, an unsupported model, or data without a token to score.
    """
    check_supported(model.config)
    layers = list(dict.fromkeys(plan_of(model).layers if layers is None else layers))
    if not layers:
        raise LayerPruneError("no layer to score: all are protected")
    edits = [Edit.remove(layer) for layer in layers]
    scores = score_edits(model, batches, edits, criterion, teacher, on_batch, race, seed=seed)
    by_edit = {name: value for name, value in vars(scores).items() if isinstance(value, dict)}
    by_layer = {name: {edit.layers[0]: v for edit, v in values.items()} for name, values in by_edit.items()}
    return LayerScores(**vars(scores) | by_layer)


def score_edits(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    edits: Iterable[Edit],
    criterion: str = "kl",
    teacher: PreTrainedModel | None = None,
    on_batch: Callable[[], None] = lambda: None,
    race: Race | None = None,
    savings: Sequence[float] | None = None,
    seed: int = 0,
) -> EditScores:
    """Score edits of a model's plan by what each one alone costs; arguments as in [`score_layers`].

    Args:
        edits (`Iterable[Edit]`): what to try; see [`EditSpace.edits`].
        savings (`Sequence[float]`, *optional*):
            What each edit saves, above 0: the best has the least cost per unit saved. By default all save the same.

    Returns:
        [`EditScores`]: `values` maps each edit to the measure AFTER it; `baseline` is the model as it is.

    Raises:
        [`LayerPruneError`]: as [`score_layers`]; if there is no edit, or the criterion cannot judge one of them.
    """
    if criterion not in CRITERIA:
        raise LayerPruneError(f"criterion={criterion!r} is unknown; choose one of {', '.join(CRITERIA)}")
    check_supported(model.config)
    edits, plan = list(edits), plan_of(model)
    if not edits:
        raise LayerPruneError("no edit to score: all layers are protected")
    plans = [edit.apply(plan) for edit in edits]
    if criterion in MEASURED:
        found = _measure(model, batches, plans, criterion, teacher, on_batch, race, savings)
        return EditScores(criterion, **scores_of(*found, edits, savings))
    if race is not None:
        raise LayerPruneError(f"criterion={criterion!r} sees all data at once; a race is for {', '.join(MEASURED)}")
    for edit in edits:
        if edit.kind != "remove" or (edit.layers[0],) not in plan.blocks:
            raise LayerPruneError(
                f"criterion={criterion!r} tells nothing about '{edit}', only of removing a layer that runs alone; "
                f"choose one of {', '.join(MEASURED)}"
            )
    if criterion == "tail":
        return EditScores(criterion, {edit: -float(edit.layers[0]) for edit in edits}, 0.0, 0)
    if criterion == "random":
        return EditScores(criterion, dict(zip(edits, _shuffled(len(edits), seed), strict=True)), 0.0, 0)
    positions = [plan.block_of(edit.layers[0]) for edit in edits]
    batches = check_batches(batches, model.config.vocab_size, "calibration data")
    if criterion == "taylor":
        values, loss, num_tokens = taylor(model, batches, positions, on_batch)
        return EditScores(criterion, dict(zip(edits, values, strict=True)), loss, num_tokens)
    with measuring(model):
        stretches = [(position, position + 1) for position in positions]
        evidence = measure_angles(model, batches, stretches, criterion, on_batch)
    return EditScores(criterion, **scores_of(evidence, {}, edits))


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
    plans = list(plans)
    return PlanScores(criterion, **scores_of(*_measure(model, batches, plans, criterion, teacher, on_batch), plans))


def contiguous_block(
    model: PreTrainedModel, batches: Iterable[Batch], size: int, layers: Iterable[int] | None = None
) -> tuple[int, ...]:
    """The stretch of `size` neighbouring layers that turns its input least, by angular distance.

    [The Unreasonable Ineffectiveness of the Deeper Layers](https://huggingface.co/papers/2403.17887) removes it in one
    go. Of equal stretches the deeper one.

    Args:
        layers (`Iterable[int]`, *optional*): teacher layers that may be in it; all by default.

    Raises:
        [`LayerPruneError`]: if there is no such stretch, or the model has parallel blocks.
    """
    check_supported(model.config)
    plan = plan_of(model)
    allowed = set(plan.layers if layers is None else layers)
    starts = [n for n in range(plan.depth - size + 1) if allowed.issuperset(plan.layers[n : n + size])]
    if plan.parallel_pairs or not starts or size < 1:
        raise LayerPruneError(f"no stretch of {size} neighbouring single layers among {sorted(allowed)}")
    batches = check_batches(batches, model.config.vocab_size, "calibration data")
    with measuring(model):
        evidence = measure_angles(model, batches, [(n, n + size) for n in starts], "angular_distance")
    best = min(range(len(starts)), key=lambda index: (evidence.value(index + 1), -starts[index]))
    return plan.layers[starts[best] : starts[best] + size]


def _measure(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    plans: Sequence[LayerPlan],
    criterion: str,
    teacher: PreTrainedModel | None,
    on_batch: Callable[[], None],
    race: Race | None = None,
    savings: Sequence[float] | None = None,
) -> Any:
    teacher = model if teacher is None else teacher
    check_same_vocabulary(model, teacher)
    layers = plan_of(model).layers
    if missing := {layer for plan in plans for layer in plan.layers} - set(layers):
        raise LayerPruneError(f"layers {sorted(missing)} are not in the model; it has {list(layers)}")
    batches = check_batches(batches, model.config.vocab_size, "calibration data")
    if is_offloaded(model):
        if race is not None:
            raise LayerPruneError(
                "a model on disk or in CPU memory is read once, by all data at a time; leave out race"
            )
        with measuring(model, teacher):
            return sweep(model, batches, plans, criterion, teacher, on_batch), {}
    rows = None if race is None else max(1, sum(len(batch["input_ids"]) for batch in batches) // CHUNKS_OF_A_RACE)
    with measuring(model, teacher):
        text = TextMeasure(batches, criterion, teacher, rows)
        on_chunk = _as_often(on_batch, len(batches), text.num_chunks)
        return collect([text], CandidateRuns(model, plans), race, savings, on_chunk)


def _as_often(call: Callable[[], None], times: int, of: int) -> Callable[[], None]:
    """`call`, evenly, `times` of the `of` times that this is called."""
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        for _ in range(done * times // of - (done - 1) * times // of):
            call()

    return count


def _shuffled(count: int, seed: int) -> list[float]:
    return [float(n) for n in random.Random(seed).sample(range(count), count)]
