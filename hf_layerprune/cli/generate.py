"""`hf-layerprune generate`: a teacher's own answers, to heal on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..healing_data import check_output_file, column_of_prompts, generate_healing_data, processes
from ..loading import load_model, load_tokenizer
from ..progress import Phases, say
from .common import check_sources, read_dataset, writable
from .parsing import parse


def generate(argv: list[str]) -> None:
    """Write the file, or what is missing of it; see [`generate_healing_data`]."""
    arguments, config = parse("generate", argv)
    check_sources(arguments)
    path = Path(arguments.output_file)
    check_output_file(path)
    state = processes()
    with writable(path.parent), Phases(quiet=not state.is_main_process) as phases:
        phases.phase("reading the prompts")
        prompts = read_dataset(arguments, arguments.dataset or "embedded:healing")
        column = column_of_prompts(prompts, config)
        phases.phase(f"loading {arguments.model}")
        model = load_model(arguments.model, arguments.dtype, state.device).to(state.device)
        tokenizer = load_tokenizer(arguments.model)
        if tokenizer.chat_template and not config.as_chat and isinstance(prompts[0][column], str):
            say(phases.console, "prompts are continued as plain text; --as_chat true asks them as a user's messages")
        report = generate_healing_data(
            model, prompts, path, config, tokenizer, on_rows=partial(phases.done, "answering")
        )
    cut = f", {report.num_truncated:,} cut at {config.max_new_tokens} tokens" if report.num_truncated else ""
    empty = f", {report.num_empty:,} empty and left out" if report.num_empty else ""
    empty += f", {report.num_too_long:,} prompts too long and left out" if report.num_too_long else ""
    say(phases.out, f"answers: {path}   {report.num_rows:,} rows, {report.num_tokens:,} tokens{cut}{empty}")
    state.destroy_process_group()
