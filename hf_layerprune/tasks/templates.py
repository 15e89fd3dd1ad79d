"""Prompt templates: text with `{column}` fields, and nothing else of Python's format language.

A template comes from outside (a YAML file, a command line). Attribute access, indexing, conversions and format widths
would let it reach into objects or ask for gigabytes, so they are refused when the template is read.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping
from typing import Any

from ..errors import LayerPruneError


class Template:
    """A text with `{column}` fields; `{{` and `}}` are plain braces.

    Args:
        text (`str`): the template.
        task (`str`): what errors call the task it belongs to, e.g. `"task mmlu"`.
        setting (`str`): the task's setting that holds it, e.g. `"prompt"`.
        varies (`bool`, *optional*, defaults to `True`): whether it must have a field, being of no use without one.

    Raises:
        [`LayerPruneError`]: if braces do not match, a field is more than a column name, or there has to be one.
    """

    def __init__(self, text: str, task: str, setting: str, varies: bool = True) -> None:
        self.task, self.setting = task, setting
        what = f"{task}: {setting}"
        self.parts: list[tuple[str, str | None]] = []
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise LayerPruneError(f"{what} {text!r}: {error}; write a plain brace as {{{{ or }}}}") from None
        for literal, field, width, conversion in parsed:
            if field is not None and (not field or width or conversion or set(field) & set(".[]{}")):
                shown = f"{field}{'!' + conversion if conversion else ''}{':' + width if width else ''}"
                raise LayerPruneError(
                    f"{what}: the field {{{shown}}} is not allowed; a field is a column name alone, like {{question}} "
                    "(a column `b` inside a column `a` is {a_b})"
                )
            self.parts.append((literal, field))
        if varies and all(field is None for _, field in self.parts):
            example = text if text.isidentifier() else "question"
            raise LayerPruneError(
                f"{what} {text!r} is the same for every row; a column stands in braces, like {{{example}}}"
            )

    def render(self, values: Mapping[str, Any], where: str) -> str:
        """The text with every field replaced by its value; a list of texts is joined with spaces.

        Raises:
            [`LayerPruneError`]: if a column is missing, empty (null), or holds neither text nor a number.
        """
        where = f"{self.task}: {where}: {self.setting}"
        return "".join(
            literal + ("" if field is None else as_text(values, field, where)) for literal, field in self.parts
        )


def column(values: Mapping[str, Any], name: str, where: str) -> Any:
    """The value of a column, which must be there and neither null nor NaN, which tables hold in place of it."""
    if name not in values:
        known = ", ".join(map(str, values)) or "none"
        raise LayerPruneError(f"{where}: there is no column {name!r}; the columns are {known}")
    if is_missing(values[name]):
        raise LayerPruneError(f"{where}: column {name!r} is empty; give it a value or remove the row")
    return values[name]


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_text(values: Mapping[str, Any], name: str, where: str) -> str:
    """The value of a column as text."""
    value = column(values, name, where)
    if isinstance(value, (list, tuple)) and all(isinstance(part, str) for part in value):
        return " ".join(value)
    if not isinstance(value, (str, int, float)):
        raise LayerPruneError(f"{where}: column {name!r} holds a {type(value).__name__}, not text or a number")
    return str(value)
