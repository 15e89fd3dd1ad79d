"""What is known of two models before anybody asks: how the original samples, whether it chats, how much it reads."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from transformers import GenerationConfig

from ..errors import LayerPruneError
from ..loading import is_gguf, load_config, resolve, split_revision
from .catalog import ModelSource, Pairing, revision_of
from .sampling import Sampling
from .settings import Limits
from .store import ModelStore


@dataclass(frozen=True)
class Facts:
    """Read once for each pairing.

    Attributes:
        sampling ([`Sampling`]): as the original's checkpoint says; greedy where it says nothing.
        can_chat (`bool`): whether the tokenizer has a chat template.
        context (`int`): positions that a prompt and its answer share.
        complete (`bool`): whether everything could be read; if not, it is worth another try.
    """

    sampling: Sampling
    can_chat: bool
    context: int
    complete: bool = True

    def most_new_tokens(self, limits: Limits) -> int:
        """The longest answer that the limits and the model allow."""
        return max(1, min(limits.max_new_tokens, self.context - 1))


def read_facts(pairing: Pairing, store: ModelStore, limits: Limits) -> Facts:
    """Read them from the checkpoints; what cannot be read is guessed."""
    config = _generation_config(pairing.teacher)
    context = _context(pairing)
    try:
        can_chat: bool | None = bool(store.tokenizer(pairing).chat_template)
    except LayerPruneError:
        can_chat = None
    return Facts(
        sampling=Sampling.of_checkpoint(config or GenerationConfig(), limits),
        can_chat=bool(can_chat),
        context=context or limits.max_prompt_tokens + limits.max_new_tokens,
        complete=None not in (config, can_chat, context),
    )


def _generation_config(source: ModelSource) -> GenerationConfig | None:
    """An empty one where the checkpoint has none; `None` if it could not be read this time."""
    if is_gguf(source.name):
        return GenerationConfig()
    name, revision = resolve(source.name), source.revision or split_revision(source.name)[1]
    try:
        return GenerationConfig.from_pretrained(name, revision=revision or "main")
    except (OSError, ValueError):
        file = "generation_config.json"
        missing = Path(name).is_dir() or try_to_load_from_cache(name, file, revision=revision) is _CACHED_NO_EXIST
        return GenerationConfig() if missing else None


def _context(pairing: Pairing) -> int | None:
    for source in (pairing.teacher, *pairing.students.values()):
        with contextlib.suppress(LayerPruneError):
            return load_config(source.name, **revision_of(source)).max_position_embeddings
    return None
