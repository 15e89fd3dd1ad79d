"""Loaded models, each once, the least recently used one making room for the next."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..benchmark import kv_bytes_per_token, weight_bytes
from ..errors import LayerPruneError
from ..loading import load_model, load_tokenizer
from ..surgery import apply_plan, plan_of
from .catalog import ModelSource, Pairing, revision_of
from .device import default_device, on_zero_gpu

logger = logging.getLogger(__name__)


class _Locks:
    """One model loads at a time, as `from_pretrained` sets what is global; tokenizers do not wait for models.

    What is in memory is read without a lock. A forked process starts with new ones: whoever held these is not in it.
    """

    def __init__(self) -> None:
        self.models = threading.Lock()
        self.tokenizers = threading.Lock()


LOCKS = _Locks()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=LOCKS.__init__)  # type: ignore[misc]


@dataclass(frozen=True)
class LoadedModel:
    """A model and the facts the page shows.

    Attributes:
        model ([`~transformers.PreTrainedModel`]): on the device, without sampling settings of its own.
        num_parameters (`int`): parameters, shared ones counted once.
        num_layers (`int`): depth.
        weight_bytes (`int`): memory of the weights.
        kv_bytes_per_token (`int`): size of the KV cache per token of context.
    """

    model: PreTrainedModel
    num_parameters: int
    num_layers: int
    weight_bytes: int
    kv_bytes_per_token: int


class ModelStore:
    """Models and tokenizers of a demo.

    Args:
        max_models (`int`): models kept in memory.
        dtype (`str`, *optional*, defaults to `"auto"`): dtype of the weights.
        device (`str` or `torch.device`, *optional*): by default the GPU, or the CPU where there is none.
    """

    def __init__(self, max_models: int, dtype: str = "auto", device: str | torch.device | None = None) -> None:
        self.max_models = max_models
        self.dtype = dtype
        self.device = torch.device(device or default_device())
        self._models: OrderedDict[ModelSource, LoadedModel] = OrderedDict()
        self._tokenizers: dict[ModelSource, PreTrainedTokenizerBase] = {}

    @property
    def loaded(self) -> list[ModelSource]:
        """What is in memory, the most recently used last."""
        return list(self._models)

    def get(self, source: ModelSource) -> LoadedModel:
        """The model of a source, loaded and warmed up when it is asked for first.

        Raises:
            [`LayerPruneError`]: if it cannot be loaded; the message names no place of this machine.
        """
        loaded = self._models.get(source)
        if loaded is None:
            with LOCKS.models:
                loaded = self._models.get(source) or self._load(source)
                self._models[source] = loaded
        with contextlib.suppress(KeyError):  # it made room for another since
            self._models.move_to_end(source)
        return loaded

    def tokenizer(self, pairing: Pairing) -> PreTrainedTokenizerBase:
        """The tokenizer of the original; where it has none, that of a student.

        Raises:
            [`LayerPruneError`]: if neither has one.
        """
        if pairing.teacher not in self._tokenizers:
            with LOCKS.tokenizers:
                if pairing.teacher not in self._tokenizers:
                    self._tokenizers[pairing.teacher] = _tokenizer(pairing)
        return self._tokenizers[pairing.teacher]

    def _load(self, source: ModelSource) -> LoadedModel:
        try:
            model = load_model(source.name, self.dtype, self.device, **revision_of(source))
            if source.plan is not None:
                model = apply_plan(model, source.plan)
            self._make_room()  # only now, so that what cannot be loaded sends nothing away
            return _prepared(model.eval(), self.device)
        except torch.OutOfMemoryError as error:
            logger.warning("loading %s: %s", source.name, error)
            raise LayerPruneError("not enough memory to load this model; a smaller max_models leaves more") from error
        except LayerPruneError as error:
            logger.warning("loading %s: %s", source.name, error)
            raise LayerPruneError(str(error).replace(source.name, Path(source.name).name)) from error

    def _make_room(self) -> None:
        while len(self._models) >= self.max_models:
            self._models.popitem(last=False)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def _prepared(model: PreTrainedModel, device: torch.device) -> LoadedModel:
    """Move to the device, warm up, and take the sampling settings away: each request brings its own."""
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=_pad(own))
    kv_bytes = kv_bytes_per_token(model)
    model.to(device)
    if not on_zero_gpu():  # which lends its GPU only to the calls that are marked for it
        ids = torch.zeros((1, 8), dtype=torch.long, device=device)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return LoadedModel(
        model=model,
        num_parameters=model.num_parameters(),
        num_layers=plan_of(model).depth,
        weight_bytes=weight_bytes(model),
        kv_bytes_per_token=kv_bytes,
    )


def _pad(config: GenerationConfig) -> int:
    if config.pad_token_id is not None:
        return config.pad_token_id
    end = config.eos_token_id
    return 0 if end is None else end[0] if isinstance(end, list) else end


def _tokenizer(pairing: Pairing) -> PreTrainedTokenizerBase:
    problem: LayerPruneError | None = None
    for source in (pairing.teacher, *pairing.students.values()):
        try:
            return load_tokenizer(source.name, **revision_of(source))
        except LayerPruneError as error:
            logger.warning("tokenizer of %s: %s", source.name, error)
            problem = LayerPruneError(str(error).replace(source.name, Path(source.name).name))
    raise problem or LayerPruneError(f"{pairing.name} has no tokenizer")
