"""What a run leaves so that it can be repeated, and the folder it leaves it in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from ..errors import LayerPruneError
from ..files import write_atomically
from ..hub.paths import with_absolute_paths


def write_recipe(folder: Path, given: dict[str, Any], **changed: Any) -> None:
    """Write `recipe.yaml`: `--config` repeats the run, from any folder, on any machine.

    Args:
        folder (`Path`): output folder of the run.
        given (`dict[str, Any]`): the settings that were given. What was derived from them on this machine, such as
            `bf16`, is derived again there.
        changed: settings that are written in another form than they were given in.
    """
    content = given | changed | {"output_dir": str(folder)}
    content = {name: value for name, value in content.items() if name not in ("gguf_file", "resume")}
    write_atomically(folder / "recipe.yaml", yaml.safe_dump(with_absolute_paths(content), sort_keys=False))


def check_new_folder(folder: Path, instead: str = "") -> None:
    """Raise [`LayerPruneError`] unless `folder` can be made, or is there and empty; `instead` says what else to do."""
    if folder.is_dir() and any(folder.iterdir()):
        raise LayerPruneError(f"output_dir={folder} is not empty; {instead}choose another folder")


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder before the work that fills it; an error that leaves it empty removes it again."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if new:
            with suppress(OSError):  # something lies in it
                folder.rmdir()
        raise
