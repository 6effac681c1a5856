"""Downloading the archives of a data set, and unpacking them: resumed, repeated, checked, and never outside the folder.

What is under way lies in the folder's ``.capray-fetch``; an archive leaves it when all of it is unpacked. Knows nothing
of captions.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
import stat
import zipfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import requests
from rich.filesize import decimal
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from capray.errors import ConfigError, DataError, StorageError
from capray.progress import ProgressDisplay
from capray.storage import locate, storage_errors

KARPATHY_URL = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
ATTEMPTS = 5
"""Requests in a row that bring nothing, after which a download is given up."""
WAIT = wait_exponential_jitter(initial=1, max=30)
TIMEOUTS_SECONDS = (10, 60)
"""To connect, and between two pieces of an answer."""
CHUNK_BYTES = 1 << 16
"""What is written at once; as much is lost where a connection breaks."""
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_WORK = ".capray-fetch"
_JUNK = ("__MACOSX", ".DS_Store")


@dataclass(frozen=True)
class Archive:
    """A zip archive on the web and what it unpacks to."""

    url: str
    unpacks_to: tuple[str, ...]
    """Paths below the folder; one of them being there shows that the archive is not needed."""
    only: str = "*"
    """Glob of the members that are wanted."""
    size: int | None = None
    """In bytes, where it is known for certain."""
    checksum: str | None = None
    """``algorithm:hexdigest``, where it is known for certain; members are held to their CRCs in any case."""

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def karpathy_archive(dataset: str) -> Archive:
    """Karpathy's captions and splits, of which only the JSON of ``dataset`` is unpacked. Size and SHA-256 as TensorFlow
    Datasets registers them (`url_checksums/coco_captions.txt`)."""
    name = f"dataset_{dataset}.json"
    checksum = "sha256:4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817"
    return Archive(KARPATHY_URL, (name, f"caption_datasets/{name}", f"annotations/{name}"), name, 36_745_453, checksum)


class _CutOff(Exception):
    """An answer that failed or broke off, and may do better."""


def fetch(archives: Iterable[Archive], folder: str) -> None:
    """Download and unpack into ``folder`` what of ``archives`` is not there; the same call goes on after an interruption.

    An archive that lies in ``folder`` under its own name is unpacked in place of a download, and kept.

    Raises:
        ConfigError: the folder is not local.
        StorageError: an archive cannot be had (the message says where to put it by hand), or the disk is full.
        DataError: an archive is not what it should be, or would write outside the folder or over other files.
    """
    place = locate(folder)
    if not place.is_local:
        raise ConfigError(f"archives can only be fetched into a local folder, not {folder!r}")
    root = Path(place.path)
    wanted = [archive for archive in archives if not _is_there(archive, root)]
    lacking = [archive for archive in wanted if not (root / archive.name).is_file()]
    for archive in wanted:
        given, work = root / archive.name, root / _WORK / archive.name
        with ProgressDisplay(archive.name) as display, storage_errors(f"fetching {archive.url}"):
            if archive not in lacking:
                _check(given, archive, display)
                unpack(given, root, archive.only, display)
                continue
            work.parent.mkdir(parents=True, exist_ok=True)
            if not work.exists():
                rest = ", ".join(other.url for other in lacking[lacking.index(archive) :])
                download(
                    archive, work, f"put {rest}, had elsewhere, into {root} and run the same command again", display
                )
            unpack(work, root, archive.only, display)
            work.unlink()
            if not any(work.parent.iterdir()):
                work.parent.rmdir()


def _is_there(archive: Archive, root: Path) -> bool:
    """Whether what ``archive`` unpacks to is there, all of it as far as can be told."""
    work = root / _WORK / archive.name
    if (root / archive.name).is_file() or work.exists() or _part(work).exists():
        return False
    found = next((path for path in archive.unpacks_to if (root / path).exists()), None)
    if found is not None:
        with ProgressDisplay(archive.name) as display:
            display.say(f"{archive.name}: not needed, {root / found} is there")
    return found is not None


def download(archive: Archive, target: Path, way_out: str, display: ProgressDisplay) -> None:
    """Download ``archive`` to ``target``, going on from what an earlier call has left beside it.

    Raises:
        StorageError: it cannot be had; the message names the ``way_out``.
        DataError: what was had is not the archive.
    """
    transfer = _Transfer(archive, target, display)
    try:
        with requests.Session() as session:
            whole = False
            while not whole:
                for attempt in Retrying(
                    stop=stop_after_attempt(ATTEMPTS),
                    wait=WAIT,
                    retry=retry_if_exception_type(_CutOff),
                    before_sleep=transfer.say_why,
                    reraise=True,
                ):
                    with attempt:
                        whole = transfer.go_on(session)
    except (_CutOff, requests.RequestException) as error:
        raise StorageError(
            f"cannot download {archive.url}: {error}; where it cannot be had from here, {way_out}"
        ) from error
    try:
        _check(transfer.part, archive, display)
    except DataError:
        transfer.part.unlink()
        raise
    os.replace(transfer.part, target)
    transfer.record.unlink(missing_ok=True)


def _part(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


class _Transfer:
    """A download under way: its bytes so far in ``part``, and in ``record`` the size and validator of what they are of."""

    def __init__(self, archive: Archive, target: Path, display: ProgressDisplay):
        self.part = _part(target)
        self.record = self.part.with_name(f"{self.part.name}.json")
        self._archive, self._display = archive, display
        self._furthest = 0

    def say_why(self, state: RetryCallState) -> None:
        assert state.outcome is not None
        self._display.say(f"{self._archive.name}: {state.outcome.exception()}; trying again")

    def go_on(self, session: requests.Session) -> bool:
        """Ask once for what is lacking; whether all is there now.

        Raises:
            _CutOff: the request has brought the download no further than it was before.
            StorageError: the server has something else, refuses, or the disk is too small.
        """
        known = json.loads(self.record.read_text()) if self.record.exists() and self.part.exists() else {}
        have = self.part.stat().st_size if known else 0
        if have and have == known["size"]:
            return True
        self._furthest = max(self._furthest, have)
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if known["validator"]:
                headers["If-Range"] = known["validator"]
        size, reached, broken = None, 0, ""
        try:
            with session.get(self._archive.url, headers=headers, stream=True, timeout=TIMEOUTS_SECONDS) as answer:
                self._refuse(answer)
                start, size = _extent(answer, have)
                if start and known["size"] not in (None, size):
                    self._begin_anew("the file has changed meanwhile")
                self._check_size(start, size)
                if not start:
                    self.record.write_text(json.dumps({"validator": _validator(answer), "size": size}))
                with open(self.part, "r+b" if start else "wb") as file:
                    reached = file.seek(start)
                    for chunk in answer.iter_content(CHUNK_BYTES):
                        reached += file.write(chunk)
                        figures = f"{decimal(reached)} of {decimal(size)}" if size else decimal(reached)
                        self._display.update(reached, figures, total=size)
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            broken = _reason(error)
        if not broken and size in (None, reached):
            return True
        if reached <= self._furthest:
            raise _CutOff(broken or f"the server's answer ends after {reached:,} bytes")
        return False

    def _refuse(self, answer: requests.Response) -> None:
        said = f"the server answers {answer.status_code} {answer.reason}"
        if answer.status_code == 416:
            self._begin_anew(said)
        if answer.status_code in _PASSING:
            raise _CutOff(said)
        if answer.status_code not in (200, 206):
            raise requests.RequestException(said)

    def _begin_anew(self, reason: str) -> None:
        self.record.unlink(missing_ok=True)
        raise _CutOff(f"{reason}; beginning anew")

    def _check_size(self, start: int, size: int | None) -> None:
        meant = self._archive.size
        if size is None:
            return
        if meant not in (None, size):
            raise requests.RequestException(
                f"the server has {size:,} bytes, not the {meant:,} of the archive that is meant"
            )
        free = shutil.disk_usage(self.part.parent).free
        if size - start > free:
            raise StorageError(f"{self._archive.name} needs {decimal(size - start)} more, and {decimal(free)} are free")


def _extent(answer: requests.Response, have: int) -> tuple[int, int | None]:
    """Where the answer's bytes begin, and the size of the whole."""
    if answer.status_code != 206:
        length = answer.headers.get("Content-Length")
        return 0, int(length) if length is not None else None
    unit, _, extent = answer.headers.get("Content-Range", "").partition(" ")
    first, _, total = extent.partition("/")
    if unit != "bytes" or first.partition("-")[0] != str(have):
        raise requests.RequestException(f"the server answers a request from byte {have} with {unit} {extent}")
    return have, int(total) if total.isdecimal() else None


def _validator(answer: requests.Response) -> str | None:
    """What If-Range takes: a strong ETag, or else the date."""
    etag = answer.headers.get("ETag", "")
    return etag if etag.startswith('"') else answer.headers.get("Last-Modified")


def _reason(error: Exception) -> str:
    """The innermost reason of a chain of errors."""
    inner: BaseException = error
    while (next_inner := inner.__cause__ or inner.__context__) is not None:
        inner = next_inner
    return str(inner) or type(inner).__name__


def _check(path: Path, archive: Archive, display: ProgressDisplay) -> None:
    """Raise DataError unless the file is the archive that is meant, as far as that is known."""
    size = path.stat().st_size
    if archive.size is not None and size != archive.size:
        raise DataError(f"{path} has {size:,} bytes, not the {archive.size:,} of the archive that is meant: remove it")
    if archive.checksum is not None:
        display.update(size, "checking", total=size)
        algorithm, _, expected = archive.checksum.partition(":")
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
        if found != expected:
            raise DataError(f"{path} has the {algorithm} {found}, not {expected}: it is damaged or another archive")
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            raise DataError(f"{path} is no zip archive: it begins with {file.read(40)!r}")


def unpack(path: Path, folder: Path, only: str, display: ProgressDisplay) -> None:
    """Unpack the members that match ``only`` into ``folder``; those there at their full size are not written again.

    Each appears whole, under its name, once its CRC is right.

    Raises:
        DataError: a member is damaged, encrypted or a link, would land outside ``folder``, or over another file.
        StorageError: the disk is full.
    """
    with _zip_errors(path), zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if _is_wanted(member, only)]
        for member in members:
            _check_safe(member, path)
        needed = sum(member.file_size for member in members if not (folder / member.filename).exists())
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise StorageError(f"unpacking {path} needs {decimal(needed)}, and {folder} has {decimal(free)} free")
        for done, member in enumerate(members):
            display.update(done, f"unpacking {done:,} of {len(members):,} files", total=len(members))
            _unpack_member(archive, member, folder / member.filename)


def _is_wanted(member: zipfile.ZipInfo, only: str) -> bool:
    parts = PurePosixPath(member.filename).parts
    return not member.is_dir() and not set(parts) & set(_JUNK) and fnmatch.fnmatchcase(member.filename, only)


def _check_safe(member: zipfile.ZipInfo, path: Path) -> None:
    name = member.filename
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
        raise DataError(f"{path} has the member {name!r}, which would land outside the folder: nothing was unpacked")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise DataError(f"{path} has the link {name!r}: nothing was unpacked")
    if member.flag_bits & 1:
        raise DataError(f"{path} has the encrypted member {name!r}: nothing was unpacked")


def _unpack_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    if target.exists():
        if not target.is_file() or target.stat().st_size != member.file_size:
            raise DataError(f"{target} is there and is not the archive's {member.filename!r}: move it away")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.unpacking")
    try:
        with archive.open(member) as source, open(temporary, "wb") as file:
            shutil.copyfileobj(source, file, CHUNK_BYTES)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _zip_errors(path: Path) -> Generator[None]:
    try:
        yield
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise DataError(f"{path} is damaged ({error}): remove it and run the same command again") from error
