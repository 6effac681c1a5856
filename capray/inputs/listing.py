"""The listing of the inputs: in threads, beside the captioning, stored as it goes, taken up again after a kill.

It lies in ``_capray/plan/listing/``: chunks of plan rows, and a state that says which chunks count and what is still to be
listed behind them. Knows nothing of what was captioned.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from capray.config import CaptionConfig, SourceSettings
from capray.errors import CaprayError, DataError
from capray.inputs import Source
from capray.inputs.places import MEMBERS, plan_schema
from capray.output import Output
from capray.storage import Location, exists, list_names, read_bytes, storage_errors, write_atomic
from capray.tables import encode_parquet

NUM_LISTERS = 16
CHUNK_ROWS = 100_000
CHUNK_SECONDS = 3.0


@dataclass
class _State:
    """What is stored beside the chunks.

    Attributes:
        inputs: a digest of what is listed, and how.
        started_at: seconds since the epoch.
        pending: units to list, as [input, unit, after].
        chunks: the names of the chunks that count.
        rows, hidden: rows listed, files left out for their names.
        faults: containers that cannot be read, with the reason.
        known_tars: tars whose members are in a chunk of members.
        complete: whether everything is listed.
    """

    inputs: str
    started_at: float
    pending: list[list[Any]] = field(default_factory=list)
    chunks: list[str] = field(default_factory=list)
    member_chunks: list[str] = field(default_factory=list)
    rows: int = 0
    hidden: int = 0
    faults: dict[str, str] = field(default_factory=dict)
    known_tars: list[str] = field(default_factory=list)
    complete: bool = False


class Listing:
    """Lists ``sources`` in the background, as a context.

    Args:
        output: where it is stored.
        sources: the inputs, opened.
        config: its inputs and SourceSettings tell whether a stored listing is of the same inputs.
        relist: whether to drop a stored listing.
    """

    def __init__(self, output: Output, sources: list[Source], config: CaptionConfig, relist: bool = False):
        self.output, self.sources = output, sources
        self.folder = output.plan.join("listing")
        self.schema = plan_schema(sources[0].source_type)
        self._place = self.folder.join("state.json")
        self._state = self._stored(config, relist)
        self.resumed_at = self._state.started_at if self._state.chunks else None
        self._done_at_start = self._state.rows
        self._started = time.monotonic()
        self._units: queue.Queue[tuple[int, str, Any]] = queue.Queue()
        self._pages: queue.Queue[tuple] = queue.Queue(maxsize=4 * NUM_LISTERS)
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def _stored(self, config: CaptionConfig, relist: bool) -> _State:
        settings = config.subset(SourceSettings).model_dump()
        digest = hashlib.sha256(json.dumps([config.inputs, config.keep, settings]).encode()).hexdigest()
        if exists(self._place) and not relist:
            stored = _State(**json.loads(read_bytes(self._place)))
            if stored.inputs == digest:
                return stored
        fresh = _State(digest, time.time())
        fresh.pending = [[i, unit, None] for i, source in enumerate(self.sources) for unit in source.units()]
        return fresh

    def __enter__(self) -> Listing:
        counted = {*self._state.chunks, *self._state.member_chunks}
        others = [name for name in list_names(self.folder, ".parquet") if name not in counted]
        if others:
            # A listing that is dropped must not be taken up by a later run once its chunks are gone.
            self._save()
        for name in others:
            self.folder.fs.rm_file(self.folder.join(name).path)
        if not self._state.complete:
            for i, unit, after in self._state.pending:
                self._units.put((i, unit, after))
            targets = [self._list] * min(NUM_LISTERS, max(4, len(self._state.pending)))
            self._threads = [threading.Thread(target=target, daemon=True) for target in (*targets, self._collect)]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(1)

    @property
    def is_complete(self) -> bool:
        return self._state.complete

    @property
    def num_rows(self) -> int:
        return self._state.rows

    @property
    def num_hidden(self) -> int:
        return self._state.hidden

    @property
    def keys_per_second(self) -> float:
        return (self._state.rows - self._done_at_start) / max(1e-9, time.monotonic() - self._started)

    @property
    def faults(self) -> dict[str, str]:
        return self._state.faults

    @property
    def known_tars(self) -> list[str]:
        return self._state.known_tars

    def chunks(self) -> list[Location]:
        """The chunks stored so far."""
        return [self.folder.join(name) for name in self._state.chunks]

    def member_chunks(self) -> list[Location]:
        """The chunks of members of tars that were read to their end."""
        return [self.folder.join(name) for name in self._state.member_chunks]

    def wait(self, num_chunks: int, seconds: float) -> bool:
        """Wait until there are more than ``num_chunks`` chunks or all is listed; whether that is so.

        Raises:
            CaprayError: what stopped the listing.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._error or self._state.complete or len(self._state.chunks) > num_chunks, seconds
            )
            if self._error is not None:
                raise self._error
            return self._state.complete or len(self._state.chunks) > num_chunks

    def add_members(self, number: int, container: str, members: pa.Table) -> None:
        """Store the images of a tar of input ``number`` that was read to its end."""
        wanted = members.cast(MEMBERS)
        keep = [self.sources[number].selection.has(image_id) for image_id in wanted["image_id"].to_pylist()]
        wanted = wanted.filter(pa.array(keep, pa.bool_()))
        count = wanted.num_rows
        with self._changed:
            state = self._state
            columns = {
                "position": pa.array(range(state.rows, state.rows + count), pa.int64()),
                "input": pa.array([number] * count, pa.int16()),
                "container": pa.array([container] * count, pa.string()),
                "uri": wanted["image_id"],
            }
            table = _aligned(wanted, columns, self.schema)
            name = f"members-{len(state.member_chunks):06d}.parquet"
            write_atomic(self.folder.join(name), encode_parquet(table), self.output.scratch)
            state.member_chunks.append(name)
            state.rows += count
            state.known_tars.append(container)
            self._save()

    def remove(self) -> None:
        with storage_errors(f"removing {self.folder.uri}"):
            if self.folder.fs.exists(self.folder.path):
                self.folder.fs.rm(self.folder.path, recursive=True)

    def _save(self) -> None:
        write_atomic(self._place, json.dumps(asdict(self._state)).encode(), self.output.scratch)

    def _list(self) -> None:
        while not self._stop.is_set():
            try:
                i, unit, after = self._units.get(timeout=0.1)
            except queue.Empty:
                continue
            try:
                for page in self.sources[i].pages(unit, after):
                    self._put((i, unit, page))
                    if self._stop.is_set():
                        return
                self._put((i, unit, None))
            except DataError as error:
                self._put((i, unit, error))
            except BaseException as error:
                self._put((i, unit, error))
                return

    def _put(self, item: tuple) -> None:
        while not self._stop.is_set():
            try:
                self._pages.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def _collect(self) -> None:
        """Gather pages into chunks; the only thread that changes the state, ``add_members`` apart."""
        try:
            self._gather()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _gather(self) -> None:
        pending = {(i, unit): after for i, unit, after in self._state.pending}
        known = set(pending)
        held: list[pa.Table] = []
        num_held, hidden, last = 0, 0, time.monotonic()
        faults: dict[str, str] = {}
        while not self._stop.is_set():
            try:
                i, unit, page = self._pages.get(timeout=0.2)
            except queue.Empty:
                page = None
            else:
                if isinstance(page, DataError):
                    faults[unit] = str(page)
                    del pending[i, unit]
                elif isinstance(page, BaseException):
                    raise page if isinstance(page, CaprayError) else CaprayError(f"listing {unit!r}: {page!r}")
                elif page is None:
                    del pending[i, unit]
                else:
                    pending[i, unit] = page.after
                    hidden += page.hidden
                    rows = self.sources[i].selection.filter(page.rows)
                    if rows.num_rows:
                        held.append(
                            _aligned(rows, {"input": pa.repeat(pa.scalar(i, pa.int16()), rows.num_rows)}, self.schema)
                        )
                        num_held += rows.num_rows
                    for name in page.found:
                        if (i, name) not in known:
                            known.add((i, name))
                            pending[i, name] = None
                            self._units.put((i, name, None))
            is_due = num_held >= CHUNK_ROWS or (num_held and time.monotonic() - last >= CHUNK_SECONDS)
            if is_due or not pending:
                self._store(held, hidden, faults, pending)
                held, num_held, hidden, last, faults = [], 0, 0, time.monotonic(), {}
                if not pending:
                    return

    def _store(self, held: list[pa.Table], hidden: int, faults: dict[str, str], pending: dict) -> None:
        with self._changed:
            state = self._state
            if held:
                table = pa.concat_tables(held)
                positions = pa.array(range(state.rows, state.rows + table.num_rows), pa.int64())
                table = table.set_column(0, self.schema.field("position"), positions)
                name = f"chunk-{len(state.chunks):06d}.parquet"
                write_atomic(self.folder.join(name), encode_parquet(table), self.output.scratch)
                state.chunks.append(name)
                state.rows += table.num_rows
            state.hidden += hidden
            state.faults.update(faults)
            state.pending = [[i, unit, after] for (i, unit), after in pending.items()]
            state.complete = not pending
            self._save()
            self._changed.notify_all()


def _aligned(rows: pa.Table, others: dict[str, pa.Array], schema: pa.Schema) -> pa.Table:
    """``rows`` and ``others`` in all columns of ``schema``, missing ones null (``position`` 0)."""
    columns = {}
    for column in schema:
        if column.name in others:
            columns[column.name] = others[column.name]
        elif column.name in rows.column_names:
            columns[column.name] = rows[column.name].cast(column.type)
        elif column.name == "position":
            columns[column.name] = pa.repeat(pa.scalar(0, pa.int64()), rows.num_rows)
        else:
            columns[column.name] = pa.nulls(rows.num_rows, column.type)
    return pa.table(columns, schema=schema)
