"""Runs: the output folder that `compress`, `parallelize` and the trainer leave, and students on the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError  # of the HTTP library that the client uses
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..budget import TARGETS
from ..errors import LayerPruneError, first_line
from ..files import round_folder
from ..loading import load_model, load_tokenizer, one_revision, resolve
from ..plan import LayerPlan
from ..record import REPORT_FILE, RunRecord
from ..record_reader import read_report
from ..surgery import plan_of
from .paths import INPUTS, without_local_paths

RECIPE_FILE = "recipe.yaml"
FINGERPRINTS = ("target", "plan", "model", "teacher", "peft", "save_dtype", "num_processes")
"""What a report keeps next to the settings of the run, together with every entry that ends in `_text`."""


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn an error of the Hub's client into a [`LayerPruneError`] of one line that begins with `what`."""
    try:
        yield
    except LayerPruneError:
        raise
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        text = " ".join(re.sub(r"\(Request ID: [^)]*\)", "", str(error)).split())
        raise LayerPruneError(f"{what}: {text or type(error).__name__}") from error


@dataclass(frozen=True)
class Run:
    """A run: its output folder on this machine, or a student on the Hub with what led to it.

    Attributes:
        name (`str`): where the student is: a Hub id, or a folder.
        folder (`Path`): the folder of its report.
        record ([`RunRecord`]): what it measured.
        revision (`str`, *optional*): the commit on the Hub that everything is from.
        token (`str`, *optional*): reads a private repository.
    """

    name: str
    folder: Path
    record: RunRecord
    revision: str | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def report(self) -> dict[str, Any]:
        """The content of `report.json`."""
        return self.record.to_dict()

    @property
    def plan(self) -> LayerPlan:
        """Which layers of the teacher the last student holds."""
        return self.record.rounds[-1].plan

    def load_model(self, **kwargs: Any) -> PreTrainedModel:
        """Load the last student; options of [`load_model`]. No code next to the weights is run."""
        model = load_model(self.name, **({"revision": self.revision, "token": self.token} | kwargs))
        if plan_of(model) != self.plan:
            raise LayerPruneError(f"{self.name}: {REPORT_FILE} and config.json hold different plans; push it again")
        return model

    def load_tokenizer(self, **kwargs: Any) -> PreTrainedTokenizerBase:
        """Load the student's tokenizer; options of [`load_tokenizer`]."""
        return load_tokenizer(self.name, **({"revision": self.revision, "token": self.token} | kwargs))

    def number_of(self, chosen: int | str | None) -> int:
        """The round a user names, such as `5` or `"05"`; the last by default, if the run is finished."""
        last = len(self.record.rounds)
        if chosen is None and recorded_plan(self.folder / "model") != self.plan:
            raise LayerPruneError(f"{self.folder} holds a run that is not finished; resume it, or name a round")
        if chosen is not None and not (str(chosen).isdecimal() and 1 <= int(chosen) <= last):
            raise LayerPruneError(f"round={chosen} but {self.folder} has rounds 1..{last}; choose one of them")
        return last if chosen is None else int(chosen)

    def student(self, number: int) -> Path:
        """The folder of a round's student, which must be there."""
        plan = self.record.rounds[number - 1].plan
        for folder in (round_folder(self.folder, number), self.folder / "model"):
            if recorded_plan(folder) == plan and any(folder.glob("*.safetensors")):
                return folder
        kept = "parallelize keeps only the last student" if self.verb == "parallelize" else "it was deleted"
        raise LayerPruneError(f"{self.folder} holds no student of round {number} ({kept}); choose another round")

    def public_record(self, number: int) -> RunRecord:
        """The record as it was after a round, without local paths."""
        run = self.record.until(number)
        teacher = replace(run.teacher, name=without_local_paths(run.teacher.name))
        return replace(run, teacher=teacher, settings=without_local_paths(run.settings))

    @cached_property
    def verb(self) -> str:
        """The command that made the run."""
        return "parallelize" if "search" in self.record.settings else "compress"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings of the run: its recipe or, if it was started in Python, what its report says of them."""
        path = self.folder / RECIPE_FILE
        if path.is_file():
            try:
                return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError, yaml.YAMLError) as error:
                raise LayerPruneError(f"{path} is not a list of settings: {first_line(error)}") from None
        settings, teacher = self.record.settings, self.record.teacher
        if self.verb == "parallelize":
            return settings
        model = {"model": teacher.name} if self.record.start.depth == teacher.depth else {}
        dtype = str(settings.get("dtype", "float32")).removeprefix("torch.")
        given = {key: settings[key] for key in settings if key not in FINGERPRINTS and not key.endswith("_text")}
        return model | given | {"dtype": dtype}

    @cached_property
    def names_its_text(self) -> bool:
        """Whether the settings name the text of the run, which those of a run in Python do not."""
        return (self.folder / RECIPE_FILE).is_file() or "dataset" in self.settings

    def recipe(self, number: int) -> dict[str, Any]:
        """The settings that lead to a round's student, without local paths."""
        settings, cut = without_local_paths(self.settings), number < len(self.record.rounds)
        if self.verb == "compress" and (cut or all(settings.get(target) is None for target in TARGETS.values())):
            settings |= dict.fromkeys(TARGETS.values()) | {"target_num_layers": self.record.rounds[number - 1].depth}
        return settings

    @property
    def local_inputs(self) -> list[str]:
        """Names of the author's files and folders that the recipe needs."""
        public = without_local_paths(self.settings)
        return list(dict.fromkeys(public[key] for key in INPUTS if self.settings.get(key) != public.get(key)))


def recorded_plan(folder: Path) -> LayerPlan | None:
    """Return the plan in the `config.json` of a saved student, or `None` if the folder holds none."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        return LayerPlan.from_dict(json.loads(path.read_text(encoding="utf-8")).get("layer_plan"))
    except (ValueError, AttributeError) as error:  # a LayerPruneError is a ValueError
        raise LayerPruneError(f"{path} is not the config of a student: {error}") from None


def load_run(name: str | Path, revision: str | None = None, token: str | None = None) -> Run:
    """Read a run: that of a pushed student, or one on this machine. Its weights are not read.

    Args:
        name (`str` or `Path`): Hub id, maybe with `@revision`; the output folder of a run; or a downloaded student.
        revision (`str`, *optional*): branch, tag (such as `28-layers`) or commit on the Hub; main by default.
        token (`str`, *optional*): for a private repository; by default `HF_TOKEN` or the stored login.

    Raises:
        [`LayerPruneError`]: if the run does not exist, has no finished round, or has an invalid report.
    """
    folder, commit = Path(name), None
    if not folder.is_dir():
        with hub_errors(f"reading {name}"):
            wanted, source = one_revision(str(name), revision), resolve(str(name))
            folder = Path(snapshot_download(source, revision=wanted, allow_patterns=REPORT_FILE, token=token))
        commit = folder.name  # the cache keeps a folder per commit
    if not (folder / REPORT_FILE).is_file():
        raise LayerPruneError(f"{name} holds no finished run: it has no {REPORT_FILE}; name a run's output folder")
    record = read_report(folder / REPORT_FILE, f"{name}/{REPORT_FILE}")
    if not record.rounds:
        raise LayerPruneError(f"{name} holds a run without a finished round; resume it")
    return Run(resolve(str(name)), folder, record, commit, token)
