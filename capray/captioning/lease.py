"""One writer per output: a lease file, created exclusively, renewed while its owner lives, taken over when it is dead.

On S3 the lease is written by conditional PUTs (``If-None-Match: *``, ``If-Match``); on a file system creation is exclusive,
and replacing compares under a lock. Any other store is refused. Times are differences on one's own clock, never compared
between machines.

Knows nothing of parts or rows, and cannot stop a write that is on its way: see ``Lease.check``.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol, TypeVar

from capray.errors import CaprayError, OutputConflictError, StorageError
from capray.storage import Location, storage_errors

RENEW_SECONDS = 10.0
PUBLISH_SECONDS = 20.0
"""The writer publishes only this long after the start of the last renewal that was confirmed."""
EXPIRY_SECONDS = 45.0
"""A contender takes a lease that it has watched unchanged for this long."""
EXIT_SECONDS = 1.0
"""How long leaving waits for a store that does not answer."""
LOCK_SECONDS = 10.0
"""How long to wait for a process that holds a lease's lock file, which takes an instant unless it is stopped."""
RAY_SECONDS = 5.0
"""How long Ray may take to say how a job stands."""
NUM_PROBES = 8
"""Writes at once that prove whether a store honours conditions."""
WAY_OUT = "use a store that does, or --unsafe-no-lease if surely no other run writes it"

T = TypeVar("T")


@dataclass(frozen=True)
class Claim:
    """What the lease file says: who owns it, and a sequence number that grows with every attempt to write it."""

    token: str
    host: str
    boot: str
    """The machine's boot and the namespace of process ids in it; "" where the system does not tell."""
    pid: int
    sequence: int
    started: int | None = None
    """When the process started, as the system counts: a later process of the same id has another."""
    ray_job: str | None = None
    """The submission id of the Ray job."""

    def describe(self) -> str:
        if not self.token:
            return "an unknown process"
        job = f" (Ray job {self.ray_job})" if self.ray_job else ""
        return f"process {self.pid} on {self.host}{job}"


@dataclass(frozen=True)
class Seen:
    """The lease file as it stood: its claim and its version; both None where there was no file."""

    claim: Claim | None = None
    version: Any = None


class Lease:
    """The right to write an output, held as a context.

    Args:
        folder: where ``lease.json`` lies, and ``tmp`` beside it.
        say: takes a line for the user.
        renew_seconds, expiry_seconds, publish_seconds: see the constants of this module.
        steal: take the lease from whoever holds it, without waiting.
        enforce: False for no lease at all.
        is_job_terminal: whether a Ray job, by its submission id, surely runs no more.

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
        *,
        publish_seconds: float = PUBLISH_SECONDS,
        steal: bool = False,
        enforce: bool = True,
        is_job_terminal: Callable[[str], bool] = lambda job_id: False,
    ):
        self.folder, self.place = folder, folder.join("lease.json")
        self.say = say
        self.renew_seconds, self.expiry_seconds, self.publish_seconds = renew_seconds, expiry_seconds, publish_seconds
        self.steal, self.enforce, self.is_job_terminal = steal, enforce, is_job_terminal
        pid = os.getpid()
        self.claim = Claim(
            uuid.uuid4().hex, socket.gethostname(), _boot_id(), pid, 0, _process(pid).started, own_ray_job()
        )
        self._version: Any = None
        self._confirmed = 0.0
        self._lost: str | None = "it was never taken"
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_forever, daemon=True)

    def __enter__(self) -> Lease:
        if not self.enforce:
            self.say(f"warning: no lease: nothing keeps another run from writing {self.folder.uri} at the same time")
            return self
        with storage_errors(f"taking the lease {self.place.uri}"):
            self._store = _store_of(self.folder)
            self._store.probe()
            self._acquire()
        self._lost = None
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lost is not None:
            self._stop.set()
            return
        self._lost = "it was released"
        self._stop.set()
        try:
            _within(EXIT_SECONDS, self._release)
        except Exception as error:
            why = "the store does not answer" if isinstance(error, TimeoutError) else error
            self.say(f"the lease is left behind ({why}): a run elsewhere has to wait until it expires")

    def check(self) -> None:
        """Raise CaprayError unless this run surely holds the lease now.

        It does until ``publish_seconds`` after the last confirmed renewal began; later the lease is renewed first. Nobody
        takes a lease over (but with ``steal``) before ``expiry_seconds``: the time between the two is what a publish may
        take. A process frozen for longer after ``check`` returned still sends its write when it wakes up, and no check of
        its own could prevent that: ids captioned by both runs are then removed by ``plan.remove_duplicates``.
        """
        if not self.enforce:
            return
        for _ in range(3):
            if self._lost is None and now() - self._confirmed > self.publish_seconds:
                self._renew()
        if self._lost is not None:
            raise CaprayError(f"lost the lease on the output: {self._lost}; what was published is kept")
        if now() - self._confirmed > self.publish_seconds:
            raise CaprayError(f"renewing the lease {self.place.uri} takes too long to write safely; run again")

    def _acquire(self) -> None:
        seen = self._write(None)
        since, waiting = now(), False
        while seen is not None:
            theirs = seen.claim
            if theirs is None:
                if now() - since > self.expiry_seconds:
                    raise StorageError("the store neither shows a lease nor lets one be created")
                after = self._write(None)
            elif theirs.token == self.claim.token:
                after = self._write(seen.version)
            elif why := self._why_taken(theirs, since):
                after = self._write(seen.version)
                if after is None:
                    self.say(f"took over the lease of {theirs.describe()}: {why}")
            else:
                if not waiting:
                    waiting = True
                    self.say(
                        f"the output is leased by {theirs.describe()}; watching whether it lives "
                        f"(up to {self.expiry_seconds:g} s)"
                    )
                time.sleep(min(1.0, self.expiry_seconds / 10))
                after = self._look()
            if after is None:
                return
            if after.version != seen.version:
                if theirs is not None and after.claim is not None and not self._is_ours(after) and not self.steal:
                    raise OutputConflictError(
                        f"{after.claim.describe()} is writing this output: wait for it to end, stop it, or choose another "
                        "output"
                    )
                since = now()
            seen = after

    def _why_taken(self, theirs: Claim, since: float) -> str | None:
        """Why this run may take the lease of another, seen unchanged ``since``; None while it may not."""
        if self.steal:
            return "told to (--steal-lease)"
        if _is_dead(theirs):
            return "its process is gone"
        if now() - since >= self.expiry_seconds:
            return f"it has not been renewed for {self.expiry_seconds:g} s"
        if theirs.ray_job and self.is_job_terminal(theirs.ray_job):
            return "its Ray job has ended"
        return None

    def _renew_forever(self) -> None:
        while not self._stop.wait(self.renew_seconds) and self._lost is None:
            with suppress(Exception):  # The next round tries again; `check` holds the writer back meanwhile.
                self._renew()

    def _renew(self) -> None:
        with self._lock, storage_errors(f"renewing the lease {self.place.uri}"):
            for _ in range(3):
                if self._lost is not None:
                    return
                seen = self._write(self._version)
                if seen is None:
                    return
                if not self._is_ours(seen):
                    self._lost = f"it was taken by {seen.claim.describe()}" if seen.claim else "its file was removed"
                    return
                # Ours, its answer lost. It may be an old one, watched by contenders since: only a new one proves anything.
                self._version = seen.version
            raise StorageError("the store refuses to replace a version that stands there")

    def _write(self, version: Any) -> Seen | None:
        """Write the next claim over ``version`` (None: where there is no file). None when it was written; else what stands
        there, which may be this very claim: when an answer is lost the client asks again, and is refused because of itself.
        """
        self.claim = replace(self.claim, sequence=self.claim.sequence + 1)
        started = now()
        data = json.dumps(asdict(self.claim)).encode()
        written = self._store.create(data) if version is None else self._store.replace(data, version)
        if written is None:
            return self._look()
        self._version, self._confirmed = written, started
        return None

    def _look(self) -> Seen:
        found = self._store.read()
        return Seen() if found is None else Seen(_parse(found[0]), found[1])

    def _is_ours(self, seen: Seen) -> bool:
        return seen.claim is not None and seen.claim.token == self.claim.token

    def _release(self) -> None:
        with self._lock:
            seen = self._look()
            if self._is_ours(seen):
                self._store.remove(seen.version)


def now() -> float:
    """Seconds on this machine's clock, those it slept through included where the system counts them."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)


def own_ray_job() -> str | None:
    """The submission id when ``ray job submit`` started this process. Ray tells it nowhere but in the job's configuration
    (RAY_JOB_ID is withheld from drivers)."""
    try:
        return json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"]
    except (KeyError, ValueError, TypeError):
        return None


def ray_job_is_terminal(job_id: str) -> bool:
    """Whether the Ray cluster at hand (RAY_ADDRESS) says that this job has ended. False when that is not known.

    Only of ids that Ray made up: one chosen by a user may name another job in another cluster.
    """
    at_hand = "RAY_ADDRESS" in os.environ or "RAY_API_SERVER_ADDRESS" in os.environ
    if not at_hand or not job_id.startswith("raysubmit_"):
        return False

    def ask() -> bool:
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient().get_job_status(job_id).is_terminal()

    try:
        return _within(RAY_SECONDS, ask)
    except Exception:
        return False


@dataclass(frozen=True)
class _Process:
    """What the system tells of a process. A zombie does not live; ``started`` is None where it cannot be told."""

    lives: bool
    started: int | None = None


def _process(pid: int) -> _Process:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return _Process(lives=False)
    except (OSError, OverflowError):
        pass  # It is another user's.
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            status = file.read().rpartition(b")")[2].split()
        return _Process(status[0] not in (b"Z", b"X"), int(status[19]))
    except (OSError, ValueError, IndexError):
        return _Process(lives=True)


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_dead(claim: Claim) -> bool:
    """Whether the owner provably lives no more: it ran in this boot of this machine, and its process is gone."""
    if not claim.boot or (claim.host, claim.boot) != (socket.gethostname(), _boot_id()):
        return False
    process = _process(claim.pid)
    is_another = None not in (claim.started, process.started) and claim.started != process.started
    return not process.lives or is_another


def _parse(data: bytes) -> Claim:
    """The claim in ``data``; a file not yet written, or damaged, is a claim of nobody, to be watched until it expires."""
    try:
        values = json.loads(data)
        claim = Claim(**{field.name: values[field.name] for field in fields(Claim) if field.name in values})
        return replace(claim, pid=int(claim.pid), sequence=int(claim.sequence))
    except (ValueError, TypeError, KeyError):
        return Claim("", "", "", 0, 0)


def _within(seconds: float, action: Callable[[], T]) -> T:
    """What ``action`` returns. It runs in a thread that is left behind when it takes longer: TimeoutError."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(seconds)


class _Store(Protocol):
    """One file, and writes that happen only where nobody else wrote."""

    def probe(self) -> None:
        """Raise StorageError unless conditions are honoured."""

    def read(self) -> tuple[bytes, Any] | None:
        """The bytes and a version that is not newer than they are; None when there is no file."""

    def create(self, data: bytes) -> Any:
        """The version written; None when there is a file already."""

    def replace(self, data: bytes, version: Any) -> Any:
        """The version written; None when the file is at another version, or gone."""

    def remove(self, version: Any) -> None:
        """Remove the file if it is at ``version``."""


def _store_of(folder: Location) -> _Store:
    if folder.is_local:
        return _LocalFile(folder)
    if hasattr(folder.fs, "call_s3"):
        return _S3Object(folder)
    raise StorageError(
        f"no conditional writes to {folder.uri} are known, so two runs could write one output: {WAY_OUT}"
    )


class _LocalFile:
    """A file whose bytes are its version. It is not synced: after a crash of the machine its owner is gone, too."""

    def __init__(self, folder: Location):
        self.path = folder.join("lease.json").path
        self.scratch = folder.join("tmp").path

    def probe(self) -> None:
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        with self._alone():
            pass

    def read(self) -> tuple[bytes, Any] | None:
        try:
            with open(self.path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return None
        return data, data

    def create(self, data: bytes) -> Any:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return None
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        return data

    def replace(self, data: bytes, version: Any) -> Any:
        if self.read() is None:
            return None
        with self._alone():
            if self.read() != (version, version):
                return None
            os.makedirs(self.scratch, exist_ok=True)
            temporary = os.path.join(self.scratch, f".lease.json.{uuid.uuid4().hex}")
            with open(temporary, "wb") as file:
                file.write(data)
            os.replace(temporary, self.path)
        return data

    def remove(self, version: Any) -> None:
        with self._alone():
            if self.read() == (version, version):
                os.unlink(self.path)

    @contextmanager
    def _alone(self) -> Generator[None]:
        """Alone among the processes that see this file: comparing and replacing are two steps."""
        path = f"{self.path}.lock"
        with open(path, "w") as file:
            deadline = now() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if now() > deadline:
                        raise StorageError(f"another process holds {path}: is one stopped that wrote there?") from error
                    time.sleep(0.01)
                except OSError as error:
                    raise StorageError(f"the file system of {path} cannot lock files ({error}): {WAY_OUT}") from error
            yield


_proved: set[tuple[Any, str]] = set()
"""The stores and buckets that proved to honour conditions."""


class _S3Object:
    """An object, whose ETag is its version."""

    def __init__(self, folder: Location):
        self.folder = folder
        self.place = folder.join("lease.json")

    def probe(self) -> None:
        """Write one key from many threads at once: exactly one may create it, and then exactly one replace it.

        Once per process and bucket: SeaweedFS takes seconds to let so many through.
        """
        store = (self.place.fs, self.place.path.partition("/")[0])
        if store in _proved:
            return
        with ThreadPoolExecutor(NUM_PROBES) as pool:
            for _ in range(3):  # None wins where an answer was lost.
                key = self.folder.join("tmp", f"probe-{uuid.uuid4().hex}")
                try:
                    (created,) = self._race(pool, key, IfNoneMatch="*") or [None]
                    if created and self._race(pool, key, IfMatch=created):
                        _proved.add(store)
                        return
                finally:
                    with suppress(OSError):
                        self._call("delete_object", key)
        raise self._not_honoured("none of many writes at once succeeded")

    def _race(self, pool: ThreadPoolExecutor, key: Location, **condition: str) -> list[str]:
        """The version that the one winner wrote; [] when there was none."""

        def write(number: int) -> str | None:
            return self._put(key, f"{condition} {number}".encode(), **condition)

        won = [version for version in pool.map(write, range(NUM_PROBES)) if version]
        if len(won) > 1:
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

    def create(self, data: bytes) -> Any:
        return self._put(self.place, data, IfNoneMatch="*")

    def replace(self, data: bytes, version: Any) -> Any:
        return self._put(self.place, data, IfMatch=version)

    def remove(self, version: Any) -> None:
        try:
            self._call("delete_object", self.place, IfMatch=version)
        except OSError as error:
            if error.errno == errno.ENOSYS:
                self._call("delete_object", self.place)
            elif not _is_refusal(error):
                raise

    def _put(self, place: Location, data: bytes, **condition: str) -> str | None:
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
    answer = getattr(error.__cause__, "response", {})
    code = answer.get("Error", {}).get("Code")
    return code in ("PreconditionFailed", "412", "ConditionalRequestConflict", "OperationAborted", "409", "NoSuchKey")
