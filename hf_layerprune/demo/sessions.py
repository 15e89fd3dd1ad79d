"""Which visitors want to stop: a flag for each comparison that runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Sessions:
    """Flags by session, each for one comparison; one that is over takes its flag with it."""

    def __init__(self) -> None:
        self._running: dict[str, threading.Event] = {}

    @contextmanager
    def running(self, session: str) -> Iterator[threading.Event]:
        """A comparison of a visitor, and the flag that says whether to stop it."""
        stop = self._running[session] = threading.Event()
        try:
            yield stop
        finally:
            if self._running.get(session) is stop:
                del self._running[session]

    def is_running(self, session: str) -> bool:
        """Whether a comparison of the visitor runs; not while it waits for its turn."""
        return session in self._running

    def stop(self, session: str) -> None:
        """The visitor wants what runs to end, or went away."""
        if (flag := self._running.get(session)) is not None:
            flag.set()
