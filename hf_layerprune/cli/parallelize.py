"""`hf-layerprune parallelize`: run layers in parallel (or leave some out) without training."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..budget import TARGETS, Budget
from ..data import Batch, check_length, tokenized_batches
from ..environment import environment
from ..errors import LayerPruneError
from ..evaluation import evaluate_model
from ..files import to_json, write_atomically
from ..hub import load_run, run_card
from ..hub.paths import absolute_if_local, with_absolute_paths, without_local_paths
from ..loading import load_config, load_tokenizer, saved_dtype
from ..plan import Edit, LayerPlan, edits_between
from ..plots import plot_range, save_plot
from ..progress import Phases, expected_depth, say
from ..record import RoundRecord, RunRecord, TeacherRecord
from ..record_reader import read_plan
from ..report import rich_table, write_report
from ..scoring import Scores
from ..search import ParallelRange, SearchStep, find_parallel_range, search_plan
from ..surgery import apply_plan, plan_of, prune
from ..trainer.speed import speed_runs, with_speed
from ..trainer.students import check_saving, save_student
from ..trainer.trainable import round_weights
from .arguments import ParallelizeArguments
from .measure import load_on_device
from .parsing import check_new_folder, default_depth, parse
from .text import check_sources, read_dataset

SEARCHES = ("greedy", "range")
NOT_FOR_RANGE = (
    "edits", "max_group_size", "criterion", "protect_first_layers", "protect_last_layers", "target_latency",
    "target_num_parameters",
)  # fmt: skip
FOR_A_SEARCH = ("search", "target_num_layers", *NOT_FOR_RANGE)
Step = tuple[tuple[Edit, ...], tuple[Scores[Edit], ...], LayerPlan]
"""Labels of edits, the scores they were chosen by, and the plan they led to."""


def parallelize(argv: list[str]) -> None:
    """Find or take a plan, build it, measure it, and write model, plan and report."""
    (arguments,) = parse("parallelize", argv)
    _check(arguments)
    folder = Path(arguments.output_dir or "layerprune-parallel")
    check_new_folder(folder)
    config = load_config(arguments.model)
    check_sources(arguments, arguments.eval_dataset)
    check_length(arguments.max_length, config, arguments.model)
    tokenizer = load_tokenizer(arguments.model)
    with Phases() as phases:
        _parallelize(arguments, folder, tokenizer, phases)


def _parallelize(
    arguments: ParallelizeArguments, folder: Path, tokenizer: PreTrainedTokenizerBase, phases: Phases
) -> None:
    """What is left to do once the settings are known to be good."""
    phases.phase("reading the text")
    calibration, evaluation = _batches(arguments, tokenizer)
    phases.phase(f"loading {arguments.model}")
    model = load_on_device(arguments.model, arguments.dtype)
    check_saving(prune(model, [], share_weights=True), tokenizer)
    save_dtype = saved_dtype(arguments.model)
    steps, found = _steps(arguments, model, calibration, phases)
    phases.phase(f"writing {folder / 'model'}")
    student = _as_saved(model, steps[-1][-1], save_dtype)
    save_student(student, tokenizer, save_dtype, folder / "model")  # first of all: the rest only measures it
    write_atomically(folder / "plan.json", plan_of(student).to_json() + "\n")
    if found is not None:
        write_atomically(folder / "range.json", to_json(_content(found)))
        save_plot(plot_range(found), folder / "range.png")
    phases.phase("evaluating the model and every step", len(evaluation) * (1 + len(steps)))
    quality = evaluate_model(model, evaluation, on_batch=phases.step)
    name = without_local_paths(absolute_if_local(arguments.model))
    run = RunRecord(
        without_local_paths(with_absolute_paths(asdict(arguments))),
        TeacherRecord.of(model, quality, name=name),
        environment=environment(model.device),
    )
    for number, (edits, scores, plan) in enumerate(steps, 1):
        student = _as_saved(model, plan, save_dtype)
        report = evaluate_model(student, evaluation, model, phases.step)
        criterion = "loss" if arguments.search == "range" else arguments.criterion  # of a range: the perplexity
        details = {"number": number, "edits": edits, "criterion": criterion, "scores": scores}
        run = run.with_round(RoundRecord.of(student, report, **details))
    if arguments.measure_speed:
        phases.phase("measuring speed", speed_runs(run))
        run = with_speed(run, model, save_dtype, phases.step)
    write_report(folder, run)
    write_atomically(folder / "recipe.yaml", yaml.safe_dump(with_absolute_paths(asdict(arguments)), sort_keys=False))
    card = run_card(load_run(folder), len(run.rounds), f"{folder.name}/model")
    write_atomically(folder / "README.md", str(card))
    for name in ("README.md", "quality.png", "layers.png"):
        write_atomically(folder / "model" / name, (folder / name).read_bytes())
    phases.out.print(rich_table(run))
    say(phases.out, f"model: {folder / 'model'}   report: {folder / 'report.md'}   plot: {folder / 'quality.png'}")


def _as_saved(model: PreTrainedModel, plan: LayerPlan, dtype: torch.dtype) -> PreTrainedModel:
    """`model` by a plan, with the weights that its file will hold."""
    student = apply_plan(model, plan, share_weights=True)
    round_weights(student, dtype)
    return student


def _check(arguments: ParallelizeArguments) -> None:
    """Everything that can be said before anything is loaded."""
    if arguments.pairs and arguments.plan:
        raise LayerPruneError("--pairs and --plan are both given; choose one")
    if arguments.search not in SEARCHES:
        raise LayerPruneError(f"search={arguments.search!r} is unknown; choose one of {', '.join(SEARCHES)}")
    named = "--pairs" if arguments.pairs else "--plan" if arguments.plan else None
    unused = FOR_A_SEARCH if named else NOT_FOR_RANGE if arguments.search == "range" else ()
    defaults = {item.name: item.default for item in fields(arguments)}
    for name in unused:
        if getattr(arguments, name) != defaults[name]:
            raise LayerPruneError(f"--{name} has no meaning with {named or '--search range'}; leave it out")
    if len(targets := [name for name in TARGETS.values() if getattr(arguments, name) is not None]) > 1:
        raise LayerPruneError(f"{' and '.join(targets)} are both set; choose one target")


def _batches(arguments: ParallelizeArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Batch], list[Batch]]:
    """Calibration and evaluation text."""

    def read(source: str, rows: int) -> list[Batch]:
        text = (arguments.dataset_text_field, arguments.max_length)
        return tokenized_batches(read_dataset(arguments, source), tokenizer, *text, num_rows=rows, batch_size=1)

    def stacked(rows: list[Batch]) -> list[Batch]:
        parts = [rows[n : n + arguments.batch_size] for n in range(0, len(rows), arguments.batch_size)]
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return [
            {key: pad_sequence([row[key][0] for row in part], True, fill[key]) for key in part[0]} for part in parts
        ]

    if min(arguments.num_samples, arguments.num_eval_samples, arguments.batch_size) < 1:
        raise LayerPruneError("num_samples, num_eval_samples and batch_size must be at least 1")
    source = arguments.dataset or "embedded:calibration"
    separate = arguments.eval_dataset or (None if arguments.dataset else "embedded:held_out")
    if separate is not None:
        return stacked(read(source, arguments.num_samples)), stacked(read(separate, arguments.num_eval_samples))
    rows = read(source, arguments.num_samples + arguments.num_eval_samples)
    if len(rows) <= arguments.num_samples:
        raise LayerPruneError(
            f"dataset {arguments.dataset} is used up by {arguments.num_samples} calibration rows of "
            f"{arguments.max_length} tokens; lower num_samples or give --eval_dataset"
        )
    return stacked(rows[: arguments.num_samples]), stacked(rows[arguments.num_samples :])


def _steps(
    arguments: ParallelizeArguments, model: PreTrainedModel, batches: list[Batch], phases: Phases
) -> tuple[list[Step], ParallelRange | None]:
    """The steps to the plan that was named or searched for, and all runs of pairs if those were tried."""
    plan = plan_of(model)
    if arguments.pairs:
        wanted = plan.with_pairs([_pair(text) for text in arguments.pairs])
        return [(tuple(edits_between(plan, wanted)), (), wanted)], None
    if arguments.plan:
        wanted = read_plan(arguments.plan)
        return [(tuple(edits_between(plan, wanted)), (), wanted)], None
    targets = {unit: getattr(arguments, name) for unit, name in TARGETS.items()}
    if all(target is None for target in targets.values()):
        targets["depth"] = default_depth(plan.depth)
    if arguments.search == "range":
        phases.phase("measuring every run of pairs", len(batches))
        found = find_parallel_range(model, batches, on_batch=phases.step)
        wanted = found.best(targets["depth"])
        return [(tuple(edits_between(plan, wanted)), (), wanted)], found

    return _searched(arguments, model, batches, Budget.of(targets), phases), None


def _searched(
    arguments: ParallelizeArguments, model: PreTrainedModel, batches: list[Batch], budget: Budget, phases: Phases
) -> list[Step]:
    """The steps of a greedy search. A batch costs about the square of the depth."""
    depth, made = plan_of(model).depth, 0
    whole = {"depth": depth, "latency": 1.0, "parameters": model.num_parameters()}[budget.unit]

    def work(steps: int) -> int:
        return len(batches) * sum(max(1, depth - step) ** 2 for step in range(steps))

    def on_step(step: SearchStep) -> None:
        nonlocal depth, made
        depth, made = step.plan.depth, made + 1
        if (saved := whole - step.size) > 0:
            left = math.ceil(max(0, step.size - budget.target) * made / saved)
            phases.bar.update(phases.task, total=phases.bar.tasks[0].completed + work(left))
        say(phases.out, f"{step.edit}: {step.plan.depth} layers, {arguments.criterion} {step.cost:.4f}")

    name = "measuring what a block takes, then searching" if budget.unit == "latency" else "searching"
    phases.phase(name, work(depth - expected_depth(budget, model)))
    result = search_plan(
        model,
        batches,
        budget,
        arguments.edits,
        arguments.max_group_size,
        arguments.criterion,
        protect_first_layers=arguments.protect_first_layers,
        protect_last_layers=arguments.protect_last_layers,
        on_step=on_step,
        on_batch=lambda: phases.step(depth**2),
    )
    return [((step.edit,), (step.scores,), step.plan) for step in result.steps]


def _content(found: ParallelRange) -> dict[str, Any]:
    """`range.json`: the perplexity of every run of pairs."""
    runs = [
        {"pairs": [list(pair) for pair in plan.parallel_pairs], "perplexity": perplexity}
        for plan, perplexity in found.perplexities.items()
    ]
    return {"original": found.original, "runs": runs}


def _pair(text: str) -> list[int]:
    if not re.fullmatch(r"\d+([,|]\d+)+", text):
        raise LayerPruneError(f"--pairs {text!r} is no group of layers; write it as 4,5")
    return [int(layer) for layer in re.split(r"[,|]", text)]
