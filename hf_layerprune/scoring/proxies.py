"""Guesses of what removing a layer costs, one function each, and the table they stand in."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from ..data import Batch
from ..errors import LayerPruneError
from ..forward import measuring
from .angles import ANGLES, measure_angles
from .evidence import Evidence
from .measures import MEASURED
from .taylor import taylor


@dataclass(frozen=True)
class Question:
    """What a proxy is asked.

    Attributes:
        model ([`~transformers.PreTrainedModel`]): gradients are off.
        layers (`list[int]`): teacher layer indices of the candidates, each of which runs alone.
        positions (`list[int]`): where these are in `model.base_model.layers`.
        batches (`Sequence[dict[str, Tensor]]`): calibration data; see [`score_layers`].
        seed (`int`): of whatever is drawn.
        on_batch (`Callable[[], None]`): to be called after every batch.
    """

    model: PreTrainedModel
    layers: list[int]
    positions: list[int]
    batches: Sequence[Batch]
    seed: int
    on_batch: Callable[[], None]


@dataclass(frozen=True)
class Guess:
    """What a proxy answers where it has no sample per row of text, and so no standard errors.

    Attributes:
        values (`Sequence[float]`): cost of each candidate; lower is safer to remove.
        baseline (`float`): of the model as it is.
        num_tokens (`int`): tokens the values are made of.
    """

    values: Sequence[float]
    baseline: float = 0.0
    num_tokens: int = 0


@dataclass(frozen=True)
class Proxy:
    """A criterion that guesses.

    Attributes:
        guess (`Callable[[Question], Guess | Evidence]`): answers for all candidates at once.
        needs_data (`bool`): does it run the model on calibration data?
    """

    guess: Callable[[Question], Guess | Evidence]
    needs_data: bool = True


def _angles(criterion: str) -> Proxy:
    def guess(question: Question) -> Evidence:
        stretches = [(position, position + 1) for position in question.positions]
        with measuring(question.model):
            return measure_angles(question.model, question.batches, stretches, criterion, question.on_batch)

    return Proxy(guess)


def _taylor(question: Question) -> Guess:
    return Guess(*taylor(question.model, question.batches, question.positions, question.on_batch))


def _tail(question: Question) -> Guess:
    return Guess([0.0 - layer for layer in question.layers])


def _random(question: Question) -> Guess:
    count = len(question.layers)
    return Guess([float(n) for n in random.Random(question.seed).sample(range(count), count)])


PROXIES: dict[str, Proxy] = {
    **{name: _angles(name) for name in ANGLES},
    "taylor": Proxy(_taylor),
    "tail": Proxy(_tail, needs_data=False),
    "random": Proxy(_random, needs_data=False),
}


def criteria() -> tuple[str, ...]:
    """Names of all criteria, measured and guessed."""
    return (*MEASURED, *PROXIES)


def check_criterion(name: str) -> None:
    """Raise [`LayerPruneError`] unless there is a criterion of that name."""
    if name not in criteria():
        raise LayerPruneError(f"criterion={name!r} is unknown; choose one of {', '.join(criteria())}")


def register_criterion(name: str, guess: Callable[[Question], Guess | Evidence], needs_data: bool = True) -> None:
    """Make a criterion of your own: `criterion=name` then works in [`score_layers`] and the trainer.

    Args:
        name (`str`): of the criterion.
        guess (`Callable[[Question], Guess]`): costs of all candidates, lower is safer to remove.
        needs_data (`bool`, *optional*, defaults to `True`): does it run the model on calibration data?

    Raises:
        [`LayerPruneError`]: if there is a criterion of that name.

    Example:

        def weight_norm(question):
            layers = [question.model.base_model.layers[position] for position in question.positions]
            return Guess([sum(float(p.norm()) for p in layer.parameters()) for layer in layers])

        register_criterion("weight_norm", weight_norm, needs_data=False)
    """
    if name in criteria():
        raise LayerPruneError(f"there is a criterion {name!r} already; choose another name")
    PROXIES[name] = Proxy(guess, needs_data)
