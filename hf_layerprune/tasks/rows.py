"""Rows of a data set, and templates over their columns."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data import load_text_dataset
from ..errors import LayerPruneError

FIELD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
"""A column in a template, such as `{question}`, or a plain brace, which is written twice."""


@dataclass(frozen=True)
class Row:
    """One row of a data set.

    Attributes:
        values (`dict[str, Any]`): the columns; a column `b` inside a column `a` is also there as `a_b`.
        where (`str`): the task, the data set and the row, counted from 1; errors begin with it.
    """

    values: dict[str, Any]
    where: str

    def error(self, message: str) -> LayerPruneError:
        """An error that names this row."""
        return LayerPruneError(f"{self.where}: {message}")

    def column(self, name: str) -> Any:
        """The value of a column.

        Raises:
            [`LayerPruneError`]: if there is no such column, or it is empty here (null or NaN).
        """
        if name not in self.values:
            raise self.error(f"there is no column {name!r}; the columns are {', '.join(map(str, self.values))}")
        if is_missing(self.values[name]):
            raise self.error(f"column {name!r} is empty; give it a value or remove the row")
        return self.values[name]

    def text(self, name: str) -> str:
        """A column as text; a list of texts is joined with spaces."""
        value = self.column(name)
        if isinstance(value, (list, tuple)) and all(isinstance(part, str) for part in value):
            return " ".join(value)
        if not isinstance(value, (str, int, float)):
            raise self.error(f"column {name!r} holds a {type(value).__name__}; it must hold text or a number")
        return str(value)

    def render(self, template: str, **more: str) -> str:
        """A template with this row's columns, and `more` of them, in place of its fields."""
        row = replace(self, values=self.values | more)
        return FIELD.sub(lambda match: row.text(match[1]) if match[1] else match[0][0], template)


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def read_rows(source: str | Path | Dataset, split: str, config_name: str | None, title: str) -> list[Row]:
    """All rows of a data set, or of what [`load_text_dataset`] finds under a name; errors begin with `title`.

    Raises:
        [`LayerPruneError`]: if the source cannot be read, a row is malformed, or there is no row.
    """
    name = "the given data set" if isinstance(source, Dataset) else str(source)
    try:
        dataset = source if isinstance(source, Dataset) else _load(name, split, config_name)
    except LayerPruneError as error:
        raise LayerPruneError(f"{title}: {error}") from error.__cause__
    except (OSError, ValueError) as error:
        raise LayerPruneError(f"{title}: dataset {name} cannot be read: {error}") from error
    rows = []
    for number, values in enumerate(dataset, 1):
        where = f"{title}: {name}, row {number}"
        if not isinstance(values, Mapping):
            raise LayerPruneError(f"{where} holds a {type(values).__name__}; write an object with named columns")
        if None in values:
            raise LayerPruneError(f"{where} has more cells than the first line; quote cells that hold commas")
        rows.append(Row(_inner_columns(values) | dict(values), where))
    if not rows:
        raise LayerPruneError(f"{title}: dataset {name} is empty; give at least one row")
    return rows


def _inner_columns(values: Mapping[str, Any]) -> dict[str, Any]:
    nested = {name: value for name, value in values.items() if isinstance(value, Mapping)}
    return {f"{name}_{key}": part for name, value in nested.items() for key, part in value.items()}


def _load(source: str, split: str, config_name: str | None) -> Iterable[Any]:
    """The rows under a name. JSON and CSV files are read as they are: `datasets` wants one type for each column of
    JSON, and makes 3.1 of a cell "3.10" and null of a cell "NA"."""
    path = Path(source)
    if not path.is_file() or path.suffix not in (".json", ".jsonl", ".csv"):
        return load_text_dataset(source, split, config_name)
    text = path.read_bytes().decode("utf-8-sig")
    if path.suffix == ".csv":
        return _csv_rows(text)
    return json.loads(text) if text.lstrip().startswith("[") else _json_lines(text)


def _json_lines(text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return rows


def _csv_rows(text: str) -> list[dict[str, str]]:
    limit = csv.field_size_limit(2**31 - 1)  # Python's own is less than a chapter
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        return list(reader)
    except csv.Error as error:
        raise ValueError(f"after line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(limit)


def spread(rows: Sequence[Row], limit: int | None) -> Sequence[Row]:
    """At most `limit` rows, evenly over all of them: files are often sorted by subject."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[number * len(rows) // limit] for number in range(limit)]
