"""Loaded models, each once; the least recently used makes room for the next."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..errors import LayerPruneError
from ..loading import load_model
from ..plan import LayerPlan
from ..surgery import apply_plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """A model to load.

    Attributes:
        name (`str`): folder, Hub id or `"embedded"`.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        plan ([`LayerPlan`], *optional*): blocks that the layers of the loaded model are put into.
    """

    name: str
    revision: str | None = None
    plan: LayerPlan | None = None

    @property
    def options(self) -> dict[str, str]:
        """The revision as an option of what loads it."""
        return {"revision": self.revision} if self.revision else {}


class ModelStore:
    """The models of a demo.

    Args:
        max_models (`int`): models kept in memory.
        dtype (`str`, *optional*, defaults to `"auto"`): dtype of the weights.
        device (`str`, *optional*): by default the GPU, or the CPU where there is none.
    """

    def __init__(self, max_models: int, dtype: str = "auto", device: str | None = None) -> None:
        self.max_models = max_models
        self.dtype = dtype
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._models: dict[ModelSource, PreTrainedModel] = {}  # the most recently used last
        self._lock = threading.RLock()

    @property
    def loaded(self) -> list[ModelSource]:
        """What is in memory, the most recently used last."""
        return list(self._models)

    def get(self, source: ModelSource) -> PreTrainedModel:
        """The model of a source on the device, loaded when first asked for, without sampling settings of its own.

        Raises:
            [`LayerPruneError`]: if it cannot be loaded; the message names no folder of this machine.
        """
        with self._lock:
            model = self._models[source] if source in self._models else self._load(source)
            self._models.pop(source, None)
            self._models[source] = model
            while len(self._models) > self.max_models:
                del self._models[next(iter(self._models))]
            return model

    def _load(self, source: ModelSource) -> PreTrainedModel:
        if source.plan is not None:  # of the teacher's layers, whose weights it shares
            teacher = self.get(ModelSource(source.name, source.revision))
            return apply_plan(teacher, source.plan, share_weights=True)
        try:
            model = load_model(source.name, self.dtype, self.device, **source.options)
        except LayerPruneError as error:
            logger.warning("loading %s: %s", source.name, error)
            raise LayerPruneError(str(error).replace(source.name, Path(source.name).name)) from error
        own = model.generation_config
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        pad = next(token for token in (own.pad_token_id, *ends, 0) if token is not None)
        model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=pad)
        return model.eval().to(self.device)
