"""One writer per output: ``lease.json``, written by its holder alone, renewed while it lives, taken over when it is dead.

On a local disk a lock of the kernel's, held for the whole run, says at once whether the holder lives. Elsewhere (S3, NFS,
Lustre, FUSE) a lease is dead when it stood still for long: times are differences on one's own clock, never compared between
machines. Older versions of capray have no such lock and only watch ``lease.json``, which is still kept up for them, and
theirs is watched.

Knows nothing of parts or rows, and cannot stop a write that is on its way: see ``Lease.check``.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from capray.captioning.lease_file import WAY_OUT, SharedFile, SharedObject, is_on_local_disk, take_kernel_lock
from capray.deadlines import now, within
from capray.errors import LeaseHeldError, StorageError, WriteUnanswered
from capray.storage import Location, storage_errors, write_errors

RENEW_SECONDS = 10.0
PUBLISH_SECONDS = 20.0
"""The run writes only this long after the start of the last renewal that was confirmed."""
EXPIRY_SECONDS = 45.0
"""A contender takes a lease that it has watched unchanged for this long."""
LOCKED_MARGIN_SECONDS = 120.0
"""What one write may take where the kernel's lock keeps the others out."""
PATIENCE_SECONDS = 120.0
"""How long renewing is tried on a store that does not answer."""
EXIT_SECONDS = 1.0
"""How long leaving waits for a store that does not answer."""
RAY_SECONDS = 5.0
"""How long Ray may take to say how a job stands."""


@dataclass(frozen=True)
class Claim:
    """What the lease file says: who owns it, and a sequence number that grows with every attempt to write it."""

    token: str
    host: str
    pid: int
    sequence: int
    ray_job: str | None = None
    """The submission id of the Ray job."""
    is_locked: bool = False
    """Whether its owner holds the kernel's lock on ``lease.lock``: who gets that lock knows that it is gone."""

    @classmethod
    def parse(cls, data: bytes) -> Claim:
        """The claim in ``data``; a file not yet written, or damaged, is a claim of nobody."""
        try:
            values = json.loads(data)
            claim = cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})
            return replace(claim, pid=int(claim.pid), sequence=int(claim.sequence))
        except (ValueError, TypeError, KeyError):
            return cls("", "", 0, 0)

    def encode(self) -> bytes:
        return json.dumps({**asdict(self), "boot": ""}).encode()  # Older versions do not read it without a boot id.

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
        folder: where ``lease.json`` and ``lease.lock`` lie, and ``tmp`` beside them.
        say: takes a line for the user.
        renew_seconds, expiry_seconds, publish_seconds, patience_seconds: see the constants of this module.
        steal: take the lease from whoever holds it, without waiting; not from a process that holds the kernel's lock.
        enforce: False for no lease at all.
        is_job_terminal: whether a Ray job, by its submission id, surely runs no more.

    Raises on entry:
        LeaseHeldError: another run holds the lease.
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
        patience_seconds: float = PATIENCE_SECONDS,
        steal: bool = False,
        enforce: bool = True,
        is_job_terminal: Callable[[str], bool] = lambda job_id: False,
    ):
        self.folder, self.place = folder, folder.join("lease.json")
        self.say = say
        self.renew_seconds, self.expiry_seconds = renew_seconds, expiry_seconds
        self.publish_seconds, self.patience_seconds = publish_seconds, patience_seconds
        self.steal, self.enforce, self.is_job_terminal = steal, enforce, is_job_terminal
        self.claim = Claim(uuid.uuid4().hex, socket.gethostname(), os.getpid(), 0, own_ray_job())
        self._kernel_lock: int | None = None
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
        try:
            with write_errors(f"taking the lease {self.place.uri}"):
                self._file = self._open()
                within(self.patience_seconds, self._file.probe)
                self._acquire()
        except BaseException:
            self._unlock()
            raise
        self._lost = None
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        try:
            if self._lost is None:
                self._lost = "it was released"
                within(EXIT_SECONDS, self._release)
        except Exception as error:
            why = "the store does not answer" if isinstance(error, TimeoutError) else error
            self.say(f"the lease is left behind ({why}): a run elsewhere has to wait until it expires")
        finally:
            self._unlock()

    @property
    def margin_seconds(self) -> float:
        """How long after ``check`` looked a write may go on, its retries included."""
        if self.claim.is_locked or not self.enforce:
            return LOCKED_MARGIN_SECONDS
        return self.expiry_seconds - self.publish_seconds

    def check(self) -> float:
        """Raise an error unless this run surely holds the lease now; when, on ``deadlines.now``, a write that begins now has
        to end.

        It does until ``publish_seconds`` after the last confirmed renewal began; later the lease is renewed first. Nobody
        takes a lease over (but with ``steal``) before ``expiry_seconds``: the time between the two is the margin. A process
        frozen for longer after ``check`` returned still sends its write when it wakes up, and no check of its own could
        prevent that: ids captioned by both runs are then removed by ``Settled.remove_duplicates``.

        Raises:
            LeaseHeldError: the lease is lost.
            StorageError: it cannot be renewed; WriteUnanswered, where the store gave no answer for ``patience_seconds``.
        """
        started, waiting = now(), False
        looked = started
        while self.enforce and self._lost is None and looked - self._confirmed > self.publish_seconds:
            try:
                self._renew()
            except WriteUnanswered as error:
                if now() - started > self.patience_seconds:
                    raise
                if not waiting:
                    waiting = True
                    self.say(f"{error}: trying again for up to {self.patience_seconds:g} s")
                time.sleep(min(1.0, self.patience_seconds / 10))
            looked = now()
        if self.enforce and self._lost is not None:
            raise LeaseHeldError(f"lost the lease on the output: {self._lost}; what was published is kept")
        return looked + self.margin_seconds

    def _open(self) -> SharedFile | SharedObject:
        """What the lease is written in. On a local disk this takes the kernel's lock."""
        if not self.folder.is_local:
            if hasattr(self.folder.fs, "call_s3"):
                return SharedObject(self.folder)
            raise StorageError(f"conditional writes to {self.folder.uri} are not known to work: {WAY_OUT}")
        file = SharedFile(self.folder)
        os.makedirs(self.folder.path, exist_ok=True)
        if is_on_local_disk(self.folder.path):
            self._kernel_lock = take_kernel_lock(self.folder.join("lease.lock").path)
            if self._kernel_lock is None:
                time.sleep(0.1)  # Its holder may be about to write its claim.
                found = file.read()
                holder = Claim.parse(found[0] if found else b"")
                raise self._held_by(holder, "; --steal-lease takes none from a process that lives")
            self.claim = replace(self.claim, is_locked=True)
        return file

    def _unlock(self) -> None:
        if self._kernel_lock is not None:
            os.close(self._kernel_lock)
            self._kernel_lock = None

    def _held_by(self, theirs: Claim, hint: str = "") -> LeaseHeldError:
        way_out = "wait until it ends, end it, or choose another output"
        return LeaseHeldError(f"{theirs.describe()} is writing this output: {way_out}{hint if self.steal else ''}")

    def _acquire(self) -> None:
        seen, since, waiting = self._look(), now(), False
        while True:
            reason = self._reason_to_take(seen, since)
            if reason is not None and self._write(seen.version):
                if seen.claim is not None and not self._is_ours(seen):
                    self.say(f"took over the lease of {seen.claim.describe()}: {reason}")
                return
            if reason is None and seen.claim is not None and not waiting:
                waiting = True
                self.say(
                    f"the output is leased by {seen.claim.describe()}; watching whether it lives "
                    f"(up to {self.expiry_seconds:g} s)"
                )
            time.sleep(min(1.0, self.expiry_seconds / 10))
            after = self._look()
            if after.version != seen.version:
                is_moving = seen.claim is not None and after.claim is not None and not self._is_ours(after)
                if is_moving and not self.steal:
                    raise self._held_by(after.claim)
                since = now()
            elif after.claim is None and now() - since > self.expiry_seconds:
                raise StorageError("the store neither shows a lease nor lets one be created")
            seen = after

    def _reason_to_take(self, seen: Seen, since: float) -> str | None:
        """Why this run may write the lease, seen unchanged ``since``; None while it may not."""
        theirs = seen.claim
        if theirs is None or self._is_ours(seen):
            return "it is free"
        if theirs.is_locked and self.claim.is_locked:
            return "its process is gone"
        if self.steal:
            return "told to (--steal-lease)"
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
        with self._lock, write_errors(f"renewing the lease {self.place.uri}"):
            for _ in range(3):
                if self._lost is not None or self._write(self._version):
                    return
                seen = self._look()
                if not self._is_ours(seen):
                    self._lost = f"it was taken by {seen.claim.describe()}" if seen.claim else "its file was removed"
                    return
                # Ours, its answer lost. It may be an old one, watched by contenders since: only a new one proves anything.
                self._version = seen.version
            raise StorageError("the store refuses to replace a version that stands there")

    def _write(self, version: Any) -> bool:
        """Whether the next claim was written over ``version`` (None: where there is no file).

        Where it was not, this very claim may stand there: when an answer is lost the client asks again, and is refused
        because of itself.
        """
        self.claim = replace(self.claim, sequence=self.claim.sequence + 1)
        data, started = self.claim.encode(), now()
        written = within(self.publish_seconds, lambda: self._file.write(data, version))
        if written is None:
            return False
        self._version, self._confirmed = written, started
        return True

    def _look(self) -> Seen:
        found = within(self.publish_seconds, self._file.read)
        return Seen() if found is None else Seen(Claim.parse(found[0]), found[1])

    def _is_ours(self, seen: Seen) -> bool:
        return seen.claim is not None and seen.claim.token == self.claim.token

    def _release(self) -> None:
        with self._lock, storage_errors(f"releasing the lease {self.place.uri}"):
            seen = self._look()
            if self._is_ours(seen):
                self._file.remove(seen.version)


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
        return within(RAY_SECONDS, ask)
    except Exception:
        return False
