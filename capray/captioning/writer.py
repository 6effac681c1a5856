"""The single writer: rows in, parts out. Each part is encoded whole in memory and published in one atomic step.

A part is cut by rows or by the age of its oldest row. A cut publishes its captions before its failures, so an image is
never shown as failed while the caption that mends it is on its way.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

from capray.captioning.rows import results_schema
from capray.output import Output
from capray.storage import Location, write_atomic
from capray.tables import FAILURES, captions_schema, encode_parquet


class PartWriter:
    """Collects results and publishes them as parts of one run.

    Args:
        output: where to.
        run_id: this run, in every row and every part's name.
        part_rows, part_seconds: when a part is cut.
        before_publish: called before each publish; raises when this run may not write (its lease is lost).
        clock: seconds, monotonic.
        source_type, attention: the columns the captions have besides those they always have.
    """

    def __init__(
        self,
        output: Output,
        run_id: str,
        part_rows: int,
        part_seconds: float,
        before_publish: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        source_type: pa.DataType | None = None,
        attention: bool = False,
    ):
        self.output, self.run_id = output, run_id
        self.part_rows, self.part_seconds = part_rows, part_seconds
        self.before_publish, self.clock = before_publish, clock
        self.num_captions = self.num_parts = 0
        self.failures: Counter[str] = Counter()
        self._sequence = 0
        self._results = results_schema(source_type, attention)
        self._captions = captions_schema(source_type, attention)
        self._held = self._results.empty_table()
        self._oldest = 0.0

    @property
    def num_held(self) -> int:
        return self._held.num_rows

    def add(self, results: pa.Table) -> None:
        """Take RESULTS rows, and publish the parts they fill."""
        if not self._held.num_rows:
            self._oldest = self.clock()
        self._held = pa.concat_tables([self._held, results.cast(self._results)])
        while self._held.num_rows >= self.part_rows:
            self._publish()
            self._oldest = self.clock()
        self.tick()

    def tick(self) -> None:
        """Publish what is held if its oldest row is old enough."""
        if self._held.num_rows and self.clock() - self._oldest >= self.part_seconds:
            self.flush()

    def flush(self) -> None:
        """Publish what is held."""
        while self._held.num_rows:
            self._publish()

    def _publish(self) -> None:
        """Cut a part and publish it. When that fails its rows stay held, and the next cut replaces what is there of it."""
        rows = self._held.slice(0, self.part_rows)
        name = f"part-{self.run_id}-{self._sequence:05d}.parquet"
        failed = pc.field("error_type").is_valid()
        captions = self._with_run(rows.filter(~failed), self._captions)
        failures = rows.filter(failed)
        if captions.num_rows:
            self._write(self.output.captions.join(name), captions)
        if failures.num_rows:
            now = pa.array([time.time_ns() // 1000] * failures.num_rows, FAILURES.field("failed_at").type)
            table = self._with_run(failures.append_column("failed_at", now), FAILURES)
            self._write(self.output.failures.join(name), table)
        self.num_captions += captions.num_rows
        self.failures.update(failures["error_type"].to_pylist())
        self.num_parts += (captions.num_rows > 0) + (failures.num_rows > 0)
        self._sequence += 1
        self._held = self._held.slice(rows.num_rows)

    def _write(self, part: Location, table: pa.Table) -> None:
        data = encode_parquet(table)
        self.before_publish()
        write_atomic(part, data, self.output.scratch)

    def _with_run(self, rows: pa.Table, schema: pa.Schema) -> pa.Table:
        run = pa.array([self.run_id] * rows.num_rows, pa.string())
        columns = {name: rows[name] for name in schema.names if name != "run_id"} | {"run_id": run}
        return pa.table({name: columns[name] for name in schema.names}, schema=schema)
