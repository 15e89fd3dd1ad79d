"""Runs: the output folder that `compress`, `parallelize` and the trainer leave, and students on the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from traceback import walk_tb
from typing import Any

import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError  # of the HTTP library that the client uses

from ..budget import TARGETS
from ..errors import LayerPruneError, first_line
from ..files import load_yaml, round_folder
from ..loading import load_config, one_revision, resolve
from ..plan import LayerPlan
from ..record import PLAN_FILE, REPORT_FILE, RunRecord, read_plan, read_run
from ..surgery import plan_of
from .paths import public_settings

RECIPE_FILE = "recipe.yaml"


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn an error of the Hub's client into a [`LayerPruneError`] of one line that begins with `what`.

    The client raises plain `ValueError` and `RuntimeError` too; those that come from elsewhere are bugs.
    """
    try:
        yield
    except (OSError, HTTPError, ValueError, RuntimeError) as error:
        modules = (frame.f_globals["__name__"].split(".")[0] for frame, _ in walk_tb(error.__traceback__))
        if not isinstance(error, (OSError, HTTPError)) and "huggingface_hub" not in modules:
            raise
        text = " ".join(re.sub(r"\(Request ID: [^)]*\)", "", str(error)).split())
        raise LayerPruneError(f"{what}: {text or type(error).__name__}") from error


@dataclass(frozen=True)
class Run:
    """A run: its output folder on this machine, or a student on the Hub with what led to it."""

    name: str  # where the student is: a Hub id, or a folder
    folder: Path  # of its report
    record: RunRecord
    settings: dict[str, Any] = field(default_factory=dict)  # its recipe; empty if started in Python or on the Hub
    revision: str | None = None  # the commit on the Hub that everything is from

    @property
    def plan(self) -> LayerPlan:
        """Which layers of the teacher the last student holds."""
        return self.record.rounds[-1].plan

    @property
    def is_finished(self) -> bool:
        """Whether the last round is the end of the run, which writes its plan then."""
        path = self.folder / PLAN_FILE
        return path.is_file() and read_plan(path) == self.plan

    def student(self, number: int) -> Path:
        """The folder of a round's student, which must be there."""
        plan = self.record.rounds[number - 1].plan
        for folder in (round_folder(self.folder, number), self.folder / "model", self.folder):
            is_there = any(folder.glob("*.safetensors")) and (folder / "config.json").is_file()
            if is_there and plan_of(load_config(str(folder))) == plan:
                return folder
        raise LayerPruneError(f"{self.folder} no longer holds the student of round {number}; choose another round")

    def started_from(self, model: str) -> Run:
        """The run with the Hub id `model` instead of the name on this disk, in its recipe and its report."""
        record, of_run = self.record, self.record.settings
        searched = record.verb == "parallelize"  # of which `of_run` holds names, of `compress` fingerprints
        if searched or of_run.get("model") == of_run.get("teacher"):
            record = replace(record, teacher=replace(record.teacher, name=model))
        if searched:
            record = replace(record, settings=of_run | {"model": model})
        return replace(self, record=record, settings=self.settings and self.settings | {"model": model})

    def public_record(self, number: int) -> RunRecord:
        """The record as it was after a round, with the settings that may be pushed."""
        return replace(self.record.until(number), settings=public_settings(self.record.settings))

    def recipe(self, number: int) -> dict[str, Any]:
        """The settings that lead to a round's student, of those that may be pushed."""
        settings, last = public_settings(self.settings), self.record.rounds[number - 1]
        if number < len(self.record.rounds) or not self.is_finished:
            settings |= dict.fromkeys(TARGETS.values()) | {"target_num_layers": last.depth}
        return settings


def load_run(name: str | Path, revision: str | None = None, token: str | None = None) -> Run:
    """Read a run: that of a pushed student, or one on this machine. Its weights are not read.

    Args:
        name (`str` or `Path`): Hub id, maybe with `@revision`; the output folder of a run, or `model` in it; or a
            downloaded student.
        revision (`str`, *optional*): branch, tag (such as `28-layers`) or commit on the Hub; main by default.
        token (`str`, *optional*): for a private repository; by default `HF_TOKEN` or the stored login.

    Raises:
        [`LayerPruneError`]: if the run does not exist, has no finished round, or has an invalid report.
    """
    folder, commit, settings = Path(name), None, {}
    folder = run_of(folder) or folder
    if folder.is_dir():
        settings = _read_recipe(folder / RECIPE_FILE)
    else:
        with hub_errors(f"reading {name}"):
            wanted, source = one_revision(str(name), revision), resolve(str(name))
            folder = Path(snapshot_download(source, revision=wanted, allow_patterns=REPORT_FILE, token=token))
        commit = folder.name  # the cache keeps a folder per commit
    if not (folder / REPORT_FILE).is_file():
        raise LayerPruneError(f"{name} holds no finished run: it has no {REPORT_FILE}; name a run's output folder")
    record = read_run(folder / REPORT_FILE, f"{name}/{REPORT_FILE}")
    if record.teacher is None or not record.rounds:
        raise LayerPruneError(f"{name} holds a run without a finished round; resume it")
    return Run(resolve(str(name)), folder, record, settings, commit)


def run_of(folder: Path) -> Path | None:
    """The folder of a run on this machine, from its own name or that of `model` in it."""
    folders = (folder, folder.parent) if folder.name == "model" else (folder,)
    return next((one for one in folders if (one / REPORT_FILE).is_file()), None)


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(load_yaml(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise LayerPruneError(f"{path} is not a list of settings: {first_line(error)}") from None
