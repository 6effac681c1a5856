"""A captioning output folder: where its files lie, and DuckDB over them. The layout is in docs/tables.md.

Knows which rows are current; knows nothing of Ray, models or how the rows came to be.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from capray.errors import ConfigError, DataError, StorageError, StorageUnavailable
from capray.storage import Location, exists, list_names, locate, read_bytes, storage_errors
from capray.tables import CAPTIONS, FAILURES, SCHEMA_VERSION

if TYPE_CHECKING:
    import duckdb

Table = Literal["captions", "failures", "failure_log"]

MEMORY_LIMIT = "2GB"
MEND_PART = "put it back from a copy, or delete it and give the same command of capray caption, which does its images anew"
"""What to do about a damaged part."""
_PASSES = re.compile(r"(OSError|StorageUnavailable|HTTPClientError|\w*(Connect|Timeout|Disconnected)\w*):|.*\bexpired\b")
"""What a registered filesystem raised and may not raise again."""
_PART = re.compile(r"/part-[^/]*\.parquet")
_CURRENT_FAILURES = """
SELECT f.* FROM failure_log f
WHERE NOT EXISTS (SELECT 1 FROM captions c WHERE c.image_id = f.image_id)
QUALIFY row_number() OVER (PARTITION BY f.image_id ORDER BY f.failed_at DESC, f.run_id DESC) = 1
"""


class Output:
    """The folder a captioning job writes, local or on S3."""

    def __init__(self, uri: str):
        self.root = locate(uri)
        self.captions = self.root.join("captions")
        self.failures = self.root.join("failures")
        self.private = self.root.join("_capray")
        self.job = self.private.join("job.json")
        self.runs = self.private.join("runs")
        self.versions = self.private.join("versions")
        self.plan = self.private.join("plan")
        self.scratch = self.private.join("tmp")

    @staticmethod
    def new_run_id() -> str:
        """The id of a run that begins now; of two runs the later id string is the newer."""
        now = datetime.now(UTC)
        return f"{now:%Y%m%dT%H%M%S}-{now.microsecond:05x}{secrets.randbelow(16**3):03x}"

    @staticmethod
    def new_part_name(run_id: str, number: int) -> str:
        """The name of the part that a run writes after ``number`` others."""
        return f"part-{run_id}-{number:05d}.parquet"

    def read_job(self) -> dict[str, Any] | None:
        """What job.json says; None when nothing was ever written here.

        Raises:
            DataError: it is damaged.
            ConfigError: a later capray wrote it.
        """
        if not exists(self.job):
            return None
        try:
            job = json.loads(read_bytes(self.job))
            version = int(job["schema_version"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.job.uri} is damaged ({error!r}): put it back, or choose another output") from error
        if version > SCHEMA_VERSION:
            raise ConfigError(
                f"{self.root.uri!r} has schema version {job['schema_version']}, this capray reads up to "
                f"{SCHEMA_VERSION}: upgrade capray"
            )
        return job

    def last_inputs(self) -> dict[str, str]:
        """The inputs of the last run that opened its own, and as what kind each was read, "" where that is not known; none
        when nothing is known of any."""
        for name in reversed(list_names(self.runs, ".json")):
            with suppress(ValueError, KeyError, TypeError):
                record = json.loads(read_bytes(self.runs.join(name)))
                inputs = [record["settings"]["input"], *record["settings"].get("also", ())]
                return dict(zip_longest(inputs, record.get("kinds", ())[: len(inputs)], fillvalue=""))
        return {}

    def last_model(self) -> str | None:
        """Where the last run had its captioner; None when nothing is known of any."""
        for name in reversed(list_names(self.runs, ".json")):
            with suppress(ValueError, KeyError, TypeError):
                return str(json.loads(read_bytes(self.runs.join(name)))["settings"]["model"])
        return None

    def parts(self, folder: Location) -> list[Location]:
        """The parts published in ``captions`` or ``failures`` now, oldest run first."""
        return [folder.join(name) for name in list_names(folder, ".parquet") if name.startswith("part-")]

    @contextmanager
    def connect(
        self, tables: tuple[Table, ...] = ("captions", "failures"), *others: Location
    ) -> Generator[duckdb.DuckDBPyConnection]:
        """DuckDB with views over the parts there are now: ``captions``, ``failure_log``, and ``failures`` (each id's latest,
        while it has no caption; with it come the other two). It also reads the filesystems of ``others``.

        Raises:
            StorageError: a part cannot be read.
        """
        wants_failures = "failures" in tables
        with tempfile.TemporaryDirectory() as temporary, open_duckdb(temporary, self.root, *others) as connection:
            if wants_failures or "captions" in tables:
                create_view(connection, "captions", self.parts(self.captions), CAPTIONS)
            if wants_failures or "failure_log" in tables:
                create_view(connection, "failure_log", self.parts(self.failures), FAILURES)
            if wants_failures:
                connection.execute(f"CREATE VIEW failures AS {_CURRENT_FAILURES}")
            yield connection


def require_output(uri: str) -> Output:
    """The output at ``uri``; ConfigError when no captioning job ever wrote there."""
    output = Output(uri)
    if output.read_job() is None:
        raise ConfigError(f"{uri!r} is no captioning output: it has no _capray/job.json (capray caption writes one)")
    return output


@contextmanager
def open_duckdb(temporary: str, *places: Location, database: str = ":memory:") -> Generator[duckdb.DuckDBPyConnection]:
    """A DuckDB connection that reads the filesystems of ``places``, spills to ``temporary`` beyond MEMORY_LIMIT and
    downloads no extensions."""
    import duckdb

    settings: dict[str, str | float | list[str]] = {
        "memory_limit": MEMORY_LIMIT,
        "temp_directory": temporary,
        "autoinstall_known_extensions": "false",
        "TimeZone": "UTC",
    }
    remote = {type(place.fs): place.fs for place in places if not place.is_local}
    reading = f"reading {', '.join(place.uri for place in places)}"
    with duckdb.connect(database, config=settings) as connection, _stopped_by_signals(connection), duckdb_errors(reading):
        for fs in remote.values():
            connection.register_filesystem(fs)
        yield connection


@contextmanager
def _stopped_by_signals(connection: duckdb.DuckDBPyConnection) -> Generator[None]:
    """Ctrl-C and SIGTERM stop the query that runs: Python's own handlers wait until it returns."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def interrupt() -> None:
        while number := reader.recv(1):
            if number[0] in (signal.SIGINT, signal.SIGTERM):
                connection.interrupt()

    watcher = threading.Thread(target=interrupt, daemon=True)
    watcher.start()
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()
        watcher.join()
        reader.close()


@contextmanager
def duckdb_errors(doing: str) -> Generator[None]:
    """Turn what DuckDB and the filesystems raise while ``doing`` something into a StorageError that says so."""
    import duckdb

    with storage_errors(doing):
        try:
            yield
        except (duckdb.IOException, duckdb.InvalidInputException, duckdb.OutOfMemoryException) as error:
            is_of_part = isinstance(error, duckdb.InvalidInputException) and _PART.search(str(error))
            raise StorageError(f"{doing}: {error}{f': {MEND_PART}' if is_of_part else ''}") from error
        except duckdb.Error as error:
            if type(error) is not duckdb.Error:
                raise
            # What a registered filesystem raised: an error of no kind, whose message is the traceback, then the query.
            why = str(error).partition("\n\nLINE ")[0].strip().splitlines()[-1]
            if _PASSES.match(why):
                raise StorageUnavailable(f"{doing}: {why}: run the same command again when the store answers") from error
            raise StorageError(f"{doing}: {why}") from error


def create_view(connection: duckdb.DuckDBPyConnection, name: str, files: list[Location], schema: pa.Schema) -> None:
    """A view over Parquet ``files`` of one schema; over no rows of ``schema`` where there are none.

    The empty table is a file too: one of Arrow's would have DuckDB import pandas, which takes a second and loses a Ctrl-C.
    """
    if not files:
        (temporary,) = first_row(connection, "SELECT current_setting('temp_directory')")
        os.makedirs(temporary, exist_ok=True)
        files = [locate(temporary).join(f"no_{name}.parquet")]
        pq.write_table(schema.empty_table(), files[0].path)
    connection.execute(f"CREATE VIEW {name} AS SELECT * FROM {parquet_files(files)}")


def parquet_files(files: list[Location], *options: str) -> str:
    """Parquet ``files`` as a table in DuckDB's SQL, read with further ``options`` (``filename``, ``union_by_name``)."""
    listed = ", ".join(quoted(duckdb_path(file)) for file in files)
    return f"read_parquet([{listed}], hive_partitioning = false{''.join(f', {option} = true' for option in options)})"


def quoted(text: str) -> str:
    """``text`` as a string in SQL."""
    return "'" + text.replace("'", "''") + "'"


def first_row(connection: duckdb.DuckDBPyConnection, sql: str) -> tuple[Any, ...]:
    """The first row of a query's answer, read to its end: DuckDB keeps a connection busy until then."""
    return connection.execute(sql).fetchall()[0]


def duckdb_path(file: Location) -> str:
    """``file`` as DuckDB names it: with the protocol its registered filesystem answers to."""
    if file.is_local:
        return file.path
    protocol = file.fs.protocol if isinstance(file.fs.protocol, str) else file.fs.protocol[0]
    return f"{protocol}://{file.path}"
