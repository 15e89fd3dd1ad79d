"""The kinds of tasks: running text, choices by likelihood, text that the model writes, and the tasks of lm-eval."""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import padded
from ..errors import LayerPruneError, first_line, located, needs_extra
from .chunks import (
    ChoiceChunk,
    Chunk,
    Encoded,
    Example,
    GenerationChunk,
    ModelChunk,
    answer_part,
    check_metric,
    cut_left,
    encode_prompt,
    scored,
)
from .task import PromptedTask, Row, Task, cell, render

FEW_SHOT_SEED = 1234  # lm-eval's own


@dataclass(eq=False, kw_only=True)
class PerplexityTask(PromptedTask):
    """Nats per token of text; the cost is weighted by tokens.

    Without a prompt, texts are joined, an end token after each, and cut into windows of `max_length` tokens, each an
    example; `limit` is then the number of windows, from the beginning. With a prompt, each row is an example, of which
    only the text is scored.

    Args:
        text (`str`, *optional*, defaults to `"{text}"`): template of a text over the row's columns.
        max_length (`int`, *optional*, defaults to 512): T, tokens per window.
    """

    kind: ClassVar[str] = "perplexity"
    templates: ClassVar[tuple[str, ...]] = ("text",)
    measure: ClassVar[str] = "perplexity"

    text: str = "{text}"
    max_length: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        of_prompts = ("description", "num_few_shot", "few_shot_split", "few_shot_group")
        if not self.prompt and (unused := [name for name in of_prompts if getattr(self, name)]):
            raise LayerPruneError(f"task {self.name}: {unused[0]} has no effect without prompt; leave it out")

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

    Next to the columns, templates can use two fields. In `prompt`: `{lettered_choices}`, the choices as lines
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
        divisors = []
        for row, text in (pair for example in examples for pair in zip(example.rows, example.texts, strict=True)):
            sizes = {"none": 1, "tokens": len(row.ids) - row.start, "bytes": len(text.strip().encode())}
            divisors.append(sizes[self.normalize])
        return ChoiceChunk(
            scored(examples, padding),
            sizes=tuple(len(example.rows) for example in examples),
            answers=tuple(example.answer for example in examples),
            divisors=tuple(divisors),
        )


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
            if "" in self.stop_strings:
                raise LayerPruneError("stop_strings holds an empty text, which ends every answer; leave it out")

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
        return [Encoded(cut_left(tokenizer, ids, room), 0, len(ids) > room)]

    def chunk(self, examples: Sequence[Example], padding: int) -> Chunk:
        batch = padded([example.rows[0].ids for example in examples], padding, "left")
        references = tuple(answer_part(example.texts[0], self.after) for example in examples)
        return GenerationChunk(batch, self.max_new_tokens, self.stop_strings, references, self.metric, self.after)


@dataclass(frozen=True)
class LmEvalChunk(ModelChunk):
    """A whole task, which lm-eval runs itself, one model at a time; its `batch` is empty."""

    loaded: dict[str, Any] = field(repr=False)  # as lm-eval's manager loads a task, or the several of a group
    limit: int | None
    batch_size: int

    def reduce(self, models: Iterable[PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
        """C models to `(C, E)` costs, 1 - the task's first metric, and `(E,)` weights, 1."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        costs = []
        for model in models:
            for task in self.loaded["tasks"].values():
                task.set_fewshot_seed(FEW_SHOT_SEED)  # the same examples for every model
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size)
            output = lm_eval.evaluate(wrapped, task_dict=self.loaded, limit=self.limit, bootstrap_iters=0)
            costs.append(costs_of_samples(output["samples"]))
        return torch.stack(costs), torch.ones(len(costs[0]), dtype=torch.float64)


def costs_of_samples(samples: dict[str, list[dict[str, Any]]]) -> Tensor:
    """The costs `(E,)` of the samples lm-eval logged, by task; a group has several.

    A task of several filters logs every example once by each; the first filter counts.

    Raises:
        [`LayerPruneError`]: if the first metric of a task is not a number in [0, 1] per example.
    """
    scores = []
    for name, rows in samples.items():
        for row in rows:
            if row["filter"] != rows[0]["filter"]:  # the same answer, read another way
                continue
            metric = row["metrics"][0]
            if not isinstance(row[metric], (int, float)) or not 0 <= row[metric] <= 1:
                raise LayerPruneError(
                    f"lm-eval task {name}: its first metric, {metric}, must be a number in [0, 1] per example, not "
                    f"{row[metric]!r:.40}; choose a task judged by accuracy or exact match"
                )
            scores.append(float(row[metric]))
    return 1 - torch.tensor(scores, dtype=torch.float64)


@dataclass(eq=False, kw_only=True)
class LmEvalTask(Task):
    """A task of [lm-eval](https://github.com/EleutherAI/lm-evaluation-harness), which is an extra of this package.

    `dataset` is its name (`"arc_easy"`) or a YAML file in lm-eval's format, which can name Python functions that are
    run: use only files you trust. The task's first metric and first filter count. `limit` takes the first examples, of
    each task of a group.
    """

    kind: ClassVar[str] = "lm_eval"
    measure: ClassVar[str] = "score"

    def chunks(self, tokenizer: PreTrainedTokenizerBase, batch_size: int, max_length: int) -> list[Chunk]:
        """Let lm-eval read the data; it tokenizes when it runs."""
        source = str(self.dataset)
        try:
            from lm_eval.tasks import TaskManager

            loaded = TaskManager(include_defaults=not Path(source).is_file()).load([source])
        except ImportError as error:
            raise needs_extra("lm-eval", "lm-eval") from error
        except Exception as error:  # a missing task, a broken file: each raises its own
            raise LayerPruneError(f"lm-eval cannot load it: {first_line(error)}") from error
        return [LmEvalChunk({}, loaded, self.limit, batch_size)]


TASK_KINDS: dict[str, type[Task]] = {
    kind.kind: kind for kind in (PerplexityTask, KLTask, MultipleChoiceTask, GenerationTask, LmEvalTask)
}
"""The classes of tasks by what a YAML file calls them."""
