"""Rows of a data set, each knowing where it stands, so that an error can name the file and the line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data import load_text_dataset
from ..errors import LayerPruneError


@dataclass(frozen=True)
class Row:
    """
    Attributes:
        values (`dict[str, Any]`): the columns; those inside a column `a` stand beside it as `a_b`.
        where (`str`): what errors call the row: the file and its line, counted from 1.
    """

    values: dict[str, Any]
    where: str


def read_rows(source: str | Dataset, split: str, config_name: str | None) -> list[Row]:
    """All rows of a [`~datasets.Dataset`], of a local `.jsonl`, `.json`, `.csv`, `.parquet` or `.txt` file, of an
    embedded text (`"embedded:..."`) or of a Hub data set.

    JSON and CSV files are read here and not by `datasets`, which names no line and wants one type per column.

    Raises:
        [`LayerPruneError`]: if the source cannot be read, a row is malformed, or there is no row.
    """
    path = None if isinstance(source, Dataset) else Path(source)
    if path is not None and path.is_file() and path.suffix in READERS:
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = [Row(flat(values), f"{path}, {where}") for values, where in READERS[path.suffix](file)]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise LayerPruneError(f"dataset {path} cannot be read as UTF-8 {path.suffix[1:]}: {error}") from error
    else:
        dataset = source if isinstance(source, Dataset) else load_text_dataset(source, split, config_name)
        name = "the given dataset" if isinstance(source, Dataset) else f"dataset {source}"
        rows = [Row(flat(values), f"{name}, row {number}") for number, values in enumerate(dataset, 1)]
    if not rows:
        raise LayerPruneError(f"dataset {'' if path is None else path} is empty; give at least one row")
    return rows


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The columns, and those inside a column `a` beside it as `a_b`."""
    inner = {
        f"{name}_{key}": part
        for name, value in values.items()
        if isinstance(value, Mapping)
        for key, part in value.items()
    }
    return inner | dict(values)


def _json_rows(file: Any) -> Iterator[tuple[dict[str, Any], str]]:
    start = file.read(1)
    while start.isspace():
        start = file.read(1)
    file.seek(0)
    if start == "[":
        try:
            values = json.load(file)
        except ValueError as error:
            raise LayerPruneError(f"{file.name} is no JSON: {error}; mend the file") from None
        for number, row in enumerate(values, 1):
            yield _checked(row, file.name, f"row {number}"), f"row {number}"
        return
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise LayerPruneError(
                f"{file.name}, line {number} is no JSON: {error}; write one object a line, like "
                '{"question": ..., "answer": ...}'
            ) from None
        yield _checked(row, file.name, f"line {number}"), f"line {number}"


def _checked(row: Any, name: str, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise LayerPruneError(f"{name}, {where} holds a {type(row).__name__}; write an object with named columns")
    return row


def _csv_rows(file: Any) -> Iterator[tuple[dict[str, Any], str]]:
    reader = csv.DictReader(file, strict=True)
    for row in reader:
        where = f"line {reader.line_num}"
        if None in row or None in row.values():
            count = sum(value is not None for name, value in row.items() if name is not None) + len(row.get(None, []))
            raise LayerPruneError(
                f"{file.name}, {where} has {count} cells, but the first line names {len(reader.fieldnames or [])} "
                "columns; quote cells that hold commas"
            )
        yield row, where


READERS = {".json": _json_rows, ".jsonl": _json_rows, ".csv": _csv_rows}
