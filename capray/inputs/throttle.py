"""A limit on this process's concurrent requests to a store: one more now and then, half when the store says SlowDown."""

from __future__ import annotations

import threading
import time
from types import TracebackType

MOST = 256
WINDOW_SECONDS = 1.0
"""Answers of SlowDown within one window count once: their requests were sent before the limit was halved."""


class Throttle:
    """A limit to open requests that follows what the store can take (additive increase, multiplicative decrease).

    Each request is made inside it, as a context.
    """

    def __init__(self, most: int = MOST):
        self.most, self.limit = most, most
        self._changed = threading.Condition()
        self._open = self._answered = 0
        self._halved_at: float | None = None
        self._is_news = False

    def __enter__(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._open < self.limit)
            self._open += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._open -= 1
            if error is None:
                self._answered += 1
                if self._answered >= self.limit:
                    self._answered, self.limit = 0, min(self.most, self.limit + 1)
            self._changed.notify_all()

    def slow_down(self) -> None:
        """The store has asked for it."""
        with self._changed:
            now = time.monotonic()
            if self._halved_at is None or now - self._halved_at >= WINDOW_SECONDS:
                self.limit, self._halved_at = max(1, min(self.limit, self._open) // 2), now
                self._answered, self._is_news = 0, True

    def news(self) -> int | None:
        """The limit, when it was halved since this was asked."""
        with self._changed:
            is_news, self._is_news = self._is_news, False
            return self.limit if is_news else None
