"""The private names of TRL and transformers that the library imports or changes, in one place.

`tests/test_trl_internals.py` fails loudly when one of these moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from datasets import IterableDataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer
from trl.models.utils import _ForwardRedirection

redirect_forward: Callable[..., Any] = _ForwardRedirection()
"""`redirect_forward(wrapper, module, method, *args)`: call `method` as if it were `module`'s forward, through the
wrapper (DDP, FSDP), so that the wrapper's hooks run."""


def restore_forward(model: PreTrainedModel) -> None:
    """Undo the patches of `model.forward` that `SFTTrainer.__init__` (its fused head) and accelerate (mixed precision)
    leave on a model: this library computes its loss from hidden states, and a patched model neither copies nor
    pickles."""
    model.__dict__.pop("forward", None)


@contextmanager
def forward_put_back(model: PreTrainedModel) -> Iterator[None]:
    """Give `model` back the forward it had, which accelerate replaces for good."""
    before = dict(vars(model))
    try:
        yield
    finally:
        for name in ("forward", "_original_forward"):
            vars(model).pop(name, None)
            vars(model).update({name: before[name]} if name in before else {})


def set_model(trainer: SFTTrainer, model: nn.Module) -> None:
    """Give a trainer another model to evaluate, save and push."""
    trainer.model = trainer.model_wrapped = trainer.callback_handler.model = model


def keep_weights_in_place(trainer: SFTTrainer, model: nn.Module) -> None:
    """Tell TRL's activation offloading, where it is on, which saved tensors are weights of `model` and stay."""
    if trainer.args.activation_offloading:
        trainer.maybe_activation_offload_context.update_model_params(model)


def tokenized(
    rows: IterableDataset, columns: list[str], tokenizer: PreTrainedTokenizerBase, text_field: str
) -> IterableDataset:
    """Rows as an [`SFTTrainer`] with default settings tokenizes them, but uncut: `input_ids` and `labels`."""
    end = SimpleNamespace(eos_token=tokenizer.eos_token or "")
    only_completions = {"prompt", "completion"} <= set(columns)
    trainer = SimpleNamespace(_tokenizer=end, chat_template=None, completion_only_loss=only_completions)
    args = SimpleNamespace(
        dataset_text_field=text_field, assistant_only_loss=False, max_length=None, shuffle_dataset=False
    )
    return SFTTrainer._prepare_dataset(trainer, rows, tokenizer, args, False, None, "")
