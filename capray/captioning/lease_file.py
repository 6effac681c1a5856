"""Where a lease is written: a small file that is replaced only if nobody else replaced it; and locks of the kernel's.

Knows nothing of who may hold a lease, nor for how long.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import sys
import time
import uuid
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import IO, Any

from capray.deadlines import now
from capray.errors import StorageError, WriteUnanswered
from capray.storage import Location, s3_answer, write_atomic

NUM_PROBES = 8
"""Writes at once that prove whether a store honours conditions."""
LOCK_SECONDS = 10.0
"""How long another process's lock on a lease file is waited for; its holder only compares and replaces a small file."""
WAY_OUT = "use a store that does, or --unsafe-no-lease if surely no other run writes it"
# ext2 to ext4, xfs, btrfs, overlayfs, tmpfs, zfs, f2fs, bcachefs
_LOCAL_DISKS = {0xEF53, 0x58465342, 0x9123683E, 0x794C7630, 0x01021994, 0x2FC12FC1, 0xF2F52010, 0xCA451A4E}
"""The types statfs gives for file systems that only one machine writes."""


def is_on_local_disk(folder: str) -> bool:
    """Whether all who can write ``folder`` surely run under this kernel. False where that is not known: only Linux is
    asked."""
    if sys.platform != "linux":
        return False
    answer = (ctypes.c_long * 64)()  # A struct statfs, which begins with the type.
    failed = ctypes.CDLL(None).statfs(os.fsencode(folder), answer)
    return not failed and answer[0] & 0xFFFFFFFF in _LOCAL_DISKS


def take_kernel_lock(path: str) -> int | None:
    """The handle of a lock that ends with this process, however that ends; None while another process holds it, if only
    stopped. (A child that is forked and runs no other program would hold it too.)"""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(handle)
        if not isinstance(error, BlockingIOError):
            raise
        return None
    return handle


class SharedFile:
    """A file, compared and replaced under a lock. Its bytes are its version."""

    def __init__(self, folder: Location):
        self.place, self.scratch = folder.join("lease.json"), folder.join("tmp")
        self.path = self.place.path

    def probe(self) -> None:
        """Raise StorageError unless writes can be conditional."""
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        with self._alone():
            pass

    def read(self) -> tuple[bytes, Any] | None:
        """The bytes and a version that is not newer than they are; None when there is no file."""
        try:
            with open(self.path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return None
        return data, data

    def write(self, data: bytes, version: Any) -> Any:
        """The version written; None, and nothing done, when the file is not at ``version`` (None: there is no file)."""
        with self._alone():
            if self.read() != (None if version is None else (version, version)):
                return None
            write_atomic(self.place, data, self.scratch)
        return data

    def remove(self, version: Any) -> None:
        """Remove the file if it is at ``version``."""
        with self._alone():
            if self.read() == (version, version):
                os.unlink(self.path)

    @contextmanager
    def _alone(self) -> Generator[None]:
        """Alone among the processes that see this file.

        Raises:
            WriteUnanswered: another process holds the lock for longer than a write takes: it is stopped, or out of reach.
        """
        lock = f"{self.path}.lock"
        with open(lock, "w") as file:
            deadline = now() + LOCK_SECONDS
            while not _locked(file, lock):
                if now() > deadline:
                    raise WriteUnanswered(
                        f"another process has held {lock} for {LOCK_SECONDS:g} s, an instant's work unless it is stopped: "
                        "end it, or let it go on, and run the command again"
                    )
                time.sleep(0.01)
            yield


def _locked(file: IO[str], path: str) -> bool:
    """Whether ``file`` is locked now; False while another process holds its lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # Which of them, POSIX leaves to the system.
        return False
    except OSError as error:
        raise StorageError(f"the file system of {path} cannot lock files ({error}): {WAY_OUT}") from error
    return True


_proved: set[tuple[Any, str]] = set()
"""The stores and buckets that proved to honour conditions."""


class SharedObject:
    """An object on S3, written by conditional PUTs. Its ETag is its version; otherwise as SharedFile."""

    def __init__(self, folder: Location):
        self.folder, self.place = folder, folder.join("lease.json")

    def probe(self) -> None:
        """Write one key from many threads at once: exactly one may create it, and then exactly one replace it.

        Once per process and bucket: SeaweedFS takes seconds for these requests.
        """
        store = (self.place.fs, self.place.path.partition("/")[0])
        if store in _proved:
            return
        with ThreadPoolExecutor(NUM_PROBES) as pool:
            for _ in range(3):  # None wins where an answer was lost.
                key = self.folder.join("tmp", f"probe-{uuid.uuid4().hex}")
                try:
                    (created,) = self._race(pool, key, None) or [None]
                    if created and self._race(pool, key, created):
                        _proved.add(store)
                        return
                finally:
                    with suppress(OSError):
                        self._call("delete_object", key)
        raise self._not_honoured("none of many writes at once succeeded")

    def _race(self, pool: ThreadPoolExecutor, key: Location, version: str | None) -> list[str]:
        """The version that the one winner wrote over ``version``; [] when there was none."""

        def write(number: int) -> str | None:
            return self._put(key, f"{version} {number}".encode(), version)

        won = [written for written in pool.map(write, range(NUM_PROBES)) if written]
        if len(won) > 1:
            condition = "If-Match" if version else "If-None-Match"
            raise self._not_honoured(f"{len(won)} of {NUM_PROBES} writes at once succeeded with {condition}")
        return won

    def _not_honoured(self, how: str) -> StorageError:
        return StorageError(
            f"the store of {self.folder.uri} does not honour conditional writes ({how}), so two runs could write one "
            f"output: {WAY_OUT}"
        )

    def read(self) -> tuple[bytes, Any] | None:
        try:
            version = self._call("head_object", self.place)["ETag"]
            return self.place.fs.cat_file(self.place.path), version
        except FileNotFoundError:
            return None

    def write(self, data: bytes, version: Any) -> Any:
        return self._put(self.place, data, version)

    def remove(self, version: Any) -> None:
        try:
            self._call("delete_object", self.place, IfMatch=version)
        except OSError as error:
            if error.errno == errno.ENOSYS:
                self._call("delete_object", self.place)
            elif not _is_refusal(error):
                raise

    def _put(self, place: Location, data: bytes, version: str | None) -> str | None:
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        try:
            return self._call("put_object", place, Body=data, **condition)["ETag"]
        except OSError as error:
            if error.errno == errno.ENOSYS:
                raise self._not_honoured(str(error)) from error
            if not _is_refusal(error):
                raise
            return None

    def _call(self, method: str, place: Location, **arguments: Any) -> dict[str, Any]:
        bucket, _, key = place.path.partition("/")
        return place.fs.call_s3(method, Bucket=bucket, Key=key, **arguments)


def _is_refusal(error: OSError) -> bool:
    """Whether S3 says that a condition did not hold, or that another request came in between."""
    _, code = s3_answer(error)
    return code in ("PreconditionFailed", "412", "ConditionalRequestConflict", "OperationAborted", "409", "NoSuchKey")
