"""Telling a file that is gone from a file system that is away.

An empty mountpoint answers too, and a file of one mount says nothing of another. So a file is gone when the nearest of its
parent folders that still exists is not empty, is on the device it was on, and files that were read there still open. A
folder that is empty, a link to nowhere, or a mountpoint without its mount is what a mount leaves behind.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice

from capray.deadlines import within
from capray.errors import TryAgain
from capray.storage import Excludes, excludes_nothing, lstat_of

WAS_A_MOUNT = "{} was a mount when its images were listed, and is none now"
OR_RELIST = "(or run with --relist, if it is to be none)"
OPEN_SECONDS = 10.0
"""A witness that does not open within them is away."""
POLL_SECONDS = 5.0
NOTICE_SECONDS = 60.0
_MAX_FOLDERS = 10_000
_NUM_ASKED = 8


@dataclass
class _Folder:
    """A folder files were read in: its device, and the last of the files with its own, which differs behind a link."""

    device: int
    file: str
    file_device: int


@dataclass(frozen=True)
class Known:
    """What was known of an input before.

    Attributes:
        files: files and folders that were there; one of them, or of those this process has read, has to be there still.
        root: the input, a folder that ends in "/"; what is gone from below it was deleted.
        mounts: folders at which another file system began.
    """

    files: tuple[str, ...] = ()
    root: str = ""
    mounts: tuple[str, ...] = ()


@dataclass(frozen=True)
class _View:
    """What is left of a path: why its file system seems away, or else the ``witness`` that it is not; neither when nothing
    tells."""

    away: str = ""
    way_out: str = ""
    witness: str | None = None


class Witnesses:
    """The folders this process has read files in."""

    def __init__(self) -> None:
        self._folders: dict[str, _Folder] = {}
        self._lock, self._waiting = threading.Lock(), threading.Lock()

    def saw(self, path: str, device: int) -> None:
        """``path`` was read, on ``device``."""
        folder = os.path.dirname(path)
        with self._lock:
            known = self._folders.get(folder)
            if known is not None and known.file_device == device:
                known.file = path
                return
        try:
            new = _Folder(os.stat(folder).st_dev, path, device)
        except OSError:
            return
        with self._lock:
            if len(self._folders) >= _MAX_FOLDERS:
                self._folders.clear()
            self._folders[folder] = new

    def of(self, path: str, known: Known) -> str | None:
        """What proves that the file system of ``path`` is there: a file or folder."""
        return self._view(path, known).witness

    def wait_for(self, path: str, known: Known, seconds: float, notify: Callable[[str], None]) -> bool:
        """Wait while the file system of ``path`` seems away; whether that took time.

        Raises:
            TryAgain: it was away for ``seconds``.
        """
        view = self._view(path, known)
        if not view.away:
            return False
        way_out = f"and has been for {seconds:g} s: {view.way_out} and run the same command again"
        with self._waiting:  # One asks; the others find out when it has.
            wait_until(lambda: not self._view(path, known).away, view.away, way_out, seconds, notify)
        return True

    def _view(self, path: str, known: Known) -> _View:
        mount = "mount it on every node"
        try:
            left = within(OPEN_SECONDS, lambda: _left_of(path))
        except OSError as error:
            return _View(f"{os.path.dirname(path)} does not answer ({error})", mount)
        if left.is_link:
            return _View(
                f"{left.folder} links to what is not there: a mount or disk is away", f"{mount} (or remove the link)"
            )
        if left.is_empty and not (left.real_folder in known.mounts and is_mount(left.real_folder)):
            why = f"{left.folder} is empty, and {path} was to be below it: its mount or disk is away"
            return _View(why, f"{mount} (or remove the folder, if its images were deleted)")
        inside = left.folder.rstrip("/") + "/"
        with self._lock:
            files = [each.file for each in self._folders.values()]
            own = self._folders.get(left.folder)
            below = {name: each for name, each in self._folders.items() if f"{name}/".startswith(inside)}
        same = [each.file for each in below.values() if each.device == left.device]
        for mount_point in (point for point in known.mounts if left.target.startswith(f"{point}/")):
            # A node may have as a folder of its own what another one mounts.
            there = [file for file in reversed(files) if file.startswith(f"{mount_point}/")]
            if not is_mount(mount_point) and not any(map(opens, there[:_NUM_ASKED])):
                return _View(WAS_A_MOUNT.format(mount_point), f"{mount} {OR_RELIST}")
        missing = _with_one_more_name(left.folder, left.target if os.path.islink(path) else path)
        others = [
            each.file for name, each in below.items() if each.device != left.device and f"{name}/".startswith(f"{missing}/")
        ]
        if (own is not None and own.device != left.device and not opens(own.file)) or (
            others and not any(map(opens, islice(reversed(others), _NUM_ASKED)))
        ):
            return _View(f"{left.folder} is on another device than what was read there: its mount is away", mount)
        opening = next(filter(opens, islice(reversed(same), _NUM_ASKED)), None)
        if (first := next(iter((*same, *known.files)), None)) and opening is None and not any(map(opens, known.files)):
            why = f"{first}, which was there before, cannot be opened: its mount or disk is away"
            return _View(why, f"{mount} (or put the file back)")
        is_near = left.is_parent or (len(known.root) > 1 and inside.startswith(known.root)) or (same and inside != "/")
        return _View(witness=opening or left.folder if is_near and (same or left.is_readable) else None)


def mounts_of(
    root: str, folders: Iterable[str] = (), excludes: Excludes = excludes_nothing, points: set[str] | None = None
) -> set[str]:
    """Where other file systems begin below ``root``, and those that it and ``folders`` are on, by links too, as far as the
    system tells (Linux); of folders that do not answer in time, nothing.

    Args:
        excludes: says of folders below ``root`` that what begins there does not matter.
        points: what ``mount_points`` gave earlier.
    """
    points = mount_points() if points is None else points
    try:
        real = within(OPEN_SECONDS, lambda: [os.path.realpath(folder) for folder in (root, *folders)])
    except OSError:
        return set()
    inside, above = f"{real[0].rstrip('/')}/", f"{root.rstrip('/')}/"
    found = {point for point in points if point.startswith(inside) and not excludes(above + point.removeprefix(inside))}
    for folder in set(real):
        holding = (point for point in points if f"{folder}/".startswith(f"{point.rstrip('/')}/"))
        found.add(max(holding, key=len, default="/"))
    return found - {"/"}


def _with_one_more_name(folder: str, path: str) -> str:
    """``folder`` and the next name of ``path``, which goes on from it."""
    inside = folder.rstrip("/") + "/"
    return inside + path.removeprefix(inside).split("/", 1)[0]


def real_folder(path: str) -> str:
    """``path`` without links, with a slash behind it; as it is where it does not answer in time."""
    with suppress(OSError):
        path = within(OPEN_SECONDS, partial(os.path.realpath, path))
    return f"{path.rstrip('/')}/"


def mount_points() -> set[str]:
    """Where file systems begin now, bind mounts too, which ``os.path.ismount`` does not know; none where the system does not
    tell."""
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            names = [_OCTAL.sub(lambda code: bytes([int(code[1], 8)]), line.split()[4]) for line in file]
    except OSError:
        return set()
    return set(map(os.fsdecode, names))


def is_mount(folder: str) -> bool:
    points = mount_points()
    return folder in points or os.path.realpath(folder) in points if points else os.path.ismount(folder)


_OCTAL = re.compile(rb"\\([0-7]{3})")
"""A space, tab, newline or backslash in /proc/self/mountinfo."""


@dataclass(frozen=True)
class _Left:
    """The nearest folder that is left of a path: ``is_parent``, the file's own; ``is_link``, one to nowhere instead. The
    ``target`` is where the whole path leads."""

    folder: str
    real_folder: str
    target: str
    device: int = 0
    is_parent: bool = False
    is_link: bool = False
    is_empty: bool = False
    is_readable: bool = True


def _left_of(path: str) -> _Left:
    """What is left of ``path``, or of what it links to."""
    target = os.path.realpath(path)
    path = target if os.path.islink(path) else path
    folder = os.path.dirname(path)
    while lstat_of(folder) is None:
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        if os.path.islink(folder) and not os.path.exists(folder):
            return _Left(folder, folder, target, is_link=True)
        folder = os.path.dirname(folder)
    where = folder, os.path.realpath(folder), target, os.stat(folder).st_dev, folder == os.path.dirname(path)
    try:
        return _Left(*where, is_empty=_is_empty(folder))
    except PermissionError:
        return _Left(*where, is_readable=False)


def _is_empty(folder: str) -> bool:
    with os.scandir(folder) as entries:
        return next(entries, None) is None


def wait_until(is_back: Callable[[], bool], what: str, way_out: str, seconds: float, notify: Callable[[str], None]) -> bool:
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


def opens(path: str) -> bool:
    """Whether the file at ``path`` can be read, or the folder there holds something, in time."""

    def read() -> None:
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                os.read(handle, 1)
            finally:
                os.close(handle)
        except IsADirectoryError:
            if _is_empty(path):
                raise

    try:
        within(OPEN_SECONDS, read)
    except OSError:
        return False
    return True


witnesses = Witnesses()
"""Those of this process."""
