"""Rows of a data set, each knowing where it stands, so that an error can name the file and the line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data import load_text_dataset
from ..errors import LayerPruneError

MAX_CELL = 2**31 - 1  # characters of a CSV cell; Python's own limit of 131,072 is less than a chapter


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
        rows = [Row(flat(values), f"{path}, {where}") for values, where in READERS[path.suffix](_text(path), path)]
    else:
        dataset = source if isinstance(source, Dataset) else load_text_dataset(source, split, config_name)
        name = "the given dataset" if isinstance(source, Dataset) else f"dataset {source}"
        rows = [Row(flat(values), f"{name}, row {number}") for number, values in enumerate(dataset, 1)]
    if not rows:
        raise LayerPruneError(f"dataset {'' if path is None else path} is empty; give at least one row")
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise LayerPruneError(f"dataset {path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise LayerPruneError(f"{path}, line {line} is no UTF-8: {error.reason}; save the file as UTF-8") from None


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The columns, and those inside a column `a` beside it as `a_b`."""
    inner = {
        f"{name}_{key}": part
        for name, value in values.items()
        if isinstance(value, Mapping)
        for key, part in value.items()
    }
    return inner | dict(values)


def _json_rows(text: str, path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except ValueError as error:
            raise LayerPruneError(f"{path} is no JSON: {error}; mend the file") from None
        for number, row in enumerate(values, 1):
            yield _checked(row, path, f"row {number}"), f"row {number}"
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise LayerPruneError(
                f"{path}, line {number} is no JSON: {error}; write one object a line, like "
                '{"question": ..., "answer": ...}'
            ) from None
        yield _checked(row, path, f"line {number}"), f"line {number}"


def _checked(row: Any, path: Path, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise LayerPruneError(f"{path}, {where} holds a {type(row).__name__}; write an object with named columns")
    return row


def _csv_rows(text: str, path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """A row is named by the line it starts on; a cell may hold line breaks."""
    limit = csv.field_size_limit(MAX_CELL)
    names, start = None, 1
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        for cells in reader:
            where, start = f"line {start}", reader.line_num + 1
            if not cells:
                continue
            if names is None:
                names = cells
            elif len(cells) == len(names):
                yield dict(zip(names, cells, strict=True)), where
            else:
                raise LayerPruneError(
                    f"{path}, {where} has {len(cells)} cells, but the first line names {len(names)} columns; quote "
                    "cells that hold commas"
                )
    except csv.Error as error:
        raise LayerPruneError(
            f"{path}, the row that starts on line {start} is no CSV: {error}; write quotes in a cell twice, and one "
            "pair around it"
        ) from None
    finally:
        csv.field_size_limit(limit)


READERS = {".json": _json_rows, ".jsonl": _json_rows, ".csv": _csv_rows}
