"""Tasks by name, and the quality of a model on tasks: the plain form of what scoring does for many candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import ASSETS, check_batches
from ..errors import LayerPruneError, first_line, located
from ..evaluation import distinct_rows, sums_by_row
from ..files import load_yaml
from ..forward import check_same_vocabulary, final_states, inference, to_device
from ..losses import perplexity_of
from .chunks import ModelChunk, PreparedTask
from .kinds import TASK_KINDS, LmEvalTask
from .task import Task

LM_EVAL = "lm_eval:"


@dataclass(frozen=True)
class TaskResult:
    """How good a model is on one task."""

    measure: str  # what `quality` is: "accuracy", "perplexity", "kl" (nats per token), or a metric's name
    quality: float  # of perplexity and KL, lower is better
    cost: float  # mean, lower is better: 1 - accuracy, 1 - mean score of the texts, or nats per token
    standard_error: float | None  # of the mean cost, over examples; none for a single example
    num_examples: int  # that were scored
    weight: float  # among the other tasks


@dataclass(frozen=True)
class TaskReport:
    """How good a model is on several tasks, by their names."""

    results: dict[str, TaskResult]

    @property
    def mean_cost(self) -> float:
        """Mean of the tasks' costs, weighted by the tasks' weights."""
        total = sum(result.weight for result in self.results.values())
        return sum(result.weight * result.cost for result in self.results.values()) / total

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"mean_cost": self.mean_cost}


def load_tasks(spec: str) -> list[Task]:
    """The tasks a user names.

    Args:
        spec (`str`):
            `"default"` (perplexity, KL, minimal pairs and copying on text that comes with the package), `"paper"` (the
            seven data sets of https://huggingface.co/papers/2511.05085, from the Hub), a YAML file, `"lm_eval:NAME"`
            for a task of lm-eval or a file in its format, or several of these with commas between.

    Raises:
        [`LayerPruneError`]: if there is no such preset or file, or a setting is unknown or wrong.
    """
    parts = [spec] if Path(spec).is_file() else [part.strip() for part in spec.split(",") if part.strip()]
    return [task for part in parts for task in _load(part)]


def _load(spec: str) -> Iterator[Task]:
    if spec.startswith(LM_EVAL):
        yield LmEvalTask(spec.removeprefix(LM_EVAL))
        return
    presets = {path.stem: path for path in (ASSETS / "tasks").glob("*.yaml")}
    path = presets.get(spec, Path(spec))
    if not path.is_file():
        known = ", ".join(sorted(presets))
        raise LayerPruneError(f"tasks {spec!r} must be a preset ({known}), a YAML file or {LM_EVAL}NAME")
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise LayerPruneError(f"tasks {path} cannot be read as YAML: {first_line(error)}") from error
    if not isinstance(content, list) or not content:
        raise LayerPruneError(f"tasks {path} must be a list of tasks, each with `kind:` and `dataset:`")
    for number, item in enumerate(content, 1):
        with located(f"tasks {path}, task {number}"):
            yield _task(item, path.parent)


def _task(item: Any, home: Path) -> Task:
    """Make a task of an entry of a YAML file; data is looked up in the folder of the file first."""
    kind = item.get("kind") if isinstance(item, dict) else item
    if not isinstance(item, dict) or str(kind) not in TASK_KINDS:
        raise LayerPruneError(f"kind {kind!r} is unknown; write `kind:` with one of {', '.join(TASK_KINDS)}")
    settings = {str(name): value for name, value in item.items() if name != "kind"}
    local = home / str(settings.get("dataset"))
    if local.is_file():
        settings["dataset"] = str(local)
    task = TASK_KINDS[str(kind)]
    known = [item.name for item in fields(task)]
    if unknown := sorted({*settings} - {*known}):
        raise LayerPruneError(f"{kind} has no setting {unknown[0]}; choose one of {', '.join(known)}")
    try:
        return task(**settings)
    except TypeError as error:  # a missing setting, or a wrong type
        raise LayerPruneError(str(error).partition(" Errors:")[0]) from error


def prepare_tasks(
    tasks: str | Iterable[Task | PreparedTask],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 8,
) -> list[PreparedTask]:
    """Tasks tokenized for a model, unless they already are; arguments as in [`evaluate_tasks`].

    Raises:
        [`LayerPruneError`]: if data does not fit its task or the model, two tasks have one name, or there is none.
    """
    tasks = load_tasks(tasks) if isinstance(tasks, str) else list(tasks)
    if not tasks:
        raise LayerPruneError("there are no tasks; name at least one")
    name, count = Counter(task.name for task in tasks).most_common(1)[0]
    if count > 1:
        raise LayerPruneError(f"two tasks are named {name!r}; give one of them another `name`")
    longest, vocab_size = getattr(model.config, "max_position_embeddings", None), model.config.vocab_size
    prepared = []
    for task in tasks:
        task = task if isinstance(task, PreparedTask) else task.prepare(tokenizer, batch_size, longest)
        if not 0 < task.vocab_size <= vocab_size:
            batches = [chunk.batch for chunk in task.chunks if chunk.batch]
            check_batches(batches, vocab_size, f"task {task.name}", required=False)
            task = replace(task, vocab_size=vocab_size)
        prepared.append(task)
    return prepared


def evaluate_tasks(
    model: PreTrainedModel,
    tasks: str | Iterable[Task | PreparedTask],
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel | None = None,
    batch_size: int = 8,
    on_chunk: Callable[[], None] = lambda: None,
) -> TaskReport:
    """Measure a causal language model of a supported family on tasks.

    Args:
        tasks (`str`, `Iterable[Task]` or `Iterable[PreparedTask]`):
            what to measure it on, or its name, see [`load_tasks`]; names of tasks must differ.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's own.
        teacher ([`~transformers.PreTrainedModel`], *optional*): needed for a [`KLTask`].
        batch_size (`int`, *optional*, defaults to 8): rows at a time.
        on_chunk (`Callable[[], None]`, *optional*): called after every chunk.

    Raises:
        [`LayerPruneError`]: if data does not fit its task, two tasks have one name, or a teacher is missing.
    """
    prepared = prepare_tasks(tasks, model, tokenizer, batch_size)
    check_same_vocabulary(model, model if teacher is None else teacher)
    of_kl = [task.name for task in prepared if task.statistic == "kl"]
    if teacher is None and of_kl:
        raise LayerPruneError(f"task {of_kl[0]}: KL needs a teacher to compare with; give one or leave out the task")
    results = {}
    with inference(*(one for one in (model, teacher) if one is not None)):
        for task in prepared:
            found = []
            for chunk in task.chunks:
                if isinstance(chunk, ModelChunk):
                    found.append(chunk.reduce([model], tokenizer))
                else:
                    rows, places = distinct_rows(chunk.batch)
                    rows, batch = (to_device(part, model.device) for part in (rows, chunk.batch))
                    states = [final_states(model, rows)[places]]
                    found.append(chunk.reduce(*sums_by_row(model, states, batch, task.statistic, teacher)))
                on_chunk()
            costs, weights = torch.cat([cost[0] for cost, _ in found]), torch.cat([weight for _, weight in found])
            mean, error = (costs.sum() / weights.sum()).item(), standard_error(costs, weights)
            quality = {"perplexity": perplexity_of(mean), "kl": mean}.get(task.measure, 1 - mean)
            results[task.name] = TaskResult(task.measure, quality, mean, error, len(costs), task.weight)
    return TaskReport(results)


def standard_error(costs: Tensor, weights: Tensor) -> float | None:
    """Standard error of the mean cost sum(costs) / sum(weights) over E examples, `(E,), (E,) -> number`."""
    count = len(costs)
    if count < 2:
        return None
    deviations = costs - costs.sum() / weights.sum() * weights
    return ((deviations.pow(2).sum() * count / (count - 1)).sqrt() / weights.sum()).item()
