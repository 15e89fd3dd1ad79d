"""Make language models of the Qwen2, Qwen3, Llama and Mistral families shallower: measure, remove, heal, share."""

import ast
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_MODULE_OF = {
    alias.name: f".{item.module}" for item in _STUB.body if isinstance(item, ast.ImportFrom) for alias in item.names
}
"""Public name to the module it is imported from on first use; the list itself is `__init__.pyi`."""

__all__ = sorted(_MODULE_OF)

# Importing `models` registers PrunedQwen2 with the Auto classes, which takes torch and transformers. The command line
# (for `python -m hf_layerprune.cli` argv[0] is still "-m" here) imports them when a verb needs them.
if Path("".join(sys.argv[:1])).stem not in ("hf-layerprune", "-m"):
    from . import models as models


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(import_module(_MODULE_OF[name], __name__), name)
    elif find_spec(f"{__name__}.{name}"):
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
