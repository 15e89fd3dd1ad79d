"""Tasks of [lm-eval](https://github.com/EleutherAI/lm-evaluation-harness), on a model in memory; an extra."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import LayerPruneError, first_line
from .chunks import PreparedTask
from .task import Task


@dataclass(frozen=True)
class PreparedLmEvalTask(PreparedTask):
    """A task lm-eval runs itself; it has no chunks, and its costs come from a whole model.

    Attributes:
        limit (`int`, *optional*): examples at most.
        batch_size (`int`): rows at a time.
        source (`str`): name of a task of lm-eval, or a YAML file in its format.
    """

    source: str = ""
    limit: int | None = None
    batch_size: int = field(default=8)

    def costs(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
        """What each example costs a model, `(E,)`, 1 - the task's first metric, and the weights, `(E,)`, 1.

        Raises:
            [`LayerPruneError`]: if lm-eval cannot run the task, or the metric is none of a single example in [0, 1].
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        path = Path(self.source)
        try:
            if path.is_file():
                manager = TaskManager(include_path=str(path.resolve().parent), include_defaults=False)
                name = yaml_task_name(path) or path.stem
            else:
                manager, name = TaskManager(), self.source
            output = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size),
                tasks=[name],
                limit=self.limit,
                task_manager=manager,
                log_samples=True,
                bootstrap_iters=0,
                random_seed=None,  # the seeds belong to the run around this
                numpy_random_seed=None,
                torch_random_seed=None,
                verbosity="ERROR",
            )
        except Exception as error:  # lm-eval raises many types, for a missing task as for a broken row
            raise LayerPruneError(f"task {self.name}: lm-eval cannot run it: {first_line(error)}") from error
        return costs_of_samples(output["samples"], self.name)


def yaml_task_name(path: Path) -> str | None:
    """The name a YAML file in lm-eval's format gives its task; none if it is no such file.

    The file may hold tags only lm-eval understands, so it is not parsed here.
    """
    found = re.search(
        r"""^task:[ \t]*["']?([\w.\-]+)""", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE
    )
    return found and found[1]


def costs_of_samples(samples: dict[str, list[dict[str, Any]]], name: str) -> tuple[Tensor, Tensor]:
    """The costs `(E,)` and weights `(E,)` of the samples lm-eval logged, by task (a group has several)."""
    scores = []
    for rows in samples.values():
        for row in rows:
            metric = row["metrics"][0]
            value = row[metric]
            if not isinstance(value, (int, float)) or not 0 <= value <= 1 or math.isnan(value):
                raise LayerPruneError(
                    f"task {name}: its first metric, {metric}, is no number in [0, 1] per example but {value!r:.40}; "
                    "choose a task judged by accuracy or exact match"
                )
            scores.append(float(value))
    if not scores:
        raise LayerPruneError(f"task {name}: lm-eval scored no example")
    return 1 - torch.tensor(scores, dtype=torch.float64), torch.ones(len(scores), dtype=torch.float64)


@dataclass(eq=False, kw_only=True)
class LmEvalTask(Task):
    """A task of lm-eval by its name (`"arc_easy"`) or by a YAML file in its format (`dataset` here).

    It is judged by the task's first metric, and run by lm-eval itself on the model in memory, one model at a time.
    Such a YAML file can name Python functions, which lm-eval runs: use only files you trust.

    Raises:
        [`LayerPruneError`]: if lm-eval is not installed.
    """

    kind: ClassVar[str] = "lm_eval"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            import lm_eval  # noqa: F401
        except ImportError as error:
            raise LayerPruneError(
                f"{self.title}: lm-eval is not installed; `pip install 'hf-layerprune[lm-eval]'` brings it"
            ) from error

    def prepare(
        self, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8, max_length: int | None = None
    ) -> PreparedLmEvalTask:
        """lm-eval reads and tokenizes the data itself, when [`~PreparedLmEvalTask.costs`] are asked for."""
        return PreparedLmEvalTask(
            self.name,
            self.weight,
            "lm_eval",
            "score",
            [],
            source=str(self.dataset),
            limit=self.limit,
            batch_size=batch_size,
        )
