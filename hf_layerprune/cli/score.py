"""`hf-layerprune score`: what each layer of a model costs."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..files import to_json, write_atomically
from ..loading import load_config, load_tokenizer
from ..progress import Console, Phases, say
from ..report import has_plots, plot_scores, save_plot
from ..scoring import CRITERION_UNITS, Race, Scores, criterion_of, score_layers
from ..tasks import Task, load_tasks, prepare_tasks
from .arguments import ScoreArguments
from .common import check_no_text, check_text, device, load_on_device, print_table, say_files, text_batches, writable
from .parsing import Parser

WITHOUT_TEXT = ("tail", "random")
"""Criteria that look at no data."""


def score(argv: list[str]) -> None:
    """Print and plot what each layer costs."""
    parser, tasks = Parser("score"), []
    (arguments,) = parser.read(argv)
    criterion_of(arguments.criterion)
    if arguments.tasks or arguments.criterion == "tasks":
        check_no_text(parser.given, "tasks bring their own text")
        tasks, arguments.criterion = load_tasks(arguments.tasks or "default"), "tasks"
    elif arguments.criterion in WITHOUT_TEXT:
        check_no_text(parser.given, f"criterion {arguments.criterion} reads no text")
    else:
        check_text(arguments, load_config(arguments.model))
    folder, console = Path(arguments.output_dir), Console()
    with writable(folder), Phases() as phases:
        scores = _scores(arguments, tasks, phases)
    try:
        write_atomically(folder / "scores.json", to_json(scores.to_dict()))
        if has_plots():
            title = f"{Path(arguments.model).name}: importance of its layers"
            save_plot(plot_scores(scores, title), folder / "scores.png")
    finally:  # a full disk does not take both
        unit = "examples" if scores.criterion == "tasks" else "tokens"
        seen = f", {scores.num_tokens:,} {unit}" if scores.num_tokens else ""
        title = CRITERION_UNITS.get(scores.criterion, scores.criterion) + seen
        rows = []
        for layer, value in sorted(scores.values.items()):
            error = scores.standard_errors.get(layer, math.nan)
            note = "safest" * (layer == scores.safest)
            if layer in scores.dropped:
                note = f"dropped at {scores.dropped[layer]:.0%}"
            rows.append([str(layer), f"{value:.5f}", "" if math.isnan(error) else f"± {error:.5f}", note])
        print_table(("layer", "cost", "error", ""), rows, title)
        if scores.certainty:
            say(console, scores.certainty)
    say_files(console, {"scores": folder / "scores.json", "plot": folder / "scores.png"})


def _scores(arguments: ScoreArguments, tasks: list[Task], phases: Phases) -> Scores[int]:
    tokenizer, batches = load_tokenizer(arguments.model), []
    if not tasks and arguments.criterion not in WITHOUT_TEXT:
        phases.phase("reading the text")
        source = arguments.dataset or "embedded:calibration"
        batches = text_batches(arguments, tokenizer, source, arguments.num_samples)
    with TemporaryDirectory() as folder:
        offload = {"device_map": device_map(arguments.model, device()), "offload_folder": folder}
        model = load_on_device(arguments.model, arguments.dtype, phases, **(offload if arguments.offload else {}))
        prepared = prepare_tasks(tasks, model, tokenizer, arguments.batch_size) if tasks else []
        steps = len(batches) + sum(len(task.chunks) for task in prepared)
        phases.phase(f"scoring {model.config.num_hidden_layers} layers by {arguments.criterion}", steps)
        return score_layers(
            model,
            batches or None,
            arguments.criterion,
            on_batch=phases.step,
            race=None if arguments.race_confidence is None else Race(arguments.race_confidence),
            tasks=prepared,
            tokenizer=tokenizer,
        )


def device_map(name: str, where: torch.device) -> dict[str, str]:
    """Layers on disk, read when they are called, the rest on a device."""
    depth = load_config(name).num_hidden_layers
    rest = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    return dict.fromkeys(rest, str(where)) | {f"model.layers.{n}": "disk" for n in range(depth)}
