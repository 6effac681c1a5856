"""What is still to do is what is wanted, less what is captioned, less what failed for good."""

import datetime
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capray.captioning.plan import ATTEMPTS_PER_RUN, UNITS_PER_FILE, Plan, Work, remove_duplicates
from capray.config import CaptionConfig, SourceSettings
from capray.inputs import open_sources
from capray.inputs.listing import Listing
from capray.inputs.places import MEMBERS, PLAN
from capray.output import Output
from capray.storage import iter_files, write_atomic
from capray.tables import CAPTIONS, FAILURES, FINAL_FAILURES, TRANSIENT_FAILURES, encode_parquet

NOW = "run-2"
EARLIER = "run-1"
START = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)


def wanted(ids: list[str], first: int = 0) -> pa.Table:
    return rows_of([{"image_id": name, "uri": f"/photos/{name}"} for name in ids], first)


def rows_of(rows: list[dict], first: int = 0) -> pa.Table:
    numbered = [{"position": i, "input": 0, **row} for i, row in enumerate(rows, first)]
    return pa.Table.from_pylist([{name: row.get(name) for name in PLAN.names} for row in numbered], schema=PLAN)


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


def make_plan(output: Output, *chunks: list[str] | pa.Table, retry_failed: bool = False) -> Plan:
    """A plan of a listing that holds ``chunks``: of ids, or of rows."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder, "listed.txt")
        manifest.write_text("unused")
        config = CaptionConfig(input=str(manifest), output=output.root.uri, model="m")
        listing = Listing(output, open_sources(config.inputs, SourceSettings()), config)
    for chunk in chunks:
        listing._store([chunk if isinstance(chunk, pa.Table) else wanted(chunk)], 0, {}, {})
    return Plan(output, NOW, listing, FINAL_FAILURES if retry_failed else ())


def units_of(work: Work, output: Output) -> list[pa.Table]:
    """The rows of every unit, read the way a fetching task reads them."""
    units = [work.unit(index) for index in range(work.num_units)]
    fs = output.root.fs
    assert sum(pq.ParquetFile(file.path, filesystem=fs).num_row_groups for file in work.files) == len(units)
    return [pq.ParquetFile(path, filesystem=fs).read_row_group(group) for path, group in units]


def ids_of(work: Work, output: Output) -> list[str]:
    """The image ids of every unit, of images by URI."""
    tables = units_of(work, output)
    sizes = [table.num_rows for table in tables]
    assert sizes[:-1] == [work.block_rows] * (len(sizes) - 1)
    assert sum(sizes) == work.num_images
    return [name for table in tables for name in table["image_id"].to_pylist()]


def todo(plan: Plan) -> list[str]:
    return ids_of(plan.remaining(block_rows=2), plan.output)


@pytest.fixture
def output(tmp_path) -> Output:
    return Output(str(tmp_path / "out"))


class TestRemaining:
    def test_of_a_new_output_everything_in_order(self, output):
        plan = make_plan(output, ["c", "a"], ["b"])
        work = plan.remaining(block_rows=2)
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
        assert todo(plan) == ["b"], "a pass sees what was published meanwhile"

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
        assert todo(plan) == ["b"]

    @pytest.mark.parametrize("kind", TRANSIENT_FAILURES)
    @pytest.mark.parametrize("retry_failed", [False, True])
    def test_a_transient_failure_is_tried_so_often_in_a_run(self, output, kind, retry_failed):
        for number in range(5):
            write_failures(output, [("a", kind)], number=number)
        plan = make_plan(output, ["a"], retry_failed=retry_failed)
        attempts = 0
        while todo(plan):
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

    def test_nothing_to_do(self, output):
        write_captions(output, ["a"])
        work = make_plan(output, ["a"]).remaining(block_rows=2)
        assert (work.num_images, work.num_units, work.num_tars, work.files) == (0, 0, 0, [])

    def test_nothing_wanted(self, output):
        plan = make_plan(output)
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


class TestFresh:
    def test_only_the_new_chunks_are_looked_at(self, output):
        plan = make_plan(output, ["a", "b"], ["c", "a"])
        first, second = plan.listing.chunks()
        assert ids_of(plan.fresh([first], 2), output) == ["a", "b"]
        write_captions(output, ["a"], run=NOW)
        assert ids_of(plan.fresh([second], 2), output) == ["c"]

    @pytest.mark.parametrize("kind", ["missing", "denied"])
    def test_what_this_run_has_attempted_is_left_out(self, output, kind):
        write_failures(output, [("a", "denied")])
        write_failures(output, [("b", kind)], run=NOW)
        plan = make_plan(output, ["a", "b", "c"], retry_failed=True)
        assert ids_of(plan.fresh(plan.listing.chunks(), 2), output) == ["a", "c"]

    def test_a_limit_counts_what_is_to_be_done(self, output):
        write_captions(output, ["a"])
        plan = make_plan(output, ["a", "b", "c", "d"])
        assert ids_of(plan.fresh(plan.listing.chunks(), 2, limit=2), output) == ["b", "c"]
        assert ids_of(plan.remaining(2, limit=1), output) == ["b"]


class TestUnits:
    @pytest.mark.parametrize(("num_images", "block_rows"), [(1, 64), (100, 32), (100, 100), (250, 1), (201, 2)])
    def test_images_by_uri_are_cut_by_number(self, output, num_images, block_rows):
        names = [f"{i:06d}" for i in range(num_images)]
        work = make_plan(output, names).remaining(block_rows)
        assert work.block_rows == block_rows
        assert work.num_units == -(-num_images // block_rows)
        assert len(work.files) == -(-work.num_units // UNITS_PER_FILE)
        assert ids_of(work, output) == names

    def test_a_unit_is_found_in_its_file(self, output):
        files = [output.plan.join(f"{i}.parquet") for i in range(3)]
        work = Work(files, 2 * UNITS_PER_FILE + 1, num_images=2 * UNITS_PER_FILE * 4 + 1, num_tars=0, block_rows=4)
        assert work.unit(0) == (files[0].path, 0)
        assert work.unit(UNITS_PER_FILE - 1) == (files[0].path, UNITS_PER_FILE - 1)
        assert work.unit(UNITS_PER_FILE) == (files[1].path, 0)
        assert work.unit(2 * UNITS_PER_FILE) == (files[2].path, 0)

    def test_a_row_group_is_never_cut(self, output):
        rows = [
            {"image_id": f"{container}-{group}-{i}", "container": container, "row_group": group, "row": i}
            for container, group, size in [("a", 0, 10), ("a", 1, 3), ("b", 1, 2), ("b", 2, 4), ("c", 0, 9)]
            for i in range(size)
        ]
        plan = make_plan(output, rows_of(rows[:7]), rows_of(rows[7:]))
        units = units_of(plan.remaining(4), output)
        assert [unit["image_id"].to_pylist() for unit in units] == [
            [row["image_id"] for row in part] for part in (rows[:10], rows[10:15], rows[15:19], rows[19:])
        ]

    def test_known_members_of_a_tar_stay_together(self, output):
        rows = [{"image_id": f"t{t}#{i}", "container": f"t{t}", "member": f"{i}"} for t in range(3) for i in range(5)]
        units = units_of(make_plan(output, rows_of(rows)).remaining(2), output)
        assert [set(unit["container"].to_pylist()) for unit in units] == [{"t0"}, {"t1"}, {"t2"}]
        assert [unit.num_rows for unit in units] == [5, 5, 5]

    def test_a_mixture_loses_nothing(self, output):
        rows = [{"image_id": f"u{i}", "uri": f"/u{i}"} for i in range(5)]
        rows += [{"image_id": f"p{i}", "container": "p", "row_group": 0, "row": i} for i in range(3)]
        rows += [{"image_id": f"v{i}", "uri": f"/v{i}"} for i in range(4)]
        units = units_of(make_plan(output, rows_of(rows)).remaining(2), output)
        assert [name for unit in units for name in unit["image_id"].to_pylist()] == [row["image_id"] for row in rows]


class TestTars:
    def plan(self, output: Output) -> Plan:
        tars = [{"image_id": f"/t{i}.tar", "container": f"/t{i}.tar"} for i in range(3)]
        return make_plan(output, rows_of(tars), ["a"])

    def test_one_whose_members_are_unknown_is_a_unit_with_what_is_settled_of_it(self, output):
        write_captions(output, ["/t1.tar#x.jpg", "/t1.tar#y#z.jpg", "/t1.tarx#x.jpg"])
        write_failures(output, [("/t2.tar#bad.jpg", "truncated"), ("/t2.tar#later.jpg", "denied")])
        plan = self.plan(output)
        work = plan.remaining(4)
        assert (work.num_images, work.num_tars, work.num_units) == (1, 3, 4)
        images, *tars = units_of(work, output)
        assert images["image_id"].to_pylist() == ["a"]
        by_tar = {tar["image_id"][0].as_py(): tar for tar in tars}
        settled = {name: set(tar["member"].to_pylist()[1:]) for name, tar in by_tar.items()}
        assert settled == {"/t0.tar": set(), "/t1.tar": {"x.jpg", "y#z.jpg"}, "/t2.tar": {"bad.jpg"}}
        assert all(set(tar["container"].to_pylist()) == {name} for name, tar in by_tar.items())

    def test_once_its_members_are_known_they_are_what_remains(self, output):
        plan = self.plan(output)
        assert plan.unread_tars() == ["/t0.tar", "/t1.tar", "/t2.tar"]
        members = [{"image_id": f"/t1.tar#{i}", "member": f"{i}", "offset": 512 * i, "size": 9} for i in range(3)]
        plan.listing.add_members(0, "/t1.tar", pa.Table.from_pylist(members, schema=MEMBERS))
        write_captions(output, ["/t1.tar#0"], run=NOW)
        write_failures(output, [("/t1.tar#1", "denied")], run=NOW)
        assert plan.unread_tars() == ["/t0.tar", "/t2.tar"]
        work = plan.remaining(8, given_up=frozenset(["/t0.tar"]))
        assert (work.num_images, work.num_tars) == (3, 1)
        images, tar = units_of(work, output)
        assert images["image_id"].to_pylist() == ["a", "/t1.tar#1", "/t1.tar#2"]
        assert images["offset"].to_pylist() == [None, 512, 1024]
        assert tar["image_id"].to_pylist() == ["/t2.tar"]
        assert plan.unaccounted() == (2, ["/t1.tar#2", "a"])
        assert plan.count_wanted().images == 4

    def test_a_limit_that_is_used_up_leaves_the_tars(self, output):
        assert self.plan(output).remaining(4, limit=1).num_tars == 0
        assert self.plan(output).remaining(4, limit=2).num_tars == 1


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
        files = {path.name for path in Path(output.root.path).rglob("*") if path.is_file()}
        assert files == {f"part-{EARLIER}-00000.parquet", "chunk-000000.parquet", "state.json"}
        plan.listing.remove()
        files = {path.name for path in Path(output.root.path).rglob("*") if path.is_file()}
        assert files == {f"part-{EARLIER}-00000.parquet"}

    def test_what_killed_runs_left_goes_but_the_listing_stays(self, output):
        killed, plan = make_plan(output, ["a"]), make_plan(output, ["a"])
        killed.run_id, killed.folder = EARLIER, output.plan.join(EARLIER)
        todo(killed)
        plan.remove_others()
        assert [path.name for path in Path(output.plan.path).iterdir()] == ["listing"]


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
