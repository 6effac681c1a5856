"""What of the listing is still to be done, computed out of core from the parts themselves.

Work is cut into units, one row group of a plan file each: a few images by URI, a row group of a Parquet container, or a tar.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from capray.inputs.listing import Listing
from capray.output import Output, create_view, first_row
from capray.storage import Location, storage_errors, write_atomic
from capray.tables import FINAL_FAILURES, encode_parquet

UNITS_PER_FILE = 100
ATTEMPTS_PER_RUN = 2
"""A transient failure is tried once more in the same run."""

_SAME_UNIT = ("container", "row_group")


@dataclass(frozen=True)
class Work:
    """A pass's images, as files of units.

    Attributes:
        num_images: of which the number is known.
        num_tars: tars among it whose members are not known yet.
        block_rows: images of a block; a unit gives one or more.
    """

    files: list[Location]
    num_units: int
    num_images: int
    num_tars: int
    block_rows: int

    def unit(self, index: int) -> tuple[str, int]:
        """The path and row group of unit ``index``."""
        return self.files[index // UNITS_PER_FILE].path, index % UNITS_PER_FILE


@dataclass(frozen=True)
class Wanted:
    """How many images the source listed, and how many of the rows repeat an id."""

    images: int
    duplicates: int


class Plan:
    """The plan of one run on ``output``.

    Args:
        retry_failed: final kinds to attempt again.
    """

    def __init__(self, output: Output, run_id: str, listing: Listing, retry_failed: tuple[str, ...] = ()):
        self.output, self.run_id, self.listing = output, run_id, listing
        self.folder = output.plan.join(run_id)
        self.retry_failed = retry_failed
        self._num_files = 0

    def fresh(self, chunks: list[Location], block_rows: int, limit: int | None = None) -> Work:
        """What is to be done of newly listed ``chunks``: less what is settled, and what this run has attempted."""
        attempted = f"SELECT image_id FROM failure_log WHERE run_id = '{self.run_id}'"
        return self._work(chunks, f"AND image_id NOT IN ({attempted})", block_rows, limit, set())

    def remaining(self, block_rows: int, limit: int | None = None, given_up: frozenset[str] = frozenset()) -> Work:
        """What of the whole listing is neither captioned nor settled as failed, but for the tars ``given_up``."""
        return self._work([*self.listing.chunks(), *self.listing.member_chunks()], "", block_rows, limit, given_up)

    def _work(
        self,
        chunks: list[Location],
        condition: str,
        block_rows: int,
        limit: int | None,
        given_up: set[str] | frozenset[str],
    ) -> Work:
        with self._connect() as connection:
            create_view(connection, "candidates", chunks, self.listing.schema)
            # Each id once, at its first place; order restored by position.
            connection.execute(f"""
                CREATE TABLE todo AS
                SELECT * FROM candidates c
                WHERE NOT {_IS_TAR} AND NOT EXISTS (SELECT 1 FROM settled s WHERE s.image_id = c.image_id) {condition}
                QUALIFY row_number() OVER (PARTITION BY image_id ORDER BY position) = 1
                {f"ORDER BY position LIMIT {limit}" if limit is not None else ""}
            """)
            (num_images,) = first_row(connection, "SELECT count(*) FROM todo")
            has_room = limit is None or num_images < limit
            tars = self._unread_tars(connection, given_up) if has_room else []
            if limit is not None:
                tars = tars[:1]
            units: Iterator[pa.Table] = iter(())
            if num_images:
                reader = connection.sql("SELECT * FROM todo ORDER BY position").to_arrow_reader(100_000)
                units = _units(reader, self.listing.schema, block_rows)
            files, num_units = self._write(chain(units, tars))
        return Work(files, num_units, num_images, len(tars), block_rows)

    def _unread_tars(
        self, connection: duckdb.DuckDBPyConnection, given_up: set[str] | frozenset[str]
    ) -> list[pa.Table]:
        """A unit for each tar of the candidates whose members are not known: its own row, and one for each member that
        is settled, which is to be skipped."""
        known = {*self.listing.known_tars, *given_up}
        table = connection.sql(f"SELECT DISTINCT ON (image_id) * FROM candidates WHERE {_IS_TAR}").to_arrow_table()
        table = table.cast(self.listing.schema)
        units = []
        for i in range(table.num_rows):
            tar = table.slice(i, 1)
            uri = tar["container"][0].as_py()
            if uri in known:
                continue
            done = connection.execute(
                "SELECT DISTINCT image_id FROM settled WHERE starts_with(image_id, ?)", [f"{uri}#"]
            ).fetchall()
            ids = [image_id for (image_id,) in done]
            skipped = {"image_id": ids, "member": [image_id[len(uri) + 1 :] for image_id in ids]}
            columns = [
                pa.array(skipped[column.name], column.type)
                if column.name in skipped
                else pa.concat_arrays([tar[column.name].combine_chunks()] * len(ids))
                if ids
                else pa.array([], column.type)
                for column in self.listing.schema
            ]
            units.append(pa.concat_tables([tar, pa.table(columns, schema=self.listing.schema)]))
        return units

    def _write(self, units: Iterator[pa.Table]) -> tuple[list[Location], int]:
        files: list[Location] = []
        held: list[pa.Table] = []
        num_units = 0
        for unit in units:
            held.append(unit)
            num_units += 1
            if len(held) == UNITS_PER_FILE:
                files.append(self._write_file(held))
                held = []
        if held:
            files.append(self._write_file(held))
        return files, num_units

    def _write_file(self, units: list[pa.Table]) -> Location:
        file = self.folder.join(f"units-{self._num_files:06d}.parquet")
        self._num_files += 1
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, self.listing.schema, compression="zstd") as writer:
            for unit in units:
                writer.write_table(unit, row_group_size=max(1, unit.num_rows))
        write_atomic(file, sink.getvalue().to_pybytes(), self.output.scratch)
        return file

    def count_wanted(self) -> Wanted:
        with self._connect() as connection:
            row = first_row(connection, "SELECT count(*), count(DISTINCT image_id) FROM wanted")
        return Wanted(row[1], row[0] - row[1])

    def unaccounted(self, limit: int = 10) -> tuple[int, list[str]]:
        """How many wanted ids have neither a caption nor a failure, and the first few of them."""
        lost = """
            SELECT DISTINCT image_id FROM wanted w
            WHERE NOT EXISTS (SELECT 1 FROM captions c WHERE c.image_id = w.image_id)
              AND NOT EXISTS (SELECT 1 FROM failure_log f WHERE f.image_id = w.image_id)
        """
        with self._connect() as connection:
            (count,) = first_row(connection, f"SELECT count(*) FROM ({lost})")
            names = connection.execute(f"{lost} ORDER BY image_id LIMIT {limit}").fetchall()
        return count, [name for (name,) in names]

    def unread_tars(self) -> list[str]:
        """The tars listed whose members are not known."""
        with self._connect() as connection:
            rows = connection.execute(f"SELECT DISTINCT container FROM listed WHERE {_IS_TAR}").fetchall()
        known = set(self.listing.known_tars)
        return sorted(uri for (uri,) in rows if uri not in known)

    def remove_others(self) -> None:
        """Delete the units that killed runs left; what is done is in the parts. Only for the holder of the lease."""
        plan = self.output.plan
        with storage_errors(f"removing {plan.uri}"), suppress(FileNotFoundError):
            plan.fs.invalidate_cache()
            for name in plan.fs.ls(plan.path, detail=False):
                if name.rstrip("/").rsplit("/", 1)[-1] != "listing":
                    plan.fs.rm(name, recursive=True)

    def remove(self) -> None:
        """Delete the units of this run."""
        with storage_errors(f"removing {self.folder.uri}"), suppress(FileNotFoundError):
            self.folder.fs.rm(self.folder.path, recursive=True)

    @contextmanager
    def _connect(self) -> Generator[duckdb.DuckDBPyConnection]:
        """DuckDB with the output's views, ``listed``, ``wanted`` (the images of it) and ``settled``: the ids that need no
        further attempt."""
        final = ", ".join(f"'{kind}'" for kind in FINAL_FAILURES)
        retried = ", ".join(f"'{kind}'" for kind in self.retry_failed) or "''"
        this_run = f"run_id = '{self.run_id}'"
        with self.output.connect() as connection:
            files = [*self.listing.chunks(), *self.listing.member_chunks()]
            create_view(connection, "listed", files, self.listing.schema)
            connection.execute(f"CREATE VIEW wanted AS SELECT * FROM listed WHERE NOT {_IS_TAR}")
            connection.execute(f"""
                CREATE VIEW settled AS
                SELECT image_id FROM captions
                UNION ALL
                SELECT image_id FROM failures
                WHERE error_type IN ({final}) AND (error_type NOT IN ({retried}) OR {this_run})
                UNION ALL
                SELECT image_id FROM failure_log WHERE {this_run}
                GROUP BY image_id HAVING count(*) >= {ATTEMPTS_PER_RUN}
            """)
            yield connection


_IS_TAR = "(container IS NOT NULL AND row_group IS NULL AND member IS NULL)"


def _units(reader: pa.RecordBatchReader, schema: pa.Schema, block_rows: int) -> Iterator[pa.Table]:
    """The reader's rows as units: ``block_rows`` images by URI, or whole row groups and tars of at least as many."""
    held = schema.empty_table()
    for batch in reader:
        held = pa.concat_tables([held, pa.Table.from_batches([batch]).cast(schema)]).combine_chunks()
        # What the last run of rows belongs to may go on in the next batch.
        begin = 0
        for begin, end in _cuts(held, block_rows):
            yield held.slice(begin, end - begin)
            begin = end
        held = held.slice(begin)
    if held.num_rows:
        yield held


def _cuts(rows: pa.Table, block_rows: int) -> Iterator[tuple[int, int]]:
    """Where units begin and end among ``rows``, all that is surely complete."""
    begin = 0
    for first, end, is_last in _runs(rows):
        if rows["container"][first].as_py() is None:
            while end - begin >= block_rows:
                yield begin, begin + block_rows
                begin += block_rows
        elif end - begin >= block_rows and not is_last:
            yield begin, end
            begin = end


def _runs(rows: pa.Table) -> Iterator[tuple[int, int, bool]]:
    """Runs of rows that lie in the same place: first row, end, and whether it is the last run."""
    if not rows.num_rows:
        return
    places = list(zip(*(rows[name].to_pylist() for name in _SAME_UNIT), strict=True))
    starts = [i for i, place in enumerate(places) if i == 0 or place != places[i - 1]]
    for first, end in zip(starts, [*starts[1:], rows.num_rows], strict=True):
        yield first, end, end == rows.num_rows


def remove_duplicates(output: Output) -> int:
    """Remove ids that stand in two caption parts from the newer part, replacing it under its name; how many there were.

    They come from a writer that was frozen past its lease and woke up. Of two runs the later id string is the newer.
    """
    removed = 0
    with output.connect() as connection:
        files = output.parts(output.captions)
        doubled = connection.execute("SELECT image_id FROM captions GROUP BY image_id HAVING count(*) > 1").fetchall()
    if not doubled:
        return 0
    ids = {image_id for (image_id,) in doubled}
    seen: set[str] = set()
    for file in files:
        part = pq.ParquetFile(file.path, filesystem=file.fs)
        keep = []
        for image_id in part.read(columns=["image_id"])["image_id"].to_pylist():
            keep.append(not (image_id in ids and image_id in seen))
            if image_id in ids:
                seen.add(image_id)
        if not all(keep):
            removed += keep.count(False)
            table = part.read().filter(pa.array(keep)).cast(part.schema_arrow)
            write_atomic(file, encode_parquet(table), output.scratch)
    return removed
