"""Ctrl-C and SIGTERM ask the job to stop: it publishes what it holds and ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager

from capray.errors import Interrupted


class Signals:
    """Hears Ctrl-C and SIGTERM, as a context in the main thread; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._raises = False

    def __enter__(self) -> Signals:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        os.write(2, b"\nstopping: what is done is published first; once more to stop at once\n")
        if self._raises:
            self.check()

    def check(self) -> None:
        """Raise Interrupted when a signal has come."""
        if self.received is not None:
            raise Interrupted("stopped; run the same command again to continue", self.received)

    @contextmanager
    def interrupting(self) -> Generator[None]:
        """A block that a signal interrupts where it is, as it may take long and nobody asks ``check`` in it."""
        self.check()
        self._raises = True
        try:
            yield
        except Exception as error:
            if self.received is not None and not isinstance(error, Interrupted):
                self._raises = False
                self.check()  # A query of DuckDB's ends with an error of its own.
            raise
        else:
            self.check()
        finally:
            self._raises = False
