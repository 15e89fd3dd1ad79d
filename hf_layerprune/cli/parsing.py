"""How the verbs are told: YAML and command line, strict about unknown keys; words that belong to no option."""

from __future__ import annotations

import math
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from ..errors import LayerPruneError
from . import arguments


def default_depth(depth: int) -> int:
    """Three quarters of a model's layers, where no target is named; at least one goes."""
    return max(1, min(depth - 1, round(0.75 * depth)))


def check_no_file(folder: Path) -> None:
    """Raise [`LayerPruneError`] if `folder` cannot be made or written to, as a file stands in its place."""
    if any(path.is_file() for path in (folder, *folder.parents)):
        raise LayerPruneError(f"output_dir={folder} is, or lies in, a file; choose a folder")


def check_new_folder(folder: Path, instead: str = "") -> None:
    """Raise [`LayerPruneError`] unless `folder` can be made, or is there and empty; `instead` says what else to do."""
    check_no_file(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise LayerPruneError(f"output_dir={folder} is not empty; {instead}choose another folder")


def names_option(argument: str, *options: str) -> bool:
    """Whether a word of the command line is one of these options, with dashes or underscores in its name."""
    name = argument.partition("=")[0]
    return any(name in (option, option.replace("_", "-")) for option in options)


def positional(argv: list[str], settings: type, name: str) -> list[str]:
    """`argv` with the words that belong to no option behind the option `name`, which `settings` has.

    Raises:
        [`LayerPruneError`]: if the option is there too, or takes one word and there are more.
    """
    words, rest = words_apart(argv, settings)
    if not words:
        return rest
    option = f"--{name}"
    if any(names_option(argument, option) for argument in rest):
        raise LayerPruneError(f"{name} named twice: {' '.join(words)} and {option}; leave one out")
    if len(words) > 1 and not _kinds(settings)[name].startswith("list"):
        raise LayerPruneError(f"{' '.join(words)} are {len(words)} words where one goes, as {option}")
    return [option, *words, *rest]


def words_apart(argv: list[str], settings: type) -> tuple[list[str], list[str]]:
    """The words that belong to no option, and the rest; `settings` has a field for every option."""
    kinds = _kinds(settings)
    words: list[str] = []
    rest: list[str] = []
    room, kind = 0.0, ""  # of the last option: words it still takes, and its type
    for argument in _config_apart(argv):
        if argument.startswith("-"):
            kind = kinds.get(argument.lstrip("-").replace("-", "_"), "")
            room = 0 if "=" in argument else math.inf if kind.startswith("list") else 1
            rest.append(argument)
        elif room and (kind != "bool" or argument.lower() in ("true", "false")):
            rest.append(argument)
            room -= 1
        else:
            words.append(argument)
            room = 0
    return words, rest


def _kinds(settings: type) -> dict[str, str]:
    """Names of the fields' types; a parser that has run leaves types where their names stood."""
    return {item.name: getattr(item.type, "__name__", str(item.type)) for item in fields(settings)}


def _config_apart(argv: list[str]) -> list[str]:
    """`--config=FILE` as two words."""
    return [
        part
        for argument in argv
        for part in (argument.split("=", 1) if names_option(argument, "--config") else [argument])
    ]


def settings_of(verb: str) -> tuple[type, ...]:
    """The dataclasses a verb is parsed into."""
    if verb == "compress":
        from ..trainer import IterativeLayerDistillConfig

        return arguments.CompressArguments, IterativeLayerDistillConfig
    if verb == "estimate":
        from .estimate import EstimatedRunConfig

        return arguments.EstimateArguments, EstimatedRunConfig
    if verb == "generate":
        from ..healing_data_config import HealingDataConfig

        return arguments.GenerateArguments, HealingDataConfig
    return (getattr(arguments, f"{verb.title().replace('-', '')}Arguments"),)


def parse(verb: str, argv: list[str]) -> tuple[Any, ...]:
    """Read YAML and command line into the dataclasses of a verb; strict about unknown keys."""
    command, types = f"hf-layerprune {verb}", settings_of(verb)

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise LayerPruneError(f"{message}; see {command} --help")

    argv = _config_apart(argv)
    file = argv[argv.index("--config") + 1 :][:1] if "--config" in argv else None
    if file == []:
        raise LayerPruneError("--config needs the path of a YAML file")
    parser = Parser(
        types,
        allow_abbrev=False,
        prog=command,
        epilog="--config FILE reads settings from YAML, --debug shows tracebacks.",
    )
    try:
        *parsed, of_file, of_line = parser.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
    except LayerPruneError:
        raise
    except (OSError, ValueError, ImportError, yaml.YAMLError) as error:
        raise LayerPruneError(str(error)) from error
    except TypeError as error:  # a value that YAML read as a list, say
        if file is None:
            raise
        raise LayerPruneError(f"{file[0]}: {error}") from error
    if of_file:
        key = of_file[0].removeprefix("--")
        raise LayerPruneError(f"{file[0]}: unknown key {key!r}{_nearest(key, parser, '')}")
    if of_line:
        option = next((word.split("=")[0] for word in of_line if word.startswith("-")), None)
        if option is None:
            raise LayerPruneError(f"{of_line[0]!r} belongs to no option; see {command} --help")
        raise LayerPruneError(f"unknown option {option}{_nearest(option, parser, '--')}")
    return tuple(parsed)


def _nearest(name: str, parser: TrlParser, dashes: str) -> str:
    """The end of a message about a wrong name: the known one that is most like it, or where all of them are."""
    known = [action.dest for action in parser._actions]
    near = get_close_matches(name.strip("-").replace("-", "_"), known, n=1)
    return f"; did you mean {dashes}{near[0]}?" if near else f"; see {parser.prog} --help"


def names_given(argv: list[str]) -> set[str]:
    """The settings that a command line names, itself or in its YAML file, once it is parsed without a mistake."""
    words = _config_apart(argv)
    named = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("--")}
    if "config" in named:
        named |= set(yaml.safe_load(Path(words[words.index("--config") + 1]).read_text(encoding="utf-8")))
    return named | {name.removeprefix("no_") for name in named}  # --no_heal is a way to say --heal false
