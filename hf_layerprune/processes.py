"""How several processes share out the measuring of one model."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def shard(model: PreTrainedModel) -> tuple[int, int]:
    """Which share of the data is this process's, and how many there are: `(rank, number of processes)`.

    A model that is itself split over the processes (tensor parallelism) is run by all of them on all data.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gathered(results: list[Any], processes: tuple[int, int]) -> list[Any]:
    """The results of all items in order, if each process has those of `items[rank::number of processes]`."""
    _, count = processes
    if count == 1:
        return results
    everyone: list[Any] = [None] * count
    dist.all_gather_object(everyone, results)
    return [everyone[n % count][n // count] for n in range(sum(map(len, everyone)))]
