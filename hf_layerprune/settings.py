"""A setting of a dataclass, with the help that the command line prints. Needs no torch to import."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str, **more: Any) -> Any:
    """A setting, its help, and what else argparse should know."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help, **more})
    return field(default=default, metadata={"help": help, **more})
