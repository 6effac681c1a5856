"""The listing of the inputs: in threads, beside the captioning, stored as it goes, taken up again by later runs.

Each run writes a folder of its own, ``_capray/plan/<number>-<run id>/``, and only adds to it: chunks of PLACES rows, each
with the progress it brings in its metadata. The first names the chunks of earlier runs that this run takes up: what else is
written into older folders, by a run that was frozen and woke up, counts for nothing. Knows nothing of what was captioned.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import queue
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capray.config import CaptionConfig, SourceSettings
from capray.errors import CaprayError, ConfigError, StorageUnavailable
from capray.inputs.base import ContainerChanged, LeftOut, Page, Source, TarMembers, lists_uris
from capray.inputs.places import PLACES, encode_places, with_source
from capray.inputs.versions import container_at
from capray.inputs.witnesses import witnesses
from capray.storage import Location, Write, is_of_arrow, open_file, path_of, read_ahead, storage_errors

NUM_LISTERS = 16
FIRST_CHUNK_ROWS, MAX_CHUNK_ROWS = 100_000, 1_000_000
FIRST_CHUNK_SECONDS, MAX_CHUNK_SECONDS = 3.0, 60.0
"""A chunk is stored at this many rows or this age; both grow to a tenth of what was listed so far, up to the most."""
MAX_QUEUED_ROWS = 500_000
"""Rows that wait to be gathered while a chunk is stored."""
MAX_RELISTS = 2
"""Times a container is listed again in a run because it has changed."""
AWAY_SECONDS = 5.0
"""How long containers that were listed, and are away with their mount, are waited for."""
ALL_ROWS = 2**63 - 1

_FOLDER = re.compile(r"(\d{6})-(.+)")
_CHUNK = re.compile(r"(?:chunk|members)-(\d{6})\.parquet")
_METADATA = b"capray_listing"

_Key = tuple[int, str]
"""The number of an input, and a unit of it: a container's URI, or part of a listing of objects."""


@dataclass
class _Unit:
    """How far a unit is listed.

    Attributes:
        version: of the container when its listing began; None of what is no container.
        after: the token from which its listing resumes.
        since: its rows count from this position on.
        edition: how often it was begun again: pages of older editions are dropped.
    """

    version: str | None = None
    after: Any = None
    is_done: bool = False
    since: int = 0
    edition: int = 0


class Listing:
    """Lists ``sources`` in the background, as a context.

    Args:
        plan: where it is stored.
        config: its inputs and SourceSettings tell whether a stored listing is of the same inputs.
        write: publishes bytes; raises when this run may not write.
        relist: whether to drop a stored listing.

    Attributes:
        superseded: the position from which the rows of an (input, container) count, where earlier ones do not.
        changed: when it was noticed, in seconds since the epoch, that an (input, container) is another than was listed.
        known_tars: the (input, container) of tars whose members are listed.
        relisted: the (input, container) listed again since a plan was made: what is read by the old plan says nothing new.
        faults: containers that cannot be listed, with the reason; later runs ask again.
        remarks: what has changed since the stored listing, a line each.
    """

    def __init__(
        self, plan: Location, run_id: str, sources: list[Source], config: CaptionConfig, write: Write, relist: bool = False
    ):
        self.plan, self.sources, self.write = plan, sources, write
        self.schema = with_source(PLACES, sources[0].source_type)
        self.superseded: dict[_Key, int] = {}
        self.changed: dict[_Key, float] = {}
        self.known_tars: set[_Key] = set()
        self.relisted: set[_Key] = set()
        self._left_out: dict[_Key, dict[str, LeftOut]] = defaultdict(dict)
        self._new_left_out: list[LeftOut] = []
        self.faults: dict[str, CaprayError] = {}
        self.remarks: list[str] = []
        self.num_rows = self.num_hidden = 0
        self.is_complete = False
        self.resumed_at: float | None = None
        self._digest = _digest_of(config, sources)
        self._units: dict[_Key, _Unit] = {}
        self._open: set[_Key] = set()
        self._touched: set[_Key] = set()
        self._chunks: list[Location] = []
        self._members: list[Location] = []
        self._adopted: list[str] = []
        self._storing, self._state, self._room = threading.RLock(), threading.Condition(), threading.Condition()
        folders = self._folders()
        numbers = [int(match[1]) for name in folders if (match := _FOLDER.fullmatch(name))]
        self.number = 1 + max(numbers, default=0)
        self.folder = self.plan.join(f"{self.number:06d}-{run_id}")
        self._mounts_of: dict[str, list[str]] = {}
        self._take_up(folders, relist)
        if not self._units:
            for source in sources:
                source.check_mounts()
        self._compare()
        self._num_rows_at_start, self._started = self.num_rows, time.monotonic()
        self._num_stored = self._hidden = self._num_held = self._num_queued = 0
        self._held: list[tuple[_Key, int, pa.Table]] = []
        self._held_members: list[TarMembers] = []
        self._last_stored = self._members_since = self._started
        self._num_members = self._member_bytes = 0
        self._num_relists: Counter[_Key] = Counter()
        self._waiting: queue.Queue[tuple[_Key, _Unit]] = queue.Queue()
        self._pages: queue.Queue[tuple[_Key, int, Page | Exception | None]] = queue.Queue()
        self._stop = threading.Event()
        self._is_listing = False
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []

    # What earlier runs have listed.

    def _folders(self) -> dict[str, list[str]]:
        """The names of the files in each folder of the plan."""
        folders: dict[str, list[str]] = defaultdict(list)
        with storage_errors(f"listing {self.plan.uri}"):
            self.plan.fs.invalidate_cache()
            for path in sorted(self.plan.fs.find(self.plan.path)):
                folder, _, name = self._name_of(path).partition("/")
                folders[folder].append(name)
        return folders

    def _name_of(self, path: str) -> str:
        return path[len(self.plan.path.rstrip("/")) + 1 :]

    def _take_up(self, folders: dict[str, list[str]], relist: bool) -> None:
        """Take up the newest run's listing, if all of it is there, it is of the same inputs, and it was not closed. To
        ``relist`` takes up nothing but the mounts of other inputs."""
        matches = [match for name in folders if (match := _FOLDER.fullmatch(name))]
        newest = max(matches, key=lambda match: (int(match[1]), match[2]), default=None)
        if newest is None:
            return
        own = sorted((int(match[1]), name) for name in folders[newest[0]] if (match := _CHUNK.fullmatch(name)))
        if not own:
            return
        names = [f"{newest[0]}/{name}" for _, name in own]
        there = {f"{folder}/{name}" for folder, inside in folders.items() for name in inside}
        try:
            progress = self._progress(names)
            first, last = progress[0], progress[-1]
            # Of what lay on mounts nothing else tells, when another listing is begun, maybe of other inputs.
            self._mounts_of = last.get("mounts_of", {})
            if relist:
                return
            for source in self.sources:
                source.remember_mounts(self._mounts_of.get(source.place.uri, ()))
            if last["closed"] or [number for number, _ in own] != list(range(len(own))):
                return
            if first["inputs"] != self._digest or not there.issuperset(first["adopted"]):
                return
            names = [*first["adopted"], *names]
            progress = [*self._progress(first["adopted"]), *progress]
        except (pa.ArrowInvalid, ValueError, KeyError, TypeError):
            return  # A chunk is damaged, or somebody else's.
        for name, each in zip(names, progress, strict=True):
            self._add_progress(each)
            if each["rows"]:
                self._chunks.append(self.plan.join(name))
            if each["rows"] or each["units"] or each["hidden"] or each["tars"] or each.get("left_out"):
                self._adopted.append(name)
        if self._adopted:
            self.resumed_at = progress[0]["at"]

    def _progress(self, names: list[str]) -> list[dict[str, Any]]:
        """What the metadata of chunks say."""

        def read(name: str) -> dict[str, Any]:
            place = self.plan.join(name)
            with storage_errors(f"reading {place.uri}"):
                try:
                    with open_file(place) as file:
                        return json.loads(pq.read_metadata(file).metadata[_METADATA])
                except OSError as error:
                    if is_of_arrow(error):
                        raise ValueError(str(error)) from error
                    raise

        return list(read_ahead(read, names, NUM_LISTERS))

    def _add_progress(self, progress: dict[str, Any]) -> None:
        self.num_rows += progress["rows"]
        self.num_hidden += progress["hidden"]
        for number, name, *state in progress["units"]:
            key, unit = (number, name), _Unit(*state)
            if unit.edition != self._units.get(key, unit).edition:
                self._supersede(key, unit.since, progress["at"])
            self._units[key] = unit
        self.known_tars.update((number, container) for number, container in progress["tars"])
        for values in progress.get("left_out", ()):
            event = LeftOut(*values)
            self._left_out[event.input, event.container][event.reason] = event

    def _compare(self) -> None:
        """Begin what the stored listing lacks, and again what is of another version by now; leave out what is gone."""
        counts: Counter[str] = Counter()
        for number, source in enumerate(self.sources):
            versions, units = source.versions(), source.units()
            for key in [(number, unit) for unit in units]:
                version, stored = versions.get(key[1]), self._units.get(key)
                if stored is None:
                    self._units[key] = _Unit(version)
                    self._touched.add(key)
                elif version is not None and stored.version != version:
                    self._begin_again(key, version)
                    counts["have changed since and are listed again"] += 1
            if versions:
                gone = [key for key in self._units if key[0] == number and key[1] not in versions]
                if source.place.is_local:  # Of files that are gone from a folder, one tells of all.
                    for uri in {posixpath.dirname(uri): uri for _, uri in gone if posixpath.isabs(uri)}.values():
                        witnesses.wait_for(path_of(uri), source.known, AWAY_SECONDS, self.remarks.append)
                for key in gone:
                    del self._units[key]
                    self.superseded[key] = ALL_ROWS
                    counts["are gone, with the images in them"] += 1
        self.remarks += [f"files of the input that {what}: {count:,}" for what, count in counts.items()]
        self._open = {key for key, unit in self._units.items() if not unit.is_done}
        self.is_complete = not self._open

    def _begin_again(self, key: _Key, version: str | None) -> None:
        """A unit is to be listed from its start, and its rows up to now count no longer."""
        since = self.num_rows
        self._units[key] = _Unit(version, since=since, edition=self._units[key].edition + 1)
        self._touched.add(key)
        self._supersede(key, since, time.time())

    def _supersede(self, key: _Key, since: int, at: float) -> None:
        self.superseded[key], self.changed[key] = since, at
        self.known_tars.discard(key)
        self._left_out.pop(key, None)

    # What callers see.

    def __enter__(self) -> Listing:
        with self._storing:
            self._publish("chunk", [], self._touched, adopted=self._adopted)
            self._touched.clear()
            self._remove_all_but(set(self._adopted))
        if not self.is_complete:
            self._begin(self._open)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        with self._room:
            self._room.notify_all()
        deadline = time.monotonic() + 1
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    @property
    def keys_per_second(self) -> float:
        return (self.num_rows - self._num_rows_at_start) / max(1e-9, time.monotonic() - self._started)

    @property
    def mean_image_bytes(self) -> float | None:
        """Bytes of an image in a tar, by the tars that were read in this run."""
        return self._member_bytes / self._num_members if self._num_members else None

    def chunks(self) -> list[Location]:
        """The chunks taken up, then those listed in this run so far."""
        return list(self._chunks)

    def member_chunks(self) -> list[Location]:
        """The stored members of tars that were read to their end in this run."""
        return list(self._members)

    def wait(self, num_chunks: int, seconds: float) -> bool:
        """Wait until there are more than ``num_chunks`` chunks or all is listed; whether that is so.

        Raises:
            CaprayError: what stopped the listing.
        """
        with self._state:
            self._state.wait_for(lambda: self._error or self.is_complete or len(self._chunks) > num_chunks, seconds)
            self._check()
            return self.is_complete or len(self._chunks) > num_chunks

    def relist(self, number: int, container: str) -> bool:
        """Begin to list a container again that is no longer what was listed; False when it changes too often."""
        with self._storing, self._state:
            self._check()
            key = number, container
            if key in self.relisted:
                return True
            if not self._may_relist(key):
                return False
            self.relisted.add(key)
            self._begin_again(key, None)
            self._open.add(key)
            self.is_complete = False
            self._begin([key])
        return True

    def rewritten_lists(self) -> list[tuple[int, str]]:
        """The lists and tables of URIs that are another version now than was listed: reading their images does not tell, as
        it does of containers that hold them. One that cannot be looked at counts as it was."""
        with self._state:
            listed = {
                key: unit.version
                for key, unit in self._units.items()
                if unit.is_done and unit.version and lists_uris(self.sources[key[0]])
            }

        def is_rewritten(key: _Key) -> bool:
            try:
                return container_at(key[1]).version != listed[key]
            except CaprayError:
                return False

        rewritten = read_ahead(is_rewritten, listed, NUM_LISTERS)
        return [key for key, is_new in zip(listed, rewritten, strict=True) if is_new]

    def _may_relist(self, key: _Key) -> bool:
        self._num_relists[key] += 1
        return self._num_relists[key] <= MAX_RELISTS

    def versions_listed_again(self) -> dict[str, str]:
        """Of the containers that were begun again in this run, the version of each that is listed now."""
        with self._state:
            return {key[1]: version for key in self._num_relists if (version := self._units[key].version) is not None}

    def add_members(self, event: TarMembers) -> None:
        """Take the images of a tar that was read to its end. They are stored with those of others, or by ``flush``."""
        with self._storing:
            if not self._held_members:
                self._members_since = time.monotonic()
            self._held_members.append(event)
            self._num_members += event.members.num_rows
            self._member_bytes += sum(event.members["size"].to_pylist())
            held = sum(each.members.num_rows for each in self._held_members)
            if held >= FIRST_CHUNK_ROWS or time.monotonic() - self._members_since > MAX_CHUNK_SECONDS:
                self.flush()

    def add_left_out(self, event: LeftOut) -> None:
        """Take what of a tar was left out. It is stored with what is stored next."""
        with self._storing:
            self._left_out[event.input, event.container][event.reason] = event
            self._new_left_out.append(event)

    def count_left_out(self) -> dict[str, tuple[int, str]]:
        """By the reason in LEFT_OUT how many files of tars were left out, and the name of one."""
        counts: dict[str, tuple[int, str]] = {}
        for events in self._left_out.values():
            for reason, event in events.items():
                number, _ = counts.get(reason, (0, ""))
                counts[reason] = number + event.number, f"{event.container}#{event.example}"
        return counts

    def flush(self) -> None:
        """Store the members that are held, and what was left out."""
        with self._storing:
            held = {(each.input, each.container): each for each in self._held_members}
            self._held_members = []
            # What was read of a version that is no longer the listed one comes too late.
            events = {key: each for key, each in held.items() if self._units[key].version == each.version}
            if tars := events.keys() - self.known_tars:
                self._publish("members", [self._members_of(events[key]) for key in sorted(tars)], tars=tars)
                self.known_tars |= tars
            elif self._new_left_out:
                self._publish("members", [])

    def _members_of(self, event: TarMembers) -> pa.Table:
        same = {"kind": "member", "container": event.container, "version": event.version}
        rows = event.members.append_column("uri", event.members["image_id"])
        for name, value in same.items():
            rows = rows.append_column(name, pa.repeat(pa.scalar(value), rows.num_rows))
        return self._aligned(event.input, rows)

    def close(self) -> None:
        """End the listing: a later run starts a new one. What a frozen run may still write of it, or of older ones, is
        ignored."""
        with self._storing:
            last = self._publish("chunk", [], closed=True)
            self._remove_all_but({self._name_of(last.path)}, own=True)

    # Listing, in threads.

    def _begin(self, keys: Iterable[_Key]) -> None:
        for key in keys:
            self._waiting.put((key, replace(self._units[key])))
        if not self._is_listing:
            self._is_listing = True
            targets = [self._list] * NUM_LISTERS
            self._threads = [threading.Thread(target=target, daemon=True) for target in (*targets, self._collect)]
            for thread in self._threads:
                thread.start()

    def _list(self) -> None:
        while self._is_listing and not self._stop.is_set():
            try:
                key, unit = self._waiting.get(timeout=0.1)
            except queue.Empty:
                continue
            number, name = key
            source = self.sources[number]
            try:
                for page in source.pages(name, unit.after):
                    rows = self._aligned(number, source.selection.filter(page.rows))
                    if not self._put(key, unit.edition, replace(page, rows=rows)):
                        return
                self._put(key, unit.edition, None)
            except Exception as error:
                self._put(key, unit.edition, error)

    def _put(self, key: _Key, edition: int, page: Page | Exception | None) -> bool:
        """Hand on what was listed, once there is room for it; False when the listing is left."""
        with self._room:
            self._room.wait_for(lambda: self._num_queued < MAX_QUEUED_ROWS or self._stop.is_set())
            self._num_queued += page.rows.num_rows if isinstance(page, Page) else 0
        self._pages.put((key, edition, page))
        return not self._stop.is_set()

    def _collect(self) -> None:
        """Gather pages into chunks."""
        try:
            while not self._stop.is_set():
                with suppress(queue.Empty):
                    key, edition, page = self._pages.get(timeout=0.2)
                    if isinstance(page, Page):
                        with self._room:
                            self._num_queued -= page.rows.num_rows
                            self._room.notify_all()
                    self._take(key, edition, page)
                if not self._open or self._is_due():
                    self._store()
                with self._state:
                    if self.is_complete:
                        self._is_listing = False
                        return
        except BaseException as error:
            self._fail(error)

    def _take(self, key: _Key, edition: int, page: Page | Exception | None) -> None:
        with self._storing, self._state:
            unit = self._units[key]
            if unit.edition != edition:
                return
            if isinstance(page, ContainerChanged) and self._may_relist(key):
                self._begin_again(key, None)
                self._begin([key])
            elif isinstance(page, Exception):
                if not isinstance(page, CaprayError):
                    raise CaprayError(f"listing {key[1]!r}: {page!r}") from page
                if not self._is_fault(key, page):
                    raise page
                self.faults[self.sources[key[0]].name_of(key[1])] = page
                self._open.discard(key)
            elif page is None:
                unit.is_done = True
                self._touched.add(key)
                self._open.discard(key)
            else:
                self._take_page(key, unit, page)

    def _is_fault(self, key: _Key, error: CaprayError) -> bool:
        """Whether ``error`` is of this unit alone: the others are listed, and the run ends with it."""
        if isinstance(error, ConfigError):
            return sum(number == key[0] for number, _ in self._units) > 1
        return not isinstance(error, StorageUnavailable)

    def _take_page(self, key: _Key, unit: _Unit, page: Page) -> None:
        unit.after = page.after
        self._touched.add(key)
        self._hidden += 0 if unit.edition else page.hidden  # Told when it was listed for the first time.
        unit.version = page.version or unit.version
        if page.rows.num_rows:
            self._held.append((key, unit.edition, page.rows))
            self._num_held += page.rows.num_rows
        new = [(key[0], name) for name in page.found if (key[0], name) not in self._units]
        self._units |= {key: _Unit() for key in new}
        self._touched.update(new)
        self._open.update(new)
        self._begin(new)

    def _is_due(self) -> bool:
        now = time.monotonic()
        rows = min(MAX_CHUNK_ROWS, max(FIRST_CHUNK_ROWS, self.num_rows // 10))
        seconds = min(MAX_CHUNK_SECONDS, max(FIRST_CHUNK_SECONDS, (now - self._started) / 10))
        return self._num_held >= rows or (bool(self._touched) and now - self._last_stored >= seconds)

    def _store(self) -> None:
        """Store what is held, but for pages of what has been begun again since."""
        with self._storing:
            rows = [rows for key, edition, rows in self._held if self._units[key].edition == edition]
            if rows or self._touched or self._hidden:
                self._publish("chunk", rows, self._touched, self._hidden)
            self._held, self._num_held, self._hidden, self._last_stored = [], 0, 0, time.monotonic()
            self._touched.clear()
            with self._state:
                self.is_complete = not self._open
                self._state.notify_all()

    def _aligned(self, number: int, rows: pa.Table) -> pa.Table:
        """``rows`` of an input in all columns of the schema."""
        columns = {"input": pa.repeat(pa.scalar(number, pa.int16()), rows.num_rows)}
        columns["position"] = pa.repeat(pa.scalar(0, pa.int64()), rows.num_rows)
        columns |= {name: rows[name] for name in rows.column_names}
        nothing = pa.nulls(rows.num_rows)
        return pa.table([columns.get(field.name, nothing).cast(field.type) for field in self.schema], schema=self.schema)

    # Files.

    def _publish(
        self,
        kind: str,
        tables: list[pa.Table],
        units: Iterable[_Key] = (),
        hidden: int = 0,
        tars: Iterable[_Key] = (),
        adopted: list[str] | None = None,
        closed: bool = False,
    ) -> Location:
        """Write the next chunk. One that may have been written or not is the last: its number is not used again."""
        self._check()
        rows = pa.concat_tables([self.schema.empty_table(), *tables])
        positions = pa.array(range(self.num_rows, self.num_rows + rows.num_rows), pa.int64())
        progress = {
            "inputs": self._digest,
            "at": time.time(),
            "rows": rows.num_rows,
            "hidden": hidden,
            "units": [[*key, *astuple(self._units[key])] for key in sorted(units)],
            "tars": sorted(tars),
            "left_out": [astuple(event) for event in self._new_left_out],
            "adopted": adopted,
            "mounts_of": self._mounts_of | {source.place.uri: sorted(source.mounts) for source in self.sources},
            "closed": closed,
        }
        rows = rows.set_column(0, self.schema.field(0), positions)
        rows = rows.replace_schema_metadata({_METADATA: json.dumps(progress).encode()})
        location = self.folder.join(f"{kind}-{self._num_stored:06d}.parquet")
        try:
            self.write(location, encode_places(rows))
        except BaseException as error:
            self._fail(error)
            raise
        self._new_left_out = []
        with self._state:
            self._num_stored += 1
            self.num_rows += rows.num_rows
            self.num_hidden += hidden
            if rows.num_rows:
                (self._members if kind == "members" else self._chunks).append(location)
        return location

    def _fail(self, error: BaseException) -> None:
        with self._state:
            self._error = self._error or error
            self._state.notify_all()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _remove_all_but(self, kept: set[str], own: bool = False) -> None:
        """Delete what older runs left, and with ``own`` what this one has written, but for the files ``kept``."""
        for folder, names in self._folders().items():
            match = _FOLDER.fullmatch(folder)
            if match and int(match[1]) >= self.number and not (own and folder == self._name_of(self.folder.path)):
                continue
            files = [name for name in names if f"{folder}/{name}" not in kept]
            paths = [self.plan.join(folder, name).path for name in files]
            with storage_errors(f"removing {self.plan.join(folder).uri}"), suppress(FileNotFoundError):
                if len(files) == len(names):
                    self.plan.fs.rm(self.plan.join(folder).path, recursive=True)
                elif paths:
                    self.plan.fs.rm(paths)


def _digest_of(config: CaptionConfig, sources: list[Source]) -> str:
    """What is listed, as what, and how. Settings at their defaults are left out: those that a version does not know are
    so."""
    settings = config.subset(SourceSettings).model_dump(mode="json", exclude_defaults=True)
    settings.pop("input_kind", None)  # `read_as` has it.
    what = [config.inputs, [source.read_as for source in sources], config.keep, settings]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()
