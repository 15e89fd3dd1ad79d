"""Tasks by name: presets, YAML files and lm-eval's tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from ..data import ASSETS
from ..errors import LayerPruneError, first_line
from . import kinds  # noqa: F401  its tasks are found among the subclasses of Task
from .lm_eval_task import LmEvalTask, yaml_task_name
from .task import Task, check_names

LM_EVAL = "lm_eval:"


def load_tasks(spec: str) -> list[Task]:
    """The tasks a user names.

    Args:
        spec (`str`):
            `"default"` (perplexity, KL, minimal pairs and copying on text that comes with the package), `"paper"` (the
            seven data sets of https://huggingface.co/papers/2511.05085, from the Hub), a YAML file, `"lm_eval:NAME"`
            for a task of lm-eval or a task's YAML file of its format, or several of these with commas between.
            `"paper:FOLDER"` (or a YAML file's name and a folder) takes every task's rows from `<name>.jsonl` in the
            folder and, if its few-shot examples come from another source and there is such a file, those from
            `<name>.few_shot.jsonl`. The columns are those of the Hub's data set, named in the YAML file.

    Raises:
        [`LayerPruneError`]: if there is no such preset or file, a setting is unknown or wrong, or two tasks have one
            name.
    """
    parts = [spec] if Path(spec).is_file() else [part.strip() for part in spec.split(",") if part.strip()]
    return check_names(task for part in parts for task in _load(part))


def _load(spec: str) -> Iterator[Task]:
    if spec.startswith(LM_EVAL):
        yield LmEvalTask(spec.removeprefix(LM_EVAL))
        return
    path, folder = _file_and_folder(spec)
    if yaml_task_name(path):
        yield LmEvalTask(path)
        return
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LayerPruneError(f"tasks {path} cannot be read as YAML: {first_line(error)}") from error
    if not isinstance(content, list) or not content:
        raise LayerPruneError(f"tasks {path} must be a list of tasks, each with `kind:` and `dataset:`")
    for number, item in enumerate(content, 1):
        try:
            yield _task(item, path.parent, folder)
        except LayerPruneError as error:
            raise LayerPruneError(f"tasks {path}, task {number}: {error}") from None


def _file_and_folder(spec: str) -> tuple[Path, Path | None]:
    """The YAML file that is named, and the folder after it; either may hold a colon, as on Windows."""
    presets = {path.stem: path for path in (ASSETS / "tasks").glob("*.yaml")}
    for end in [len(spec), *(place for place, character in enumerate(spec) if character == ":")]:
        path = presets.get(spec[:end], Path(spec[:end]))
        if path.is_file():
            folder = Path(spec[end + 1 :]) if end < len(spec) else None
            if folder is not None and not folder.is_dir():
                raise LayerPruneError(f"tasks {spec!r}: there is no folder {folder}; put the rows of the tasks there")
            return path, folder
    raise LayerPruneError(
        f"tasks {spec!r} must be a preset ({', '.join(sorted(presets))}), a YAML file or {LM_EVAL}NAME"
    )


def _kinds(base: type[Task] = Task) -> dict[str, type[Task]]:
    """All classes of tasks by their `kind`: those of the package, and those a user has defined."""
    found = {}
    for task in base.__subclasses__():
        found |= {task.kind: task} if "kind" in vars(task) else {}
        found |= _kinds(task)
    return found


def _task(item: Any, home: Path, folder: Path | None) -> Task:
    """One entry of a YAML file as a task; files are looked up in the folder of the YAML file first."""
    known = _kinds()
    kind = item.get("kind") if isinstance(item, Mapping) else item
    if not isinstance(item, Mapping) or not isinstance(kind, str) or kind not in known:
        raise LayerPruneError(f"kind {kind!r} is unknown; write `kind:` with one of {', '.join(known)}")
    settings = {name: value for name, value in item.items() if name != "kind"}
    names = [field.name for field in fields(known[kind])]
    if unknown := [str(name) for name in settings if name not in names]:
        raise LayerPruneError(f"{', '.join(unknown)} unknown for {kind}; choose of {', '.join(names)}")
    if not isinstance(settings.get("dataset"), str):
        raise LayerPruneError(
            f"dataset={settings.get('dataset')!r}; write `dataset:` with a file, a Hub id or lm-eval's name"
        )
    if folder is not None:
        if known[kind] is LmEvalTask:
            raise LayerPruneError(f"lm-eval finds its data itself, not in {folder}; leave out the folder")
        settings = _with_files(settings, folder)
    for name in ("dataset", "few_shot_dataset"):
        if isinstance(settings.get(name), str) and (home / settings[name]).is_file():
            settings[name] = str(home / settings[name])
    return known[kind](**settings)


def _with_files(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings of a task with the files of a folder in place of a data set on the Hub."""
    if not settings.get("name"):
        raise LayerPruneError("a task whose data lies in a folder needs a `name:`, which names its file")
    file, few_shot = (folder / f"{settings['name']}{ending}" for ending in (".jsonl", ".few_shot.jsonl"))
    if not file.is_file():
        raise LayerPruneError(f"{file} is missing; put the rows of {settings['dataset']} there")
    of_the_hub = ("split", "config_name", "few_shot_dataset", "few_shot_split")
    local = {name: value for name, value in settings.items() if name not in of_the_hub} | {"dataset": str(file)}
    return local | ({"few_shot_dataset": str(few_shot)} if few_shot.is_file() else {})
