"""Who waits for the device: visitors in the order in which they came."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from ..errors import LayerPruneError

SECONDS_UNTIL_GONE = 15.0  # a visitor who has not asked for this long has left


class Line:
    """A line in which at most `most` wait; the first is served."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.seconds = 10.0  # that a visit takes, lately
        self._seen: dict[object, float] = {}  # when each was seen last, in the order of the line

    @contextmanager
    def place(self) -> Iterator[Callable[[], int]]:
        """A place in the line; the function says how many are ahead, and must be called now and then to keep it."""
        ticket = object()
        if self._ahead(ticket) > self.most:
            del self._seen[ticket]
            raise LayerPruneError(f"{self.most} visitors are waiting already; try again in a minute")
        try:
            yield partial(self._ahead, ticket)
        finally:
            del self._seen[ticket]

    def told(self, ahead: int) -> str:
        """How long the wait is, in words."""
        return f"{ahead} visitor{'s' if ahead > 1 else ''} ahead, about {max(1, round(ahead * self.seconds))} s"

    def took(self, seconds: float) -> None:
        """Learn how long a visit takes."""
        self.seconds += 0.3 * (seconds - self.seconds)

    def _ahead(self, ticket: object) -> int:
        now = self._seen[ticket] = time.monotonic()  # who was there keeps his place
        others = list(self._seen.items())
        before = others[: [one for one, _ in others].index(ticket)]
        return sum(now - seen < SECONDS_UNTIL_GONE for _, seen in before)
