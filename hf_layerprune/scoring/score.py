"""What leaving out layers, or running them in parallel, costs: `score_layers`, `score_edits`, `score_plans`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..compensation import Repair, check_compensation, find_repairs
from ..data import Batch, check_batches
from ..edits import Edit
from ..errors import LayerPruneError
from ..forward import check_same_vocabulary, measuring
from ..plan import LayerPlan, layer_indices
from ..surgery import check_model, plan_of
from ..tasks import PreparedTask, Task, prepare_tasks
from .candidates import CandidateRuns
from .evidence import Evidence
from .measures import MAX_STATE_BYTES, MEASURED, TOKEN_MEASURES, Measure, TaskMeasure, TextMeasure, halves
from .proxies import PROXIES, Question, check_criterion
from .race import Race, collect
from .scores import EditScores, LayerScores, PlanScores, scores_of
from .sweep import is_offloaded, needs_memory, sweep

CHUNKS_OF_A_RACE = 16  # at least as many, where there are as many rows


def score_layers(
    model: PreTrainedModel,
    batches: Iterable[Batch] | None,
    criterion: str = "kl",
    teacher: PreTrainedModel | None = None,
    layers: Iterable[int] | None = None,
    on_batch: Callable[[], None] = lambda: None,
    race: Race | None = None,
    seed: int = 0,
    compensation: str = "none",
    tasks: Sequence[Task | PreparedTask] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_state_bytes: int | None = None,
) -> LayerScores:
    """Score every layer of a model by what leaving it out costs.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model to score; possibly a student that was pruned or parallelized before.
        batches (`Iterable[dict[str, Tensor]]`, *optional*):
            Calibration data: `input_ids` `(B, T)` and, *optional*, `attention_mask` `(B, T)` and `labels` `(B, T)`.
            Padding never counts. `"tasks"` need none, unless for a compensation. Where `torch.distributed` is
            initialized every process is given all data and measures its share (of `"taylor"` and of a model on disk,
            all of it); all return the same scores.
        criterion (`str`, *optional*, defaults to `"kl"`): measured, with everything else left as it is,
            - `"kl"`: KL(teacher || model without the layer) of the next-token distributions, nats per token.
            - `"loss"`: next-token loss of the model without the layer, nats per token.
            - `"tasks"`: mean cost on `tasks`, weighted, as in
              [Iterative Layer-wise Distillation](https://huggingface.co/papers/2511.05085): 1 - accuracy or score, or
              nats per token.

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
            Called after every batch, for progress bars; of `"tasks"` without batches after every chunk of theirs.
        race ([`Race`], *optional*):
            Drop layers that are worse than the best beyond doubt, by `"kl"` or `"loss"`, before all data is seen: the
            same choice in a fraction of the time.
        seed (`int`, *optional*, defaults to `0`):
            Of `"random"`.
        compensation (`str`, *optional*, defaults to `"none"`):
            Measure each candidate after its repair in closed form; see [`compensate`]. Every half of the text is
            measured with repairs fitted to the other half, which is never flattered by them; `"tasks"` with repairs
            fitted to all of `batches`.
        tasks (`Sequence[Task]`, *optional*):
            Representative data sets for `"tasks"`, such as `load_tasks("default")`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The model's own, for `"tasks"`.
        max_state_bytes (`int`, *optional*, defaults to 4 GiB):
            Bound of the hidden states held at a time, however many layers there are; rows beyond it run one after
            the other. For a model on disk half of the free memory by default; beyond it the weights are read again.

    Returns:
        [`LayerScores`]: `values` maps teacher layer index to cost; lower is safer to remove.

    Raises:
        [`LayerPruneError`]: for an unknown criterion or layer, an unsupported model, or data without a token to score.
    """
    check_model(model)
    layers = list(dict.fromkeys(plan_of(model).layers if layers is None else layer_indices(layers)))
    if not layers:
        raise LayerPruneError("no layer to score: all are protected")
    edits = [Edit.remove(layer) for layer in layers]
    scores = score_edits(
        model,
        batches,
        edits,
        criterion,
        teacher,
        on_batch,
        race,
        seed=seed,
        compensation=compensation,
        tasks=tasks,
        tokenizer=tokenizer,
        max_state_bytes=max_state_bytes,
    )
    by_edit = {name: value for name, value in vars(scores).items() if isinstance(value, dict)}
    by_layer: dict[str, Any] = {n: {edit.layers[0]: v for edit, v in values.items()} for n, values in by_edit.items()}
    by_layer["contenders"] = tuple(edit.layers[0] for edit in scores.contenders)
    return LayerScores(**vars(scores) | by_layer)


def score_edits(
    model: PreTrainedModel,
    batches: Iterable[Batch] | None,
    edits: Iterable[Edit],
    criterion: str = "kl",
    teacher: PreTrainedModel | None = None,
    on_batch: Callable[[], None] = lambda: None,
    race: Race | None = None,
    savings: Sequence[float] | None = None,
    seed: int = 0,
    compensation: str = "none",
    tasks: Sequence[Task | PreparedTask] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_state_bytes: int | None = None,
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
    check_model(model)
    edits, plan = list(edits), plan_of(model)
    if not edits:
        raise LayerPruneError("no edit to score: all layers are protected")
    _check_request(model, criterion, len(edits), race, savings, compensation, tasks, max_state_bytes)
    needs_data = PROXIES[criterion].needs_data if criterion in PROXIES else criterion != "tasks"
    batches = check_batches(batches, model.config.vocab_size, "calibration data", required=needs_data)
    if criterion in PROXIES:
        return _guess(model, batches, edits, criterion, seed, on_batch)
    teacher = model if teacher is None else teacher
    check_same_vocabulary(model, teacher)
    measures = task_measures(model, tasks, tokenizer, teacher, max_state_bytes) if criterion == "tasks" else []
    folds, repairs = [batches], []
    if compensation != "none":
        folds = [batches] if measures else halves(batches)
        repairs = _find_repairs(model, folds, edits, compensation, teacher)
    plans = [edit.apply(plan) for edit in edits]
    if not measures:
        how: Any = {"race": race, "savings": savings, "repairs": repairs, "max_state_bytes": max_state_bytes}
        evidence, left = _measure_text(model, folds, plans, criterion, teacher, on_batch, **how)
        return EditScores(criterion, **scores_of(evidence, left, edits, savings))
    chunks = sum(measure.num_chunks for measure in measures)
    on_chunk = _as_often(on_batch, len(batches) or chunks, chunks)
    with measuring(model, teacher):
        evidence, left = collect(measures, CandidateRuns(model, plans, repairs), race, savings, on_chunk)
    return EditScores(criterion, **scores_of(evidence, left, edits, savings) | {"num_tokens": evidence.num_rows})


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
    if criterion not in TOKEN_MEASURES:
        raise LayerPruneError(f"criterion={criterion!r} cannot judge plans; choose {' or '.join(TOKEN_MEASURES)}")
    check_model(model)
    teacher = model if teacher is None else teacher
    check_same_vocabulary(model, teacher)
    plans, layers = list(plans), plan_of(model).layers
    if missing := {layer for plan in plans for layer in plan.layers} - set(layers):
        raise LayerPruneError(f"layers {sorted(missing)} are not in the model; it has {list(layers)}")
    evidence, left = _measure_text(model, [batches], plans, criterion, teacher, on_batch)
    return PlanScores(criterion, **scores_of(evidence, left, plans))


def _check_request(
    model: PreTrainedModel,
    criterion: str,
    num_edits: int,
    race: Race | None,
    savings: Sequence[float] | None,
    compensation: str,
    tasks: Sequence[Task | PreparedTask],
    max_state_bytes: int | None,
) -> None:
    """Do the arguments of [`score_edits`] fit together?"""
    check_criterion(criterion)
    check_compensation(compensation)
    if race is not None and not isinstance(race, Race):
        raise LayerPruneError(f"race={race!r} is no Race; give Race({race!r}), say")
    if max_state_bytes is not None and max_state_bytes < 1:
        raise LayerPruneError(f"max_state_bytes={max_state_bytes} is out of range; it must be at least 1")
    if tasks and criterion != "tasks":
        raise LayerPruneError(f"tasks are for criterion='tasks', not {criterion!r}")
    if criterion not in MEASURED:
        for name, given in (("a race", race is not None), ("a compensation", compensation != "none")):
            if given:
                raise LayerPruneError(
                    f"criterion={criterion!r} sees each layer once, as it is; {name} is for {', '.join(MEASURED)}"
                )
    if savings is not None and not (len(savings) == num_edits and all(0 < s < math.inf for s in savings)):
        raise LayerPruneError(f"savings={list(savings)}: give each of the {num_edits} edits a number above 0")
    in_memory = criterion == "tasks" or criterion in PROXIES and PROXIES[criterion].needs_data
    if in_memory and is_offloaded(model):
        raise needs_memory(f"criterion={criterion!r}")
    if is_offloaded(model) and (race is not None or compensation != "none"):
        raise needs_memory("a race" if race is not None else "compensation")


def _guess(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    edits: Sequence[Edit],
    criterion: str,
    seed: int,
    on_batch: Callable[[], None],
) -> EditScores:
    """What a proxy says of removing layers that run alone; it knows of nothing else."""
    plan = plan_of(model)
    for edit in edits:
        if edit.kind != "remove" or (edit.layers[0],) not in plan.blocks:
            raise LayerPruneError(
                f"criterion={criterion!r} tells nothing about '{edit}', only of removing a layer that runs alone; "
                f"choose one of {', '.join(MEASURED)}"
            )
    proxy, layers = PROXIES[criterion], [edit.layers[0] for edit in edits]
    with torch.no_grad():
        found = proxy.guess(Question(model, layers, [plan.block_of(n) for n in layers], batches, seed, on_batch))
    if isinstance(found, Evidence):
        return EditScores(criterion, **scores_of(found, {}, edits))
    return EditScores(criterion, dict(zip(edits, found.values, strict=True)), found.baseline, found.num_tokens)


def _find_repairs(
    model: PreTrainedModel,
    folds: Sequence[Sequence[Batch]],
    edits: Sequence[Edit],
    compensation: str,
    teacher: PreTrainedModel,
) -> list[dict[LayerPlan, Repair]]:
    """For each fold the repairs of the plans that remove a layer, fitted to the other fold, where there is one."""
    if not all(folds):
        raise LayerPruneError(
            f"compensation={compensation!r} needs two rows of calibration data: repairs are fitted to one half and "
            "measured on the other"
        )
    plan, layers = plan_of(model), [edit.layers[0] for edit in edits if edit.kind == "remove"]
    found = [find_repairs(model, fold, layers, compensation, teacher) for fold in reversed(folds)]
    return [{plan.remove(n): repair for n, repair in by.items() if not repair.nothing} for by in found]


def task_measures(
    model: PreTrainedModel,
    tasks: Sequence[Task | PreparedTask],
    tokenizer: PreTrainedTokenizerBase | None,
    teacher: PreTrainedModel,
    max_state_bytes: int | None = None,
) -> list[Measure]:
    """What `"tasks"` measures; tasks are tokenized unless they are already.

    Raises:
        [`LayerPruneError`]: if there is no task or no tokenizer, two have one name, or data does not fit its task.
    """
    if tokenizer is None:
        raise LayerPruneError("criterion='tasks' needs the model's tokenizer")
    prepared = prepare_tasks(tasks, model, tokenizer)
    bound = max_state_bytes or MAX_STATE_BYTES
    return [TaskMeasure(task, tokenizer, teacher, bound) for task in prepared]


def _measure_text(
    model: PreTrainedModel,
    folds: Sequence[Iterable[Batch]],
    plans: Sequence[LayerPlan],
    criterion: str,
    teacher: PreTrainedModel,
    on_batch: Callable[[], None],
    race: Race | None = None,
    savings: Sequence[float] | None = None,
    repairs: Sequence[Mapping[LayerPlan, Repair]] = (),
    max_state_bytes: int | None = None,
) -> tuple[Evidence, dict[int, float]]:
    """What [`~race.collect`] finds of plans on text; of a model that is not in memory in sweeps."""
    folds = [check_batches(batches, model.config.vocab_size, "calibration data") for batches in folds]
    batches = [batch for fold in folds for batch in fold]
    with measuring(model, teacher):
        if is_offloaded(model):
            return sweep(model, batches, plans, criterion, teacher, on_batch, max_state_bytes), {}
        rows = None if race is None else max(1, sum(len(batch["input_ids"]) for batch in batches) // CHUNKS_OF_A_RACE)
        text = TextMeasure(folds, criterion, teacher, rows, max_state_bytes or MAX_STATE_BYTES)
        on_chunk = _as_often(on_batch, len(batches), text.num_chunks)
        return collect([text], CandidateRuns(model, plans, repairs), race, savings, on_chunk)


def _as_often(call: Callable[[], None], times: int, of: int) -> Callable[[], None]:
    """`call`, evenly, `times` of the `of` times that this is called."""
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        for _ in range(done * times // of - (done - 1) * times // of):
            call()

    return count
