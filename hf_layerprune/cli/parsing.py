"""Read the settings of a verb from YAML and the command line, strict about names and types."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from ..errors import LayerPruneError
from . import arguments
from .arguments import NO_EFFECT, POSITIONAL, TARGETS

TRUTH = ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0")  # what a switch takes
RUN_SETTINGS = Path(__file__).with_name("run_settings.txt")
"""Settings of the trainer as `--help` prints them; importing those takes seconds. `docs/make_cli.py` writes it."""


def parse(verb: str, argv: list[str]) -> tuple[Any, ...]:
    """Read the settings of `verb` into its dataclasses; see [`Parser`]."""
    return Parser(verb).read(argv)


def help_of(verb: str) -> str:
    """What `hf-layerprune <verb> --help` prints."""
    types = settings_of(verb) if verb == "generate" else (own_settings_of(verb),)
    epilog = "--config FILE reads settings from YAML, --debug shows tracebacks."
    more = RUN_SETTINGS.read_text(encoding="utf-8") if verb in ("compress", "estimate") else ""
    return Parser(verb, types, epilog=epilog).format_help() + more


def own_settings_of(verb: str) -> type:
    """The dataclass of a verb's own settings."""
    return getattr(arguments, f"{verb.title().replace('-', '')}Arguments")


def settings_of(verb: str) -> tuple[type, ...]:
    """All dataclasses a verb is parsed into."""
    if verb == "compress":
        from ..trainer import IterativeLayerDistillConfig as More
    elif verb == "estimate":
        from .estimate import EstimatedRunConfig as More
    elif verb == "generate":
        from ..healing_data_config import HealingDataConfig as More
    else:
        return (own_settings_of(verb),)
    return own_settings_of(verb), More


class Parser(TrlParser):
    """Reads the settings of one verb.

    Args:
        verb (`str`): name of the verb.
        types (`tuple[type, ...]`, *optional*): dataclasses to read into; by default all of the verb.

    Attributes:
        given (`set[str]`): the settings that were given, on the command line or in YAML. A target in YAML is not,
            where the command line names one.
    """

    def __init__(self, verb: str, types: tuple[type, ...] | None = None, **kwargs: Any) -> None:
        super().__init__(types or settings_of(verb), allow_abbrev=False, prog=f"hf-layerprune {verb}", **kwargs)
        self.given: set[str] = set()
        self._on_line: set[str] = set()
        self._positional = POSITIONAL.get(verb)
        self._settings = {action.dest: action for action in self._actions if action.nargs != 0}

    def read(self, argv: list[str]) -> tuple[Any, ...]:
        """Parse a command line and the YAML file it names into the dataclasses.

        Raises:
            [`LayerPruneError`]: for an unknown name, a value of another type, a file that cannot be read, or a value
                that the dataclasses refuse.
        """
        argv = self._spelled_out(argv)
        file = _config_of(argv)
        self._on_line = {action.dest for word in argv if (action := self._action(word))}
        self._give(self._on_line)
        try:
            *parsed, of_file, of_line = self.parse_args_and_config(
                argv, return_remaining_strings=True, separate_remaining_strings=True
            )
        except (ValueError, OSError, ImportError, TypeError, yaml.YAMLError) as error:
            if isinstance(error, LayerPruneError) or (isinstance(error, TypeError) and file is None):
                raise
            where = f"{file}: " if isinstance(error, TypeError) else ""  # a value that YAML read as a list, say
            raise LayerPruneError(f"{where}{error}") from error
        if of_file:
            key = of_file[0].removeprefix("--")
            raise LayerPruneError(f"{file}: unknown key {key!r}{self._nearest(key)}")
        self._place(of_line, parsed[0])
        return tuple(parsed)

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Take over the settings of a YAML file, in the types that the command line would give them."""
        if TARGETS & self.given:
            config = {name: value for name, value in config.items() if name not in TARGETS}
        self._give(set(config))
        known = self._settings.keys() & config.keys()
        config |= {name: _from_yaml(name, config[name], self._settings[name]) for name in known}
        return super().set_defaults_with_config(**config)

    def error(self, message: str) -> NoReturn:
        raise LayerPruneError(f"{message}; see {self.prog} --help")

    def _spelled_out(self, argv: list[str]) -> list[str]:
        """`--config=FILE` as two words, and a switch in front of another word as `--switch=true`."""
        words: list[str] = []
        for word, after in zip(argv, [*argv, "true"][1:], strict=True):
            action = self._action(word)
            if word.startswith("--config="):
                words += word.split("=", 1)
            elif action and action.nargs == "?" and "=" not in word and after.lower() not in TRUTH:
                words.append(f"{word}=true")
            else:
                words.append(word)
        return words

    def _action(self, word: str) -> Any:
        return self._option_string_actions.get(word.partition("=")[0])

    def _give(self, names: set[str]) -> None:
        names = names & self._settings.keys()
        for reason, without in NO_EFFECT.items():
            if refused := sorted(names.intersection(without)):
                raise LayerPruneError(f"{refused[0]} has no effect in {self.prog}: {reason}; leave it out")
        self.given |= names

    def _place(self, words: list[str], settings: Any) -> None:
        """Put words that belong to no option where they belong."""
        if option := next((word.partition("=")[0] for word in words if word.startswith("-")), None):
            raise LayerPruneError(f"unknown option {option}{self._nearest(option, '--')}")
        if not words:
            return
        name = self._positional
        if name is None:
            raise LayerPruneError(f"{words[0]!r} belongs to no option; see {self.prog} --help")
        if name in self._on_line:
            raise LayerPruneError(f"{name} named twice: {' '.join(words)} and --{name}; leave one out")
        several = self._settings[name].nargs == "+"
        if len(words) > 1 and not several:
            raise LayerPruneError(f"{' '.join(words)} are {len(words)} words where one goes, as --{name}")
        setattr(settings, name, words if several else words[0])

    def _nearest(self, name: str, dashes: str = "") -> str:
        """The end of a message about a wrong name: the known one that is most like it, or where all of them are."""
        near = get_close_matches(name.strip("-").replace("-", "_"), self._settings, n=1)
        return f"; did you mean {dashes}{near[0]}?" if near else f"; see {self.prog} --help"


def _config_of(argv: list[str]) -> str | None:
    """The YAML file that a command line names."""
    if "--config" not in argv:
        return None
    file = argv[argv.index("--config") + 1 :][:1]
    if not file or not Path(file[0]).is_file():
        raise LayerPruneError(f"--config {''.join(file) or repr('')} is not a file; give the path of a YAML file")
    return file[0]


def _from_yaml(name: str, value: Any, action: Any) -> Any:
    """A value as the command line would give it: YAML reads `3` as a number where text is meant, and `3.0` too."""
    kind = getattr(action.type, "__name__", "")  # of `int | None` the type is a function with the name of `int`
    if action.nargs == "+" and value is not None:
        return [_converted(name, part, kind) for part in (value if isinstance(value, list) else [value])]
    if value is None or isinstance(value, (dict, list, str)):
        return value  # argparse reads text as it does on the command line
    return _converted(name, value, kind)


def _converted(name: str, value: Any, kind: str) -> Any:
    if kind != "int":
        return str(value) if kind == "str" else value
    try:
        if int(value) == float(value):
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise LayerPruneError(f"{name}={value} is not a whole number")
