"""What is still to do is what is wanted, less what is captioned, less what failed for good."""

import datetime
import itertools
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capray.captioning.plan import ATTEMPTS_PER_RUN, BLOCKS_PER_FILE, MAX_BLOCK_ROWS, Plan, Work, remove_duplicates
from capray.captioning.rows import PLAN
from capray.output import Output
from capray.storage import iter_files, write_atomic
from capray.tables import CAPTIONS, FAILURES, FINAL_FAILURES, TRANSIENT_FAILURES, encode_parquet

NOW = "run-2"
EARLIER = "run-1"
START = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)


def wanted(ids: list[str], first: int = 0) -> pa.Table:
    positions = list(range(first, first + len(ids)))
    columns = {"position": positions, "image_id": ids, "uri": [f"/photos/{name}" for name in ids]}
    return pa.table({name: columns.get(name, [None] * len(ids)) for name in PLAN.names}, schema=PLAN)


def write_captions(output: Output, ids: list[str], run: str = EARLIER, number: int = 0, caption: str = "x") -> None:
    row = {
        "caption": caption,
        "log_prob": -1.0,
        "score": -1.0,
        "num_tokens": 1,
        "finished": True,
        "alternatives": [],
        "width": 1,
        "height": 1,
        "sha256": b"\1" * 32,
        "model_id": "m",
        "run_id": run,
        "captioned_at": START,
    }
    table = pa.Table.from_pylist([row | {"image_id": name} for name in ids], schema=CAPTIONS)
    write_atomic(output.captions.join(f"part-{run}-{number:05d}.parquet"), encode_parquet(table))


def write_failures(output: Output, failures: list[tuple[str, str]], run: str = EARLIER, number: int = 0) -> None:
    """One part of (image id, kind); a later number is a later time."""
    at = START + datetime.timedelta(days=int(run[-1]), seconds=number)
    rows = [
        {"image_id": name, "error_type": kind, "message": "m", "run_id": run, "failed_at": at}
        for name, kind in failures
    ]
    table = pa.Table.from_pylist(rows, schema=FAILURES)
    write_atomic(output.failures.join(f"part-{run}-{number:05d}.parquet"), encode_parquet(table))


def make_plan(output: Output, *chunks: list[str], retry_failed: bool = False) -> Plan:
    plan = Plan(output, NOW, retry_failed)
    starts = itertools.accumulate(map(len, chunks), initial=0)
    listed = list(plan.list_wanted(wanted(ids, first) for ids, first in zip(chunks, starts, strict=False)))
    assert listed == list(itertools.accumulate(map(len, chunks)))
    return plan


def ids_of(work: Work, output: Output) -> list[str]:
    """The image ids of every block, read the way a fetching task reads them."""
    blocks = [work.block(index) for index in range(work.num_blocks)]
    fs = output.root.fs
    tables = [pq.ParquetFile(path, filesystem=fs).read_row_group(group) for path, group in blocks]
    sizes = [table.num_rows for table in tables]
    assert sizes[:-1] == [work.block_rows] * (len(sizes) - 1)
    assert sum(sizes) == work.num_images
    assert sum(pq.ParquetFile(file.path, filesystem=fs).num_row_groups for file in work.files) == len(blocks)
    return [name for table in tables for name in table["image_id"].to_pylist()]


def todo(plan: Plan, pass_number: int = 1) -> list[str]:
    return ids_of(plan.remaining(pass_number, batch_size=2, num_parallel=lambda: 1), plan.output)


@pytest.fixture
def output(tmp_path) -> Output:
    return Output(str(tmp_path / "out"))


class TestRemaining:
    def test_of_a_new_output_everything_in_order(self, output):
        plan = make_plan(output, ["c", "a"], ["b"])
        work = plan.remaining(1, batch_size=2, num_parallel=lambda: 1)
        assert ids_of(work, output) == ["c", "a", "b"]
        table = pq.read_table(work.files[0].path)
        assert table.schema.equals(PLAN)
        assert table.to_pylist() == wanted(["c", "a", "b"]).to_pylist()

    def test_what_is_captioned_is_left_out(self, output):
        write_captions(output, ["a", "x"])
        write_captions(output, ["c"], number=1)
        plan = make_plan(output, ["a", "b", "c", "d"])
        assert todo(plan) == ["b", "d"]
        write_captions(output, ["d"], run=NOW)
        assert todo(plan, 2) == ["b"], "a pass sees what was published meanwhile"

    @pytest.mark.parametrize("kind", FINAL_FAILURES)
    def test_a_final_failure_is_not_tried_again(self, output, kind):
        write_failures(output, [("a", kind)])
        assert todo(make_plan(output, ["a", "b"])) == ["b"]

    @pytest.mark.parametrize("kind", [*FINAL_FAILURES, *TRANSIENT_FAILURES])
    def test_unless_it_is_asked_for_and_then_once(self, output, kind):
        write_failures(output, [("a", kind)])
        plan = make_plan(output, ["a", "b"], retry_failed=True)
        assert todo(plan) == ["a", "b"]
        write_failures(output, [("a", "truncated")], run=NOW)
        assert todo(plan, 2) == ["b"]

    @pytest.mark.parametrize("kind", TRANSIENT_FAILURES)
    @pytest.mark.parametrize("retry_failed", [False, True])
    def test_a_transient_failure_is_tried_so_often_in_a_run(self, output, kind, retry_failed):
        for number in range(5):
            write_failures(output, [("a", kind)], number=number)
        plan = make_plan(output, ["a"], retry_failed=retry_failed)
        attempts = 0
        while todo(plan, attempts + 1):
            write_failures(output, [("a", kind)], run=NOW, number=attempts)
            attempts += 1
        assert attempts == ATTEMPTS_PER_RUN

    def test_the_latest_failure_counts(self, output):
        write_failures(output, [("a", "missing"), ("b", "denied")], number=0)
        write_failures(output, [("a", "denied"), ("b", "missing")], number=1)
        assert todo(make_plan(output, ["a", "b"])) == ["a"]

    def test_a_caption_settles_a_failure(self, output):
        write_failures(output, [("a", "denied"), ("b", "missing")])
        write_captions(output, ["a", "b"])
        assert todo(make_plan(output, ["a", "b"], retry_failed=True)) == []

    def test_duplicates_are_done_once_at_their_first_place(self, output):
        plan = make_plan(output, ["b", "a", "b"], ["a", "c", "b"])
        assert todo(plan) == ["b", "a", "c"]
        count = plan.count_wanted()
        assert (count.images, count.duplicates) == (3, 3)

    def test_ids_are_exact(self, output):
        names = ["a", "A", "a ", "\u00e4", "a\u0308", "it's", 'say "x"', "%2F", "new\nline", ""]
        plan = make_plan(output, names)
        write_captions(output, names[::2])
        assert todo(plan) == names[1::2]

    def test_nothing_to_do_asks_for_no_actors(self, output):
        write_captions(output, ["a"])

        def asked():
            raise AssertionError("asked")

        work = make_plan(output, ["a"]).remaining(1, batch_size=2, num_parallel=asked)
        assert (work.num_images, work.num_blocks, work.files) == (0, 0, [])

    def test_nothing_wanted(self, output):
        plan = Plan(output, NOW, False)
        assert list(plan.list_wanted([])) == []
        assert todo(plan) == []
        assert plan.unaccounted() == (0, [])

    def test_on_s3(self, s3, tmp_path):
        output = Output(f"{s3}/{tmp_path.name}")
        write_captions(output, ["a"])
        write_failures(output, [("b", "missing"), ("c", "denied")])
        plan = make_plan(output, ["a", "b"], ["c", "d"])
        assert todo(plan) == ["c", "d"]
        plan.remove()
        assert [entry for entry in iter_files(plan.folder) if entry.path.endswith(".parquet")] == []
        assert len(output.parts(output.captions)) == 1

    @pytest.mark.parametrize("name", ["run=1", "split=test/out", "out [v2]", "it's out", "a*b", "run_id=7"])
    def test_an_output_under_an_awkward_name(self, tmp_path, name):
        output = Output(str(tmp_path / name))
        write_captions(output, ["a"])
        write_captions(output, ["a", "x"], number=1)
        write_failures(output, [("b", "missing")])
        assert todo(make_plan(output, ["a", "b", "c"])) == ["c"]
        assert remove_duplicates(output) == 1
        with output.connect() as connection:
            assert connection.sql("SELECT * FROM captions").columns == CAPTIONS.names
            assert connection.execute("SELECT DISTINCT run_id FROM captions").fetchall() == [(EARLIER,)]


class TestBlocks:
    @pytest.mark.parametrize(
        ("num_images", "batch_size", "num_parallel", "block_rows"),
        [
            (1, 64, 1, 64),
            (100, 8, 1, 32),  # a quarter of the work in whole batches
            (100, 8, 4, 8),
            (5000, 64, 2, MAX_BLOCK_ROWS),
            (3000, 300, 1, MAX_BLOCK_ROWS),
            (3000, 4096, 1, MAX_BLOCK_ROWS),
            (250, 1, 64, 1),
            (201, 2, 1000, 2),
        ],
    )
    def test_row_groups_are_blocks(self, output, num_images, batch_size, num_parallel, block_rows):
        names = [f"{i:06d}" for i in range(num_images)]
        plan = make_plan(output, names)
        work = plan.remaining(1, batch_size, lambda: num_parallel)
        assert work.block_rows == block_rows
        assert work.num_blocks == -(-num_images // block_rows)
        assert len(work.files) == -(-work.num_blocks // BLOCKS_PER_FILE)
        assert ids_of(work, output) == names

    def test_a_block_is_found_in_its_file(self, output):
        files = [output.plan.join(f"{i}.parquet") for i in range(3)]
        work = Work(files, num_images=2 * BLOCKS_PER_FILE * 4 + 1, block_rows=4)
        assert work.num_blocks == 2 * BLOCKS_PER_FILE + 1
        assert work.block(0) == (files[0].path, 0)
        assert work.block(BLOCKS_PER_FILE - 1) == (files[0].path, BLOCKS_PER_FILE - 1)
        assert work.block(BLOCKS_PER_FILE) == (files[1].path, 0)
        assert work.block(2 * BLOCKS_PER_FILE) == (files[2].path, 0)


class TestUnaccounted:
    def test_what_has_neither_a_caption_nor_a_failure(self, output):
        write_captions(output, ["a"])
        write_failures(output, [("b", "denied"), ("c", "missing")])
        plan = make_plan(output, ["a", "b", "c", "e", "d", "d"])
        assert plan.unaccounted() == (2, ["d", "e"])
        assert plan.unaccounted(limit=1) == (2, ["d"])
        write_captions(output, ["d", "e"], run=NOW)
        assert plan.unaccounted() == (0, [])

    def test_a_plan_is_removed_and_nothing_else(self, output):
        write_captions(output, ["a"])
        plan = make_plan(output, ["a", "b"])
        todo(plan)
        plan.remove()
        files = [path for path in Path(output.root.path).rglob("*") if path.is_file()]
        assert [path.name for path in files] == [f"part-{EARLIER}-00000.parquet"]


class TestRemoveDuplicates:
    def rows(self, output: Output) -> dict[str, list[tuple[str, str]]]:
        parts = {part.path.rsplit("/", 1)[1]: part for part in output.parts(output.captions)}
        return {
            name: [
                (row["image_id"], row["caption"]) for row in pq.read_table(part.path, filesystem=part.fs).to_pylist()
            ]
            for name, part in parts.items()
        }

    @pytest.mark.parametrize("where", ["local", "s3"])
    def test_the_older_parts_row_stays(self, request, tmp_path, where):
        root = str(tmp_path / "out") if where == "local" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"
        output = Output(root)
        write_captions(output, ["b", "c", "d"], run=NOW, caption="new")
        write_captions(output, ["a", "b"], run=EARLIER, caption="old")
        write_captions(output, ["d"], run=EARLIER, number=1, caption="old")
        assert remove_duplicates(output) == 2
        assert self.rows(output) == {
            f"part-{EARLIER}-00000.parquet": [("a", "old"), ("b", "old")],
            f"part-{EARLIER}-00001.parquet": [("d", "old")],
            f"part-{NOW}-00000.parquet": [("c", "new")],
        }
        for part in output.parts(output.captions):
            assert pq.read_schema(part.path, filesystem=part.fs).equals(CAPTIONS, check_metadata=True)
        assert remove_duplicates(output) == 0

    def test_a_part_all_of_whose_rows_are_doubled(self, output):
        write_captions(output, ["a", "b"], run=EARLIER, caption="old")
        write_captions(output, ["b", "a"], run=NOW, caption="new")
        assert remove_duplicates(output) == 2
        assert [row for rows in self.rows(output).values() for row in rows] == [("a", "old"), ("b", "old")]
        with output.connect() as connection:
            assert connection.execute("SELECT count(*) FROM captions").fetchall() == [(2,)]

    def test_parts_without_duplicates_are_not_touched(self, output):
        assert remove_duplicates(output) == 0
        for number in range(3):
            write_captions(output, [f"{number}"], number=number)
        before = {part.path: Path(part.path).stat().st_mtime_ns for part in output.parts(output.captions)}
        assert remove_duplicates(output) == 0
        write_captions(output, ["2"], number=3)
        remove_duplicates(output)
        assert before == {path: Path(path).stat().st_mtime_ns for path in before}


IDS = st.sampled_from("abcdefgh")
KINDS = st.sampled_from(["missing", "truncated", "denied", "captioning_error"])


@settings(max_examples=20, deadline=None)
@given(
    listed=st.lists(IDS, max_size=16),
    captioned=st.sets(IDS),
    failures=st.lists(st.tuples(st.sampled_from([EARLIER, NOW]), IDS, KINDS), max_size=12),
    retry_failed=st.booleans(),
)
def test_against_plain_sets(listed, captioned, failures, retry_failed):
    with tempfile.TemporaryDirectory() as folder:
        output = Output(folder)
        if captioned:
            write_captions(output, sorted(captioned))
        failures = sorted(failures, key=lambda failure: failure[0])
        for number, (run, image_id, kind) in enumerate(failures):
            write_failures(output, [(image_id, kind)], run, number)

        latest = {image_id: (run, kind) for run, image_id, kind in failures}
        this_run = [image_id for run, image_id, _ in failures if run == NOW]
        settled = set(captioned)
        settled |= {
            image_id
            for image_id, (run, kind) in latest.items()
            if kind in FINAL_FAILURES and (run == NOW or not retry_failed)
        }
        settled |= {image_id for image_id in this_run if this_run.count(image_id) >= ATTEMPTS_PER_RUN}

        plan = make_plan(output, listed[:5], listed[5:], retry_failed=retry_failed)
        assert todo(plan) == [image_id for image_id in dict.fromkeys(listed) if image_id not in settled]
        lost = sorted(set(listed) - captioned - set(latest))
        assert plan.unaccounted() == (len(lost), lost)
        count = plan.count_wanted()
        assert (count.images, count.duplicates) == (len(set(listed)), len(listed) - len(set(listed)))
