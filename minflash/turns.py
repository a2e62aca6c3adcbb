"""One generation at a time: threads take turns, and whoever waits or runs can be cancelled."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from .errors import MinflashError

_PATIENCE = 0.05  # seconds between two looks at whether a waiting call was cancelled


class Turns:
    """A lock that knows whose turn it is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None  # the thread whose turn it is
        self._running: threading.Event | None = None  # set: the turn's generation shall end

    @property
    def mine(self) -> bool:
        """It is this thread's turn."""
        return self._owner == threading.get_ident()

    def cancel(self) -> None:
        """Ends the generation whose turn it is, if there is one. Any thread may call it."""
        running = self._running
        if running is not None:
            running.set()

    @contextlib.contextmanager
    def take(self, cancelled: threading.Event | None = None) -> Iterator[bool]:
        """Waits for a turn and keeps it; gives whether it came before ``cancelled`` was set."""
        if self.mine:
            raise MinflashError(
                "a stream of this LLM is not finished in this thread; exhaust or close it first"
            )
        cancelled = cancelled or threading.Event()
        if not self._wait(cancelled):
            yield False
            return
        self._owner, self._running = threading.get_ident(), cancelled
        try:
            yield True
        finally:
            self._owner = self._running = None
            self._lock.release()

    def _wait(self, cancelled: threading.Event) -> bool:
        while not cancelled.is_set():
            if self._lock.acquire(timeout=_PATIENCE):
                return True
        return False
