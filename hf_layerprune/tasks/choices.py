"""Tasks answered by comparing likelihoods: multiple choice and minimal pairs."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import LayerPruneError
from .chunks import ChoiceChunk, PreparedTask, filled
from .encoding import Encoded, encode, length_limit, pad_id, right_padded
from .sources import Row
from .task import PromptedTask, Task, spread
from .templates import as_text, column, is_missing

LETTERS = string.ascii_uppercase


def choice_task(
    task: Task,
    examples: list[tuple[list[Encoded], int, list[float]]],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> PreparedTask:
    """The examples (rows, right row, divisors) of a task in chunks."""
    chunks = []
    for part in filled([len(rows) for rows, _, _ in examples], batch_size):
        rows = [row for rows, _, _ in examples[part] for row in rows]
        divisors = [value for _, _, values in examples[part] for value in values]
        chunks.append(
            ChoiceChunk(
                right_padded(rows, pad_id(tokenizer)),
                sizes=tuple(len(rows) for rows, _, _ in examples[part]),
                answers=tuple(answer for _, answer, _ in examples[part]),
                divisors=torch.tensor(divisors, dtype=torch.float64),
            )
        )
    truncated = sum(row.truncated for rows, _, _ in examples for row in rows)
    return PreparedTask(task.name, task.weight, "nll", "accuracy", chunks, truncated)


@dataclass(eq=False, kw_only=True)
class MultipleChoiceTask(PromptedTask):
    """Which of several continuations is the likeliest; the cost of an example is 1 where it is not the right one.

    Two fields more than the columns may stand in `prompt`: `{lettered_choices}`, the choices as lines `A. ...`; and in
    `choice`: `{choice}`, its text, and `{letter}`, its letter. MMLU compares letters: `prompt="{question}\\n
    {lettered_choices}\\nAnswer:"`, `choice=" {letter}"`.

    Args:
        choices (`str` or `tuple[str, ...]`, *optional*, defaults to `"choices"`):
            a column that holds a list (or, as in CommonsenseQA, lists `text` and `label`), or one column per choice.
        answer (`str`, *optional*, defaults to `"answer"`): the column of the right choice.
        answer_form (`str`, *optional*, defaults to `"auto"`):
            what stands there: an `"index"` from 0, a `"letter"` (or the row's own label), the choice's `"text"`, or
            whichever of them it can only be.
        choice (`str`, *optional*, defaults to `" {choice}"`): template of what is scored behind the prompt.
        normalize (`str`, *optional*, defaults to `"none"`):
            what a log-likelihood is divided by before they are compared: nothing, its `"tokens"` or its `"bytes"`.
    """

    kind: ClassVar[str] = "multiple_choice"
    templates: ClassVar[tuple[str, ...]] = (*PromptedTask.templates, "choice")

    prompt: str = "{question}"
    choices: str | tuple[str, ...] = "choices"
    answer: str = "answer"
    answer_form: Literal["auto", "index", "letter", "text"] = "auto"
    choice: str = " {choice}"
    normalize: Literal["none", "tokens", "bytes"] = "none"

    def prepare(
        self, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8, max_length: int | None = None
    ) -> PreparedTask:
        limit, examples = length_limit(tokenizer, max_length), []
        for row, opening in self.examples():
            prompt, texts, answer = self._parts(row)
            where = f"{self.title}: {row.where}"
            rows = [encode(tokenizer, opening + prompt, text, limit, where) for text in texts]
            divisors = {
                "none": [1.0] * len(rows),
                "tokens": [float(len(encoded.ids) - encoded.start) for encoded in rows],
                "bytes": [float(len(text.strip().encode()) or 1) for text in texts],
            }
            examples.append((rows, answer, divisors[self.normalize]))
        return choice_task(self, examples, tokenizer, batch_size)

    def prompt_and_answer(self, row: Row) -> tuple[str, str]:
        prompt, texts, answer = self._parts(row)
        return prompt, texts[answer]

    def _parts(self, row: Row) -> tuple[str, list[str], int]:
        """The prompt, the continuation of each choice, and which of them is right."""
        where = f"{self.title}: {row.where}"
        texts, labels = self._choices(row, where)
        lettered = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
        prompt = self.template("prompt").render(row.values | {"lettered_choices": lettered}, row.where)
        choice = self.template("choice")
        continuations = [
            choice.render(row.values | {"choice": text, "letter": label}, row.where)
            for label, text in zip(labels, texts, strict=True)
        ]
        return prompt, continuations, self._answer(row, texts, labels, where)

    def _choices(self, row: Row, where: str) -> tuple[list[str], list[str]]:
        labels: Any = []
        if isinstance(self.choices, tuple):
            texts: Any = [as_text(row.values, name, where) for name in self.choices]
        else:
            texts = column(row.values, self.choices, where)
            if isinstance(texts, Mapping):
                labels, texts = texts.get("label") or [], texts.get("text")
        if not isinstance(labels, list):
            raise LayerPruneError(f"{where}: column {self.choices!r}: 'label' holds {labels!r:.60}, not a list")
        if (
            not isinstance(texts, list)
            or len(texts) < 2
            or not all(isinstance(text, (str, int, float)) for text in texts)
        ):
            raise LayerPruneError(
                f"{where}: column {self.choices!r} must hold a list of two or more choices, not {str(texts)[:60]!r}; "
                "or name one column per choice"
            )
        for number, text in enumerate(texts, 1):
            if is_missing(text) or not str(text).strip():
                raise LayerPruneError(f"{where}: choice {number} is empty; give it a text or remove the row")
        if len(texts) > len(LETTERS) or len(labels) not in (0, len(texts)):
            raise LayerPruneError(f"{where}: {len(texts)} choices, {len(labels)} labels; give 26 choices at most")
        return [str(text) for text in texts], list(map(str, labels)) or list(LETTERS[: len(texts)])

    def _answer(self, row: Row, texts: list[str], labels: list[str], where: str) -> int:
        """The right choice's place."""
        value = column(row.values, self.answer, where)
        shown = str(value).strip()
        found: dict[str, int] = {}
        if isinstance(value, int) or shown.isdecimal():
            found["index"] = int(value)
        if shown.upper() in labels:
            found["letter"] = labels.index(shown.upper())
        elif len(shown) == 1 and shown.upper() in LETTERS:
            found["letter"] = LETTERS.index(shown.upper())
        if texts.count(str(value)) == 1:
            found["text"] = texts.index(str(value))
        if isinstance(value, int):
            found = {"index": value} if self.answer_form == "auto" else found
        if self.answer_form != "auto":
            found = {form: place for form, place in found.items() if form == self.answer_form}
        inside = {place for place in found.values() if 0 <= place < len(texts)}
        if len(inside) > 1:
            raise LayerPruneError(
                f"{where}: answer {value!r} can be read as {' or '.join(found)}; set answer_form to one of them"
            )
        if not inside:
            raise LayerPruneError(
                f"{where}: answer {value!r} is none of the {len(texts)} choices; give an index 0..{len(texts) - 1}, a "
                f"letter {labels[0]}..{labels[-1]}, or a choice's text"
            )
        return inside.pop()


@dataclass(eq=False, kw_only=True)
class MinimalPairsTask(Task):
    """Which of two sentences is the likelier one, by the sum over their tokens, as in
    [BLiMP](https://huggingface.co/papers/1912.00582); the cost of a pair is 1 where the bad one is as likely.

    Args:
        good (`str`, *optional*, defaults to `"sentence_good"`): column of the sentence that should be likelier.
        bad (`str`, *optional*, defaults to `"sentence_bad"`): column of the other.
    """

    kind: ClassVar[str] = "minimal_pairs"

    good: str = "sentence_good"
    bad: str = "sentence_bad"

    def prepare(
        self, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8, max_length: int | None = None
    ) -> PreparedTask:
        limit, examples = length_limit(tokenizer, max_length), []
        for row in spread(self.read(), self.limit):
            where = f"{self.title}: {row.where}"
            pair = [
                encode(tokenizer, "", as_text(row.values, name, where), limit, where) for name in (self.good, self.bad)
            ]
            examples.append((pair, 0, [1.0, 1.0]))
        return choice_task(self, examples, tokenizer, batch_size)
