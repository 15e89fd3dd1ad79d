"""Tasks by name: the presets, YAML files and lm-eval's tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from ..data import ASSETS
from ..errors import LayerPruneError, first_line
from .choices import MinimalPairsTask, MultipleChoiceTask
from .evaluation import check_names
from .generation import CopyTask, GenerationTask
from .lm_eval_task import LmEvalTask, yaml_task_name
from .task import Task
from .text import KLTask, PerplexityTask

KINDS: dict[str, type[Task]] = {
    task.kind: task
    for task in (MultipleChoiceTask, MinimalPairsTask, PerplexityTask, KLTask, GenerationTask, CopyTask)
}
PRESETS = ("default", "paper")
LM_EVAL = "lm_eval:"
FILE_SETTINGS = ("split", "config_name", "few_shot_dataset", "few_shot_split")
"""What says where on the Hub rows lie; a local file in its place knows nothing of it."""


def load_tasks(spec: str) -> list[Task]:
    """The tasks a user names.

    Args:
        spec (`str`):
            `"default"` (perplexity, KL, minimal pairs and copying on text that comes with the package), `"paper"` (the
            seven data sets of https://huggingface.co/papers/2511.05085, from the Hub), a YAML file, `"lm_eval:NAME"`
            for a task of lm-eval or a task's YAML file of its format, or several of these with commas between.
            `"paper:FOLDER"` (or a YAML file's name and a folder) takes every task's rows from `<name>.jsonl` in the
            folder and, where it has few-shot examples of another source and there is such a file, those from
            `<name>.few_shot.jsonl`. The columns are those of the Hub's data set, named in the YAML file.

    Raises:
        [`LayerPruneError`]: if there is no such preset or file, a setting is unknown or wrong, or two tasks have one
            name.
    """
    parts = [spec] if Path(spec).is_file() else [part.strip() for part in spec.split(",") if part.strip()]
    tasks = [task for part in parts for task in _load(part)]
    check_names(tasks)
    return tasks


def _load(spec: str) -> list[Task]:
    if spec.startswith(LM_EVAL):
        return [LmEvalTask(spec.removeprefix(LM_EVAL))]
    folder = None
    if ":" in spec and not Path(spec).is_file():
        spec, _, place = spec.rpartition(":")
        folder = Path(place)
        if not folder.is_dir():
            raise LayerPruneError(
                f"tasks '{spec}:{place}': there is no folder {place}; put the rows of the tasks there"
            )
    path = ASSETS / "tasks" / f"{spec}.yaml" if spec in PRESETS else Path(spec)
    if not path.is_file():
        raise LayerPruneError(
            f"tasks {spec!r}: no preset ({', '.join(PRESETS)}), no YAML file and no {LM_EVAL}NAME; name one of these"
        )
    if yaml_task_name(path):
        return [LmEvalTask(str(path))]
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LayerPruneError(f"tasks {path} is no YAML: {first_line(error)}") from error
    if not isinstance(content, list) or not content:
        raise LayerPruneError(f"tasks {path} must be a list of tasks, each with `kind:` and `dataset:`")
    return [
        _from_settings(item, f"tasks {path}, task {number}", path, folder) for number, item in enumerate(content, 1)
    ]


def _from_settings(item: Any, where: str, path: Path, folder: Path | None) -> Task:
    """One entry of a YAML file as a task."""
    if not isinstance(item, Mapping) or item.get("kind") not in KINDS:
        kind = item.get("kind") if isinstance(item, Mapping) else item
        raise LayerPruneError(f"{where}: kind {kind!r} is unknown; write `kind:` with one of {', '.join(KINDS)}")
    settings = {name: value for name, value in item.items() if name != "kind"}
    task = KINDS[item["kind"]]
    known = [field.name for field in fields(task)]
    unknown = [str(name) for name in settings if name not in known]
    if unknown:
        raise LayerPruneError(
            f"{where}: {', '.join(unknown)} unknown for {item['kind']}; choose of {', '.join(known)}"
        )
    if not isinstance(settings.get("dataset"), str):
        raise LayerPruneError(
            f"{where}: dataset={settings.get('dataset')!r}; write `dataset:` with a file or a Hub id"
        )
    if folder is not None:
        settings = _local(settings, where, folder)
    for name in ("dataset", "few_shot_dataset"):  # a file beside the YAML file
        if isinstance(settings.get(name), str) and (path.parent / settings[name]).is_file():
            settings[name] = str(path.parent / settings[name])
    try:
        return task(**settings)
    except LayerPruneError as error:
        raise LayerPruneError(f"{where}: {error}") from None


def _local(settings: dict[str, Any], where: str, folder: Path) -> dict[str, Any]:
    """The settings with the data in a folder instead of on the Hub."""
    if not settings.get("name"):
        raise LayerPruneError(f"{where}: a task whose data lies in a folder needs a `name:`, which names its file")
    file = folder / f"{settings['name']}.jsonl"
    if not file.is_file():
        raise LayerPruneError(f"{where}: {file} is missing; put the rows of {settings['dataset']} there")
    local = {name: value for name, value in settings.items() if name not in FILE_SETTINGS} | {"dataset": str(file)}
    shown = folder / f"{settings['name']}.few_shot.jsonl"
    if shown.is_file():
        local["few_shot_dataset"] = str(shown)
    return local
