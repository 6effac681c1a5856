"""Proof that captioning outputs hold what a captioning job promises, from their files alone.

Everything is read: every column of every part, and with ``against`` every id of the source. What is wrong is collected, not
raised at the first. The pages of parts have checksums, but for those that earlier versions of capray wrote. Knows nothing of
models; ids and parts are held by DuckDB, out of core.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capray.config import ImageLimits, SourceSettings
from capray.errors import CaprayError, ConfigError, DataError
from capray.images import ImageError
from capray.inputs import Source, open_sources
from capray.inputs.base import Changed, Failed, Found, TarUnreadable, may_have_other_ids
from capray.inputs.byte_reader import read_image
from capray.inputs.places import PLACES, Row
from capray.inputs.reader import Reader
from capray.inputs.tars import BEHIND_TAR, images_of, members_of, name_of, opened
from capray.inputs.versions import VersionChanged
from capray.output import Output, create_view, first_row, open_duckdb, parquet_files, quoted, require_output
from capray.progress import ProgressDisplay, duration
from capray.storage import Location, exists, identity, list_names, locate, read_bytes
from capray.tables import CAPTIONS, FAILURES, FINAL_FAILURES, TRANSIENT_FAILURES
from capray.wording import counted

if TYPE_CHECKING:
    import duckdb

    from capray.config import VerifyConfig

NUM_EXAMPLES = 10
_NUM_READERS = 4
_NUM_LISTERS = 16
_CHUNK_ROWS = 200_000
_BATCH_ROWS = 65_536
_OPTIONAL = ("source", "tokens", "attention")
_BOUND_BY = ("model_id", "precision", "schema_version", "attention", "kept_columns")
"""What job.json says besides the decoding settings that must be the same for all outputs of one work."""
_QUERIED = {"captions": ("image_id", "uri", "sha256", "model_id"), "failures": ("image_id", "error_type")}

_Digests = dict[str, bytes | str | None]
"""By image id: the SHA-256 of its bytes, or why they cannot be had; None for an image that is too large."""

_COUNTS = """
SELECT count(*) FILTER (captions > 1) AS doubled,
       count(*) FILTER (captions = 0 AND failures > 0) AS failed,
       count(*) FILTER (wanted > 0 AND captions = 0 AND failures = 0) AS missing,
       count(*) FILTER (wanted > 0) AS wanted,
       count(*) FILTER (wanted = 0) AS unwanted,
       coalesce(sum(wanted - 1) FILTER (wanted > 1), 0)::BIGINT AS repeated
FROM ids
"""
_IDS = """
SELECT image_id, count(*) FILTER (kind = 0) AS captions, count(*) FILTER (kind = 1) AS failures,
       count(*) FILTER (kind = 2) AS wanted
FROM (SELECT image_id, 0::UTINYINT AS kind FROM captions
      UNION ALL SELECT image_id, 1::UTINYINT FROM failures
      UNION ALL SELECT image_id, 2::UTINYINT FROM wanted)
GROUP BY image_id
"""


@dataclass
class Verification:
    """What was checked and what was found. ``problems`` break the promise; ``notes`` do not."""

    outputs: list[str]
    checked: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    def text(self) -> str:
        count = len(self.problems)
        verdict = f"{count:,} problem{'' if count == 1 else 's'}" if count else "no problems"
        return "\n".join(
            [
                *(f"checked: {line}" for line in self.checked),
                *(f"  not checked: {line}" for line in self.not_checked),
                *(f"  note: {line}" for line in self.notes),
                *(f"problem: {line}" for line in self.problems),
                f"{verdict} in {', '.join(self.outputs)}; {duration(self.seconds)}, peak memory "
                f"{self.peak_memory_bytes / 2**30:.2f} GiB",
            ]
        )

    def json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)


def verify(config: VerifyConfig) -> Verification:
    """Check ``config.outputs``, together the captions of one work.

    Raises:
        ConfigError: no output, one named twice, or a source that cannot be opened.
        StorageError: a store that cannot be reached.
    """
    return _Verifier(config).verify()


@dataclass(frozen=True)
class _Part:
    """A part as it was found."""

    table: str
    output: int
    file: Location
    rows: int = 0
    schema: pa.Schema | None = None
    problems: tuple[str, ...] = ()


class _Verifier:
    def __init__(self, config: VerifyConfig):
        self.config = config
        self.result = Verification([locate(uri).uri for uri in config.outputs])
        self.outputs: list[Output] = []
        self.jobs: list[dict[str, Any]] = []
        self.sources: list[Source] = []

    def verify(self) -> Verification:
        started = time.monotonic()
        result = self.result
        self._open()
        self._check_jobs()
        with ProgressDisplay("reading parts") as display, tempfile.TemporaryDirectory() as temporary:
            parts = self._read_parts(display)
            self._check_schemas(parts)
            with open_duckdb(os.path.join(temporary, "spill"), *(output.root for output in self.outputs)) as connection:
                self._create_views(connection, parts)
                drawn = self._draw(connection)
                sought = _Sought(drawn)
                if self.sources:
                    self._list_sources(connection, os.path.join(temporary, "wanted"), sought, display)
                display.update(0, "", "comparing ids", None)
                self._check_models(connection)
                self._check_failures(connection)
                self._check_ids(connection)
            if self.config.check_bytes:
                self._check_bytes(drawn, sought, display)
        if not self.sources:
            result.not_checked.append("that every image of the source is accounted for (--against)")
        if not self.config.check_bytes:
            result.not_checked.append("the bytes of the images (--check-bytes)")
        result.seconds = time.monotonic() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result.peak_memory_bytes = peak if sys.platform == "darwin" else peak * 1024
        return result

    def _problem(self, text: str, count: int = 0, examples: Iterable[str] = ()) -> None:
        """Add a problem with its ``examples``, of ``count``."""
        shown = list(examples)[:NUM_EXAMPLES]
        self.result.problems.append(f"{text}: {', '.join(shown)}{' …' if count > len(shown) else ''}" if shown else text)

    def _open(self) -> None:
        seen: dict[str, str] = {}
        for uri in self.config.outputs:
            place = locate(uri)
            where = identity(place)
            if where in seen:
                raise ConfigError(f"{uri!r} and {seen[where]!r} are the same output: name it once")
            seen[where] = uri
            try:
                output = require_output(uri)
                job = output.read_job() or {}
            except (DataError, KeyError, TypeError) as error:
                output, job = Output(uri), {}
                self._problem(str(error))
            self.outputs.append(output)
            self.jobs.append(job)
        if self.config.against:
            self.sources = open_sources(self.config.against, self.config.subset(SourceSettings))

    def _check_jobs(self) -> None:
        """One model and one set of settings; no run under way."""
        known = [(output, job) for output, job in zip(self.outputs, self.jobs, strict=True) if job]
        for output, job in known[1:]:
            first, other = known[0][1], job
            pairs = {name: (first.get(name), other.get(name)) for name in _BOUND_BY}
            decoding, others = first.get("decoding") or {}, other.get("decoding") or {}
            pairs |= {name: (decoding.get(name), others.get(name)) for name in sorted({*decoding, *others})}
            for name, (one, two) in pairs.items():
                # Of an empty shard, where nothing was captioned, it is not known.
                is_unknown = name == "precision" and None in (one, two)
                if one != two and (one or two) and not is_unknown:
                    self._problem(f"{name} of {output.root.uri} is {two!r}, of {known[0][0].root.uri} {one!r}")
        self.result.checked.append("that the outputs have one model and one set of settings")
        shards = {job["shard"] for _, job in known if job.get("shard")}
        totals = {shard.split("/")[1] for shard in shards}
        if len(totals) == 1:
            absent = sorted({f"{i + 1}/{total}" for total in totals for i in range(int(total))} - shards)
            if absent:
                self.result.notes.append(f"shards not among the outputs: {', '.join(absent)}")
        elif totals:
            self.result.notes.append(f"the outputs are shards of different divisions: {', '.join(sorted(shards))}")
        for output in self.outputs:
            if exists(output.private.join("lease.json")):
                self.result.notes.append(f"{output.root.uri} has a lease: a run is writing it, or was killed")
            names = list_names(output.runs, ".json")
            if names:
                status = _status(output.runs.join(names[-1]))
                if status != "complete":
                    self.result.notes.append(f"the last run on {output.root.uri} is {status}, not complete")

    def _read_parts(self, display: ProgressDisplay) -> list[_Part]:
        tasks = [
            (table, number, file)
            for number, output in enumerate(self.outputs)
            for table, folder in (("captions", output.captions), ("failures", output.failures))
            for file in output.parts(folder)
        ]
        parts: list[_Part] = []
        rows = 0
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            for part in pool.map(lambda task: _read_part(*task), tasks):
                parts.append(part)
                for problem in part.problems:
                    self._problem(problem)
                rows += part.rows
                display.update(len(parts), counted(rows, "row"), total=len(tasks))
        for number, output in enumerate(self.outputs):
            mine = [part for part in parts if part.output == number]
            rows_of = Counter[str]()
            for part in mine:
                rows_of[part.table] += part.rows
            self.result.checked.append(
                f"every value of {counted(rows_of['captions'], 'caption')} and {counted(rows_of['failures'], 'row')} of the "
                f"failure log in {counted(len(mine), 'part')} of {output.root.uri}"
            )
        self.result.counts |= {
            "caption_rows": sum(part.rows for part in parts if part.table == "captions"),
            "failure_rows": sum(part.rows for part in parts if part.table == "failures"),
            "parts": len(parts),
        }
        return parts

    def _check_schemas(self, parts: list[_Part]) -> None:
        """One schema per table, that of this version; kept columns as job.json has them."""
        for table, base in (("captions", CAPTIONS), ("failures", FAILURES)):
            found = [(part, part.schema) for part in parts if part.table == table and part.schema is not None]
            if not found:
                continue
            texts = [schema.to_string(show_schema_metadata=True) for _, schema in found]
            usual = Counter(texts).most_common(1)[0][0]
            reference = found[texts.index(usual)]
            for (part, schema), text in zip(found, texts, strict=True):
                if text != usual:
                    self._problem(
                        f"{part.file.uri} has another schema than {reference[0].file.uri}: "
                        f"{_difference(schema, reference[1])}"
                    )
            allowed = _OPTIONAL if table == "captions" else ()
            fields = [column for column in reference[1] if column.name not in allowed]
            plain = pa.schema(fields, reference[1].metadata)
            if not plain.equals(base, check_metadata=True):
                self._problem(f"{table} have not the schema of {table} ({_difference(plain, base)})")
            if table == "captions":
                self._check_kept(reference[0], reference[1])
        self.result.checked.append("that the parts of a table have one schema and schema version")

    def _check_kept(self, part: _Part, schema: pa.Schema) -> None:
        job = self.jobs[part.output]
        if not job:
            return
        source = schema.field("source").type if "source" in schema.names else pa.struct([])
        # By name: Parquet keeps a type's nature, not always its spelling in the source.
        kept = [source.field(i).name for i in range(source.num_fields)]
        promised = list(job.get("kept_columns") or {})
        if kept != promised:
            self._problem(f"{part.file.uri} carries the columns {kept}, job.json says {promised}")
        for name in ("tokens", "attention"):
            if (name in schema.names) != bool(job.get("attention")):
                self._problem(f"{part.file.uri}: column {name!r} is not as job.json says (attention {job.get('attention')})")

    def _list_sources(
        self, connection: duckdb.DuckDBPyConnection, folder: str, sought: _Sought, display: ProgressDisplay
    ) -> None:
        """The view ``wanted``, over Parquet files in ``folder``; where the images that are ``sought`` lie."""
        wanted = _Chunks(folder)
        known = {(i, unit) for i, source in enumerate(self.sources) for unit in source.units()}
        num_done = 0
        with ThreadPoolExecutor(_NUM_LISTERS) as pool:

            def start(i: int, unit: str) -> Future:
                return pool.submit(_list_unit, i, self.sources[i], unit, wanted, sought)

            running = {start(i, unit): i for i, unit in sorted(known)}
            while running:
                done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                for future in done:
                    number = running.pop(future)
                    num_done += 1
                    found, faults = future.result()
                    for fault in faults:
                        self._problem(f"the source cannot be listed whole: {fault}")
                    for name in found:
                        if (number, name) not in known:
                            known.add((number, name))
                            running[start(number, name)] = number
                display.update(num_done, counted(wanted.num_rows, "id"), "listing the source", len(known))
        listed = ", ".join(source.place.uri for source in self.sources)
        self.result.checked.append(f"that each of {counted(wanted.num_rows, 'row')} of {listed} is captioned or failed")
        if files := wanted.close():
            chunks = parquet_files([locate(file) for file in files])
            connection.execute(f"CREATE OR REPLACE VIEW wanted AS SELECT * FROM {chunks}")

    def _create_views(self, connection: duckdb.DuckDBPyConnection, parts: list[_Part]) -> None:
        for table, base in (("captions", CAPTIONS), ("failures", FAILURES)):
            names = _QUERIED[table]
            types = {name: base.field(name).type for name in names}
            create_view(connection, f"no_{table}", [], base)
            selects = [f"SELECT 0::USMALLINT AS output, '' AS file, {', '.join(names)} FROM no_{table}"]
            for number in range(len(self.outputs)):
                files = []
                for part in parts:
                    if (part.table, part.output) != (table, number) or part.schema is None:
                        continue
                    if all(name in part.schema.names and part.schema.field(name).type == types[name] for name in names):
                        files.append(part.file)
                    else:
                        self.result.notes.append(f"{part.file.uri}: its ids are left out of what follows")
                if files:
                    selects.append(
                        f"SELECT {number}::USMALLINT, filename, {', '.join(names)} "
                        f"FROM {parquet_files(files, 'filename', 'union_by_name')}"
                    )
            connection.execute(f"CREATE VIEW {table} AS {' UNION ALL '.join(selects)}")
        connection.execute("CREATE VIEW wanted AS SELECT image_id, uri FROM no_captions")

    def _check_models(self, connection: duckdb.DuckDBPyConnection) -> None:
        rows = connection.execute(
            "SELECT output, model_id, count(*), list(DISTINCT file ORDER BY file) FROM captions GROUP BY ALL ORDER BY ALL"
        ).fetchall()
        for number, model_id, count, files in rows:
            job = self.jobs[number]
            if job and model_id != job.get("model_id"):
                self._problem(
                    f"{counted(count, 'caption')} of {self.outputs[number].root.uri} by model {model_id!r}, job.json names "
                    f"{job.get('model_id')!r}",
                    len(files),
                    files[:NUM_EXAMPLES],
                )
        self.result.checked.append("that every caption is by the model of job.json")

    def _check_failures(self, connection: duckdb.DuckDBPyConnection) -> None:
        known = ", ".join(map(quoted, (*FINAL_FAILURES, *TRANSIENT_FAILURES)))
        rows = connection.execute(
            f"SELECT error_type, count(*), any_value(file) FROM failures WHERE error_type NOT IN ({known}) GROUP BY ALL"
        ).fetchall()
        for kind, count, file in rows:
            self._problem(f"{counted(count, 'failure has', 'failures have')} an unknown error_type, {kind!r}", 1, [file])
        if len(self.outputs) > 1:
            crossed = """
                SELECT count(DISTINCT f.image_id) FROM failures f JOIN captions c USING (image_id)
                WHERE f.output <> c.output
                  AND NOT EXISTS (SELECT 1 FROM captions o WHERE o.image_id = f.image_id AND o.output = f.output)
            """
            (count,) = first_row(connection, crossed)
            if count:
                self.result.notes.append(f"{counted(count, 'id')} failed in one output and captioned in another")

    def _check_ids(self, connection: duckdb.DuckDBPyConnection) -> None:
        connection.execute(f"CREATE VIEW ids AS {_IDS}")
        doubled, failed, missing, wanted, unwanted, repeated = first_row(connection, _COUNTS)
        self.result.counts |= {"ids_captioned_twice": doubled, "ids_failed": failed}
        if doubled:
            rows = connection.execute(f"""
                SELECT image_id, list(DISTINCT file ORDER BY file) FROM captions GROUP BY image_id HAVING count(*) > 1
                ORDER BY image_id LIMIT {NUM_EXAMPLES}
            """).fetchall()
            examples = [f"{image_id} ({' and '.join(files)})" for image_id, files in rows]
            self._problem(f"{counted(doubled, 'id has', 'ids have')} more than one caption", doubled, examples)
        self.result.checked.append("that no id has two captions")
        if not self.sources:
            return
        self.result.counts |= {
            "ids_wanted": wanted,
            "ids_missing": missing,
            "ids_not_in_source": unwanted,
            "rows_repeated_in_source": repeated,
        }
        if missing:
            rows = connection.execute(
                "SELECT image_id FROM ids WHERE wanted > 0 AND captions = 0 AND failures = 0 "
                f"ORDER BY image_id LIMIT {NUM_EXAMPLES}"
            ).fetchall()
            self._problem(
                counted(missing, "id of the source has", "ids of the source have") + " neither a caption nor a failure",
                missing,
                [name for (name,) in rows],
            )
        if unwanted:
            self.result.notes.append(f"{counted(unwanted, 'id')} of the outputs not in the source")
        if repeated:
            self.result.notes.append(f"{counted(repeated, 'row')} of the source with a repeated image id")
        if any(may_have_other_ids(source) for source in self.sources):
            self._check_uris(connection)

    def _check_uris(self, connection: duckdb.DuckDBPyConnection) -> None:
        """A data set that has moved has other URIs, and so have other images under the same ids."""
        number, first = first_row(
            connection,
            """
            SELECT count(*), min({image_id: image_id, before: before, now: now}) FROM (
                SELECT image_id, any_value(captions.uri) AS before, any_value(wanted.uri) AS now
                FROM captions JOIN wanted USING (image_id) WHERE captions.uri IS NOT NULL AND wanted.uri IS NOT NULL
                GROUP BY image_id HAVING NOT bool_or(captions.uri = wanted.uri)
            )""",
        )
        self.result.counts["ids_elsewhere"] = number
        if number:
            self.result.notes.append(
                f"{counted(number, 'caption')} whose image is at another URI than the source lists its id at, first: "
                f"{first['image_id']} is of {first['before']}, not {first['now']}; moved data sets are fine as they are"
            )

    def _draw(self, connection: duckdb.DuckDBPyConnection) -> list[_Drawn]:
        """Captions to check the bytes of; with a source also of images that stand in tables."""
        if not self.config.check_bytes:
            return []
        readable = "" if self.sources else "WHERE uri IS NOT NULL"
        sample = f"USING SAMPLE reservoir({self.config.check_bytes} ROWS)"
        rows = connection.execute(f"SELECT * FROM (SELECT image_id, uri, sha256 FROM captions {readable}) {sample}")
        return [_Drawn(*row) for row in rows.fetchall()]

    def _check_bytes(self, drawn: list[_Drawn], sought: _Sought, display: ProgressDisplay) -> None:
        """Read the images again, those of a container together; those that the source lists by their ids, where they are."""
        groups: dict[str, list[_Drawn]] = {}
        for each in drawn:
            if each.image_id not in sought.found:
                groups.setdefault(BEHIND_TAR.split(each.uri or "", maxsplit=1)[0], []).append(each)
        self.result.notes += [f"{each.image_id} is in none of the tables of the inputs" for each in groups.pop("", ())]
        reader = Reader.of(self.sources, ImageLimits(), _NUM_LISTERS, 0)
        tasks: list[Callable[[], _Digests]] = [partial(_read_by_uri, *each) for each in groups.items()]
        tasks += [partial(_read_by_id, reader, rows, sought) for rows in sought.by_container()]
        expected = {each.image_id: each for each in drawn}
        read = {"same": 0, "all": 0}
        with ThreadPoolExecutor(_NUM_LISTERS) as pool:
            for digests in pool.map(lambda task: task(), tasks):
                for image_id, digest in digests.items():
                    self._compare(expected[image_id], digest, read)
                display.update(read["all"], f"{read['same']:,} same", "reading images", len(drawn))
        self.result.counts |= {"images_read_again": read["all"], "images_same": read["same"]}
        self.result.checked.append(
            f"the bytes of {counted(read['all'], 'image')} drawn at random: {read['same']:,} the same"
        )

    def _compare(self, drawn: _Drawn, digest: bytes | str | None, read: dict[str, int]) -> None:
        read["all"] += 1
        where = drawn.uri or drawn.image_id
        if digest is None:
            self.result.notes.append(
                f"{where} is larger than {ImageLimits().max_image_bytes:,} bytes and was not read again"
            )
        elif isinstance(digest, str):
            self._problem(f"the image of {drawn.image_id} cannot be read again: {digest}")
        elif digest != drawn.sha256:
            self._problem(f"the bytes of {drawn.image_id} at {where} are not those that were captioned (SHA-256)")
        else:
            read["same"] += 1


@dataclass(frozen=True)
class _Drawn:
    """A caption whose image is to be read again."""

    image_id: str
    uri: str | None
    sha256: bytes


class _Sought:
    """Where the drawn images lie in the source; filled from many threads."""

    def __init__(self, drawn: list[_Drawn]):
        self.ids = {each.image_id for each in drawn}
        self.found: set[str] = set()
        self._tars = {BEHIND_TAR.split(image_id, maxsplit=1)[0] for image_id in self.ids}
        self._rows: list[Row] = []
        self._lock = threading.Lock()

    def add(self, number: int, rows: pa.Table) -> None:
        """Take from listed ``rows`` of input ``number`` what is sought, or a tar that may hold it."""
        if not self.ids:
            return
        for row in rows.filter(pc.field("image_id").isin(sorted(self.ids | self._tars))).to_pylist():
            row = dict.fromkeys(PLACES.names) | row | {"input": number}
            with self._lock:
                if row["kind"] == "tar":
                    self._rows.append(row)
                    self.found |= {image_id for image_id in self.ids if image_id.startswith(f"{row['container']}#")}
                elif row["image_id"] not in self.found:
                    self.found.add(row["image_id"])
                    self._rows.append(row)

    def by_container(self) -> list[list[Row]]:
        """The places, those of a container together, in its order."""
        groups: dict[tuple, list[Row]] = {}
        for row in self._rows:
            alone = row["image_id"] if row["kind"] == "object" else row["container"]
            groups.setdefault((row["input"], row["kind"], alone), []).append(row)
        for rows in groups.values():
            rows.sort(key=lambda row: (row["row_group"] or 0, row["row"] or 0))
        return list(groups.values())


class _Chunks:
    """Image ids and URIs from many threads, in Parquet files in ``folder``."""

    def __init__(self, folder: str):
        os.makedirs(folder)
        self._folder, self._lock = folder, threading.Lock()
        self._held: list[pa.Table] = []
        self._num_held = self.num_rows = 0
        self._files: list[str] = []

    def add(self, ids: pa.Array, uris: pa.Array | None = None) -> None:
        uris = pa.nulls(len(ids), pa.string()) if uris is None else uris
        with self._lock:
            self._held.append(pa.table({"image_id": ids, "uri": uris}))
            self._num_held += len(ids)
            self.num_rows += len(ids)
            if self._num_held >= _CHUNK_ROWS:
                self._write()

    def close(self) -> list[str]:
        if self._num_held:
            self._write()
        return self._files

    def _write(self) -> None:
        path = os.path.join(self._folder, f"{len(self._files):06d}.parquet")
        pq.write_table(pa.concat_tables(self._held), path)
        self._files.append(path)
        self._held, self._num_held = [], 0


def _list_unit(number: int, source: Source, unit: str, wanted: _Chunks, sought: _Sought) -> tuple[list[str], list[str]]:
    """Add the wanted ids of a unit; further units that turned up, and what cannot be read of it."""
    found: list[str] = []
    faults: list[str] = []
    try:
        for page in source.pages(unit):
            found += page.found
            rows = source.selection.filter(page.rows)
            sought.add(number, rows)
            is_tar = pc.field("kind") == "tar"
            images = rows.filter(~is_tar)
            uris = images["uri"].combine_chunks() if may_have_other_ids(source) and "uri" in images.column_names else None
            wanted.add(images["image_id"].combine_chunks(), uris)
            for tar in rows.filter(is_tar)["image_id"].to_pylist():
                try:
                    ids = [image_id for image_id in members_of(tar) if source.selection.has(image_id)]
                except (CaprayError, ImageError) as error:
                    faults.append(str(error))
                else:
                    wanted.add(pa.array(ids, pa.string()))
    except CaprayError as error:
        faults.append(str(error))
    return found, faults


def _read_by_id(reader: Reader, rows: list[Row], sought: _Sought) -> _Digests:
    """By image id the SHA-256 of the images at ``rows``, all of one container, or why there is none."""
    place = rows[0]["container"] or rows[0]["uri"]
    wanted = {image_id for image_id in sought.ids if image_id.startswith(f"{place}#")}
    wanted = wanted if rows[0]["kind"] == "tar" else {row["image_id"] for row in rows}
    digests: _Digests = {}
    missing = "it is not there"
    try:
        for outcome in reader.read(rows):
            if isinstance(outcome, Found):
                digests[outcome.row["image_id"]] = hashlib.sha256(outcome.data).digest()
            elif isinstance(outcome, Failed):
                error = outcome.error
                digests[outcome.row["image_id"]] = None if error.kind == "too_large" else f"{error.kind}: {error.message}"
            elif isinstance(outcome, TarUnreadable):
                missing = outcome.message
            elif isinstance(outcome, Changed):
                missing = f"{place} changed while it was read"
    except CaprayError as error:
        missing = str(error)
    return {image_id: digests.get(image_id, missing) for image_id in wanted}


def _read_part(table: str, output: int, file: Location) -> _Part:
    """Decode all of a part."""
    required = [column.name for column in (CAPTIONS if table == "captions" else FAILURES) if not column.nullable]
    nulls: Counter[str] = Counter()
    rows = 0
    try:
        data = file.path if file.is_local else pa.BufferReader(read_bytes(file))
        with pq.ParquetFile(data, page_checksum_verification=True) as part:
            for batch in part.iter_batches(_BATCH_ROWS, use_threads=False):
                batch.validate(full=True)
                rows += batch.num_rows
                for name in required:
                    if name in batch.schema.names:
                        nulls[name] += batch[name].null_count
            if rows != part.metadata.num_rows:
                return _Part(
                    table, output, file, problems=(f"{file.uri} has {counted(rows, 'row')}, its footer says otherwise",)
                )
            schema = part.schema_arrow
    except (pa.ArrowException, OSError, CaprayError) as error:
        return _Part(table, output, file, problems=(f"{file.uri} cannot be read: {error}",))
    problems = [f"{file.uri} has {counted(count, 'row')} without {name}" for name, count in nulls.items() if count]
    return _Part(table, output, file, rows, schema, tuple(problems))


def _read_by_uri(place: str, drawn: list[_Drawn]) -> _Digests:
    """By image id the SHA-256 of the images at ``place``, or why there is none; None for one that is too large."""
    limit = ImageLimits().max_image_bytes
    digests: _Digests = {}
    members: dict[str, list[str]] = {}
    for each in drawn:
        if each.uri == place:
            digests[each.image_id] = next(iter(digests.values())) if digests else _digest(place, limit)
        else:
            members.setdefault((each.uri or "")[len(place) + 1 :], []).append(each.image_id)
    if not members:
        return digests
    try:
        with opened(place) as tar:
            for member, data, whole in images_of(tar, limit):
                digest = hashlib.sha256(data).digest() if whole else "it is cut off"
                of_member = members.pop(member.name, None) or members.pop(name_of(member), ())
                digests |= dict.fromkeys(of_member, None if member.size > limit else digest)
                if not members:
                    break
        missing = "it is not there"
    except ImageError as error:
        missing = error.message
    except (CaprayError, VersionChanged) as error:
        missing = str(error)
    for name, image_ids in members.items():
        # A file's own name may look like a member's.
        whole = _digest(f"{place}#{name}", limit)
        digests |= dict.fromkeys(image_ids, missing if isinstance(whole, str) else whole)
    return digests


def _digest(uri: str, limit: int) -> bytes | str | None:
    try:
        data = read_image(uri, limit)
    except ImageError as error:
        return f"{error.kind}: {error.message}"
    except CaprayError as error:
        return str(error)
    return hashlib.sha256(data).digest() if len(data) <= limit else None


def _status(record: Location) -> str:
    try:
        return str(json.loads(read_bytes(record)).get("status"))
    except (ValueError, AttributeError):
        return "unreadable"


def _difference(schema: pa.Schema, other: pa.Schema) -> str:
    """In what ``schema`` is not ``other``."""
    lines = []
    for name in dict.fromkeys([*other.names, *schema.names]):
        one, two = (str(each.field(name)) if name in each.names else None for each in (schema, other))
        if one is None:
            lines.append(f"{name} is missing")
        elif two is None:
            lines.append(f"{name} is not expected")
        elif one != two:
            lines.append(f"{one}, not {two}")
    if not lines and schema.names != other.names:
        lines.append("another order of columns")
    return "; ".join(lines) or f"metadata {schema.metadata}, not {other.metadata}"
