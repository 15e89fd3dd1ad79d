"""The one error a user's mistake raises (what was given, why it cannot work, what to do), and what settings share."""

from __future__ import annotations

from dataclasses import fields
from numbers import Integral
from typing import Any, get_args, get_type_hints

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


class LayerPruneError(ValueError):
    """A request that cannot work as given. The command line prints its message as one line and exits with status 2."""


class NotANumber(LayerPruneError):
    """A healing whose loss or weights are no numbers any more."""


def first_line(error: Exception) -> str:
    """The first line of what another library's error says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory of the device or of the machine is used up.

    `torch.OutOfMemoryError` is a `RuntimeError` whose message says so.
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error).lower() for part in NO_MEMORY)


def make_whole(settings: Any) -> None:
    """Turn numbers such as 2.0 into integers where a dataclass of settings wants whole ones.

    Raises:
        [`LayerPruneError`]: if one is not whole.
    """
    hints = get_type_hints(type(settings))
    for item in fields(settings):
        kinds = {hints[item.name], *get_args(hints[item.name])}
        if int in kinds and float not in kinds:
            value = getattr(settings, item.name)
            whole = (
                [_whole(item.name, part) for part in value] if isinstance(value, list) else _whole(item.name, value)
            )
            setattr(settings, item.name, whole)


def _whole(name: str, value: Any) -> Any:
    if isinstance(value, float) and not value.is_integer():
        raise LayerPruneError(f"{name}={value} is not a whole number")
    return int(value) if isinstance(value, (float, Integral)) and not isinstance(value, bool) else value
