"""What all tasks share: where their rows come from, which are scored, and the examples shown before each."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import ClassVar, get_type_hints

from datasets import Dataset
from huggingface_hub.dataclasses import type_validator
from transformers import PreTrainedTokenizerBase

from ..errors import LayerPruneError
from .chunks import Example, PreparedTask, pad_id, scored_chunk, whole_examples
from .rows import FIELD, Row, read_rows, spread


@dataclass(eq=False)
class Task:
    """A representative data set, by whose quality layers are scored.

    Args:
        dataset (`str`, `Path` or [`~datasets.Dataset`]):
            the rows: a data set in memory, a `.jsonl`, `.json`, `.csv`, `.parquet` or `.txt` file, an embedded text
            (`"embedded:calibration"`) or a Hub id.
        name (`str`, *optional*): defaults to the last part of the data set's name, without its file type.
        split (`str`, *optional*, defaults to `"test"`): split of a Hub data set.
        config_name (`str`, *optional*): configuration of a Hub data set.
        limit (`int`, *optional*): most examples, spread evenly over the data; all of them by default.
        weight (`float`, *optional*, defaults to 1.0): weight of this task's cost among others.

    Raises:
        [`LayerPruneError`]: for a setting of the wrong type or out of its range.
    """

    kind: ClassVar[str]
    """What a YAML file calls this kind of task."""
    measure: ClassVar[str] = "accuracy"
    """What its quality is, see [`PreparedTask`]."""
    templates: ClassVar[tuple[str, ...]] = ()
    """Settings that are templates over the columns of a row."""

    dataset: str | Path | Dataset
    _: KW_ONLY
    name: str = ""
    split: str = "test"
    config_name: str | None = None
    limit: int | None = None
    weight: float | int = 1.0

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, list):  # as YAML has it
                value = tuple(value)
                setattr(self, item.name, value)
            try:
                type_validator(item.name, value, hints[item.name])
            except TypeError as error:
                raise LayerPruneError(f"{self.title}: {str(error).partition(' Errors:')[0]}") from None
        if self.limit is not None and self.limit < 1:
            raise LayerPruneError(f"{self.title}: limit={self.limit}; score at least one example, or leave it out")
        if not 0 < self.weight < float("inf"):
            raise LayerPruneError(f"{self.title}: weight={self.weight} must be positive; leave out a task not wanted")
        for setting in self.templates:
            self._check_template(setting)
        self.name = self.name or self.title.removeprefix("task ")

    def _check_template(self, setting: str) -> None:
        text = getattr(self, setting)
        if set(FIELD.sub("", text)) & set("{}"):
            raise LayerPruneError(f"{self.title}: {setting} {text!r} has a brace alone; write it as {{{{ or }}}}")
        if setting != "description" and not any(FIELD.findall(text)):
            example = text if text.isidentifier() else "question"
            raise LayerPruneError(
                f"{self.title}: {setting} {text!r} is the same for every row; write a column in braces: {{{example}}}"
            )

    @property
    def title(self) -> str:
        """What errors call the task."""
        if self.name or not isinstance(self.dataset, (str, Path)):
            return f"task {self.name or self.kind}"
        path = Path(self.dataset)
        return f"task {path.stem if path.suffix else path.name.rpartition(':')[2]}"

    def read(self, dataset: str | Path | Dataset | None = None, split: str | None = None) -> list[Row]:
        """The rows of the task's data set, or of another one."""
        source = self.dataset if dataset is None else dataset
        return read_rows(source, split or self.split, self.config_name, self.title)

    def prepare(
        self, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8, max_length: int | None = None
    ) -> PreparedTask:
        """Read the data and tokenize it.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's own.
            batch_size (`int`, *optional*, defaults to 8):
                rows per chunk; an example of more rows than that makes a larger chunk.
            max_length (`int`, *optional*): T at most; defaults to the tokenizer's `model_max_length`.

        Raises:
            [`LayerPruneError`]: if the data cannot be read or a row does not fit the task; it names file and row.
        """
        examples = self.encode_examples(tokenizer, max_length or tokenizer.model_max_length)
        parts = whole_examples([len(example.rows) for example in examples], batch_size)
        chunks = [scored_chunk(examples[part], pad_id(tokenizer)) for part in parts]
        num_truncated = sum(row.truncated for example in examples for row in example.rows)
        return PreparedTask(self.name, self.weight, self.measure, chunks, num_truncated)

    def encode_examples(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
        """The data as rows of at most `max_length` tokens; what a task implements whose tokens are scored."""
        raise NotImplementedError


@dataclass(eq=False, kw_only=True)
class PromptedTask(Task):
    """A task whose rows are prompts and what should follow them.

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

    def prompt_and_answer(self, row: Row) -> tuple[str, str]:
        """The prompt of a row, and the right continuation."""
        raise NotImplementedError

    def rows_to_score(self) -> list[tuple[Row, str]]:
        """The rows to score, each with the description and examples that precede its own prompt.

        Raises:
            [`LayerPruneError`]: if there are too few rows for the examples asked for, or none is left to score.
        """
        shown, rows = self._few_shot(self.read())
        result = []
        for row in spread(rows, self.limit):
            examples = shown[self._group(row)]
            if len(examples) < self.num_few_shot:
                raise row.error(
                    f"{len(examples)} few-shot examples for it, but num_few_shot={self.num_few_shot}; lower it or "
                    "give more rows"
                )
            result.append((row, row.render(self.description) + "".join(examples)))
        return result

    def _few_shot(self, rows: list[Row]) -> tuple[dict[str, list[str]], list[Row]]:
        """The examples to show, by group, and the rows to score."""
        shown: dict[str, list[str]] = defaultdict(list)
        if self.num_few_shot < 1:
            return shown, rows
        is_file = not isinstance(self.dataset, Dataset) and Path(self.dataset).is_file()  # a file has no splits
        is_own = self.few_shot_dataset is None and (self.few_shot_split is None or is_file)
        left = []
        for row in rows if is_own else self.read(self.few_shot_dataset, self.few_shot_split):
            examples = shown[self._group(row)]
            if len(examples) < self.num_few_shot:
                examples.append("".join(self.prompt_and_answer(row)) + self.separator)
            else:
                left.append(row)
        if is_own and not left:
            raise LayerPruneError(
                f"{self.title}: all {len(rows)} rows are few-shot examples, none is left to score; lower num_few_shot "
                "or name a few_shot_dataset"
            )
        return shown, left if is_own else rows

    def _group(self, row: Row) -> str:
        return "" if self.few_shot_group is None else row.text(self.few_shot_group)


def check_names(tasks: Iterable[Task | PreparedTask]) -> list[Task | PreparedTask]:
    """The tasks as a list; raise [`LayerPruneError`] if there is none, or two have one name."""
    tasks = list(tasks)
    if not tasks:
        raise LayerPruneError("there are no tasks; name at least one")
    for name, count in Counter(task.name for task in tasks).items():
        if count > 1:
            raise LayerPruneError(f"two tasks are named {name!r}; give one of them another `name`")
    return tasks
