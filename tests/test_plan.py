"""What is still to do is what is wanted, less what is captioned, less what failed for good."""

import datetime
import hashlib
import tempfile
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capray.captioning.plan import Plan
from capray.captioning.settled import ATTEMPTS_PER_RUN, Settled
from capray.captioning.stream import Pool
from capray.captioning.units import MAX_TAR_BLOCKS, MIN_IMAGE_BYTES, Work, num_blocks, read_units
from capray.config import CaptionConfig, SourceSettings
from capray.errors import StorageError
from capray.inputs import open_sources
from capray.inputs.base import TarMembers
from capray.inputs.listing import Listing, _Unit
from capray.inputs.places import MEMBERS, PLACES
from capray.output import Output
from capray.storage import write_atomic
from capray.tables import CAPTIONS, FAILURES, FINAL_FAILURES, TRANSIENT_FAILURES, encode_parquet

NOW = "run-2"
EARLIER = "run-1"
START = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)


def wanted(ids: list[str]) -> pa.Table:
    return rows_of([{"image_id": name, "kind": "object", "uri": f"/photos/{name}"} for name in ids])


def rows_of(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(
        [{name: row.get(name) for name in PLACES.names} | {"position": 0, "input": 0} for row in rows], PLACES
    )


def write_captions(
    output: Output, ids: list[str], run: str = EARLIER, number: int = 0, caption: str = "x", at: float = 0
) -> None:
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
        "captioned_at": datetime.datetime.fromtimestamp(at, datetime.UTC),
    }
    table = pa.Table.from_pylist([row | {"image_id": name} for name in ids], schema=CAPTIONS)
    write_atomic(output.captions.join(f"part-{run}-{number:05d}.parquet"), encode_parquet(table))


def write_failures(output: Output, failures: list[tuple[str, str]], run: str = EARLIER, number: int = 0) -> None:
    """One part of (image id, kind); a later number is a later time."""
    at = START + datetime.timedelta(days=int(run[-1]), seconds=number)
    rows = [
        {"image_id": name, "error_type": kind, "message": "m", "run_id": run, "failed_at": at} for name, kind in failures
    ]
    table = pa.Table.from_pylist(rows, schema=FAILURES)
    write_atomic(output.failures.join(f"part-{run}-{number:05d}.parquet"), encode_parquet(table))


@contextmanager
def planning(output: Output, *chunks: list[str] | pa.Table, retry_failed: bool = False) -> Generator[Plan]:
    """A plan of a listing that holds ``chunks``: of ids, or of rows."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder, "listed.txt")
        manifest.write_text("unused")
        config = CaptionConfig(input=str(manifest), output=output.root.uri, model="m")
        listing = Listing(output.plan, NOW, open_sources(config.inputs, SourceSettings()), config, write_atomic)
    for chunk in chunks:
        add_chunk(listing, chunk)
    with Settled(output, NOW, FINAL_FAILURES if retry_failed else ()) as settled:
        yield Plan(output, NOW, listing, settled, write_atomic)


def add_chunk(listing: Listing, chunk: list[str] | pa.Table) -> None:
    listing._publish("chunk", [chunk if isinstance(chunk, pa.Table) else wanted(chunk)])


def units_of(work: Work) -> list[list[str]]:
    """The ids of every unit."""
    units = [unit for file in work.files for unit in read_units(file)]
    assert all(unit.places.schema.equals(PLACES) for unit in units)
    assert len(units) == work.num_units
    assert sum(unit.places.num_rows for unit in units) == work.num_images + work.num_tars
    return [unit.places["image_id"].to_pylist() for unit in units]


def ids_of(work: Work) -> list[str]:
    return [image_id for unit in units_of(work) for image_id in unit]


def todo(plan: Plan) -> list[str]:
    return ids_of(plan.remaining(block_rows=2))


@pytest.fixture
def output(tmp_path) -> Output:
    return Output(str(tmp_path / "out"))


class TestRemaining:
    def test_of_a_new_output_everything_in_order(self, output):
        with planning(output, ["c", "a"], ["b"]) as plan:
            (file,) = plan.remaining(block_rows=2).files
        rows = [row for unit in read_units(file) for row in unit.places.to_pylist()]
        assert rows == [row | {"position": i} for i, row in enumerate(wanted(["c", "a", "b"]).to_pylist())]

    def test_what_is_captioned_is_left_out(self, output):
        write_captions(output, ["a", "x"])
        write_captions(output, ["c"], number=1)
        with planning(output, ["a", "b", "c", "d"]) as plan:
            assert todo(plan) == ["b", "d"]
            write_captions(output, ["d"], run=NOW)
            assert todo(plan) == ["b"], "a pass sees what was published meanwhile"
            Path(output.captions.path, f"part-{EARLIER}-00000.parquet").unlink()
            assert todo(plan) == ["a", "b"], "and what is gone"

    @pytest.mark.parametrize("kind", FINAL_FAILURES)
    def test_a_final_failure_is_not_tried_again(self, output, kind):
        write_failures(output, [("a", kind)])
        with planning(output, ["a", "b"]) as plan:
            assert todo(plan) == ["b"]

    @pytest.mark.parametrize("kind", [*FINAL_FAILURES, *TRANSIENT_FAILURES])
    def test_unless_it_is_asked_for_and_then_once(self, output, kind):
        write_failures(output, [("a", kind)])
        with planning(output, ["a", "b"], retry_failed=True) as plan:
            assert todo(plan) == ["a", "b"]
            write_failures(output, [("a", "truncated")], run=NOW)
            assert todo(plan) == ["b"]

    @pytest.mark.parametrize("kind", TRANSIENT_FAILURES)
    @pytest.mark.parametrize("retry_failed", [False, True])
    def test_a_transient_failure_is_tried_so_often_in_a_run(self, output, kind, retry_failed):
        for number in range(5):
            write_failures(output, [("a", kind)], number=number)
        attempts = 0
        with planning(output, ["a"], retry_failed=retry_failed) as plan:
            while todo(plan):
                write_failures(output, [("a", kind)], run=NOW, number=attempts)
                attempts += 1
        assert attempts == ATTEMPTS_PER_RUN

    def test_the_latest_failure_counts(self, output):
        write_failures(output, [("a", "missing"), ("b", "denied")], number=0)
        write_failures(output, [("a", "denied"), ("b", "missing")], number=1)
        with planning(output, ["a", "b"]) as plan:
            assert todo(plan) == ["a"]
            assert plan.current_failures() == {"denied": 1, "missing": 1}
            write_captions(output, ["a"], run=NOW)
            assert plan.current_failures() == {"missing": 1}

    def test_a_caption_settles_a_failure(self, output):
        write_failures(output, [("a", "denied"), ("b", "missing")])
        write_captions(output, ["a", "b"])
        with planning(output, ["a", "b"], retry_failed=True) as plan:
            assert todo(plan) == []

    def test_duplicates_are_done_once_at_their_first_place(self, output):
        with planning(output, ["b", "a", "b"], ["a", "c", "b"]) as plan:
            assert todo(plan) == ["b", "a", "c"]
            count = plan.count_wanted()
            assert (count.images, count.duplicates) == (3, 3)

    def test_ids_are_exact(self, output):
        names = ["a", "A", "a ", "\u00e4", "a\u0308", "it's", 'say "x"', "%2F", "new\nline", ""]
        write_captions(output, names[::2])
        with planning(output, names) as plan:
            assert todo(plan) == names[1::2]

    def test_nothing_to_do_and_nothing_wanted(self, output):
        write_captions(output, ["a"])
        for chunks in ([["a"]], []):
            with planning(output, *chunks) as plan:
                assert plan.remaining(2) == Work([], 0, 0, 0, 0)
                assert plan.unaccounted() == (0, [])

    def test_on_s3(self, s3, tmp_path):
        output = Output(f"{s3}/{tmp_path.name}")
        write_captions(output, ["a"])
        write_failures(output, [("b", "missing"), ("c", "denied")])
        with planning(output, ["a", "b"], ["c", "d"]) as plan:
            assert todo(plan) == ["c", "d"]
            assert plan.unaccounted() == (1, ["d"])

    @pytest.mark.parametrize("name", ["run=1", "split=test/out", "out [v2]", "it's out", "a*b", "run_id=7"])
    def test_an_output_under_an_awkward_name(self, tmp_path, name):
        output = Output(str(tmp_path / name))
        write_captions(output, ["a"])
        write_captions(output, ["x"], number=1)
        write_failures(output, [("b", "missing")])
        with planning(output, ["a", "b", "c"]) as plan:
            assert todo(plan) == ["c"]
        with output.connect() as connection:
            assert connection.sql("SELECT * FROM captions").columns == CAPTIONS.names
            assert connection.execute("SELECT DISTINCT run_id FROM captions").fetchall() == [(EARLIER,)]

    def test_no_room_for_the_ids(self, output, monkeypatch):
        monkeypatch.setattr("capray.captioning.settled.BYTES_PER_ID", 2**60)
        write_captions(output, ["a"])
        with planning(output, ["a"]) as plan, pytest.raises(StorageError, match="^1 id needs up to .* set TMPDIR"):
            plan.remaining(2)

    def test_temporary_space_of_a_killed_run_is_given_back(self, output, tmp_path, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.setattr("capray.captioning.settled._LOCKING_SECONDS", -1)
        killed = tmp_path / "capray-ids-killed"
        killed.mkdir()
        (killed / "lock").touch()
        with Settled(output, NOW) as running, Settled(output, NOW):
            assert not killed.exists()
            assert Path(running.folder).exists()
        assert list(tmp_path.iterdir()) == []

    def test_a_chunk_that_cannot_be_read(self, output):
        with planning(output, ["a"]) as plan:
            Path(plan.listing.chunks()[0].path).unlink()
            with pytest.raises(StorageError, match="^reading .*: not found"):
                plan.remaining(2)

    def test_ids_are_looked_at_slice_by_slice(self, output, monkeypatch):
        monkeypatch.setattr("capray.captioning.settled.SLICE_IDS", 60)
        names = [f"{i}" for i in range(100)]
        write_captions(output, names[::2])
        with planning(output, names, names) as plan:
            assert len(plan._slices()) == 4
            assert todo(plan) == names[1::2]
            assert plan.unaccounted(3) == (50, ["1", "3", "5"])
            count = plan.count_wanted()
            assert (count.images, count.duplicates) == (100, 100)


class TestFresh:
    def test_only_the_new_chunks_are_looked_at_and_once(self, output):
        with planning(output, ["a", "b"], ["c", "a"]) as plan:
            first, second = plan.listing.chunks()
            assert ids_of(plan.fresh([first], 2)) == ["a", "b"]
            assert ids_of(plan.fresh([first, second], 2)) == ["c"]
            assert ids_of(plan.fresh([first, second], 2)) == []
            assert todo(plan) == ["a", "b", "c"]

    @pytest.mark.parametrize("kind", ["missing", "denied"])
    def test_what_this_run_has_attempted_is_left_out(self, output, kind):
        write_failures(output, [("a", "denied")])
        write_failures(output, [("b", kind)], run=NOW)
        with planning(output, ["a", "b", "c"], retry_failed=True) as plan:
            assert ids_of(plan.fresh(plan.listing.chunks(), 2)) == ["a", "c"]

    def test_a_limit_counts_what_is_to_be_done(self, output):
        write_captions(output, ["a"])
        with planning(output, ["a", "b", "c", "d"]) as plan:
            assert ids_of(plan.fresh(plan.listing.chunks(), 2, limit=2)) == ["b", "c"]
            assert ids_of(plan.remaining(2, limit=1)) == ["b"]


class TestUnits:
    @pytest.mark.parametrize(("num_images", "block_rows"), [(1, 64), (100, 32), (100, 100), (250, 1), (201, 2)])
    @pytest.mark.parametrize("file_rows", [7, 50_000])
    def test_objects_are_cut_by_number(self, output, num_images, block_rows, file_rows, monkeypatch):
        monkeypatch.setattr("capray.captioning.units.FILE_ROWS", file_rows)
        names = [f"{i:06d}" for i in range(num_images)]
        with planning(output, names[:90], *([names[90:]] if names[90:] else [])) as plan:
            work = plan.remaining(block_rows)
        assert units_of(work) == [names[i : i + block_rows] for i in range(0, num_images, block_rows)]
        assert work.num_blocks == work.num_units == -(-num_images // block_rows)

    @pytest.mark.parametrize(
        ("work", "actors"),
        [(Work([], 1, 1, 64, 0), (1, 1)), (Work([], 2, 5, 300, 0), (4, 5)), (Work([], 3, 1, 64, 2), (4, 8))],
    )
    def test_there_are_no_more_actors_than_blocks(self, work, actors):
        """How many blocks tars give that were not read yet, nobody knows."""
        pool = Pool(4, 8, 1.0, 1).for_work(work)
        assert (pool.num_actors, pool.max_actors) == actors

    def rows(self, kind: str, container: str, group: int, size: int) -> list[dict]:
        place = {"row_group": group} if kind == "row" else {}
        return [{"image_id": f"{container}-{group}-{i}", "kind": kind, "container": container} | place for i in range(size)]

    def test_a_row_group_is_never_cut_and_small_ones_are_joined(self, output):
        groups = [("a", 0, 10), ("a", 1, 3), ("b", 1, 1), ("b", 2, 4), ("c", 0, 9), ("d", 0, 1), ("d", 1, 1)]
        rows = [row for group in groups for row in self.rows("row", *group)]
        with planning(output, rows_of(rows[:7]), rows_of(rows[7:])) as plan:
            units = units_of(plan.remaining(4))
            assert plan.remaining(4).num_blocks == 3 + 1 + 1 + 3 + 1
        assert [len(unit) for unit in units] == [10, 4, 4, 9, 2]
        assert [name for unit in units for name in unit] == [row["image_id"] for row in rows]

    @pytest.mark.parametrize("kind", ["member", "name"])
    def test_known_members_of_a_tar_stay_together(self, output, kind):
        rows = [row for number in range(3) for row in self.rows(kind, f"t{number}", 0, 5)]
        with planning(output, rows_of(rows)) as plan:
            assert [len(unit) for unit in units_of(plan.remaining(2))] == [5, 5, 5]

    def test_a_mixture_loses_nothing_and_a_unit_is_of_one_kind(self, output):
        rows = wanted([f"u{i}" for i in range(5)]).to_pylist() + self.rows("row", "p", 0, 3)
        rows += wanted([f"v{i}" for i in range(4)]).to_pylist() + self.rows("member", "t", 0, 1)
        with planning(output, rows_of(rows)) as plan:
            units = units_of(plan.remaining(2))
        assert [len(unit) for unit in units] == [2, 2, 1, 3, 2, 2, 1]
        assert [name for unit in units for name in unit] == [row["image_id"] for row in rows]

    @pytest.mark.parametrize(
        ("kind", "rows", "size", "blocks"),
        [
            ("object", 8, 1, 2),
            ("row", 9, None, 3),
            ("tar", 1, 0, 1),
            ("tar", 1, None, 1),
            ("tar", 1, 9 * MIN_IMAGE_BYTES, 3),
            ("tar", 1, 2**50, MAX_TAR_BLOCKS),
        ],
    )
    def test_how_many_blocks_it_gives_is_known_beforehand(self, kind, rows, size, blocks):
        places = rows_of([{"image_id": f"{i}", "kind": kind, "size": size} for i in range(rows)])
        assert num_blocks(places, 4) == blocks


def tars(*names: str, size: int = 1000) -> pa.Table:
    same = {"kind": "tar", "version": "v1", "size": size}
    return rows_of([{"image_id": name, "container": name} | same for name in names])


def read_tar(plan: Plan, name: str, *members: str, version: str = "v1") -> None:
    """Tell the listing that a tar was read to its end."""
    rows = [{"image_id": f"{name}#{member}", "member": member, "offset": 0, "size": 100} for member in members]
    plan.listing._units.setdefault((0, name), _Unit("v1"))
    plan.listing.add_members(TarMembers(0, name, version, pa.Table.from_pylist(rows, MEMBERS)))


class TestTars:
    NAMES = ("/t0.tar", "/t1.tar", "/T2.TAR")

    def test_one_whose_members_are_unknown_is_a_unit_with_what_is_settled_of_it(self, output, monkeypatch):
        monkeypatch.setattr("capray.captioning.units.FILE_ROWS", 2)
        write_captions(output, ["/t1.tar#x.jpg", "/t1.tar#y#z.tar#.jpg", "/t1.tarx#x.jpg", "a"])
        write_failures(output, [("/T2.TAR#bad.jpg", "truncated"), ("/T2.TAR#later.jpg", "denied")])
        with planning(output, tars(*self.NAMES, "/t1.tar"), ["a", "b"]) as plan:
            work = plan.remaining(4)
        assert (work.num_images, work.num_tars, work.num_units) == (1, 3, 4)
        images, *units = [unit for file in work.files for unit in read_units(file)]
        assert (images.places["image_id"].to_pylist(), images.skipped) == (["b"], frozenset())
        skipped = {unit.places["container"][0].as_py(): unit.skipped for unit in units}
        wanted_ids = {"/t0.tar": [], "/t1.tar": ["/t1.tar#x.jpg", "/t1.tar#y#z.tar#.jpg"], "/T2.TAR": ["/T2.TAR#bad.jpg"]}
        assert skipped == {
            name: {hashlib.md5(image_id.encode()).digest() for image_id in ids} for name, ids in wanted_ids.items()
        }

    def test_once_its_members_are_known_they_are_what_remains(self, output):
        with planning(output, tars(*self.NAMES), ["a"]) as plan:
            assert plan.unread_tars() == ["/T2.TAR", "/t0.tar", "/t1.tar"]
            read_tar(plan, "/t1.tar", "0", "1", "2")
            write_captions(output, ["/t1.tar#0"], run=NOW)
            write_failures(output, [("/t1.tar#1", "denied")], run=NOW)
            assert plan.unread_tars() == ["/T2.TAR", "/t0.tar"]
            work = plan.remaining(8, given_up=frozenset(["/t0.tar"]))
            assert (work.num_images, work.num_tars) == (3, 1)
            assert units_of(work) == [["a"], ["/t1.tar#1", "/t1.tar#2"], ["/T2.TAR"]]
            assert plan.unaccounted() == (2, ["a", "/t1.tar#2"])
            assert plan.count_wanted().images == 4

    def test_what_was_read_of_another_version_does_not_make_them_known(self, output):
        with planning(output, tars("/t1.tar")) as plan:
            read_tar(plan, "/t1.tar", "0", version="v0")
            assert plan.unread_tars() == ["/t1.tar"]
            read_tar(plan, "/t1.tar")
            assert plan.unread_tars() == []

    def test_a_limit_is_for_images_wherever_they_lie(self, output):
        names = [f"/t{i}.tar" for i in range(9)]
        with planning(output, tars(*names), ["a"]) as plan:
            assert plan.remaining(4, limit=1).num_tars == 0
            assert plan.remaining(4, limit=40).num_tars == 1, "while it is not known how many images a tar holds"
            read_tar(plan, "/t0.tar", *map(str, range(10)))
            work = plan.remaining(4, limit=40)
            assert (work.num_images, work.num_tars) == (11, 3)


class TestChanges:
    """A container was written anew: the plan is of its rows as they are now."""

    def table(self, *ids: str, container: str = "/t.parquet") -> pa.Table:
        return rows_of([{"image_id": name, "kind": "row", "container": container} for name in ids])

    def change(self, plan: Plan, chunk: pa.Table, at: float = 1000) -> None:
        plan.listing._supersede((0, "/t.parquet"), plan.listing.num_rows, at)
        add_chunk(plan.listing, chunk)

    def test_rows_of_an_earlier_version_do_not_count(self, output):
        with planning(output, self.table("a", "b", "gone"), ["b", "c"]) as plan:
            assert ids_of(plan.fresh(plan.listing.chunks(), 9)) == ["a", "b", "gone", "c"]
            write_captions(output, ["a"], run=NOW)
            self.change(plan, self.table("new", "b", "a"))
            assert ids_of(plan.fresh(plan.listing.chunks(), 9)) == ["new"]
            assert todo(plan) == ["b", "c", "new"]
            assert plan.unaccounted() == (3, ["b", "c", "new"])
            count = plan.count_wanted()
            assert (count.images, count.duplicates) == (4, 1)

    def test_captions_older_than_the_change_are_kept_and_counted(self, output):
        with planning(output, self.table("a", "b", "c", "d"), self.table("x", container="/u.parquet")) as plan:
            write_captions(output, ["a", "b", "x"], at=999)
            assert plan.count_wanted().kept == 0
            self.change(plan, self.table("d", "c", "b", "a"))
            assert todo(plan) == ["d", "c"]
            write_captions(output, ["c"], number=1, at=1001)
            assert plan.count_wanted().kept == 2

    def test_a_manifest_that_changed_says_nothing_of_the_bytes(self, output):
        chunk = rows_of([{"image_id": "a", "kind": "object", "container": "/t.parquet"}])
        with planning(output, chunk) as plan:
            write_captions(output, ["a"], at=999)
            self.change(plan, chunk)
            assert plan.count_wanted() == plan.count_wanted().__class__(1, 0, 0)

    def test_given_up_it_is_left_out_of_a_pass_but_not_of_the_account(self, output):
        with planning(output, self.table("a"), ["b"]) as plan:
            assert ids_of(plan.remaining(2, given_up=frozenset(["/t.parquet"]))) == ["b"]
            assert plan.unaccounted() == (2, ["a", "b"])


class TestRemoveDuplicates:
    def rows(self, output: Output) -> dict[str, list[tuple[str, str]]]:
        parts = {part.path.rsplit("/", 1)[1]: part for part in output.parts(output.captions)}
        return {
            name: [(row["image_id"], row["caption"]) for row in pq.read_table(part.path, filesystem=part.fs).to_pylist()]
            for name, part in parts.items()
        }

    @pytest.mark.parametrize("where", ["local", "s3"])
    def test_the_older_parts_row_stays(self, request, tmp_path, where):
        root = str(tmp_path / "out") if where == "local" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"
        output = Output(root)
        write_captions(output, ["b", "c", "d"], run=NOW, caption="new")
        write_captions(output, ["a", "b"], run=EARLIER, caption="old")
        write_captions(output, ["d"], run=EARLIER, number=1, caption="old")
        with Settled(output, NOW) as settled:
            assert settled.remove_duplicates(write_atomic) == 2
            assert settled.num_captions == 4
            assert settled.remove_duplicates(write_atomic) == 0
        assert self.rows(output) == {
            f"part-{EARLIER}-00000.parquet": [("a", "old"), ("b", "old")],
            f"part-{EARLIER}-00001.parquet": [("d", "old")],
            f"part-{NOW}-00000.parquet": [("c", "new")],
        }
        for part in output.parts(output.captions):
            assert pq.read_schema(part.path, filesystem=part.fs).equals(CAPTIONS, check_metadata=True)

    def test_a_part_all_of_whose_rows_are_doubled(self, output):
        write_captions(output, ["a", "b"], run=EARLIER, caption="old")
        write_captions(output, ["b", "a"], run=NOW, caption="new")
        with Settled(output, NOW) as settled:
            assert settled.remove_duplicates(write_atomic) == 2
        assert [row for rows in self.rows(output).values() for row in rows] == [("a", "old"), ("b", "old")]

    def test_parts_without_duplicates_are_not_touched(self, output):
        written = []
        for number, ids in enumerate((["0"], ["1"], ["2"], ["2", "3"])):
            write_captions(output, ids, number=number)
        with Settled(output, NOW) as settled:
            assert settled.remove_duplicates(lambda part, data: written.append(part.path)) == 1
        assert [path[-8:] for path in written] == ["3.parquet"[-8:]]


IDS = st.sampled_from("abcdefgh")
KINDS = st.sampled_from(["missing", "truncated", "denied", "captioning_error"])


@settings(max_examples=30, deadline=None)
@given(
    listed=st.lists(IDS, max_size=16),
    captioned=st.sets(IDS),
    failures=st.lists(st.tuples(st.sampled_from([EARLIER, NOW]), IDS, KINDS), max_size=12),
    retry_failed=st.booleans(),
    cuts=st.tuples(st.integers(0, 16), st.integers(0, 12)),
)
def test_against_plain_sets(listed, captioned, failures, retry_failed, cuts):
    """Whatever was published before a plan is made and whatever after it, in whichever chunks it is listed."""
    failures = sorted(failures, key=lambda failure: failure[0])
    with tempfile.TemporaryDirectory() as folder:
        output = Output(folder)
        chunks = [chunk for chunk in (listed[: cuts[0]], listed[cuts[0] :]) if chunk]
        with planning(output, *chunks, retry_failed=retry_failed) as plan:
            for number, (run, image_id, kind) in enumerate(failures):
                if number == cuts[1]:
                    plan.remaining(2)
                write_failures(output, [(image_id, kind)], run, number)
            if captioned:
                write_captions(output, sorted(captioned))

            latest = {image_id: (run, kind) for run, image_id, kind in failures}
            this_run = Counter(image_id for run, image_id, _ in failures if run == NOW)
            settled = set(captioned)
            settled |= {
                image_id
                for image_id, (run, kind) in latest.items()
                if kind in FINAL_FAILURES and (run == NOW or not retry_failed)
            }
            settled |= {image_id for image_id, count in this_run.items() if count >= ATTEMPTS_PER_RUN}

            different = list(dict.fromkeys(listed))
            assert todo(plan) == [image_id for image_id in different if image_id not in settled]
            lost = [image_id for image_id in different if image_id not in captioned | latest.keys()]
            assert plan.unaccounted() == (len(lost), lost)
            count = plan.count_wanted()
            assert (count.images, count.duplicates) == (len(different), len(listed) - len(different))
            kinds = Counter(kind for image_id, (_, kind) in latest.items() if image_id not in captioned)
            assert plan.current_failures() == kinds
