"""Tar shards, as WebDataset and img2dataset lay them out: plain tars, perhaps each with a Parquet sidecar beside it.

With a sidecar the images are known without reading the tar; without one its members become known when it is read.
"""

from __future__ import annotations

import tarfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capray.config import SourceSettings
from capray.errors import DataError, StorageError
from capray.images import ImageError
from capray.inputs.base import Page, Source, plan_rows
from capray.inputs.byte_reader import open_stream
from capray.inputs.tables import _choose, _parquet_errors, _require, _struct, _uri_like
from capray.storage import Entry, Location, storage_errors

_SUFFIXES = frozenset(("jpg", "jpeg", "jpe", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm", "heic"))
_SIGNS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\x00", b"MM\x00*")
_BRANDS = (b"ftypavif", b"ftypheic", b"ftypmif1")


class Tars(Source):
    kind = "tar"

    def __init__(
        self,
        place: Location,
        settings: SourceSettings,
        keep: tuple[str, ...],
        files: list[Entry],
        sidecars: dict[str, Entry],
        hidden: int = 0,
    ):
        super().__init__(place, settings, keep)
        self.refuse("split", "image_column", "uri_column")
        self.files, self._hidden, self._sidecars = files, hidden, sidecars
        self._source_type = None
        without = [entry.uri for entry in files if entry.path not in sidecars]
        if without:
            self._without_sidecar = without[0]
            if keep or settings.id_column:
                raise DataError(
                    f"{without[0]!r} has no Parquet sidecar (img2dataset writes one), which keep and id_column need"
                )
        elif files:
            first = sidecars[files[0].path]
            with storage_errors(f"reading {first.uri}"), _parquet_errors(first.uri):
                schema = pq.read_schema(first.path, filesystem=place.fs)
            for name in (*keep, *filter(None, (settings.id_column,)), "key"):
                _require(name, schema.names, first.uri)
            if keep:
                self._source_type = pa.struct([pa.field(name, schema.field(name).type) for name in keep])

    @property
    def source_type(self) -> pa.DataType | None:
        return self._source_type

    def units(self) -> list[str]:
        return [entry.path for entry in self.files]

    def pages(self, unit: str, after: Any = None) -> Iterator[Page]:
        if after is not None:
            return
        uri = _uri_like(self.place, unit)
        hidden = self._hidden if unit == self.files[0].path else 0
        sidecar = self._sidecars.get(unit)
        if sidecar is None:
            yield Page(plan_rows({"image_id": [uri], "container": [uri]}), True, (), hidden)
            return
        with storage_errors(f"reading {sidecar.uri}"), _parquet_errors(sidecar.uri):
            table = pq.read_table(sidecar.path, filesystem=self.place.fs)
        if "status" in table.column_names:
            table = table.filter(pa.array([status == "success" for status in table["status"].to_pylist()], pa.bool_()))
        if "key" not in table.column_names:
            raise DataError(f"{sidecar.uri!r} has no column 'key', which an img2dataset sidecar has")
        suffix = self._suffix(uri) if table.num_rows else ""
        members = pa.array([f"{key}.{suffix}" for key in table["key"].to_pylist()], pa.string())
        uris = pa.array([f"{uri}#{member}" for member in members.to_pylist()], pa.string())
        id_column = _choose(self.settings.id_column, (), table.column_names, sidecar.uri)
        ids = table[id_column].cast(pa.string()) if id_column else uris
        if ids.null_count:
            raise DataError(f"column {id_column!r} of {sidecar.uri!r} has {ids.null_count} rows without an image id")
        columns = {
            "image_id": ids,
            "uri": uris,
            "container": pa.repeat(pa.scalar(uri), table.num_rows),
            "member": members,
        }
        if self.keep:
            columns["source"] = _struct(table, self.keep, self._source_type)
        yield Page(plan_rows(columns), True, (), hidden)

    def _suffix(self, uri: str) -> str:
        """What the names of this tar's images end with: a sidecar tells only their keys."""
        with opened(uri) as tar:
            for member in tar:
                _, _, suffix = member.name.rpartition("/")[2].partition(".")
                if suffix.rpartition(".")[2].lower() in _SUFFIXES:
                    return suffix
        return "jpg"


@contextmanager
def opened(uri: str) -> Generator[tarfile.TarFile]:
    """The tar at ``uri``, read in large pieces.

    Raises:
        DataError: it is no tar, or damaged.
        StorageError: it cannot be read.
    """
    try:
        with (
            open_stream(uri) as stream,
            tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="backslashreplace") as tar,
        ):
            yield tar
    except tarfile.TarError as error:
        raise DataError(f"{uri!r} is damaged, or no tar: {error}") from error
    except ImageError as error:
        raise StorageError(f"reading {error.message}") from error


def images_of(tar: tarfile.TarFile, max_bytes: int) -> Iterator[tuple[tarfile.TarInfo, bytes, bool]]:
    """The images of a tar in its order, each with its bytes and whether these are whole; of one above ``max_bytes`` no
    more than its beginning is read.

    An image is a regular file whose name ends like an image's or whose content begins like one.
    """
    for member in tar:
        if not member.isreg():
            continue
        file = tar.extractfile(member)
        assert file is not None
        named = member.name.rpartition(".")[2].lower() in _SUFFIXES
        data = b""
        with suppress(tarfile.ReadError):
            data = file.read(64)
            if not named and not _looks_like_image(data):
                continue
            if member.size <= max_bytes:
                data += file.read()
        yield member, data, len(data) == member.size
        if len(data) < member.size <= max_bytes:
            return  # The tar ends here.
    _check_end(tar)


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise ReadError unless ``tar`` was read to the zeros that end it: tarfile takes a header that is cut or spoilt, and
    the end of the file, for the end of the tar."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if any(block):
        raise tarfile.ReadError(f"there is no member's header at byte {tar.offset}")
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"cut off at byte {tar.offset}, before the block of zeros that ends a tar")


def members_of(uri: str) -> list[str]:
    """The image ids of the tar at ``uri``; raises what ``opened`` raises."""
    with opened(uri) as tar:
        return [f"{uri}#{member.name}" for member, _, _ in images_of(tar, max_bytes=0)]


def _looks_like_image(head: bytes) -> bool:
    return head.startswith(_SIGNS) or head[8:12] == b"WEBP" or head[4:12] in _BRANDS
