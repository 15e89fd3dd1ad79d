"""The one error a user's mistake raises: what was given, why it cannot work, what to do.

Any function of the package may raise [`LayerPruneError`] for it; only the docstrings of public ones say when.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
DISK_FULL = (
    "no space left", "file too large", "disk quota", "pytorchstreamwriter failed", "read-only file system",
    "unexpected pos",
)  # fmt: skip


class LayerPruneError(ValueError):
    """A request that cannot work as given. The command line prints its message as one line and exits with status 2."""


class NotANumber(LayerPruneError):
    """A healing whose loss or weights are not numbers any more."""


def needs_extra(package: str, extra: str) -> LayerPruneError:
    """The error for a package that only an extra of this one installs."""
    return LayerPruneError(f"{package} is not installed; pip install 'hf-layerprune[{extra}]'")


def first_line(error: Exception) -> str:
    """The first line of another library's error, and the next one if it ends in a colon; of an error in YAML, what is
    wrong in which line."""
    if (mark := getattr(error, "problem_mark", None)) is not None:
        return f"line {mark.line + 1}: {getattr(error, 'problem', None)}"
    if isinstance(error, KeyError) and error.args and str(error.args[0]).isidentifier():
        return f"there is no {error.args[0]!r}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else type(error).__name__


@contextmanager
def located(where: str) -> Iterator[None]:
    """Say where an error is."""
    try:
        yield
    except LayerPruneError as error:
        raise LayerPruneError(f"{where}: {error}") from error.__cause__


@contextmanager
def arguments_in_one_line() -> Iterator[None]:
    """Turn what TRL and transformers say of arguments and data, and whatever a chat template raises over a row, into a
    [`LayerPruneError`]; let a bug through."""
    from jinja2 import TemplateError

    try:
        yield
    except LayerPruneError:
        raise
    except Exception as error:
        if any(frame.f_code.co_filename == "<template>" for frame, _ in walk_tb(error.__traceback__)):
            raise LayerPruneError(f"a row does not fit the chat template: {first_line(error)}") from error
        if not isinstance(error, (ValueError, ImportError, OSError, TemplateError)):
            raise
        raise LayerPruneError(first_line(error)) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory of the device or of the machine is used up.

    `torch.OutOfMemoryError` is a `RuntimeError` whose message says so.
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error).lower() for part in NO_MEMORY)


def is_disk_full(error: Exception) -> bool:
    """Whether an error, of a library in place of the operating system's own, says that a disk cannot be written."""
    return any(part in str(error).lower() for part in DISK_FULL)
