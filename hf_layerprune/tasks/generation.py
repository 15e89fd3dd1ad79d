"""Tasks answered by writing: a greedy continuation judged by a metric, and copying a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers import PreTrainedTokenizerBase

from ..errors import LayerPruneError
from .chunks import GenerationChunk, PreparedTask, SampleMetric, TokenChunk, answer_part, filled
from .encoding import encode, encode_prompt, left_padded, length_limit, pad_id, right_padded
from .sources import Row
from .task import PromptedTask


@dataclass(eq=False, kw_only=True)
class GenerationTask(PromptedTask):
    """What a model writes behind a prompt, greedily, judged by a metric; the cost of an example is 1 - score.

    Args:
        reference (`str`, *optional*, defaults to `"{answer}"`): template of the right text.
        metric (`str`, *optional*, defaults to `"exact_match"`):
            `"exact_match"`, `"rouge1"`, `"rouge2"`, `"rougeL"`, `"bleu"`, `"chrf"` or `"prefix"` (share of the right
            text written before the first mistake).
        max_new_tokens (`int`, *optional*, defaults to 64): length of a continuation at most.
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
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise LayerPruneError(f"{self.title}: max_new_tokens={self.max_new_tokens} must be at least 1")
        if "" in self.stop_strings:
            raise LayerPruneError(f"{self.title}: a stop string is empty; it would end every text at once")
        if self.is_generated:
            self.load_metric()

    @property
    def is_generated(self) -> bool:
        """Whether a model writes the answer, which a metric then compares with the reference."""
        return True

    def load_metric(self) -> SampleMetric:
        """The metric by its name.

        Raises:
            [`LayerPruneError`]: if there is none of that name.
        """
        from .metrics import load_metric  # `evaluate` takes more than a second to import

        try:
            return load_metric(self.metric)
        except LayerPruneError as error:
            raise LayerPruneError(f"{self.title}: {error}") from None

    def prompt_and_reference(self, row: Row) -> tuple[str, str]:
        """The prompt of a row, and the text that should follow it."""
        return (
            self.template("prompt").render(row.values, row.where),
            self.template("reference").render(row.values, row.where),
        )

    def prompt_and_answer(self, row: Row) -> tuple[str, str]:
        prompt, reference = self.prompt_and_reference(row)
        return prompt, self.answer_separator + reference

    def prepare(
        self, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8, max_length: int | None = None
    ) -> PreparedTask:
        limit, rows, truncated = length_limit(tokenizer, max_length), [], 0
        for row, opening in self.examples():
            prompt, reference = self.prompt_and_reference(row)
            ids = encode_prompt(tokenizer, opening + prompt)
            reference = answer_part(reference, self.after)
            if not ids or not reference:
                raise LayerPruneError(
                    f"{self.title}: {row.where}: the prompt or the reference is empty; give both a text"
                )
            rows.append((ids, reference, self._new_tokens(tokenizer, reference)))
            truncated += len(ids) + rows[-1][2] > limit
        metric, chunks = self.load_metric(), []
        for part in filled([1] * len(rows), batch_size):
            new = max(new for _, _, new in rows[part])
            if new >= limit:
                raise LayerPruneError(
                    f"{self.title}: {new} new tokens leave no place for a prompt in max_length={limit}; lower "
                    "max_new_tokens"
                )
            chunks.append(
                GenerationChunk(
                    left_padded([ids[-(limit - new) :] for ids, _, _ in rows[part]], pad_id(tokenizer)),
                    new,
                    self.stop_strings,
                    tuple(reference for _, reference, _ in rows[part]),
                    metric,
                    self.after,
                )
            )
        return PreparedTask(self.name, self.weight, "generation", metric.name, chunks, truncated)

    def _new_tokens(self, tokenizer: PreTrainedTokenizerBase, reference: str) -> int:
        """Length of a continuation; where none is set, that of the reference with some to spare."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return len(tokenizer(reference, add_special_tokens=False)["input_ids"]) + 2


@dataclass(eq=False, kw_only=True)
class CopyTask(GenerationTask):
    """Repeating a text word for word, as the paper's `cp_doc` and `cp_para` sets ask for.

    A model that follows instructions is asked to (`prompt="Repeat this text word for word.\\n\\n{text}\\n\\nThe text
    again:\\n"`). A base model is shown the text, a separator and the first words of the text, and goes on:
    `prompt="{text}\\n\\n"`, `start_words=5`.

    A small model may copy nothing (the embedded teacher writes 1 % of a 30-word text before its first mistake) and yet
    find a text likelier after it has seen it: `judged_by="likelihood"` scores the nats per token of the copy instead.
    That is how the default tasks ask the embedded teacher, with ten words seen three times: 2.91 nats per token, 3.19
    where another ten words stand in their place.

    Args:
        text (`str`, *optional*, defaults to `"{text}"`): template of the text over the row's columns.
        prompt (`str`, *optional*): template of the prompt; `{text}` is the text, as it is after `max_words`.
        max_words (`int`, *optional*): take only the first words of the text.
        start_words (`int`, *optional*, defaults to 0): words of the second copy that are given.
        judged_by (`str`, *optional*, defaults to `"generation"`): or `"likelihood"`.
    """

    kind: ClassVar[str] = "copy"
    templates: ClassVar[tuple[str, ...]] = (*GenerationTask.templates, "text")

    text: str = "{text}"
    prompt: str = "{text}\n\n"
    metric: str = "prefix"
    max_new_tokens: int | None = None
    answer_separator: str = ""
    max_words: int | None = None
    start_words: int = 0
    judged_by: Literal["generation", "likelihood"] = "generation"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_words < 0 or (self.max_words is not None and self.max_words <= self.start_words):
            raise LayerPruneError(
                f"{self.title}: max_words={self.max_words} and start_words={self.start_words} leave nothing to copy"
            )

    @property
    def is_generated(self) -> bool:
        return self.judged_by == "generation"

    def prompt_and_reference(self, row: Row) -> tuple[str, str]:
        text = self.template("text").render(row.values, row.where).strip()
        if self.max_words is not None:
            text = first_words(text, self.max_words)
        start = first_words(text, self.start_words)
        if start == text:
            raise LayerPruneError(
                f"{self.title}: {row.where}: the text has no more than start_words={self.start_words} words, so "
                "nothing is left to copy; remove the row"
            )
        return self.template("prompt").render(row.values | {"text": text}, row.where) + start, text[len(start) :]

    def prepare(
        self, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8, max_length: int | None = None
    ) -> PreparedTask:
        if self.is_generated:
            return super().prepare(tokenizer, batch_size, max_length)
        limit, rows = length_limit(tokenizer, max_length), []
        for row, opening in self.examples():
            prompt, rest = self.prompt_and_reference(row)
            rows.append(encode(tokenizer, opening + prompt, rest, limit, f"{self.title}: {row.where}"))
        chunks = [
            TokenChunk(right_padded(rows[part], pad_id(tokenizer))) for part in filled([1] * len(rows), batch_size)
        ]
        truncated = sum(row.truncated for row in rows)
        return PreparedTask(self.name, self.weight, "nll", "perplexity", chunks, truncated)


def first_words(text: str, count: int) -> str:
    """The first `count` words of a text, with the space between them as it is."""
    end = 0
    for word in text.split()[:count]:
        end = text.index(word, end) + len(word)
    return text[:end]
