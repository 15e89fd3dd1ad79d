"""Local paths: a run records them in full, and nothing that is pushed contains one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..errors import LayerPruneError
from ..loading import EMBEDDED, is_gguf
from ..tasks.evaluation import LM_EVAL

INPUTS = ("model", "teacher", "dataset", "eval_dataset", "calibration_dataset", "tasks", "plan")
"""Settings that may name a file or folder of the author's."""
PRIVATE = re.compile(
    "output_dir|logging_dir|run_name|report_to|resume_from_checkpoint|project|trackio_space_id|(hub|push_to_hub)(_.*)?"
)
"""Settings that say where a run wrote and reported to."""
VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
"""Files with words of every text there is, `/app` and `/home` among them."""
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def absolute_if_local(name: str) -> str:
    """Return the absolute path of a file or folder on this disk, and any other name as it is.

    A run records its inputs like this: it may be pushed from another folder, where the same name means something else.
    """
    own = name == EMBEDDED or name.startswith(EMBEDDED + ":")
    return os.path.abspath(name) if not own and os.path.exists(name) else name


def with_absolute_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with the inputs on this disk as absolute paths."""
    named = {key: settings[key] for key in INPUTS if isinstance(settings.get(key), str)}
    absolute = {key: absolute_if_local(name) for key, name in named.items()}
    if "tasks" in named:
        absolute["tasks"] = _each_task(
            named["tasks"], lambda name: os.path.abspath(name) if os.path.isfile(name) else name
        )
    return settings | absolute


def _each_task(tasks: str, change: Callable[[str], str]) -> str:
    """`tasks` with a change of the name or file of each, where lm-eval's begin with `lm_eval:`."""
    parts = [tasks] if os.path.isfile(tasks) else [part.strip() for part in tasks.split(",")]
    of_lm_eval = (LM_EVAL if part.startswith(LM_EVAL) else "" for part in parts)
    return ",".join(start + change(part.removeprefix(start)) for start, part in zip(of_lm_eval, parts, strict=True))


def is_local_path(text: str) -> bool:
    """Whether `text` is a path on a machine rather than a name that means the same everywhere."""
    local = text.startswith(("/", "~", "./", "../", ".\\", "..\\", "file:")) or PureWindowsPath(text).is_absolute()
    return local and "\n" not in text


def hub_id(name: str | None) -> str | None:
    """The repository on the Hub that `name` means, with a revision or a GGUF file or without; `None` for others."""
    if name is None or is_local_path(name):
        return None
    if is_gguf(name):  # user/name/file.gguf
        name = "/".join(name.split("/")[:2]) if name.count("/") > 1 else ""
    return name.split("@")[0] if HUB_ID.fullmatch(name) else None


def without_local_paths(value: Any) -> Any:
    """Replace every local path in settings, at any depth, by its last part; drop the private settings."""
    if isinstance(value, dict):
        public = {key: without_local_paths(value[key]) for key in value if not PRIVATE.fullmatch(key)}
        tasks = value.get("tasks")
        return public | ({"tasks": _each_task(tasks, without_local_paths)} if isinstance(tasks, str) else {})
    if isinstance(value, (list, tuple)):
        return [without_local_paths(item) for item in value]
    local = isinstance(value, str) and is_local_path(value)
    return PureWindowsPath(PurePosixPath(value).name).name if local else value


def check_nothing_local(folder: Path, places: Iterable[Path], token: str | None) -> None:
    """Raise [`LayerPruneError`] if a text file in `folder` contains the path of one of `places`, or any token."""
    roots = {str(form) for place in places for form in (place.absolute(), place.resolve()) if len(form.parts) > 1}
    local = re.compile(rf"(?<![\w.:-])({'|'.join(map(re.escape, sorted(roots)))})(?![\w.-])")
    for path in sorted(path for path in folder.iterdir() if path.suffix not in (".safetensors", ".png")):
        text, what = path.read_text(encoding="utf-8", errors="replace"), None
        if (token and token in text) or TOKEN.search(text):
            what = "an access token"
        elif roots and path.name not in VOCABULARY and (found := local.search(text)):
            what = f"the local path {found[0]}"
        if what:
            raise LayerPruneError(f"{path.name} holds {what}; take it out of the run's files, then push again")
