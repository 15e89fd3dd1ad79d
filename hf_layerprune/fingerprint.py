"""Short hashes that tell two models, texts or settings apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def fingerprint(parts: Iterable[Any]) -> str:
    """Hash tensors, and anything else by how it prints."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(part.tolist() if isinstance(part, Tensor) else part).encode())
    return digest.hexdigest()[:16]


def fingerprint_model(model: PreTrainedModel) -> str:
    """Hash some weights from all over every tensor: cheap at any size, different after any training."""
    flat = (parameter.detach().flatten() for parameter in model.parameters())
    return fingerprint(weights[:: max(1, len(weights) // 8)].float().cpu() for weights in flat)
