"""`hf-layerprune evaluate`: the quality of a model, alone or against a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import LayerPruneError
from ..evaluation import evaluate_model
from ..files import to_json, write_atomically
from ..loading import load_config, load_tokenizer
from ..progress import Console, Phases, say
from ..surgery import plan_of
from ..tasks import KLTask, Task, TaskReport, evaluate_tasks, load_tasks, prepare_tasks
from .arguments import EvaluateArguments
from .common import check_text, load_on_device, print_table, text_batches, writable
from .parsing import parse


def evaluate(argv: list[str]) -> None:
    """Print perplexity and, against a teacher, KL and top-1 agreement."""
    (arguments,) = parse("evaluate", argv)
    tasks = load_tasks(arguments.tasks) if arguments.tasks else []
    if arguments.teacher is None and (left_out := [task for task in tasks if isinstance(task, KLTask)]):
        names = ", ".join(task.name for task in left_out)
        if len(left_out) == len(tasks):
            raise LayerPruneError(f"task {names}: KL needs a teacher to compare with; name it with --teacher")
        say(Console(stderr=True), f"left out: {names}; KL needs a teacher to compare with (--teacher)")
        tasks = [task for task in tasks if not isinstance(task, KLTask)]
    folder = None if arguments.output_dir is None else Path(arguments.output_dir)
    with writable(folder), Phases() as phases:
        report, of_tasks = _measure(arguments, tasks, phases)
    try:
        if folder is not None:
            results = report if of_tasks is None else report | {"tasks": of_tasks.to_dict()["results"]}
            results = results | {"plan": plan_of(load_config(arguments.model)).to_dict()}
            write_atomically(folder / "evaluation.json", to_json(results))
    finally:  # a full disk does not take both
        if of_tasks is not None:
            rows = []
            for name, result in of_tasks.results.items():
                error = "" if result.standard_error is None else f"± {result.standard_error:.4f}"
                numbers = [f"{result.quality:.4f}", f"{result.cost:.4f}", error, f"{result.num_examples:,}"]
                rows.append([name, result.measure, *numbers])
            print_table(("task", "measure", "quality", "cost", "error", "examples"), rows)
        for name, value in report.items():
            if value is not None:
                say(Console(), f"{name:12} {value:,}" if isinstance(value, int) else f"{name:12} {value:.5f}")


def _measure(
    arguments: EvaluateArguments, tasks: list[Task], phases: Phases
) -> tuple[dict[str, Any], TaskReport | None]:
    """Quality on text (nothing where only tasks are asked for), and on tasks."""
    config, tokenizer, batches = load_config(arguments.model), load_tokenizer(arguments.model), []
    if not tasks or arguments.dataset is not None:
        check_text(arguments, config)
        phases.phase("reading the text")
        source = arguments.dataset or "embedded:held_out"
        batches = text_batches(arguments, tokenizer, source, arguments.num_samples)
    teacher = None
    if arguments.teacher is not None:
        teacher = load_on_device(arguments.teacher, arguments.dtype, phases)
    model = load_on_device(arguments.model, arguments.dtype, phases)
    prepared = prepare_tasks(tasks, model, tokenizer, arguments.batch_size) if tasks else []
    report: dict[str, Any] = {}
    of_tasks: TaskReport | None = None
    if batches:
        phases.phase("evaluating", len(batches))
        report = evaluate_model(model, batches, teacher, phases.step).to_dict()
    if prepared:
        phases.phase("evaluating tasks", sum(len(task.chunks) for task in prepared))
        of_tasks = evaluate_tasks(model, prepared, tokenizer, teacher, on_chunk=phases.step)
    return report, of_tasks
