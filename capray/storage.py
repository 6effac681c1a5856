"""A URI becomes a filesystem and a path: local folders and S3 in one place.

Knows nothing of images, tables or jobs. Credentials and endpoints come from where the AWS tools take
them (environment, profile, instance role; ``AWS_ENDPOINT_URL`` for other S3 servers), never from settings.
"""

from __future__ import annotations

import asyncio
import errno
import fnmatch
import os
import re
import shutil
import stat
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import sync
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from capray.deadlines import now, within
from capray.errors import CaprayError, ConfigError, DataError, StorageError, StorageUnavailable, WriteUnanswered

T = TypeVar("T")
Result = TypeVar("Result")

S3_OPTIONS = {
    "use_listings_cache": False,
    "default_fill_cache": False,
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": 10,
        "max_pool_connections": 256,
        "retries": {"mode": "legacy", "total_max_attempts": 5},
    },
}
"""How S3 is spoken to. A request is tried five times, with waits of at most 1, 2, 4 and 8 seconds (aiohttp asks once more
each time, at once, where a connection was lost); in botocore's other modes a hundred failures at once use up what all
readers may retry."""

_S3_SCHEMES = ("s3", "s3a")

_S3FS_ATTEMPTS = 2
"""s3fs repeats what botocore has repeated, for answers that break off; five times, or 25 when reading, if left alone."""

EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
"""What S3 calls credentials that were good and are no longer."""

_AWAY = (errno.ENOTCONN, errno.ESTALE, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH)
"""What a mount says whose server is away."""

_BROKEN_OFF = {"HTTPClientError", "ConnectionError", "IncompleteReadError", "ClientPayloadError"}
"""Botocore's errors of connections, and of answers that did not arrive whole; the last is aiohttp's."""

PRIVATE = (".", "_")
"""What the names of hidden files and folders begin with, and in tables and shards those of private ones."""

_ESCAPED = re.compile(r"\\x([89a-f][0-9a-f]|5c)")
"""In the text of a path: a byte that is no UTF-8, or a backslash."""

_MAX_PUT_BYTES = 5 * 10**9
"""S3 takes no more in one PUT."""


@dataclass(frozen=True)
class Location:
    """A place in a filesystem: ``fs`` and the ``path`` inside it, and the ``uri`` that names both."""

    uri: str
    fs: Any
    path: str

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def join(self, *names: str) -> Location:
        tail = "/".join(names)
        return Location(f"{self.uri.rstrip('/')}/{tail}", self.fs, f"{self.path.rstrip('/')}/{tail}")


@dataclass(frozen=True)
class Entry:
    """One listed object: its URI (of a file the ``text_of`` its path), its path in the filesystem, its size in bytes, what
    tells it from other versions of it (``file_version``, ``object_version``), and when it was last written, in seconds since
    the epoch; 0 where that is not known."""

    uri: str
    path: str
    size: int
    version: str = ""
    modified: float = 0.0


Write = Callable[[Location, bytes], None]
"""Publishes bytes at a place: ``write_atomic``, or a wrapper that checks the lease first."""

Excludes = Callable[[str], bool]
"""Whether the folder at a path is left out with all in it."""


def locate(uri: str, as_written: bool = False) -> Location:
    """The filesystem and path of ``uri``: a local path, ``file://…``, ``s3://…`` or any fsspec URI.

    Args:
        as_written: whether to leave ``..`` in a local path to the system, and not to look for links now.

    Raises:
        StorageError: no installed filesystem serves the URI's scheme.
    """
    uri = os.fspath(uri)
    if "://" not in uri or uri.startswith("file://"):
        path = os.path.expanduser(uri.removeprefix("file://"))
        if not (as_written and os.path.isabs(path) and "/../" in path):
            path = _without_dots(path)
        return Location(path, fsspec.filesystem("file"), path)
    scheme = uri.split("://", 1)[0]
    try:
        fs = fsspec.filesystem(scheme, **(S3_OPTIONS if scheme in _S3_SCHEMES else {}))
    except Exception as error:  # Of some it wants more than the scheme: a host, an archive.
        raise StorageError(f"no filesystem for {uri!r}: {error}") from error
    if scheme not in _S3_SCHEMES:
        return Location(uri, fs, fs._strip_protocol(uri))
    fs.retries = _S3FS_ATTEMPTS
    return Location(uri, fs, uri.split("://", 1)[1])


def _without_dots(path: str) -> str:
    """The absolute ``path`` without ``..``, which behind a link means what it means to the system: the folder in which the
    link's target lies."""
    names = path.split("/")
    if ".." not in names:
        return os.path.abspath(path)
    here = "/" if os.path.isabs(path) else os.getcwd()
    for name in names:
        if name == ".." and os.path.islink(here):
            here = os.path.realpath(here)
        here = os.path.normpath(os.path.join(here, name))
    return here


def is_s3(location: Location) -> bool:
    return location.uri.split("://", 1)[0] in _S3_SCHEMES


def identity(location: Location) -> str:
    """The same text for the same place, whatever it was called."""
    if location.is_local:
        return os.path.realpath(location.path)
    return (f"s3://{location.path}" if is_s3(location) else location.uri).rstrip("/")


def is_within(inner: Location, outer: Location) -> bool:
    """Whether ``inner`` is ``outer`` or lies in it; links are followed."""
    return _is_below(identity(inner), identity(outer))


def _is_below(inner: str, outer: str) -> bool:
    """Whether the path ``inner`` is ``outer`` or goes on from it."""
    return f"{inner.rstrip('/')}/".startswith(f"{outer.rstrip('/')}/")


@contextmanager
def storage_errors(doing: str) -> Generator[None]:
    """Turn what the filesystems raise while ``doing`` something into a StorageError that says so; a StorageUnavailable
    where the same may work later."""
    try:
        yield
    except (CaprayError, KeyboardInterrupt):
        raise
    except FileNotFoundError as error:
        raise StorageError(f"{doing}: not found ({error})") from error
    except PermissionError as error:
        if s3_answer(error)[1] in EXPIRED_CODES:
            raise StorageUnavailable(f"{doing}: {error}: renew the credentials and run the same command again") from error
        raise StorageError(f"{doing}: permission denied ({error})") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"{doing}: no space left ({error.strerror}): make room and try again") from error
        raise _kind_of(error)(f"{doing}: {error}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("botocore", "aiobotocore", "s3fs", "aiohttp"):
            raise
        hint = "; set AWS credentials (environment, profile or role)" if "Credential" in type(error).__name__ else ""
        raise _kind_of(error)(f"{doing}: {error}{hint}") from error


def _kind_of(error: Exception) -> type[StorageError]:
    return StorageUnavailable if is_unanswered(error) else StorageError


@contextmanager
def write_errors(doing: str) -> Generator[None]:
    """As ``storage_errors``, with WriteUnanswered where nothing tells whether the write happened."""
    with storage_errors(doing):
        try:
            yield
        except Exception as error:
            if not is_unanswered(error):
                raise
            raise WriteUnanswered(f"{doing}: {error}; it may have happened or not") from error


def is_unanswered(error: Exception) -> bool:
    """Whether ``error`` is no refusal by the store: what botocore's retries ended with, or the deadline."""
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError) and error.errno in _AWAY:
        return True
    if _BROKEN_OFF & {base.__name__ for base in type(error).__mro__}:
        return True
    status = s3_answer(error)[0] or 0
    return status >= 500 and status != 501


def s3_answer(error: BaseException) -> tuple[int | None, str]:
    """The HTTP status and S3's code that botocore made ``error`` of, or s3fs of botocore's; None and "" of any other."""
    for each in (error, error.__cause__):
        if isinstance(answer := getattr(each, "response", None), dict):
            return answer.get("ResponseMetadata", {}).get("HTTPStatusCode"), answer.get("Error", {}).get("Code", "")
    return None, ""


def is_of_arrow(error: OSError) -> bool:
    """Whether pyarrow raised ``error``, about what it has read: no failure of storage."""
    return type(error) is OSError and error.errno is None


def file_version(about: os.stat_result) -> str:
    """Changes when a file is rewritten. Not its inode: those of FUSE and NFS differ by node."""
    return f"{about.st_size}-{about.st_mtime_ns}"


def object_version(etag: str | None, size: int) -> str:
    """Changes when an object is replaced. Without "+", which joins versions."""
    return f"{(etag or '').strip(chr(34)).replace('+', '%2B')}-{size}"


def entry_of(root: Location, path: str, info: dict[str, Any]) -> Entry:
    """The object at ``path`` of the filesystem of ``root``, as that filesystem's ``info`` has it."""
    size = info["size"] or 0
    if root.is_local:
        return _file_entry(path, os.stat(path))
    etag = next((str(info[name]) for name in ("ETag", "etag", "mtime", "LastModified") if info.get(name)), None)
    modified = getattr(info.get("LastModified"), "timestamp", float)()
    return Entry(uri_of(root, path), path, size, object_version(etag, size), modified)


def _file_entry(path: str, about: os.stat_result) -> Entry:
    return Entry(text_of(path), path, about.st_size, file_version(about), about.st_mtime)


def uri_of(root: Location, path: str) -> str:
    """The URI of what is at ``path`` of the filesystem of ``root``, as ids and tables hold it."""
    return text_of(path) if root.is_local else f"{root.uri.split('://', 1)[0]}://{path}"


def excludes_nothing(path: str) -> bool:
    """Leaves no folder out."""
    return False


def iter_files(
    root: Location,
    denied: list[str] | None = None,
    prefixes: tuple[str, ...] = (".",),
    excludes: Excludes = excludes_nothing,
) -> Iterator[Entry]:
    """Every file below ``root``, in the order the store lists them; see ``walk``, by which a local folder is listed, for the
    other arguments.

    Raises:
        StorageError: the store cannot be reached or refuses the listing.
    """
    with storage_errors(f"listing {root.uri}"):
        if root.is_local:
            for folder, names in walk(root.path, denied, prefixes, excludes):
                for name in names:
                    path = os.path.join(folder, name)
                    if (about := _about(path, denied)) is not None:
                        yield _file_entry(path, about)
            return
        if hasattr(root.fs, "call_s3"):
            yield from _iter_s3(root)
            return
        for path, info in root.fs.find(root.path.rstrip("/") + "/", detail=True).items():
            yield entry_of(root, path, info)


def glob_files(place: Location, denied: list[str] | None = None, excludes: Excludes = excludes_nothing) -> Iterator[Entry]:
    """The files that match the glob ``place``. On a file system links are followed, as ``iter_files`` does, and one to
    nowhere is a file, too; folders on the way that cannot be listed are added to ``denied``.

    Raises:
        ConfigError: it is no pattern that the store knows.
        StorageError: the store cannot be reached or refuses the listing.
    """
    with storage_errors(f"listing {place.uri}"):
        if place.is_local:
            _, *names = place.path.split("/")
            for path in _matches("/", names, denied, excludes):
                about = _about(path, denied)
                if about is not None and not stat.S_ISDIR(about.st_mode):
                    yield _file_entry(path, about)
            return
        try:
            found = place.fs.glob(place.path, detail=True)
        except ValueError as error:
            raise ConfigError(f"{place.uri!r}: {error}") from error
        for path, info in sorted(found.items()):
            if info["type"] == "file":
                yield entry_of(place, path, info)


def _about(path: str, denied: list[str] | None) -> os.stat_result | None:
    """What is at ``path``, of a link to nowhere the link; None when it is gone, or is added to ``denied``."""
    try:
        return stat_of(path) or lstat_of(path)
    except OSError:
        if denied is None:
            raise
        denied.append(path)
        return None


def _matches(folder: str, patterns: list[str], denied: list[str] | None, excludes: Excludes) -> Iterator[str]:
    """The paths below ``folder`` whose names match ``patterns`` one by one; ``**`` stands for any number of folders."""
    pattern, *rest = patterns
    if pattern == "**":
        try:
            matches = re.compile(glob_translate("/".join(patterns if rest else ["**", "*"]))).match
        except ValueError as error:
            raise ConfigError(f"{'/'.join(patterns)!r}: {error}") from error
        try:
            for inside, names in walk(folder, denied, PRIVATE, excludes):
                relative = inside[len(folder.rstrip("/")) + 1 :]
                for path, name in ((os.path.join(inside, name), name) for name in names):
                    if matches(f"{relative}/{name}" if relative else name):
                        yield path
                    elif denied is not None and leads_nowhere(path):
                        denied.append(path)  # To a folder that is away, perhaps.
        except OSError as error:
            if denied is None or error.filename != folder:
                raise
            denied.append(folder)
        return
    if any(sign in pattern for sign in "*?["):
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            if denied is None:
                raise
            denied.append(str(error.filename))
            return
        names = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    else:
        names = [pattern]
    for path in (os.path.join(folder, name) for name in names):
        try:
            about = stat_of(path)
        except OSError:
            if denied is None:
                raise
            denied.append(path)
            continue
        if not rest:
            yield from () if about is None and _is_gone(path) else (path,)
        elif about is not None and stat.S_ISDIR(about.st_mode):
            yield from _matches(path, rest, denied, excludes)
        elif about is None and denied is not None and not _is_gone(path):
            denied.append(path)  # A link to a folder that is away, perhaps.


def _iter_s3(root: Location) -> Iterator[Entry]:
    """Page by page, so that whoever needs a few names does not wait for all."""
    bucket, _, key = root.path.rstrip("/").partition("/")
    for objects, _ in s3_pages(root.fs, Bucket=bucket, Prefix=f"{key}/" if key else ""):
        for entry in objects:
            path = f"{bucket}/{entry['Key']}"
            yield entry_of(root, path, {**entry, "size": entry["Size"]})


def s3_pages(fs: Any, **arguments: str) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
    """The pages of S3's ``ListObjectsV2`` with these arguments: its objects, the markers of folders left out, and its
    common prefixes."""
    while True:
        answer = fs.call_s3("list_objects_v2", **arguments)
        if not answer.keys() & {"IsTruncated", "Name", "KeyCount", "Contents"}:  # Without a body; botocore would take it.
            raise StorageUnavailable(f"an empty answer to listing {arguments['Bucket']!r} below {arguments['Prefix']!r}")
        objects = [entry for entry in answer.get("Contents", ()) if entry["Size"] or not entry["Key"].endswith("/")]
        yield objects, [entry["Prefix"] for entry in answer.get("CommonPrefixes", ())]
        if not answer.get("IsTruncated"):
            return
        arguments["ContinuationToken"] = answer["NextContinuationToken"]


def walk(
    root: str, denied: list[str] | None = None, prefixes: tuple[str, ...] = (".",), excludes: Excludes = excludes_nothing
) -> Iterator[tuple[str, list[str]]]:
    """The folders from ``root`` down in the order of their names, with the names of the files in it, sorted.

    Links to folders are followed, but for those with a hidden name (one that begins with one of ``prefixes``) and those to
    what is in ``root`` anyway; where several lead comes once. A folder below ``root`` that cannot be listed is added to
    ``denied``; without that, OSError. One that was removed is left out, and so is what ``excludes`` names, which makes no
    other name of it one too many.
    """
    above, whole = root.rstrip("/"), os.path.realpath(root)
    seen: set[tuple[str, bool]] = set()

    def is_left_out(path: str) -> bool:
        return excludes(path) or _is_listed_elsewhere(path, whole, prefixes, lambda below: excludes(above + below))

    def note(error: OSError) -> None:
        if error.filename != root and was_removed(error.filename, root):
            return
        if denied is None or error.filename == root:
            raise error
        denied.append(error.filename)

    for folder, folders, names in os.walk(root, onerror=note, followlinks=True):
        # By links alone two folders are one: bind mounts have names of their own, and numbers of inodes tell nothing on NFS.
        if (real := os.path.realpath(folder)) != whole.rstrip("/") + folder[len(above) :]:
            key = real, _is_hidden_below(folder, root, prefixes)
            if key in seen:
                folders.clear()
                continue
            seen.add(key)
        folders[:] = sorted(name for name in folders if not is_left_out(os.path.join(folder, name)))
        yield folder, sorted(names)


_GONE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR)


def was_removed(path: str, root: str) -> bool:
    """Whether ``path`` is gone from below ``root``, where something is left: of a mount that is away nothing would be."""
    if not _is_gone(path):
        return False
    while _is_gone(path) and path != root:
        path = os.path.dirname(path)
    return os.path.isdir(path) and bool(os.listdir(path))


def leads_nowhere(path: str) -> bool:
    """Whether ``path`` is a link to what is not there, or does not answer."""
    return os.path.islink(path) and not os.path.exists(path)


def _is_gone(path: str) -> bool:
    """Whether nothing is at ``path``: what does not answer, or may not be asked, is there. So is what is too deep to be
    asked for by its path."""
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno in _GONE
    return False


def _is_listed_elsewhere(path: str, root: str, prefixes: tuple[str, ...], excludes_below: Excludes) -> bool:
    """Whether ``path`` is a link to a folder that a listing of ``root`` has under another name, or with a hidden name.
    ``excludes_below`` is given what goes on from ``root``."""
    if not os.path.islink(path):
        return False
    target = os.path.realpath(path)
    if os.path.basename(path).startswith(prefixes) or _is_below(root, target):
        return True
    is_listed = _is_below(target, root) and not _is_hidden_below(target, root, prefixes)
    return is_listed and not excludes_below(target[len(root.rstrip("/")) :])


def _is_hidden_below(path: str, root: str, prefixes: tuple[str, ...]) -> bool:
    """Whether ``path``, which goes on from ``root``, has a hidden name on the way."""
    return any(f"/{prefix}" in path[len(root.rstrip("/")) :] for prefix in prefixes)


def text_of(path: str) -> str:
    """A local path as text that ids and tables can hold: bytes that are no UTF-8 are written ``\\xNN``. So are backslashes
    in a path that has such bytes, or what looks like one written so: no two paths have one text."""
    encoded = path.encode("utf-8", "surrogateescape")
    text = encoded.decode("utf-8", "backslashreplace")
    if text == path and not _ESCAPED.search(path):
        return path
    return encoded.replace(b"\\", rb"\x5c").decode("utf-8", "backslashreplace")


def path_of(text: str) -> str:
    """The path whose ``text_of`` is ``text``, or ``text`` itself if there is nothing at that path."""
    path = _ESCAPED.sub(lambda byte: "\\" if byte[1] == "5c" else chr(0xDC00 + int(byte[1], 16)), text)
    return path if path != text and os.path.lexists(path) else text


def stat_of(path: str) -> os.stat_result | None:
    """None for what is not there, a link to nowhere or to itself; OSError for what does not answer."""
    return _asked(os.stat, path)


def lstat_of(path: str) -> os.stat_result | None:
    """As ``stat_of``, but of a link itself."""
    return _asked(os.lstat, path)


def _asked(ask: Callable[[str], os.stat_result], path: str) -> os.stat_result | None:
    try:
        return ask(path)
    except OSError as error:
        if error.errno in (*_GONE, errno.ENAMETOOLONG):
            return None
        raise


def is_there(place: Location) -> bool:
    """Whether something is at a local ``place``.

    Raises:
        StorageError: it may not be asked; StorageUnavailable: it does not answer.
    """
    with storage_errors(f"looking at {place.uri}"):
        return stat_of(place.path) is not None


def list_names(folder: Location, suffix: str = "", folders: bool = False) -> list[str]:
    """Names of the files, and with ``folders`` folders, directly in ``folder`` that end in ``suffix``, sorted; [] when
    there is no such folder."""
    with storage_errors(f"listing {folder.uri}"):
        folder.fs.invalidate_cache()
        try:
            infos = folder.fs.ls(folder.path, detail=True)
        except FileNotFoundError:
            return []
    shown = (info for info in infos if folders or info["type"] == "file" or _is_link_to_file(info))
    names = (info["name"].rstrip("/").rsplit("/", 1)[-1] for info in shown)
    return sorted(name for name in names if name.endswith(suffix))


def _is_link_to_file(info: dict[str, Any]) -> bool:
    return bool(info.get("islink")) and os.path.isfile(info["name"])


def exists(location: Location) -> bool:
    with storage_errors(f"looking for {location.uri}"):
        location.fs.invalidate_cache()
        return location.fs.exists(location.path)


def is_folder(location: Location) -> bool:
    with storage_errors(f"looking at {location.uri}"):
        location.fs.invalidate_cache()
        return location.fs.isdir(location.path)


def check_empty(output: str) -> None:
    """Raise ConfigError when ``output`` already holds something."""
    folder = locate(output)
    if is_folder(folder) and (names := list_names(folder, folders=True)):
        raise ConfigError(f"{output!r} is not empty (it holds {names[0]!r}): choose a new folder or empty it")


def is_file(location: Location) -> bool:
    with storage_errors(f"looking at {location.uri}"):
        location.fs.invalidate_cache()
        if location.is_local:
            return location.fs.isfile(location.path)
        try:
            return location.fs.info(location.path)["type"] == "file"
        except Exception as error:
            if is_unanswered(error):
                raise
            return False


def open_file(location: Location) -> Any:
    """The file at ``location``, uncached, for pyarrow, which by itself takes every error of a store's for a missing file."""
    return location.fs.open(location.path, "rb", cache_type="none")


def read_bytes(location: Location) -> bytes:
    with storage_errors(f"reading {location.uri}"):
        # In one request, unlike s3fs's parallel ranges: an object that is replaced meanwhile must not come in two halves.
        options = {"max_concurrency": 1} if is_s3(location) else {}
        return location.fs.cat_file(location.path, **options)


def read_ahead(
    read: Callable[[T], Result], items: Iterable[T], num_threads: int, most_ahead: int | None = None
) -> Generator[Result]:
    """What ``read`` gives for each of ``items``, in their order; so many are read at once, and no more than ``most_ahead``
    (as many as there are threads, when not given) before they are asked for."""
    ahead: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(num_threads, "read")
    try:
        for item in items:
            ahead.append(pool.submit(read, item))
            if len(ahead) >= (most_ahead or num_threads):
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def write_atomic(
    location: Location,
    data: bytes,
    scratch: Location | None = None,
    deadline: float | None = None,
    beside: Location | None = None,
) -> None:
    """Publish ``data`` under ``location`` in one step: a reader sees the old bytes or the new, never a part.

    Locally a file is written in ``scratch`` (the target's own folder when not given; it must be on the same
    file system), synced and renamed, and the folder synced; on an object store it is a single PUT.

    With a ``deadline`` (of ``deadlines.now``) it ends by then, all retries included. Nothing is sent or renamed later, but
    for one thing that no client can call back: a PUT that S3 has already, or a rename that hangs in the system.

    Folders are made, but neither ``beside`` nor those it lies in; an object store has none.

    Raises:
        WriteUnanswered: it is not known whether it happened.
        StorageError: the store refused it.
    """
    with write_errors(f"writing {location.uri}"):
        if is_s3(location):
            _put(location, data, deadline)
        elif location.is_local:
            folder = scratch.path if scratch else os.path.dirname(location.path)
            there = beside.path if beside else None
            within(_until(deadline), lambda: _replace_file(location.path, data, folder, deadline, there))
        else:
            within(_until(deadline), lambda: location.fs.pipe_file(location.path, data))


def _until(deadline: float | None) -> float | None:
    """The seconds until ``deadline``, none after it."""
    return None if deadline is None else max(0.0, deadline - now())


def _put(location: Location, data: bytes, deadline: float | None) -> None:
    fs = location.fs

    async def put() -> None:
        # A process that wakes up after the deadline is cancelled here before it sends again.
        async with asyncio.timeout(_until(deadline)):
            await fs._pipe_file(location.path, data, chunksize=_MAX_PUT_BYTES // 2)

    try:
        sync(fs.loop, put)
    except FSTimeoutError as error:
        raise TimeoutError(str(error.__cause__ or "") or "no answer in time") from error


def _make_folders(folder: str, beside: str | None) -> None:
    """Make ``folder`` and those it lies in, but neither ``beside`` nor those that lies in."""
    if os.path.isdir(folder):
        return
    if beside is None:
        os.makedirs(folder, exist_ok=True)
        return
    if _is_below(beside, folder):
        raise FileNotFoundError(f"{beside} is gone: was it moved or removed?")
    _make_folders(os.path.dirname(folder), beside)
    with suppress(FileExistsError):
        os.mkdir(folder)


def _replace_file(path: str, data: bytes, scratch: str, deadline: float | None, beside: str | None) -> None:
    folder = os.path.dirname(path)
    for each in (scratch, folder):
        _make_folders(each, beside)
    temporary = os.path.join(scratch, f".{os.path.basename(path)}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if deadline is not None and now() >= deadline:
            raise TimeoutError("the file system took too long")
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(location: Location, file: str) -> None:
    """Publish the local ``file``, which may be larger than memory, under ``location`` in one step."""
    with storage_errors(f"writing {location.uri}"):
        if not location.is_local:
            location.fs.put_file(file, location.path)
            return
        os.makedirs(os.path.dirname(location.path), exist_ok=True)
        temporary = f"{location.path}.{uuid.uuid4().hex}"
        try:
            shutil.copyfile(file, temporary)
            os.replace(temporary, location.path)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise


def is_glob(location: Location) -> bool:
    """Whether the path is a pattern, and not a file or folder whose name looks like one."""
    return any(sign in location.path for sign in "*?[") and not exists(location)


def glob_names(place: Location, path: str) -> bool:
    """Whether a file at ``path`` of the store would match the glob ``place``."""
    return re.fullmatch(glob_translate(place.path), path) is not None


def file_above(place: Location) -> str | None:
    """The file on the way to a local ``place``, which nothing can be below, or at it; None if there is none."""
    path = place.path
    while place.is_local and not os.path.lexists(path):
        path = os.path.dirname(path)
    return path if place.is_local and not os.path.isdir(path) else None


def find_parquet(uri: str) -> list[Entry]:
    """The Parquet files ``uri`` names: one file, a glob, or every ``*.parquet`` of a folder (but not of its private
    folders, whose names begin with ``_``).

    Raises:
        DataError: there is none.
        StorageError: the store cannot be reached, or a local folder is missing.
    """
    root = locate(uri)
    if is_glob(root):
        entries = [entry for entry in glob_files(root) if entry.path.endswith(".parquet")]
    elif is_file(root):
        entries = [Entry(uri_of(root, root.path), root.path, root.fs.size(root.path))]
    else:
        entries = [entry for entry in iter_files(root, prefixes=PRIVATE) if entry.path.endswith(".parquet")]
        entries = [entry for entry in entries if "/_" not in entry.path[len(root.path.rstrip("/")) :]]
    if not entries:
        raise DataError(f"no Parquet files at {uri!r}")
    return entries
