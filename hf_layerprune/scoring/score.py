"""What leaving out layers, or running them in parallel, costs: `score_layers`, and `score` for any edits or plans."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from accelerate.utils import has_offloaded_params
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..compensation import Repair, check_method, find_repairs
from ..data import Batch, Batches, check_batches, split_rows
from ..errors import LayerPruneError
from ..forward import check_same_vocabulary, inference, shard
from ..merging import find_merges
from ..plan import Edit, LayerPlan, layer_indices
from ..surgery import check_model, plan_of
from ..tasks import PreparedTask, Task, prepare_tasks
from ..tasks.chunks import TokenChunk
from .candidates import CandidateRuns, sweep
from .estimates import ANGLES, MEASURED, TOKEN_MEASURES, Criterion, criterion_of, estimate, lone_removal
from .race import Race, collect
from .scores import Key, Scores

CHUNKS_OF_A_RACE = 16  # at least as many, if there are as many rows


def score_layers(
    model: PreTrainedModel,
    batches: Iterable[Batch] | None,
    criterion: str | Criterion = "kl",
    teacher: PreTrainedModel | None = None,
    layers: Iterable[int] | None = None,
    **options: Any,
) -> Scores[int]:
    """Score every layer of a model by what leaving it out costs.

    Args:
        model, batches, criterion, teacher, options: see [`score`].
        layers (`Iterable[int]`, *optional*):
            Teacher layer indices to score; defaults to all that `model` has and has not merged.

    Returns:
        [`Scores`]: `values` maps teacher layer index to cost; lower is safer to remove.
    """
    check_model(model)
    layers = list(dict.fromkeys(plan_of(model).unmerged_layers if layers is None else layer_indices(layers)))
    return score(model, batches, layers, criterion, teacher, **options)


def score(
    model: PreTrainedModel,
    batches: Iterable[Batch] | None,
    candidates: Iterable[Key],
    criterion: str | Criterion = "kl",
    teacher: PreTrainedModel | None = None,
    on_batch: Callable[[], None] = lambda: None,
    race: Race | None = None,
    savings: Sequence[float] | None = None,
    seed: int = 0,
    compensation: str = "none",
    tasks: Sequence[Task | PreparedTask] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Scores[Key]:
    """Score what a model could become, without building it.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model to score; possibly a student that was pruned or parallelized before.
        batches (`Iterable[dict[str, Tensor]]`, *optional*):
            Calibration data: `input_ids` `(B, T)` and, *optional*, `attention_mask` `(B, T)` and `labels` `(B, T)`.
            Padding never counts. `"tasks"` need none, except for a compensation. If `torch.distributed` is
            initialized, give every process all data; each measures its share, and all return the same scores.
        candidates (`Iterable[int]`, or of [`Edit`] or [`LayerPlan`]):
            Layers to leave out, edits of the model's plan, or whole plans made of its layers.
        criterion (`str` or `Callable`, *optional*, defaults to `"kl"`):
            Measured: `"kl"` and `"loss"`, nats per token, and `"tasks"`, the weighted mean cost on `tasks`. Estimated,
            for layers that run in no parallel block: `"block_influence"`, `"angular_distance"`, `"taylor"`, `"tail"`
            and `"random"`. docs/scoring.md defines each and names its paper. Or a function of your own, or its name
            as `"module:function"`: `f(model, batches, blocks)` returns a cost for each of `blocks`, positions in
            `model.base_model.layers`.
        teacher ([`~transformers.PreTrainedModel`], *optional*):
            The model `"kl"` compares with; the ORIGINAL teacher when `model` is a student. Defaults to `model`.
        on_batch (`Callable[[], None]`, *optional*):
            Called after every batch, for progress bars; for `"tasks"` without batches, after every chunk of theirs.
        race ([`Race`], *optional*):
            Drop candidates that are worse than the best beyond doubt before all data is seen, by a measured criterion.
        savings (`Sequence[float]`, *optional*):
            What each candidate saves, above 0, to rank by cost per unit saved. By default all save the same.
        seed (`int`, *optional*, defaults to `0`): of `"random"`.
        compensation (`str`, *optional*, defaults to `"none"`):
            Measure each candidate after its repair in closed form; see [`compensate`]. Each half of the text is
            measured with repairs fitted to the other half; `"tasks"` with repairs fitted to all of `batches`.
        tasks (`Sequence[Task]`, *optional*): data sets for `"tasks"`, such as `load_tasks("default")`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): the model's own, for `"tasks"`.

    Returns:
        [`Scores`]: `values` maps each candidate to the measure after it; `baseline` is the measure without any.

    Raises:
        [`LayerPruneError`]: for an unknown criterion, an unsupported model, data without a token to score, or a
            candidate that the criterion cannot judge or that `model` lacks the layers for.
    """
    check_model(model)
    keys, plan, teacher = list(candidates), plan_of(model), model if teacher is None else teacher
    if not keys:
        raise LayerPruneError("nothing to score: all layers are protected")
    plans = [_plan_after(key, plan) for key in keys]
    _check_request(model, criterion, race, compensation, tasks)
    needs_data = criterion in (*TOKEN_MEASURES, *ANGLES, "taylor")
    batches = check_batches(batches, model.config.vocab_size, "calibration data", required=needs_data)
    if criterion not in MEASURED:
        return estimate(model, batches, dict(zip(keys, plans, strict=True)), criterion, seed, on_batch)
    check_same_vocabulary(model, teacher)
    if criterion == "tasks":
        if tokenizer is None:
            raise LayerPruneError("criterion='tasks' needs the model's tokenizer")
        tasks = prepare_tasks(tasks, model, tokenizer)
    with inference(model, teacher):
        folds, repairs = _fitted(model, batches, plans, compensation, teacher, in_halves=criterion != "tasks")
        only_removals = all(set(after.blocks) <= set(plan.blocks) for after in plans)
        is_offloaded = any(has_offloaded_params(part) for part in model.base_model.layers.modules())  # disk or CPU
        if is_offloaded and only_removals and criterion != "tasks" and race is None:
            kinds = [(1.0, [lambda _: sweep(model, batches, plans, TOKEN_MEASURES[criterion], teacher)])]
        else:
            runs = CandidateRuns(model, plans, teacher, tokenizer, repairs)
            if criterion == "tasks":
                kinds = [(t.weight, [partial(runs.measure, data, t.statistic, 0) for data in t.chunks]) for t in tasks]
            else:
                parts, statistic = _parts(folds, race), TOKEN_MEASURES[criterion]
                kinds = [(1.0, [partial(runs.measure, TokenChunk(part), statistic, fold) for part, fold in parts])]
        count = sum(len(measures) for _, measures in kinds)
        progress = _spread(on_batch, len(batches) or count, count)
        evidence, dropped = collect(
            kinds, savings or [1.0] * len(keys), race, shard(model), on_chunk=lambda: next(progress, None)
        )
    return Scores.of(criterion, keys, evidence, dropped, savings)


def _check_request(
    model: PreTrainedModel, criterion: str | Criterion, race: Race | None, compensation: str, tasks: Sequence[Any]
) -> None:
    criterion_of(criterion)
    check_method(compensation)
    if race is not None and not isinstance(race, Race):
        raise LayerPruneError(f"race={race!r} is of type {type(race).__name__}; give a hf_layerprune.Race")
    if criterion not in MEASURED and (race is not None or compensation != "none"):
        raise LayerPruneError(
            f"criterion={criterion!r} sees each layer once, as it is; races and compensation are for "
            f"{', '.join(MEASURED)}"
        )
    if tasks and criterion != "tasks":
        raise LayerPruneError(f"tasks are for criterion='tasks', not {criterion!r}")
    if criterion in ("tasks", "taylor") and any(parameter.is_meta for parameter in model.parameters()):
        raise LayerPruneError(f"criterion={criterion!r} needs the whole model in memory; load it so, or score by 'kl'")


def _plan_after(candidate: int | Edit | LayerPlan, plan: LayerPlan) -> LayerPlan:
    if isinstance(candidate, LayerPlan):
        if missing := set(candidate.layers) - set(plan.layers):
            raise LayerPruneError(f"layers {sorted(missing)} are not in the model; it has {list(plan.layers)}")
        candidate.check_kept_whole(plan.merged)
        return candidate
    return candidate.apply(plan) if isinstance(candidate, Edit) else plan.remove(candidate)


def _new_merge(plan: LayerPlan, after: LayerPlan) -> tuple[int, ...] | None:
    """The layers that `after` merges into one; `None` where it merges none that `plan` does not."""
    new = [block for block in after.merged if block not in plan.merged]
    if new and (len(new) > 1 or plan.merge(*new[0]) != after):
        raise LayerPruneError(f"a plan that merges {list(new[0])} and does more cannot be scored; score one merge")
    return new[0] if new else None


def _halves(batches: Batches) -> list[Batches]:
    """Every other row of all, and the rest."""
    found = [Batches(vocab_size=batches.vocab_size) for _ in range(2)]
    seen = 0
    for batch in batches:
        for number, half in enumerate(found):
            part = {key: value[(number - seen) % 2 :: 2] for key, value in batch.items()}
            half += [part] if len(part["input_ids"]) else []
        seen += len(batch["input_ids"])
    return found


def _fitted(
    model: PreTrainedModel,
    batches: Batches,
    plans: Sequence[LayerPlan],
    compensation: str,
    teacher: PreTrainedModel,
    in_halves: bool,
) -> tuple[list[Batches], list[dict[LayerPlan, Repair]]]:
    """The data in folds, and for each the repairs of plans that remove or merge layers, fitted to the other fold.

    There is one fold if no plan has weights that are fitted to data, or unless `in_halves`.
    """
    plan = plan_of(model)
    removals = {layer: after for after in plans if (layer := lone_removal(plan, after)) is not None}
    merges = {layers: after for after in plans if (layers := _new_merge(plan, after)) is not None}
    if compensation == "none" and not merges:
        return [batches], [{}]
    folds, found = _halves(batches) if in_halves else [batches], []
    if not all(folds):
        raise LayerPruneError(
            "repairs and merges need two rows of calibration data, to fit them to one and measure them on the other"
        )
    for fold in reversed(folds):
        repairs = find_repairs(model, fold, removals, teacher) if compensation != "none" else {}
        made = find_merges(model, fold, merges, teacher) if merges else {}
        found.append(
            {removals[layer]: repair for layer, repair in repairs.items()}
            | {merges[group]: repair for group, repair in made.items()}
        )
    return folds, found


def _parts(folds: Sequence[Sequence[Batch]], race: Race | None) -> list[tuple[Batch, int]]:
    """The batches with their fold; for a race in pieces, so that there are enough of them to stop after."""
    batches = [(batch, fold) for fold, batches in enumerate(folds) for batch in batches]
    if race is None:
        return batches
    rows = max(1, sum(len(batch["input_ids"]) for batch, _ in batches) // CHUNKS_OF_A_RACE)
    return [(part, fold) for batch, fold in batches for part in split_rows(batch, rows)]


def _spread(call: Callable[[], None], times: int, steps: int) -> Iterator[None]:
    """Call `call` so many `times`, evenly over so many `steps`."""
    for step in range(steps):
        for _ in range((step + 1) * times // steps - step * times // steps):
            call()
        yield
