"""First-order importance: what the loss would change if a layer's weights were zero, |weight x gradient|.

As in [LLM-Pruner](https://huggingface.co/papers/2305.11627) and
[Shortened LLaMA](https://huggingface.co/papers/2402.02834), summed over the weights of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from ..data import Batch, valid_next_tokens
from ..forward import final_states, to_device
from ..losses import next_token_loss


def taylor(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    positions: Sequence[int],
    on_batch: Callable[[], None] = lambda: None,
) -> tuple[list[float], float, int]:
    """Sum of |weight x gradient of the mean next-token loss| per position, that loss, and the number of tokens.

    Gradients of the scored layers are held in float32 until the last batch; those of the user are left alone.
    """
    layers = [model.base_model.layers[position] for position in positions]
    parameters = {id(p): p for layer in layers for p in layer.parameters()}
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    gradients = {key: torch.zeros_like(p, dtype=torch.float32) for key, p in parameters.items()}
    num_tokens = sum(len(valid_next_tokens(batch)[1]) for batch in batches)
    loss = 0.0
    mode = model.training
    model.eval()
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(id(parameter) in parameters)
        for batch in batches:
            batch = to_device(batch, model.device)
            valid, labels = valid_next_tokens(batch)
            if len(labels):
                with torch.enable_grad():
                    total = (
                        next_token_loss(final_states(model, batch)[valid], model.lm_head, labels).sum() / num_tokens
                    )
                found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
                for sum_, part in zip(gradients.values(), found, strict=True):
                    if part is not None:
                        sum_ += part
                loss += total.item()
            on_batch()
    finally:
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)
        model.train(mode)
    values = [
        sum(float((p.detach().float() * gradients[id(p)]).abs().double().sum()) for p in layer.parameters())
        for layer in layers
    ]
    return values, loss, num_tokens
