"""What every kind of input has in common: a source yields, page by page, where its images are (rows of places, see
``places``); ``reader`` fetches their bytes later.

A source knows nothing of what was already captioned. Image ids are exact: the URI as the store has it, or the chosen column,
without decoding or normalisation.
"""

from __future__ import annotations

import fnmatch
import gzip
import posixpath
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa

from capray.config import SourceSettings, flag_of
from capray.errors import ConfigError, DataError, StorageError, StorageUnavailable, TryAgain
from capray.images import ImageError
from capray.inputs.places import PLACES, Kind, Row
from capray.inputs.versions import VersionChanged
from capray.inputs.witnesses import OR_RELIST, WAS_A_MOUNT, Known, is_mount, mounts_of, real_folder
from capray.storage import PRIVATE, Entry, Location, is_glob, is_of_arrow, path_of, storage_errors, text_of

MAX_FOLDERS = 1000
"""Folders named by the lists of an input whose mounts are noted."""
ROWS_PER_PAGE = 100_000


class ContainerChanged(TryAgain):
    """A table, manifest, inventory or tar has changed since its listing began."""

    def __init__(self, unit: str):
        super().__init__(unit)
        self.unit = unit

    def __str__(self) -> str:
        return f"{self.unit!r} changed while it was read"


@dataclass(frozen=True)
class Found:
    """The bytes of the image at ``row``, read as it was listed."""

    row: Row
    data: bytes


@dataclass(frozen=True)
class Failed:
    """Why there are no bytes of the image at ``row``."""

    row: Row
    error: ImageError


@dataclass(frozen=True)
class Changed:
    """A container is not what was listed: it has to be listed again."""

    input: int
    container: str


@dataclass(frozen=True)
class TarMembers:
    """The wanted images (MEMBERS rows) of a tar that was read to its end, and which version of it that was."""

    input: int
    container: str
    version: str
    members: pa.Table


@dataclass(frozen=True)
class TarUnreadable:
    """A tar that cannot be read as one."""

    input: int
    container: str
    message: str


@dataclass(frozen=True)
class LeftOut:
    """How many files of a tar that was read to its end are no images of it, and the name of one.

    Attributes:
        reason: one of LEFT_OUT.
    """

    input: int
    container: str
    reason: str
    number: int
    example: str


LEFT_OUT = {
    "no_image": "without an image's name, and not beginning like an image",
    "unnamed": "not named by the Parquet sidecar beside the tar",
}
"""Why files of tars are left out, in words for the user."""

Event = Changed | TarMembers | TarUnreadable | LeftOut
"""What was found out about a container while it was read."""


@dataclass(frozen=True)
class Page:
    """Some rows of a unit, in its order.

    Attributes:
        rows: PLACES columns, less ``position`` and ``input``; columns may be missing.
        after: what ``Source.pages`` takes to go on behind this page.
        found: further units that turned up.
        hidden: files left out because of their names.
        version: of the unit as this page was read; "" of a unit that has none.
    """

    rows: pa.Table
    after: Any = None
    found: tuple[str, ...] = ()
    hidden: int = 0
    version: str = ""


@dataclass(frozen=True)
class Selection:
    """The images of an input that are wanted: by glob, and by shard."""

    root: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    shard: tuple[int, int] | None = None
    _patterns: dict[str, re.Pattern[str]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, settings: SourceSettings, root: str) -> Selection:
        shard = None
        if settings.shard is not None:
            part, parts = settings.shard.split("/")
            shard = int(part), int(parts)
        return cls(root.rstrip("/") + "/", settings.include, settings.exclude, shard)

    def has(self, image_id: str) -> bool:
        """Whether the globs want ``image_id``."""
        name = image_id.removeprefix(self.root)
        if self.include and not any(self._matches(glob, name) for glob in self.include):
            return False
        return not self.excludes(image_id)

    def excludes(self, name: str) -> bool:
        """Whether the globs name it, or a folder that it lies in."""
        name = name.removeprefix(self.root)
        return any(self._matches(part, name) for glob in self.exclude for part in (glob, f"{glob.rstrip('/')}/*"))

    def excludes_folder(self, name: str) -> bool:
        """Whether the globs name the folder itself, or all in it."""
        return self.excludes(name) or self.excludes(f"{name}/")

    def leaves_out(self, folder: str) -> bool:
        """Whether no image can be wanted whose id is its URI and begins with ``folder``."""
        inside = f"{folder.removeprefix(self.root)}/"
        begins = [re.split(r"[*?[]", glob, maxsplit=1)[0] for glob in self.include]
        is_elsewhere = self.include and not any(begin.startswith(inside) or inside.startswith(begin) for begin in begins)
        return bool(is_elsewhere) or self.excludes_folder(folder)

    def in_shard(self, key: str) -> bool:
        """Whether ``key`` falls to this shard, by CRC-32 of its UTF-8."""
        if self.shard is None:
            return True
        part, parts = self.shard
        return zlib.crc32(key.encode()) % parts == part - 1

    def filter(self, rows: pa.Table) -> pa.Table:
        """The rows that are wanted; a tar whose members are not known yet is judged by its own name."""
        if not (self.include or self.exclude or self.shard):
            return rows
        containers = rows["container"].to_pylist() if "container" in rows.column_names else [None] * rows.num_rows
        keep = []
        for image_id, kind, container in zip(
            rows["image_id"].to_pylist(), rows["kind"].to_pylist(), containers, strict=True
        ):
            is_of_tar = kind in ("tar", "member", "name")
            globbed = not (is_of_tar and self.excludes(container)) and (kind == "tar" or self.has(image_id))
            keep.append(globbed and self.in_shard(container if is_of_tar else image_id))
        return rows.filter(pa.array(keep, pa.bool_()))

    def _matches(self, glob: str, name: str) -> bool:
        if glob not in self._patterns:
            self._patterns[glob] = re.compile(fnmatch.translate(glob))
        return self._patterns[glob].match(name) is not None


@dataclass(frozen=True)
class InputReading:
    """What reading the images of an input needs to know of it.

    Attributes:
        known: what tells whether its file system is there.
    """

    selection: Selection
    id_column: str | None = None
    image_column: str | None = None
    known: Known = field(default_factory=Known)


class Source(ABC):
    """An input, opened.

    Args:
        place: where it is.
        settings: what of it is wanted and which columns are what.
        keep: columns to carry along.
    """

    kind: ClassVar[str]
    hidden_prefixes: ClassVar[tuple[str, ...]] = PRIVATE
    """Files below a name that begins with one of these are left out, and counted."""

    def __init__(self, place: Location, settings: SourceSettings, keep: tuple[str, ...] = ()):
        self.place, self.settings, self.keep = place, settings, keep
        self.selection = Selection.of(settings, root_of(place))
        self.source_type: pa.DataType | None = None
        """The type of the carried columns."""
        self.image_column: str | None = None
        """The column that holds the images, of a Parquet source that does."""
        self.id_column: str | None = None
        """The column of the ids beside ``image_column``."""
        self.witnesses: tuple[str, ...] = ()
        self.mounts: set[str] = set()
        """What threads add to while they list; see Known."""

    @property
    def read_as(self) -> list[str | None]:
        """What a stored listing of this input depends on besides the settings."""
        return [self.kind, self.id_column, self.image_column]

    @property
    def reading(self) -> InputReading:
        """What a Reader needs to know."""
        return InputReading(self.selection, self.id_column, self.image_column, self.known)

    @property
    def known(self) -> Known:
        """What tells, of an input on a file system, whether that is away."""
        return Known(self.witnesses, self.selection.root, tuple(sorted(self.mounts)))

    def note_folders(self, folders: Iterable[str], points: set[str] | None = None, named: bool = False) -> None:
        """Note which mounts ``folders`` of the input are on, and those below it, but for what is hidden or excluded;
        ``points`` are the mounts of the machine when these were looked at. Folders that are ``named``, by a list, are wanted
        whatever they are called."""
        shown = [folder for folder in folders if named or not self._leaves_out(folder)]
        self.mounts.update(mounts_of(self.selection.root, shown, self._leaves_out, points))

    def remember_mounts(self, points: Iterable[str]) -> None:
        """What was a mount when the input was listed before is to be one still, unless it is hidden or excluded by now, as
        what lists name cannot be."""
        above, real = f"{self.selection.root.rstrip('/')}/", real_folder(self.selection.root)
        for point in points:
            name = above + point.removeprefix(real) if point.startswith(real) else point
            if lists_uris(self) or not self._leaves_out(name):
                self.mounts.add(point)

    def _leaves_out(self, folder: str) -> bool:
        """Whether ``folder`` lies in the input, and is hidden or excluded."""
        below = folder.removeprefix(self.selection.root)
        is_below = below != folder
        return is_below and (is_hidden(below, self.hidden_prefixes) or self.selection.excludes_folder(text_of(folder)))

    def check_mounts(self) -> None:
        """What was listed from a folder whose mount is away is not all of it.

        Raises:
            StorageUnavailable: a mount of the input is none any more.
        """
        if away := next((point for point in sorted(self.mounts) if not is_mount(point)), None):
            raise StorageUnavailable(f"{WAS_A_MOUNT.format(away)}: mount it and run the same command again {OR_RELIST}")

    def versions(self) -> dict[str, str]:
        """Of units that are containers, the version of each when the source was opened."""
        return {}

    def modified(self) -> dict[str, float]:
        """Of units that are containers, when each was last written, in seconds since the epoch; 0 where that is not
        known."""
        return {}

    @abstractmethod
    def units(self) -> list[str]:
        """The units known at the start; each can be listed independently."""

    def name_of(self, unit: str) -> str:
        """``unit`` in words for the user."""
        return unit

    @abstractmethod
    def pages(self, unit: str, after: Any = None) -> Iterator[Page]:
        """The pages of a unit as it is now, from the start or behind the page that gave ``after``.

        Raises:
            DataError: a file that cannot be read as what it is, or is gone.
            ContainerChanged: it changes meanwhile, or is not what gave ``after``.
            StorageError: the store cannot be reached or refuses.
        """

    def refuse(self, *names: str) -> None:
        """Raise ConfigError when one of the settings ``names``, which mean nothing here, is given."""
        for name in names:
            value = self.keep if name == "keep" else getattr(self.settings, name)
            if value:
                raise ConfigError(
                    f"{flag_of(name)} {value!r} does not apply to {self.place.uri!r}, which is {_KINDS[self.kind]}"
                )


def root_of(place: Location) -> str:
    """The URI of the folder that the names of an input's images begin with: of a glob, that before the first wildcard."""
    return posixpath.dirname(re.split(r"[*?[]", place.uri)[0]) if is_glob(place) else place.uri


def lists_uris(source: Source) -> bool:
    """Whether ``source`` is lists or tables of URIs."""
    return source.kind in ("manifest", "parquet") and source.image_column is None


def may_have_other_ids(source: Source) -> bool:
    """Whether images of ``source`` may have other ids than their URIs: those of lists and tables of URIs, and with a column
    of ids."""
    return lists_uris(source) or (source.image_column is None and bool(source.settings.id_column))


class Containers(Source):
    """A source whose units are files that hold or name images; a unit's name is its file's URI."""

    def __init__(
        self, place: Location, settings: SourceSettings, keep: tuple[str, ...], files: list[Entry], hidden: int = 0
    ):
        super().__init__(place, settings, keep)
        self.files, self._hidden = files, hidden
        self._folders: set[str] = set()
        if place.is_local:
            self.note_folders({posixpath.dirname(entry.path) for entry in files})

    def note_listed(self, uris: Iterable[str | None]) -> None:
        """Note which mounts the first MAX_FOLDERS folders that lists name are on."""
        if len(self._folders) >= MAX_FOLDERS:
            return
        paths = (uri.removeprefix("file://") for uri in uris if uri)
        folders = {path.rpartition("/")[0] for path in paths if path.startswith("/")} - self._folders
        folders = set(sorted(folders)[: MAX_FOLDERS - len(self._folders)])
        if folders:
            self._folders |= folders
            self.note_folders(map(path_of, folders), named=True)

    def units(self) -> list[str]:
        return [entry.uri for entry in self.files]

    def versions(self) -> dict[str, str]:
        return {entry.uri: entry.version for entry in self.files}

    def modified(self) -> dict[str, float]:
        return {entry.uri: entry.modified for entry in self.files}

    def pages(self, unit: str, after: Any = None) -> Iterator[Page]:
        wanted, behind = after or ("", None)
        hidden = self._hidden if self.files and unit == self.files[0].uri and after is None else 0
        with reading_errors(unit):
            for rows, version, done in self._list(unit, wanted, behind):
                yield Page(rows, [version, done], (), hidden, version)
                hidden = 0

    @abstractmethod
    def _list(self, unit: str, wanted: str, behind: Any) -> Iterator[tuple[pa.Table, str, Any]]:
        """Rows of the unit, its version, and what the rows that follow are ``behind``. Raises VersionChanged when the
        version is not the ``wanted`` one, if one is."""


@contextmanager
def reading_errors(unit: str, file: str | None = None) -> Generator[None]:
    """Turn what reading the container ``unit``, or a ``file`` that belongs to it, raises into the errors of
    ``Source.pages``."""
    with storage_errors(f"reading {file or unit}"):
        try:
            yield
        except VersionChanged as error:
            raise ContainerChanged(unit) from error
        except ImageError as error:
            kind = DataError if error.kind == "missing" else StorageError
            raise kind(f"reading {error.message}") from error
        except (pa.ArrowException, gzip.BadGzipFile, zlib.error, EOFError, UnicodeError) as error:
            raise DataError(f"{(file or unit)!r}: {error}") from error
        except OSError as error:
            if not is_of_arrow(error):
                raise
            raise DataError(f"{(file or unit)!r}: {error}") from error
        except (KeyError, RecursionError, TypeError) as error:
            raise DataError(f"{(file or unit)!r}: {type(error).__name__}: {error}") from error


_KINDS = {
    "images": "a place of image files",
    "parquet": "Parquet",
    "tar": "tar shards",
    "manifest": "a manifest of URIs",
    "inventory": "an S3 Inventory",
}


def rows_of(kind: Kind, columns: dict[str, Any], **same: Any) -> pa.Table:
    """Rows of places: columns by name, lists or arrays, in PLACES' types (``source`` as it is), and values all rows have."""
    number = len(columns["image_id"])
    same = {"kind": kind, **same}
    return pa.table(
        {name: pa.repeat(pa.scalar(value, PLACES.field(name).type), number) for name, value in same.items()}
        | {
            name: values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values, PLACES.field(name).type)
            for name, values in columns.items()
        }
    )


def is_hidden(relative: str, prefixes: tuple[str, ...]) -> bool:
    return any(part.startswith(prefixes) for part in relative.strip("/").split("/"))
