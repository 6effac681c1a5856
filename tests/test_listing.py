"""The listing is stored as it goes; after a kill it goes on and lists every image exactly once, as the inputs are now."""

import threading
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from capray.config import CaptionConfig, SourceSettings
from capray.errors import CaprayError, DataError, StorageError, StorageUnavailable
from capray.inputs import open_sources
from capray.inputs.base import ContainerChanged, Page, Source, TarMembers, rows_of
from capray.inputs.listing import ALL_ROWS, MAX_RELISTS, Listing, _digest_of
from capray.inputs.places import MEMBERS, PLACES, with_source
from capray.output import Output
from capray.storage import locate, write_atomic

SECONDS = 20


def make(output: Output, *inputs, run: str = "run-2", relist: bool = False, write=write_atomic, **options) -> Listing:
    config = CaptionConfig(
        input=str(inputs[0]), also=tuple(map(str, inputs[1:])), output=output.root.uri, model="m", **options
    )
    sources = open_sources(config.inputs, config.subset(SourceSettings), config.keep)
    return Listing(output.plan, run, sources, config, write, relist)


def finish(listing: Listing) -> Listing:
    with listing:
        wait_until(listing, lambda: listing.is_complete)
    return listing


def wait_until(listing: Listing, condition) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "took too long"
        listing.wait(10**9, 0.02)


def rows(listing: Listing) -> list[dict]:
    """All rows, whether they count or not."""
    listing.flush()
    files = [*listing.chunks(), *listing.member_chunks()]
    tables = [pq.ParquetFile(file.path, filesystem=file.fs).read() for file in files]
    assert all(table.schema.names == listing.schema.names for table in tables)
    listed = [row for table in tables for row in table.to_pylist()]
    assert sorted(row["position"] for row in listed) == list(range(len(listed)))
    assert listing.num_rows == len(listed)
    return listed


def ids(listing: Listing) -> list[str]:
    """The ids of the rows that count."""
    since = listing.superseded
    return [row["image_id"] for row in rows(listing) if row["position"] >= since.get((row["input"], row["container"]), 0)]


def plan_files(output: Output) -> set[str]:
    return {str(path.relative_to(output.plan.path)) for path in Path(output.plan.path).rglob("*") if path.is_file()}


@pytest.fixture
def output(tmp_path) -> Output:
    return Output(str(tmp_path / "out"))


@pytest.fixture
def folder(tmp_path) -> Path:
    for i in range(30):
        path = tmp_path / "in" / f"{i % 3}" / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "in"


@pytest.fixture
def always_stored(monkeypatch):
    monkeypatch.setattr("capray.inputs.listing.FIRST_CHUNK_ROWS", 1)
    monkeypatch.setattr("capray.inputs.listing.MAX_CHUNK_ROWS", 1)


class Scripted(Source):
    """Units of pages of three rows each. ``stop``, given a unit and page, may block or raise before the page. With
    ``versions_`` the units are containers."""

    kind = "images"

    def __init__(self, units: dict[str, int], stop=lambda unit, page: None, found: str | None = None, versions_=None):
        super().__init__(locate("/scripted"), SourceSettings())
        self.numbers, self.stop, self.found, self.versions_ = units, stop, found, versions_ or {}
        self.asked: list[tuple[str, int]] = []

    def units(self):
        return [unit for unit in self.numbers if unit != self.found]

    def versions(self):
        return self.versions_

    def pages(self, unit, after=None):
        for page in range(0 if after is None else after + 1, self.numbers[unit]):
            self.stop(unit, page)
            self.asked.append((unit, page))
            version = self.versions_.get(unit, "")
            same = {"container": unit, "version": version} if version else {}
            names = [f"{unit}/{page}/{i}{version}" for i in range(3)]
            yield Page(rows_of("object", {"image_id": names}, **same), page, (self.found,) if self.found else (), 1, version)

    def whole(self) -> list[str]:
        return [
            f"{unit}/{page}/{i}{self.versions_.get(unit, '')}"
            for unit, count in self.numbers.items()
            for page in range(count)
            for i in range(3)
        ]


def scripted(output: Output, source: Scripted, run: str = "run-2", write=write_atomic) -> Listing:
    return Listing(output.plan, run, [source], CaptionConfig(input="/scripted", output=output.root.uri, model="m"), write)


def killed_at(unit: str, page: int):
    """A stop at which the listing of everything else goes on until ``kill`` is set, then breaks off."""
    kill = threading.Event()

    def stop(at_unit, at_page):
        if (at_unit, at_page) == (unit, page):
            kill.wait(SECONDS)
            raise CaprayError("killed")

    return stop, kill


class TestWhole:
    def test_everything_is_listed_and_stored(self, output, folder):
        listing = finish(make(output, folder))
        assert sorted(ids(listing)) == sorted(str(path) for path in folder.rglob("*.jpg"))
        assert (listing.resumed_at, listing.faults, listing.num_hidden, listing.remarks) == (None, {}, 0, [])
        assert listing.wait(10**9, 0)

    def test_several_inputs(self, output, folder, tmp_path):
        (tmp_path / "list.txt").write_text("/x.jpg\n/y.jpg")
        listed = rows(finish(make(output, folder, tmp_path / "list.txt")))
        assert Counter(row["input"] for row in listed) == {0: 30, 1: 2}
        assert {row["image_id"] for row in listed if row["input"] == 1} == {"/x.jpg", "/y.jpg"}

    def test_selected_and_carried(self, output, tmp_path):
        (tmp_path / "list.csv").write_text("uri,n\n/a,1\n/b,2\n")
        listing = finish(make(output, tmp_path / "list.csv", keep=("n",), exclude=("/b",)))
        assert listing.schema.equals(with_source(PLACES, pa.struct([("n", pa.string())])))
        assert [(row["image_id"], row["source"]) for row in rows(listing)] == [("/a", {"n": "1"})]

    def test_nothing_wanted(self, output, folder):
        listing = finish(make(output, folder, include=("nothing",)))
        assert (ids(listing), listing.chunks(), listing.is_complete) == ([], [], True)

    @pytest.mark.usefixtures("always_stored")
    def test_chunks_are_stored_and_told_as_it_goes(self, output):
        gate = threading.Event()
        source = Scripted({"a": 3}, lambda unit, page: page < 2 or gate.wait(SECONDS))
        with scripted(output, source) as listing:
            assert listing.wait(1, SECONDS)
            assert not listing.is_complete
            assert ids(listing) == source.whole()[:6]
            assert not listing.wait(2, 0.05)
            gate.set()
            assert listing.wait(2, SECONDS)
            wait_until(listing, lambda: listing.is_complete)
        assert ids(listing) == source.whole()

    @pytest.mark.usefixtures("always_stored")
    def test_a_unit_that_is_found_by_many_pages_is_listed_once(self, output):
        source = Scripted({"a": 4, "b": 4, "c": 2}, found="c")
        listing = finish(scripted(output, source))
        assert Counter(ids(listing)) == Counter(source.whole())
        assert listing.num_hidden == 10

    def test_listers_wait_while_much_is_to_be_gathered(self, output, monkeypatch):
        monkeypatch.setattr("capray.inputs.listing.MAX_QUEUED_ROWS", 1)
        source = Scripted(dict.fromkeys("abcdefgh", 5))
        assert Counter(ids(finish(scripted(output, source)))) == Counter(source.whole())

    def test_leaving_ends_its_threads(self, output):
        with scripted(output, Scripted({"a": 3}, lambda unit, page: time.sleep(0.1))) as listing:
            threads = list(listing._threads)
        deadline = time.monotonic() + 3
        while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(thread.is_alive() for thread in threads)


class TestResume:
    @pytest.mark.usefixtures("always_stored")
    @pytest.mark.parametrize("page", range(4))
    @pytest.mark.parametrize("found", [None, "c"])
    def test_after_a_kill_the_rest_is_listed(self, output, page, found):
        units = {"a": 4, "b": 4, "c": 4}
        stop, kill = killed_at("a", page)
        with scripted(output, Scripted(units, stop, found), "run-1") as killed:
            wait_until(killed, lambda: killed.num_rows == page * 3 + 24)
            before = ids(killed)
        kill.set()
        source = Scripted(units, found=found)
        again = scripted(output, source)
        assert again.resumed_at is not None
        assert not again.is_complete
        finish(again)
        assert ids(again)[: len(before)] == before
        assert Counter(ids(again)) == Counter(source.whole())
        assert source.asked == [("a", at) for at in range(page, 4)], "what is stored is not listed again"
        assert again.num_hidden == 12
        source = Scripted(units, found=found)
        once_more = scripted(output, source, "run-3")
        assert once_more.is_complete
        assert Counter(ids(finish(once_more))) == Counter(source.whole())
        assert source.asked == []

    @pytest.mark.usefixtures("always_stored")
    @pytest.mark.parametrize("writes", range(6))
    def test_killed_at_any_write(self, output, folder, monkeypatch, writes):
        monkeypatch.setattr("capray.inputs.files.ROWS_PER_PAGE", 7)
        count = iter(range(10**6))

        def write_or_die(location, data):
            if next(count) >= writes:
                raise StorageError("killed")
            write_atomic(location, data)

        with pytest.raises(StorageError, match="killed"):
            finish(make(output, folder, run="run-1", write=write_or_die))
        assert Counter(ids(finish(make(output, folder)))) == Counter(str(path) for path in folder.rglob("*.jpg"))

    @pytest.mark.parametrize("options", [{"include": ("*0.jpg",)}, {"shard": "1/2"}, {"relist": True}, {"also": True}])
    def test_what_drops_a_stored_listing(self, output, folder, options):
        finish(make(output, folder, run="run-1"))
        (folder / "new.jpg").touch()
        assert len(ids(finish(make(output, folder)))) == 30
        also = [folder / "1"] if options.pop("also", False) else []
        other = finish(make(output, folder, *also, run="run-3", **options))
        assert other.resumed_at is None
        if also or "relist" in options:
            assert len(ids(other)) == (41 if also else 31)
        else:
            assert 0 < len(ids(other)) < 31
        assert len(ids(finish(make(output, folder, run="run-4")))) == 31, "the first listing is gone"
        assert {name.split("/")[0] for name in plan_files(output)} == {"000004-run-4"} | (
            {"000003-run-3"} if options == {"relist": True} else set()
        )

    def test_settings_at_their_defaults_do_not_tell_listings_apart(self):
        """So that one survives an upgrade to a version with further settings. The digest is of the first such version."""
        digest = _digest_of(CaptionConfig(input="/in", output="/out", model="m", include=("*.jpg",)), [])
        assert digest == "04a1b4d533e69026a5a2e4010a15092cd9ad4c868831338f3c8dd923437a77d0"

    def test_members_of_tars_are_kept(self, output, tmp_path):
        (tmp_path / "x.tar").write_bytes(b"\0" * 10240)
        tar = str(tmp_path / "x.tar")
        listing = finish(make(output, tar, run="run-1"))
        version = rows(listing)[0]["version"]
        members = pa.Table.from_pylist([{"image_id": f"{tar}#a", "member": "a", "offset": 512, "size": 600}], MEMBERS)
        listing.add_members(TarMembers(0, tar, "of another version", members))
        listing.flush()
        assert listing.known_tars == set()
        for _ in range(2):
            listing.add_members(TarMembers(0, tar, version, members))
            listing.flush()
        again = finish(make(output, tar))
        assert again.known_tars == {(0, tar)}
        assert ids(again) == [tar, f"{tar}#a"]
        row = rows(again)[1]
        assert [row[name] for name in ("kind", "uri", "container", "version", "member", "offset", "size")] == [
            "member", f"{tar}#a", tar, version, "a", 512, 600,
        ]  # fmt: skip

    def test_on_s3_it_goes_on_behind_the_last_key(self, s3, tmp_path, monkeypatch):
        monkeypatch.setattr("capray.inputs.listing.FIRST_CHUNK_ROWS", 1)
        fs = s3fs.S3FileSystem()
        root = f"{s3}/{tmp_path.name}"
        uris = [f"{root}/in/{name}" for name in [*(f"{i}.jpg" for i in range(8)), *(f"p{i}/x.jpg" for i in range(4))]]
        for uri in uris:
            fs.pipe_file(uri, b"x")
        output = Output(f"{root}/out")
        listing = make(output, f"{root}/in", run="run-1")
        real = listing.sources[0].place.fs.call_s3
        calls, refused = [], {"StopAt": 3}

        def call(method, **arguments):
            calls.append(arguments)
            if method == "list_objects_v2":
                arguments["MaxKeys"] = 3
                if "StopAt" in refused and len(calls) == refused["StopAt"]:
                    while not listing.num_rows:
                        time.sleep(0.01)
                    raise PermissionError("refused")
            return real(method, **arguments)

        monkeypatch.setattr(listing.sources[0].place.fs, "call_s3", call, raising=False)
        finish(listing)
        (fault,) = listing.faults.values()
        assert isinstance(fault, StorageError) and "permission denied" in str(fault)
        assert 0 < listing.num_rows < len(uris)
        refused.clear()
        calls.clear()
        again = finish(make(output, f"{root}/in"))
        assert Counter(ids(again)) == Counter(uris)
        assert any("StartAfter" in arguments for arguments in calls)
        again.close()
        (closed,) = fs.find(f"{root}/out")
        assert closed.rpartition("/out/")[2].startswith("_capray/plan/000002-run-2/chunk-")


@pytest.mark.usefixtures("always_stored")
class TestFenced:
    """A driver that was frozen past its lease and woken writes once more, somewhere in its successor's time."""

    UNITS = {"a": 3, "b": 3}  # noqa: RUF012

    def frozen(self, output: Output, run: str = "run-1"):
        """A run that has listed the units but for one page, and waits before it stores that; call the second to wake it."""
        woken, names = threading.Event(), []

        def write(location, data):
            names.append(location.path)
            if len(names) == 4:
                assert woken.wait(SECONDS)
            write_atomic(location, data)

        listing = scripted(output, Scripted(self.UNITS), run, write)
        listing.__enter__()
        wait_until(listing, lambda: len(names) == 4)

        def wake():
            woken.set()
            wait_until(listing, lambda: listing.is_complete)
            listing.__exit__()

        return names, wake

    @pytest.mark.parametrize("woken_at", ["begun", "done", "closed"])
    def test_its_late_chunk_costs_its_successors_nothing(self, output, woken_at):
        _, wake = self.frozen(output)
        source = Scripted(self.UNITS)
        with scripted(output, source) as second:
            if woken_at == "begun":
                wake()
            wait_until(second, lambda: second.is_complete)
        if woken_at == "done":
            wake()
        assert Counter(ids(second)) == Counter(source.whole())
        if woken_at == "closed":
            second.close()
            wake()
        third = finish(scripted(output, source, "run-3"))
        assert (third.resumed_at is None) == (woken_at == "closed")
        assert Counter(ids(third)) == Counter(source.whole())

    def test_of_two_that_began_beside_each_other_one_counts(self, output):
        source = Scripted(self.UNITS)
        both = [scripted(output, source, run) for run in ("run-1", "run-2")]
        assert both[0].number == both[1].number
        for listing in both:
            finish(listing)
        assert Counter(ids(finish(scripted(output, source, "run-3")))) == Counter(source.whole())

    @pytest.mark.parametrize("spoilt", range(5))
    @pytest.mark.parametrize("how", ["gone", "damaged"])
    def test_a_listing_that_lacks_a_chunk_is_not_taken_up(self, output, spoilt, how):
        _, wake = self.frozen(output)
        finish(scripted(output, Scripted(self.UNITS)))
        wake()
        names = sorted(name for name in plan_files(output) if name.startswith("000002") or name[-9] in "12")
        path = Path(output.plan.path, names[spoilt])
        path.unlink() if how == "gone" else path.write_bytes(b"PAR1")
        source = Scripted(self.UNITS)
        assert Counter(ids(finish(scripted(output, source, "run-3")))) == Counter(source.whole())

    def test_no_name_is_written_twice(self, output):
        names, wake = self.frozen(output)
        for run in ("run-2", "run-3"):

            def write(location, data):
                names.append(location.path)
                write_atomic(location, data)

            listing = finish(scripted(output, Scripted(self.UNITS), run, write))
        wake()
        listing.close()
        assert len(set(names)) == len(names)

    def test_closed_it_leaves_one_file_and_an_older_versions_folder_goes(self, output):
        old = Path(output.plan.path, "listing", "state.json")
        old.parent.mkdir(parents=True)
        old.write_text("{}")
        finish(scripted(output, Scripted(self.UNITS), "run-1"))
        finish(scripted(output, Scripted(self.UNITS))).close()
        assert plan_files(output) == {"000002-run-2/chunk-000001.parquet"}


class TestChanges:
    """What an input has become since it was listed."""

    def test_a_table_that_was_rewritten_is_listed_again(self, output, tmp_path):
        table = tmp_path / "in" / "t.parquet"
        table.parent.mkdir()
        names = [f"{i}" for i in range(40)]
        for order in (names, names[::-1]):
            pq.write_table(pa.table({"image_id": order, "image": [b"x"] * 40}), table, row_group_size=10)
            listing = finish(make(output, table, run=f"run-{order[0]}"))
        current = [row for row in rows(listing) if row["position"] >= listing.superseded[0, str(table)]]
        assert [row["image_id"] for row in current] == names[::-1]
        assert [(row["row_group"], row["row"]) for row in current] == [(i // 10, i % 10) for i in range(40)]
        assert list(listing.changed) == [(0, str(table))]
        assert listing.remarks == ["files of the input that have changed since and are listed again: 1"]
        again = finish(make(output, table, run="run-9"))
        assert (again.superseded, list(again.changed), again.remarks) == (listing.superseded, [(0, str(table))], [])

    @pytest.mark.usefixtures("always_stored")
    @pytest.mark.parametrize("has_changed", [False, True])
    def test_one_half_listed_goes_on_unless_it_has_changed(self, output, has_changed):
        versions = {"a": "v1", "b": "v1"}
        stop, kill = killed_at("a", 2)
        with scripted(output, Scripted({"a": 4, "b": 1}, stop, versions_=versions), "run-1") as killed:
            wait_until(killed, lambda: killed.num_rows == 9)
        kill.set()
        source = Scripted({"a": 4, "b": 1}, versions_=versions | ({"a": "v2"} if has_changed else {}))
        for run in ("run-2", "run-3"):
            assert Counter(ids(finish(scripted(output, source, run)))) == Counter(source.whole())
        assert source.asked == [("a", page) for page in range(0 if has_changed else 2, 4)]

    def test_files_that_come_and_go(self, output):
        versions = {"a": "v1", "b": "v1", "c": "v1"}

        def listed(*units: str) -> Listing:
            source = Scripted(dict.fromkeys(units, 2), versions_={unit: versions[unit] for unit in units})
            listing = finish(scripted(output, source, f"run-{len(plan_files(output))}"))
            assert Counter(ids(listing)) == Counter(source.whole())
            return listing

        listed("a", "b")
        gone = listed("b", "c")
        assert gone.superseded == {(0, "a"): ALL_ROWS}
        assert gone.remarks == ["files of the input that are gone, with the images in them: 1"]
        listed("a", "b", "c")

    @pytest.mark.usefixtures("always_stored")
    def test_one_found_changed_while_its_images_are_read_is_listed_again_twice_at_most(self, output):
        source = Scripted({"a": 2, "b": 2}, versions_={"a": "v1", "b": "v1"})
        with scripted(output, source) as listing:
            wait_until(listing, lambda: listing.is_complete)
            for number in range(MAX_RELISTS):
                source.versions_ = {"a": f"v{number + 2}", "b": "v1"}
                assert listing.relist(0, "a")
                assert not listing.is_complete
                assert listing.relist(0, "a"), "which another task may find as well"
                wait_until(listing, lambda: listing.is_complete)
                assert Counter(ids(listing)) == Counter(source.whole())
                listing.relisted.clear()
            assert not listing.relist(0, "a")
        again = finish(scripted(output, source, "run-3"))
        assert Counter(ids(again)) == Counter(source.whole())
        assert again.remarks == []

    @pytest.mark.usefixtures("always_stored")
    def test_what_was_listed_of_the_earlier_version_meanwhile_does_not_count(self, output):
        gate = threading.Event()
        source = Scripted({"a": 3}, lambda unit, page: page != 1 or gate.wait(SECONDS), versions_={"a": "v1"})
        with scripted(output, source) as listing:
            wait_until(listing, lambda: listing.num_rows == 3)
            source.versions_ = {"a": "v2"}
            assert listing.relist(0, "a")
            gate.set()
            wait_until(listing, lambda: listing.is_complete)
        assert ids(listing) == source.whole()

    @pytest.mark.usefixtures("always_stored")
    @pytest.mark.parametrize("times", [1, MAX_RELISTS, MAX_RELISTS + 1])
    def test_one_that_changes_while_it_is_listed_is_begun_again_twice_at_most(self, output, times):
        left = iter(range(times))

        def stop(unit, page):
            if (unit, page) == ("a", 1) and next(left, None) is not None:
                raise ContainerChanged("a")

        source = Scripted({"a": 2, "b": 2}, stop, versions_={"a": "v1", "b": "v1"})
        listing = finish(scripted(output, source))
        if times <= MAX_RELISTS:
            assert (Counter(ids(listing)), listing.faults) == (Counter(source.whole()), {})
        else:
            assert list(listing.faults) == ["a"]
            assert Counter(ids(finish(scripted(output, source, "run-3")))) == Counter(source.whole())


class TestFaults:
    def test_a_file_that_is_no_parquet_is_one_and_is_asked_again(self, output, tmp_path):
        for i in range(4):
            (tmp_path / "in").mkdir(exist_ok=True)
            pq.write_table(pa.table({"uri": [f"/{i}"]}), tmp_path / "in" / f"{i}.parquet")
        bad = tmp_path / "in" / "2.parquet"
        whole = bad.read_bytes()
        bad.write_bytes(b"no parquet")
        for run in ("run-1", "run-2"):
            listing = finish(make(output, tmp_path / "in", run=run))
            assert sorted(ids(listing)) == ["/0", "/1", "/3"]
            assert list(listing.faults) == [str(bad)]
            assert str(bad) in str(listing.faults[str(bad)])
        bad.write_bytes(whole)
        mended = finish(make(output, tmp_path / "in", run="run-3"))
        assert (sorted(ids(mended)), mended.faults) == (["/0", "/1", "/2", "/3"], {})

    def test_halfway_through_a_unit_what_was_listed_stays(self, output):
        def stop(unit, page):
            if (unit, page) == ("a", 1):
                raise DataError("bad page")

        listing = finish(scripted(output, Scripted({"a": 3, "b": 1}, stop), "run-1"))
        assert sorted(ids(listing)) == [f"{unit}/0/{i}" for unit in "ab" for i in range(3)]
        assert str(listing.faults["a"]) == "bad page"
        source = Scripted({"a": 3, "b": 1})
        assert Counter(ids(finish(scripted(output, source)))) == Counter(source.whole())
        assert source.asked == [("a", 1), ("a", 2)]

    @pytest.mark.parametrize("error", [StorageUnavailable("the store is gone"), ValueError("the store is gone")])
    def test_an_error_is_raised_by_wait(self, output, error):
        def stop(unit, page):
            if page == 1:
                raise error

        with (
            scripted(output, Scripted({"a": 3}, stop), "run-1") as listing,
            pytest.raises(CaprayError, match="the store is gone"),
        ):
            wait_until(listing, lambda: listing.is_complete)
        source = Scripted({"a": 3})
        assert Counter(ids(finish(scripted(output, source)))) == Counter(source.whole())
