"""What the page and the API do with a request, without a word about widgets."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from ..errors import LayerPruneError
from .catalog import Catalog
from .comparison import Comparer, Prepared, Request, Snapshot
from .device import gpu_call, in_passing_thread, on_zero_gpu, seconds_on_gpu
from .difference import difference
from .next_tokens import Position, compare_next_tokens
from .prompts import clean, encode_text
from .render import summary_of
from .settings import DemoSettings
from .store import ModelStore


@dataclass(frozen=True)
class Reading:
    """A text for the next-token view, checked, as [`Prepared`] is a comparison."""

    model: str
    depth: int
    ids: list[int]


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
        self._on_device = gpu_call(self._work, _seconds)

    def warm_up(self) -> None:
        """Read what every page needs, and load the first pairing; on ZeroGPU as many as there is room for."""
        pairings = [self.catalog[name] for name in self.catalog.names]
        for pairing in pairings:
            self.comparer.facts(pairing)
        for pairing in pairings[: self.limits.max_models // 2] if on_zero_gpu() else pairings[:1]:
            in_passing_thread(self.comparer.preload, pairing)

    def stream(self, request: Request, stop: threading.Event | None = None) -> Iterator[Snapshot]:
        """Snapshots of a comparison until it has ended, or `stop` is set; the models have let go of the device then.

        Raises:
            [`LayerPruneError`]: if the request is beyond the limits, or not of the list.
        """
        job = self.comparer.prepare(request)
        if on_zero_gpu():  # loading would be time on the GPU, and lost with the process that gets it
            in_passing_thread(self.comparer.preload, self.catalog[job.model], job.depth)
        running = self._on_device(job)
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
        job = Reading(pairing.name, pairing.depth(depth), ids)
        in_passing_thread(self._models, job)
        (positions,) = self._on_device(job)
        return positions

    def _work(self, job: Prepared | Reading) -> Iterator[Any]:
        """All that runs on the device."""
        if isinstance(job, Prepared):
            yield from self.comparer.run(job)
            return
        tokenizer = self.store.tokenizer(self.catalog[job.model])
        yield in_passing_thread(compare_next_tokens, *self._models(job), tokenizer, job.ids)

    def _models(self, job: Reading) -> list[PreTrainedModel]:
        pairing = self.catalog[job.model]
        return [self.store.get(source).model for source in (pairing.teacher, pairing.students[job.depth])]


def _seconds(job: Prepared | Reading) -> int:
    return seconds_on_gpu(job.sampling.max_new_tokens if isinstance(job, Prepared) else 0)


def to_dict(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot as the API answers it."""
    answers = {"original": snapshot.original, "compressed": snapshot.compressed}
    content: dict[str, Any] = {name: asdict(answer) for name, answer in answers.items()}
    if snapshot.ended:
        pieces = difference(snapshot.original.text, snapshot.compressed.text)
        for name, side in zip(answers, pieces, strict=True):
            content[name]["parting_words"] = [piece.text.strip() for piece in side if piece.parts]
    return content | {"ended": snapshot.ended, "order": snapshot.order, "summary": summary_of(snapshot)}
