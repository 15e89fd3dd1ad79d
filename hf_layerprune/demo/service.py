"""What the page and the API do with a request, without a word about widgets."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from ..errors import LayerPruneError
from .catalog import Catalog
from .comparison import Comparer, Request, Snapshot
from .device import gpu_call
from .difference import difference
from .next_tokens import Position, compare_next_tokens
from .prompts import clean, encode_text
from .render import summary_of
from .settings import DemoSettings
from .store import ModelStore


class DemoService:
    """A demo, ready to answer.

    Args:
        settings ([`DemoSettings`]): models and limits.
        catalog ([`Catalog`]): the models, resolved.
        store ([`ModelStore`], *optional*): where they are kept; by default a new one as large as the limits allow.
    """

    def __init__(self, settings: DemoSettings, catalog: Catalog, store: ModelStore | None = None) -> None:
        self.settings = settings
        self.limits = settings.limits
        self.catalog = catalog
        self.store = store or ModelStore(settings.limits.max_models, settings.dtype)
        self.comparer = Comparer(catalog, self.store, settings.limits)
        self._compare = gpu_call(self.comparer.compare, 2 * settings.limits.max_seconds)
        self._inspect = gpu_call(self._positions, settings.limits.max_seconds)

    def stream(self, request: Request, stop: threading.Event | None = None) -> Iterator[Snapshot]:
        """Snapshots of a comparison until it has ended, or `stop` is set; the models have let go of the device then.

        Raises:
            [`LayerPruneError`]: if the request is beyond the limits, or not of the list.
        """
        running = self._compare(request)
        last = None
        try:
            for snapshot in running:
                last = snapshot
                if stop is not None and stop.is_set() and not snapshot.ended:
                    break
                yield snapshot
        finally:
            running.close()
        if last is not None and not last.ended:
            yield last.stopped()

    def inspect(self, text: str, model: str, depth: int) -> list[Position]:
        """What both models expect at every position of a text.

        Raises:
            [`LayerPruneError`]: if the text is beyond the limits, or a model cannot be loaded.
        """
        pairing = self.catalog[model]
        ids = encode_text(self.store.tokenizer(pairing), clean(text, self.limits, "the text"))
        if len(ids) > self.limits.max_inspected_tokens:
            raise LayerPruneError(
                f"the text has {len(ids):,} tokens; at most {self.limits.max_inspected_tokens} are looked at here. "
                "Shorten it."
            )
        return self._inspect(ids, pairing.name, pairing.depth(depth))

    def _positions(self, ids: list[int], model: str, depth: int) -> list[Position]:
        pairing = self.catalog[model]
        original, compressed = self.store.get(pairing.teacher), self.store.get(pairing.students[depth])
        return compare_next_tokens(original.model, compressed.model, self.store.tokenizer(pairing), ids)


def to_dict(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot as the API answers it."""
    answers = {"original": snapshot.original, "compressed": snapshot.compressed}
    content: dict[str, Any] = {name: asdict(answer) for name, answer in answers.items()}
    if snapshot.ended:
        pieces = difference(snapshot.original.text, snapshot.compressed.text)
        for name, side in zip(answers, pieces, strict=True):
            content[name]["parting_words"] = [piece.text.strip() for piece in side if piece.parts]
    return content | {"ended": snapshot.ended, "order": snapshot.order, "summary": summary_of(snapshot)}
