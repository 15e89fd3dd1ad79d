"""Two models answer one prompt, one after the other or at once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from transformers import GenerationConfig

from ..errors import LayerPruneError
from ..loading import load_config, resolve
from .catalog import Catalog, Pairing, revision_of
from .generation import STOPPED, Answer, Generation
from .prompts import check_length, clean, encode_chat, encode_text
from .sampling import Sampling
from .settings import Limits
from .store import ModelStore

IN_TURN, AT_ONCE = "one after the other", "at once"
ORDERS = (IN_TURN, AT_ONCE)
SECONDS_BETWEEN_SNAPSHOTS = 0.12
"""Every token alone would slow a small model down by a third, and no eye needs it."""


@dataclass(frozen=True)
class Request:
    """What a visitor asks for.

    Attributes:
        prompt (`str`): text to continue, or message.
        model (`str`): name on the list; the first by default.
        depth (`int`): of the compressed model; the shallowest by default.
        chat (`bool`): whether the prompt is a message of a conversation.
        order (`str`): `"one after the other"` or `"at once"`.
        sampling (`dict`): settings of [`Sampling`] that differ from the original's own.
        history (`tuple`): turns before: what the visitor wrote, and what each of the two answered.
    """

    prompt: str
    model: str = ""
    depth: int = 0
    chat: bool = False
    order: str = IN_TURN
    sampling: dict[str, Any] = field(default_factory=dict)
    history: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True)
class Snapshot:
    """A comparison at one moment.

    Attributes:
        original ([`Answer`]): of the original.
        compressed ([`Answer`]): of the compressed model.
        order (`str`): how they ran.
    """

    original: Answer
    compressed: Answer
    order: str = IN_TURN

    @property
    def ended(self) -> bool:
        return self.original.ended and self.compressed.ended

    def stopped(self) -> Snapshot:
        """The same, with what has not ended marked as stopped."""
        answers = (self.original, self.compressed)
        return Snapshot(*(a if a.ended else replace(a, state=STOPPED) for a in answers), self.order)


class Comparer:
    """Answers requests with the models of a list.

    Args:
        catalog ([`Catalog`]): what can be chosen.
        store ([`ModelStore`]): where models are kept.
        limits ([`Limits`]): what may be asked for.
    """

    def __init__(self, catalog: Catalog, store: ModelStore, limits: Limits) -> None:
        self.catalog = catalog
        self.store = store
        self.limits = limits
        self._defaults: dict[str, Sampling] = {}

    def defaults(self, pairing: Pairing) -> Sampling:
        """Sampling as the original's checkpoint says; greedy where it says nothing."""
        if pairing.name not in self._defaults:
            self._defaults[pairing.name] = Sampling.of_checkpoint(_generation_config(pairing), self.limits)
        return self._defaults[pairing.name]

    def preload(self, pairing: Pairing, depth: int = 0) -> None:
        """Load both models of a pairing; one that cannot be loaded says so when it is asked."""
        for source in (pairing.teacher, pairing.students[pairing.depth(depth)]):
            with contextlib.suppress(LayerPruneError):
                self.store.get(source)

    def can_chat(self, pairing: Pairing) -> bool:
        """Whether the tokenizer has a chat template."""
        try:
            return bool(self.store.tokenizer(pairing).chat_template)
        except LayerPruneError:
            return False

    def compare(self, request: Request) -> Iterator[Snapshot]:
        """Let both models answer; ten snapshots a second until both have ended.

        Closing the iterator stops both models, behind the tokens that are being computed.

        Raises:
            [`LayerPruneError`]: if the request is beyond the limits, or not of the list.
        """
        pairing = self.catalog[request.model]
        if request.order not in ORDERS:
            raise LayerPruneError(f"order={request.order!r:.50} is unknown; choose {' or '.join(map(repr, ORDERS))}")
        sampling = self.defaults(pairing).with_changes(**request.sampling).checked(self.limits)
        prompts = self._prompts(pairing, request, sampling)
        sources = (pairing.teacher, pairing.students[pairing.depth(request.depth)])
        at_once = request.order == AT_ONCE
        tokenizer, seconds = self.store.tokenizer(pairing), self.limits.max_seconds
        both = [
            Generation(partial(self.store.get, source), tokenizer, ids, sampling, seconds, alone=not at_once)
            for source, ids in zip(sources, prompts, strict=True)
        ]
        try:
            for group in [both] if at_once else [[one] for one in both]:
                for generation in group:
                    generation.start()
                yield from self._snapshots(both, group, request.order)
        finally:
            for generation in both:
                generation.stop()

    def _snapshots(self, both: list[Generation], running: list[Generation], order: str) -> Iterator[Snapshot]:
        """Until those that run have ended; the last one shows them so."""
        while True:
            until = time.monotonic() + SECONDS_BETWEEN_SNAPSHOTS
            for generation in running:
                generation.wait(max(0.0, until - time.monotonic()))
            snapshot = Snapshot(both[0].answer, both[1].answer, order)
            ended = all(generation.answer.ended for generation in running)
            if ended:
                snapshot = Snapshot(both[0].answer, both[1].answer, order)
            yield snapshot
            if ended:
                return

    def _prompts(self, pairing: Pairing, request: Request, sampling: Sampling) -> list[list[int]]:
        """Token ids for both models: they differ where a conversation has gone apart."""
        prompt, tokenizer = clean(request.prompt, self.limits), self.store.tokenizer(pairing)
        if request.chat:
            turns = [[(turn[0], turn[side]) for turn in request.history] for side in (1, 2)]
            prompts = [encode_chat(tokenizer, of_one, prompt) for of_one in turns]
        else:
            prompts = [encode_text(tokenizer, prompt)] * 2
        for ids in prompts:
            check_length(ids, self._context(pairing) - sampling.max_new_tokens, self.limits, request.chat)
        return prompts

    def _context(self, pairing: Pairing) -> int:
        for source in (pairing.teacher, *pairing.students.values()):
            with contextlib.suppress(LayerPruneError):
                return load_config(source.name, **revision_of(source)).max_position_embeddings
        return self.limits.max_prompt_tokens


def _generation_config(pairing: Pairing) -> GenerationConfig:
    source = pairing.teacher
    try:
        return GenerationConfig.from_pretrained(resolve(source.name), **revision_of(source))
    except (OSError, ValueError):
        return GenerationConfig()
