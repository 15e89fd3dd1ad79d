"""Quality of a model on tasks, one chunk after the other: the plain form of what scoring does for many candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from ..data import Batch, valid_next_tokens
from ..errors import LayerPruneError
from ..forward import check_same_vocabulary, final_states, inference, to_device
from ..losses import perplexity_of, token_statistics
from .chunks import GenerationChunk, PreparedTask, pad_id
from .lm_eval_task import LmEvalChunk
from .load import load_tasks
from .metrics import corpus_score
from .task import Task, check_names


@dataclass(frozen=True)
class TaskResult:
    """
    Attributes:
        measure (`str`): what `quality` is: `"accuracy"`, `"perplexity"`, `"kl"` (nats per token), or a metric's name.
        quality (`float`): the measure; for a metric its corpus value. Perplexity and KL lower is better.
        cost (`float`): mean cost, lower is better: 1 - accuracy, 1 - mean score of the samples, or nats per token.
        standard_error (`float`, *optional*): of the mean cost, over examples; none for a single example.
        num_examples (`int`): examples that were scored.
        weight (`float`): weight of the task among the others.
        num_truncated (`int`): rows whose prompt did not fit and lost its beginning.
    """

    measure: str
    quality: float
    cost: float
    standard_error: float | None
    num_examples: int
    weight: float
    num_truncated: int


@dataclass(frozen=True)
class TaskReport:
    """
    Attributes:
        results (`dict[str, TaskResult]`): one per task, by name.
    """

    results: dict[str, TaskResult]

    @property
    def mean_cost(self) -> float:
        """Mean of the tasks' costs, weighted by the tasks' weights."""
        total = sum(result.weight for result in self.results.values())
        return sum(result.weight * result.cost for result in self.results.values()) / total

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"mean_cost": self.mean_cost}


def prepare_tasks(
    tasks: str | Iterable[Task | PreparedTask],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 8,
) -> list[PreparedTask]:
    """Tasks tokenized for a model, unless they are already; arguments as in [`evaluate_tasks`].

    Raises:
        [`LayerPruneError`]: if data does not fit its task or the model, two tasks have one name, or there is none.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    prepared = [
        task if isinstance(task, PreparedTask) else task.prepare(tokenizer, batch_size, longest)
        for task in check_names(load_tasks(tasks) if isinstance(tasks, str) else tasks)
    ]
    for task in prepared:
        highest = max((int(chunk.batch["input_ids"].max()) for chunk in task.chunks if chunk.batch), default=0)
        if highest >= model.config.vocab_size:
            raise LayerPruneError(
                f"task {task.name} holds token id {highest}, but the model's vocabulary has {model.config.vocab_size} "
                "entries; give the model's own tokenizer"
            )
    return prepared


def evaluate_tasks(
    model: PreTrainedModel,
    tasks: str | Iterable[Task | PreparedTask],
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel | None = None,
    batch_size: int = 8,
    on_chunk: Callable[[], None] = lambda: None,
) -> TaskReport:
    """Measure a causal language model on tasks.

    Args:
        model ([`~transformers.PreTrainedModel`]): any causal language model with an output head `lm_head`.
        tasks (`str`, `Iterable[Task]` or `Iterable[PreparedTask]`):
            what to measure it on, or its name, see [`load_tasks`]; names of tasks must differ.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's own.
        teacher ([`~transformers.PreTrainedModel`], *optional*): needed for a [`KLTask`].
        batch_size (`int`, *optional*, defaults to 8): rows at a time.
        on_chunk (`Callable[[], None]`, *optional*): called after every chunk, for progress bars.

    Raises:
        [`LayerPruneError`]: if data does not fit its task, two tasks have one name, or a teacher is missing.
    """
    prepared = prepare_tasks(tasks, model, tokenizer, batch_size)
    if teacher is not None:
        check_same_vocabulary(model, teacher)
    for task in prepared:
        if task.statistic == "kl" and teacher is None:
            raise LayerPruneError(
                f"task {task.name}: KL needs a teacher to compare with; give one or leave out the task"
            )
    with inference(*(one for one in (model, teacher) if one is not None)):
        return TaskReport({task.name: _evaluate(model, task, tokenizer, teacher, on_chunk) for task in prepared})


def _evaluate(
    model: PreTrainedModel,
    task: PreparedTask,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel | None,
    on_chunk: Callable[[], None],
) -> TaskResult:
    costs, weights, texts = [], [], []
    for chunk in task.chunks:
        if isinstance(chunk, LmEvalChunk):
            cost, weight = chunk.reduce([model], tokenizer)
        elif isinstance(chunk, GenerationChunk):
            written = generated(model, chunk, tokenizer)
            texts += zip(chunk.cleaned(written), chunk.references, strict=True)
            cost, weight = chunk.reduce([written])
        else:
            batch = to_device(chunk.batch, model.device)
            cost, weight = chunk.reduce(
                *sums_by_row(model, [final_states(model, batch)], batch, task.statistic, teacher)
            )
        costs.append(cost[0])
        weights.append(weight)
        on_chunk()
    cost, weight = torch.cat(costs), torch.cat(weights)
    mean = (cost.sum() / weight.sum()).item()
    if texts:
        quality = corpus_score(task.measure, *zip(*texts, strict=True))
    elif task.measure == "perplexity":
        quality = perplexity_of(mean)
    else:
        quality = mean if task.measure == "kl" else 1 - mean
    error = standard_error(cost, weight)
    return TaskResult(task.measure, quality, mean, error, len(cost), task.weight, task.num_truncated)


def sums_by_row(
    model: PreTrainedModel,
    states: Iterable[Tensor],
    batch: Batch,
    statistic: str,
    teacher: PreTrainedModel | None = None,
) -> tuple[Tensor, Tensor]:
    """Nats summed over each row's scored tokens, `(C, B)`, and the number of these tokens, `(B,)`.

    Runs inside [`~forward.inference`]. In float64, on the CPU.

    Args:
        model ([`~transformers.PreTrainedModel`]): whose head the C models share.
        states (`Iterable[Tensor]` of length C): final states `(B, T, H)` of `model` itself, then of the others.
        batch (`dict[str, Tensor]`): what they were computed from, on the model's device.
        statistic (`str`): `"nll"` or `"kl"`.
        teacher ([`~transformers.PreTrainedModel`], *optional*): what `"kl"` compares with.
    """
    valid, labels = valid_next_tokens(batch)
    counts, row_of_token = valid.sum(1).cpu().double(), valid.nonzero()[:, 0].cpu()
    hidden = [each[valid] for each in states]
    if not len(labels):
        return counts.new_zeros(len(hidden), len(counts)), counts
    reference = ()
    if statistic == "kl":
        teacher_states = hidden[0] if teacher is model else final_states(teacher, batch)[valid]
        reference = (teacher_states, teacher.lm_head)
    sums = []
    for statistics in token_statistics(hidden, model.lm_head, labels, *reference):
        values = getattr(statistics, statistic).cpu().double()
        sums.append(torch.zeros_like(counts).index_add_(0, row_of_token, values))
    return torch.stack(sums), counts


def generated(
    model: PreTrainedModel,
    chunk: GenerationChunk,
    tokenizer: PreTrainedTokenizerBase,
    prompt_cache: Cache | None = None,
) -> list[str]:
    """The greedy continuation of each prompt of a chunk, without the prompt.

    `prompt_cache`, if given, holds the keys and values of all but the prompts' last tokens.
    """
    batch = to_device(chunk.batch, model.device)
    stop = {"stop_strings": list(chunk.stop_strings), "tokenizer": tokenizer} if chunk.stop_strings else {}
    # the checkpoint's own settings (sampling, a repetition penalty) would hide what a layer costs
    ids = model.generate(
        **batch,
        past_key_values=prompt_cache,
        max_new_tokens=chunk.max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        pad_token_id=pad_id(tokenizer),
        **stop,
    )
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def standard_error(costs: Tensor, weights: Tensor) -> float | None:
    """Of the mean cost sum(costs) / sum(weights) over E examples, `(E,), (E,) -> number`."""
    count = len(costs)
    if count < 2:
        return None
    deviations = costs - costs.sum() / weights.sum() * weights
    return ((deviations.pow(2).sum() * count / (count - 1)).sqrt() / weights.sum()).item()
