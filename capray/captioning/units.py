"""Units: what is fetched together, in plan files. Rows of places go in, are cut into units, and are read again by whoever
expands the files.

A unit is a number of objects, some whole row groups of tables, some whole tars of known members, or one tar whose members
are not known. Knows nothing of what is to be done, or why.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capray.config import CPU_BATCH
from capray.inputs.places import encode_places
from capray.storage import Location, Write, read_bytes
from capray.tables import decode_parquet

FILE_ROWS = 50_000
"""Rows and skipped members after which a plan file is written."""
MAX_BLOCK_ROWS = 512
MAX_BLOCK_BYTES = 96 * 2**20
MIN_IMAGE_BYTES = 8 * 2**10
"""A tar is assumed to hold at most one image per this many bytes."""
MAX_TAR_BLOCKS = 4096
_NUM_WRITERS = 2
_DIGESTS = pa.list_(pa.binary(16))


@dataclass(frozen=True)
class Work:
    """What a pass is to do, as files of units.

    Attributes:
        num_blocks: of images, but for those of tars whose members are not known.
        num_images: those that are known.
        num_tars: tars whose members are not known yet.
    """

    files: list[Location]
    num_units: int
    num_blocks: int
    num_images: int
    num_tars: int


@dataclass(frozen=True)
class Unit:
    """PLACES rows to read together; of a tar its one row, and the MD5 digests of the ids in it that need no attempt."""

    places: pa.Table
    skipped: frozenset[bytes]


def block_rows_of(side: int, batch_size: int | None) -> int:
    """Images of a block, ``side`` pixels high and wide: not more than an actor should hold, nor than it captions at once."""
    return min(MAX_BLOCK_ROWS, max(1, MAX_BLOCK_BYTES // (3 * side * side)), batch_size or CPU_BATCH)


def num_blocks(places: pa.Table, block_rows: int) -> int:
    """How many blocks a unit gives, whatever is found when it is read."""
    if places["kind"][0].as_py() != "tar":
        return -(-places.num_rows // block_rows)
    num_images = (places["size"][0].as_py() or 0) // MIN_IMAGE_BYTES
    return min(max(1, -(-num_images // block_rows)), MAX_TAR_BLOCKS)


def read_units(file: Location) -> Iterator[Unit]:
    """The units of a plan file, in order."""
    table = decode_parquet(read_bytes(file)).read(use_threads=False).combine_chunks()
    places = table.drop_columns(["unit", "skip"])
    starts = np.flatnonzero(_changes(table, "unit")).tolist()
    for begin, end in zip(starts, [*starts[1:], table.num_rows], strict=True):
        yield Unit(places.slice(begin, end - begin), frozenset(table["skip"][begin].as_py() or ()))


class UnitFiles:
    """Writes ``units-NNNNNN.parquet`` in ``folder``, from number ``first`` on, as a context: leaving it ends the last file.

    Args:
        schema: of the rows.
        block_rows: images of a block: objects are cut by it, smaller row groups and tars joined up to it.
    """

    def __init__(self, folder: Location, first: int, schema: pa.Schema, block_rows: int, write: Write):
        self.folder, self.first, self.block_rows, self.write = folder, first, block_rows, write
        self.files: list[Location] = []
        self.num_units = self.num_blocks = 0
        self._loose = schema.empty_table()
        self._cut: list[pa.Table] = []
        self._size = 0
        self._pool = ThreadPoolExecutor(_NUM_WRITERS, "units")
        self._writes: deque[Future[None]] = deque()

    def __enter__(self) -> UnitFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        with self._pool:
            if kind is None:
                self._end_last()
                if self._cut:
                    self._write()
                while self._writes:
                    self._writes.popleft().result()

    def add(self, rows: pa.Table) -> None:
        """Cut units from rows of all kinds but ``tar``, in the order of their positions."""
        rows = pa.concat_tables([self._loose, rows]).combine_chunks()
        # The last unit may go on in what comes next.
        *_, last = cuts = _cuts(rows, self.block_rows) or [0]
        self._loose = rows.slice(last)
        self._take(rows.slice(0, last), cuts)

    def add_tars(self, tars: pa.Table, offsets: np.ndarray, digests: pa.Array) -> None:
        """A unit for each row of ``tars``; of ``digests``, those from its offset to the next are to be skipped."""
        self._end_last()
        skip = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), digests)
        self._take(tars, list(range(tars.num_rows + 1)), skip)

    def _end_last(self) -> None:
        loose, self._loose = self._loose, self._loose.slice(self._loose.num_rows)
        self._take(loose, [*_cuts(loose, self.block_rows), loose.num_rows])

    def _take(self, rows: pa.Table, cuts: list[int], skip: pa.Array | None = None) -> None:
        """Hold ``rows``, units of which begin at ``cuts`` (the last is their end), until they fill a file."""
        if not rows.num_rows:
            return
        sizes = np.diff(np.asarray(cuts))
        numbers = np.repeat(np.arange(self.num_units, self.num_units + len(sizes), dtype=np.int32), sizes)
        self.num_units += len(sizes)
        self.num_blocks += 0 if skip is not None else int((-(-sizes // self.block_rows)).sum())
        self._size += rows.num_rows + (len(skip.values) if skip is not None else 0)
        skip = pa.nulls(rows.num_rows, _DIGESTS) if skip is None else skip
        self._cut.append(rows.append_column("unit", pa.array(numbers)).append_column("skip", skip))
        if self._size >= FILE_ROWS:
            self._write()

    def _write(self) -> None:
        file = self.folder.join(f"units-{self.first + len(self.files):06d}.parquet")
        table = pa.concat_tables(self._cut)
        self._writes.append(self._pool.submit(lambda: self.write(file, encode_places(table))))
        self.files.append(file)
        self._cut, self._size = [], 0
        while len(self._writes) > _NUM_WRITERS:
            self._writes.popleft().result()


def _cuts(rows: pa.Table, block_rows: int) -> list[int]:
    """Where units begin among ``rows``."""
    if not rows.num_rows:
        return []
    is_new = _changes(rows, "input") | _changes(rows, "kind")
    segments = np.flatnonzero(is_new).tolist()
    is_object = pc.equal(rows["kind"], "object").to_numpy()  # ty: ignore[missing-attribute]
    # A unit that may not be split begins where its container or row group does.
    may_cut = is_new | is_object | _changes(rows, "container") | _changes(rows, "row_group")
    places = np.append(np.flatnonzero(may_cut), rows.num_rows)
    cuts = []
    for begin, end in zip(segments, [*segments[1:], rows.num_rows], strict=True):
        at = begin
        while at < end:
            cuts.append(at)
            i = int(np.searchsorted(places, at + block_rows, side="right")) - 1
            at = int(places[i] if places[i] > at else places[i + 1])
            at = min(at, end)
    return cuts


def _changes(rows: pa.Table, name: str) -> np.ndarray:
    """Where the column ``name`` has another value than in the row before; true of the first row."""
    values = rows[name].combine_chunks()
    if pa.types.is_string(values.type):
        values = values.dictionary_encode().indices
    numbers = values.fill_null(-1).to_numpy()
    return np.append(True, numbers[1:] != numbers[:-1])
