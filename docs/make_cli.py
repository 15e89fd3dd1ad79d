"""Write the settings of every verb, as the dataclasses hold them, to `docs/cli.md`.

python docs/make_cli.py
"""

from __future__ import annotations

import re
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from hf_layerprune import IterativeLayerDistillConfig
from hf_layerprune.cli import USAGE, VERBS
from hf_layerprune.cli.parsing import settings_of
from hf_layerprune.files import write_atomically

PAGE = Path(__file__).parent / "cli.md"
HEAD = """\
# Settings of every command

Made by `python docs/make_cli.py` from the dataclasses; do not edit. `hf-layerprune <command> --help` says the same.

Every setting can stand on the command line (`--criterion kl`) or in a YAML file given with `--config`; the command
line wins, and an unknown key is an error. A switch takes `true` or `false`. An empty default is none.
"""
OF_TRL = (
    "Settings of the trainer, beside all those of TRL's [`SFTConfig`]"
    "(https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig), such as `max_length`, `packing`, `max_steps`, "
    "`per_device_train_batch_size`, `save_steps` or `report_to`:"
)


def reference() -> str:
    """The page."""
    said = dict(re.findall(r"^  ([\w-]+) +(\S.*)$", USAGE, re.MULTILINE))
    parts = [HEAD]
    for verb in VERBS:
        parts.append(f"## {verb}\n\n{said[verb][0].upper()}{said[verb][1:]}.\n")
        for kind in settings_of(verb):
            if issubclass(kind, IterativeLayerDistillConfig):
                kind = IterativeLayerDistillConfig
                parts.append(OF_TRL + "\n")
            parts.append(_table(kind))
    return "\n".join(parts)


def _table(kind: type) -> str:
    """The settings of a dataclass; of the trainer's, only those that are not TRL's."""
    own = kind.__annotations__ if kind is IterativeLayerDistillConfig else {item.name: None for item in fields(kind)}
    rows = [_row(item, _type(kind, item.name)) for item in fields(kind) if item.name in own]
    return "\n".join(["| setting | type | default | |", "|---|---|---|---|", *rows]) + "\n"


def _type(kind: type, name: str) -> str:
    """The type as it stands in the source; a parser replaces that of the field."""
    declared = (vars(base).get("__annotations__", {}) for base in kind.__mro__)
    annotation = next(names[name] for names in declared if name in names)
    return annotation.replace(" | None", "")


def _row(item: Field, kind: str) -> str:
    default = item.default_factory() if item.default_factory is not MISSING else item.default
    text, choices = item.metadata["help"].replace("%%", "%"), item.metadata.get("choices", ())
    if not all(choice in text for choice in choices):
        text += f" One of {', '.join(choices)}."
    return f"| `{item.name}` | {kind} | {_default(default)} | {text.replace('|', chr(92) + '|')} |"


def _default(value: Any) -> str:
    if value is None or value == []:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    write_atomically(PAGE, reference())
