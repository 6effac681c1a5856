"""Parts are cut by rows, bytes and age, hold every row once, and appear only while the run may write."""

import datetime
import itertools
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capray.captioning import writer as writer_module
from capray.captioning.rows import results_schema
from capray.captioning.writer import FencedWrites, PartWriter
from capray.deadlines import now
from capray.errors import CaprayError, LeaseHeldError, StorageError, WriteUnanswered
from capray.output import Output
from capray.storage import Location, write_atomic
from capray.tables import CAPTIONS, FAILURES
from tests.oracle import read_parts

RUN = "20260102T030405Z-abcd"
RESULTS = results_schema()


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Writes:
    """What ``write`` is in a job, the writes fenced by the lease: refuses while ``error`` is set."""

    def __init__(self, output: Output):
        self.output = output
        self.error: Exception | None = None
        self.before: Callable[[Location], None] = lambda location: None
        self.written: list[str] = []

    def __call__(self, location: Location, data: bytes) -> None:
        self.before(location)
        if self.error:
            raise self.error
        write_atomic(location, data, self.output.scratch)
        self.written.append(location.uri)


def captioned(image_id: str) -> dict:
    return {
        "image_id": image_id,
        "uri": f"s3://bucket/{image_id}",
        "caption": f"a caption of {image_id}",
        "log_prob": -1.5,
        "score": -0.5,
        "num_tokens": 4,
        "finished": True,
        "alternatives": [{"caption": "another", "log_prob": -2.0, "score": -0.75}],
        "width": 40,
        "height": 30,
        "sha256": b"\1" * 32,
        "model_id": "m",
        "captioned_at": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    }


def failed(image_id: str, kind: str = "truncated") -> dict:
    return {"image_id": image_id, "uri": None, "error_type": kind, "message": f"{image_id} is {kind}"}


def results(*rows: dict) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=RESULTS)


def captions(*image_ids: str) -> pa.Table:
    return results(*map(captioned, image_ids))


class Fixture:
    def __init__(self, folder: str, part_rows: int = 3, part_seconds: float = 60, newest_failure: int = 0):
        self.folder, self.clock, self.writes = folder, Clock(), Writes(Output(folder))
        self.writer = PartWriter(Output(folder), RUN, part_rows, part_seconds, self.writes, newest_failure, clock=self.clock)

    def add(self, table: pa.Table) -> None:
        """Add rows, and wait until what they cut is published."""
        self.writer.add(table)
        self.wait()
        self.writer.tick()

    def wait(self) -> None:
        """Until what is published in the background is there, or refused."""
        wait([self.writer._publishing] if self.writer._publishing else [])

    def num_held(self) -> int:
        return self.writer._held.num_rows

    def parts(self, table: str = "captions") -> list[list[str]]:
        """The image ids of every part, in the order of the parts' names."""
        self.wait()
        files = sorted((Path(self.folder) / table).glob("*.parquet"))
        return [pq.read_table(file)["image_id"].to_pylist() for file in files]


@pytest.fixture
def job(tmp_path) -> Fixture:
    return Fixture(str(tmp_path))


class TestCuts:
    def test_by_rows(self, job):
        job.writer.add(captions("a", "b"))
        assert (job.parts(), job.num_held()) == ([], 2)
        job.writer.add(captions(*"cdefgh"))
        assert (job.parts(), job.num_held()) == ([["a", "b", "c"], ["d", "e", "f"]], 2)
        job.writer.add(captions("i"))
        assert (job.parts()[2:], job.num_held()) == ([["g", "h", "i"]], 0)

    def test_by_the_age_of_the_oldest_row(self, job):
        job.writer.add(captions("a"))
        job.clock.now += 59
        job.writer.add(captions("b"))
        assert job.parts() == []
        job.clock.now += 1
        job.writer.tick()
        assert job.parts() == [["a", "b"]]
        job.clock.now += 600
        job.writer.add(captions("c"))
        assert len(job.parts()) == 1, "the age is the row's, not the time since the last part"
        job.clock.now += 60
        job.writer.add(captions("d"))
        assert job.parts()[1:] == [["c", "d"]]

    def test_rows_left_over_from_a_cut_are_as_old_as_their_arrival(self, job):
        job.writer.add(captions("a"))
        job.clock.now += 59
        job.writer.add(captions("b", "c", "d"))
        job.clock.now += 59
        job.writer.tick()
        assert job.parts() == [["a", "b", "c"]]
        job.clock.now += 1
        job.writer.tick()
        assert job.parts() == [["a", "b", "c"], ["d"]]

    def test_flush(self, job):
        job.writer.flush()
        assert not job.writes.written, "nothing is held, nothing is published"
        job.writer.add(captions("a"))
        job.writer.flush()
        job.writer.flush()
        assert (job.parts(), job.writer.num_parts) == ([["a"]], 1)

    def test_by_bytes(self, job, monkeypatch):
        """So that a part can be written within the lease's margin, however long its rows are."""
        monkeypatch.setattr(writer_module, "MAX_PART_BYTES", 3 * captions("a").nbytes)
        job.writer.part_rows = 100
        job.writer.add(captions(*"abcdefgh"))
        job.writer.flush()
        assert list(itertools.chain.from_iterable(job.parts())) == list("abcdefgh")
        assert [len(part) for part in job.parts()] == [3, 3, 2]

    def test_results_of_no_rows(self, job):
        job.writer.add(RESULTS.empty_table())
        job.clock.now += 100
        job.writer.tick()
        job.writer.add(captions("a"))
        assert job.parts() == [], "the wait begins with the first row"


class TestRows:
    def test_captions_and_failures_go_to_their_folders(self, job):
        job.writer.add(results(captioned("a"), failed("b", "missing"), captioned("c"), failed("d"), failed("e")))
        job.writer.flush()
        assert job.parts() == [["a", "c"]]
        assert job.parts("failures") == [["b"], ["d", "e"]]
        assert (job.writer.num_captions, job.writer.failures) == (2, {"missing": 1, "truncated": 2})

    def test_schema_and_contents(self, job, tmp_path):
        job.writer.add(results(captioned("a"), failed("b")))
        job.writer.flush()
        for table, schema in (("captions", CAPTIONS), ("failures", FAILURES)):
            (file,) = (tmp_path / table).iterdir()
            assert pq.read_schema(file).equals(schema, check_metadata=True)
            assert file.name == f"part-{RUN}-00000.parquet"
        (row,) = read_parts(str(tmp_path), "captions")
        assert row == captioned("a") | {"run_id": RUN}
        (row,) = read_parts(str(tmp_path), "failures")
        age = datetime.datetime.now(datetime.UTC) - row.pop("failed_at")
        assert abs(age.total_seconds()) < 60
        assert row == failed("b") | {"run_id": RUN}

    def test_a_failure_never_precedes_the_newest_in_the_output(self, tmp_path):
        """The latest row is the current one, also when this machine's clock is behind by ten minutes."""
        newest = time.time_ns() // 1000 + 600 * 10**6
        job = Fixture(str(tmp_path), newest_failure=newest)
        job.writer.add_failures([failed("a"), failed("b")])
        job.writer.add_failures([failed("c"), failed("d")])
        job.writer.flush()
        times = [int(row["failed_at"].timestamp() * 10**6) for row in read_parts(str(tmp_path), "failures")]
        assert min(times) > newest and times == sorted(set(times))

    def test_columns_in_another_type_are_cast(self, job, tmp_path):
        table = captions("a")
        wide = table.set_column(RESULTS.get_field_index("width"), "width", table["width"].cast(pa.int64()))
        job.writer.add(wide)
        job.writer.flush()
        (file,) = (tmp_path / "captions").iterdir()
        assert pq.read_schema(file).equals(CAPTIONS)

    def test_on_s3(self, s3, tmp_path):
        folder = f"{s3}/{tmp_path.name}"
        job = Fixture(folder)
        job.writer.add(results(captioned("a"), failed("b"), captioned("c")))
        job.writer.flush()
        output = Output(folder)
        assert [len(output.parts(place)) for place in (output.captions, output.failures)] == [1, 1]


class TestRefusedPublishing:
    def test_nothing_is_published_and_the_rows_are_kept(self, job):
        job.writes.error = CaprayError("lost the lease")
        with pytest.raises(CaprayError, match="lost the lease"):
            job.add(captions("a", "b", "c"))
        with pytest.raises(CaprayError):
            job.writer.flush()
        assert (job.parts(), job.writer.num_captions) == ([], 0)
        job.writes.error = None
        job.writer.flush()
        assert (job.parts(), job.writer.num_captions) == ([["a", "b", "c"]], 3)

    def test_rows_held_back_still_make_parts_of_the_right_size(self, job):
        job.writes.error = CaprayError("not now")
        with pytest.raises(CaprayError):
            job.writer.add(captions(*"abcdefgh"))
        job.writes.error = None
        job.writer.flush()
        assert list(itertools.chain.from_iterable(job.parts())) == list("abcdefgh")
        assert max(map(len, job.parts())) <= 3

    def test_failures_that_cannot_be_written_are_written_with_the_next_try(self, job):
        """The captions of the cut are there by then; the second try puts them under the same name."""

        def full(location: Location) -> None:
            if "/failures/" in location.path:
                raise StorageError("no space left")

        job.writes.before = full
        with pytest.raises(StorageError):
            job.add(results(captioned("a"), failed("b"), captioned("c")))
        assert (job.parts(), job.parts("failures")) == ([["a", "c"]], [])
        job.writes.before = lambda location: None
        job.writer.flush()
        assert (job.parts(), job.parts("failures")) == ([["a", "c"]], [["b"]])
        assert (job.writer.num_captions, job.writer.num_parts, job.writer.failures) == (2, 2, {"truncated": 1})

    def test_results_are_taken_while_a_part_is_written(self, job):
        """But no more than one part is in flight: what a slow store holds back is held in Ray, not in the driver."""
        may_write = threading.Event()
        job.writes.before = lambda location: may_write.wait(30)
        job.writer.add(captions("a", "b", "c"))
        job.writer.add(captions("d", "e"))
        assert job.num_held() == 2 and not job.writes.written
        third = threading.Thread(target=job.writer.add, args=(captions("f"),))
        third.start()
        third.join(0.1)
        assert third.is_alive()
        may_write.set()
        third.join()
        assert job.parts() == [["a", "b", "c"], ["d", "e", "f"]]


class TestFencedWrites:
    class Lease:
        """One that can be lost, and counts who asks."""

        margin_seconds = 7.0
        checks = 0
        is_lost = False

        def check(self) -> float:
            self.checks += 1
            if self.is_lost:
                raise LeaseHeldError("taken over")
            return now() + self.margin_seconds

    @pytest.fixture
    def output(self, tmp_path) -> Output:
        return Output(str(tmp_path))

    @pytest.fixture
    def lease(self) -> Lease:
        return self.Lease()

    def test_the_lease_is_checked_before_each_write(self, output, lease):
        write = FencedWrites(output, lease)
        write(output.job, b"1")
        lease.is_lost = True
        with pytest.raises(LeaseHeldError):
            write(output.job, b"2")
        assert Path(output.job.path).read_bytes() == b"1"

    def test_what_went_unanswered_is_sent_again_as_it_was_while_the_lease_is_held(self, output, lease, monkeypatch):
        sent = []

        def unanswered(location, data, scratch, deadline, beside):
            sent.append((location.uri, data, lease.checks, deadline - now()))
            if len(sent) < 3:
                raise WriteUnanswered("no answer")

        monkeypatch.setattr(writer_module, "write_atomic", unanswered)
        FencedWrites(output, lease)(output.job, b"bytes")
        assert [each[:3] for each in sent] == [(output.job.uri, b"bytes", check) for check in (1, 2, 3)]
        assert all(0 < seconds <= lease.margin_seconds for *_, seconds in sent)

    def test_a_process_that_was_frozen_between_the_check_and_the_write_sends_nothing(self, output, lease):
        lease.margin_seconds = -60
        with pytest.raises(WriteUnanswered):
            FencedWrites(output, lease)(output.job, b"late")
        assert not Path(output.job.path).exists()

    def test_a_store_that_never_answers(self, output, lease, monkeypatch):
        def unanswered(*arguments):
            raise WriteUnanswered("no answer")

        monkeypatch.setattr(writer_module, "write_atomic", unanswered)
        with pytest.raises(WriteUnanswered):
            FencedWrites(output, lease)(output.job, b"bytes")


OPERATIONS = st.lists(
    st.one_of(
        st.lists(st.booleans(), max_size=12).map(lambda kinds: ("add", kinds)),
        st.floats(0, 100).map(lambda seconds: ("wait", seconds)),
        st.just(("flush", None)),
    ),
    max_size=12,
)


@settings(max_examples=25, deadline=None)
@given(operations=OPERATIONS, part_rows=st.integers(1, 7), part_seconds=st.floats(1, 100))
def test_every_row_is_published_once_and_in_time(operations, part_rows, part_seconds):
    with tempfile.TemporaryDirectory() as folder:
        job = Fixture(folder, part_rows, part_seconds)
        numbers = itertools.count()
        expected: dict[str, list[str]] = {"captions": [], "failures": []}
        held: list[float] = []  # When each row that is held arrived.
        for operation, value in operations:
            if operation == "add":
                rows = []
                for is_captioned in value:
                    image_id = f"{next(numbers):04d}"
                    rows.append(captioned(image_id) if is_captioned else failed(image_id))
                    expected["captions" if is_captioned else "failures"].append(image_id)
                job.writer.add(results(*rows))
                held += [job.clock.now] * len(rows)
                held = held[len(held) // part_rows * part_rows :]
            elif operation == "wait":
                job.clock.now += value
                job.writer.tick()
            else:
                job.writer.flush()
            if operation == "flush" or (held and job.clock.now - held[0] >= part_seconds):
                held = []
            assert job.num_held() == len(held)
        job.writer.flush()
        published = {table: job.parts(table) for table in expected}
        assert {table: list(itertools.chain.from_iterable(parts)) for table, parts in published.items()} == expected
        assert all(len(part) <= part_rows for parts in published.values() for part in parts)
        assert job.writer.num_captions == len(expected["captions"])
        assert job.writer.failures.total() == len(expected["failures"])
        assert job.writer.num_parts == sum(map(len, published.values()))
