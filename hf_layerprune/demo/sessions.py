"""Which visitors want to stop: a flag for each open page."""

from __future__ import annotations

import threading


class Sessions:
    """Flags by session; one of a page that was closed is dropped."""

    def __init__(self) -> None:
        self._flags: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def begin(self, session: str) -> None:
        """A visitor asks for something: what was stopped before is forgotten."""
        self._flag(session).clear()

    def stop(self, session: str) -> None:
        """A visitor wants what runs or waits for them to end."""
        self._flag(session).set()

    def close(self, session: str) -> None:
        """A page was closed: what runs for it ends."""
        self.stop(session)
        with self._lock:
            self._flags.pop(session, None)

    def flag(self, session: str) -> threading.Event:
        """The flag that says whether to stop."""
        return self._flag(session)

    def _flag(self, session: str) -> threading.Event:
        with self._lock:
            return self._flags.setdefault(session, threading.Event())
