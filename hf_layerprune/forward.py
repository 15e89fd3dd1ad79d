"""Running a causal language model up to its head, for measuring."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import Batch
from .errors import LayerPruneError


def to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in batch.items()}


def final_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Hidden states behind the final norm: `(B, T, H)`."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return model.base_model(**inputs, use_cache=False).last_hidden_state


class Reached(Exception):
    """Raised by a hook at the first layer that need not run."""


def call_of_layer(decoder: PreTrainedModel, inputs: Batch, position: int) -> tuple[Tensor, dict[str, Any]]:
    """The input state `(B, T, H)` and the keyword arguments of the layer at `position`; only those before it run."""
    call: list[Any] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call.extend((args[0], kwargs))
        raise Reached

    handle = decoder.layers[position].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        decoder(**inputs)
    except Reached:
        pass
    finally:
        handle.remove()
    state, kwargs = call
    return state, kwargs


def run_for_hooks(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Run the decoder as far as its hooks let it; return which positions are not padding, `(B, T)`."""
    batch = to_device(batch, model.device)
    with suppress(Reached):
        final_states(model, batch)
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


@contextmanager
def measuring(*models: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; each model's own mode comes back afterwards."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def check_causal(model: PreTrainedModel) -> None:
    """Raise [`LayerPruneError`] unless `model` is a causal language model with an output head."""
    if isinstance(model, str):
        raise LayerPruneError(f"{model!r} is a name, not a model; load it with hf_layerprune.load_model({model!r})")
    if not isinstance(model, nn.Module) or not hasattr(model, "lm_head"):
        raise LayerPruneError(
            f"{type(model).__name__} is no causal language model, it has no lm_head; load it by AutoModelForCausalLM"
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str) -> None:
    """Raise [`LayerPruneError`] if a tokenizer knows tokens that the model called `name` does not."""
    if len(tokenizer) > model.config.vocab_size:
        raise LayerPruneError(
            f"the tokenizer has {len(tokenizer)} tokens but {name} only {model.config.vocab_size}; use the model's own"
        )


def check_same_vocabulary(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise [`LayerPruneError`] unless both are causal language models over the same number of tokens."""
    check_causal(model)
    check_causal(teacher)
    if teacher.config.vocab_size != model.config.vocab_size:
        raise LayerPruneError(
            f"the teacher's vocabulary has {teacher.config.vocab_size} entries and the student's "
            f"{model.config.vocab_size}; they must be the same: use a teacher of the same model family"
        )
