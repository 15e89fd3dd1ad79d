"""Importing this makes tiny runs quick: what is the same every time is done once, and nothing waits for the disk."""

import os
from functools import cache
from pathlib import Path

import jinja2
from accelerate.utils import imports

from hf_layerprune import report
from hf_layerprune.record import RunRecord
from hf_layerprune.trainer import run as trainer_run

PLOTS = ("quality.png", "layers.png")
draw_plots, drawn = report.save_run_plots, {}
compile_template, compiled = jinja2.Environment.compile, {}


def draw_once(folder: Path, run: RunRecord) -> None:
    """The plots of another run of the same kind will do."""
    kind = (len(run.rounds), run.is_healed, *sorted({edit.kind for edit in run.edits}))
    if kind not in drawn:
        draw_plots(folder, run)
        drawn[kind] = {name: (folder / name).read_bytes() for name in PLOTS}
    for name, content in drawn[kind].items():
        (folder / name).write_bytes(content)


def compile_once(environment: jinja2.Environment, source: str, *names: object) -> object:
    """Each environment would compile the cards and reports anew."""
    options = ("trim_blocks", "lstrip_blocks", "keep_trailing_newline", "autoescape")
    key = (type(environment), *(getattr(environment, name) for name in options), *environment.extensions)
    if (*key, source, names) not in compiled:
        compiled[(*key, source, names)] = compile_template(environment, source, *names)
    return compiled[(*key, source, names)]


report.save_run_plots = draw_once
jinja2.Environment.compile = compile_once
imports._is_package_available = cache(imports._is_package_available)  # reads metadata of PEFT several times a step
os.fsync = lambda file: None  # only a machine without power loses by it, no process that is killed
SPEED_OF_USERS = (trainer_run.PROMPT_TOKENS, trainer_run.NEW_TOKENS)
trainer_run.PROMPT_TOKENS, trainer_run.NEW_TOKENS, trainer_run.REPEATS = 8, 4, 1
