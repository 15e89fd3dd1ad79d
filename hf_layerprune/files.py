"""Write files and folders so that a reader never sees half of one, even after a kill; read YAML."""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml


def to_json(value: Any) -> str:
    """JSON that every reader accepts: NaN and infinity become null."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), indent=1) + "\n"


class _Loader(yaml.SafeLoader):
    """Reads 1e-5 as a number, as YAML 1.2 and JSON do; in YAML 1.1 it is text unless it has a point and a sign."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), [*"-+0123456789"]
)


def load_yaml(text: str) -> Any:
    """What a user wrote in YAML."""
    return yaml.load(text, _Loader)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)  # a full disk names none
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Wait until every file in a folder is on disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def replace_folder(source: Path, target: Path) -> None:
    """Put the finished folder `source` in the place of `target`; its files are on disk before it is seen there.

    These are two moves. After a kill between them there is no `target`: `source` is where it was, and the replaced
    folder is next to the target, its name ending in `.old`. Do it again.
    """
    sync_folder(source)
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    source.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def round_folder(folder: Path, number: int) -> Path:
    """Folder of round `number` (from 1) in a run: its student."""
    return folder / "rounds" / f"{number:02d}"
