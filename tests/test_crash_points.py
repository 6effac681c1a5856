"""Whatever happens at whichever request or system call, an output stays readable, and the next runs complete it.

A model of the job (a lease, an anti-join, results in random order and cuts, a look at what is missing) runs on a model of
S3 and on a real folder whose system calls can end the process. It knows nothing of Ray, of models or of the real plan.
"""

from __future__ import annotations

import builtins
import io
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import duckdb
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capray import storage
from capray.captioning import lease as lease_module
from capray.captioning.lease import EXPIRY_SECONDS, Lease
from capray.captioning.plan import remove_duplicates
from capray.captioning.writer import PartWriter
from capray.errors import CaprayError, StorageError
from capray.output import Output
from capray.storage import locate
from capray.tables import CAPTIONS, FAILURES, FINAL_FAILURES
from tests.model_store import Crash, Fault, ModelFileSystem, Store
from tests.test_writer import captioned, failed, results

PART = re.compile(r"part-(run-\d+)-\d{5}\.parquet")


class Bucket:
    """An output on the model of S3."""

    faults = tuple(Fault)
    uri = "model://bucket/out"

    def __init__(self):
        self.store = ModelFileSystem.store = Store()
        lease_module._proved.add((locate(self.uri).fs, "bucket"))

    @contextmanager
    def process(self, fault_at: int | None, fault: Fault) -> Iterator[None]:
        """In it, the request of that number meets the fault."""
        self.store.is_process_dead = False
        self.store.faults = {} if fault_at is None else {self.store.num_requests + fault_at: fault}
        yield
        self.store.is_process_dead, self.store.faults = False, {}

    def files(self, table: str) -> dict[str, bytes]:
        prefix = f"bucket/out/{table}/"
        return {path[len(prefix) :]: data for path, data in self.store.objects.items() if path.startswith(prefix)}

    @property
    def published(self) -> list[str]:
        """The paths that were published, in order."""
        return self.store.log


class Folder:
    """An output in a real folder. The system calls that change it are numbered, and one may be the process's last."""

    faults = (Fault.CRASH_BEFORE, Fault.CRASH_AFTER)

    def __init__(self, folder: str):
        self.uri = folder
        self.published: list[str] = []
        self._calls = 0
        self._fault_at: int | None = None
        self._fault = Fault.CRASH_BEFORE
        self._is_dead = False
        self._unsynced: set[int] = set()

    @contextmanager
    def process(self, fault_at: int | None, fault: Fault) -> Iterator[None]:
        self._calls, self._fault_at, self._fault, self._is_dead = 0, fault_at, fault, False
        with ExitStack() as patches:
            for module in (storage, lease_module):
                patches.enter_context(mock.patch.object(module, "os", _Calls(self)))
                patches.enter_context(mock.patch.object(module, "open", self.open, create=True))
            yield
        if self._is_dead:
            self._lose_power()

    def call(self, action: Callable, *arguments, **options):
        """A system call that changes something."""
        if self._is_dead:
            raise Crash
        is_last = self._calls == self._fault_at
        self._calls += 1
        if is_last:
            self._is_dead = True
        if not is_last or self._fault is Fault.CRASH_AFTER:
            answer = action(*arguments, **options)
        if is_last:
            raise Crash
        return answer

    def open(self, path, mode: str = "r", *arguments, **options):
        if self._is_dead:
            raise Crash
        if "w" not in mode:
            return builtins.open(path, mode, *arguments, **options)
        return _File(self, self.call(builtins.open, path, mode, *arguments, **options))

    def files(self, table: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in Path(self.uri, table).glob("*")}

    def _lose_power(self) -> None:
        """Of files that were never synced half is left."""
        for path in Path(self.uri).rglob("*"):
            if path.is_file() and path.stat().st_ino in self._unsynced:
                os.truncate(path, path.stat().st_size // 2)
        self._unsynced.clear()


class _Calls:
    """``os`` for one module."""

    def __init__(self, folder: Folder):
        self._folder = folder

    def __getattr__(self, name: str):
        return getattr(os, name)

    def replace(self, source, target) -> None:
        def replace() -> None:
            os.replace(source, target)
            self._folder.published.append(target)

        self._folder.call(replace)

    def fsync(self, handle: int) -> None:
        def sync() -> None:
            os.fsync(handle)
            self._folder._unsynced.discard(os.fstat(handle).st_ino)

        self._folder.call(sync)

    def unlink(self, path) -> None:
        self._folder.call(os.unlink, path)

    def open(self, path, flags: int, *arguments):
        return self._folder.call(os.open, path, flags, *arguments) if flags & os.O_CREAT else os.open(path, flags)

    def fdopen(self, handle: int, mode: str):
        return _File(self._folder, os.fdopen(handle, mode))


class _File:
    """A file being written: the process may end with half of a write in it. The system closes it then."""

    def __init__(self, folder: Folder, file):
        self._folder, self._file = folder, file
        folder._unsynced.add(os.fstat(file.fileno()).st_ino)

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        for half in (data[: len(data) // 2], data[len(data) // 2 :]):
            self._folder.call(self._file.write, half)


@dataclass(frozen=True)
class Process:
    """How one run goes: when it meets what, and how its results come in."""

    fault_at: int | None = None
    fault: Fault = Fault.CRASH_BEFORE
    insists: bool = True
    """A write that failed is tried again; else the run ends."""
    part_rows: int = 3
    chunk_rows: int = 2
    wait_seconds: float = 0.0
    """Between two chunks: a part is cut after 60, the lease renewed before a publish after 20."""
    replays: bool = False
    """The first chunk comes twice, and its copies into different parts."""
    loses: bool = False
    """The last chunk never comes in the first pass."""


@dataclass
class World:
    """An output, what each attempt at an image gives, and what was seen of it all."""

    place: Bucket | Folder
    outcomes: dict[str, list[str]]
    """By image id, what its attempts give: "caption", or a kind of failure. The last one is for good."""
    num_runs: int = 0
    attempts: Counter = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)
    is_doubling: bool = False
    """Whether something happened after which an id may stand twice until duplicates are removed."""
    clock: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(now=1000.0, CLOCK_MONOTONIC=0))

    def run(self, process: Process, before_publish: Callable[[int], None] = lambda number: None) -> bool:
        """A run with a new id; whether it completed. ``before_publish`` is given the number of the publish, from 0."""
        self.num_runs += 1
        self.is_doubling |= process.replays
        lease = None
        self.clock.sleep, self.clock.clock_gettime = self._sleep, lambda number: self.clock.now
        with mock.patch.object(lease_module, "time", self.clock), self.place.process(process.fault_at, process.fault):
            output = Output(self.place.uri)
            lease = Lease(output.private, renew_seconds=3600)
            try:
                with lease:
                    self._caption(output, lease, process, before_publish)
                completed = True
            except (Crash, CaprayError, duckdb.Error):  # DuckDB makes its own error of whatever a filesystem raises.
                completed = False
            finally:
                lease._stop.set()
        self.look()
        return completed

    def _sleep(self, seconds: float) -> None:
        self.clock.now += seconds

    def _caption(self, output: Output, lease: Lease, process: Process, before_publish: Callable[[int], None]) -> None:
        run_id = f"run-{self.num_runs:04d}"
        publishes = iter(range(10_000))

        def guard() -> None:
            lease.check()
            before_publish(next(publishes))

        writer = PartWriter(output, run_id, process.part_rows, 60, guard, lambda: self.clock.now)

        def write(action: Callable[[], None], again: Callable[[], None]) -> None:
            try:
                action()
            except StorageError:
                if not process.insists:
                    raise
                again()

        for number in range(4):
            todo = self._remaining(output, run_id)
            if not todo:
                break
            chunks = [todo[start : start + process.chunk_rows] for start in range(0, len(todo), process.chunk_rows)]
            if process.replays:
                chunks.insert(1, chunks[0])
            if process.loses and number == 0:
                chunks.pop()
            for position, chunk in enumerate(chunks):
                if process.replays and position == 1:
                    write(writer.flush, writer.flush)
                rows = [self._attempt(image_id) for image_id in chunk]
                write(lambda rows=rows: writer.add(results(*rows)), lambda: writer.add(results()))
                self._sleep(process.wait_seconds)
                write(writer.tick, writer.tick)
            write(writer.flush, writer.flush)
        lease.check()
        num_doubled = remove_duplicates(output)
        assert self.is_doubling or not num_doubled
        assert not self._remaining(output, run_id)

    def _attempt(self, image_id: str) -> dict:
        outcomes = self.outcomes[image_id]
        outcome = outcomes[min(self.attempts[image_id], len(outcomes) - 1)]
        self.attempts[image_id] += 1
        return captioned(image_id) if outcome == "caption" else failed(image_id, outcome)

    def _remaining(self, output: Output, run_id: str) -> list[str]:
        """The ids with neither a caption nor a final failure, nor two attempts in this run."""
        final = ", ".join(f"'{kind}'" for kind in FINAL_FAILURES)
        with output.connect() as connection:
            rows = connection.execute(f"""
                SELECT image_id FROM captions
                UNION SELECT image_id FROM failures WHERE error_type IN ({final})
                UNION SELECT image_id FROM failure_log WHERE run_id = '{run_id}' GROUP BY image_id HAVING count(*) >= 2
            """).fetchall()
        return sorted(set(self.outcomes) - {image_id for (image_id,) in rows})

    def rows(self, table: str) -> list[dict]:
        """What a reader sees now, who may read any part."""
        schema = {"captions": CAPTIONS, "failures": FAILURES}[table]
        rows = []
        for name, data in sorted(self.place.files(table).items()):
            named = PART.fullmatch(name)
            assert named, f"{name} is no part"
            part = pq.read_table(io.BytesIO(data))
            assert part.schema.equals(schema)
            assert set(part["run_id"].to_pylist()) <= {named[1]}
            rows += part.to_pylist()
        return rows

    def look(self) -> None:
        """What holds at every moment."""
        captions = Counter(row["image_id"] for row in self.rows("captions"))
        failures = {row["image_id"] for row in self.rows("failures")}
        assert self.is_doubling or set(captions.values()) <= {1}, f"captioned twice: {captions}"
        assert set(captions) | failures <= set(self.outcomes)
        assert self.seen <= set(captions), "captions vanished"
        self.seen |= set(captions)
        published = [path[path.index("/out/") + 5 :] if "/out/" in path else path for path in self.place.published]
        for path in published:
            twin = path.replace("failures/", "captions/")
            if "failures/part-" in path and twin in published:
                assert published.index(twin) < published.index(path), "failures before the captions of their cut"

    def check_complete(self) -> None:
        """Every id is captioned once or has failed, as its attempts went."""
        captions = Counter(row["image_id"] for row in self.rows("captions"))
        failures: dict[str, str] = {}
        for row in sorted(self.rows("failures"), key=lambda row: (row["failed_at"], row["run_id"])):
            failures[row["image_id"]] = row["error_type"]
        assert set(captions.values()) <= {1}, f"captioned twice: {captions}"
        for image_id, outcomes in self.outcomes.items():
            assert image_id in captions or image_id in failures, f"{image_id} is lost"
            assert (image_id in captions) <= ("caption" in outcomes)
            assert image_id in captions or failures[image_id] in outcomes
            assert image_id in captions or outcomes != ["caption"]


OUTCOMES = st.sampled_from(
    [["caption"]] * 3 + [["truncated"], ["denied"], ["denied", "caption"], ["denied", "denied", "denied", "caption"]]
)
IMAGES = st.lists(OUTCOMES, min_size=1, max_size=9).map(
    lambda drawn: {f"{i}.jpg": each for i, each in enumerate(drawn)}
)


def processes(place: type[Bucket | Folder], max_fault_at: int) -> st.SearchStrategy[Process]:
    return st.builds(
        Process,
        fault_at=st.integers(0, max_fault_at),
        fault=st.sampled_from(place.faults),
        insists=st.booleans(),
        part_rows=st.integers(1, 4),
        chunk_rows=st.integers(1, 4),
        wait_seconds=st.sampled_from([0.0, 0.0, 25.0, 70.0]),
        replays=st.sampled_from([False, False, False, True]),
        loses=st.sampled_from([False, False, True]),
    )


def stable(max_examples: int) -> settings:
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )


def crash_and_go_on(world: World, runs: list[Process]) -> None:
    for process in runs:
        world.run(process)
    assert world.run(Process()), "a run that meets nothing completes"
    world.check_complete()


@stable(40)
@given(images=IMAGES, runs=st.lists(processes(Bucket, 60), min_size=1, max_size=3))
def test_any_fault_at_any_request_to_s3(images, runs):
    crash_and_go_on(World(Bucket(), images), runs)


@stable(30)
@given(images=IMAGES, runs=st.lists(processes(Folder, 80), min_size=1, max_size=3))
def test_the_end_at_any_system_call(images, runs):
    with tempfile.TemporaryDirectory() as folder:
        crash_and_go_on(World(Folder(f"{folder}/out"), images), runs)


MIXED = {"0.jpg": ["caption"], "1.jpg": ["truncated"], "2.jpg": ["caption"], "3.jpg": ["caption"], "4.jpg": ["denied"]}
"""With parts of three rows: captions and a failure in the first cut, and in the second."""


def num_writes(world: World) -> list[int]:
    """The numbers of the requests that change something, in a run that meets nothing."""
    assert world.run(Process())
    requests = world.place.store.requests
    return [number for number, (verb, _) in enumerate(requests) if verb in ("PUT", "DELETE")]


@pytest.mark.parametrize("fault", Fault)
def test_every_write_of_a_run_on_s3(fault):
    writes = num_writes(World(Bucket(), MIXED))
    assert len(writes) >= 6
    for number in writes:
        crash_and_go_on(World(Bucket(), MIXED), [Process(number, fault)])


class TestInsideAPublish:
    """The first cut holds captions and a failure: two PUTs, the captions' first."""

    @pytest.fixture
    def world(self) -> World:
        return World(Bucket(), MIXED)

    def number_of(self, table: str) -> int:
        world = World(Bucket(), MIXED)
        world.run(Process())
        paths = [path if verb == "PUT" else "" for verb, path in world.place.store.requests]
        return paths.index(f"bucket/out/{table}/part-run-0001-00000.parquet")

    def parts(self, world: World, table: str) -> dict[str, list[str]]:
        return {
            name: pq.read_table(io.BytesIO(data))["image_id"].to_pylist()
            for name, data in world.place.files(table).items()
        }

    @pytest.mark.parametrize(
        ("table", "fault", "captions", "failures"),
        [
            ("captions", Fault.CRASH_BEFORE, {}, {}),
            ("captions", Fault.CRASH_AFTER, {"part-run-0001-00000.parquet": ["0.jpg", "2.jpg"]}, {}),
            ("failures", Fault.CRASH_BEFORE, {"part-run-0001-00000.parquet": ["0.jpg", "2.jpg"]}, {}),
            (
                "failures",
                Fault.CRASH_AFTER,
                {"part-run-0001-00000.parquet": ["0.jpg", "2.jpg"]},
                {"part-run-0001-00000.parquet": ["1.jpg"]},
            ),
        ],
    )
    def test_the_end(self, table, fault, captions, failures):
        number = self.number_of(table)
        world = World(Bucket(), MIXED)
        assert not world.run(Process(number, fault))
        assert (self.parts(world, "captions"), self.parts(world, "failures")) == (captions, failures)
        assert world.run(Process())
        world.check_complete()

    @pytest.mark.parametrize("table", ["captions", "failures"])
    @pytest.mark.parametrize("fault", [Fault.ANSWER_LOST, Fault.ANSWER_LOST_AND_ASKED_AGAIN, Fault.FAILS])
    def test_a_second_try_replaces_the_same_part(self, table, fault):
        number = self.number_of(table)
        world = World(Bucket(), MIXED)
        assert world.run(Process(number, fault))
        world.check_complete()
        assert list(self.parts(world, "captions")) == [f"part-run-0001-0000{number}.parquet" for number in range(2)]
        undisturbed = World(Bucket(), MIXED)
        undisturbed.run(Process())
        for kind in ("captions", "failures"):
            assert self.parts(world, kind) == self.parts(undisturbed, kind)


class TestFrozen:
    """A writer stops between the check of its lease and its PUT, and wakes up when another run took over."""

    def freeze(self, world: World, frozen: Process, at: int, meanwhile: list[Process]) -> None:
        """Run ``frozen``, and the others while it stands still before its publish number ``at``."""
        seen: list[bool] = []

        def before_publish(number: int) -> None:
            if number == at and not seen:
                world.is_doubling = True
                world.clock.now += EXPIRY_SECONDS
                own = world.num_runs
                seen.extend(world.run(process) for process in meanwhile)
                world.num_runs = max(own, world.num_runs)

        world.run(frozen, before_publish)

    def test_its_part_lands_and_its_next_is_held_back(self):
        world = World(Bucket(), {f"{i}.jpg": ["caption"] for i in range(6)})
        self.freeze(world, Process(), 0, [Process()])
        doubled = Counter(row["image_id"] for row in world.rows("captions"))
        assert sorted(image_id for image_id, count in doubled.items() if count == 2) == ["0.jpg", "1.jpg", "2.jpg"]
        assert sorted(world.place.files("captions")) == [
            "part-run-0001-00000.parquet",
            "part-run-0002-00000.parquet",
            "part-run-0002-00001.parquet",
        ]
        output = Output(world.place.uri)
        assert remove_duplicates(output) == 3
        world.check_complete()
        assert {row["run_id"] for row in world.rows("captions") if row["image_id"] < "3"} == {"run-0001"}
        assert remove_duplicates(output) == 0

    def test_a_failure_that_lands_late_is_none_of_a_captioned_image(self):
        world = World(Bucket(), {"0.jpg": ["denied", "caption"]})
        self.freeze(world, Process(), 0, [Process()])
        assert [row["image_id"] for row in world.rows("failures")] == ["0.jpg"]
        with Output(world.place.uri).connect() as connection:
            assert connection.execute("SELECT * FROM failures").fetchall() == []
        world.check_complete()

    @stable(15)
    @given(
        images=IMAGES,
        at=st.integers(0, 3),
        frozen=st.builds(Process, part_rows=st.integers(1, 4), chunk_rows=st.integers(1, 4)),
        meanwhile=st.lists(processes(Bucket, 80), min_size=1, max_size=2),
    )
    def test_at_any_publish(self, images, at, frozen, meanwhile):
        world = World(Bucket(), images)
        self.freeze(world, frozen, at, meanwhile)
        crash_and_go_on(world, [])


def test_an_id_twice_in_the_only_part_is_removed():
    output = Output(World(Bucket(), {}).place.uri)
    writer = PartWriter(output, "run-0001", 3, 60, lambda: None)
    writer.add(results(captioned("0.jpg"), captioned("0.jpg")))
    writer.flush()
    assert remove_duplicates(output) == 1


def test_the_model_shows_what_a_crash_does(tmp_path):
    """Files that are not synced lose their end, and a crash leaves nothing running."""
    place = Folder(str(tmp_path))
    with place.process(2, Fault.CRASH_AFTER), pytest.raises(Crash), place.open(tmp_path / "file", "wb") as file:
        file.write(b"12345678")
    assert (tmp_path / "file").read_bytes() == b"1234"
