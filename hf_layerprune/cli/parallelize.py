"""`hf-layerprune parallelize`: run layers in parallel (or leave some out) without training."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..budget import TARGETS, Budget
from ..data import Batch, check_batches, split_rows
from ..environment import environment
from ..errors import LayerPruneError
from ..evaluation import evaluate_model
from ..files import to_json, write_atomically
from ..hub import load_run, run_card
from ..hub.paths import absolute_if_local, public_settings, with_absolute_paths, without_local_paths
from ..loading import load_config, load_tokenizer, saved_dtype
from ..losses import perplexity_of
from ..plan import Edit, LayerPlan, edits_between
from ..progress import Phases, say
from ..record import RoundRecord, RunRecord, TeacherRecord, read_plan
from ..report import PLOTS, write_report
from ..scoring import Scores
from ..search import SearchStep, find_parallel_range, parallel_ranges, search_plan
from ..surgery import apply_plan, plan_of, prune
from ..trainer.callbacks import hub_tags
from ..trainer.run import check_saving, save_student, speed_runs, with_speed
from ..trainer.trainable import cast_weights
from .arguments import ParallelizeArguments, default_depth
from .common import check_new_folder, check_text, load_on_device, print_run, text_batches, writable, write_recipe
from .parsing import Parser

OF_GREEDY = {
    "edits", "max_group_size", "criterion", "protect_first_layers", "protect_last_layers", "target_latency",
    "target_num_parameters",
}  # fmt: skip
OF_SEARCH = OF_GREEDY | {"search", "target_num_layers"}
"""Settings of each search, which mean nothing without it."""

Step = tuple[tuple[Edit, ...], tuple[Scores[Edit], ...], LayerPlan]
"""Edits, the scores they were chosen by, and the plan they led to."""


def parallelize(argv: list[str]) -> None:
    """Find or take a plan, build it, measure it, and write model, plan and report."""
    parser = Parser("parallelize")
    (arguments,) = parser.read(argv)
    if arguments.pairs and arguments.plan:
        raise LayerPruneError("--pairs and --plan are both given; choose one")
    if "merge" in arguments.edits:
        raise LayerPruneError("--edits merge makes no parallel layers; run compress --edits merge --heal false")
    named = "--pairs" if arguments.pairs else "--plan" if arguments.plan else None
    unused = OF_SEARCH if named else OF_GREEDY if arguments.search == "range" else set()
    if unused := sorted(unused & parser.given.keys()):
        raise LayerPruneError(f"--{unused[0]} has no meaning with {named or '--search range'}; leave it out")
    folder = Path(arguments.output_dir)
    check_new_folder(folder)
    config = load_config(arguments.model)
    check_text(arguments, config, arguments.eval_dataset)
    wanted = _named_plan(arguments, plan_of(config))
    targets = {unit: target for unit, name in TARGETS.items() if (target := getattr(arguments, name)) is not None}
    budget = Budget.of(targets or {"depth": default_depth(config.num_hidden_layers)})
    if arguments.search == "range" and wanted is None:
        parallel_ranges(plan_of(config), budget.target)  # refuses a depth that no range has
    tokenizer = load_tokenizer(arguments.model)
    with writable(folder), Phases() as phases:
        phases.phase("reading the text")
        calibration, evaluation = _batches(arguments, tokenizer)
        model, dtype = load_on_device(arguments.model, arguments.dtype, phases), saved_dtype(arguments.model)
        check_saving(prune(model, [], share_weights=True), tokenizer)
        steps, found = _steps(arguments, budget, model, wanted, calibration, phases)
        phases.phase(f"writing {folder / 'model'}")
        student = _as_saved(model, steps[-1][-1], dtype)
        save_student(student, tokenizer, dtype, folder / "model")  # first: the rest only measures it
        write_atomically(folder / "plan.json", plan_of(student).to_json() + "\n")
        write_recipe(folder, parser.given, model=arguments.model)
        if found is not None:
            plans = sorted(found.values, key=lambda plan: (-plan.depth, plan.parallel_pairs))
            runs = [{"pairs": p.parallel_pairs, "perplexity": perplexity_of(found.values[p])} for p in plans]
            content = {"original": perplexity_of(found.baseline), "runs": runs}
            write_atomically(folder / "range.json", to_json(content))
        run = _measured(arguments, model, dtype, steps, evaluation, phases)
        _write_pages(folder, run)
        if arguments.measure_speed:
            phases.phase("measuring speed", speed_runs(run))
            try:
                run = with_speed(run, model, dtype, phases.step)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"{folder} is complete except for the speed") from None
            _write_pages(folder, run)
        print_run(run, phases.out, folder, "model")


def _batches(arguments: ParallelizeArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Batch], list[Batch]]:
    """Calibration and evaluation text; of one data set, the rows after those that calibrate."""
    calibration, num_rows = arguments.dataset or "embedded:calibration", arguments.num_samples
    evaluation = arguments.eval_dataset or (None if arguments.dataset else "embedded:held_out")
    if evaluation is not None:
        batches = text_batches(arguments, tokenizer, calibration, num_rows)
        return batches, text_batches(arguments, tokenizer, evaluation, arguments.num_eval_samples)
    batches = text_batches(arguments, tokenizer, calibration, num_rows + arguments.num_eval_samples)
    full, rest = divmod(num_rows, arguments.batch_size)
    if rest and len(batches) > full:  # the rows that calibrate end within a batch
        batches[full : full + 1] = split_rows(batches[full], rest)
        full += 1
    if len(batches) <= full:
        raise LayerPruneError(
            f"dataset {arguments.dataset} is used up by {num_rows} calibration rows of {arguments.max_length} tokens; "
            "lower num_samples or give --eval_dataset"
        )
    return batches[:full], batches[full:]


def _named_plan(arguments: ParallelizeArguments, plan: LayerPlan) -> LayerPlan | None:
    """The plan that `--pairs` or `--plan` names for a model of another plan."""
    if arguments.pairs:
        groups = " ".join(arguments.pairs).split()
        for text in groups:
            if not re.fullmatch(r"\d+([,|]\d+)+", text):
                raise LayerPruneError(f"--pairs {text!r} is not a group of layers; write it as 4,5")
        return plan.with_pairs([int(layer) for layer in re.split(r"[,|]", text)] for text in groups)
    wanted = read_plan(arguments.plan) if arguments.plan else None
    if wanted is not None and (new := sorted({*wanted.merged} - {*plan.merged})):
        raise LayerPruneError(
            f"--plan {arguments.plan} merges layers {new}, which takes data; run compress --edits merge --heal false"
        )
    return wanted


def _steps(
    arguments: ParallelizeArguments,
    budget: Budget,
    model: PreTrainedModel,
    wanted: LayerPlan | None,
    batches: list[Batch],
    phases: Phases,
) -> tuple[list[Step], Scores[LayerPlan] | None]:
    """The steps to the plan that is `wanted` or searched for, and the losses of all ranges of pairs if tried."""
    plan, found = plan_of(model), None
    if wanted is None and arguments.search == "range":
        phases.phase("measuring every range of pairs", len(batches))
        found = find_parallel_range(model, batches, on_batch=phases.step)
        wanted = next(plan for plan in found.ranking if plan.depth == budget.target)
    if wanted is not None:
        return [(tuple(edits_between(plan, wanted)), (), wanted)], found

    def on_step(step: SearchStep) -> None:
        say(phases.out, f"{step.edit}: {step.plan.depth} layers, {arguments.criterion} {step.cost:.4f}")
        if step.size > budget.target:
            phases.phase(f"searching, {step.plan.depth} layers", len(batches))

    measuring = "measuring what a block takes, then " * (budget.unit == "latency")
    phases.phase(f"{measuring}searching, {plan.depth} layers", len(batches))
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
        on_batch=phases.step,
    )
    return [((step.edit,), (step.scores,), step.plan) for step in result.steps], None


def _as_saved(model: PreTrainedModel, plan: LayerPlan, dtype: torch.dtype) -> PreTrainedModel:
    """`model` by a plan, with the weights that its file will hold."""
    student = apply_plan(model, plan, share_weights=True)
    cast_weights(student, dtype)
    return student


def _measured(
    arguments: ParallelizeArguments,
    model: PreTrainedModel,
    dtype: torch.dtype,
    steps: list[Step],
    batches: list[Batch],
    phases: Phases,
) -> RunRecord:
    batches = check_batches(batches, model.config.vocab_size, "evaluation data")
    phases.phase("evaluating the model and every step", len(batches) * (1 + len(steps)))
    quality = evaluate_model(model, batches, on_batch=phases.step)
    name = without_local_paths(absolute_if_local(arguments.model))
    run = RunRecord(
        public_settings(with_absolute_paths(asdict(arguments))),
        TeacherRecord.of(model, quality, name=name),
        environment=environment(model.device),
        tags=hub_tags(model, None),
        verb="parallelize",
    )
    criterion = "loss" if arguments.search == "range" else arguments.criterion  # a range is chosen by perplexity
    for number, (edits, scores, plan) in enumerate(steps, 1):
        student = _as_saved(model, plan, dtype)
        report = evaluate_model(student, batches, model, phases.step)
        details = {"number": number, "edits": edits, "criterion": criterion, "scores": scores}
        run = run.with_round(RoundRecord.of(student, report, **details))
    return run


def _write_pages(folder: Path, run: RunRecord) -> None:
    """Write the report, and the card next to it and next to the model."""
    write_report(folder, run)
    card = run_card(load_run(folder), len(run.rounds), f"{folder.name}/model")
    write_atomically(folder / "README.md", str(card))
    for name in ("README.md", *PLOTS):
        if (folder / name).is_file():
            write_atomically(folder / "model" / name, (folder / name).read_bytes())
