"""How answers are drawn: the settings of a visitor, and a draw that is the same for both models."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import LayerPruneError
from .settings import Limits

RANGES = {
    "temperature": (0.0, 2.0),
    "top_k": (0, 1000),
    "top_p": (0.01, 1.0),
    "repetition_penalty": (1.0, 2.0),
    "seed": (0, 2**31 - 1),
}
"""What each setting may be, beside `max_new_tokens`, which the limits of the demo decide."""


@dataclass(frozen=True)
class Sampling:
    """Settings of one comparison, the same for both models.

    Attributes:
        max_new_tokens (`int`): longest answer, in tokens.
        temperature (`float`): 0 takes the most likely token every time.
        top_k (`int`): draw from so many most likely tokens; 0 is all.
        top_p (`float`): draw from the most likely tokens that hold this share of the probability.
        repetition_penalty (`float`): above 1, tokens that were there before become less likely.
        seed (`int`): the luck of the draw.
    """

    max_new_tokens: int = 96
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    @classmethod
    def of_checkpoint(cls, config: GenerationConfig, limits: Limits) -> Sampling:
        """What the original's own `generation_config.json` says, as far as the demo allows it."""
        own = cls(max_new_tokens=min(96, limits.max_new_tokens))
        if config.do_sample:
            names = ("temperature", "top_k", "top_p", "repetition_penalty")
            told = {name: getattr(config, name, None) for name in names}
            own = replace(own, **{name: value for name, value in told.items() if value is not None})
        try:
            return own.checked(limits)
        except LayerPruneError:
            return cls(max_new_tokens=own.max_new_tokens)

    def with_changes(self, **changes: Any) -> Sampling:
        """These settings with others in their place where those are not `None`."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def checked(self, limits: Limits) -> Sampling:
        """The same settings as plain numbers.

        Raises:
            [`LayerPruneError`]: if one is no number, or out of range.
        """
        ranges = RANGES | {"max_new_tokens": (1, limits.max_new_tokens)}
        whole = {setting.name for setting in fields(self) if setting.type == "int"}
        values = {name: _number(name, value, *ranges[name], name in whole) for name, value in asdict(self).items()}
        return Sampling(**values)

    def processors(self, device: torch.device) -> LogitsProcessorList:
        """What `generate` applies to the scores of the next token before it takes the highest."""
        if self.temperature == 0:
            return LogitsProcessorList()
        steps: list[LogitsProcessor] = [TemperatureLogitsWarper(self.temperature)]
        if self.top_k:
            steps.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            steps.append(TopPLogitsWarper(self.top_p))
        return LogitsProcessorList([*steps, GumbelNoise(self.seed, device)])


def _number(name: str, value: Any, least: float, most: float, whole: bool) -> int | float:
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        number = math.inf
    if not least <= number <= most or (whole and number != int(number)):
        kind = "a whole number" if whole else "a number"
        raise LayerPruneError(f"{name}={value!r:.50} must be {kind} from {least:g} to {most:,.10g}")
    return int(number) if whole else number


class GumbelNoise(LogitsProcessor):
    """Noise that makes the highest score a draw from the distribution (the Gumbel-max trick).

    The noise of a step is the same for both models, token by token, so that where they agree they draw the same word;
    and it is a generator's of its own, so that visitors and models that run at once do not disturb each other.

    Args:
        seed (`int`): of the generator.
        device (`torch.device`): where the scores are.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores, dtype=torch.float32).exponential_(generator=self.generator)
        return scores.float() - noise.log()
