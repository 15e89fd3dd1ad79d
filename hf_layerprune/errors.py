"""The one error a user's mistake raises: what was given, why it cannot work, what to do.

Any function of the package may raise [`LayerPruneError`] for it; only the docstrings of public ones say when.
"""

from __future__ import annotations

from traceback import walk_tb

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


class LayerPruneError(ValueError):
    """A request that cannot work as given. The command line prints its message as one line and exits with status 2."""


class NotANumber(LayerPruneError):
    """A healing whose loss or weights are not numbers any more."""


def first_line(error: Exception) -> str:
    """The first line of what another library's error says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def is_of_chat_template(error: Exception) -> bool:
    """Whether a chat template raised an error, of whatever type, over the row that it was given."""
    return any(frame.f_code.co_filename == "<template>" for frame, _ in walk_tb(error.__traceback__))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory of the device or of the machine is used up.

    `torch.OutOfMemoryError` is a `RuntimeError` whose message says so.
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error).lower() for part in NO_MEMORY)
