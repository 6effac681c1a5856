"""Which image ids need no attempt: read from the parts of an output, each part once, into a temporary DuckDB file.

An id is kept as the 128 bits of its MD5. That any two of a billion ids share them by chance has a probability below
10⁻²⁰; of two ids that somebody made to share them, one is left out. Captions are removed as duplicates only where the ids
themselves are equal.

Knows nothing of the inputs, and nothing of when what is not settled is attempted.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from capray.errors import StorageError
from capray.output import MEND_PART, Output, first_row, open_duckdb
from capray.storage import Location, Write, is_of_arrow, open_file, read_ahead, read_bytes, storage_errors
from capray.tables import FAILURES, FINAL_FAILURES, decode_parquet, encode_parquet
from capray.wording import counted

if TYPE_CHECKING:
    import duckdb

ATTEMPTS_PER_RUN = 2
"""A transient failure is tried once more in the same run."""
BYTES_PER_ID = 64
"""Temporary space for each id that is wanted or done, at most: rows, and what DuckDB spills."""
SLICE_IDS = 10_000_000
"""Ids that are joined or grouped at once, by a slice of their hashes, so that hardly anything is spilled. They are sorted in
some such numbers as they come in, so that a slice reads little else."""
_PARTS_AT_ONCE = 200
_NUM_READERS = 16
_PREFIX = "capray-ids-"
_LOCKING_SECONDS = 60
"""How old a temporary folder is at least that nobody holds the lock of: a younger one may be about to be locked."""

ID = "md5_number(image_id)"
TAR = "CASE WHEN contains(lower(image_id), '.tar#') THEN hash(split_part(lower(image_id), '.tar#', 1)) END"
"""SQL: what the ids of all members of a tar have in common, and hardly any others."""


class Settled:
    """The settled ids of ``output``, as a context: a DuckDB ``connection`` with these tables and views.

    captioned (id, tar, part): the captions, ``id`` being the hash, ``tar`` the hash that the members of one tar
        share (``TAR``), null for others, and ``part`` the number of the part.
    failed (id, tar, part, error_type, failed_at, run_id, uri): the failure log, ``uri`` being a hash.
    current_failures (error_type): the latest failure of each id that has no caption.
    rewritten (id, written_at): failed ids whose container was written anew then, or that are listed elsewhere now, for
        others to fill.
    settled (id, tar): what needs no attempt in run ``run_id``. The one definition: captioned; or failed for good, unless
        the kind is one of ``retried`` and the run another, or the failure is older than what was rewritten; or attempted
        ATTEMPTS_PER_RUN times in this run.
    """

    def __init__(self, output: Output, run_id: str, retried: tuple[str, ...] = ()):
        self.output, self.run_id, self.retried = output, run_id, retried
        self._parts: dict[int, Location] = {}
        self._num_parts = 0
        self._stack = ExitStack()

    def __enter__(self) -> Settled:
        import duckdb

        try:
            self.folder = self._stack.enter_context(_temporary_folder())
            self.connection: duckdb.DuckDBPyConnection = self._stack.enter_context(
                open_duckdb(f"{self.folder}/spill", self.output.root, database=f"{self.folder}/ids.duckdb")
            )
        except (OSError, duckdb.IOException) as error:
            raise StorageError(f"no temporary space: {error}: set TMPDIR to a folder on a disk with room") from error
        final = ", ".join(f"'{kind}'" for kind in FINAL_FAILURES)
        retried = ", ".join(f"'{kind}'" for kind in self.retried) or "''"
        this_run = f"run_id = '{self.run_id}'"
        self.connection.execute(f"""
            CREATE TABLE captioned (id UHUGEINT, tar UBIGINT, part INTEGER);
            CREATE TABLE failed (
                id UHUGEINT, tar UBIGINT, part INTEGER, error_type VARCHAR, failed_at TIMESTAMPTZ, run_id VARCHAR,
                uri UBIGINT
            );
            CREATE TABLE rewritten (id UHUGEINT, written_at TIMESTAMPTZ);
            CREATE VIEW latest AS
            SELECT id, any_value(tar) AS tar, count(*) FILTER ({this_run}) AS attempts,
                   unnest(max({{failed_at: failed_at, run_id: run_id, error_type: error_type, uri: uri}}))
            FROM failed GROUP BY id;
            CREATE VIEW current_failures AS SELECT error_type FROM latest ANTI JOIN captioned USING (id);
            CREATE VIEW settled AS
            SELECT id, tar FROM captioned
            UNION ALL
            SELECT id, tar FROM latest
            LEFT JOIN (SELECT id, max(written_at) AS written_at FROM rewritten GROUP BY id) USING (id)
            WHERE attempts >= {ATTEMPTS_PER_RUN}
               OR (error_type IN ({final}) AND (error_type NOT IN ({retried}) OR {this_run})
                   AND (written_at IS NULL OR failed_at >= written_at));
        """)
        return self

    def __exit__(self, *exception: object) -> bool | None:
        return self._stack.__exit__(*exception)  # ty: ignore[invalid-argument-type]

    @property
    def num_captions(self) -> int:
        """The captions in the parts read so far."""
        return first_row(self.connection, "SELECT count(*) FROM captioned")[0]

    def num_captions_of(self, run_id: str) -> int:
        """Those in the parts of a run."""
        own = [number for number, part in self._parts.items() if f"/part-{run_id}-" in part.path]
        return first_row(self.connection, f"SELECT count(*) FROM captioned WHERE list_contains({own}::INTEGER[], part)")[0]

    def refresh(self) -> None:
        """Read the parts that were published since the last time.

        Raises:
            StorageError: a part cannot be read, or there is no room for the ids.
        """
        captions, failures = self.output.parts(self.output.captions), self.output.parts(self.output.failures)
        there, known = {part.path for part in (*captions, *failures)}, {part.path for part in self._parts.values()}
        self._forget([number for number, part in self._parts.items() if part.path not in there])
        self._read("captioned", [part for part in captions if part.path not in known])
        self._read(
            "failed", [part for part in failures if part.path not in known], ("error_type", "failed_at", "run_id", "uri")
        )

    def _read(self, table: str, parts: list[Location], others: tuple[str, ...] = ()) -> None:
        names = ("image_id", *others)
        others_in_sql = ("CASE WHEN uri IS NOT NULL THEN hash(uri) END" if name == "uri" else name for name in others)
        columns = ", ".join((f"{ID} AS id", TAR, "part", *others_in_sql))
        schema = pa.schema([*(FAILURES.field(name) for name in names), ("part", pa.int32())])
        for begin in range(0, len(parts), _PARTS_AT_ONCE):
            numbered = dict(enumerate(parts[begin : begin + _PARTS_AT_ONCE], self._num_parts))
            tables = read_ahead(lambda item: _numbered(*item, names), numbered.items(), _NUM_READERS)
            batches = (batch for table in tables for batch in table.cast(schema).to_batches())
            sql = f"INSERT INTO {table} SELECT {columns} FROM incoming ORDER BY id"
            num_ids = insert(self.connection, sql, schema, batches)
            self._parts |= numbered
            self._num_parts += len(numbered)
            self.check_room(num_ids * (len(parts) - begin - len(numbered)) // len(numbered))

    def _forget(self, numbers: list[int]) -> None:
        """Forget what was read of parts that are gone or replaced."""
        if numbers:
            for table in ("captioned", "failed"):
                self.connection.execute(f"DELETE FROM {table} WHERE part IN ({', '.join(map(str, numbers))})")
            for number in numbers:
                del self._parts[number]

    def check_room(self, num_ids: int) -> None:
        """Raise StorageError unless there is temporary space for so many further ids."""
        free = shutil.disk_usage(self.folder).free
        if num_ids * BYTES_PER_ID > free:
            raise StorageError(
                f"{counted(num_ids, 'id needs', 'ids need')} up to {num_ids * BYTES_PER_ID / 1e9:,.1f} GB of temporary "
                f"space, and {self.folder!r} has {free / 1e9:,.1f} GB: set TMPDIR to a folder on a larger disk"
            )

    def slices(self, num_ids: int) -> list[str]:
        """SQL conditions that divide ids into slices of at most SLICE_IDS, if they are ``num_ids``."""
        number = max(1, -(-num_ids // SLICE_IDS))
        bounds = [i * 2**128 // number for i in range(number + 1)]
        return [f"id BETWEEN {begin}::UHUGEINT AND {end - 1}::UHUGEINT" for begin, end in pairwise(bounds)]

    def remove_duplicates(self, write: Write) -> int:
        """Remove ids that stand in two caption parts from the newer part, replacing it under its name; how many there were.

        They come from a writer that was frozen past its lease and woke up, or from ids that stand in two inputs, one of
        them a tar whose members were not known. Of two runs the later id string is the newer.
        """
        self.refresh()
        doubled: set[int] = set()
        for condition in self.slices(self.num_captions):
            rows = self.connection.execute(f"""
                SELECT DISTINCT part FROM captioned WHERE {condition} AND id IN (
                    SELECT id FROM captioned WHERE {condition} GROUP BY id HAVING count(*) > 1
                )
            """).fetchall()
            doubled |= {number for (number,) in rows}
        removed, seen, replaced = 0, set(), []
        for number in sorted(doubled, key=lambda number: self._parts[number].path):
            part = self._parts[number]
            table = decode_parquet(read_bytes(part)).read()
            keep = []
            for image_id in table["image_id"].to_pylist():
                keep.append(image_id not in seen)
                seen.add(image_id)
            if not all(keep):
                removed += keep.count(False)
                write(part, encode_parquet(table.filter(pa.array(keep))))
                replaced.append(number)
        self._forget(replaced)
        self.refresh()
        return removed


@contextmanager
def _temporary_folder() -> Generator[str]:
    """A folder for this process, which may become large. Those that killed processes have left are removed: nobody holds
    the locks in them."""
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/lock"):
        with suppress(OSError), lock.open() as file:
            if time.time() - os.fstat(file.fileno()).st_mtime > _LOCKING_SECONDS:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent)
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder, open(f"{folder}/lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield folder


def _numbered(number: int, part: Location, names: tuple[str, ...]) -> pa.Table:
    """The columns ``names`` of a part, and its number."""
    with storage_errors(f"reading {part.uri}"):
        try:
            with open_file(part) as file:
                table = pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True).read(
                    list(names), use_threads=False
                )
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and not is_of_arrow(error):
                raise
            raise StorageError(f"{part.uri!r} is damaged ({' '.join(str(error).split())}): {MEND_PART}") from error
    return table.append_column("part", pa.repeat(pa.scalar(number, pa.int32()), table.num_rows))


def insert(connection: duckdb.DuckDBPyConnection, sql: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> int:
    """Run an INSERT from the table ``incoming`` of ``batches``, and raise what they raise as it is, not in DuckDB's words;
    how many rows it was."""
    errors = []

    def passed_on() -> Iterator[pa.RecordBatch]:
        try:
            yield from batches
        except Exception as error:
            errors.append(error)
            raise

    connection.register("incoming", pa.RecordBatchReader.from_batches(schema, passed_on()))
    try:
        return first_row(connection, sql)[0]
    except Exception as error:
        raise errors[0] if errors else error from None
    finally:
        connection.unregister("incoming")
