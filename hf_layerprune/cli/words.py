"""Words of a command line that belong to no option."""

from __future__ import annotations

import math
from collections.abc import Sequence


def split_words(
    argv: Sequence[str], flags: Sequence[str] = (), lists: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """The words that belong to no option, and the rest.

    Args:
        argv (`Sequence[str]`): the command line.
        flags (`Sequence[str]`, *optional*): options that may stand without a word behind them.
        lists (`Sequence[str]`, *optional*): options that take any number of words.
    """
    words: list[str] = []
    rest: list[str] = []
    room = 0.0  # words the last option still takes
    for argument in argv:
        if argument.startswith("-"):
            rest.append(argument)
            room = 0 if "=" in argument else math.inf if argument in lists else 1
        elif room and not (rest[-1] in flags and argument.lower() not in ("true", "false")):
            rest.append(argument)
            room -= 1
        else:
            words.append(argument)
            room = 0
    return words, rest
