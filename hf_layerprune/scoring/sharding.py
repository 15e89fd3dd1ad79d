"""Several processes share the data that candidates are measured on; all get all results, in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def shard(model: PreTrainedModel) -> tuple[int, int]:
    """Which piece of data is this process's, and how many there are: `(rank, number of processes)`.

    A model that is itself split over the processes (tensor parallelism) is run by all of them on all data.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def own_share(items: Sequence[Any], model: PreTrainedModel) -> Sequence[Any]:
    """Every n-th of the items; [`gathered`] puts what came of them together."""
    first, step = shard(model)
    return items[first::step]


def gathered(results: list[Any], model: PreTrainedModel) -> list[Any]:
    """The results for all items, in the order of the items, from what each process has of its [`own_share`]."""
    _, processes = shard(model)
    if processes == 1:
        return results
    everyone: list[Any] = [None] * processes
    dist.all_gather_object(everyone, results)
    return [everyone[n % processes][n // processes] for n in range(sum(map(len, everyone)))]
