"""Parquet with images or URIs, and manifests of URIs: CSV, JSONL, text, and an S3 Inventory's data files."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import posixpath
import re
from collections.abc import Container, Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from capray.config import SourceSettings
from capray.errors import CaprayError, ConfigError, DataError, TryAgain
from capray.inputs.base import ROWS_PER_PAGE, Containers, Selection, reading_errors, rows_of
from capray.inputs.byte_reader import CHUNK_BYTES, Stream
from capray.inputs.versions import check_version
from capray.manifests import csv_rows, json_rows
from capray.storage import Entry, Location, object_version, read_bytes
from capray.wording import counted

_ABSOLUTE = re.compile(r"/|[A-Za-z][A-Za-z0-9+.\-]*://")
CSV_BLOCK_BYTES = 16 * 2**20
_URI_NAMES = ("uri", "url", "path")
MANIFESTS = (".csv", ".tsv", ".jsonl", ".ndjson", ".txt", ".csv.gz", ".tsv.gz", ".jsonl.gz", ".ndjson.gz", ".txt.gz")


def _choose(given: str | None, guesses: tuple[str, ...], columns: list[str], where: str) -> str | None:
    """The column ``given``, or the first of ``guesses`` there is."""
    if given is not None:
        _require(given, columns, where)
        return given
    return next((name for name in guesses if name in columns), None)


def _require(name: str, columns: list[str], where: str) -> None:
    if name not in columns:
        raise ConfigError(
            f"{where!r} has no column {name!r}; its columns: {', '.join(columns)} (every input must have a "
            "column that is named)"
        )


class Parquet(Containers):
    """Parquet files. Of those that hold images only the ids (and carried columns) are read to list them. URIs may be
    relative, as a Manifest's are."""

    kind = "parquet"

    def __init__(
        self, place: Location, settings: SourceSettings, keep: tuple[str, ...], files: list[Entry], hidden: int = 0
    ):
        super().__init__(place, settings, keep, files, hidden)
        split = "split" if settings.split else None
        chosen = (settings.id_column, settings.image_column, settings.uri_column, split, *keep)
        first, schema = first_schema(files, {"image_id", "image", *_URI_NAMES, *filter(None, chosen)})
        names = schema.names
        for name in filter(None, (split, *keep)):
            _require(name, names, first)
        image = None if settings.uri_column else _choose(settings.image_column, ("image",), names, first)
        uri = _choose(settings.uri_column, _URI_NAMES, names, first) if image is None else None
        if image is None and uri is None:
            raise ConfigError(
                f"{first!r} has no column of images or URIs that is known: name it with --image-column or --uri-column; "
                f"its columns: {', '.join(names)}"
            )
        if image is not None and not _is_binary(schema.field(image).type):
            raise ConfigError(f"column {image!r} of {first!r} holds {schema.field(image).type}, not encoded image bytes")
        image_id = _choose(settings.id_column, ("image_id",), names, first) or uri
        if image_id is None:
            raise ConfigError(
                f"{first!r} needs a column of image ids: name it with --id-column; its columns: {', '.join(names)}"
            )
        self.id_column, self.image_column, self._uri, self._split = image_id, image, uri, split
        self.source_type = pa.struct([_kept(schema.field(name), first) for name in keep]) if keep else None

    def _list(self, unit: str, wanted: str, behind: int | None) -> Iterator[tuple[pa.Table, str, int]]:
        columns = [name for name in dict.fromkeys((self.id_column, self._uri, self._split, *self.keep)) if name]
        stream = Stream(unit, version=wanted)
        file = opened_parquet(stream)
        for name in filter(None, (*columns, self.image_column)):
            if name not in file.schema_arrow.names:
                raise DataError(f"{unit!r} has no column {name!r}, which the first file has")
        if self.image_column and not _is_binary(held := file.schema_arrow.field(self.image_column).type):
            raise DataError(f"column {self.image_column!r} of {unit!r} holds {held}, not encoded image bytes")
        for group in range(0 if behind is None else behind + 1, file.num_row_groups):
            table = file.read_row_group(group, columns=columns)
            table.validate(full=True)  # Strings may be no UTF-8.
            yield self._rows(unit, stream.version, group, table), stream.version, group

    def _rows(self, uri: str, version: str, group: int, table: pa.Table) -> pa.Table:
        numbers = pa.array(range(table.num_rows), pa.int32())
        if self._split:
            mask = pa.array([split == self.settings.split for split in table[self._split].to_pylist()], pa.bool_())
            table, numbers = table.filter(mask), numbers.filter(mask)
        ids = table[self.id_column].cast(pa.string())
        if ids.null_count:
            raise DataError(f"column {self.id_column!r} of {uri!r} has {counted(ids.null_count, 'row')} without an image id")
        columns: dict[str, Any] = {"image_id": ids}
        if self.keep:
            columns["source"] = _struct(table, self.keep, self.source_type)
        if not self._uri:
            columns["row"] = numbers
            return rows_of("row", columns, container=uri, version=version, row_group=group)
        columns["uri"] = _resolved(table[self._uri].cast(pa.string()), uri)
        self.note_listed(columns["uri"])
        return rows_of("object", columns, container=uri, version=version)


def _kept(column: pa.Field, where: str) -> pa.Field:
    """How a column to keep is written: views as what they show, extensions as what they store.

    Raises:
        ConfigError: Arrow cannot do with its type what has to be done.
    """
    kind = column.type.storage_type if isinstance(column.type, pa.BaseExtensionType) else column.type
    kind = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}.get(kind, kind)
    try:
        pa.nulls(1, column.type).cast(kind).take(pa.array([0]))
    except pa.ArrowNotImplementedError as error:
        raise ConfigError(f"column {column.name!r} of {where!r} holds {column.type}, which cannot be kept") from error
    return pa.field(column.name, kind)


def first_schema(files: list[Entry], used: Container[str] = ()) -> tuple[str, pa.Schema]:
    """The first of the Parquet ``files`` that can be read and has no two columns of a name that is ``used``, and its schema.
    What is wrong with the others is found out when they are listed.

    Raises:
        DataError, StorageError: none can be, and what is wrong with the first.
    """
    fault: CaprayError | None = None
    for entry in files:
        try:
            with reading_errors(entry.uri):
                schema = opened_parquet(Stream(entry.uri)).schema_arrow
                if twice := next((name for name in schema.names if name in used and schema.names.count(name) > 1), None):
                    raise DataError(f"{entry.uri!r} has several columns {twice!r}: rename all but one")
                return entry.uri, schema
        except TryAgain:
            raise
        except CaprayError as error:
            fault = fault or error
    assert fault is not None, "files"
    raise fault


def opened_parquet(stream: Stream) -> pq.ParquetFile:
    """The Parquet file in ``stream``, its columns read in pieces of the stream's."""
    return pq.ParquetFile(pa.PythonFile(stream, mode="r"), buffer_size=CHUNK_BYTES)


def _struct(table: pa.Table, keep: tuple[str, ...], source_type: pa.DataType | None) -> pa.Array:
    """The columns ``keep`` as one struct column."""
    assert source_type is not None
    parts = [_as_first(table[name].combine_chunks(), source_type.field(name)) for name in keep]
    return pa.StructArray.from_arrays(parts, fields=[source_type.field(name) for name in keep])


def _as_first(column: pa.Array, first: pa.Field) -> pa.Array:
    """``column`` in the type it has in the first file. Arrow refuses to cut numbers and fractions of a second, but not
    times of a day."""
    cast = column.cast(first.type)
    is_of_time = pa.types.is_temporal(column.type) and pa.types.is_temporal(first.type)
    try:
        is_whole = not is_of_time or cast.cast(column.type).equals(column)
    except pa.ArrowNotImplementedError:  # From a time without its date there is no way back.
        is_whole = False
    if not is_whole:
        raise pa.ArrowInvalid(
            f"column {first.name!r} holds {column.type}, of which {first.type}, as in the first file, keeps only a part: "
            "write all files with one type"
        )
    return cast


def _refuse_web(uris: pa.ChunkedArray, where: str) -> None:
    is_web = pc.match_substring_regex(uris, "^https?://", ignore_case=True)  # ty: ignore[missing-attribute]
    web = uris.filter(is_web)
    if len(web):
        raise ConfigError(
            f"{where!r} lists {web[0].as_py()!r}: http(s) URIs are not read; fetch them into tar shards or a bucket first "
            "(img2dataset)"
        )


def _resolved(uris: pa.ChunkedArray, where: str) -> list[str | None]:
    """The URIs that the table or manifest ``where`` names; those without a scheme that are no absolute paths are relative to
    its folder."""
    _refuse_web(uris, where)
    folder = posixpath.dirname(where)
    return [uri if uri is None or _ABSOLUTE.match(uri) else f"{folder}/{uri}" for uri in uris.to_pylist()]


def _is_binary(column_type: pa.DataType) -> bool:
    is_one_of = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(is_one(column_type) for is_one in is_one_of)


class Manifest(Containers):
    """Lists of URIs. A URI without a scheme that is no absolute path is relative to the manifest's folder."""

    kind = "manifest"

    def __init__(
        self, place: Location, settings: SourceSettings, keep: tuple[str, ...], files: list[Entry], hidden: int = 0
    ):
        super().__init__(place, settings, keep, files, hidden)
        self.refuse("split", "image_column")
        if all(_suffix(entry.uri) == "txt" for entry in files):
            self.refuse("id_column", "uri_column", "keep")
        self.source_type = pa.struct([pa.field(name, pa.string()) for name in keep]) if keep else None

    def _list(self, unit: str, wanted: str, behind: int | None) -> Iterator[tuple[pa.Table, str, int]]:
        read = {"csv": self._csv, "tsv": self._csv, "jsonl": self._jsonl, "ndjson": self._jsonl, "txt": self._text}
        stream, number, before = Stream(unit, version=wanted), 0, behind or 0
        for rows in read[_suffix(unit)](unit, stream):
            number += rows.num_rows
            if number > before:
                rest = rows.slice(max(0, rows.num_rows - number + before))
                yield self._resolved(rest, unit, stream.version), stream.version, number

    def _csv(self, uri: str, stream: Stream) -> Iterator[pa.Table]:
        with _text_of_file(uri, stream) as lines:
            rows = csv_rows(lines, repr(uri), "\t" if _suffix(uri) == "tsv" else ",")
            _, header = next(rows, (0, None))
            if header is None:
                raise DataError(f"{uri!r} is empty")
            columns = self._columns(header, uri)
            wanted = {name: header.index(name) for name in (*columns, *self.keep)}
            for batch in _batched((row for _, row in rows), ROWS_PER_PAGE):
                table = {
                    name: pa.array([row[place] or None for row in batch], pa.string()) for name, place in wanted.items()
                }
                yield self._table(pa.table(table), *columns, uri)

    def _jsonl(self, uri: str, stream: Stream) -> Iterator[pa.Table]:
        with _text_of_file(uri, stream) as lines:
            columns = None
            for numbered in _batched(json_rows(lines, repr(uri)), ROWS_PER_PAGE):
                columns = columns or self._columns(list(numbered[0][1]), uri)
                self._check_names(numbered, *columns, uri)
                records = [record for _, record in numbered]
                wanted = dict.fromkeys((*columns, *self.keep))
                table = {name: pa.array([_text_of(record.get(name)) for record in records], pa.string()) for name in wanted}
                yield self._table(pa.table(table), *columns, uri)

    def _text(self, uri: str, stream: Stream) -> Iterator[pa.Table]:
        with _unpacked(uri, stream) as file:
            lines = filter(None, (line.rstrip(b"\r\n") for line in _without_mark(file)))
            for batch in _batched(lines, ROWS_PER_PAGE):
                try:
                    names = pa.array([line.decode() for line in batch], pa.string())
                except UnicodeDecodeError as error:
                    raise DataError(f"{uri!r} is not UTF-8: {error}") from error
                yield pa.table({"image_id": names, "uri": names})

    def _check_names(self, records: list[tuple[int, dict[str, Any]]], id_column: str, uri_column: str, uri: str) -> None:
        """Raise DataError at the first of JSON ``records``, each with its line, whose id or URI is not where the first one's
        is."""
        may_be_elsewhere = self.settings.id_column is None and id_column != "image_id"
        for line, record in records:
            others = [name for name in _URI_NAMES if record.get(name)]
            if self.settings.uri_column is None and uri_column not in record and others:
                raise DataError(
                    f"{uri!r}, line {line} has its URI in {others[0]!r}, and the first record in {uri_column!r}: give "
                    "them one name"
                )
            if record.get(id_column) in (None, ""):
                raise DataError(f"{uri!r}, line {line}: {id_column!r}, the image id, is without a value")
            if may_be_elsewhere and record.get("image_id") is not None:
                raise DataError(
                    f"{uri!r}, line {line} has an 'image_id', and the first record has none: give one to every record, "
                    f"or say --id-column {id_column}"
                )

    def _columns(self, columns: list[str], uri: str) -> tuple[str, str]:
        """The names of the id and URI columns."""
        chosen = _choose(self.settings.uri_column, _URI_NAMES, columns, uri)
        if chosen is None:
            raise ConfigError(
                f"{uri!r} has no column of URIs that is known: name it with --uri-column, or give it a header if its first "
                f"line is none; its columns: {', '.join(columns)}"
            )
        for name in self.keep:
            _require(name, columns, uri)
        return _choose(self.settings.id_column, ("image_id",), columns, uri) or chosen, chosen

    def _table(self, table: pa.Table, id_column: str, uri_column: str, uri: str) -> pa.Table:
        if nulls := table[id_column].null_count:
            raise DataError(f"column {id_column!r} of {uri!r} has {counted(nulls, 'row')} without a value")
        columns = {"image_id": table[id_column], "uri": table[uri_column]}
        if self.keep:
            columns["source"] = _struct(table, self.keep, self.source_type)
        return pa.table(columns)

    def _resolved(self, rows: pa.Table, uri: str, version: str) -> pa.Table:
        uris = _resolved(rows["uri"], uri)
        self.note_listed(uris)
        columns = {name: rows[name] for name in rows.column_names} | {"uri": uris}
        return rows_of("object", columns, container=uri, version=version)


def _without_mark(lines: Iterable[bytes]) -> Iterator[bytes]:
    """``lines`` without the byte order mark that some editors begin a file with."""
    for number, line in enumerate(lines):
        yield line if number else line.removeprefix(codecs.BOM_UTF8)


def _unpacked(uri: str, stream: Stream) -> Any:
    """The file in ``stream``, buffered, and unpacked if it is gzip."""
    file = io.BufferedReader(stream, CHUNK_BYTES)
    return gzip.open(file) if uri.lower().endswith(".gz") else file


@contextmanager
def _text_of_file(uri: str, stream: Stream) -> Generator[Iterable[str]]:
    """The lines of the file in ``stream``, their ends as they are."""
    try:
        with _unpacked(uri, stream) as file:
            yield io.TextIOWrapper(file, "utf-8-sig", newline="")
    except UnicodeDecodeError as error:
        raise DataError(f"{uri!r} is not UTF-8: {error}") from error


class Inventory(Containers):
    """An S3 Inventory, named by its manifest.json: CSV or Parquet data files of keys."""

    kind = "inventory"

    def __init__(self, place: Location, settings: SourceSettings, keep: tuple[str, ...] = ()):
        try:
            manifest = json.loads(read_bytes(place))
            self._format = manifest["fileFormat"]
            bucket = manifest["destinationBucket"].rsplit(":", 1)[-1]
            files = [_data_file(bucket, **file) for file in manifest["files"]]
            self._schema = manifest["fileSchema"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{place.uri!r} is not the manifest.json of an S3 Inventory: {error!r}") from error
        super().__init__(place, settings, keep, files)
        self.refuse("split", "id_column", "image_column", "uri_column", "keep")
        if self._format not in ("CSV", "Parquet"):
            raise ConfigError(f"{place.uri!r} is an inventory in {self._format}: have it made as CSV or Parquet")
        self.selection = Selection.of(settings, f"s3://{manifest['sourceBucket']}")

    def _list(self, unit: str, wanted: str, behind: int | None) -> Iterator[tuple[pa.Table, str, int]]:
        version = next(entry.version for entry in self.files if entry.uri == unit)
        check_version(wanted, version)
        stream = Stream(unit)
        for number, table in enumerate(self._csv(unit, stream) if self._format == "CSV" else self._parquet(stream)):
            if behind is None or number > behind:
                yield self._rows(table, unit, version), version, number

    def _csv(self, unit: str, stream: Stream) -> Iterator[dict[str, list[str]]]:
        names = [name.strip() for name in self._schema.split(",")]
        options = pa_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
        with _unpacked(unit, stream) as file:
            reader = pa_csv.open_csv(
                file,
                read_options=pa_csv.ReadOptions(column_names=names, block_size=CSV_BLOCK_BYTES),
                parse_options=pa_csv.ParseOptions(newlines_in_values=True),
                convert_options=options,
            )
            for batch in reader:
                columns = {_plain(name): batch[name].to_pylist() for name in names}
                # Keys are URL-encoded in CSV inventories, and in those only.
                columns["key"] = [unquote_plus(key) for key in columns["key"]]
                yield columns

    def _parquet(self, stream: Stream) -> Iterator[dict[str, list[str]]]:
        file = opened_parquet(stream)
        wanted = [n for n in file.schema_arrow.names if _plain(n) in ("bucket", "key", "size", "islatest", "isdeletemarker")]
        for batch in file.iter_batches(ROWS_PER_PAGE, columns=wanted):
            yield {_plain(name): batch[name].to_pylist() for name in wanted}

    def _rows(self, columns: dict[str, list], unit: str, version: str) -> pa.Table:
        count = len(columns["key"])
        sizes = [int(size) if size not in (None, "") else None for size in columns.get("size", [None] * count)]
        latest = columns.get("islatest", [True] * count)
        deleted = columns.get("isdeletemarker", [False] * count)
        keep = [
            i
            for i in range(count)
            if str(latest[i]).lower() != "false"
            and str(deleted[i]).lower() != "true"
            and not (columns["key"][i].endswith("/") and not sizes[i])
        ]
        uris = [f"s3://{columns['bucket'][i]}/{columns['key'][i]}" for i in keep]
        rows = {"image_id": uris, "uri": uris, "size": [sizes[i] for i in keep]}
        return rows_of("object", rows, container=unit, version=version)


def _data_file(bucket: str, key: str, size: int = 0, MD5checksum: str = "", **_: Any) -> Entry:
    """A data file, as the inventory's manifest names it."""
    return Entry(f"s3://{bucket}/{key}", f"{bucket}/{key}", size, object_version(MD5checksum, size))


def _plain(name: str) -> str:
    """An inventory's column under one name: ``Key`` in CSV, ``key`` in Parquet; ``IsLatest`` and ``is_latest``."""
    return name.strip().lower().replace("_", "")


def _suffix(path: str) -> str:
    return path.lower().removesuffix(".gz").rsplit(".", 1)[-1]


def _text_of(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _batched(items: Iterator, size: int) -> Iterator[list]:
    while batch := list(islice(items, size)):
        yield batch
