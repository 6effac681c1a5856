"""An object's bytes from storage, whole or as a stream: typed failures, and another attempt at what may pass.

Requests to S3 are repeated by botocore (``storage.S3_OPTIONS``), answers that break off here: neither repeats the other's
attempts. Knows nothing of images, plans or Ray.
"""

from __future__ import annotations

import asyncio
import errno
import io
import os
import re
import stat
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from fsspec.asyn import sync
from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_before_delay, wait_exponential_jitter

from capray.errors import CaprayError
from capray.images import ImageError
from capray.storage import Location, is_s3, locate

BODY_SECONDS = 120.0
"""An answer that takes longer to arrive has broken off."""
_ATTEMPTS = 4
_LAST_ATTEMPT_SECONDS = 60.0
"""No attempt begins later than this after the first."""
_WAIT = wait_exponential_jitter(initial=0.2, max=10, jitter=0.5)

_MISSING_CODES = {"InvalidBucketName", "KeyTooLongError"}
"""What S3 says with status 400 of names that no object can have."""
_DENIED_CODES = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "RequestExpired"}
"""What S3 says with status 400 of credentials; the rest comes with 401 or 403."""
_CREDENTIAL_ERRORS = re.compile("Credential|Token|SSO|Login|Profile")
"""In the names of botocore's exceptions: no credentials, or none that can be had."""


class _BrokenOff(Exception):
    """An answer began and did not arrive whole."""


@dataclass(frozen=True)
class _Piece:
    """Bytes of an object, the size of the whole of it, and which version of it that was."""

    data: bytes
    size: int
    version: str = ""


def read_image(uri: str, max_bytes: int) -> bytes:
    """The bytes at ``uri``, at most one more than ``max_bytes``. What may pass is tried again, with backoff and jitter.

    Raises:
        ImageError: of kind missing, denied or unreadable_storage.
    """
    return _fetch(uri, 0, max_bytes + 1).data


def read_range(uri: str, start: int, end: int) -> bytes:
    """The bytes at ``uri`` from ``start`` to ``end``, or to its end if that comes first; raises as ``read_image`` does."""
    return _fetch(uri, start, end).data if end > start else b""


def open_stream(uri: str, start: int = 0, chunk_bytes: int = 8 * 2**20) -> io.BufferedReader:
    """The object at ``uri`` as a file that is read in ranges of ``chunk_bytes``, from byte ``start`` on.

    Nothing is read, and nothing fails, before the first ``read`` or ``seek`` from the end. Then and later:

    Raises:
        ImageError: of kind missing, denied or unreadable_storage; this too when the object changed since the first read.
    """
    return io.BufferedReader(_Stream(uri, start, chunk_bytes), buffer_size=chunk_bytes)


class _Stream(io.RawIOBase):
    def __init__(self, uri: str, start: int, chunk_bytes: int):
        self._uri, self._position, self._chunk_bytes = uri, start, chunk_bytes
        self._known: _Piece | None = None

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

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self._next(self._chunk_bytes), b""))

    def _next(self, num_bytes: int) -> bytes:
        if not num_bytes or (self._known and self._position >= self._known.size):
            return b""
        data = self._get(self._position, self._position + min(num_bytes, self._chunk_bytes)).data
        self._position += len(data)
        return data

    def _size(self) -> int:
        return (self._known or self._get(0, 1)).size

    def _get(self, start: int, end: int) -> _Piece:
        piece = _fetch(self._uri, start, end)
        known = self._known = self._known or _Piece(b"", piece.size, piece.version)
        if (piece.size, piece.version) != (known.size, known.version):
            raise ImageError("unreadable_storage", f"{_public(self._uri)}: changed while it was read")
        return piece


def _fetch(uri: str, start: int, end: int) -> _Piece:
    """The bytes from ``start`` to ``end`` or the object's end."""
    retrying = Retrying(
        retry=retry_if_exception(_is_passing),
        stop=stop_after_attempt(_ATTEMPTS) | stop_before_delay(_LAST_ATTEMPT_SECONDS),
        wait=_WAIT,
        reraise=True,
    )
    try:
        return retrying(_read, locate(uri), start, end)
    except Exception as error:
        kind, text = _failure(error)
        if kind is None:
            raise
        # What other stores say may repeat the signature in their URI.
        text = text if _public(uri) == uri else type(error).__name__
        raise ImageError(kind, f"{_public(uri)}: {text}") from error


def _read(place: Location, start: int, end: int) -> _Piece:
    if place.is_local:
        piece = _read_file(place.path, start, end)
    elif is_s3(place):
        piece = sync(place.fs.loop, _read_s3, place, start, end)
    else:
        data = place.fs.cat_file(place.path, start=start, end=end)
        is_whole = start == 0 and len(data) < end
        piece = _Piece(data, len(data) if is_whole else place.fs.size(place.path))
    expected = max(0, min(end, piece.size) - start)
    if len(piece.data) != expected:
        raise _BrokenOff(f"{len(piece.data)} of {expected} bytes arrived")
    return piece


def _read_file(path: str, start: int, end: int) -> _Piece:
    if "\0" in path:
        raise FileNotFoundError("no file can have this name")
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise FileNotFoundError("not a regular file")
        file.seek(start)
        data = file.read(max(0, min(end, about.st_size) - start))
    return _Piece(data, about.st_size, f"{about.st_ino}-{about.st_mtime_ns}")


async def _read_s3(place: Location, start: int, end: int) -> _Piece:
    from botocore.exceptions import ClientError

    client = await place.fs.set_session()
    bucket = place.fs.split_path(place.path)[0]
    key = place.path[len(bucket) + 1 :]
    try:
        answer = await client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}")
    except ClientError as error:
        if _answer(error)[0] != 416:
            raise
        # Nothing lies at or behind ``start``.
        return _Piece(b"", 0) if start == 0 else replace(await _read_s3(place, 0, 1), data=b"")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            data = await answer["Body"].read()
    except Exception as error:
        raise _BrokenOff(f"{type(error).__name__}: {error}") from error
    finally:
        answer["Body"].close()
    if "ContentRange" not in answer:
        return _Piece(data[start:end], answer["ContentLength"], answer.get("ETag", ""))
    given = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer["ContentRange"])
    if not given or int(given[1]) != start:
        raise _BrokenOff(f"asked for bytes {start}-{end - 1}, given {answer['ContentRange']!r}")
    return _Piece(data, int(given[2]), answer.get("ETag", ""))


def _is_passing(error: BaseException) -> bool:
    """Whether another attempt may succeed, which botocore has not made already."""
    if any(parent.__module__ == "botocore.exceptions" for parent in type(error).__mro__):
        return False
    return isinstance(error, _BrokenOff) or _failure(error)[0] == "unreadable_storage"


def _failure(error: BaseException) -> tuple[str | None, str]:
    """The kind of failure, None if it is not one of storage, and what is to be said of it."""
    name, module = type(error).__name__, type(error).__module__.split(".")[0]
    text = f"{name}: {error}"
    if isinstance(error, CaprayError):
        return "unreadable_storage", str(error)
    if isinstance(error, UnicodeEncodeError) or name == "ParamValidationError":
        return "missing", text
    if isinstance(error, OSError):
        text = error.strerror or text
        if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
            return "missing", text
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return "missing", text
        return "denied" if isinstance(error, PermissionError) else "unreadable_storage", text
    status, code = _answer(error)
    if status == 404 or code in _MISSING_CODES:
        return "missing", text
    if status in (401, 403) or code in _DENIED_CODES:
        return "denied", text
    if module in ("botocore", "aiobotocore") and _CREDENTIAL_ERRORS.search(name):
        return "denied", text
    is_storage = isinstance(error, _BrokenOff) or module in ("botocore", "aiobotocore", "s3fs", "aiohttp", "asyncio")
    return "unreadable_storage" if is_storage else None, text


def _answer(error: Any) -> tuple[int | None, str]:
    """The HTTP status and S3's code in botocore's errors; the status in aiohttp's."""
    answer = getattr(error, "response", None)
    if not isinstance(answer, dict):
        return getattr(error, "status", None), ""
    return answer["ResponseMetadata"].get("HTTPStatusCode"), answer["Error"].get("Code", "")


def _public(uri: str) -> str:
    """``uri`` without what may be a secret in URIs other than S3's: user, password, query."""
    if "://" not in uri or uri.startswith(("s3://", "s3a://", "file://")):
        return uri
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
