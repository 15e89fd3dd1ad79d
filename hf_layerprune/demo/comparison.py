"""Two models answer one prompt, one after the other or at once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ..errors import LayerPruneError
from .catalog import Catalog, Pairing
from .device import seconds_for_an_answer
from .facts import Facts, read_facts
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


@dataclass(frozen=True)
class Prepared:
    """A request that was checked: what the device needs, and nothing that cannot go to another process.

    Attributes:
        model (`str`): name on the list.
        depth (`int`): of the compressed model.
        prompts (`tuple`): token ids, for the original and for the compressed model.
        sampling ([`Sampling`]): how to draw.
        order (`str`): one after the other, or at once.
        max_seconds (`int`): for each answer.
    """

    model: str
    depth: int
    prompts: tuple[list[int], list[int]]
    sampling: Sampling
    order: str
    max_seconds: int


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
        self._facts: dict[str, Facts] = {}

    def facts(self, pairing: Pairing) -> Facts:
        """What is known of a pairing; read when it is asked for first, and again if it could not be read then."""
        facts = self._facts.get(pairing.name)
        if facts is None or not facts.complete:
            facts = self._facts[pairing.name] = read_facts(pairing, self.store, self.limits)
        return facts

    def preload(self, pairing: Pairing, depth: int = 0) -> None:
        """Load both models of a pairing; one that cannot be loaded says so when it is asked."""
        for source in (pairing.teacher, pairing.students[pairing.depth(depth)]):
            with contextlib.suppress(LayerPruneError):
                self.store.get(source)

    def prepare(self, request: Request) -> Prepared:
        """Check a request and encode its words: all that needs no device.

        Raises:
            [`LayerPruneError`]: if the request is beyond the limits, or not of the list.
        """
        pairing = self.catalog[request.model]
        if request.order not in ORDERS:
            raise LayerPruneError(f"order={request.order!r:.50} is unknown; choose {' or '.join(map(repr, ORDERS))}")
        if type(request.chat) is not bool:
            raise LayerPruneError(f"chat={request.chat!r:.50} must be true or false")
        facts, depth = self.facts(pairing), pairing.depth(request.depth)
        sampling = facts.sampling.with_changes(**request.sampling).checked(self.limits)
        prompts = self._prompts(pairing, request)
        for ids in prompts:
            check_length(ids, facts.context, sampling.max_new_tokens, self.limits, request.chat)
        seconds = seconds_for_an_answer(self.limits.max_seconds, sampling.max_new_tokens)
        return Prepared(pairing.name, depth, prompts, sampling, request.order, seconds)

    def run(self, asked: Prepared) -> Iterator[Snapshot]:
        """Let both models answer; ten snapshots a second until both have ended.

        Closing the iterator stops both models, after the tokens that are being computed.
        """
        pairing = self.catalog[asked.model]
        sources = (pairing.teacher, pairing.students[asked.depth])
        at_once = asked.order == AT_ONCE
        answer = partial(
            Generation,
            tokenizer=self.store.tokenizer(pairing),
            sampling=asked.sampling,
            max_seconds=asked.max_seconds,
            alone=not at_once,
        )
        both = [
            answer(partial(self.store.get, source), prompt=ids)
            for source, ids in zip(sources, asked.prompts, strict=True)
        ]
        try:
            for group in [both] if at_once else [[one] for one in both]:
                for generation in group:
                    generation.start()
                yield from self._snapshots(both, group, asked.order)
        finally:
            for generation in both:
                generation.stop()

    def _snapshots(self, both: list[Generation], running: list[Generation], order: str) -> Iterator[Snapshot]:
        """Until those that run have ended; the last one shows them so."""
        while True:
            until = time.monotonic() + SECONDS_BETWEEN_SNAPSHOTS
            for generation in running:
                generation.wait(max(0.0, until - time.monotonic()))
            ended = all(generation.answer.ended for generation in running)
            yield Snapshot(both[0].answer, both[1].answer, order)
            if ended:
                return

    def _prompts(self, pairing: Pairing, request: Request) -> tuple[list[int], list[int]]:
        """Token ids for both models: they differ where a conversation has gone apart."""
        prompt, tokenizer = clean(request.prompt, self.limits), self.store.tokenizer(pairing)
        if not request.chat:
            return (encode_text(tokenizer, prompt),) * 2
        first, second = ([(turn[0], turn[side]) for turn in request.history] for side in (1, 2))
        return encode_chat(tokenizer, first, prompt), encode_chat(tokenizer, second, prompt)
