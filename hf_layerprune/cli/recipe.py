"""What a run leaves so that it can be repeated, and the folder it leaves it in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from ..errors import LayerPruneError
from ..files import write_atomically
from ..hub.paths import with_absolute_paths

NOT_IN_RECIPE = {"gguf_file", "resume", "resume_from_checkpoint", "hub_token"}
"""Settings of one start of a run, not of the run."""


def write_recipe(folder: Path, settings: dict[str, Any], given: set[str]) -> None:
    """Write `recipe.yaml`: `--config` repeats the run, from any folder, on any machine.

    Args:
        folder (`Path`): output folder of the run.
        settings (`dict[str, Any]`): all settings of the run.
        given (`set[str]`): those that were given. What was derived from them on this machine, such as `bf16`, is
            derived again there.
    """
    wanted = (given | {"model"}) - NOT_IN_RECIPE
    content = {name: value for name, value in settings.items() if name in wanted} | {"output_dir": str(folder)}
    content = {name: value.value if isinstance(value, Enum) else value for name, value in content.items()}
    if isinstance(init := content.get("model_init_kwargs"), dict):  # a token is for this machine alone
        content["model_init_kwargs"] = {name: value for name, value in init.items() if name != "token"}
    write_atomically(folder / "recipe.yaml", yaml.safe_dump(with_absolute_paths(content), sort_keys=False))


def check_new_folder(folder: Path, instead: str = "") -> None:
    """Raise [`LayerPruneError`] unless `folder` can be made, or is there and empty; `instead` says what else to do."""
    if folder.is_dir() and any(folder.iterdir()):
        raise LayerPruneError(f"output_dir={folder} is not empty; {instead}choose another folder")


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder before the work that fills it; an error that leaves it empty removes it again.

    Raises:
        [`LayerPruneError`]: if there is a file in its place.
    """
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise LayerPruneError(f"output_dir={folder} is, or lies in, a file; choose a folder") from error
    try:
        yield
    except BaseException:
        if new:
            with suppress(OSError):  # something lies in it
                folder.rmdir()
        raise
