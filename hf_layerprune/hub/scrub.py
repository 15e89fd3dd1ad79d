"""Nothing local leaves: settings are told without the places they name, and what goes out is searched once more."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..data import FILE_BUILDERS
from ..errors import LayerPruneError

DATA_FILES = (*FILE_BUILDERS, ".yaml", ".yml")
PRIVATE_SETTINGS = (
    "output_dir", "logging_dir", "run_name", "report_to", "resume_from_checkpoint", "project", "trackio_space_id",
    "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision", "push_to_hub",
    "push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token",
)  # fmt: skip
"""Settings that say where a run wrote and reported to, which is nobody else's business."""
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def is_place(text: str) -> bool:
    """Whether `text` names a place on this machine rather than something everybody has."""
    if text.startswith(("/", "~", "./", "../", ".\\", "..\\", "file:")) or PureWindowsPath(text).is_absolute():
        return True
    if not text or "\n" in text or len(text) > 1000:
        return False
    return ("/" in text and text.lower().endswith(DATA_FILES)) or Path(text).exists()


def hub_id(name: str | None) -> str | None:
    """`name` without its revision if it is the id of a repository on the Hub, else `None`."""
    if name is None or is_place(name) or not HUB_ID.fullmatch(name):
        return None
    return name.split("@")[0]


def without_places(value: Any) -> Any:
    """`value` with the last part of every local path in place of the path, in all its lists and objects."""
    if isinstance(value, dict):
        return {key: without_places(item) for key, item in value.items() if key not in PRIVATE_SETTINGS}
    if isinstance(value, (list, tuple)):
        return [without_places(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith("{"):  # adapters' settings are kept as JSON
        try:
            return json.dumps(without_places(json.loads(value)), sort_keys=True)
        except ValueError:
            return value
    return ",".join(_name(part.strip()) if is_place(part.strip()) else part for part in value.split(","))


def _name(place: str) -> str:
    return PureWindowsPath(PurePosixPath(place).name).name


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
        for root in roots:
            if re.search(rf"(?<![\w.:-]){re.escape(root)}(?![\w.-])", text):
                raise LayerPruneError(
                    f"{path.name} holds the local path {root}; take it out of the run's files, then push again"
                )
