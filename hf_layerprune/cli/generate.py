"""`hf-layerprune generate`: a teacher's own answers, to heal on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..errors import LayerPruneError
from ..healing_data import answer_prompts, column_of_prompts, locked, processes
from ..loading import load_model, load_tokenizer
from ..progress import Phases, say
from .common import check_sources, read_dataset, writable
from .parsing import Parser


def generate(argv: list[str]) -> None:
    """Write the file, or what is missing of it; see [`generate_healing_data`]."""
    parser = Parser("generate")
    arguments, config = parser.read(argv)
    check_sources(arguments)
    path = Path(arguments.output_file)
    state = processes()
    with writable(path.parent), locked(path), Phases(quiet=not state.is_main_process) as phases:
        phases.phase("reading the prompts")
        prompts = read_dataset(arguments, arguments.dataset or "embedded:healing")
        column = column_of_prompts(prompts, config)
        if "prompt_tokens" in parser.given and (config.as_chat or column in ("prompt", "messages", "conversations")):
            raise LayerPruneError(
                f"prompt_tokens={config.prompt_tokens} has no effect: column {column!r} is asked whole; leave it out"
            )
        phases.phase(f"loading {arguments.model}")
        model = load_model(arguments.model, arguments.dtype, state.device).to(state.device)
        tokenizer = load_tokenizer(arguments.model)
        if tokenizer.chat_template and not config.as_chat and isinstance(prompts[0][column], str):
            say(phases.console, "prompts are continued as plain text; --as_chat true asks them as a user's messages")
        report = answer_prompts(model, prompts, path, config, tokenizer, partial(phases.done, "answering"))
    cut = f", {report.num_truncated:,} cut at {config.max_new_tokens} tokens" if report.num_truncated else ""
    empty = f", {report.num_empty:,} empty and left out" if report.num_empty else ""
    empty += f", {report.num_too_long:,} prompts too long and left out" if report.num_too_long else ""
    say(phases.out, f"answers: {path}   {report.num_rows:,} rows, {report.num_tokens:,} tokens{cut}{empty}")
    state.destroy_process_group()
