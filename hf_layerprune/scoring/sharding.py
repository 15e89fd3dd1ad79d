"""Several processes share the data that candidates are measured on; all get all results, in the same order."""

from __future__ import annotations

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


def gathered(results: list[Any], processes: int) -> list[Any]:
    """The results of all processes, in the order of their ranks."""
    if processes == 1:
        return results
    everyone: list[Any] = [None] * processes
    dist.all_gather_object(everyone, results)
    return [result for of_process in everyone for result in of_process]
