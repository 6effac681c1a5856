"""Tar shards, as WebDataset and img2dataset lay them out: plain tars, perhaps each with a Parquet sidecar beside it.

With a sidecar the images are known without reading the tar; without one its members become known when it is read.
"""

from __future__ import annotations

import io
import posixpath
import re
import tarfile
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa

from capray.config import SourceSettings
from capray.errors import DataError
from capray.images import begins_like_image, ends_like_image
from capray.inputs.base import Containers, reading_errors, rows_of
from capray.inputs.byte_reader import CHUNK_BYTES, Stream
from capray.inputs.parquet import _choose, _require, _struct, first_schema, opened_parquet
from capray.inputs.versions import check_version, container_at
from capray.storage import Entry, Location, text_of
from capray.wording import counted

BEHIND_TAR = re.compile(r"(?<=\.tar)#", re.IGNORECASE)
"""Where the URI of a tar's member names the member."""
HEADER_BYTES = 16 * 2**10
"""As many bytes hold the header of any member, its long name included."""
_MAX_PADDING = 2**16
"""Zeros behind the last member: two blocks, up to the end of a record of 10 KiB, or of one of up to 128 blocks."""
_PEEK_BYTES = 4096
_OPTIONS: Any = {"mode": "r:", "encoding": "utf-8", "errors": "surrogateescape"}
_BESIDE = re.compile(
    r"\.(?:jsonl?|te?xt|csv|tsv|xml|html|md|ya?ml|url|captions?|transcript|cls2?|class|count|index|inx|id|np[yz]|pth?|pyd|pkl|"
    r"pickle|ten|tb|mp|msg|msgpack|cbor|parquet)$",
    re.IGNORECASE,
)
"""Endings of what WebDataset and its like lay beside an image, or tell of all."""


class Tars(Containers):
    kind = "tar"

    def __init__(
        self,
        place: Location,
        settings: SourceSettings,
        keep: tuple[str, ...],
        files: list[Entry],
        sidecars: dict[str, Entry],
        hidden: int = 0,
        alone: Iterable[Entry] = (),
    ):
        super().__init__(place, settings, keep, files, hidden)
        self.refuse("split", "image_column", "uri_column")
        self._sidecars = sidecars
        self._alone = {entry.uri: entry for entry in alone if not self.selection.excludes(entry.uri)}
        self._as_opened = {entry.uri: entry for entry in files}
        without = [entry.uri for entry in files if entry.uri not in sidecars]
        if without:
            if keep or settings.id_column:
                raise DataError(
                    f"{without[0]!r} has no Parquet sidecar (img2dataset writes one), which --keep and --id-column need"
                )
        elif files:
            first, schema = first_schema([sidecars[entry.uri] for entry in files])
            for name in (*keep, *filter(None, (settings.id_column,)), "key"):
                _require(name, schema.names, first)
            if keep:
                self.source_type = pa.struct([pa.field(name, schema.field(name).type) for name in keep])

    def units(self) -> list[str]:
        return [*super().units(), *self._alone]

    def versions(self) -> dict[str, str]:
        beside = {uri: f"+{sidecar.version}" for uri, sidecar in self._sidecars.items()}
        return {entry.uri: entry.version + beside.get(entry.uri, "") for entry in (*self.files, *self._alone.values())}

    def modified(self) -> dict[str, float]:
        beside = {uri: sidecar.modified for uri, sidecar in self._sidecars.items()}
        return {entry.uri: max(entry.modified, beside.get(entry.uri, 0.0)) for entry in self.files}

    def _list(self, unit: str, wanted: str, behind: bool | None) -> Iterator[tuple[pa.Table, str, bool]]:
        """One page. A unit's version is the tar's and its sidecar's, and so is its rows', with the ending of the sidecar's
        name."""
        if behind:
            return
        if unit in self._alone:
            raise DataError(
                f"{unit!r} lies among tars and has none beside it: that tar is lost, or this is a table of its own, to be "
                "captioned as another input"
            )
        if unit in self._sidecars:
            with reading_errors(unit, self._sidecars[unit].uri):
                rows, version = self._by_sidecar(unit, Stream(self._sidecars[unit].uri))
        else:
            # What is listed again has changed since the source was opened.
            entry = self._as_opened.pop(unit, None) or container_at(unit)
            rows = rows_of("tar", {"image_id": [unit]}, container=unit, version=entry.version, size=entry.size)
            version = entry.version
        check_version(wanted, version)
        yield rows, version, True

    def _by_sidecar(self, uri: str, stream: Stream) -> tuple[pa.Table, str]:
        sidecar, table = self._sidecars[uri], opened_parquet(stream).read()
        table.validate(full=True)  # Strings may be no UTF-8.
        if "status" in table.column_names:
            table = table.filter(pa.array([status == "success" for status in table["status"].to_pylist()], pa.bool_()))
        if "key" not in table.column_names:
            raise DataError(f"{sidecar.uri!r} has no column 'key', which an img2dataset sidecar has")
        suffix, version = _first_suffix(uri, set(table["key"].to_pylist()))
        members = pa.array([f"{key}.{suffix}" for key in table["key"].to_pylist()], pa.string())
        uris = pa.array([f"{uri}#{member}" for member in members.to_pylist()], pa.string())
        id_column = _choose(self.settings.id_column, (), table.column_names, sidecar.uri)
        ids = table[id_column].cast(pa.string()) if id_column else uris
        if ids.null_count:
            raise DataError(
                f"column {id_column!r} of {sidecar.uri!r} has {counted(ids.null_count, 'row')} without an image id"
            )
        columns: dict[str, Any] = {"image_id": ids, "uri": uris, "member": members}
        if self.keep:
            columns["source"] = _struct(table, self.keep, self.source_type)
        version = f"{version}+{stream.version}"
        ending = sidecar.uri[len(posixpath.splitext(uri)[0]) :]
        rows = self.selection.filter(rows_of("name", columns, container=uri, version=f"{version}+{ending}"))
        number = pa.repeat(pa.scalar(len(rows["member"].unique()), pa.int32()), rows.num_rows)
        return rows.append_column("row", number), version


def versions_in(container: str, version: str) -> tuple[str, str | None, str]:
    """Of a ``name`` row: its tar's version, its sidecar's URI, and that one's version. Rows of older listings name no
    sidecar."""
    tar, *sidecar = version.split("+", 2)
    if not sidecar:
        return tar, None, ""
    return tar, posixpath.splitext(container)[0] + sidecar[1], sidecar[0]


def _first_suffix(uri: str, keys: set[str]) -> tuple[str, str]:
    """What the name of the tar's first image ends with behind its key, as a sidecar tells only keys; and the tar's version.
    Reads headers, up to that image's."""
    stream = Stream(uri)
    with opened(uri, stream, _PEEK_BYTES) as tar:
        for member in tar:
            suffix = next((member.name[dot + 1 :] for dot in dots(member.name) if member.name[:dot] in keys), "")
            if suffix and ends_like_image(member.name):
                return suffix, stream.version
    return "jpg", stream.version


def name_of(member: tarfile.TarInfo) -> str:
    """A member's name as text that ids and tables can hold."""
    return text_of(member.name)


def dots(member: str) -> Iterator[int]:
    """Where the dots in a member's name are, that behind the longest key first."""
    dot = len(member)
    while (dot := member.rfind(".", member.rfind("/") + 1, dot)) >= 0:
        yield dot


@contextmanager
def opened(uri: str, stream: Stream | None = None, buffer_bytes: int = CHUNK_BYTES) -> Generator[tarfile.TarFile]:
    """The tar at ``uri``, or in a ``stream`` of it, read in pieces of ``buffer_bytes``.

    Raises:
        DataError: it is no tar, or damaged.
        ImageError: it cannot be read.
    """
    file = io.BufferedReader(stream or Stream(uri), buffer_bytes)
    try:
        with file, tarfile.open(fileobj=file, **_OPTIONS) as tar:
            yield tar
    except tarfile.TarError as error:
        raise DataError(f"{uri!r} is damaged, or no tar: {error}") from error


def member_in(data: bytes) -> tuple[tarfile.TarInfo, bytes] | None:
    """The member whose header ``data`` begins with, and its content as far as it is in ``data``: that of a sparse one lies
    packed. None when it begins with none."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), **_OPTIONS) as tar:
            if (member := tar.next()) is None:
                return None
            content = data[member.offset_data : member.offset_data + member.size]
            if member.issparse() and (file := tar.extractfile(member)) is not None:
                content = b""
                with suppress(tarfile.ReadError):
                    content = file.read()
            return member, content
    except tarfile.TarError:
        return None


def images_of(
    tar: tarfile.TarFile, max_bytes: int, leave_out: Callable[[str], None] = lambda name: None
) -> Iterator[tuple[tarfile.TarInfo, bytes, bool]]:
    """The images of a tar in its order, each with its bytes and whether these are whole; of one above ``max_bytes`` no
    more than its beginning is read.

    An image is a regular file whose name ends like an image's or whose content begins like one; a link of such a name
    stands for one without bytes. ``leave_out`` is called with the names of other files, but for those that are to lie beside
    images by their ending.
    """
    for member in tar:
        if member.islnk() or member.issym():
            if ends_like_image(member.name):
                yield member, b"", True
            continue
        if not member.isreg():
            continue
        file = tar.extractfile(member)
        assert file is not None
        named = ends_like_image(member.name)
        data = b""
        with suppress(tarfile.ReadError):
            data = file.read(64)
            if not named and not begins_like_image(data):
                if not _BESIDE.search(member.name):
                    leave_out(name_of(member))
                continue
            if member.size <= max_bytes:
                data += file.read()
        yield member, data, len(data) == member.size
        if len(data) < member.size <= max_bytes:
            return  # The tar ends here.
    _check_end(tar)


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise ReadError unless ``tar`` was read to the zeros that end it, and nothing else follows: tarfile takes a header
    that is cut or spoilt, zeros in the midst of a tar, and the end of the file, for the end of the tar."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    zeros = tar.fileobj.read(_MAX_PADDING + 1)
    if len(zeros) < tarfile.BLOCKSIZE and not any(zeros):
        raise tarfile.ReadError(f"cut off at byte {tar.offset}, before the block of zeros that ends a tar")
    if any(zeros[: tarfile.BLOCKSIZE]):
        raise tarfile.ReadError(f"there is no member's header at byte {tar.offset}")
    if any(zeros):
        raise tarfile.ReadError(f"something follows its end at byte {tar.offset}: damaged, or two tars one behind the other")
    if len(zeros) > _MAX_PADDING:
        raise tarfile.ReadError(f"nothing but zeros from byte {tar.offset} on: only a part of it was written")


def members_of(uri: str) -> list[str]:
    """The image ids of the tar at ``uri``; raises what ``Source.pages`` raises."""
    with reading_errors(uri), opened(uri) as tar:
        return [f"{uri}#{name_of(member)}" for member, _, _ in images_of(tar, max_bytes=0)]
