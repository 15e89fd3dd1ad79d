"""Short hashes that tell two models, texts or settings apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def fingerprint(parts: Iterable[Any]) -> str:
    """Of tensors, and of anything that prints alike where it is alike."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(part.tolist() if isinstance(part, Tensor) else part).encode())
    return digest.hexdigest()[:16]


def fingerprint_model(model: PreTrainedModel) -> str:
    """Of the first weights of every tensor: cheap on any size, different for any two trainings."""
    return fingerprint(parameter.detach().flatten()[:8].float().cpu() for parameter in model.parameters())
