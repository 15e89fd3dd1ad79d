"""The kinds of tasks: running text, choices by likelihood, and text that the model writes."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers import PreTrainedTokenizerBase

from ..errors import LayerPruneError
from .chunks import (
    ChoiceChunk,
    Chunk,
    Encoded,
    Example,
    GenerationChunk,
    answer_part,
    check_metric,
    encode_prompt,
    padded,
    scored,
)
from .task import PromptedTask, Row, cell, located, render


@dataclass(eq=False, kw_only=True)
class PerplexityTask(PromptedTask):
    """Nats per token of text; the cost is weighted by tokens.

    Without a prompt, texts are joined end to end, an end token after each, and cut into windows of `max_length`
    tokens, each of which is an example; the last, shorter one counts too. `limit` is then the number of windows, taken
    from the beginning of the data. With a prompt, each row is an example, of which only the text is scored.

    Args:
        text (`str`, *optional*, defaults to `"{text}"`): template of a text over the row's columns.
        max_length (`int`, *optional*, defaults to 512): T, tokens per window.
    """

    kind: ClassVar[str] = "perplexity"
    templates: ClassVar[tuple[str, ...]] = ("text",)
    measure: ClassVar[str] = "perplexity"

    text: str = "{text}"
    max_length: int = 512

    def ask(self, row: Row) -> tuple[str, list[str], int]:
        return render(self.prompt, row), [render(self.text, row)], 0

    def examples(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
        if self.prompt:
            return super().examples(tokenizer, max_length)
        length = min(self.max_length, max_length)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids: list[int] = []
        for number, row in self.read(self.split):
            with located(f"row {number}"):
                ids += tokenizer(render(self.text, row))["input_ids"] + end
            if self.limit is not None and len(ids) >= self.limit * length:
                ids = ids[: self.limit * length]
                break
        return [Example([Encoded(ids[start : start + length], 1)]) for start in range(0, len(ids) - 1, length)]


@dataclass(eq=False, kw_only=True)
class KLTask(PerplexityTask):
    """KL(teacher || model) of the next-token distributions over text, nats per token; settings as in
    [`PerplexityTask`]."""

    kind: ClassVar[str] = "kl"
    measure: ClassVar[str] = "kl"


@dataclass(eq=False, kw_only=True)
class MultipleChoiceTask(PromptedTask):
    """Which of several continuations is the likeliest; the cost of an example is 1 if it is not the right one.

    Two fields may stand in templates next to the columns. In `prompt`: `{lettered_choices}`, the choices as lines
    `A. ...`. In `choice`: `{choice}`, its text, and `{letter}`, its letter. MMLU compares letters:
    `prompt="{question}\\n{lettered_choices}\\nAnswer:"`, `choice=" {letter}"`.
    [BLiMP](https://huggingface.co/papers/1912.00582) compares sentences: `prompt=""`, `choice="{choice}"`,
    `choices=("sentence_good", "sentence_bad")`, `answer="sentence_good"`.

    Args:
        choices (`str` or `tuple[str, ...]`, *optional*, defaults to `"choices"`):
            a column that holds a list, or one column per choice.
        labels (`str`, *optional*): a column that holds the letters of the choices; A, B, C, ... by default.
        answer (`str`, *optional*, defaults to `"answer"`):
            one of the columns of `choices`, or a column that holds the index of the right choice, from 0, or a text:
            its letter, else its text, else its index.
        choice (`str`, *optional*, defaults to `" {choice}"`): template of what is scored after the prompt.
        normalize (`str`, *optional*, defaults to `"none"`):
            divide log-likelihoods by their number of `"tokens"` or `"bytes"` before they are compared, or by nothing.
    """

    kind: ClassVar[str] = "multiple_choice"
    templates: ClassVar[tuple[str, ...]] = ("choice",)

    prompt: str = "{question}"
    choices: str | tuple[str, ...] = "choices"
    labels: str | None = None
    answer: str = "answer"
    choice: str = " {choice}"
    normalize: Literal["none", "tokens", "bytes"] = "none"

    def ask(self, row: Row) -> tuple[str, list[str], int]:
        has_columns = isinstance(self.choices, tuple)
        choices = [cell(row, name) for name in self.choices] if has_columns else cell(row, self.choices)
        labels = list(string.ascii_uppercase) if self.labels is None else cell(row, self.labels)
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(labels):
            raise LayerPruneError(f"{self.choices!r} must hold a list of 2 to 26 choices, not {choices!r:.60}")
        pairs = list(zip(labels, map(str, choices), strict=False))
        row = {**row, "lettered_choices": "\n".join(f"{label}. {choice}" for label, choice in pairs)}
        texts = [render(self.choice, {**row, "letter": label, "choice": choice}) for label, choice in pairs]
        right = self.choices.index(self.answer) if has_columns and self.answer in self.choices else None
        return render(self.prompt, row), texts, _index(cell(row, self.answer), pairs) if right is None else right

    def chunk(self, examples: Sequence[Example], padding: int) -> Chunk:
        pairs = [pair for example in examples for pair in zip(example.rows, example.texts, strict=True)]
        return ChoiceChunk(
            scored(examples, padding),
            sizes=tuple(len(example.rows) for example in examples),
            answers=tuple(example.answer for example in examples),
            divisors=tuple(self._divisor(*pair) for pair in pairs),
        )

    def _divisor(self, row: Encoded, text: str) -> int:
        sizes = {"none": 1, "tokens": len(row.ids) - row.start, "bytes": len(text.strip().encode())}
        return sizes[self.normalize]


def _index(answer: object, pairs: Sequence[tuple[str, str]]) -> int:
    """Index of the right one of `(letter, choice)`."""
    numbers, (letters, choices) = tuple(map(str, range(len(pairs)))), zip(*pairs, strict=True)
    shown = str(int(answer)) if isinstance(answer, int) else str(answer).strip()
    readings = [numbers] if isinstance(answer, int) else [letters, choices, numbers]
    for reading in readings:
        for text in (shown, shown.upper()):
            if text in reading:
                return reading.index(text)
    raise LayerPruneError(f"answer {answer!r} is none of the {len(pairs)} choices; give an index, a letter or a text")


@dataclass(eq=False, kw_only=True)
class GenerationTask(PromptedTask):
    """What a model writes after a prompt, greedily, scored by a metric; the cost of an example is 1 - score.

    Args:
        reference (`str`, *optional*, defaults to `"{answer}"`): template of the right text.
        metric (`str`, *optional*, defaults to `"exact_match"`):
            `"exact_match"`, `"rouge1"`, `"rouge2"`, `"rougeL"`, `"bleu"`, `"chrf"`, `"prefix"` (share of the right
            text written before the first mistake), or the name or folder of a metric of the `evaluate` library.
        max_new_tokens (`int`, *optional*, defaults to 64): most tokens of a continuation.
        stop_strings (`tuple[str, ...]`, *optional*): a continuation ends where one of them appears.
        after (`str`, *optional*):
            compare only what follows its last appearance, in the continuation and in the reference (GSM8K's `"####"`).
    """

    kind: ClassVar[str] = "generation"
    templates: ClassVar[tuple[str, ...]] = ("reference",)

    prompt: str = "{prompt}"
    reference: str = "{answer}"
    metric: str = "exact_match"
    max_new_tokens: int = 64
    stop_strings: tuple[str, ...] = ()
    after: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        with located(f"task {self.name}"):
            check_metric(self.metric)

    @property
    def measure(self) -> str:
        return self.metric

    def ask(self, row: Row) -> tuple[str, list[str], int]:
        prompt = render(self.prompt, row)
        space = "" if prompt[-1:].isspace() else " "
        return prompt, [space + render(self.reference, row)], 0

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, prompt: str, texts: list[str], max_length: int
    ) -> list[Encoded]:
        ids, room = encode_prompt(tokenizer, prompt), max_length - self.max_new_tokens
        if room < 1:
            raise LayerPruneError(f"max_new_tokens={self.max_new_tokens} leaves no place for a prompt in {max_length}")
        return [Encoded(ids[-room:], 0, len(ids) > room)]

    def chunk(self, examples: Sequence[Example], padding: int) -> Chunk:
        batch = padded([example.rows[0].ids for example in examples], padding, "left")
        references = tuple(answer_part(example.texts[0], self.after) for example in examples)
        return GenerationChunk(batch, self.max_new_tokens, self.stop_strings, references, self.metric, self.after)
