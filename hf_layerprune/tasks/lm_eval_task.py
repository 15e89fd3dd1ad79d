"""Tasks of [lm-eval](https://github.com/EleutherAI/lm-evaluation-harness), on a model in memory; an extra."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import LayerPruneError, first_line
from .chunks import Chunk, PreparedTask
from .task import Task

FEW_SHOT_SEED = 1234  # lm-eval's own


@dataclass(frozen=True)
class LmEvalChunk(Chunk):
    """A whole task, which lm-eval runs itself, one model at a time; its `batch` is empty.

    Attributes:
        title (`str`): what errors call the task.
        loaded (`dict[str, Any]`): the task with its data, or the several of a group, as lm-eval's manager loads them.
        limit (`int`, *optional*): most examples, of each task of a group.
        batch_size (`int`): rows at a time.
    """

    title: str
    loaded: dict[str, Any] = field(repr=False)
    limit: int | None
    batch_size: int

    def fingerprint(self) -> list[Any]:
        return [*sorted(self.loaded["tasks"]), self.limit]

    def reduce(self, models: Iterable[PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
        """C models to `(C, E)` costs, 1 - the task's first metric, and `(E,)` weights, 1.

        Raises:
            [`LayerPruneError`]: if lm-eval cannot run the task, or its first metric is not one in [0, 1] per example.
        """
        costs = torch.stack([self._costs(model, tokenizer) for model in models])
        return costs, torch.ones(costs.shape[1], dtype=torch.float64)

    def _costs(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        for task in self.loaded["tasks"].values():
            task.set_fewshot_seed(FEW_SHOT_SEED)  # the same examples for every model
        with lm_eval_errors(f"{self.title}: lm-eval cannot run it"):
            output = lm_eval.evaluate(
                lm=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size),
                task_dict=self.loaded,
                limit=self.limit,
                bootstrap_iters=0,
            )
        return costs_of_samples(output["samples"], self.title)


def costs_of_samples(samples: dict[str, list[dict[str, Any]]], title: str) -> Tensor:
    """The costs `(E,)` of the samples lm-eval logged, by task (a group has several).

    A task of several filters logs every example once by each; the first filter counts.
    """
    scores = []
    for rows in samples.values():
        for row in rows:
            if row["filter"] != rows[0]["filter"]:  # the same answer, read in another way
                continue
            metric = row["metrics"][0]
            value = row[metric]
            if not isinstance(value, (int, float)) or not 0 <= value <= 1 or math.isnan(value):
                raise LayerPruneError(
                    f"{title}: its first metric, {metric}, must be a number in [0, 1] per example, not {value!r:.40}; "
                    "choose a task judged by accuracy or exact match"
                )
            scores.append(float(value))
    if not scores:
        raise LayerPruneError(f"{title}: lm-eval scored no example")
    return 1 - torch.tensor(scores, dtype=torch.float64)


@contextmanager
def lm_eval_errors(what: str) -> Iterator[None]:
    """Say in one line what went wrong: lm-eval raises many types, for a missing task as for a broken row."""
    try:
        yield
    except Exception as error:
        raise LayerPruneError(f"{what}: {first_line(error)}") from error


@dataclass(eq=False, kw_only=True)
class LmEvalTask(Task):
    """A task of lm-eval by its name (`"arc_easy"`) or by a YAML file in its format (`dataset` here).

    It is judged by the task's first metric and first filter, and run by lm-eval itself on the model in memory, one
    model at a time. `limit` takes the first examples, of each task if the name is that of a group. Such a YAML file
    can name Python functions, which lm-eval runs: use only files you trust.

    Raises:
        [`LayerPruneError`]: if lm-eval is not installed, or a setting is given that its task holds itself.
    """

    kind: ClassVar[str] = "lm_eval"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split != "test" or self.config_name is not None:
            raise LayerPruneError(f"{self.title}: lm-eval knows where the data lies; leave out split and config_name")
        try:
            import lm_eval  # noqa: F401
        except ImportError as error:
            raise LayerPruneError(
                f"{self.title}: lm-eval is not installed; `pip install 'hf-layerprune[lm-eval]'` brings it"
            ) from error

    def prepare(
        self, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8, max_length: int | None = None
    ) -> PreparedTask:
        """Let lm-eval read the data; it tokenizes when it runs."""
        from lm_eval.tasks import TaskManager

        path = Path(self.dataset)
        with lm_eval_errors(f"{self.title}: lm-eval cannot load it"):
            if path.is_file():
                manager = TaskManager(include_path=str(path.resolve().parent), include_defaults=False)
                loaded = manager.load([yaml_task_name(path) or path.stem])
            else:
                loaded = TaskManager().load([self.dataset])
        chunk = LmEvalChunk({}, self.title, loaded, self.limit, batch_size)
        return PreparedTask(self.name, self.weight, "score", [chunk])


def yaml_task_name(path: Path) -> str | None:
    """The name a YAML file in lm-eval's format gives its task, or `None` if it has another format.

    The file may hold tags only lm-eval understands, so it is not parsed here.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"""^task:[ \t]*["']?([\w.\-]+)""", text, re.MULTILINE)
    return found and found[1]
