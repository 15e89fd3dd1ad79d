"""Tasks of [lm-eval](https://github.com/EleutherAI/lm-evaluation-harness), on a model in memory; an extra."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import LayerPruneError, first_line
from .chunks import Chunk
from .task import Task

FEW_SHOT_SEED = 1234  # lm-eval's own


@dataclass(frozen=True)
class LmEvalChunk(Chunk):
    """A whole task, which lm-eval runs itself, one model at a time; its `batch` is empty.

    Attributes:
        loaded (`dict[str, Any]`): the task with its data, or the several of a group, as lm-eval's manager loads them.
        limit (`int`, *optional*): most examples, of each task of a group.
        batch_size (`int`): rows at a time.
    """

    loaded: dict[str, Any] = field(repr=False)
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
    """The costs `(E,)` of the samples lm-eval logged, by task (a group has several).

    A task of several filters logs every example once by each; the first filter counts.

    Raises:
        [`LayerPruneError`]: if the first metric of a task is not a number in [0, 1] per example.
    """
    scores = []
    for name, rows in samples.items():
        for row in rows:
            if row["filter"] != rows[0]["filter"]:  # the same answer, read in another way
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
    """A task of lm-eval by its name (`"arc_easy"`) or by a YAML file in its format (`dataset` here).

    It is judged by the task's first metric and first filter, and run by lm-eval itself on the model in memory, one
    model at a time. `limit` takes the first examples, of each task if the name is that of a group. Such a YAML file
    can name Python functions, which lm-eval runs: use only files you trust.
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
            raise LayerPruneError("lm-eval is not installed; `pip install 'hf-layerprune[lm-eval]'`") from error
        except Exception as error:  # a missing task, a broken file: each raises its own
            raise LayerPruneError(f"lm-eval cannot load it: {first_line(error)}") from error
        return [LmEvalChunk({}, loaded, self.limit, batch_size)]
