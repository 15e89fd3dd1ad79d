"""What all tasks share: where their rows come from, which are scored, and the examples shown before each."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from datasets import Dataset
from huggingface_hub.dataclasses import type_validator
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..data import is_one_split, load_text_dataset, may_have, pad_id
from ..errors import LayerPruneError, located
from ..settings import check_at_least
from .chunks import Chunk, Encoded, Example, PreparedTask, TokenChunk, batched, encode, scored

logger = logging.get_logger(__name__)

FIELD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
"""A column in a template, such as `{question}`, or a plain brace, which is written twice."""

Row = dict[str, Any]
"""The columns of a row; a column `b` inside a column `a` is called `a.b`."""


@dataclass(eq=False)
class Task:
    """A representative data set, by whose quality layers are scored.

    Args:
        dataset (`str`, `Path` or [`~datasets.Dataset`]):
            the rows: a data set in memory, or a file, folder, embedded text or Hub id, see [`load_text_dataset`].
        name (`str`, *optional*): defaults to the last part of the data set's name, without its file type.
        limit (`int`, *optional*): most examples, spread evenly over the data; all of them by default.
        weight (`float`, *optional*, defaults to 1.0): weight of this task's cost among others.

    Raises:
        [`LayerPruneError`]: for a setting that cannot work; `TypeError` for one of the wrong type.
    """

    kind: ClassVar[str]
    """What a YAML file calls this kind of task."""
    measure: ClassVar[str] = "accuracy"
    """What its quality is, see [`PreparedTask`]."""

    dataset: str | Path | Dataset
    _: KW_ONLY
    name: str = ""
    limit: int | None = None
    weight: float | int = 1.0

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):
            value = getattr(self, item.name)
            value = tuple(value) if isinstance(value, list) else value  # as YAML has it
            type_validator(item.name, value, hints[item.name])
            setattr(self, item.name, value)
        self.name = self.name or (self.kind if isinstance(self.dataset, Dataset) else Path(self.dataset).stem)
        with located(f"task {self.name}"):
            least = {"limit": 1, "weight": 0.0, "num_few_shot": 0, "max_length": 2, "max_new_tokens": 1}
            check_at_least(self, least)
            if not self.weight:
                raise LayerPruneError("weight=0 leaves the task without effect; leave the task out")

    def prepare(
        self, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8, max_length: int | None = None
    ) -> PreparedTask:
        """Read the data and tokenize it with the model's tokenizer.

        A chunk has `batch_size` rows (more for an example that has more) of at most `max_length` tokens, by default
        the tokenizer's `model_max_length`.

        Raises:
            [`LayerPruneError`]: if the data cannot be read, or a row does not fit the task; it names the row.
        """
        with located(f"task {self.name}"):
            chunks = self.chunks(tokenizer, batch_size, max_length or tokenizer.model_max_length)
        return PreparedTask(self.name, self.weight, self.measure, chunks)

    def chunks(self, tokenizer: PreTrainedTokenizerBase, batch_size: int, max_length: int) -> list[Chunk]:
        """The data as batches of rows of at most `max_length` tokens."""
        raise NotImplementedError


@dataclass(eq=False, kw_only=True)
class PromptedTask(Task):
    """A task whose rows are prompts and what may follow them.

    Args:
        prompt (`str`): template of the prompt over the row's columns, e.g. `"Question: {question}\\nAnswer:"`.
        description (`str`, *optional*, defaults to `""`): template of a text before everything else.
        split (`str`, *optional*, defaults to `"test"`): split of a data set that has some, or slices.
        config_name (`str`, *optional*): configuration of a Hub data set.
        num_few_shot (`int`, *optional*, defaults to 0):
            examples with their answers before each prompt: the first rows of the data, which are then not scored.
        few_shot_split (`str`, *optional*): take the examples from this split instead, if the data set has splits.
        few_shot_group (`str`, *optional*): a column (MMLU's subject); a row is shown examples of the same value.
    """

    templates: ClassVar[tuple[str, ...]] = ()
    """Settings that must name a column in braces."""

    prompt: str = ""
    description: str = ""
    split: str = "test"
    config_name: str | None = None
    num_few_shot: int = 0
    few_shot_split: str | None = None
    few_shot_group: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config_name is not None and (isinstance(self.dataset, Dataset) or is_one_split(str(self.dataset))):
            raise LayerPruneError(
                f"task {self.name}: config_name={self.config_name!r}, but its data has no configurations; leave it out"
            )
        for name in ("prompt", "description", *self.templates):
            if re.search("[{}]", FIELD.sub("", text := getattr(self, name))):
                raise LayerPruneError(
                    f"task {self.name}: {name} {text!r} has a brace that is not closed or holds no column; write a "
                    "plain brace twice"
                )
            if name in self.templates and not any(FIELD.findall(text)):
                raise LayerPruneError(f"task {self.name}: {name} {text!r} must name a column in braces: {{column}}")

    def ask(self, row: Row) -> tuple[str, list[str], int]:
        """The prompt of a row, what may follow it, and the index of what should."""
        raise NotImplementedError

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, prompt: str, texts: list[str], max_length: int
    ) -> list[Encoded]:
        """What a model reads: by default the prompt with each of the texts, whose tokens are scored."""
        return [encode(tokenizer, prompt, text, max_length) for text in texts]

    def chunk(self, examples: Sequence[Example], padding: int) -> Chunk:
        """Put examples into a batch."""
        return TokenChunk(scored(examples, padding))

    def chunks(self, tokenizer: PreTrainedTokenizerBase, batch_size: int, max_length: int) -> list[Chunk]:
        examples = self.examples(tokenizer, max_length)
        if not examples:
            raise LayerPruneError("there is nothing to score; give more rows, or lower num_few_shot")
        if cut := sum(row.truncated for example in examples for row in example.rows):
            logger.warning(f"task {self.name}: prompts too long for the model lost their beginning ({cut:,})")
        return [self.chunk(part, pad_id(tokenizer)) for part in batched(examples, batch_size)]

    def examples(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
        """The rows to score, in rows of at most `max_length` tokens."""
        rows, other, dataset = self.read(self.split), self.few_shot_split, self.dataset
        if other is None or isinstance(dataset, Dataset) or not (may_have(str(dataset), other) or "[" in other):
            shown, rows = self._few_shot(rows)
        else:
            shown, _ = self._few_shot(self.read(other))
        count, examples = min(len(rows), self.limit or len(rows)), []
        for number, row in (rows[n * len(rows) // count] for n in range(count)):  # files are often sorted by subject
            with located(f"row {number}"):
                before = shown[self._group(row)]
                if len(before) < self.num_few_shot:
                    raise LayerPruneError(f"num_few_shot={self.num_few_shot} but there are {len(before)} examples")
                prompt, texts, answer = self.ask(row)
                prompt = render(self.description, row) + "".join(before) + prompt
                examples.append(Example(self.encode(tokenizer, prompt, texts, max_length), texts, answer))
        return examples

    def read(self, split: str) -> list[tuple[int, Row]]:
        """The rows, numbered from 1."""
        dataset = self.dataset
        if not isinstance(dataset, Dataset):
            dataset = load_text_dataset(str(dataset), split, self.config_name)
        return list(enumerate(dataset.flatten(), 1))

    def _few_shot(self, rows: list[tuple[int, Row]]) -> tuple[dict[str, list[str]], list[tuple[int, Row]]]:
        """The first rows of each group as texts to show, and the other rows."""
        shown, others = defaultdict(list), []
        for number, row in rows:
            with located(f"row {number}"):
                examples = shown[self._group(row)]
                if len(examples) == self.num_few_shot:
                    others.append((number, row))
                    continue
                prompt, texts, answer = self.ask(row)
                examples.append(f"{prompt}{texts[answer]}\n\n")
        return shown, others

    def _group(self, row: Row) -> str:
        return "" if self.few_shot_group is None else str(cell(row, self.few_shot_group))


def cell(row: Row, name: str) -> Any:
    """The value of a column; raise [`LayerPruneError`] if there is none."""
    if name not in row:
        raise LayerPruneError(f"there is no column {name!r}; the columns are {', '.join(row)}")
    value = row[name]
    if value is None or isinstance(value, list) and None in value:
        what = "is empty" if value is None else f"holds an empty item, {value!r:.60}"
        raise LayerPruneError(f"column {name!r} {what}; give it a value or remove the row")
    return value


def render(template: str, row: Row) -> str:
    """Put a row's columns into a template; a list of texts is joined with spaces."""

    def text(match: re.Match[str]) -> str:
        value = match[0][0] if match[1] is None else cell(row, match[1])
        return " ".join(value) if isinstance(value, list) else str(value)

    return FIELD.sub(text, template)
