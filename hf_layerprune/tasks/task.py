"""What all tasks share: where their rows come from, which are scored, and the examples shown before each."""

from __future__ import annotations

import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import LayerPruneError
from .chunks import PreparedTask
from .sources import Row, read_rows
from .templates import Template, as_text


@dataclass(eq=False)
class Task(ABC):
    """A representative data set, by whose quality layers are scored.

    Args:
        dataset (`str`, `Path` or [`~datasets.Dataset`]):
            the rows: a data set in memory, a `.jsonl`, `.json`, `.csv`, `.parquet` or `.txt` file, an embedded text
            (`"embedded:calibration"`) or a Hub id.
        name (`str`, *optional*): defaults to the last part of the data set's name, without its file type.
        split (`str`, *optional*, defaults to `"test"`): split of a Hub data set.
        config_name (`str`, *optional*): configuration of a Hub data set.
        limit (`int`, *optional*): examples at most, spread evenly over the data; all of them by default.
        weight (`float`, *optional*, defaults to 1.0): weight of this task's cost among others.

    Raises:
        [`LayerPruneError`]: for a setting of the wrong type or out of its range.
    """

    kind: ClassVar[str]
    templates: ClassVar[tuple[str, ...]] = ()
    """Settings that are templates over the columns of a row."""

    dataset: str | Path | Dataset
    _: KW_ONLY
    name: str = ""
    split: str = "test"
    config_name: str | None = None
    limit: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        is_named = isinstance(self.dataset, (str, Path))
        self.name = self.name or (default_name(str(self.dataset)) if is_named else self.kind)
        check_types(self)
        if self.limit is not None and self.limit < 1:
            raise LayerPruneError(f"{self.title}: limit={self.limit}; score at least one example, or leave it out")
        if not 0 < self.weight < float("inf"):
            raise LayerPruneError(f"{self.title}: weight={self.weight} must be positive; leave out a task not wanted")
        for setting in self.templates:
            self.template(setting)

    @property
    def title(self) -> str:
        """What errors call the task."""
        return f"task {self.name or self.kind}"

    @abstractmethod
    def prepare(
        self, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8, max_length: int | None = None
    ) -> PreparedTask:
        """Read the data and tokenize it.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's own.
            batch_size (`int`, *optional*, defaults to 8):
                rows per chunk; an example of more rows than that makes a larger chunk.
            max_length (`int`, *optional*): T at most; defaults to what the tokenizer names.

        Raises:
            [`LayerPruneError`]: if the data cannot be read or a row does not fit the task; it names file and line.
        """

    def read(self, dataset: str | Path | Dataset | None = None, split: str | None = None) -> list[Row]:
        """The rows of the task's data set, or of another one; errors name the task."""
        try:
            return read_rows(self.dataset if dataset is None else dataset, split or self.split, self.config_name)
        except LayerPruneError as error:
            raise LayerPruneError(f"{self.title}: {error}") from error.__cause__

    def template(self, setting: str) -> Template:
        """A setting of this task as a template."""
        return Template(getattr(self, setting), self.title, setting, varies=setting != "description")


def default_name(dataset: str) -> str:
    """The last part of a data set's name."""
    return Path(dataset).stem if Path(dataset).suffix else dataset.replace(":", "/").rstrip("/").rpartition("/")[2]


def check_types(task: Any) -> None:
    """Raise [`LayerPruneError`] for a field whose value is not of its declared type; lists become tuples, and paths
    texts."""
    hints = typing.get_type_hints(type(task))
    for item in fields(task):
        value, hint = getattr(task, item.name), hints[item.name]
        if isinstance(value, (list, Path)):
            value = tuple(value) if isinstance(value, list) else str(value)
            setattr(task, item.name, value)
        if not _fits(value, hint):
            shown = getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)
            shown = shown.replace("typing.", "").replace("None", "nothing")
            raise LayerPruneError(f"{task.title}: {item.name}={value!r} must be {shown}")


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(part, typing.get_args(hint)[0]) for part in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def spread(rows: Sequence[Row], limit: int | None) -> Sequence[Row]:
    """At most `limit` rows, evenly over all of them: files are often sorted by subject."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[number * len(rows) // limit] for number in range(limit)]


@dataclass(eq=False, kw_only=True)
class PromptedTask(Task):
    """A task whose every row makes a prompt and what should follow it.

    Args:
        prompt (`str`): template of the prompt over the row's columns, e.g. `"Question: {question}\\nAnswer:"`.
        description (`str`, *optional*, defaults to `""`): template of a text before everything else.
        num_few_shot (`int`, *optional*, defaults to 0):
            examples with their answers before each prompt: the first rows of the data, which are then not scored.
        few_shot_dataset (`str`, `Path` or [`~datasets.Dataset`], *optional*): take the examples from here instead.
        few_shot_split (`str`, *optional*): take the examples from this split of the Hub data set instead.
        few_shot_group (`str`, *optional*): a column (MMLU's subject); a row is shown examples of the same value.
        separator (`str`, *optional*, defaults to an empty line): between examples, and before the prompt.
    """

    templates: ClassVar[tuple[str, ...]] = ("prompt", "description")

    prompt: str = "{prompt}"
    description: str = ""
    num_few_shot: int = 0
    few_shot_dataset: str | Path | Dataset | None = None
    few_shot_split: str | None = None
    few_shot_group: str | None = None
    separator: str = "\n\n"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_few_shot < 0:
            raise LayerPruneError(f"{self.title}: num_few_shot={self.num_few_shot} must not be negative")

    @abstractmethod
    def prompt_and_answer(self, row: Row) -> tuple[str, str]:
        """The prompt of a row, and the right continuation."""

    def examples(self) -> list[tuple[Row, str]]:
        """The rows to score, each with the text that stands before its own prompt.

        Raises:
            [`LayerPruneError`]: if there are too few rows for the examples asked for, or none is left to score.
        """
        rows = self.read()
        if self.num_few_shot == 0:
            return [(row, self._opening(row)) for row in spread(rows, self.limit)]
        is_file = isinstance(self.dataset, str) and Path(self.dataset).is_file()
        own = self.few_shot_dataset is None and (self.few_shot_split is None or is_file)
        scored, shown = [], {}
        for row in rows if own else self.read(self.few_shot_dataset, self.few_shot_split):
            group = shown.setdefault(self._group(row), [])
            if len(group) < self.num_few_shot:
                group.append("".join(self.prompt_and_answer(row)) + self.separator)
            else:
                scored.append(row)
        if own and not scored:
            raise LayerPruneError(
                f"{self.title}: all {len(rows)} rows are few-shot examples, none is left to score; lower num_few_shot "
                "or name a few_shot_dataset"
            )
        result = []
        for row in spread(scored if own else rows, self.limit):
            group = shown.get(self._group(row), [])
            if len(group) < self.num_few_shot:
                raise LayerPruneError(
                    f"{self.title}: {row.where}: {len(group)} few-shot examples for it, but "
                    f"num_few_shot={self.num_few_shot}; lower it or give more rows"
                )
            result.append((row, self._opening(row) + "".join(group)))
        return result

    def _group(self, row: Row) -> str:
        return (
            ""
            if self.few_shot_group is None
            else as_text(row.values, self.few_shot_group, f"{self.title}: {row.where}")
        )

    def _opening(self, row: Row) -> str:
        return self.template("description").render(row.values, row.where)
