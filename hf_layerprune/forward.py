"""Run a causal language model, or a part of it, record what its blocks are called with, and share out the work.

Shapes: B batch, T positions, H hidden, L blocks of the model. A hidden state is numbered by the block that reads it:
state 0 is the embedding, block p turns state p into state p + 1, and the final norm reads state L.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2ForCausalLM

from .architectures import architecture_of
from .data import Batch
from .errors import LayerPruneError

Key = TypeVar("Key")
CACHE = "cache" if "cache" in signature(Qwen2ForCausalLM.forward).parameters else "past_key_values"
"""What models call the argument that is their KV cache: since transformers 5.24 `cache`."""


def to_device(batch: Mapping[Key, Tensor], device: torch.device) -> dict[Key, Tensor]:
    return {key: value.to(device) for key, value in batch.items()}


def unpadded(batch: Batch) -> Tensor:
    """Which positions are not padding: `(B, T)`."""
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


def final_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Hidden states after the final norm: `(B, T, H)`."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return model.base_model(**{"use_cache": False, "return_dict": True} | inputs).last_hidden_state


@dataclass
class Recording:
    """The states, and keyword arguments, that parts of a model received in a forward pass."""

    states: dict[int, Tensor] = field(default_factory=dict)  # (B, T, H), by number
    arguments: dict[int, dict[str, Any]] = field(default_factory=dict)  # of the blocks that read them
    inner: dict[int, Tensor] = field(default_factory=dict)  # what a module inside a block read, by its position
    final: Tensor | None = None  # states after the final norm, unless the pass stopped early


class _Stop(Exception):
    """Ends a forward pass where the rest of the model need not run."""


def record(
    model: PreTrainedModel,
    batch: Batch,
    states: Collection[int],
    inner: Mapping[int, nn.Module] | None = None,
    stop: bool = False,
) -> Recording:
    """Run a model on a batch and record some hidden states.

    Args:
        batch (`dict[str, Any]`): what the model is called with, on its device; labels are left out.
        states (`Collection[int]`): numbers of the states to record.
        inner (`Mapping[int, nn.Module]`, *optional*): by position, a module inside a block whose input is recorded.
        stop (`bool`, *optional*, defaults to `False`): whether to stop at the last of `states`.
    """
    decoder, recording = model.base_model, Recording()
    last = max(states) if stop else None

    def at_state(number: int, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        recording.arguments[number] = kwargs
        recording.states[number] = args[0]
        if number == last:
            raise _Stop

    def inside(position: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        recording.inner[position] = args[0]

    readers = [*decoder.layers, decoder.norm]
    with ExitStack() as hooks:
        for number in states:
            hook = readers[number].register_forward_pre_hook(partial(at_state, number), with_kwargs=True)
            hooks.enter_context(hook)
        for position, module in (inner or {}).items():
            hooks.enter_context(module.register_forward_pre_hook(partial(inside, position)))
        with suppress(_Stop):
            recording.final = final_states(model, batch)
    return recording


def replay(
    recording: Recording,
    start: int,
    blocks: Iterable[Callable[..., Tensor]],
    norm: nn.Module,
    states: Collection[int] = (),
) -> Recording:
    """Run `blocks`, of the same model or of another, and `norm` from the recorded state `start` on.

    Args:
        recording ([`Recording`]): holds that state, and the arguments which each block is called with.
        states (`Collection[int]`, *optional*): numbers of states to record, of those that a block reads.
    """
    state, arguments = recording.states[start], recording.arguments[start]
    replayed = Recording()
    for number, block in enumerate(blocks, start):
        if number in states:
            replayed.states[number] = state
        state = block(state, **arguments)
    replayed.final = norm(state)
    return replayed


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what `module` reads."""
    found: list[Tensor] = []
    with module.register_forward_pre_hook(lambda _, args: found.append(args[0])):
        yield found


@contextmanager
def inference(*models: PreTrainedModel) -> Iterator[None]:
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


def check_causal(model: PreTrainedModel) -> None:
    """Raise [`LayerPruneError`] unless `model` is a causal language model with an output head."""
    if not hasattr(model, "lm_head"):
        raise LayerPruneError(
            f"{type(model).__name__} has no lm_head, so it is not a causal language model; load it with "
            "hf_layerprune.load_model"
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str) -> None:
    """Raise [`LayerPruneError`] if a tokenizer has tokens that the model called `name` lacks."""
    if len(tokenizer) > model.config.vocab_size:
        raise LayerPruneError(
            f"the tokenizer has {len(tokenizer)} tokens but {name} only {model.config.vocab_size}; give the model a "
            "row for each (resize_token_embeddings), or use its own tokenizer, and of another model the chat template "
            "alone, as a .jinja file"
        )


def check_same_vocabulary(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise [`LayerPruneError`] unless both are causal language models of one vocabulary, with weights, without
    adapters, and of supported families: others may scale their logits."""
    for one in (model, teacher):
        check_causal(one)
        if is_peft_model(one):  # its `base_model` is not the decoder
            raise LayerPruneError(f"{type(one).__name__} carries adapters; merge them first (merge_and_unload)")
        architecture_of(one.config)
        if all(p.is_meta for p in one.parameters()) and not any(hasattr(m, "_hf_hook") for m in one.modules()):
            raise LayerPruneError("the model has no weights, it is on the device meta; load it on another")
    if teacher.config.vocab_size != model.config.vocab_size:
        raise LayerPruneError(
            f"the teacher's vocabulary has {teacher.config.vocab_size} entries and the student's "
            f"{model.config.vocab_size}; they must be the same: use a teacher of the same model family"
        )
