"""What of the listing is still to be done, computed by hashes of ids, out of core, and written as units.

Knows nothing of how images are read, nor of what a failure means.
"""

from __future__ import annotations

import posixpath
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capray.captioning.container_versions import ContainerVersions
from capray.captioning.settled import ID, TAR, Settled, insert
from capray.captioning.units import UnitFiles, Work
from capray.errors import ConfigError, StorageError
from capray.inputs.base import lists_uris, may_have_other_ids
from capray.inputs.listing import ALL_ROWS, Listing
from capray.output import Output, duckdb_errors, first_row, parquet_files
from capray.storage import Location, Write, read_bytes
from capray.tables import FINAL_FAILURES, decode_parquet

if TYPE_CHECKING:
    import duckdb

CHUNKS_AT_ONCE = 10
"""Chunks of the listing whose ids are sorted together."""
_FOREVER = 253402300799.0
"""The end of the year 9999 in seconds since the epoch: later than any failure."""


@dataclass(frozen=True)
class Wanted:
    """How many images are wanted, how many further rows of the inputs repeat one, and how many captions are of tables or
    shards that have changed since.

    Attributes:
        elsewhere: captions under these ids that are of images at other URIs than are listed.
        first_elsewhere: the id of the first, where its image was, and where it is listed now.
    """

    images: int
    duplicates: int
    kept: int
    elsewhere: int = 0
    first_elsewhere: tuple[str, str, str] | None = None


@dataclass(frozen=True)
class _Chunk:
    """A chunk that was taken in, and the positions of its rows."""

    file: Location
    begin: int
    end: int


class Plan:
    """The plan of one run on ``output``: what is listed, less what is settled.

    In the connection of ``settled`` it keeps these tables of what was taken in of the listing:

    listed (position, id, container, is_tar, folder, uri): the rows. ``container`` is a number; ``folder`` that of the
        manifest, where there are several folders of them and the id is a path below it; ``uri`` the hash of the URI, where
        ids need not be URIs.
    counted: the rows of ``listed`` that count.
    containers (number, since, is_read, changed_at, name, noticed_at, modified_at, same_since): those of which something is
        known. Rows before the position ``since`` do not count; ``is_read`` is of tars whose members are known;
        ``changed_at`` when it changed. Of one that may be another than when an image failed: when that was noticed, when it
        was last written, and the number of the run since which it is as now.
    runs (run_id, run): the runs' numbers.

    Attributes:
        versions: of the containers; a run is to record them.
    """

    def __init__(self, output: Output, run_id: str, listing: Listing, settled: Settled, write: Write):
        self.output, self.run_id, self.listing, self.settled, self.write = output, run_id, listing, settled, write
        self._chunks: dict[str, _Chunk] = {}
        self._containers: dict[tuple[int, str], int] = {}
        self._manifests: set[tuple[int, str]] = set()
        lists = [uri for source in listing.sources if lists_uris(source) for uri in source.units()]
        folders = sorted({posixpath.dirname(uri) for uri in lists})
        self._folders = folders if len(folders) > 1 else []
        self._has_uris = any(may_have_other_ids(source) for source in listing.sources)
        self._modified = {
            (number, uri): at for number, source in enumerate(listing.sources) for uri, at in source.modified().items()
        }
        self.versions = ContainerVersions(output, listing.sources)
        self._num_files = 0

    def fresh(self, chunks: list[Location], block_rows: int, limit: int | None = None) -> Work:
        """What is to be done of the ``chunks`` that were not taken in before, less what this run has attempted."""
        attempted = f"ANTI JOIN (SELECT id FROM failed WHERE run_id = '{self.run_id}') USING (id)"
        with self._updated(chunks) as new:
            self._retry_what_is_listed_elsewhere()
            return self._work(new, attempted, block_rows, limit)

    def remaining(self, block_rows: int, limit: int | None = None, given_up: frozenset[str] = frozenset()) -> Work:
        """What of the whole listing is neither captioned nor settled as failed, but for the containers ``given_up``."""
        with self._updated(given_up=given_up):
            self._retry_what_is_listed_elsewhere()
            return self._work(list(self._chunks.values()), "", block_rows, limit)

    def count_wanted(self) -> Wanted:
        rows = images = 0
        with self._updated():
            for condition in self._slices():
                number, different = self._ask(f"""
                    SELECT coalesce(sum(number), 0)::BIGINT, count(*) FROM (
                        SELECT count(*) AS number FROM counted WHERE NOT is_tar AND {condition} GROUP BY id
                    )""")
                rows, images = rows + number, images + different
            return Wanted(images, rows - images, self._count_kept(), *self._elsewhere())

    def wholly_failed(self) -> dict[str, int]:
        """How many of the listed images have failed, by the kind of their latest failure, most first; {} if one is
        captioned."""
        with self._updated([]):
            (is_any_captioned,) = self._ask("SELECT EXISTS (SELECT 1 FROM counted SEMI JOIN captioned USING (id))")
            if is_any_captioned:
                return {}
            return dict(
                self._connection.execute("""
                    SELECT error_type, count(*) AS number FROM latest SEMI JOIN counted USING (id)
                    GROUP BY ALL ORDER BY number DESC, error_type""").fetchall()
            )

    def _count_kept(self) -> int:
        """The captions that are older than the last change of the container that lists their image."""
        parts = self.output.parts(self.output.captions)
        if not self.listing.changed or not parts:
            return 0
        (number,) = self._ask(f"""
            SELECT count(DISTINCT id) FROM (SELECT {ID} AS id, captioned_at FROM {parquet_files(parts)})
            JOIN (
                SELECT id, max(changed_at) AS changed_at FROM counted JOIN containers ON number = container GROUP BY id
            ) USING (id)
            WHERE captioned_at < to_timestamp(changed_at)""")
        return number

    def _elsewhere(self) -> tuple[int, tuple[str, str, str] | None]:
        """The captions of listed ids whose image was at none of the URIs listed for them: how many, and the first."""
        parts = self.output.parts(self.output.captions)
        if not self._has_uris or not parts:
            return 0, None
        number, first = self._ask(f"""
            SELECT count(*), min({{position: position, image_id: image_id, uri: uri}}) FROM (
                SELECT image_id, any_value(done.uri) AS uri, min(position) AS position
                FROM (SELECT {ID} AS id, image_id, uri FROM {parquet_files(parts)} WHERE uri IS NOT NULL) AS done
                JOIN (SELECT * FROM counted WHERE uri IS NOT NULL) AS listed USING (id)
                GROUP BY image_id HAVING NOT bool_or(hash(done.uri) = listed.uri)
            )""")
        if not number:
            return 0, None
        (now,) = self._values_at("uri", [first["position"]])
        return number, (first["image_id"], first["uri"], now)

    def unaccounted(self, limit: int = 10) -> tuple[int, list[str]]:
        """How many wanted ids have neither a caption nor a failure, and the first few of them."""
        count, first = 0, []
        with self._updated():
            for condition in self._slices():
                number, positions = self._ask(f"""
                    SELECT count(*), min(position, {limit}) FROM (
                        SELECT id, min(position) AS position FROM counted WHERE NOT is_tar AND {condition} GROUP BY id
                    ) ANTI JOIN captioned USING (id) ANTI JOIN failed USING (id)""")
                count, first = count + number, first + (positions or [])
        return count, self._values_at("image_id", sorted(first)[:limit])

    def unread_tars(self) -> list[str]:
        """The tars whose members are not known."""
        with self._updated():
            rows = self._connection.execute("SELECT DISTINCT container FROM counted WHERE is_tar").fetchall()
        names = {number: name for (_, name), number in self._containers.items()}
        return sorted({names[number] for (number,) in rows})

    def current_failures(self) -> dict[str, int]:
        """How many images have failed, by the kind of their latest failure."""
        with self._updated([]):
            rows = self._connection.execute("SELECT error_type, count(*) FROM current_failures GROUP BY ALL ORDER BY ALL")
            return dict(rows.fetchall())

    # What is listed.

    @property
    def _connection(self) -> duckdb.DuckDBPyConnection:
        return self.settled.connection

    def _ask(self, sql: str) -> tuple:
        return first_row(self._connection, sql)

    def _slices(self) -> list[str]:
        return self.settled.slices(max(self.listing.num_rows, self.settled.num_captions))

    @contextmanager
    def _updated(
        self, chunks: list[Location] | None = None, given_up: frozenset[str] = frozenset()
    ) -> Generator[list[_Chunk]]:
        """With the tables as output and listing are now, ``chunks`` or all being taken in: those that are new."""
        self.listing.flush()
        self.settled.refresh()
        with duckdb_errors(f"planning for {self.output.root.uri}"):
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS listed "
                "(position BIGINT, id UHUGEINT, container INTEGER, is_tar BOOLEAN, folder INTEGER, uri UBIGINT)"
            )
            if chunks is None:
                chunks = [*self.listing.chunks(), *self.listing.member_chunks()]
            new = self._take_in([file for file in chunks if file.path not in self._chunks])
            self._update_containers(given_up)
            if new and self._folders:
                self._refuse_files_of_one_id()
            yield new

    def _take_in(self, files: list[Location]) -> list[_Chunk]:
        self.settled.check_room(self.listing.num_rows - sum(chunk.end - chunk.begin for chunk in self._chunks.values()))
        new: list[_Chunk] = []
        for begin in range(0, len(files), CHUNKS_AT_ONCE):
            batches = (batch for file in files[begin : begin + CHUNKS_AT_ONCE] for batch in self._rows(file, new))
            # Sorted, so that a slice of the hashes lies together.
            columns = f"position, {ID} AS id, container, is_tar, folder, CASE WHEN uri IS NOT NULL THEN hash(uri) END"
            sql = f"INSERT INTO listed SELECT {columns} FROM incoming ORDER BY id"
            insert(self._connection, sql, _TAKEN, batches)
        self._chunks |= {chunk.file.path: chunk for chunk in new}
        return new

    def _rows(self, file: Location, taken: list[_Chunk]) -> Iterator[pa.RecordBatch]:
        """The rows of a chunk as _TAKEN; the chunk is added to those ``taken``."""
        with _read(file) as rows:
            begin = rows.read_row_group(0, columns=["position"])["position"][0].as_py()
            columns = ["position", "input", "image_id", "kind", "container", *(["uri"] if self._has_uris else [])]
            yield from map(self._taken, rows.iter_batches(columns=columns))
        taken.append(_Chunk(file, begin, begin + rows.metadata.num_rows))

    def _taken(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        is_tar = pc.equal(rows["kind"], "tar")  # ty: ignore[missing-attribute]
        uris = rows["uri"] if self._has_uris else pa.nulls(rows.num_rows, pa.string())
        columns = [rows["position"], rows["image_id"], self._numbers(rows), is_tar, self._folders_of(rows), uris]
        return pa.record_batch(columns, schema=_TAKEN)

    def _folders_of(self, rows: pa.RecordBatch) -> pa.Array:
        """The folders, by number, of manifests in which the ids of ``rows`` are paths below them."""
        if not self._folders:
            return pa.nulls(rows.num_rows, pa.int32())
        names = rows["container"].dictionary_encode()
        folders = pa.array(map(posixpath.dirname, names.dictionary.to_pylist()), pa.string()).take(names.indices)
        numbers = pc.index_in(folders, pa.array(self._folders))  # ty: ignore[missing-attribute]
        whole = pc.binary_join_element_wise(folders, rows["image_id"], "/")  # ty: ignore[missing-attribute]
        return pc.if_else(pc.equal(whole, rows["uri"]), numbers, None)  # ty: ignore[missing-attribute]

    def _refuse_files_of_one_id(self) -> None:
        """Raise ConfigError when manifests in different folders name two files by one relative URI, which is their id."""
        for condition in self._slices():
            clash = self._connection.execute(f"""
                SELECT min(position), arg_min(container, folder), arg_max(container, folder) FROM counted
                WHERE folder IS NOT NULL AND {condition}
                GROUP BY id HAVING min(folder) <> max(folder) ORDER BY ALL LIMIT 1""").fetchall()
            for position, *numbers in clash:
                names = {number: name for (_, name), number in self._containers.items()}
                first, second = (names[number] for number in numbers)
                (image_id,) = self._values_at("image_id", [position])
                raise ConfigError(
                    f"{first!r} and {second!r} both list {image_id!r}, each in its own folder, but "
                    "an image id stands for one image: name a column of ids with --id-column, write absolute URIs, or "
                    "caption them into two outputs"
                )

    def _numbers(self, rows: pa.RecordBatch) -> pa.Array:
        """The containers of ``rows`` by their numbers."""
        names = rows["container"].dictionary_encode()
        codes = names.indices.fill_null(-1).to_numpy().astype(np.int64)
        if codes.max(initial=-1) < 0:
            return pa.nulls(len(codes), pa.int32())
        inputs = rows["input"].to_numpy()
        pairs, first, where = np.unique(codes * 2**16 + inputs, return_index=True, return_inverse=True)
        numbers = []
        for code, number, row in zip(*divmod(pairs, 2**16), first, strict=True):
            key = int(number), names.dictionary[int(code)].as_py() if code >= 0 else ""
            numbers.append(self._containers.setdefault(key, len(self._containers)))
            if rows["kind"][int(row)].as_py() == "object":
                self._manifests.add(key)
        return pa.array(np.array(numbers, np.int32)[where], mask=codes < 0)

    def _update_containers(self, given_up: frozenset[str]) -> None:
        listing = self.listing
        failed_at, run_ids = self._ask("SELECT coalesce(epoch(min(failed_at)), 'inf'), list(DISTINCT run_id) FROM failed")
        runs = self.versions.runs
        first_run = min((runs[run_id] for run_id in run_ids or () if run_id in runs), default=ALL_ROWS)
        noticed = {key: at for key, at in listing.changed.items() if at > failed_at}
        # Of failures of which no version is known, file times tell.
        modified = {} if runs.keys() >= set(run_ids or ()) else self._modified
        modified = {key: min(at, _FOREVER) for key, at in modified.items() if at > failed_at}
        same_since = {key: self.versions.same_since.get(key[1], 0) for key in self._containers}
        same_since = {key: since for key, since in same_since.items() if since > first_run}
        written = noticed.keys() | modified.keys() | same_since.keys()
        rows = [
            (
                number,
                ALL_ROWS if key[1] in given_up else listing.superseded.get(key, 0),
                key in listing.known_tars,
                None if key in self._manifests else listing.changed.get(key),
                key[1],
                noticed.get(key),
                modified.get(key),
                same_since.get(key),
            )
            for key, number in self._containers.items()
            if key in written or key in listing.superseded or key in listing.known_tars or key[1] in given_up
        ]
        columns = list(zip(*rows, strict=True)) or [[]] * len(_CONTAINERS)
        table = pa.table([pa.array(c, f.type) for c, f in zip(columns, _CONTAINERS, strict=True)], schema=_CONTAINERS)
        self._connection.register("containers", table)
        self._connection.execute("""
            CREATE OR REPLACE TEMP VIEW counted AS
            SELECT listed.* FROM listed LEFT JOIN containers ON number = container
            WHERE position >= coalesce(since, 0) AND NOT (is_tar AND coalesce(is_read, false))
        """)
        self._connection.execute("DELETE FROM rewritten")
        if written:
            self._connection.register("runs", pa.table([list(runs), list(runs.values())], schema=_RUNS))
            self._connection.execute(f"""
                INSERT INTO rewritten SELECT id, to_timestamp(max(written_at)) FROM (
                    SELECT id, greatest(
                        noticed_at,
                        CASE WHEN run IS NULL THEN modified_at WHEN run < same_since THEN {_FOREVER} END
                    ) AS written_at FROM (
                        SELECT id, container FROM counted SEMI JOIN failed USING (id)
                        UNION ALL
                        SELECT failed.id, number FROM failed JOIN (
                            SELECT number, {TAR} AS tar FROM (SELECT number, name || '#' AS image_id FROM containers)
                        ) USING (tar)
                    ) JOIN containers ON number = container JOIN latest USING (id) LEFT JOIN runs USING (run_id)
                ) WHERE written_at IS NOT NULL GROUP BY id""")

    def _retry_what_is_listed_elsewhere(self) -> None:
        """Of an id that two lists named, one of which names it no longer, the image that failed may be the other."""
        if not self._has_uris:
            return
        final = ", ".join(f"'{kind}'" for kind in FINAL_FAILURES)
        for condition in self._slices():
            self._connection.execute(f"""
                INSERT INTO rewritten SELECT id, to_timestamp({_FOREVER}) FROM (
                    SELECT id, uri FROM latest WHERE {condition} AND uri IS NOT NULL
                    AND error_type IN ({final}) AND run_id <> '{self.run_id}'
                ) AS failed_at JOIN (SELECT id, uri FROM counted WHERE uri IS NOT NULL AND {condition}) AS listed USING (id)
                GROUP BY id HAVING NOT bool_or(failed_at.uri = listed.uri)""")

    def _values_at(self, column: str, positions: list[int]) -> list[str]:
        """The values of a column of the listing."""
        values: dict[int, str] = {}
        for chunk in self._chunks.values():
            inside = [position for position in positions if chunk.begin <= position < chunk.end]
            if inside:
                with _read(chunk.file) as file:
                    rows = file.read([column])[column]
                values |= {position: rows[position - chunk.begin].as_py() for position in inside}
        return [values[position] for position in positions]

    # What is to be done.

    def _work(self, chunks: list[_Chunk], others: str, block_rows: int, limit: int | None) -> Work:
        self.listing.relisted.clear()
        if not chunks:
            return Work([], 0, 0, 0, 0)
        chunks = sorted(chunks, key=lambda chunk: chunk.begin)
        images, tars = self._positions(chunks, others)
        if limit is not None:
            images = self._longest_untried(images, chunks[0].begin, limit)
        num_images = int(images.sum())
        found: list[pa.Table] = [self.listing.schema.empty_table()]
        with UnitFiles(self.listing.folder, self._num_files, self.listing.schema, block_rows, self.write) as files:
            for begin, rows in _row_groups(chunks, images | tars):
                inside = slice(begin, begin + rows.num_rows)
                files.add(rows.filter(pa.array(images[inside])))
                found.append(rows.filter(pa.array(tars[inside])))
            unread = self._first_tars(pa.concat_tables(found), None if limit is None else limit - num_images)
            self._add_tars(files, unread)
        self._num_files += len(files.files)
        return Work(files.files, files.num_units, files.num_blocks, num_images, unread.num_rows)

    def _positions(self, chunks: list[_Chunk], others: str) -> tuple[np.ndarray, np.ndarray]:
        """For each position from the first chunk on, whether an image and whether a tar is to be done there: each id once,
        at the first of its places."""
        first, last = chunks[0].begin, chunks[-1].end
        images, tars, inside = (np.zeros(last - first, np.bool_) for _ in range(3))
        for part in self._slices():
            reader = self._connection.sql(f"""
                SELECT position - {first}, is_tar FROM (
                    SELECT id, min(position) AS position, bool_or(is_tar) AS is_tar
                    FROM counted WHERE {part} GROUP BY id HAVING min(position) >= {first}
                ) ANTI JOIN (SELECT id FROM settled WHERE {part}) USING (id) {others}
            """).to_arrow_reader(100_000)
            for positions, is_tar in reader:
                where, what = positions.to_numpy(), is_tar.to_numpy(zero_copy_only=False)
                images[where[~what]] = True
                tars[where[what]] = True
        for chunk in chunks:
            inside[chunk.begin - first : chunk.end - first] = True
        images &= inside
        tars &= inside
        return images, tars

    def _longest_untried(self, images: np.ndarray, first: int, limit: int) -> np.ndarray:
        """Of ``images`` no more than ``limit``: those never attempted before those attempted long ago, so that a few which
        fail each time hold up no others."""
        tried = np.zeros(len(images), np.int64)
        reader = self._connection.sql(f"""
            SELECT position - {first}, epoch_us(max(failed_at)) FROM counted JOIN failed USING (id)
            WHERE position BETWEEN {first} AND {first + len(images) - 1} GROUP BY 1
        """).to_arrow_reader(100_000)
        for positions, times in reader:
            tried[positions.to_numpy()] = times.to_numpy()
        chosen = np.flatnonzero(images)
        chosen = chosen[np.argsort(tried[chosen], kind="stable")[:limit]]
        kept = np.zeros_like(images)
        kept[chosen] = True
        return kept

    def _first_tars(self, tars: pa.Table, room: int | None) -> pa.Table:
        """The first ``tars`` expected to hold ``room`` images; just one while the mean image size is unknown."""
        if room is None:
            return tars
        mean = self.listing.mean_image_bytes
        sizes = tars["size"].fill_null(0).to_numpy()
        before = (np.cumsum(sizes) - sizes) / mean if mean else np.arange(len(sizes)) * room
        return tars.filter(pa.array(before < room))

    def _add_tars(self, files: UnitFiles, tars: pa.Table) -> None:
        """A unit for each tar, with the hashes of its settled members: one join for all of them."""
        if not tars.num_rows:
            return
        names = pc.binary_join_element_wise(tars["container"], "", "#")  # ty: ignore[missing-attribute]
        self._connection.register("tars", pa.table({"number": np.arange(tars.num_rows), "image_id": names}))
        reader = self._connection.sql(f"""
            SELECT number, (id & {2**64 - 1})::UBIGINT, (id >> 64)::UBIGINT
            FROM settled JOIN (SELECT number, {TAR} AS tar FROM tars) USING (tar) ORDER BY number
        """).to_arrow_reader(100_000)
        done, numbers, halves = 0, np.empty(0, np.int64), np.empty((0, 2), np.uint64)
        for batch in reader:
            number, low, high = (column.to_numpy() for column in batch)
            numbers = np.concatenate([numbers, number])
            halves = np.concatenate([halves, np.column_stack([low, high])])
            # The members of the last tar may go on in the next batch.
            ready = int(numbers[-1])
            end = int(np.searchsorted(numbers, ready))
            self._add_some(files, tars, done, ready, numbers[:end], halves[:end])
            done, numbers, halves = ready, numbers[end:], halves[end:]
        self._add_some(files, tars, done, tars.num_rows, numbers, halves)

    def _add_some(
        self, files: UnitFiles, tars: pa.Table, begin: int, end: int, numbers: np.ndarray, halves: np.ndarray
    ) -> None:
        """The tars from ``begin`` to ``end``, with the hashes that have their numbers."""
        offsets = np.searchsorted(numbers, np.arange(begin, end + 1))
        bytes_ = pa.py_buffer(halves.astype("<u8").tobytes())
        digests = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(halves), [None, bytes_])
        files.add_tars(tars.slice(begin, end - begin), offsets, digests)


_TAKEN = pa.schema(
    [
        ("position", pa.int64()),
        ("image_id", pa.string()),
        ("container", pa.int32()),
        ("is_tar", pa.bool_()),
        ("folder", pa.int32()),
        ("uri", pa.string()),
    ]
)
_CONTAINERS = pa.schema(
    [
        ("number", pa.int32()),
        ("since", pa.int64()),
        ("is_read", pa.bool_()),
        ("changed_at", pa.float64()),
        ("name", pa.string()),
        ("noticed_at", pa.float64()),
        ("modified_at", pa.float64()),
        ("same_since", pa.int64()),
    ]
)
_RUNS = pa.schema([("run_id", pa.string()), ("run", pa.int64())])


def _row_groups(chunks: list[_Chunk], wanted: np.ndarray) -> Iterator[tuple[int, pa.Table]]:
    """The row groups of ``chunks`` with rows that are wanted, and where they begin in ``wanted``."""
    first = chunks[0].begin
    for chunk in chunks:
        at = chunk.begin - first
        if not wanted[at : chunk.end - first].any():
            continue
        with _read(chunk.file) as file:
            for group in range(file.num_row_groups):
                end = at + file.metadata.row_group(group).num_rows
                if wanted[at:end].any():
                    yield at, file.read_row_group(group)
                at = end


@contextmanager
def _read(chunk: Location) -> Generator[pq.ParquetFile]:
    try:
        yield decode_parquet(read_bytes(chunk))
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{chunk.uri!r} is damaged ({error}): --relist lists the inputs afresh") from error
