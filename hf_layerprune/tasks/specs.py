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
    for task in (MultipleChoiceTask, MinimalPairsTask, PerplexityTask, KLTask, GenerationTask, CopyTask, LmEvalTask)
}
PRESETS = ("default", "paper")
LM_EVAL = "lm_eval:"
FILE_SETTINGS = ("split", "config_name", "few_shot_dataset", "few_shot_split")
"""What says where on the Hub rows lie; a local file in its place knows nothing of it."""


def register_task(task: type[Task]) -> None:
    """Make a kind of task of your own: `kind:` with its `kind` then works in YAML files.

    Args:
        task (`type`): a dataclass that is a [`Task`], with a `kind` of its own.

    Raises:
        [`LayerPruneError`]: if there is another kind of that name.
    """
    if KINDS.setdefault(task.kind, task) is not task:
        raise LayerPruneError(f"there is a kind of task {task.kind!r} already; choose another `kind`")


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
    return check_names(task for part in parts for task in _load(part))


def _load(spec: str) -> list[Task]:
    if spec.startswith(LM_EVAL):
        return [LmEvalTask(spec.removeprefix(LM_EVAL))]
    path, folder = _file_and_folder(spec)
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


def _file_and_folder(spec: str) -> tuple[Path, Path | None]:
    """The YAML file that is named, and the folder behind it; either may hold a colon, as on Windows."""
    ends = [place for place, character in enumerate(spec) if character == ":"]
    for end in [len(spec), *ends]:
        name = spec[:end]
        path = ASSETS / "tasks" / f"{name}.yaml" if name in PRESETS else Path(name)
        if path.is_file():
            folder = Path(spec[end + 1 :]) if end < len(spec) else None
            if folder is not None and not folder.is_dir():
                raise LayerPruneError(f"tasks {spec!r}: there is no folder {folder}; put the rows of the tasks there")
            return path, folder
    raise LayerPruneError(
        f"tasks {spec!r}: no preset ({', '.join(PRESETS)}), no YAML file and no {LM_EVAL}NAME; name one of these"
    )


def _from_settings(item: Any, where: str, path: Path, folder: Path | None) -> Task:
    """One entry of a YAML file as a task."""
    kind = item.get("kind") if isinstance(item, Mapping) else item
    if not isinstance(item, Mapping) or not isinstance(kind, str) or kind not in KINDS:
        raise LayerPruneError(f"{where}: kind {kind!r} is unknown; write `kind:` with one of {', '.join(KINDS)}")
    settings = {name: value for name, value in item.items() if name != "kind"}
    task = KINDS[kind]
    known = [field.name for field in fields(task)]
    unknown = [str(name) for name in settings if name not in known]
    if unknown:
        raise LayerPruneError(f"{where}: {', '.join(unknown)} unknown for {kind}; choose of {', '.join(known)}")
    if not isinstance(settings.get("dataset"), str):
        raise LayerPruneError(
            f"{where}: dataset={settings.get('dataset')!r}; write `dataset:` with a file, a Hub id or lm-eval's name"
        )
    if folder is not None:
        if task is LmEvalTask:
            raise LayerPruneError(f"{where}: lm-eval finds its data itself, not in {folder}; leave out the folder")
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
