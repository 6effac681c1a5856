"""Downloading a file that may be large: resumed, retried as long as bytes come, within the disk's room."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import requests
from requests.exceptions import ChunkedEncodingError, HTTPError, RequestException
from rich.filesize import decimal
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential_jitter

from capray.errors import StorageError
from capray.progress import ProgressDisplay

ATTEMPTS = 5
"""Requests in a row that bring nothing, after which a download is given up."""
WAIT = wait_exponential_jitter(initial=1, max=30)
TIMEOUTS_SECONDS = (10, 60)
"""To connect, and between two pieces of an answer."""
CHUNK_BYTES = 1 << 16


def download(url: str, target: Path, size: int | None, display: ProgressDisplay) -> None:
    """Download ``url``, of ``size`` bytes where that is known for certain, to ``target``, going on from what an earlier
    call has left beside it.

    Bytes of two versions of the file may come together when it changes between two calls: its checksums tell.

    Raises:
        RequestException: it cannot be had.
        StorageError: it is larger than the disk.
    """
    part = target.with_name(f"{target.name}.part")
    furthest, advanced_at, etags = 0, 0, [""]

    def say_why(state: RetryCallState) -> None:
        assert state.outcome is not None
        display.say(f"{target.name}: {innermost(state.outcome.exception())}; trying again")

    def is_stuck(state: RetryCallState) -> bool:
        nonlocal furthest, advanced_at
        if (size := _size(part)) > furthest:
            furthest, advanced_at = size, state.attempt_number
        return state.attempt_number - advanced_at >= ATTEMPTS

    retrying = Retrying(stop=is_stuck, wait=WAIT, retry=retry_if_exception(_may_pass), before_sleep=say_why, reraise=True)
    with requests.Session() as session:
        retrying(_go_on, session, url, part, size, etags, display)
    os.replace(part, target)


def _go_on(
    session: requests.Session, url: str, part: Path, meant: int | None, etags: list[str], display: ProgressDisplay
) -> None:
    """Ask once for what ``part`` lacks of the version with the last of ``etags``."""
    have = _size(part)
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": etags[-1]} if etags[-1] else {})
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUTS_SECONDS) as answer:
        if answer.status_code == 416:
            part.unlink()
        answer.raise_for_status()
        start = have if answer.status_code == 206 else 0
        length = answer.headers.get("Content-Length")
        size = None if length is None else start + int(length)
        if size is not None and meant not in (None, size):
            raise RequestException(f"the server has {size:,} bytes, not the {meant:,} of the file that is meant")
        if size is not None and size - start > (free := shutil.disk_usage(part.parent).free):
            raise StorageError(f"{part} needs {decimal(size - start)} more, and {decimal(free)} are free")
        etag = answer.headers.get("ETag", "")
        etags.append(etag if etag.startswith('"') else "")
        with open(part, "r+b" if start else "wb") as file:
            file.seek(start)
            for chunk in answer.iter_content(CHUNK_BYTES):
                file.write(chunk)
                of = f" of {decimal(size)}" if size else ""
                display.update(file.tell(), f"{decimal(file.tell())}{of}", total=size)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, HTTPError) and error.response is not None:
        return error.response.status_code in (408, 416, 425, 429) or error.response.status_code >= 500
    return isinstance(error, (requests.ConnectionError, requests.Timeout, ChunkedEncodingError))


def innermost(error: BaseException | None) -> str:
    """The first reason of a chain of errors."""
    while (inner := error and (error.__cause__ or error.__context__)) is not None:
        error = inner
    return str(error) or type(error).__name__
