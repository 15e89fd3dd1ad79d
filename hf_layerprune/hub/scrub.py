"""Nothing local leaves: settings are told without the places they name, and what goes out is searched once more."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..data import FILE_BUILDERS
from ..errors import LayerPruneError
from ..loading import EMBEDDED, is_gguf

INPUTS = ("model", "teacher", "dataset", "eval_dataset", "calibration_dataset", "tasks", "plan")
"""Settings that may name a file or folder of the author's."""
DATA_FILES = (*FILE_BUILDERS, ".yaml", ".yml")
PRIVATE_SETTINGS = (
    "output_dir", "logging_dir", "run_name", "report_to", "resume_from_checkpoint", "project", "trackio_space_id",
    "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision", "push_to_hub",
    "push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token",
)  # fmt: skip
"""Settings that say where a run wrote and reported to, which is nobody else's business."""
VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
"""Files that hold pieces of every text there is, `/app` and `/home` among them."""
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def placed(name: str) -> str:
    """A name as a run writes it down: of what lies on this disk the absolute path. Only here the disk is asked.

    A run is pushed later, perhaps from another folder or another machine, where the same name may be something else.
    """
    own = name == EMBEDDED or name.startswith(EMBEDDED + ":")
    return os.path.abspath(name) if not own and os.path.exists(name) else name


def placed_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that starts here and now, as it writes them down."""
    told = {key: value if isinstance(value := settings.get(key), str) else None for key in INPUTS}
    names = {key: _placed_tasks(value) if key == "tasks" else placed(value) for key, value in told.items() if value}
    return settings | names


def _placed_tasks(spec: str) -> str:
    """Tasks with commas between; each a preset or a file, and perhaps behind a colon the folder of its data."""
    if os.path.isfile(spec):
        return os.path.abspath(spec)
    parts = []
    for part in (part.strip() for part in spec.split(",")):
        name, colon, folder = (part, "", "") if os.path.isfile(part) else part.partition(":")
        name = os.path.abspath(name) if os.path.isfile(name) else name
        parts.append(name + colon + placed(folder))
    return ",".join(parts)


def is_place(text: str) -> bool:
    """Whether `text` names a place on a machine rather than something everybody has."""
    if text.startswith(("/", "~", "./", "../", ".\\", "..\\", "file:")) or PureWindowsPath(text).is_absolute():
        return True
    return "\n" not in text and "/" in text and text.lower().endswith(DATA_FILES)


def hub_id(name: str | None) -> str | None:
    """The repository on the Hub that `name` means, perhaps with a revision or a GGUF file of it; `None` for others."""
    if name is None or is_place(name):
        return None
    if is_gguf(name):  # user/name/file.gguf
        name = "/".join(name.split("/")[:2]) if name.count("/") > 1 else ""
    return name.split("@")[0] if HUB_ID.fullmatch(name) else None


def names_in(settings: dict[str, Any], key: str) -> list[str]:
    """What a setting names, which may be several tasks."""
    value = settings.get(key)
    return [] if not isinstance(value, str) else value.split(",") if key == "tasks" else [value]


def without_places(value: Any) -> Any:
    """`value` with the last part of every local path in place of the path, in all its lists and objects."""
    if isinstance(value, dict):
        told = {key: item for key, item in value.items() if key not in PRIVATE_SETTINGS}
        named = {key: ",".join(map(_without_place, names_in(told, key))) for key in INPUTS if names_in(told, key)}
        return {key: without_places(item) for key, item in told.items()} | named
    if isinstance(value, (list, tuple)):
        return [without_places(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith("{"):  # adapters' settings are kept as JSON
        try:
            return json.dumps(without_places(json.loads(value)), sort_keys=True)
        except ValueError:
            return value
    return value if "\n" in value else ",".join(_without_place(part) for part in value.split(","))


def _without_place(part: str) -> str:
    name, colon, folder = part.strip().partition(":")
    if is_place(part.strip()):
        return PureWindowsPath(PurePosixPath(part.strip()).name).name
    if colon and is_place(folder) and not folder.startswith("//"):  # a task and the folder of its data
        return f"{name}:{_without_place(folder)}"
    return part


def check_nothing_local(folder: Path, places: Iterable[Path], token: str | None) -> None:
    """Raise [`LayerPruneError`] if a text file in `folder` holds one of `places` or a token.

    Args:
        folder (`Path`): what would be uploaded.
        places (`Iterable[Path]`): folders of this machine whose names must not be told.
        token (`str`, *optional*): the token in use; others are known by their form.
    """
    roots = {str(form) for place in places for form in (place.absolute(), place.resolve())}
    roots = {root for root in roots if len(Path(root).parts) > 1}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".png"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if (token and token in text) or TOKEN.search(text):
            raise LayerPruneError(
                f"{path.name} holds an access token; take it out of the run's files, then push again"
            )
        for root in () if path.name in VOCABULARY else roots:
            if re.search(rf"(?<![\w.:-]){re.escape(root)}(?![\w.-])", text):
                raise LayerPruneError(
                    f"{path.name} holds the local path {root}; take it out of the run's files, then push again"
                )
