"""The listing is stored as it goes; after a kill it goes on, and lists every image exactly once."""

import json
import threading
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from capray.config import CaptionConfig, SourceSettings
from capray.errors import CaprayError, DataError, StorageError
from capray.inputs import open_sources
from capray.inputs.base import Page, Source, plan_rows
from capray.inputs.listing import Listing
from capray.inputs.places import MEMBERS, plan_schema
from capray.output import Output
from capray.storage import Location, locate

SECONDS = 20


def make(output: Output, *inputs, relist: bool = False, **options) -> Listing:
    config = CaptionConfig(
        input=str(inputs[0]), also=tuple(map(str, inputs[1:])), output=output.root.uri, model="m", **options
    )
    sources = open_sources(config.inputs, config.subset(SourceSettings), config.keep)
    return Listing(output, sources, config, relist)


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
    files = [*listing.chunks(), *listing.member_chunks()]
    tables = [pq.ParquetFile(file.path, filesystem=file.fs).read() for file in files]
    assert all(table.schema.names == listing.schema.names for table in tables)
    return [row for table in tables for row in table.to_pylist()]


def ids(listing: Listing) -> list[str]:
    listed = rows(listing)
    assert [row["position"] for row in listed] == list(range(len(listed)))
    assert listing.num_rows == len(listed)
    return [row["image_id"] for row in listed]


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
    monkeypatch.setattr("capray.inputs.listing.CHUNK_ROWS", 1)


class Scripted(Source):
    """Units of pages of three rows each. ``stop``, given a unit and page, may block or raise before the page."""

    kind = "images"

    def __init__(self, place: Location, units: dict[str, int], stop=lambda unit, page: None, found: str | None = None):
        super().__init__(place, SourceSettings())
        self.numbers, self.stop, self.found = units, stop, found
        self.asked: list[tuple[str, int]] = []

    def units(self):
        return [unit for unit in self.numbers if unit != self.found]

    def pages(self, unit, after=None):
        for page in range(0 if after is None else after + 1, self.numbers[unit]):
            self.stop(unit, page)
            self.asked.append((unit, page))
            names = [f"{unit}/{page}/{i}" for i in range(3)]
            yield Page(plan_rows({"image_id": names, "uri": names}), page, (self.found,) if self.found else (), 1)

    def whole(self) -> list[str]:
        return [f"{unit}/{page}/{i}" for unit, count in self.numbers.items() for page in range(count) for i in range(3)]


def scripted(
    output: Output, units: dict[str, int], stop=lambda unit, page: None, found=None
) -> tuple[Listing, Scripted]:
    source = Scripted(locate("/scripted"), units, stop, found)
    return Listing(output, [source], CaptionConfig(input="/scripted", output=output.root.uri, model="m")), source


class TestWhole:
    def test_everything_is_listed_and_stored(self, output, folder):
        listing = finish(make(output, folder))
        assert sorted(ids(listing)) == sorted(str(path) for path in folder.rglob("*.jpg"))
        assert (listing.resumed_at, listing.faults, listing.num_hidden) == (None, {}, 0)
        assert listing.wait(10**9, 0)
        state = json.loads(Path(listing.folder.path, "state.json").read_text())
        assert (state["complete"], state["pending"]) == (True, [])
        listing.remove()
        assert not Path(listing.folder.path).exists()
        listing.remove()

    def test_several_inputs(self, output, folder, tmp_path):
        (tmp_path / "list.txt").write_text("/x.jpg\n/y.jpg")
        listed = rows(finish(make(output, folder, tmp_path / "list.txt")))
        assert Counter(row["input"] for row in listed) == {0: 30, 1: 2}
        assert {row["image_id"] for row in listed if row["input"] == 1} == {"/x.jpg", "/y.jpg"}

    def test_selected_and_carried(self, output, tmp_path):
        (tmp_path / "list.csv").write_text("uri,n\n/a,1\n/b,2\n")
        listing = finish(make(output, tmp_path / "list.csv", keep=("n",), exclude=("/b",)))
        assert listing.schema.equals(plan_schema(pa.struct([("n", pa.string())])))
        assert [(row["image_id"], row["source"]) for row in rows(listing)] == [("/a", {"n": "1"})]

    def test_nothing_wanted(self, output, folder):
        listing = finish(make(output, folder, include=("nothing",)))
        assert (ids(listing), listing.chunks(), listing.is_complete) == ([], [], True)

    @pytest.mark.usefixtures("always_stored")
    def test_chunks_are_stored_and_told_as_it_goes(self, output):
        gate = threading.Event()
        listing, source = scripted(output, {"a": 3}, lambda unit, page: page < 2 or gate.wait(SECONDS))
        with listing:
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
        listing, source = scripted(output, {"a": 4, "b": 4, "c": 2}, found="c")
        finish(listing)
        assert Counter(ids(listing)) == Counter(source.whole())
        assert listing.num_hidden == 10


class TestResume:
    @pytest.mark.usefixtures("always_stored")
    @pytest.mark.parametrize("page", range(4))
    @pytest.mark.parametrize("found", [None, "c"])
    def test_after_a_kill_the_rest_is_listed(self, output, page, found):
        units = {"a": 4, "b": 4, "c": 4}
        gate = threading.Event()

        def stop(unit, at):
            if unit == "a" and at == page:
                gate.wait(SECONDS)
                raise CaprayError("killed")

        killed, _ = scripted(output, units, stop, found)
        expected = page * 3 + 24
        with killed:
            wait_until(killed, lambda: killed.num_rows == expected)
            before = ids(killed)
        gate.set()
        again, source = scripted(output, units, found=found)
        assert again.resumed_at is not None
        assert not again.is_complete
        finish(again)
        assert ids(again)[: len(before)] == before
        assert Counter(ids(again)) == Counter(source.whole())
        assert source.asked == [("a", at) for at in range(page, 4)], "what is stored is not listed again"
        assert again.num_hidden == 12
        once_more, source = scripted(output, units, found=found)
        assert once_more.is_complete
        assert Counter(ids(finish(once_more))) == Counter(source.whole())
        assert source.asked == []

    @pytest.mark.usefixtures("always_stored")
    @pytest.mark.parametrize("writes", range(9))
    def test_killed_at_any_write(self, output, folder, monkeypatch, writes):
        """A folder, page by page, with the writing of chunk or state refused from the n-th on."""
        from capray.inputs import listing as module

        monkeypatch.setattr("capray.inputs.files.ROWS_PER_PAGE", 7)
        write, count = module.write_atomic, iter(range(10**6))

        def write_or_die(*arguments):
            if next(count) >= writes:
                raise StorageError("killed")
            return write(*arguments)

        monkeypatch.setattr(module, "write_atomic", write_or_die)
        with pytest.raises(StorageError, match="killed"):
            finish(make(output, folder))
        monkeypatch.setattr(module, "write_atomic", write)
        listing = finish(make(output, folder))
        assert Counter(ids(listing)) == Counter(str(path) for path in folder.rglob("*.jpg"))

    def test_a_chunk_that_no_state_counts_is_removed(self, output, folder):
        listing = finish(make(output, folder))
        Path(listing.folder.path, "chunk-000007.parquet").write_bytes(b"half")
        again = finish(make(output, folder))
        assert sorted(path.name for path in Path(again.folder.path).iterdir()) == ["chunk-000000.parquet", "state.json"]

    @pytest.mark.parametrize("options", [{"include": ("*0.jpg",)}, {"shard": "1/2"}, {"relist": True}, {"also": True}])
    def test_what_drops_a_stored_listing(self, output, folder, options):
        first = finish(make(output, folder))
        (folder / "new.jpg").touch()
        assert len(ids(finish(make(output, folder)))) == 30
        also = [folder / "1"] if options.pop("also", False) else []
        other = finish(make(output, folder, *also, **options))
        assert other.resumed_at is None
        if also:
            assert len(ids(other)) == 41
        elif "relist" in options:
            assert len(ids(other)) == 31
        else:
            assert 0 < len(ids(other)) < 31
        assert len(ids(finish(make(output, folder)))) == 31, "the first listing is gone"
        assert first.folder.path == other.folder.path

    @pytest.mark.usefixtures("always_stored")
    def test_a_listing_being_dropped_is_not_taken_up_again(self, output, folder):
        finish(make(output, folder))
        with make(output, folder, include=("nothing", "*0.jpg")) as dropping:
            dropping._stop.set()
        listing = finish(make(output, folder))
        assert len(ids(listing)) == 30

    def test_members_of_tars_are_kept(self, output, tmp_path):
        (tmp_path / "x.tar").write_bytes(b"\0" * 10240)
        listing = finish(make(output, tmp_path / "x.tar", exclude=("x.tar#b*", "*#b.jpg")))
        tar = str(tmp_path / "x.tar")
        members = [
            {"image_id": f"{tar}#{name}", "member": name, "offset": 512, "size": 3} for name in ("a.jpg", "b.jpg")
        ]
        listing.add_members(0, tar, pa.Table.from_pylist(members, MEMBERS))
        again = finish(make(output, tmp_path / "x.tar", exclude=("x.tar#b*", "*#b.jpg")))
        assert again.known_tars == [tar]
        assert ids(again) == [tar, f"{tar}#a.jpg"]
        (row,) = rows(again)[1:]
        assert (row["container"], row["member"], row["offset"], row["size"]) == (tar, "a.jpg", 512, 3)

    def test_on_s3_it_goes_on_behind_the_last_key(self, s3, tmp_path, monkeypatch):
        monkeypatch.setattr("capray.inputs.listing.CHUNK_ROWS", 1)
        fs = s3fs.S3FileSystem()
        root = f"{s3}/{tmp_path.name}"
        uris = [f"{root}/in/{name}" for name in [*(f"{i}.jpg" for i in range(8)), *(f"p{i}/x.jpg" for i in range(4))]]
        for uri in uris:
            fs.pipe_file(uri, b"x")
        output = Output(f"{root}/out")
        listing = make(output, f"{root}/in")
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
        with pytest.raises(StorageError, match="permission denied"):
            finish(listing)
        assert 0 < listing.num_rows < len(uris)
        refused.clear()
        calls.clear()
        again = finish(make(output, f"{root}/in"))
        assert Counter(ids(again)) == Counter(uris)
        assert any("StartAfter" in arguments for arguments in calls)


class TestFaults:
    def test_a_file_that_is_no_parquet_is_one_and_the_others_go_on(self, output, tmp_path):
        for i in range(4):
            (tmp_path / "in").mkdir(exist_ok=True)
            pq.write_table(pa.table({"uri": [f"/{i}"]}), tmp_path / "in" / f"{i}.parquet")
        (tmp_path / "in" / "2.parquet").write_bytes(b"no parquet")
        bad = str(tmp_path / "in" / "2.parquet")
        listing = finish(make(output, tmp_path / "in"))
        assert sorted(ids(listing)) == ["/0", "/1", "/3"]
        assert list(listing.faults) == [bad]
        assert bad in listing.faults[bad]
        assert list(finish(make(output, tmp_path / "in")).faults) == [bad], "it is stored"

    def test_halfway_through_a_unit_what_was_listed_stays(self, output):
        def stop(unit, page):
            if (unit, page) == ("a", 1):
                raise DataError("bad page")

        listing, _ = scripted(output, {"a": 3, "b": 1}, stop)
        finish(listing)
        assert sorted(ids(listing)) == [f"{unit}/0/{i}" for unit in "ab" for i in range(3)]
        assert listing.faults == {"a": "bad page"}

    @pytest.mark.parametrize("error", [StorageError("the store is gone"), ValueError("the store is gone")])
    def test_an_error_is_raised_by_wait(self, output, error):
        def stop(unit, page):
            if page == 1:
                raise error

        listing, source = scripted(output, {"a": 3}, stop)
        with listing, pytest.raises(CaprayError, match="the store is gone"):
            wait_until(listing, lambda: listing.is_complete)
        again, source = scripted(output, {"a": 3})
        assert Counter(ids(finish(again))) == Counter(source.whole())

    def test_leaving_ends_its_threads(self, output):
        listing, _ = scripted(output, {"a": 3}, lambda unit, page: time.sleep(0.1))
        with listing:
            threads = list(listing._threads)
        deadline = time.monotonic() + 3
        while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(thread.is_alive() for thread in threads)
