"""Telling a file that is gone from a file system that is away: files that were read before must still open.

The root of a mount is no witness, since an empty mountpoint answers too.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from capray.deadlines import within
from capray.errors import TryAgain

OPEN_SECONDS = 10.0
"""A witness that does not open within them is away."""
POLL_SECONDS = 5.0
NOTICE_SECONDS = 60.0
_MAX_FOLDERS = 10_000
_PER_DEVICE = 8


@dataclass
class _Device:
    """Files read on a device: the last, and the first of each of the last folders."""

    last: str
    firsts: deque[str] = field(default_factory=lambda: deque(maxlen=_PER_DEVICE))


class Witnesses:
    """The files this process has read, by the device they lie on."""

    def __init__(self) -> None:
        self._devices: dict[int, _Device] = {}
        self._folders: dict[str, int] = {}
        self._lock, self._waiting = threading.Lock(), threading.Lock()

    def saw(self, path: str, device: int) -> None:
        """``path`` was read, on ``device``."""
        with self._lock:
            known = self._devices.setdefault(device, _Device(path))
            known.last = path
            if os.path.dirname(path) in self._folders:
                return
            known.firsts.append(path)
            if len(self._folders) > _MAX_FOLDERS:
                self._folders.clear()
            for folder in _folders_above(path):
                self._folders.setdefault(folder, device)

    def of(self, path: str) -> list[str]:
        """Files on the device that ``path`` is most likely on: that of the nearest folder below which any were read."""
        with self._lock:
            for folder in _folders_above(path):
                if (device := self._folders.get(folder)) is not None:
                    known = self._devices[device]
                    return [known.last, *known.firsts]
        return []

    def opening(self, path: str, given: Iterable[str] = ()) -> str | None:
        """A witness for ``path`` that opens now, of this process' or of those ``given``."""
        return next(filter(opens, dict.fromkeys((*self.of(path), *given))), None)

    def wait_for(self, path: str, given: tuple[str, ...], seconds: float, notify: Callable[[str], None]) -> bool:
        """Wait until a witness for ``path`` opens; whether that took time. False too when there is none.

        Raises:
            TryAgain: none opened for ``seconds``.
        """
        names = (*self.of(path), *given)
        if not names or self.opening(path, given):
            return False
        what = f"{names[0]}, which was there before, cannot be opened: its mount or disk is away"
        way_out = (
            f"and has been for {seconds:g} s: mount it on every node (or put the file back) and run the same command "
            "again"
        )
        with self._waiting:  # One asks; the others find out when it has.
            wait_until(lambda: self.opening(path, given) is not None, what, way_out, seconds, notify)
        return True


def wait_until(
    is_back: Callable[[], bool], what: str, way_out: str, seconds: float, notify: Callable[[str], None]
) -> bool:
    """Wait until ``is_back``, telling ``what`` is waited for; whether that took time.

    Raises:
        TryAgain: it was not for ``seconds``.
    """
    deadline, told_at, has_waited = time.monotonic() + seconds, -NOTICE_SECONDS, False
    while not is_back():
        if time.monotonic() >= deadline:
            raise TryAgain(f"{what}, {way_out}; nothing was recorded against its images")
        if time.monotonic() - told_at >= NOTICE_SECONDS:
            notify(f"waiting: {what}")
            told_at = time.monotonic()
        time.sleep(min(POLL_SECONDS, max(0.01, deadline - time.monotonic())))
        has_waited = True
    return has_waited


def _folders_above(path: str) -> Iterator[str]:
    """From the nearest on; the root of all tells nothing."""
    while (folder := os.path.dirname(path)) not in (path, os.path.dirname(folder)):
        yield folder
        path = folder


def opens(path: str) -> bool:
    """Whether the file at ``path`` can be read, in time."""

    def read() -> None:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            os.read(handle, 1)
        finally:
            os.close(handle)

    try:
        within(OPEN_SECONDS, read)
    except OSError:
        return False
    return True


witnesses = Witnesses()
"""Those of this process."""
