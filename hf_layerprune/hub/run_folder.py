"""The output folder of a run, as `compress`, `parallelize` and the trainer leave it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ..budget import TARGETS
from ..errors import LayerPruneError, first_line
from ..files import round_folder
from ..plan import LayerPlan
from .reading import REPORT_FILE, read_report
from .scrub import INPUTS, hub_id, names_in, without_places

RECIPE_FILE = "recipe.yaml"
FINGERPRINTS = (
    "target", "plan", "model", "teacher", "healing_text", "calibration_text", "repair_text", "evaluation_text",
    "tasks_text", "peft", "save_dtype", "num_processes",
)  # fmt: skip
"""What the report of a run notes beside the settings it was given."""


@dataclass(frozen=True)
class RunFolder:
    """A run on disk.

    Attributes:
        folder (`Path`): its output folder.
        report (`dict`): what `report.json` says.
    """

    folder: Path
    report: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> RunFolder:
        """Read a run's report.

        Raises:
            [`LayerPruneError`]: if `folder` holds no run, or none of its rounds is finished.
        """
        folder = Path(folder)
        if not (folder / REPORT_FILE).is_file():
            raise LayerPruneError(
                f"{folder} holds no finished run: it has no {REPORT_FILE}; give the output_dir of a run"
            )
        report = read_report(folder / REPORT_FILE)
        if not report["rounds"]:
            raise LayerPruneError(f"{folder} holds a run without a finished round; resume it, then push")
        return cls(folder, report)

    def number_of(self, chosen: int | str | None) -> int:
        """The round a user names, such as `5` or `"05"`; the last by default.

        Raises:
            [`LayerPruneError`]: if there is no such round, or by default if the run goes on behind its last student.
        """
        last = len(self.report["rounds"])
        if chosen is None:
            if recorded_plan(self.folder / "model") != self.plan(last):
                raise LayerPruneError(
                    f"{self.folder} holds a run that is not finished: its model/ is not the student of round {last}, "
                    "the last one; resume it, or name a finished round"
                )
            return last
        if not str(chosen).isdecimal() or not 1 <= int(chosen) <= last:
            raise LayerPruneError(f"round={chosen} but {self.folder} has rounds 1..{last}; choose one of them")
        return int(chosen)

    def plan(self, number: int) -> LayerPlan:
        """The plan of a round's student."""
        return LayerPlan.from_dict(self.report["rounds"][number - 1]["plan"])

    def student(self, number: int) -> Path:
        """The folder of a round's student.

        Raises:
            [`LayerPruneError`]: if it is not there.
        """
        for folder in (round_folder(self.folder, number), self.folder / "model"):
            if recorded_plan(folder) == self.plan(number) and any(folder.glob("*.safetensors")):
                return folder
        if self.verb == "parallelize" and number < len(self.report["rounds"]):
            raise LayerPruneError(
                f"{self.folder} never held the student of round {number}: parallelize keeps only the last; push that"
            )
        raise LayerPruneError(f"{self.folder} no longer holds the student of round {number}; choose another round")

    def report_until(self, number: int) -> dict[str, Any]:
        """The report as it stood behind a round, without local places."""
        report = self.report | {"rounds": self.report["rounds"][:number]}
        teacher = report["teacher"] | {"name": without_places(report["teacher"].get("name", "model"))}
        return report | {"teacher": teacher, "settings": without_places(report["settings"])}

    @cached_property
    def verb(self) -> str:
        """The command that made the run."""
        return "parallelize" if "search" in self.report["settings"] else "compress"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings of the run: its recipe, or what its report notes of them."""
        path = self.folder / RECIPE_FILE
        if path.is_file():
            try:
                settings = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (ValueError, yaml.YAMLError) as error:
                raise LayerPruneError(f"{path} is not YAML: {first_line(error)}") from None
            if not isinstance(settings, dict):
                raise LayerPruneError(f"{path} is no list of settings")
            return settings
        settings = dict(self.report["settings"])
        if self.verb == "parallelize":
            return settings
        dtype = str(settings.get("dtype", "float32")).removeprefix("torch.")
        settings = {key: value for key, value in settings.items() if key not in FINGERPRINTS}
        teacher = self.report["teacher"]
        model = {"model": teacher["name"]} if start_depth(self.report) == teacher["num_layers"] else {}
        return model | settings | {"dtype": dtype}

    @cached_property
    def names_its_text(self) -> bool:
        """Whether the settings say on which text the run worked; of a run in Python they do not."""
        return (self.folder / RECIPE_FILE).is_file() or "dataset" in self.settings

    def recipe(self, number: int) -> dict[str, Any]:
        """The settings that lead to a round's student, without local places."""
        settings = without_places(self.settings)
        if self.verb == "compress" and (
            number < len(self.report["rounds"]) or all(settings.get(target) is None for target in TARGETS.values())
        ):
            settings |= dict.fromkeys(TARGETS.values()) | {"target_num_layers": self.plan(number).depth}
        return settings

    @property
    def local_inputs(self) -> list[str]:
        """Names of the files and folders of the author's that the recipe needs."""
        named = [name.strip() for key in INPUTS for name in names_in(self.settings, key)]
        told = {name: without_places({"model": name})["model"] for name in named}
        return list(dict.fromkeys(short for name, short in told.items() if short != name))

    @property
    def base_model(self) -> str | None:
        """The model the run started from: a Hub id, perhaps with a revision, or the folder it lay in."""
        return self.settings.get("model")

    @property
    def datasets(self) -> list[str]:
        """Hub ids of the data sets the run worked on."""
        named = (hub_id(self.settings.get(key)) for key in ("dataset", "eval_dataset", "calibration_dataset"))
        return list(dict.fromkeys(name for name in named if name is not None))

    @property
    def evaluation_dataset(self) -> str | None:
        """Hub id of the data set the quality was measured on, if it is on the Hub."""
        return hub_id(self.settings.get("eval_dataset") or self.settings.get("dataset"))


def start_depth(report: dict[str, Any]) -> int:
    """How deep the model was that the run started from, which may be a student of the teacher's."""
    plan = report["settings"].get("plan")
    recorded = plan.get("blocks") if isinstance(plan, dict) else None
    return len(recorded) if isinstance(recorded, list) else report["teacher"]["num_layers"]


def recorded_plan(folder: Path) -> LayerPlan | None:
    """The plan in the `config.json` of a saved student; `None` where there is no student."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return LayerPlan.from_dict(config.get("layer_plan"))
    except LayerPruneError as error:
        raise LayerPruneError(f"{path}: {error}") from None
    except (ValueError, AttributeError) as error:
        raise LayerPruneError(f"{path} is no model's config: {error}") from None
