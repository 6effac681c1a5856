"""A copy of a captioning output, sorted by image id, in large parts.

The copy has no job.json, and so is no output, before it was read back and found to hold the same rows. Never changes what
it copies; knows nothing of models or inputs.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from capray.errors import ConfigError, DataError, OutputConflictError, StorageError
from capray.output import MEND_PART, Output, first_row, require_output
from capray.progress import ProgressDisplay, duration
from capray.storage import (
    Location,
    exists,
    identity,
    is_file,
    is_folder,
    is_of_arrow,
    is_within,
    iter_files,
    list_names,
    open_file,
    read_ahead,
    read_bytes,
    storage_errors,
    write_atomic,
)
from capray.tables import CAPTIONS, FAILURES, encode_parquet
from capray.wording import counted

if TYPE_CHECKING:
    import duckdb

    from capray.config import CompactConfig

MARKER = "compact.json"
"""In ``_capray/`` of a copy that is not whole yet: what is copied, and which of the files are the copy's."""
MAX_PART_BYTES = 512 * 2**20
"""Of a part's rows in memory; above it a part is cut before it has ``part_rows``."""
_BATCH_ROWS = 20_480
_NUM_READERS = 16
_ORDERS = {"captions": "image_id", "failure_log": "image_id, failed_at, run_id, error_type, message"}

Digest = tuple[int, int, int | None]
"""Rows, different image ids, and the sum of the rows' hashes, which does not depend on their order."""


@dataclass(frozen=True)
class Compaction:
    """What was copied. ``failures`` are rows of the log."""

    output: str
    new: str
    captions: int
    failures: int
    parts_before: int
    parts: int
    seconds: float

    def text(self) -> str:
        return (
            f"{counted(self.captions, 'caption')} and {counted(self.failures, 'row')} of the failure log: "
            f"{counted(self.parts_before, 'part')} of {self.output} became {self.parts:,} in {self.new}, sorted "
            f"by image_id\nthe copy was read back and holds the same rows; {duration(self.seconds)}"
        )


def compact(config: CompactConfig) -> Compaction:
    """Copy ``config.output`` to ``config.new``, sorted by image id, in parts of ``config.part_rows``.

    Raises:
        ConfigError: no output, one that a run is writing, ids that stand twice, parts of different schemas, or a copy
            inside what it copies.
        OutputConflictError: the place of the copy is not empty.
        DataError: a part that is damaged.
        StorageError: storage that cannot be reached or written; the copy does not hold the same rows.
    """
    old, new = require_output(config.output), Output(config.new)
    _check_apart(old, new)
    _check_idle(old)
    return _Copy(old, new, config.part_rows).make()


class _Copy:
    def __init__(self, old: Output, new: Output, part_rows: int):
        self.old, self.new, self.part_rows = old, new, part_rows
        self.run_id = Output.new_run_id()
        self.marker = new.private.join(MARKER)
        self.job = read_bytes(old.job)
        self.runs, self.versions = list_names(old.runs, ".json"), list_names(old.versions, ".parquet")
        self.files = {"captions": old.parts(old.captions), "failure_log": old.parts(old.failures)}
        self.schemas = {
            "captions": _common_schema(self.files["captions"], CAPTIONS),
            "failure_log": _common_schema(self.files["failure_log"], FAILURES),
        }
        self.written: dict[str, list[Location]] = {"captions": [], "failure_log": []}

    def make(self) -> Compaction:
        started = time.monotonic()
        with _damaged_parts(self.old), ProgressDisplay("reading") as display:
            with self.old.connect() as connection:
                digests = {view: _digest(connection, view, schema) for view, schema in self.schemas.items()}
                captions, different, _ = digests["captions"]
                if captions != different:
                    raise ConfigError(
                        f"{counted(captions - different, 'caption')} of {self.old.root.uri!r} with an image id that stands "
                        "there twice: running capray caption again removes them"
                    )
                self._begin()
                total = captions + digests["failure_log"][0]
                display.update(0, "", "sorting", total)
                done = 0
                for view, folder in (("captions", self.new.captions), ("failure_log", self.new.failures)):
                    for part in self._parts(connection, view):
                        self._publish(part, folder, view)
                        done += part.num_rows
                        display.update(done, counted(done, "row"), "writing")
            kept = [(self.old.runs, self.new.runs, self.runs), (self.old.versions, self.new.versions, self.versions)]
            for old, new, names in kept:
                for name in names:
                    write_atomic(new.join(name), read_bytes(old.join(name)), self.new.scratch)
            display.update(total, "", "reading back")
            with self.new.connect() as connection:
                copied = {view: _digest(connection, view, schema) for view, schema in self.schemas.items()}
            self._finish(digests, copied)
        return Compaction(
            self.old.root.uri,
            self.new.root.uri,
            captions,
            digests["failure_log"][0],
            sum(map(len, self.files.values())),
            sum(map(len, self.written.values())),
            time.monotonic() - started,
        )

    def _begin(self) -> None:
        """Mark the place as this copy's, after removing what an interrupted one left there."""
        uri = self.new.root.uri
        if self.new.root.is_local and not is_folder(self.new.root):
            if is_file(self.new.root):
                raise OutputConflictError(f"{uri!r} is a file: choose a new folder")
            names = []
        else:
            names = [entry.path[len(self.new.root.path.rstrip("/")) + 1 :] for entry in iter_files(self.new.root)]
        if exists(self.new.job):
            raise OutputConflictError(f"{uri!r} is a captioning output already: choose a new folder or empty it")
        is_ours = re.compile(rf"_capray/tmp/\.{re.escape(MARKER)}\.\w+")
        if exists(self.marker):
            mark = json.loads(read_bytes(self.marker))
            if mark["output"] != identity(self.old.root):
                raise OutputConflictError(
                    f"{uri!r} holds the beginning of a copy of {mark['output']!r}: choose a new folder or empty it"
                )
            is_ours = _files_of(mark["run_id"], mark.get("kept", mark.get("runs", [])))
        for name in names:
            if not is_ours.fullmatch(name):
                raise OutputConflictError(f"{uri!r} holds {name!r}: choose a new folder or empty it")
        with storage_errors(f"removing what is left in {uri}"):
            for name in names:
                if name != f"_capray/{MARKER}":
                    self.new.root.fs.rm_file(self.new.root.join(name).path)
        mark = {"output": identity(self.old.root), "run_id": self.run_id, "kept": [*self.runs, *self.versions]}
        write_atomic(self.marker, json.dumps(mark).encode(), self.new.scratch)

    def _parts(self, connection: duckdb.DuckDBPyConnection, view: str) -> Iterator[pa.Table]:
        """The rows of ``view`` in order, as the tables of the parts."""
        schema = self.schemas[view]
        reader = connection.sql(f"SELECT * FROM {view} ORDER BY {_ORDERS[view]}").to_arrow_reader(_BATCH_ROWS)
        held, num_held, bytes_held = [], 0, 0
        for batch in reader:
            rows = pa.Table.from_batches([batch]).cast(schema)
            while rows.num_rows:
                taken = rows.slice(0, self.part_rows - num_held)
                rows = rows.slice(taken.num_rows)
                held.append(taken)
                num_held += taken.num_rows
                bytes_held += taken.nbytes
                if num_held == self.part_rows or bytes_held >= MAX_PART_BYTES:
                    yield pa.concat_tables(held)
                    held, num_held, bytes_held = [], 0, 0
        if held:
            yield pa.concat_tables(held)

    def _publish(self, part: pa.Table, folder: Location, view: str) -> None:
        file = folder.join(f"part-{self.run_id}-{len(self.written[view]):05d}.parquet")
        write_atomic(file, encode_parquet(part), self.new.scratch)
        self.written[view].append(file)

    def _finish(self, digests: dict[str, Digest], copied: dict[str, Digest]) -> None:
        """Make the copy an output, if it is whole."""
        uri = self.new.root.uri
        for view, digest in digests.items():
            if copied[view] != digest:
                raise StorageError(
                    f"{uri!r} does not hold the rows of {self.old.root.uri!r}: {view} (rows, ids, sum of hashes) "
                    f"{copied[view]}, not {digest}; run the same command again"
                )
        _check_idle(self.old)
        if [self.old.parts(self.old.captions), self.old.parts(self.old.failures)] != list(self.files.values()):
            raise ConfigError(f"{self.old.root.uri!r} has changed while it was copied: run the same command again")
        mark = json.loads(read_bytes(self.marker)) if exists(self.marker) else {}
        found = [self.new.parts(self.new.captions), self.new.parts(self.new.failures)]
        if mark.get("run_id") != self.run_id or found != list(self.written.values()):
            raise OutputConflictError(f"another process is writing {uri!r}: let it end, then choose another folder")
        write_atomic(self.new.job, self.job, self.new.scratch)
        with suppress(OSError):
            self.marker.fs.rm_file(self.marker.path)


def _files_of(run_id: str, kept: list[str]) -> re.Pattern[str]:
    """The files of a copy, by their paths in it: published, or about to be."""
    part = rf"part-{re.escape(run_id)}-\d+\.parquet"
    record = "|".join([re.escape(name) for name in kept] or ["(?!)"])
    published = rf"(captions|failures)/{part}|_capray/(runs|versions)/({record})|_capray/{re.escape(MARKER)}"
    return re.compile(rf"{published}|_capray/tmp/\.({part}|{record}|{re.escape(MARKER)}|job\.json)\.\w+")


def _check_apart(old: Output, new: Output) -> None:
    if is_within(old.root, new.root) or is_within(new.root, old.root):
        raise ConfigError(
            f"{new.root.uri!r} is or overlaps {old.root.uri!r}, which cannot be compacted in place: readers would see the "
            "old parts and the new, and a crash half-way would leave ids twice; choose a folder beside it"
        )


def _check_idle(old: Output) -> None:
    if exists(old.private.join("lease.json")):
        raise ConfigError(
            f"a run is writing {old.root.uri!r}: wait for it to end (one that was killed leaves its lease behind; running "
            "its capray caption command again clears it)"
        )


def _common_schema(files: list[Location], default: pa.Schema) -> pa.Schema:
    """The schema of all ``files``; ``default`` where there are none."""
    schemas = list(read_ahead(_schema_of, files, _NUM_READERS))
    for file, schema in zip(files, schemas, strict=True):
        if not schema.equals(schemas[0], check_metadata=True):
            raise ConfigError(
                f"{file.uri!r} has another schema than {files[0].uri!r}, they cannot be copied into one table (capray "
                "verify names all parts that differ)"
            )
        for column in schema:
            if _is_inexact(column.type):
                raise ConfigError(
                    f"column {column.name!r} of {file.uri!r} holds {column.type}, of which DuckDB, which sorts, keeps no "
                    "exact values"
                )
    return schemas[0] if schemas else default


def _schema_of(file: Location) -> pa.Schema:
    """Of a part, all of whose pages are as they were written: DuckDB, which copies them, does not look at checksums."""
    with storage_errors(f"reading {file.uri}"):
        try:
            with open_file(file) as place, pq.ParquetFile(place, page_checksum_verification=True) as part:
                for _ in part.iter_batches(use_threads=False):
                    pass
                return part.schema_arrow
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and not is_of_arrow(error):
                raise
            raise DataError(f"{file.uri!r} is damaged ({error}): {MEND_PART}") from error


def _is_inexact(column_type: pa.DataType) -> bool:
    if pa.types.is_decimal256(column_type):
        return True
    return any(_is_inexact(column_type.field(i).type) for i in range(column_type.num_fields))


def _digest(connection: duckdb.DuckDBPyConnection, view: str, schema: pa.Schema) -> Digest:
    # By its hash alone a list or struct that is null is like one that is empty, or holds nulls.
    nested = [f'"{column.name}"::VARCHAR' for column in schema if pa.types.is_nested(column.type)]
    row_hash = f"hash({', '.join(['t', *nested])})"
    rows, ids, digest = first_row(
        connection, f"SELECT count(*), count(DISTINCT image_id), sum({row_hash}::HUGEINT) FROM {view} t"
    )
    return rows, ids, digest


@contextmanager
def _damaged_parts(old: Output) -> Generator[None]:
    import duckdb

    try:
        yield
    except (duckdb.Error, pa.ArrowInvalid) as error:
        raise DataError(f"copying {old.root.uri}: {error} (capray verify names damaged parts)") from error
