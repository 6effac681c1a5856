"""What is wanted and what of it is still to be done, computed out of core from the parts themselves.

The wanted images are listed once per run into ``_capray/plan/<run_id>/``. Each pass subtracts what the parts hold by then
and writes what is left as files of small row groups: one row group is one block of work.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from capray.captioning.rows import PLAN
from capray.output import Output, create_view, first_row
from capray.storage import Location, storage_errors, write_atomic
from capray.tables import CAPTIONS, FINAL_FAILURES, encode_parquet

MAX_BLOCK_ROWS = 512
BLOCKS_PER_FILE = 100
ATTEMPTS_PER_RUN = 2
"""A transient failure is tried once more in the same run."""


@dataclass(frozen=True)
class Work:
    """A pass's images, as files of row groups of ``block_rows`` rows (the last of all may be shorter)."""

    files: list[Location]
    num_images: int
    block_rows: int

    @property
    def num_blocks(self) -> int:
        return -(-self.num_images // self.block_rows)

    def block(self, index: int) -> tuple[str, int]:
        """The path and row group of block ``index``."""
        return self.files[index // BLOCKS_PER_FILE].path, index % BLOCKS_PER_FILE


@dataclass(frozen=True)
class Wanted:
    """How many images the source listed, and how many of the rows repeat an id."""

    images: int
    duplicates: int


class Plan:
    """The plan of one run on ``output``."""

    def __init__(self, output: Output, run_id: str, retry_failed: bool):
        self.output = output
        self.run_id = run_id
        self.folder = output.plan.join(run_id)
        self.retry_failed = retry_failed
        self._wanted: list[Location] = []

    def list_wanted(self, chunks: Iterable[pa.Table]) -> Iterator[int]:
        """Store the source's listing, yielding how many rows are listed so far."""
        listed = 0
        for chunk in chunks:
            file = self.folder.join(f"wanted-{len(self._wanted):05d}.parquet")
            write_atomic(file, encode_parquet(chunk), self.output.scratch)
            self._wanted.append(file)
            listed += chunk.num_rows
            yield listed

    def count_wanted(self) -> Wanted:
        with self._connect() as connection:
            row = first_row(connection, "SELECT count(*), count(DISTINCT image_id) FROM wanted")
        return Wanted(row[1], row[0] - row[1])

    def remaining(self, pass_number: int, batch_size: int, num_parallel: Callable[[], int]) -> Work:
        """Store and return what is neither captioned nor settled as failed, each id once, in the source's order.

        Blocks are small enough that ``num_parallel()`` actors (asked only when there is work) share a short job, and
        never above MAX_BLOCK_ROWS.
        """
        with self._connect() as connection:
            todo = """
                SELECT * FROM wanted w
                WHERE NOT EXISTS (SELECT 1 FROM settled s WHERE s.image_id = w.image_id)
                QUALIFY row_number() OVER (PARTITION BY image_id ORDER BY position) = 1
            """
            connection.execute(f"CREATE TABLE todo AS {todo}")
            (num_images,) = first_row(connection, "SELECT count(*) FROM todo")
            if not num_images:
                return Work([], 0, 1)
            share = -(-num_images // (4 * num_parallel()))
            block_rows = min(MAX_BLOCK_ROWS, -(-share // batch_size) * batch_size)
            reader = connection.sql("SELECT * FROM todo ORDER BY position").to_arrow_reader(
                block_rows * BLOCKS_PER_FILE
            )
            files = []
            for number, table in enumerate(_rebatched(reader, block_rows * BLOCKS_PER_FILE)):
                file = self.folder.join(f"pass-{pass_number}-{number:05d}.parquet")
                write_atomic(file, encode_parquet(table, row_group_size=block_rows), self.output.scratch)
                files.append(file)
        return Work(files, num_images, block_rows)

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

    def remove(self) -> None:
        """Delete this plan and what killed runs left of theirs; what is done is in the parts."""
        with storage_errors(f"removing {self.output.plan.uri}"), suppress(FileNotFoundError):
            self.output.plan.fs.rm(self.output.plan.path, recursive=True)

    @contextmanager
    def _connect(self) -> Generator[duckdb.DuckDBPyConnection]:
        """DuckDB with the output's views, ``wanted``, and ``settled``: the ids that need no further attempt."""
        final = ", ".join(f"'{kind}'" for kind in FINAL_FAILURES)
        this_run = f"run_id = '{self.run_id}'"
        with self.output.connect() as connection:
            create_view(connection, "wanted", self._wanted, PLAN)
            connection.execute(f"""
                CREATE VIEW settled AS
                SELECT image_id FROM captions
                UNION ALL
                SELECT image_id FROM failures
                WHERE error_type IN ({final}) AND {this_run if self.retry_failed else "true"}
                UNION ALL
                SELECT image_id FROM failure_log WHERE {this_run}
                GROUP BY image_id HAVING count(*) >= {ATTEMPTS_PER_RUN}
            """)
            yield connection


def _rebatched(reader: pa.RecordBatchReader, rows: int) -> Iterator[pa.Table]:
    """The reader's rows as tables of exactly ``rows`` rows, the last one shorter."""
    held = PLAN.empty_table()
    for batch in reader:
        held = pa.concat_tables([held, pa.Table.from_batches([batch]).cast(PLAN)])
        while held.num_rows >= rows:
            yield held.slice(0, rows)
            held = held.slice(rows)
    if held.num_rows:
        yield held


def remove_duplicates(output: Output) -> int:
    """Remove ids that stand in two caption parts from the newer part, replacing it under its name; how many there were.

    They come from a writer that was frozen past its lease and woke up. Of two runs the later id string is the newer.
    """
    removed = 0
    with output.connect() as connection:
        files = output.parts(output.captions)
        if len(files) < 2:
            return 0
        doubled = connection.execute("SELECT image_id FROM captions GROUP BY image_id HAVING count(*) > 1").fetchall()
    if not doubled:
        return 0
    ids = {image_id for (image_id,) in doubled}
    seen: set[str] = set()
    for file in files:
        table = pq.read_table(file.path, filesystem=file.fs).cast(CAPTIONS)
        keep = []
        for image_id in table["image_id"].to_pylist():
            keep.append(not (image_id in ids and image_id in seen))
            if image_id in ids:
                seen.add(image_id)
        if not all(keep):
            removed += keep.count(False)
            write_atomic(file, encode_parquet(table.filter(pa.array(keep))), output.scratch)
    return removed
