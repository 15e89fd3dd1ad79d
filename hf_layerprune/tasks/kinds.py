"""The kinds of tasks: running text, choices by likelihood, and text that the model writes."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers import PreTrainedTokenizerBase

from ..errors import LayerPruneError
from .chunks import (
    Encoded,
    Example,
    GenerationChunk,
    PreparedTask,
    answer_part,
    encode,
    encode_prompt,
    pad_id,
    padded,
    whole_examples,
)
from .metrics import metric_of
from .rows import Row, is_missing, spread
from .task import PromptedTask, Task

LETTERS = string.ascii_uppercase


@dataclass(eq=False, kw_only=True)
class PerplexityTask(Task):
    """Nats per token of text; an example is one window of `max_length` tokens, its weight the tokens scored in it.

    Texts are joined end to end, an end token after each, and cut into windows; the last, shorter one counts too.
    `limit` is the number of windows, taken from the beginning of the data.

    Args:
        text (`str`, *optional*, defaults to `"{text}"`): template of a text over the row's columns.
        max_length (`int`, *optional*, defaults to 512): T, tokens per window.
    """

    kind: ClassVar[str] = "perplexity"
    templates: ClassVar[tuple[str, ...]] = ("text",)
    measure: ClassVar[str] = "perplexity"

    text: str = "{text}"
    max_length: int = 512

    def encode_examples(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
        length = min(self.max_length, max_length)
        if length < 2:
            raise LayerPruneError(f"{self.title}: max_length={length}; a window needs at least two tokens")
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids: list[int] = []
        for row in self.read():
            ids += tokenizer(row.render(self.text))["input_ids"] + end
            if self.limit is not None and len(ids) >= self.limit * length:
                ids = ids[: self.limit * length]
                break
        if len(ids) < 2:
            raise LayerPruneError(f"{self.title}: the text has {len(ids)} tokens; two in a row are the least to score")
        return [Example([Encoded(ids[start : start + length], 1)]) for start in range(0, len(ids) - 1, length)]


@dataclass(eq=False, kw_only=True)
class KLTask(PerplexityTask):
    """KL(teacher || model) of the next-token distributions over text, nats per token; settings as in
    [`PerplexityTask`]."""

    kind: ClassVar[str] = "kl"
    measure: ClassVar[str] = "kl"


@dataclass(eq=False, kw_only=True)
class MinimalPairsTask(Task):
    """Which of two sentences is the likelier one, by the sum over their tokens, as in
    [BLiMP](https://huggingface.co/papers/1912.00582); the cost of a pair is 1 if the bad one is as likely.

    Args:
        good (`str`, *optional*, defaults to `"sentence_good"`): column of the sentence that should be likelier.
        bad (`str`, *optional*, defaults to `"sentence_bad"`): column of the other.
    """

    kind: ClassVar[str] = "minimal_pairs"

    good: str = "sentence_good"
    bad: str = "sentence_bad"

    def encode_examples(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
        examples = []
        for row in spread(self.read(), self.limit):
            pair = [encode(tokenizer, "", row.text(name), max_length, row.where) for name in (self.good, self.bad)]
            examples.append(Example(pair, divisors=(1.0, 1.0)))
        return examples


@dataclass(eq=False, kw_only=True)
class MultipleChoiceTask(PromptedTask):
    """Which of several continuations is the likeliest; the cost of an example is 1 if it is not the right one.

    Two fields may stand in templates next to the columns. In `prompt`: `{lettered_choices}`, the choices as lines
    `A. ...`. In `choice`: `{choice}`, its text, and `{letter}`, its letter. MMLU compares letters:
    `prompt="{question}\\n{lettered_choices}\\nAnswer:"`, `choice=" {letter}"`.

    Args:
        choices (`str` or `tuple[str, ...]`, *optional*, defaults to `"choices"`):
            a column that holds a list (or, as in CommonsenseQA, lists `text` and `label`), or one column per choice.
        answer (`str`, *optional*, defaults to `"answer"`): the column of the right choice.
        answer_form (`str`, *optional*, defaults to `"auto"`):
            what stands there: an `"index"` from 0, a `"letter"` (or the row's own label), the choice's `"text"`, or
            whichever of them is the only one that fits.
        choice (`str`, *optional*, defaults to `" {choice}"`): template of what is scored after the prompt.
        normalize (`str`, *optional*, defaults to `"none"`):
            divide log-likelihoods by their number of `"tokens"` or `"bytes"` before they are compared, or by nothing.
    """

    kind: ClassVar[str] = "multiple_choice"
    templates: ClassVar[tuple[str, ...]] = (*PromptedTask.templates, "choice")

    prompt: str = "{question}"
    choices: str | tuple[str, ...] = "choices"
    answer: str = "answer"
    answer_form: Literal["auto", "index", "letter", "text"] = "auto"
    choice: str = " {choice}"
    normalize: Literal["none", "tokens", "bytes"] = "none"

    def encode_examples(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
        examples = []
        for row, opening in self.rows_to_score():
            prompt, texts, answer = self._parts(row)
            rows = [encode(tokenizer, opening + prompt, text, max_length, row.where) for text in texts]
            divisors = {
                "none": (1.0 for _ in rows),
                "tokens": (float(len(encoded.ids) - encoded.start) for encoded in rows),
                "bytes": (float(len(text.strip().encode()) or 1) for text in texts),
            }
            examples.append(Example(rows, answer, tuple(divisors[self.normalize])))
        return examples

    def prompt_and_answer(self, row: Row) -> tuple[str, str]:
        prompt, texts, answer = self._parts(row)
        return prompt, texts[answer]

    def _parts(self, row: Row) -> tuple[str, list[str], int]:
        """The prompt, the continuation of each choice, and which of them is right."""
        texts, labels = self._choices(row)
        lettered = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
        prompt = row.render(self.prompt, lettered_choices=lettered)
        continuations = [
            row.render(self.choice, choice=text, letter=label) for label, text in zip(labels, texts, strict=True)
        ]
        return prompt, continuations, self._answer(row, texts, labels)

    def _choices(self, row: Row) -> tuple[list[str], list[str]]:
        """The text of each choice, and its letter or the row's own label."""
        if isinstance(self.choices, tuple):
            texts, labels = [row.text(name) for name in self.choices], []
        else:
            value = row.column(self.choices)
            texts, labels = (value.get("text"), value.get("label")) if isinstance(value, Mapping) else (value, [])
        if not isinstance(texts, list) or not all(isinstance(text, (str, int, float, type(None))) for text in texts):
            raise row.error(
                f"column {self.choices!r} must hold a list of choices, not {str(texts)[:60]!r}; or name one column "
                "per choice"
            )
        for number, text in enumerate(texts, 1):
            if is_missing(text) or not str(text).strip():
                raise row.error(f"choice {number} is empty; give it a text or remove the row")
        labels = [str(label) for label in labels or LETTERS[: len(texts)]]
        if len(texts) < 2 or len(labels) != len(texts):
            raise row.error(f"{len(texts)} choices with {len(labels)} labels; give 2 to 26 choices")
        return [str(text) for text in texts], labels

    def _answer(self, row: Row, texts: list[str], labels: list[str]) -> int:
        """Index of the right choice."""
        value = row.column(self.answer)
        shown = str(value).strip()
        letters = labels if shown.upper() in labels else list(LETTERS)
        places = {
            "index": int(value) if isinstance(value, int) or shown.isdecimal() else -1,
            "letter": letters.index(shown.upper()) if shown.upper() in letters else -1,
            "text": texts.index(str(value)) if texts.count(str(value)) == 1 else -1,
        }
        form = "index" if self.answer_form == "auto" and isinstance(value, int) else self.answer_form
        found = {name: place for name, place in places.items() if form in ("auto", name) and 0 <= place < len(texts)}
        if len(set(found.values())) > 1:
            raise row.error(f"answer {value!r} can be read as {' or '.join(found)}; set answer_form to one of them")
        if not found:
            raise row.error(
                f"answer {value!r} is none of the {len(texts)} choices; give an index 0..{len(texts) - 1}, a letter "
                f"{labels[0]}..{labels[-1]}, or a choice's text"
            )
        return next(iter(found.values()))


@dataclass(eq=False, kw_only=True)
class GenerationTask(PromptedTask):
    """What a model writes after a prompt, greedily, scored by a metric; the cost of an example is 1 - score.

    Args:
        reference (`str`, *optional*, defaults to `"{answer}"`): template of the right text.
        metric (`str`, *optional*, defaults to `"exact_match"`):
            `"exact_match"`, `"rouge1"`, `"rouge2"`, `"rougeL"`, `"bleu"`, `"chrf"` or `"prefix"` (share of the right
            text written before the first mistake).
        max_new_tokens (`int`, *optional*, defaults to 64):
            most tokens of a continuation; with `None`, as many as the reference has, and two more.
        stop_strings (`tuple[str, ...]`, *optional*): a continuation ends where one of them appears.
        after (`str`, *optional*):
            compare only what follows its last appearance, in the continuation and in the reference (GSM8K's `"####"`).
        answer_separator (`str`, *optional*, defaults to `" "`): between a few-shot prompt and its reference.
    """

    kind: ClassVar[str] = "generation"
    templates: ClassVar[tuple[str, ...]] = (*PromptedTask.templates, "reference")

    reference: str = "{answer}"
    metric: str = "exact_match"
    max_new_tokens: int | None = 64
    stop_strings: tuple[str, ...] = ()
    after: str | None = None
    answer_separator: str = " "

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            metric_of(self.metric)
        except LayerPruneError as error:
            raise LayerPruneError(f"{self.title}: {error}") from None
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise LayerPruneError(f"{self.title}: max_new_tokens={self.max_new_tokens} must be at least 1")
        if "" in self.stop_strings:
            raise LayerPruneError(f"{self.title}: a stop string is empty; it would end every text at once")

    def prompt_and_reference(self, row: Row) -> tuple[str, str]:
        """The prompt of a row, and the text that should follow it."""
        return row.render(self.prompt), row.render(self.reference)

    def prompt_and_answer(self, row: Row) -> tuple[str, str]:
        prompt, reference = self.prompt_and_reference(row)
        return prompt, self.answer_separator + reference

    def prepare(
        self, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8, max_length: int | None = None
    ) -> PreparedTask:
        limit, prompts, references, lengths = max_length or tokenizer.model_max_length, [], [], []
        for row, opening in self.rows_to_score():
            prompt, reference = self.prompt_and_reference(row)
            prompts.append(encode_prompt(tokenizer, opening + prompt))
            references.append(answer_part(reference, self.after))
            if not prompts[-1] or not references[-1]:
                raise row.error("the prompt or the reference is empty; give both a text")
            lengths.append(
                self.max_new_tokens or len(tokenizer(references[-1], add_special_tokens=False)["input_ids"]) + 2
            )
        chunks = []
        for part in whole_examples([1] * len(prompts), batch_size):
            new = max(lengths[part])
            if new >= limit:
                raise LayerPruneError(
                    f"{self.title}: {new} new tokens leave no place for a prompt in max_length={limit}; lower "
                    "max_new_tokens"
                )
            batch = padded([ids[-(limit - new) :] for ids in prompts[part]], pad_id(tokenizer), "left")
            chunks.append(
                GenerationChunk(batch, new, self.stop_strings, tuple(references[part]), self.metric, self.after)
            )
        num_truncated = sum(len(ids) + new > limit for ids, new in zip(prompts, lengths, strict=True))
        return PreparedTask(self.name, self.weight, self.metric, chunks, num_truncated)


@dataclass(eq=False, kw_only=True)
class CopyTask(GenerationTask):
    """Repeating a text word for word, as the paper's `cp_doc` and `cp_para` sets ask for.

    A model that follows instructions is asked to (`prompt="Repeat this text word for word.\\n\\n{text}\\n\\nThe text
    again:\\n"`). A base model is shown the text, a separator and the first words of the text, and goes on:
    `prompt="{text}\\n\\n"`, `start_words=5`.

    A small model may copy nothing and yet find a text likelier after it has seen it: `judged_by="likelihood"` scores
    the nats per token of the copy instead, as the default tasks do.

    Args:
        text (`str`, *optional*, defaults to `"{text}"`): template of the text over the row's columns.
        prompt (`str`, *optional*): template of the prompt; `{text}` is the text, cut to `max_words`.
        max_words (`int`, *optional*): take only the first words of the text.
        start_words (`int`, *optional*, defaults to 0): words of the second copy that are given.
        judged_by (`str`, *optional*, defaults to `"generation"`): or `"likelihood"`.
    """

    kind: ClassVar[str] = "copy"
    measure: ClassVar[str] = "perplexity"  # judged by likelihood
    templates: ClassVar[tuple[str, ...]] = (*GenerationTask.templates, "text")

    text: str = "{text}"
    prompt: str = "{text}\n\n"
    metric: str = "prefix"
    max_new_tokens: int | None = None
    answer_separator: str = ""
    max_words: int | None = None
    start_words: int = 0
    judged_by: Literal["generation", "likelihood"] = "generation"

    def prompt_and_reference(self, row: Row) -> tuple[str, str]:
        text = row.render(self.text).strip()
        if self.max_words is not None:
            text = first_words(text, self.max_words)
        start = first_words(text, self.start_words)
        if start == text:
            raise row.error(
                f"start_words={self.start_words} leaves nothing of the text to copy; lower it or remove the row"
            )
        return row.render(self.prompt, text=text) + start, text[len(start) :]

    def prepare(
        self, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8, max_length: int | None = None
    ) -> PreparedTask:
        if self.judged_by == "generation":
            return super().prepare(tokenizer, batch_size, max_length)
        return Task.prepare(self, tokenizer, batch_size, max_length)

    def encode_examples(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
        examples = []
        for row, opening in self.rows_to_score():
            prompt, rest = self.prompt_and_reference(row)
            examples.append(Example([encode(tokenizer, opening + prompt, rest, max_length, row.where)]))
        return examples


def first_words(text: str, count: int) -> str:
    """The first `count` words of a text, with the space between them as it is."""
    end = 0
    for word in text.split()[:count]:
        end = text.index(word, end) + len(word)
    return text[:end]
