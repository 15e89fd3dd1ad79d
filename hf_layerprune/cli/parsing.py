"""Read the settings of a verb from YAML and the command line into dataclasses."""

from __future__ import annotations

import json
import os
from argparse import SUPPRESS, Namespace
from dataclasses import Field, fields, make_dataclass
from difflib import get_close_matches
from inspect import get_annotations
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from ..errors import LayerPruneError, first_line
from ..files import load_yaml
from . import arguments
from .arguments import NEEDS, OF_HEALING, OF_LOSS, OF_TRAINING, OF_TRL, TARGETS

UNSET = object()
MOST_USED = {"output_dir", "max_steps", "max_length"}
"""Settings of TRL that `--help` lists; the others are under `--help-all`."""
EXAMPLES = {
    "compress": """
examples:
  hf-layerprune compress --model Qwen/Qwen2.5-0.5B --dataset my_texts.jsonl --target_num_layers 18 --output_dir qwen-18
  hf-layerprune compress --config recipe.yaml --target_num_layers 20 --output_dir qwen-20
"""
}


def parse(verb: str, argv: list[str]) -> tuple[Any, ...]:
    """Read the settings of `verb` into its dataclasses; see [`Parser`]."""
    return Parser(verb).read(argv)


def settings_of(verb: str) -> tuple[type, ...]:
    """The dataclasses a verb is parsed into: its own settings, and those of the trainer or of the answers."""
    own = getattr(arguments, f"{verb.title().replace('-', '')}Arguments")
    if verb in ("compress", "estimate"):
        from ..trainer import IterativeLayerDistillConfig as Further
    elif verb == "generate":
        from ..settings import HealingDataConfig as Further
    else:
        return (own,)
    return own, Further


def offered(kind: type) -> list[Field]:
    """The settings of a dataclass that a verb takes: all of this package and, of TRL's, [`OF_TRL`]."""
    names, hints = set(OF_TRL), get_type_hints(kind)
    for base in kind.__mro__:
        if base.__module__.startswith("hf_layerprune."):
            names |= get_annotations(base).keys()
    chosen = [item for item in fields(kind) if item.name in names]
    for item in chosen:
        item.type = hints[item.name]
    return chosen


class Parser(TrlParser):
    """Reads the settings of one verb; those that were `given` are kept by name."""

    def __init__(self, verb: str) -> None:
        self.types, self.given = settings_of(verb), {}
        self.settings = {item.name: item for kind in self.types for item in offered(kind)}
        self.kinds = {name: _kinds(item.type) for name, item in self.settings.items()}  # the parser narrows the types
        self.of_trl = set(OF_TRL) - {item.name for item in fields(self.types[0])} - MOST_USED
        options = [(item.name, item.type, item) for item in self.settings.values() if not _is_positional(item)]
        options.sort(key=lambda setting: setting[0] in self.of_trl)
        epilog = "Add --debug to see the traceback of an error."
        epilog += " --help-all lists the settings of TRL's trainer too." if self.settings.keys() & self.of_trl else ""
        super().__init__(
            make_dataclass("Settings", options), allow_abbrev=False, prog=f"hf-layerprune {verb}", epilog=epilog
        )
        text = "YAML file of settings; those on the command line win."
        self.add_argument("--config", action="append", default=SUPPRESS, help=text)
        for item in filter(_is_positional, self.settings.values()):
            count = "*" if get_origin(item.type) is list else "?"
            self.add_argument(item.name, nargs=count, default=SUPPRESS, help=item.metadata["help"])

    def read(self, argv: list[str]) -> tuple[Any, ...]:
        """Parse a command line and the YAML file it names into the dataclasses."""
        line, recipe = _expanded(self._read_words(argv)), {}
        if files := line.pop("config", None):
            if len(files) > 1:
                raise LayerPruneError(f"--config is given {len(files)} times; put all settings into one file")
            (file,) = files
            try:
                recipe = _expanded(self._read_file(Path(file)))
            except (ValueError, yaml.YAMLError) as error:
                raise LayerPruneError(f"--config {file}: {first_line(error)}") from error
        replaced = _replaced(recipe, line)
        self.given = {name: value for name, value in recipe.items() if name not in replaced} | line
        _check_effect(self.given)
        for name, value in self.given.items():
            if isinstance(value, str) and dict in self.kinds[name]:
                _check_json(name, value)
        try:
            return tuple(
                kind(**{item.name: self.given[item.name] for item in fields(kind) if item.name in self.given})
                for kind in self.types
            )
        except (ValueError, ImportError) as error:  # of TRL and transformers
            raise LayerPruneError(str(error)) from error

    def help_text(self, everything: bool) -> str:
        """What `--help` prints: without the settings of TRL, unless `everything` is asked for."""
        for action in self._actions:
            if action.dest in self.of_trl and not everything:
                action.help = SUPPRESS
        return self.format_help() + EXAMPLES.get(self.prog.split()[-1], "")

    def error(self, message: str) -> NoReturn:
        raise LayerPruneError(f"{message}; see {self.prog} --help")

    def _read_words(self, words: list[str]) -> dict[str, Any]:
        unset = Namespace(**dict.fromkeys(self.settings, UNSET))
        found, unknown = self.parse_known_intermixed_args(words, unset)
        if unknown:
            raise self._unknown(unknown[0])
        return {name: value for name, value in vars(found).items() if value is not UNSET}

    def _read_file(self, path: Path) -> dict[str, Any]:
        """Read each setting as if it stood on the command line; a null, a mapping or a list stays what it is where the
        type of the setting allows it."""
        text = path.read_text(encoding="utf-8")
        content = load_yaml(text)
        if not isinstance(content, dict):
            raise LayerPruneError("the file must hold settings, a line each: `name: value`")
        names = [key.value for key, _ in yaml.compose(text).value]
        if twice := sorted(name for name in {*names} if names.count(name) > 1):
            raise LayerPruneError(f"{', '.join(twice)} is there twice; leave one out")
        words, as_it_is = [], {}
        for name, value in content.items():
            if name not in self.settings:
                raise self._unknown(str(name))
            item, kinds = self.settings[name], self.kinds[name]
            if isinstance(value, list) and list not in kinds:
                value = ",".join(map(str, value))
            if isinstance(value, (NoneType, dict)) and type(value) not in kinds:
                what = "has no value" if value is None else "must not hold settings of its own"
                raise LayerPruneError(f"{name} {what}; give it a value, or leave it out")
            if isinstance(value, (NoneType, dict, list)) and kinds != {list}:
                as_it_is[name] = value
                continue
            values = value if isinstance(value, list) else [value]
            if _is_positional(item):
                words = [*map(str, values), *words]  # before any option that takes several
            else:
                words += [f"--{name}={value}"] if value is not values else [f"--{name}", *map(str, values)]
        for name, value in self._read_words(words).items():  # 10 stays 10, where a float is meant
            as_it_is[name] = content[name] if isinstance(value, float) and content[name] == value else value
        return as_it_is

    def _unknown(self, name: str) -> LayerPruneError:
        word = name.strip("-").partition("=")[0].replace("-", "_")
        near = get_close_matches(word, self.settings, n=1)
        hint = f"did you mean {near[0]}?" if near else f"see {self.prog} --help"
        if "model" in self.settings and not name.startswith("-") and ("/" in name or name == "embedded"):
            hint = f"did you mean --model {name}?"
        if word == "torch_compile" and "compile_layers" in self.settings:
            hint = "it compiles a whole model; --compile_layers true compiles every layer"
        return LayerPruneError(f"unknown setting {name}; {hint}")


def _expanded(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with the home folder in place of `~/`, which the shell does not expand everywhere; an empty one would
    be the current folder, where a model or a data set is meant, and is refused."""

    def one(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [one(name, part) for part in value]
        if value == "":
            raise LayerPruneError(f"{name} is empty; give it a value, or leave it out")
        return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value

    return {name: one(name, value) for name, value in settings.items()}


def _check_json(name: str, value: str) -> None:
    """Raise [`LayerPruneError`] if a mapping is not JSON: transformers would not say which setting it is."""
    try:
        content = json.loads(value)
    except ValueError as error:
        raise LayerPruneError(f"{name}={value} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise LayerPruneError(f'{name}={value} is not a mapping; write it as {{"name": value}}')


def _kinds(hint: Any) -> set[type]:
    """The types that a type hint allows."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return {get_origin(kind) or kind for kind in kinds}


def _replaced(recipe: dict[str, Any], line: dict[str, Any]) -> set[str]:
    """The settings of a recipe that those of the command line take the place of, or leave without a use."""
    replaced = {name for name, needed in NEEDS.items() if needed in line and _is_off(line[needed])}
    if TARGETS & line.keys():
        replaced |= TARGETS
    if "dataset" in line:
        replaced.add("dataset_config")  # it is of the recipe's own data
    if "tasks" in line:
        replaced.add("criterion")
    elif line.get("criterion", "tasks") != "tasks":
        replaced.add("tasks")
    if line.get("loss_preset") == "paper":
        replaced |= OF_LOSS
    if line.get("heal") is False:
        replaced |= _without_healing(recipe | line)
    return replaced


def _without_healing(given: dict[str, Any]) -> set[str]:
    """The settings that have no use where rounds do not heal."""
    return OF_HEALING if given.get("on_policy_steps") else OF_HEALING | OF_TRAINING


def _check_effect(given: dict[str, Any]) -> None:
    """Raise [`LayerPruneError`] for a setting that would have no effect."""
    if given.get("heal") is False and (found := _without_healing(given) & given.keys()):
        raise LayerPruneError(
            f"heal=False leaves no use for {', '.join(sorted(found))}; leave them out (--heal false on "
            "the command line leaves out those of a recipe)"
        )
    for name, needed in NEEDS.items():
        if name in given and _is_off(given.get(needed)):
            raise LayerPruneError(f"{name}={given[name]} has no effect without {needed}; leave it out")
    if given.get("tasks") and given.get("criterion", "tasks") != "tasks":
        raise LayerPruneError(f"tasks are for criterion='tasks', not {given['criterion']!r}; leave out one")


def _is_off(value: Any) -> bool:
    return not value or value in ("none", ["none"])


def _is_positional(item: Field) -> bool:
    return item.metadata.get("positional", False)
