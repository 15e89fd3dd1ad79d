"""Write the settings of every verb, as the dataclasses hold them, to `docs/cli.md`, and those of the trainer to the
text that `--help` prints, which must not import them.

python docs/make_cli.py
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from itertools import chain
from pathlib import Path
from typing import Any, get_args

from hf_layerprune import IterativeLayerDistillConfig
from hf_layerprune.cli import VERBS
from hf_layerprune.cli.arguments import NO_EFFECT
from hf_layerprune.cli.parsing import RUN_SETTINGS, settings_of
from hf_layerprune.files import write_atomically

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "cli.md"
DOCS_OF_TRL = "https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig"
HEAD = """\
# Settings of every command

Made by `python docs/make_cli.py` from the dataclasses; do not edit. `hf-layerprune <command> --help` says the same.

Every setting can stand on the command line (`--criterion kl`) or in a YAML file given with `--config`; the command
line wins, and an unknown key is an error. A switch takes `true` or `false`. An empty default is none.
"""
OF_TRL = f"""\
Settings of the trainer, next to those of TRL's [`SFTConfig`]({DOCS_OF_TRL}) that have an effect here, see
[below](#settings-of-trl):
"""


def reference() -> str:
    """The page."""
    parts = [HEAD]
    for verb, text in VERBS.items():
        parts.append(f"## {verb}\n\n{text[0].upper()}{text[1:]}.\n")
        for kind in settings_of(verb):
            if issubclass(kind, IterativeLayerDistillConfig):
                parts += [OF_TRL, _table(_own())]
            else:
                parts.append(_table(fields(kind)))
    names = ", ".join(f"`{item.name}`" for item in _of_trl())
    refused = "".join(f"* {', '.join(f'`{name}`' for name in given)}: {why}\n" for why, given in NO_EFFECT.items())
    parts.append(f"## Settings of TRL\n\n`compress` and `estimate` take these, as TRL and transformers do: {names}.\n")
    parts.append(f"Those without an effect are refused:\n\n{refused}")
    return "\n".join(parts)


def run_settings() -> str:
    """Settings of the trainer for `--help`: its own, and those of TRL that a recipe uses; of the others the names."""
    files = (path.read_text(encoding="utf-8") for path in ROOT.glob("recipes/*/*.yaml"))
    recipes = "".join(text for text in files if text.startswith("# hf-layerprune compress "))
    used = set(re.findall(r"^(\w+):", recipes, re.MULTILINE))
    explained = chain(_own(), (item for item in _of_trl() if item.name in used))
    names = ", ".join(f"--{item.name}" for item in _of_trl() if item.name not in used)
    text = "\nsettings of the trainer:\n" + "".join(map(_paragraph, explained))
    return text + f"\nsettings of TRL that work as in {DOCS_OF_TRL}:\n{_wrapped(names, 2)}\n"


def _own() -> Iterator[Field]:
    return (item for item in fields(IterativeLayerDistillConfig) if item.name in _annotations())


def _of_trl() -> Iterator[Field]:
    """Those of TRL's settings that a run has a use for."""
    without = {*_annotations(), *chain(*NO_EFFECT.values())}
    return (item for item in fields(IterativeLayerDistillConfig) if item.name not in without)


def _annotations() -> dict[str, Any]:
    return vars(IterativeLayerDistillConfig)["__annotations__"]


def _paragraph(item: Field) -> str:
    default = _default(item)
    text = _help(item) + (f" (default: {default})" if default else "")
    return f"  --{item.name}\n{_wrapped(text, 24)}\n"


def _wrapped(text: str, indent: int) -> str:
    space = " " * indent
    return textwrap.fill(" ".join(text.split()), 100, initial_indent=space, subsequent_indent=space)


def _table(items: Any) -> str:
    rows = []
    for item in items:
        default, text = _default(item), _help(item).replace("|", "\\|")
        kind = item.type  # text, or a type once a parser has read it
        kind = kind if isinstance(kind, str) else str(kind) if get_args(kind) else kind.__name__
        rows.append(f"| `{item.name}` | {kind.replace(' | None', '')} | {default and f'`{default}`'} | {text} |")
    return "\n".join(["| setting | type | default | |", "|---|---|---|---|", *rows]) + "\n"


def _help(item: Field) -> str:
    text, choices = item.metadata["help"].replace("%%", "%"), item.metadata.get("choices", ())
    return text if all(choice in text for choice in choices) else f"{text} One of {', '.join(choices)}."


def _default(item: Field) -> str:
    value = item.default_factory() if item.default_factory is not MISSING else item.default
    if value is None or value == []:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(getattr(value, "value", value))


if __name__ == "__main__":
    write_atomically(PAGE, reference())
    write_atomically(RUN_SETTINGS, run_settings())
