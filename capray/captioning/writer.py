"""The single writer: rows in, parts out. Each part is encoded whole in memory and published in one atomic step, in a thread
beside the taking of results.

A part is cut by rows, by bytes, or by the age of its oldest row. A cut publishes its captions before its failures, so an
image is never shown as failed while the caption that mends it is on its way.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from capray.captioning.lease import Lease
from capray.captioning.rows import results_schema
from capray.errors import WriteUnanswered
from capray.output import Output
from capray.storage import Location, Write, write_atomic
from capray.tables import FAILURES, captions_schema, encode_parquet

MAX_PART_BYTES = 64 * 2**20
"""Most bytes of a part in memory, so that its write ends within the lease's margin."""
_WRITES = 3
"""How often bytes are sent whose arrival was not confirmed."""


class FencedWrites:
    """Writes under an output while this run surely holds its lease, each within the lease's margin.

    One that went unanswered is sent again under the same name with the same bytes, after the lease was renewed. From the
    second on none makes the output's folder anew, which somebody may have moved away.
    """

    def __init__(self, output: Output, lease: Lease):
        self.output, self.lease = output, lease
        self._has_begun = False

    def __call__(self, location: Location, data: bytes) -> None:
        """Publish ``data`` under ``location``.

        Raises:
            LeaseHeldError: the lease is lost.
            StorageError: the store refuses, or never answered.
        """
        for attempt in range(_WRITES):
            deadline = self.lease.check()
            try:
                beside = self.output.private if self._has_begun else None
                write_atomic(location, data, self.output.scratch, deadline, beside)
                self._has_begun = True
                return
            except WriteUnanswered:
                if attempt == _WRITES - 1:
                    raise


@dataclass(frozen=True)
class _Part:
    """A part cut and encoded; what of it was published already is written again with the same bytes."""

    files: list[tuple[Location, bytes]]
    num_captions: int
    failures: Counter[str]


class PartWriter:
    """Collects results and publishes them as parts of one run.

    Holds at most the rows of one open part and the bytes of one in flight.

    Args:
        output: where to.
        run_id: this run, in every row and every part's name.
        part_rows, part_seconds: when a part is cut.
        write: publishes bytes; raises when this run may not write.
        newest_failure: microseconds since the epoch, of the newest row in the output's failure log: no row precedes it,
            whatever this machine's clock says.
        clock: seconds, monotonic.
        source_type, attention: the columns the captions have besides those they always have.
    """

    def __init__(
        self,
        output: Output,
        run_id: str,
        part_rows: int,
        part_seconds: float,
        write: Write,
        newest_failure: int = 0,
        clock: Callable[[], float] = time.monotonic,
        source_type: pa.DataType | None = None,
        attention: bool = False,
    ):
        self.output, self.run_id = output, run_id
        self.part_rows, self.part_seconds = part_rows, part_seconds
        self.write, self.clock = write, clock
        self.num_captions = self.num_parts = 0
        self.failures: Counter[str] = Counter()
        self._newest_failure = newest_failure
        self._sequence = 0
        self._results = results_schema(source_type, attention)
        self._captions = captions_schema(source_type, attention)
        self._held = self._results.empty_table()
        self._oldest = 0.0
        self._pool = ThreadPoolExecutor(1, "parts")
        self._part: _Part | None = None
        self._publishing: Future[None] | None = None

    def add(self, results: pa.Table) -> None:
        """Take rows of ``results_schema``, and cut the parts they fill."""
        if not self._held.num_rows:
            self._oldest = self.clock()
        self._held = pa.concat_tables([self._held, results.cast(self._results)])
        while self._held.num_rows >= self.part_rows or self._held.nbytes >= MAX_PART_BYTES:
            self._cut()
            self._oldest = self.clock()
        self.tick()

    def add_failures(self, rows: list[dict]) -> None:
        """Take failures as rows: image_id, uri, error_type, message."""
        self.add(pa.Table.from_pylist(rows, self._results))

    def tick(self) -> None:
        """Cut what is held if its oldest row is old enough; raise what publishing in the background has met."""
        if self._publishing is not None and self._publishing.done():
            self._settle()
        if self._held.num_rows and self.clock() - self._oldest >= self.part_seconds:
            self._cut()

    def flush(self) -> None:
        """Publish what is held. What publishing has failed on before is tried once more."""
        if self._publishing is not None:
            self._publishing.exception()
            self._publishing = None
        if self._part is not None:
            self._publish(self._part)
        while self._held.num_rows:
            self._cut()
            self._settle()

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=False)

    def _settle(self) -> None:
        """Wait until what is in flight is published."""
        publishing, self._publishing = self._publishing, None
        if publishing is not None:
            publishing.result()
        if self._part is not None:
            self._publish(self._part)

    def _cut(self) -> None:
        self._settle()
        size = min(self.part_rows, max(1, int(self._held.num_rows * MAX_PART_BYTES / max(1, self._held.nbytes))))
        rows = self._held.slice(0, size)
        name = self.output.new_part_name(self.run_id, self._sequence)
        failed = pc.field("error_type").is_valid()
        captions = self._with_run(rows.filter(~failed), self._captions)
        failures = rows.filter(failed)
        files = []
        if captions.num_rows:
            files.append((self.output.captions.join(name), encode_parquet(captions)))
        if failures.num_rows:
            table = self._with_run(failures.append_column("failed_at", self._times(failures.num_rows)), FAILURES)
            files.append((self.output.failures.join(name), encode_parquet(table)))
        self._part = _Part(files, captions.num_rows, Counter(failures["error_type"].to_pylist()))
        self._sequence += 1
        self._held = self._held.slice(rows.num_rows)
        self._publishing = self._pool.submit(self._publish, self._part)

    def _times(self, count: int) -> pa.Array:
        """Increasing times of failure, later than all before."""
        first = max(time.time_ns() // 1000, self._newest_failure + 1)
        self._newest_failure = first + count - 1
        return pa.array(range(first, first + count), pa.int64()).cast(FAILURES.field("failed_at").type)

    def _publish(self, part: _Part) -> None:
        for location, data in part.files:
            self.write(location, data)
        self.num_captions += part.num_captions
        self.failures.update(part.failures)
        self.num_parts += len(part.files)
        self._part = None

    def _with_run(self, rows: pa.Table, schema: pa.Schema) -> pa.Table:
        run = pa.array([self.run_id] * rows.num_rows, pa.string())
        columns = {name: rows[name] for name in schema.names if name != "run_id"} | {"run_id": run}
        return pa.table({name: columns[name] for name in schema.names}, schema=schema)
