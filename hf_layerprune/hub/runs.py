"""Runs: the output folder that `compress`, `parallelize` and the trainer leave, and students on the Hub."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError  # of the HTTP library that the client uses
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..budget import TARGETS
from ..edits import Edit
from ..errors import LayerPruneError, first_line
from ..files import round_folder
from ..loading import load_model, load_tokenizer, one_revision, resolve
from ..plan import LayerPlan
from ..surgery import plan_of
from .paths import INPUTS, without_local_paths

PLAN_FILE, REPORT_FILE, RECIPE_FILE = "plan.json", "report.json", "recipe.yaml"
FINGERPRINTS = ("target", "plan", "model", "teacher", "peft", "save_dtype", "num_processes")
"""What a report keeps next to the settings of the run, together with every entry that ends in `_text`."""
NUMBER = (int, float)
KINDS = {NUMBER: "a number", int: "a whole number", str: "a text", list: "a list", dict: "an object"}
REPORT = {"teacher": dict, "rounds": list, "settings": dict, "environment": dict}
MEASURED = {"num_layers": int, "num_parameters": int, "loss": NUMBER, "perplexity": NUMBER}
TEACHER = MEASURED | {"num_tokens": int, "name": str, "evaluated_on": str}
ROUND = MEASURED | {"kl": NUMBER, "agreement": NUMBER, "criterion": str, "edits": list, "scores": dict}
OPTIONAL = {"architecture": str, "all_scores": list} | dict.fromkeys(
    (
        "loss_unhealed", "perplexity_unhealed", "kl_unhealed", "loss_before_healing", "perplexity_before_healing",
        "kl_before_healing", "prefill_tokens_per_second", "prefill_ratio", "decode_tokens_per_second", "decode_ratio",
        "time_to_first_token", "peak_memory_bytes", "kv_bytes_per_token", "batch_size", "prompt_tokens", "new_tokens",
    ),
    NUMBER,
)  # fmt: skip
"""What the entries of a report must be; those in `OPTIONAL` may be missing."""


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


def read_plan(path: str | Path) -> LayerPlan:
    """Read the plan in a JSON file."""
    return _read(Path(path), str(path), LayerPlan.from_json)


def _read(path: Path, name: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except LayerPruneError as error:
        raise LayerPruneError(f"{name}: {error}") from None
    except OSError as error:
        raise LayerPruneError(f"{name}: the file cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise LayerPruneError(f"{name} is not valid JSON: {error}") from None


def _parse_report(text: str) -> dict[str, Any]:
    report = json.loads(text, parse_int=_finite, parse_float=_finite, parse_constant=_finite)
    _check("the report", report, REPORT)
    _check("the teacher", report["teacher"], TEACHER)
    _check("the environment", report["environment"], {"hardware": str})
    for number, record in enumerate(report["rounds"], 1):
        _check(f"round {number}", record, ROUND)
        plan = LayerPlan.from_dict(record.get("plan"))
        if (record.get("round"), record["num_layers"]) != (number, plan.depth):
            raise LayerPruneError(f"round {number} has another number, or a plan of another depth")
        for scores in ({"values": record["scores"]}, *(record.get("all_scores") or ())):
            _check(f"a scoring of round {number}", scores, {"values": dict})
            measured = {label: NUMBER for label, cost in scores["values"].items() if cost is not None}
            _check(f"a scoring of round {number}", scores["values"], measured)
        for label in (*record["edits"], *record["scores"]):
            Edit.from_label(str(label))
    return report


def _finite(text: str) -> int | float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.20} is not a finite number")
    return int(text) if text.removeprefix("-").isdigit() else value


def _check(what: str, record: Any, kinds: dict[str, Any]) -> None:
    if not isinstance(record, dict):
        raise LayerPruneError(f"{what} must be an object")
    optional = {key: kind for key, kind in OPTIONAL.items() if record.get(key) is not None}
    for key, kind in (kinds | optional).items():
        if not isinstance(record.get(key), kind):
            raise LayerPruneError(f"{what} has {key}={record.get(key)!r:.200}, which is not {KINDS[kind]}")


@dataclass(frozen=True)
class Run:
    """A run: its output folder on this machine, or a student on the Hub with what led to it.

    Attributes:
        name (`str`): where the student is: a Hub id, or a folder.
        folder (`Path`): the folder of its report.
        report (`dict`): what it measured: `teacher`, `rounds`, `settings`, `environment`.
        revision (`str`, *optional*): the commit on the Hub that everything is from.
        token (`str`, *optional*): reads a private repository.
    """

    name: str
    folder: Path
    report: dict[str, Any]
    revision: str | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def plan(self) -> LayerPlan:
        """Which layers of the teacher the last student holds."""
        return self.plan_after(len(self.report["rounds"]))

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
        last = len(self.report["rounds"])
        if chosen is None and recorded_plan(self.folder / "model") != self.plan:
            raise LayerPruneError(f"{self.folder} holds a run that is not finished; resume it, or name a round")
        if chosen is not None and not (str(chosen).isdecimal() and 1 <= int(chosen) <= last):
            raise LayerPruneError(f"round={chosen} but {self.folder} has rounds 1..{last}; choose one of them")
        return last if chosen is None else int(chosen)

    def plan_after(self, number: int) -> LayerPlan:
        """The plan of a round's student."""
        return LayerPlan.from_dict(self.report["rounds"][number - 1]["plan"])

    def student(self, number: int) -> Path:
        """The folder of a round's student, which must be there."""
        for folder in (round_folder(self.folder, number), self.folder / "model"):
            if recorded_plan(folder) == self.plan_after(number) and any(folder.glob("*.safetensors")):
                return folder
        kept = "parallelize keeps only the last student" if self.verb == "parallelize" else "it was deleted"
        raise LayerPruneError(f"{self.folder} holds no student of round {number} ({kept}); choose another round")

    def report_until(self, number: int) -> dict[str, Any]:
        """The report as it was after a round, without local paths."""
        public = {key: without_local_paths(self.report[key]) for key in ("teacher", "settings")}
        return self.report | public | {"rounds": self.report["rounds"][:number]}

    @cached_property
    def verb(self) -> str:
        """The command that made the run."""
        return "parallelize" if "search" in self.report["settings"] else "compress"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings of the run: its recipe or, if it was started in Python, what its report says of them."""
        path = self.folder / RECIPE_FILE
        if path.is_file():
            try:
                return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError, yaml.YAMLError) as error:
                raise LayerPruneError(f"{path} is not a list of settings: {first_line(error)}") from None
        settings, teacher = self.report["settings"], self.report["teacher"]
        if self.verb == "parallelize":
            return settings
        model = {"model": teacher["name"]} if start_depth(self.report) == teacher["num_layers"] else {}
        dtype = str(settings.get("dtype", "float32")).removeprefix("torch.")
        given = {key: settings[key] for key in settings if key not in FINGERPRINTS and not key.endswith("_text")}
        return model | given | {"dtype": dtype}

    @cached_property
    def names_its_text(self) -> bool:
        """Whether the settings name the text of the run, which those of a run in Python do not."""
        return (self.folder / RECIPE_FILE).is_file() or "dataset" in self.settings

    def recipe(self, number: int) -> dict[str, Any]:
        """The settings that lead to a round's student, without local paths."""
        settings, cut = without_local_paths(self.settings), number < len(self.report["rounds"])
        if self.verb == "compress" and (cut or all(settings.get(target) is None for target in TARGETS.values())):
            settings |= dict.fromkeys(TARGETS.values()) | {"target_num_layers": self.plan_after(number).depth}
        return settings

    @property
    def local_inputs(self) -> list[str]:
        """Names of the author's files and folders that the recipe needs."""
        public = without_local_paths(self.settings)
        return list(dict.fromkeys(public[key] for key in INPUTS if self.settings.get(key) != public.get(key)))


def start_depth(report: dict[str, Any]) -> int:
    """The depth of the model the run started from, which may be a student of the teacher."""
    plan = report["settings"].get("plan")
    return len(plan["blocks"]) if isinstance(plan, dict) and "blocks" in plan else report["teacher"]["num_layers"]


def recorded_plan(folder: Path) -> LayerPlan | None:
    """The plan in the `config.json` of a saved student; `None` where there is no student."""
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
        [`LayerPruneError`]: if there is no such run, none of its rounds is finished, or its report is not valid.
    """
    folder, commit = Path(name), None
    if not folder.is_dir():
        with hub_errors(f"reading {name}"):
            wanted, source = one_revision(str(name), revision), resolve(str(name))
            folder = Path(snapshot_download(source, revision=wanted, allow_patterns=REPORT_FILE, token=token))
        commit = folder.name  # the cache keeps a folder per commit
    if not (folder / REPORT_FILE).is_file():
        raise LayerPruneError(f"{name} holds no finished run: it has no {REPORT_FILE}; name a run's output folder")
    report = _read(folder / REPORT_FILE, f"{name}/{REPORT_FILE}", _parse_report)
    if not report["rounds"]:
        raise LayerPruneError(f"{name} holds a run without a finished round; resume it")
    return Run(resolve(str(name)), folder, report, commit, token)
