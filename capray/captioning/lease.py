"""One writer per output: a lease file, created exclusively, renewed while its owner lives, taken over when it is dead.

On S3 creation and renewal are conditional PUTs (``If-None-Match: *``, ``If-Match``); on a file system creation is
exclusive and renewal compares the token before it replaces. Times are differences on one's own clock, never compared
between machines.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from capray.errors import CaprayError, OutputConflictError, StorageError
from capray.storage import Location, read_bytes, storage_errors, write_atomic

RENEW_SECONDS = 10.0
PUBLISH_SECONDS = 20.0
"""The writer publishes only this long after a renewal was confirmed."""
EXPIRY_SECONDS = 45.0
"""A contender takes a lease that it has watched unchanged for this long."""


@dataclass(frozen=True)
class Claim:
    """What the lease file says: who owns it, and a sequence number that grows with every renewal."""

    token: str
    host: str
    boot: str
    pid: int
    sequence: int

    def describe(self) -> str:
        return f"process {self.pid} on {self.host}"


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def _is_dead(claim: Claim) -> bool:
    """Whether the owner provably lives no more: it ran on this very machine and its process is gone."""
    if claim.host != socket.gethostname() or claim.boot != _boot_id():
        return False
    try:
        os.kill(claim.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


class Lease:
    """The right to write an output, held as a context.

    Raises on entry:
        OutputConflictError: another run holds the lease and renews it.
        StorageError: the store cannot be written, or does not honour conditional writes.
    """

    def __init__(
        self,
        folder: Location,
        say: Callable[[str], None] = lambda line: None,
        renew_seconds: float = RENEW_SECONDS,
        expiry_seconds: float = EXPIRY_SECONDS,
    ):
        self.place = folder.join("lease.json")
        self.scratch = folder.join("tmp")
        self.say = say
        self.renew_seconds, self.expiry_seconds = renew_seconds, expiry_seconds
        self.claim = Claim(uuid.uuid4().hex, socket.gethostname(), _boot_id(), os.getpid(), 0)
        self._version: Any = None
        self._confirmed = 0.0
        self._lost: str | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_forever, daemon=True)

    def __enter__(self) -> Lease:
        with storage_errors(f"taking the lease {self.place.uri}"):
            self._acquire()
        self._confirmed = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(self.renew_seconds)
        if self._lost is None:
            self._release()

    def check(self) -> None:
        """Raise CaprayError unless this run surely holds the lease now."""
        if self._lost is not None:
            raise CaprayError(f"lost the lease on the output: {self._lost}; what was published is kept")
        age = time.monotonic() - self._confirmed
        if age > PUBLISH_SECONDS:
            self._renew()
            self.check()

    def _acquire(self) -> None:
        if self._create():
            return
        watched, version = self._read()
        since = time.monotonic()
        waiting = False
        while True:
            if watched is None:
                if self._create():
                    return
            elif _is_dead(watched) or time.monotonic() - since > self.expiry_seconds:
                if self._replace(version):
                    self.say(f"took over the lease of {watched.describe()}, which is gone")
                    return
            elif not waiting:
                waiting = True
                self.say(f"the output is leased by {watched.describe()}; watching whether it lives")
            time.sleep(min(1.0, self.expiry_seconds / 10))
            now, version = self._read()
            if (
                now is not None
                and watched is not None
                and (now.token, now.sequence) != (watched.token, watched.sequence)
            ):
                raise OutputConflictError(
                    f"{now.describe()} is writing this output: wait for it to end, stop it, or choose another output"
                )
            watched = now

    def _renew_forever(self) -> None:
        while not self._stop.wait(self.renew_seconds) and self._lost is None:
            try:
                self._renew()
            except StorageError:
                continue  # The next round tries again; `check` holds the writer back meanwhile.

    def _renew(self) -> None:
        with self._lock:
            self._renew_once()

    def _renew_once(self) -> None:
        claim = replace(self.claim, sequence=self.claim.sequence + 1)
        started = time.monotonic()
        with storage_errors(f"renewing the lease {self.place.uri}"):
            previous, self.claim = self.claim, claim
            if not self._replace(self._version):
                found, version = self._read()
                if found is None or found.token != claim.token:
                    self.claim = previous
                    owner = found.describe() if found else "someone who removed it"
                    self._lost = f"it was taken by {owner}"
                    return
                self._version = version
        self._confirmed = started

    def _body(self) -> bytes:
        return json.dumps(asdict(self.claim)).encode()

    def _create(self) -> bool:
        """Create the lease file; False when there is one already."""
        if self.place.is_local:
            os.makedirs(os.path.dirname(self.place.path), exist_ok=True)
            try:
                handle = os.open(self.place.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                return False
            with os.fdopen(handle, "wb") as file:
                file.write(self._body())
            self._version = self._body()
            return True
        created = self._put(IfNoneMatch="*")
        if created and self._put(IfNoneMatch="*"):
            raise StorageError(
                f"the store of {self.place.uri} does not honour conditional writes, so two runs could write one output: "
                "use a store that does"
            )
        return created

    def _replace(self, version: Any) -> bool:
        """Replace the lease file if it still is at ``version``; False when it is not."""
        if not self.place.is_local:
            return self._put(IfMatch=version)
        with _locked(f"{self.place.path}.lock"):
            _, now = self._read()
            if now != version:
                return False
            write_atomic(self.place, self._body(), self.scratch)
            self._version = self._body()
            return True

    def _put(self, **condition: str) -> bool:
        bucket, _, key = self.place.path.partition("/")
        try:
            answer = self.place.fs.call_s3("put_object", Bucket=bucket, Key=key, Body=self._body(), **condition)
        except OSError as error:
            if "pre-condition" in str(error).lower() or "conflict" in str(error).lower():
                return False
            raise
        self._version = answer["ETag"]
        return True

    def _read(self) -> tuple[Claim | None, Any]:
        """The lease as it stands and its version: the ETag on S3, the bytes on a file system."""
        try:
            if self.place.is_local:
                with open(self.place.path, "rb") as file:
                    data = file.read()
                return _parse(data), data
            bucket, _, key = self.place.path.partition("/")
            answer = self.place.fs.call_s3("head_object", Bucket=bucket, Key=key)
            return _parse(read_bytes(self.place)), answer["ETag"]
        except FileNotFoundError:
            return None, None

    def _release(self) -> None:
        found, _ = self._read()
        if found is not None and found.token == self.claim.token:
            self.place.fs.rm_file(self.place.path)


@contextmanager
def _locked(path: str) -> Generator[None]:
    """Alone among the processes of this machine: comparing and replacing a file are two steps."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _parse(data: bytes) -> Claim:
    """The claim in ``data``; a file not yet written, or damaged, is a claim of nobody, to be watched until it expires."""
    try:
        return Claim(**json.loads(data))
    except (ValueError, TypeError):
        return Claim("", "", "", 0, 0)
