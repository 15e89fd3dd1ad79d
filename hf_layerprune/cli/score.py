"""`hf-layerprune score`: what each layer of a model costs."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ..errors import LayerPruneError
from ..files import to_json, write_atomically
from ..loading import load_config, load_tokenizer
from ..plots import plot_scores, save_plot
from ..progress import Phases, say
from ..scoring import CRITERION_UNITS, Race, Scores, criterion_of, score_layers
from ..tasks import Task, load_tasks, prepare_tasks
from .arguments import ScoreArguments
from .measure import check_text, device, load_on_device, num_chunks, text_batches
from .parsing import Parser
from .recipe import made

BAR = 30  # characters
OF_TEXT = {"dataset", "dataset_config", "dataset_split", "dataset_text_field", "max_length", "num_samples"}


def score(argv: list[str]) -> None:
    """Print and plot what each layer costs."""
    parser = Parser("score")
    (arguments,) = parser.read(argv)
    criterion_of(arguments.criterion)
    tasks = _tasks(arguments, parser.given)
    config = load_config(arguments.model)
    if not tasks:
        check_text(arguments, config)
    tokenizer = load_tokenizer(arguments.model)
    folder, console = Path(arguments.output_dir), Console()
    with made(folder), Phases() as phases:
        scores = _scores(arguments, tasks, tokenizer, phases)
    console.print(_table(scores))
    if scores.certainty:
        say(console, scores.certainty)
    write_atomically(folder / "scores.json", to_json(scores.to_dict()))
    save_plot(plot_scores(scores, f"{Path(arguments.model).name}: importance of its layers"), folder / "scores.png")
    say(console, f"scores: {folder / 'scores.json'}   plot: {folder / 'scores.png'}")


def _tasks(arguments: ScoreArguments, given: set[str]) -> list[Task]:
    """The data sets that score the layers, if they shall."""
    if arguments.tasks is None and arguments.criterion != "tasks":
        return []
    names = arguments.tasks or "default"
    wrong = OF_TEXT if arguments.criterion == "tasks" else OF_TEXT | {"criterion"}
    if wrong := sorted(wrong & given):
        raise LayerPruneError(f"tasks={names} bring their own text and criterion; leave out {', '.join(wrong)}")
    arguments.criterion = "tasks"
    return load_tasks(names)


def _scores(
    arguments: ScoreArguments, tasks: list[Task], tokenizer: PreTrainedTokenizerBase, phases: Phases
) -> Scores[int]:
    """Read the text, load the model and score it."""
    phases.phase("reading the text")
    source = arguments.dataset or "embedded:calibration"
    batches = None if tasks else text_batches(arguments, tokenizer, source, arguments.num_samples)
    race = None if arguments.race_confidence is None else Race(arguments.race_confidence)
    with TemporaryDirectory() as offload_folder:
        where = device_map(arguments.model, device()) if arguments.offload else None
        offload = {"device_map": where, "offload_folder": offload_folder} if where else {}
        phases.phase(f"loading {arguments.model}")
        model = load_on_device(arguments.model, arguments.dtype, **offload)
        prepared = prepare_tasks(tasks, model, tokenizer, arguments.batch_size) if tasks else []
        depth = model.config.num_hidden_layers
        phases.phase(f"scoring {depth} layers by {arguments.criterion}", len(batches or ()) or num_chunks(prepared))
        return score_layers(
            model,
            batches,
            arguments.criterion,
            on_batch=phases.step,
            race=race,
            tasks=prepared,
            tokenizer=tokenizer,
        )


def device_map(name: str, where: torch.device) -> dict[str, str]:
    """Layers on disk, read when they are called, the rest on a device."""
    depth = load_config(name).num_hidden_layers
    rest = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    return dict.fromkeys(rest, str(where)) | {f"model.layers.{n}": "disk" for n in range(depth)}


def _table(scores: Scores[int]) -> Table:
    unit = "examples" if scores.criterion == "tasks" else "tokens"
    seen = f", {scores.num_tokens:,} {unit}" if scores.num_tokens else ""
    table = Table(title=escape(CRITERION_UNITS.get(scores.criterion, scores.criterion)) + seen)
    for column in ("layer", "cost", "error", ""):
        table.add_column(column, justify="right" if column else "left")
    for layer, value in sorted(scores.values.items()):
        mark = "  <- safest" if layer == scores.safest else ""
        if layer in scores.left:
            mark = f"  left at {scores.left[layer]:.0%}"
        error = scores.standard_errors.get(layer, math.nan)
        spread = "" if math.isnan(error) else f"± {error:.5f}"
        table.add_row(str(layer), f"{value:.5f}", spread, _bar(value, scores) + mark)
    return table


def _bar(value: float, scores: Scores[int]) -> str:
    """A bar on a logarithmic scale: a first layer that costs a hundred times the others would hide them."""
    logs = [math.log(v) for v in scores.values.values() if v > 0 and math.isfinite(v)]
    if not (value > 0 and math.isfinite(value)) or max(logs) == min(logs):
        return ""
    return "█" * (1 + round((BAR - 1) * (math.log(value) - min(logs)) / (max(logs) - min(logs))))
