"""`option`, what settings are made of, and the settings of a teacher's answers, whose `--help` needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import LayerPruneError


def option(default: Any, help: str, **more: Any) -> Any:
    """A setting, its help, and what else argparse should know."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help, **more})
    return field(default=default, metadata={"help": help, **more})


def check_at_least(settings: Any, bounds: Mapping[str, float]) -> None:
    """Raise [`LayerPruneError`] for a number below its bound; if that is a whole number, the setting must be one too.
    A setting that is `None` is not set."""
    values = settings if isinstance(settings, dict) else vars(settings)
    for name, least in bounds.items():
        value = values.get(name)
        kind, words = (int, "a whole number") if isinstance(least, int) else ((int, float), "a number")
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        if value is not None and not (is_number and least <= value < math.inf):
            raise LayerPruneError(f"{name}={value!r} must be {words} of at least {least:g}")


@dataclass
class HealingDataConfig:
    r"""
    Settings of [`generate_healing_data`].

    Parameters:
        prompt_column (`str`, *optional*):
            Messages, whose last answers are left out, or text; by default the first of messages, prompt, text and
            conversations.
        as_chat (`bool`, *optional*, defaults to `False`): make each text a user's message instead of continuing it.
        prompt_tokens (`int`, *optional*, defaults to `32`):
            A text's prompt is the words in its first so many tokens; a column named `"prompt"` is used whole.
        num_prompts (`int`, *optional*): rows to use, from the first; all by default.
        max_prompt_tokens (`int`, *optional*):
            Leave out longer prompts, chat template included; by default what `max_new_tokens` leaves of the positions.
        max_new_tokens (`int`, *optional*, defaults to `256`): longest answer in tokens.
        temperature (`float`, *optional*):
            0 is greedy. By default, as for `top_p` and `top_k`, the checkpoint's own, or 1 and all tokens if its
            generation config does not sample.
        top_p (`float`, *optional*): share of the probability to sample from.
        top_k (`int`, *optional*): number of tokens to sample from; 0 is all.
        seed (`int`, *optional*, defaults to `42`): seed of the sampling.
        batch_size (`int`, *optional*, defaults to `8`): prompts at a time, per process.

    Raises:
        [`LayerPruneError`]: for a value out of range.
    """

    prompt_column: str | None = option(
        None, "Column of the prompts; by default the first of messages, prompt, text, conversations."
    )
    as_chat: bool = option(False, "Turn each text into a user's message.")
    prompt_tokens: int = option(32, "Tokens at the beginning of a text that are its prompt.")
    num_prompts: int | None = option(None, "Rows to use, from the first; all by default.")
    max_prompt_tokens: int | None = option(None, "Leave out longer prompts; by default those that do not fit.")
    max_new_tokens: int = option(256, "Longest answer in tokens.")
    temperature: float | None = option(None, "0 is greedy. Default of this, top_p and top_k: the checkpoint's.")
    top_p: float | None = option(None, "Share of the probability to sample from.")
    top_k: int | None = option(None, "Number of tokens to sample from; 0 is all.")
    seed: int = option(42, "Seed of the sampling.")
    batch_size: int = option(8, "Prompts at a time, per process.")

    def __post_init__(self) -> None:
        counts = ("prompt_tokens", "num_prompts", "max_prompt_tokens", "max_new_tokens", "batch_size")
        check_at_least(self, dict.fromkeys(counts, 1) | {"temperature": 0.0, "top_p": 0.0, "top_k": 0})
        if self.top_p is not None and self.top_p > 1:
            raise LayerPruneError(f"top_p={self.top_p} is out of range; it must be at most 1")
