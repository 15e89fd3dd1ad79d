"""`hf-layerprune generate`: a teacher's own answers, to heal on."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..data import load_text_dataset
from ..generation_data import HealingDataConfig, generate_healing_data
from ..generation_data.generate import processes
from ..loading import load_model, load_tokenizer
from ..progress import say
from .arguments import GenerateArguments
from .parsing import parse


def generate(argv: list[str]) -> None:
    """Write the file, or what is missing of it; see [`generate_healing_data`]."""
    arguments, config = parse((GenerateArguments, HealingDataConfig), argv)
    prompts = load_text_dataset(
        arguments.dataset or "embedded:healing", arguments.dataset_split, arguments.dataset_config
    )
    state = processes()
    console = Console(quiet=not state.is_main_process)
    model = load_model(arguments.model, arguments.dtype, state.device).to(state.device)
    tokenizer = load_tokenizer(arguments.model)
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("answering", total=None)
        report = generate_healing_data(
            model,
            prompts,
            arguments.output_file,
            config,
            tokenizer,
            on_rows=lambda done, total: bar.update(task, completed=done, total=total),
        )
    cut = f", {report.num_truncated:,} cut at {config.max_new_tokens} tokens" if report.num_truncated else ""
    cut += " and left out" if cut and not config.keep_truncated else ""
    empty = f", {report.num_empty:,} empty and left out" if report.num_empty else ""
    say(
        console,
        f"answers: {arguments.output_file}   {report.num_rows:,} rows, {report.num_tokens:,} tokens{cut}{empty}",
    )
    state.destroy_process_group()
