"""`hf-layerprune score | evaluate`: look at a model without changing it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data import Batch, check_length, tokenized_batches
from ..errors import LayerPruneError
from ..evaluation import evaluate_model
from ..files import to_json, write_atomically
from ..loading import load_config, load_model, load_tokenizer
from ..plots import plot_scores, save_plot
from ..progress import Phases, say
from ..report import CRITERION_UNITS
from ..scoring import Race, Scores, criterion_of, score_layers
from ..tasks import KLTask, PreparedTask, Task, TaskReport, evaluate_tasks, load_tasks, prepare_tasks
from .arguments import MeasureArguments, ScoreArguments
from .parsing import check_no_file, parse
from .text import check_sources, is_embedded, read_dataset


def score(argv: list[str]) -> None:
    """Print and plot what each layer costs."""
    (arguments,) = parse("score", argv)
    criterion_of(arguments.criterion)
    tasks = load_tasks(arguments.tasks) if arguments.tasks else []
    folder = Path(arguments.output_dir or "layerprune-scores")
    config = load_config(arguments.model)
    if not tasks:
        _check_text(arguments, config)
    tokenizer = load_tokenizer(arguments.model)
    with Phases() as phases:
        scores = _scores(arguments, tasks, tokenizer, folder, phases)
    console = Console()
    unit = "examples" if tasks else "tokens"
    seen = f", {scores.num_tokens:,} {unit}" if scores.num_tokens else ""
    table = Table(title=escape(CRITERION_UNITS.get(scores.criterion, scores.criterion)) + seen)
    for column in ("layer", "cost", "error", ""):
        table.add_column(column, justify="left" if not column else "right")
    for layer, value in sorted(scores.values.items()):
        mark = "  <- safest" if layer == scores.safest else ""
        if layer in scores.left:
            mark = f"  left at {scores.left[layer]:.0%}"
        error = scores.standard_errors.get(layer, math.nan)
        spread = "" if math.isnan(error) else f"± {error:.5f}"
        table.add_row(str(layer), f"{value:.5f}", spread, _bar(value, scores.values.values()) + mark)
    console.print(table)
    if scores.certainty:
        say(console, scores.certainty)
    write_atomically(folder / "scores.json", to_json(scores.to_dict()))
    save_plot(plot_scores(scores, f"{Path(arguments.model).name}: importance of its layers"), folder / "scores.png")
    say(console, f"scores: {folder / 'scores.json'}   plot: {folder / 'scores.png'}")


def _scores(
    arguments: ScoreArguments,
    tasks: list[Task],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    phases: Phases,
) -> Scores[int]:
    """Read, load and score, and make the folder on the way."""
    phases.phase("reading the text")
    batches = None if tasks else _measuring_batches(arguments, "embedded:calibration", tokenizer)
    race = None if arguments.race_confidence is None else Race(arguments.race_confidence)
    with TemporaryDirectory() as offload_folder:
        where = device_map(arguments.model, device()) if arguments.offload else None
        more = {"device_map": where, "offload_folder": offload_folder} if where else {}
        phases.phase(f"loading {arguments.model}")
        model = load_on_device(arguments.model, arguments.dtype, **more)
        prepared = prepare_tasks(tasks, model, tokenizer, arguments.batch_size) if tasks else []
        for notice in filter(None, (task.notice for task in prepared)):
            say(phases.console, notice)
        made_by_us = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)  # what cannot be written to is known before the work
        depth = model.config.num_hidden_layers
        phases.phase(f"scoring {depth} layers by {arguments.criterion}", len(batches or ()) or num_chunks(prepared))
        try:
            return score_layers(
                model,
                batches,
                arguments.criterion,
                on_batch=phases.step,
                race=race,
                tasks=prepared,
                tokenizer=tokenizer,
            )
        except LayerPruneError:
            if made_by_us:
                folder.rmdir()
            raise


def device() -> torch.device:
    """The accelerator, if there is one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def load_on_device(name: str, dtype: str, **kwargs: Any) -> PreTrainedModel:
    """A model on that device, or where a `device_map` says."""
    model = load_model(name, dtype, device(), **kwargs)
    return model if kwargs.get("device_map") else model.to(device())


def device_map(name: str, where: torch.device) -> dict[str, str]:
    """Layers on disk, read when they are called, the rest on a device."""
    depth = load_config(name).num_hidden_layers
    rest = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    return dict.fromkeys(rest, str(where)) | {f"model.layers.{n}": "disk" for n in range(depth)}


def _bar(value: float, values: Iterable[float], width: int = 30) -> str:
    """A bar on a logarithmic scale: a first layer that costs a hundred times the others would hide them."""
    logs = [math.log(v) for v in values if v > 0 and math.isfinite(v)]
    if not (value > 0 and math.isfinite(value)) or max(logs) == min(logs):
        return ""
    return "█" * (1 + round((width - 1) * (math.log(value) - min(logs)) / (max(logs) - min(logs))))


def evaluate(argv: list[str]) -> None:
    """Print perplexity and, against a teacher, KL and top-1 agreement."""
    (arguments,) = parse("evaluate", argv)
    console = Console()
    tasks = load_tasks(arguments.tasks) if arguments.tasks else []
    if tasks and arguments.teacher is None:
        tasks = _without_teacher(tasks, Console(stderr=True))
    config = load_config(arguments.model)
    tokenizer = load_tokenizer(arguments.model)
    folder = None if arguments.output_dir is None else Path(arguments.output_dir)
    if folder is not None:
        check_no_file(folder)
    only_tasks = bool(tasks) and arguments.dataset is None and not is_embedded(arguments.model)
    if not only_tasks:
        _check_text(arguments, config)
    with Phases() as phases:
        phases.phase("reading the text")
        batches = [] if only_tasks else _measuring_batches(arguments, "embedded:held_out", tokenizer)
        teacher = None
        if arguments.teacher is not None:
            phases.phase(f"loading {arguments.teacher}")
            teacher = load_on_device(arguments.teacher, arguments.dtype)
        phases.phase(f"loading {arguments.model}")
        model = load_on_device(arguments.model, arguments.dtype)
        prepared = prepare_tasks(tasks, model, tokenizer, arguments.batch_size) if tasks else []
        results = {}
        if batches:
            phases.phase("evaluating", len(batches))
            results = evaluate_model(model, batches, teacher, phases.step).to_dict()
        if prepared:
            phases.phase("evaluating tasks", num_chunks(prepared))
            of_tasks = evaluate_tasks(model, prepared, tokenizer, teacher, on_chunk=phases.step)
    numbers = dict(results)
    if prepared:
        results["tasks"] = of_tasks.to_dict()["results"]
        console.print(_task_table(of_tasks))
    for name, value in numbers.items():
        if value is not None:
            say(console, f"{name:12} {value:,}" if isinstance(value, int) else f"{name:12} {value:.5f}")
    labelled = [batch for batch in batches if "labels" in batch]
    if prompts := sum(int(((b["labels"] == -100) & (b["attention_mask"] == 1)).sum()) for b in labelled):
        say(console, f"measured on the completions only; {prompts:,} tokens of their prompts are not scored")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "evaluation.json", to_json(results))


def _without_teacher(tasks: list[Task], console: Console) -> list[Task]:
    """The tasks that need no teacher; the console says which do."""
    left_out = [task for task in tasks if isinstance(task, KLTask)]
    if not left_out:
        return tasks
    names = ", ".join(task.name for task in left_out)
    if len(left_out) == len(tasks):
        raise LayerPruneError(f"task {names}: KL needs a teacher to compare with; name it with --teacher")
    say(console, f"left out: {names}; KL needs a teacher to compare with (--teacher)")
    return [task for task in tasks if not isinstance(task, KLTask)]


def num_chunks(tasks: list[PreparedTask]) -> int:
    """Pieces that tasks are measured in, for a progress bar."""
    return sum(len(task.chunks) for task in tasks)


def _task_table(report: TaskReport) -> Table:
    cut = any(result.num_truncated for result in report.results.values())
    table = Table("task", "measure", "quality", "cost", "error", "examples", *(["prompts cut"] if cut else []))
    for name, result in report.results.items():
        error = "" if result.standard_error is None else f"± {result.standard_error:.4f}"
        numbers = (f"{result.quality:.4f}", f"{result.cost:.4f}", error, f"{result.num_examples:,}")
        table.add_row(escape(name), escape(result.measure), *numbers, *([f"{result.num_truncated:,}"] if cut else []))
    return table


def _check_text(arguments: MeasureArguments, config: PretrainedConfig) -> None:
    """Raise [`LayerPruneError`] unless text is named, and its rows fit the model."""
    check_sources(arguments)
    check_length(arguments.max_length, config, arguments.model)


def _measuring_batches(arguments: MeasureArguments, default: str, tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    return tokenized_batches(
        read_dataset(arguments, arguments.dataset or default),
        tokenizer,
        text_field=arguments.dataset_text_field,
        max_length=arguments.max_length,
        num_rows=arguments.num_samples,
        batch_size=arguments.batch_size,
    )
