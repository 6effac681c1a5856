"""A clock that counts time asleep, and calls that are given up after a time. Knows nothing of what is called."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")


def now() -> float:
    """Seconds on this machine's clock, those it slept through included where the system counts them."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)


def within(seconds: float | None, action: Callable[[], T]) -> T:
    """What ``action`` returns. With ``seconds`` it runs in a thread, which is left behind when it takes longer.

    Raises:
        TimeoutError: it took longer.
    """
    if seconds is None:
        return action()
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not wait([future], seconds).done:
        raise TimeoutError(f"no answer within {round(seconds, 1):g} s")
    return future.result()
