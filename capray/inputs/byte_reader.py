"""An object's bytes from storage, whole or as a stream: typed failures, and another attempt at what may pass.

Requests to S3 are repeated by botocore (``storage.S3_OPTIONS``), answers that break off here: neither repeats the other's
attempts. What passes by itself is waited for as long as the caller's Patience lasts: a mount that is away, a store that asks
to slow down. Every read has a deadline. Knows nothing of images, plans or Ray.
"""

from __future__ import annotations

import asyncio
import errno
import io
import os
import random
import re
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from fsspec.asyn import sync
from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_before_delay, wait_exponential_jitter

from capray.deadlines import within
from capray.errors import StorageError, TryAgain
from capray.images import ImageError
from capray.inputs.stores import wait_for_answer
from capray.inputs.throttle import Throttle
from capray.inputs.versions import VersionChanged, check_version, if_match
from capray.inputs.witnesses import Known, witnesses
from capray.storage import (
    EXPIRED_CODES,
    Entry,
    Location,
    entry_of,
    file_version,
    is_s3,
    locate,
    object_version,
    path_of,
    s3_answer,
)

CHUNK_BYTES = 8 * 2**20
BODY_SECONDS = 120.0
"""An answer that takes longer to arrive has broken off."""
READ_SECONDS = 120.0
"""A file system that takes longer to read a piece is given up, and its thread left behind."""
REQUEST_SECONDS = 300.0
"""The most a request to S3 may take, botocore's retries included."""
_ATTEMPTS = 4
_LAST_ATTEMPT_SECONDS = 60.0
"""No attempt begins later than this after the first."""
_WAIT = wait_exponential_jitter(initial=0.2, max=10, jitter=0.5)
_SLOW_DOWN_SECONDS = 5.0
"""Between attempts when a store has asked to slow down."""

_NO_NAME_CODES = {"InvalidBucketName", "KeyTooLongError"}
"""What S3 says with status 400 of names that no object can have."""
_NO_STORE_CODES = ("NoSuchBucket", "NoSuchAccessPoint")
_SLOW_DOWN_STATUSES = (429, 503)
_DENIED_CODES = {"InvalidToken"}
"""What S3 says with status 400 of credentials; the rest comes with 401 or 403."""
_CREDENTIAL_ERRORS = re.compile("Credential|Token|SSO|Login|Profile")
"""In the names of botocore's exceptions: no credentials, or none that can be had."""

_throttle = Throttle()
_renewing = threading.Lock()


def ignore(text: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for a fault that may pass, and whom to notify.

    Attributes:
        known: what was there of the input before, and tells whether its file system still is.
    """

    seconds: float = 0.0
    known: Known = field(default_factory=Known)
    notify: Callable[[str], None] = ignore


class _BrokenOff(Exception):
    """An answer began and did not arrive whole."""


@dataclass(frozen=True)
class _Piece:
    """Bytes of an object, the size of the whole of it, and which version of it that was."""

    data: bytes
    size: int
    version: str = ""


def read_image(uri: str, max_bytes: int, patience: Patience | None = None) -> bytes:
    """The bytes at ``uri``, at most one more than ``max_bytes``. What may pass is tried again, with backoff and jitter.

    Raises:
        ImageError: of kind missing, archived, denied or unreadable_storage.
        StorageError: there is no such bucket.
        TryAgain: a mount or store is away for longer than ``patience``, or credentials have expired and cannot be renewed.
    """
    return _fetch(uri, 0, max_bytes + 1, None, patience).data


def read_range(uri: str, start: int, end: int, version: str = "", patience: Patience | None = None) -> bytes:
    """The bytes at ``uri`` from ``start`` to ``end``, or to its end if that comes first; raises as ``read_image`` does.

    Raises:
        VersionChanged: it is of another ``version``, if one is given.
    """
    return _fetch(uri, start, end, version, patience).data if end > start else b""


class Stream(io.RawIOBase):
    """The object at ``uri`` as a file that is read in ranges of at most ``chunk_bytes``, from byte ``start`` on, all of one
    version: the one given, or that of the first answer.

    Nothing is read, and nothing fails, before the first ``read`` or ``seek`` from the end. Then and later it raises what
    ``read_range`` does.
    """

    def __init__(
        self, uri: str, start: int = 0, chunk_bytes: int = CHUNK_BYTES, version: str = "", patience: Patience | None = None
    ):
        self.version = version
        self._uri, self._position, self._chunk_bytes, self._patience = uri, start, chunk_bytes, patience
        self._known_size: int | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_CUR:
            offset += self._position
        elif whence == os.SEEK_END:
            offset += self._size()
        if offset < 0:
            raise ValueError(f"seek to {offset}")
        self._position = offset
        return offset

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        data = self._next(len(view))
        view[: len(data)] = data
        return len(data)

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            return self.readall()
        pieces = []
        while size > 0 and (data := self._next(size)):
            pieces.append(data)
            size -= len(data)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self._next(self._chunk_bytes), b""))

    def _next(self, num_bytes: int) -> bytes:
        if not num_bytes or (self._known_size is not None and self._position >= self._known_size):
            return b""
        data = self._get(self._position, self._position + min(num_bytes, self._chunk_bytes)).data
        self._position += len(data)
        return data

    def _size(self) -> int:
        return self._get(0, 1).size if self._known_size is None else self._known_size

    def _get(self, start: int, end: int) -> _Piece:
        piece = _fetch(self._uri, start, end, self.version, self._patience)
        self._known_size, self.version = piece.size, piece.version
        return piece


def _fetch(uri: str, start: int, end: int, version: str | None, patience: Patience | None) -> _Piece:
    """The bytes from ``start`` to ``end`` or the object's end, of the ``version``; of any when it is "", which the piece
    then tells, or None."""
    try:
        place = locate(uri, as_written=True)
    except StorageError as error:
        raise ImageError("unreadable_storage", f"{_public(uri)}: {error}") from error
    began = time.monotonic()
    has_renewed = has_confirmed = False
    while True:
        client = getattr(place.fs, "_s3", None)
        try:
            return _retrying(place, start, end, version, patience)
        except VersionChanged as error:
            raise VersionChanged(f"{_public(uri)}: {error}") from error
        except Exception as error:
            failure = _failure(error)
            if failure is None:
                raise
            status, code = _answer(error)
            if code in _NO_STORE_CODES:
                raise StorageError(f"{uri}: there is no such bucket or access point") from error
            if code in EXPIRED_CODES:
                if has_renewed:
                    raise TryAgain(
                        f"reading {uri}: the credentials have expired ({code}): renew them and run the same command again"
                    ) from error
                _renew(place.fs, client)
                has_renewed = True
                continue
            if patience is not None:
                if status in _SLOW_DOWN_STATUSES and time.monotonic() - began < patience.seconds:
                    time.sleep(random.uniform(0.2, 1) * min(_SLOW_DOWN_SECONDS, patience.seconds))
                    continue
                is_unanswered = is_s3(place) and failure.kind == "unreadable_storage" and (status is None or status >= 500)
                if is_unanswered and (wait_for_answer(place, patience.seconds, patience.notify) or not has_confirmed):
                    has_confirmed = True
                    continue
                if place.is_local and (failure.kind == "unreadable_storage" or not failure.certain):
                    has_waited = witnesses.wait_for(place.path, patience.known, patience.seconds, patience.notify)
                    # That it is there says nothing of the moment before: what is missing is looked for again.
                    if has_waited or (failure.kind == "missing" and not has_confirmed):
                        has_confirmed = True
                        continue
            # What other stores say may repeat the signature in their URI.
            text = failure.message if _public(uri) == uri else type(error).__name__
            raise ImageError(failure.kind, f"{_public(uri)}: {text}", failure.certain) from error


def _retrying(place: Location, start: int, end: int, version: str | None, patience: Patience | None) -> _Piece:
    """What ``_read`` gives, after a few attempts at answers that broke off."""
    retrying = Retrying(
        retry=retry_if_exception(_is_passing),
        stop=stop_after_attempt(_ATTEMPTS) | stop_before_delay(_LAST_ATTEMPT_SECONDS),
        wait=_WAIT,
        reraise=True,
    )
    try:
        return retrying(_read, place, start, end, version)
    finally:
        if patience is not None and (limit := _throttle.news()) is not None:
            patience.notify(f"a store asks to slow down: at most {limit} requests at once")


def _renew(fs: Any, client: Any) -> None:
    """Have a new ``client``, with credentials as they are now, unless somebody has since."""
    with _renewing:
        if fs._s3 is client:
            sync(fs.loop, fs.set_session, refresh=True)


def _read(place: Location, start: int, end: int, version: str | None) -> _Piece:
    if place.is_local:
        piece = within(READ_SECONDS, lambda: _read_file(place.path, start, end, version))
    elif is_s3(place):
        with _throttle:
            piece = sync(place.fs.loop, _read_s3, place, start, end, version, timeout=REQUEST_SECONDS)
    else:
        piece = within(READ_SECONDS, lambda: _read_other(place, start, end, version))
    check_version(version, piece.version)
    expected = max(0, min(end, piece.size) - start)
    if len(piece.data) != expected:
        raise _BrokenOff(f"{len(piece.data)} of {expected} bytes arrived")
    return piece


def _read_file(path: str, start: int, end: int, version: str | None) -> _Piece:
    if "\0" in path:
        raise OSError(errno.ENAMETOOLONG, "no file can have this name")
    path = path_of(path)
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise FileNotFoundError("not a regular file")
        check_version(version, file_version(about))
        file.seek(start)
        data = file.read(max(0, min(end, about.st_size) - start))
        if file_version(os.fstat(file.fileno())) != file_version(about):
            raise (VersionChanged("written to while it was read") if version else _BrokenOff("written to while it was read"))
    witnesses.saw(path, about.st_dev)
    return _Piece(data, about.st_size, file_version(about))


def _entry_now(place: Location) -> Entry:
    return entry_of(place, place.path, place.fs.info(place.path))


def _read_other(place: Location, start: int, end: int, version: str | None) -> _Piece:
    """These stores read no version that is asked for: the object is looked at afterwards, and before where it is to tell
    its version."""
    before = version or (_entry_now(place).version if version == "" else None)
    data = place.fs.cat_file(place.path, start=start, end=end)
    if version is None and start == 0 and len(data) < end:
        return _Piece(data, len(data))
    entry = _entry_now(place)
    if version == "" and before != entry.version:
        raise _BrokenOff("written to while it was read")
    return _Piece(data, entry.size, entry.version)


def _slow_down_if_asked(response: Any = None, **_: Any) -> None:
    """Botocore's hook for each answer, those included that it tries again."""
    if response is not None and response[0].status_code in _SLOW_DOWN_STATUSES:
        _throttle.slow_down()


async def _read_s3(place: Location, start: int, end: int, version: str | None) -> _Piece:
    from botocore.exceptions import ClientError

    client = await place.fs.set_session()
    client.meta.events.register("needs-retry.s3.GetObject", _slow_down_if_asked, unique_id="capray")
    bucket = place.fs.split_path(place.path)[0]
    key = place.path[len(bucket) + 1 :]
    try:
        answer = await client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", **if_match(version))
    except ClientError as error:
        status = _answer(error)[0]
        if status == 412:
            raise VersionChanged(f"no longer version {version}") from error
        if status != 416:
            raise
        # The object ends at or before ``start``.
        return _Piece(b"", 0, version or "") if start == 0 else replace(await _read_s3(place, 0, 1, version), data=b"")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            data = await answer["Body"].read()
    except Exception as error:
        raise _BrokenOff(f"{type(error).__name__}: {error}") from error
    finally:
        answer["Body"].close()
    if "ContentRange" not in answer:
        data, size = data[start:end], answer.get("ContentLength", len(data))
    else:
        given = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer["ContentRange"])
        if not given or int(given[1]) != start:
            raise _BrokenOff(f"asked for bytes {start}-{end - 1}, given {answer['ContentRange']!r}")
        size = int(given[2])
    return _Piece(data, size, object_version(answer.get("ETag"), size))


def _is_passing(error: BaseException) -> bool:
    """Whether another attempt may succeed, which botocore has not made already."""
    if any(parent.__module__ == "botocore.exceptions" for parent in type(error).__mro__):
        return False
    failure = _failure(error)
    return failure is not None and failure.kind == "unreadable_storage"


def _failure(error: BaseException) -> ImageError | None:
    """What ``error`` means for an image; None if it is no failure of storage."""
    name, module = type(error).__name__, type(error).__module__.split(".")[0]
    text = f"{name}: {error}"
    if isinstance(error, UnicodeEncodeError) or name == "ParamValidationError":
        return ImageError("missing", text, certain=True)
    if isinstance(error, OSError):
        text = error.strerror or text
        if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
            return ImageError("missing", text)
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return ImageError("missing", text, certain=True)
        return ImageError("denied" if isinstance(error, PermissionError) else "unreadable_storage", text)
    status, code = _answer(error)
    if status == 404 or code in _NO_NAME_CODES:
        return ImageError("missing", text, certain=code in ("NoSuchKey", *_NO_NAME_CODES))
    if code == "InvalidObjectState":
        return ImageError("archived", text)
    if status in (401, 403) or code in _DENIED_CODES:
        return ImageError("denied", text)
    if module in ("botocore", "aiobotocore") and _CREDENTIAL_ERRORS.search(name):
        return ImageError("denied", text)
    if isinstance(error, _BrokenOff) or module in ("botocore", "aiobotocore", "s3fs", "aiohttp", "asyncio"):
        return ImageError("unreadable_storage", text)
    return None


def _answer(error: Any) -> tuple[int | None, str]:
    """``s3_answer``; the status in aiohttp's errors."""
    status, code = s3_answer(error)
    return getattr(error, "status", None) if status is None else status, code


def _public(uri: str) -> str:
    """``uri`` without what may be a secret in URIs other than S3's: user, password, query."""
    if "://" not in uri or uri.startswith(("s3://", "s3a://", "file://")):
        return uri
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
