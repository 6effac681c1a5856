"""Parts are cut by rows and by age, hold every row once, and appear only while the run may write."""

import datetime
import itertools
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capray.captioning import writer as writer_module
from capray.captioning.rows import RESULTS
from capray.captioning.writer import PartWriter
from capray.errors import CaprayError, StorageError
from capray.output import Output
from capray.tables import CAPTIONS, FAILURES
from tests.oracle import read_parts

RUN = "20260102T030405Z-abcd"


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Guard:
    """What ``before_publish`` is in a job: the lease."""

    def __init__(self):
        self.error: Exception | None = None
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        if self.error:
            raise self.error


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
    def __init__(self, folder: str, part_rows: int = 3, part_seconds: float = 60):
        self.folder, self.clock, self.guard = folder, Clock(), Guard()
        self.writer = PartWriter(Output(folder), RUN, part_rows, part_seconds, self.guard, self.clock)

    def parts(self, table: str = "captions") -> list[list[str]]:
        """The image ids of every part, in the order of the parts' names."""
        files = sorted((Path(self.folder) / table).glob("*.parquet"))
        return [pq.read_table(file)["image_id"].to_pylist() for file in files]


@pytest.fixture
def job(tmp_path) -> Fixture:
    return Fixture(str(tmp_path))


class TestCuts:
    def test_by_rows(self, job):
        job.writer.add(captions("a", "b"))
        assert (job.parts(), job.writer.num_held) == ([], 2)
        job.writer.add(captions(*"cdefgh"))
        assert (job.parts(), job.writer.num_held) == ([["a", "b", "c"], ["d", "e", "f"]], 2)
        job.writer.add(captions("i"))
        assert (job.parts()[2:], job.writer.num_held) == ([["g", "h", "i"]], 0)

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
        assert (job.parts(), job.guard.calls) == ([], 0), "nothing is held, nothing is published"
        job.writer.add(captions("a"))
        job.writer.flush()
        job.writer.flush()
        assert (job.parts(), job.writer.num_parts) == ([["a"]], 1)

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
        output = Output(folder)
        assert [len(output.parts(place)) for place in (output.captions, output.failures)] == [1, 1]


class TestRefusedPublishing:
    def test_nothing_is_published_and_the_rows_are_kept(self, job):
        job.guard.error = CaprayError("lost the lease")
        with pytest.raises(CaprayError, match="lost the lease"):
            job.writer.add(captions("a", "b", "c"))
        assert (job.parts(), job.writer.num_held, job.writer.num_captions) == ([], 3, 0)
        with pytest.raises(CaprayError):
            job.writer.flush()
        job.guard.error = None
        job.writer.flush()
        assert (job.parts(), job.writer.num_held) == ([["a", "b", "c"]], 0)

    def test_the_guard_is_asked_before_every_part(self, job):
        job.writer.add(captions(*"abcdefg"))
        job.writer.flush()
        assert (len(job.parts()), job.guard.calls) == (3, 3)

    def test_rows_held_back_still_make_parts_of_the_right_size(self, job):
        job.guard.error = CaprayError("not now")
        with pytest.raises(CaprayError):
            job.writer.add(captions(*"abcdefgh"))
        job.guard.error = None
        job.writer.flush()
        assert list(itertools.chain.from_iterable(job.parts())) == list("abcdefgh")
        assert max(map(len, job.parts())) <= 3

    def test_failures_that_cannot_be_written_are_written_with_the_next_try(self, job, monkeypatch):
        """The captions of the cut are there by then; the second try puts them under the same name."""
        write_atomic = writer_module.write_atomic

        def full(location, data, scratch=None):
            if "/failures/" in location.path:
                raise StorageError("no space left")
            write_atomic(location, data, scratch)

        monkeypatch.setattr(writer_module, "write_atomic", full)
        with pytest.raises(StorageError):
            job.writer.add(results(captioned("a"), failed("b"), captioned("c")))
        monkeypatch.setattr(writer_module, "write_atomic", write_atomic)
        job.writer.flush()
        assert (job.parts(), job.parts("failures")) == ([["a", "c"]], [["b"]])
        assert (job.writer.num_captions, job.writer.num_parts, job.writer.failures) == (2, 2, {"truncated": 1})


OPERATIONS = st.lists(
    st.one_of(
        st.lists(st.booleans(), max_size=12).map(lambda kinds: ("add", kinds)),
        st.floats(0, 100).map(lambda seconds: ("wait", seconds)),
        st.just(("flush", None)),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
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
            assert job.writer.num_held == len(held)
        job.writer.flush()
        published = {table: job.parts(table) for table in expected}
        assert {table: list(itertools.chain.from_iterable(parts)) for table, parts in published.items()} == expected
        assert all(len(part) <= part_rows for parts in published.values() for part in parts)
        assert job.writer.num_captions == len(expected["captions"])
        assert job.writer.failures.total() == len(expected["failures"])
        assert job.writer.num_parts == sum(map(len, published.values()))
