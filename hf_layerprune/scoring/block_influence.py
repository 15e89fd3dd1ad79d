"""Block influence: how far a layer turns its input, 1 - cos(input, output), as in ShortGPT.

https://huggingface.co/papers/2403.03853. No head, no stored states: each layer's hook adds up and forgets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..data import Batch
from ..forward import final_states, to_device


def block_influence(
    model: PreTrainedModel, batches: list[Batch], positions: list[int], on_batch: Callable[[], None] = lambda: None
) -> tuple[list[float], int]:
    """Mean `1 - cos` per position over all unpadded tokens, and their number."""
    total = torch.zeros(len(positions), dtype=torch.float64)
    num_tokens = 0
    counts: Tensor | None = None

    def hook(index: int) -> Callable[..., None]:
        def add(_: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            distance = 1 - F.cosine_similarity(args[0].float(), output.float(), dim=-1)  # (B, T)
            total[index] += distance[counts].double().sum().cpu()

        return add

    handles = [
        model.base_model.layers[position].register_forward_hook(hook(index))
        for index, position in enumerate(positions)
    ]
    try:
        for batch in batches:
            batch = to_device(batch, model.device)
            mask = batch.get("attention_mask")
            counts = torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
            num_tokens += int(counts.sum())
            final_states(model, batch)
            on_batch()
    finally:
        for handle in handles:
            handle.remove()
    return (total / num_tokens).tolist(), num_tokens
