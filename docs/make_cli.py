"""Write the settings of every verb, as the dataclasses hold them, to `docs/cli.md`.

python docs/make_cli.py
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, Field
from pathlib import Path
from typing import get_args

from trl import SFTConfig

from hf_layerprune import IterativeLayerDistillConfig
from hf_layerprune.cli import VERBS
from hf_layerprune.cli.arguments import OF_TRL
from hf_layerprune.cli.parsing import offered, settings_of
from hf_layerprune.files import write_atomically

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "cli.md"
DOCS_OF_TRL = "https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig"
HEAD = """\
# Settings of every command

Made by `python docs/make_cli.py` from the dataclasses; do not edit. `hf-layerprune COMMAND --help-all` says the same.

Every setting can be given on the command line (`--criterion kl`) or in a YAML file given with `--config`; the command
line wins, and an unknown key is an error. A switch takes `true` or `false`. An empty default is none.
"""
OF_TRL_TEXT = f"""\
`compress` and `estimate` take these of TRL's [`SFTConfig`]({DOCS_OF_TRL}). In Python the others work too.
"""


def reference() -> str:
    """The page."""
    parts = [HEAD]
    for verb, text in VERBS.items():
        parts.append(f"## {verb}\n\n{text[0].upper()}{text[1:]}.\n")
        for kind in settings_of(verb):
            items = offered(kind)
            if issubclass(kind, SFTConfig):
                parts.append("Settings of the trainer, next to [those of TRL](#settings-of-trl):\n")
                items = [item for item in items if item.name not in OF_TRL]
            parts.append(_table(items))
    of_trl = [item for item in offered(IterativeLayerDistillConfig) if item.name in OF_TRL]
    parts.append(f"## Settings of TRL\n\n{OF_TRL_TEXT}\n{_table(of_trl)}")
    return "\n".join(parts)


def _table(items: Iterable[Field]) -> str:
    rows = []
    for item in items:
        default, text = _default(item), _help(item).replace("|", "\\|")
        kind = str(item.type) if get_args(item.type) else item.type.__name__
        rows.append(f"| `{item.name}` | {kind.replace(' | None', '')} | {default and f'`{default}`'} | {text} |")
    return "\n".join(["| setting | type | default | |", "|---|---|---|---|", *rows]) + "\n"


def _help(item: Field) -> str:
    text, choices = " ".join(item.metadata["help"].replace("%%", "%").split()), item.metadata.get("choices", ())
    return text if all(choice in text for choice in choices) else f"{text} One of {', '.join(choices)}."


def _default(item: Field) -> str:
    value = item.default_factory() if item.default_factory is not MISSING else item.default
    if value is None or value == []:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(getattr(value, "value", value))


if __name__ == "__main__":
    write_atomically(PAGE, reference())
