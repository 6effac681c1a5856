"""Storage, locally and on S3: exact names, atomic writes, and errors that say what was being done."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest
import s3fs

from capray.deadlines import now
from capray.errors import CaprayError, DataError, StorageError, WriteUnanswered
from capray.storage import exists, find_parquet, is_file, is_folder, iter_files, list_names, locate, read_bytes, write_atomic
from tests.proxy import FaultyProxy

NAMES = ["a b.jpg", "gro\u00df.jpg", "x#1.jpg", "y%2Fz.jpg", "new\nline.jpg", "+plus.jpg", "\u00e4?.jpg", "sub/deep/c.jpg"]


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path) -> str:
    """An empty place, on disk and on S3."""
    if request.param == "local":
        return str(tmp_path / "place")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def fill(root: str, names: list[str], data: bytes = b"123") -> None:
    for name in names:
        write_atomic(locate(f"{root}/{name}"), data)


class TestLocate:
    def test_local_forms(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        for uri in ("a/b.jpg", "./a//b.jpg", f"file://{tmp_path}/a/b.jpg", "~/a/b.jpg", tmp_path / "a" / "b.jpg"):
            location = locate(uri)
            assert (location.is_local, location.uri, location.path) == (True, f"{tmp_path}/a/b.jpg", f"{tmp_path}/a/b.jpg")

    def test_s3_keys_are_taken_literally(self, s3):
        location = locate(f"{s3}/a b/c#d%2Fe?.jpg")
        assert (location.is_local, location.path) == (False, "capray-tests/a b/c#d%2Fe?.jpg")
        assert location.join("x", "y").uri == f"{s3}/a b/c#d%2Fe?.jpg/x/y"

    def test_joining_after_a_slash(self, tmp_path):
        assert locate(f"{tmp_path}/").join("a").path == f"{tmp_path}/a"

    @pytest.mark.parametrize("scheme", ["s4", "nonsense"])
    def test_an_unknown_scheme(self, scheme):
        with pytest.raises(StorageError, match=f"no filesystem for '{scheme}://bucket/x'"):
            locate(f"{scheme}://bucket/x")


class TestWriteAtomic:
    def test_round_trip(self, root):
        place = locate(f"{root}/a/b.bin")
        assert not exists(place)
        write_atomic(place, b"one")
        write_atomic(place, b"two", scratch=locate(root).join("tmp"))
        assert read_bytes(place) == b"two"
        assert is_file(place) and not is_folder(place) and is_folder(locate(f"{root}/a"))
        assert list_names(locate(f"{root}/a")) == ["b.bin"]
        assert list_names(locate(f"{root}/tmp")) == []

    def test_a_write_that_fails_leaves_the_old_file_and_no_litter(self, tmp_path, monkeypatch):
        place, scratch = locate(str(tmp_path / "a.bin")), locate(str(tmp_path / "tmp"))
        write_atomic(place, b"old", scratch)

        for code in (errno.ENOSPC, errno.EDQUOT):

            def full(handle, code=code):
                raise OSError(code, os.strerror(code))

            monkeypatch.setattr(os, "fsync", full)
            for where in (scratch, None):
                with pytest.raises(StorageError, match=r"writing .*a\.bin: no space left \(.*\): make room") as caught:
                    write_atomic(place, b"new", where, deadline=now() + 10)
                assert not isinstance(caught.value, WriteUnanswered)
        assert Path(place.path).read_bytes() == b"old"
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.bin", "tmp"]

    def test_a_target_that_is_a_folder(self, tmp_path):
        (tmp_path / "a.bin" / "inside").mkdir(parents=True)
        with pytest.raises(StorageError, match=r"writing .*a\.bin"):
            write_atomic(locate(str(tmp_path / "a.bin")), b"new", locate(str(tmp_path / "tmp")))
        assert list((tmp_path / "tmp").iterdir()) == []

    def test_an_interrupt_leaves_no_litter(self, tmp_path, monkeypatch):
        def interrupted(source, target):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_atomic(locate(str(tmp_path / "a.bin")), b"new")
        assert list(tmp_path.iterdir()) == []

    def test_readers_never_see_a_part(self, root):
        place = locate(f"{root}/a.bin")
        size, rounds = 1_000_000, 15
        write_atomic(place, b"0" * size)
        done, seen, wrong = threading.Event(), set(), []

        def read():
            while not done.is_set():
                data = read_bytes(place)
                seen.add(data[:1])
                if len(data) != size or data != data[:1] * size:
                    wrong.append((len(data), set(data)))

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        try:
            for i in range(rounds):
                write_atomic(place, b"%d" % (i % 10) * size)
        finally:
            done.set()
            for reader in readers:
                reader.join()
        assert not wrong
        assert seen


@pytest.fixture
def proxy(s3, monkeypatch):
    """The proxy, in the place of the server."""
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], stall_seconds=4) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
    s3fs.S3FileSystem.clear_instance_cache()


class TestDeadline:
    """A write ends in time, however storage fails, and nothing of it happens later."""

    @pytest.mark.parametrize("fault", ["503", "500", "reset", "silent", "stall", "lose_answer"])
    def test_a_store_that_does_not_confirm(self, s3, tmp_path, proxy, fault):
        place = locate(f"{s3}/{tmp_path.name}/a.bin")
        assert not exists(place), "the connection stands"
        proxy.set_rates({f"write.{fault}": 1})
        started = time.monotonic()
        with pytest.raises(WriteUnanswered, match=r"writing .*a\.bin: .*; it may have happened or not") as caught:
            write_atomic(place, b"bytes", deadline=now() + 1.5)
        assert time.monotonic() - started < 3
        assert caught.value.exit_code == 75
        time.sleep(0.3)  # What was on its way arrives.
        sent = proxy.requests["PUT"]
        assert sent > 0
        time.sleep(2)
        assert proxy.requests["PUT"] == sent, "it was tried again after its deadline"
        assert exists(place) == (fault in ("stall", "lose_answer"))
        proxy.set_rates({})
        write_atomic(place, b"bytes", deadline=now() + 10)
        assert read_bytes(place) == b"bytes"

    def test_a_store_that_is_away(self, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        s3fs.S3FileSystem.clear_instance_cache()
        started = time.monotonic()
        with pytest.raises(WriteUnanswered):
            write_atomic(locate("s3://bucket/a.bin"), b"bytes", deadline=now() + 1)
        assert time.monotonic() - started < 3
        s3fs.S3FileSystem.clear_instance_cache()

    def test_a_refusal_is_known(self, s3, proxy):
        proxy.set_rates({"write.denied": 1})
        with pytest.raises(StorageError, match="permission denied") as caught:
            write_atomic(locate(f"{s3}/denied.bin"), b"bytes", deadline=now() + 10)
        assert not isinstance(caught.value, WriteUnanswered)

    def test_a_file_system_that_hangs(self, tmp_path, monkeypatch):
        back, ended = threading.Event(), threading.Event()

        def hang(handle):
            back.wait(30)
            threading.Timer(0.3, ended.set).start()

        monkeypatch.setattr(os, "fsync", hang)
        place = locate(str(tmp_path / "a.bin"))
        with pytest.raises(WriteUnanswered, match=r"writing .*a\.bin: no answer within 0\.3 s"):
            write_atomic(place, b"late", deadline=now() + 0.3)
        back.set()
        assert ended.wait(10)
        assert list(tmp_path.iterdir()) == [], "it was renamed after its deadline, or left litter"


class TestListing:
    def test_every_name_comes_back_exactly_and_can_be_read(self, root):
        for i, name in enumerate(NAMES):
            write_atomic(locate(f"{root}/{name}"), b"x" * i)
        entries = {entry.uri: entry for entry in iter_files(locate(root))}
        assert set(entries) == {f"{root}/{name}" for name in NAMES}
        for i, name in enumerate(NAMES):
            entry = entries[f"{root}/{name}"]
            assert entry.size == i
            assert read_bytes(locate(entry.uri)) == b"x" * i

    def test_the_order_is_the_same_every_time(self, root):
        fill(root, ["b.jpg", "a.jpg", "B.jpg", "10.jpg", "9.jpg", "sub/a.jpg", "sub/0.jpg"])
        listed = [entry.uri.removeprefix(f"{root}/") for entry in iter_files(locate(root))]
        assert listed == ["10.jpg", "9.jpg", "B.jpg", "a.jpg", "b.jpg", "sub/0.jpg", "sub/a.jpg"]
        assert [entry.uri.removeprefix(f"{root}/") for entry in iter_files(locate(f"{root}/"))] == listed

    def test_a_prefix_is_a_folder_not_a_beginning(self, root):
        fill(root, ["photos/a.jpg", "photos-old/b.jpg", "photos.txt"])
        assert [entry.uri for entry in iter_files(locate(f"{root}/photos"))] == [f"{root}/photos/a.jpg"]

    def test_list_names(self, root):
        fill(root, ["b.parquet", "a.parquet", "c.json", "sub/d.parquet"])
        assert list_names(locate(root)) == ["a.parquet", "b.parquet", "c.json"]
        assert list_names(locate(root), ".parquet") == ["a.parquet", "b.parquet"]
        assert list_names(locate(f"{root}/nothing")) == []

    def test_what_was_just_written_is_seen(self, root):
        place = locate(root)
        assert list_names(place) == [] and not is_folder(place)
        fill(root, ["a"])
        assert list_names(place) == ["a"] and is_folder(place)

    def test_the_marker_of_an_empty_folder_is_no_file(self, s3, tmp_path):
        """The S3 console's "create folder" puts an empty object whose key ends in a slash."""
        fs, root = s3fs.S3FileSystem(use_listings_cache=False), f"{s3}/{tmp_path.name}"
        fill(root, ["a.jpg", "sub/b.jpg"])
        for folder in ("", "sub/"):
            fs.pipe_file(f"{root}/{folder}", b"")
        assert [entry.uri for entry in iter_files(locate(root))] == [f"{root}/a.jpg", f"{root}/sub/b.jpg"]

    def test_a_folder_that_was_emptied_has_no_files(self, root):
        fill(root, ["sub/a.jpg"])
        place = locate(f"{root}/sub/a.jpg")
        place.fs.rm_file(place.path)
        assert list(iter_files(locate(f"{root}/sub"))) == []

    def test_a_dangling_link_does_not_end_the_listing(self, tmp_path):
        fill(str(tmp_path), ["a.jpg", "c.jpg"])
        (tmp_path / "b.jpg").symlink_to(tmp_path / "gone.jpg")
        listed = [entry.path for entry in iter_files(locate(str(tmp_path)))]
        assert {f"{tmp_path}/a.jpg", f"{tmp_path}/c.jpg"} <= set(listed)


class TestErrors:
    def test_a_missing_file(self, root):
        with pytest.raises(StorageError, match=f"reading {root}/nothing: not found"):
            read_bytes(locate(f"{root}/nothing"))

    def test_a_missing_folder(self, tmp_path):
        with pytest.raises(StorageError, match="listing .*/nowhere: not found"):
            list(iter_files(locate(str(tmp_path / "nowhere"))))

    @pytest.mark.usefixtures("s3")
    def test_a_missing_bucket(self):
        place = locate("s3://capray-no-such-bucket/x")
        for call, doing in ((read_bytes, "reading"), (lambda place: list(iter_files(place)), "listing")):
            with pytest.raises(StorageError, match=f"{doing} s3://capray-no-such-bucket/x: not found.*bucket"):
                call(place)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_no_permission(self, tmp_path):
        (tmp_path / "a").write_bytes(b"1")
        (tmp_path / "a").chmod(0)
        with pytest.raises(StorageError, match="reading .*: permission denied"):
            read_bytes(locate(str(tmp_path / "a")))

    def test_wrong_credentials(self, s3):
        fs = s3fs.S3FileSystem(key="tests-key", secret="wrong", skip_instance_cache=True, use_listings_cache=False)
        place = locate(f"{s3}/x")
        with pytest.raises(StorageError, match="reading s3://.*/x: permission denied"):
            read_bytes(type(place)(place.uri, fs, place.path))

    @pytest.mark.parametrize(
        ("fault", "exit_code"),
        [
            ("503", 75),
            ("reset", 75),
            ("reset_body", 75),
            ("truncate", 75),
            ("expired", 75),
            ("expired_403", 75),
            ("denied", 1),
        ],
    )
    def test_what_passes_is_told_from_what_does_not(self, s3, proxy, fault, exit_code):
        place = locate(f"{s3}/kept.bin")
        write_atomic(place, b"bytes")
        proxy.set_rates({f"read.{fault}": 1})
        with pytest.raises(StorageError, match=r"reading .*kept\.bin") as caught:
            read_bytes(place)
        assert caught.value.exit_code == exit_code
        proxy.set_rates({})
        assert read_bytes(place) == b"bytes"

    def test_a_programmers_mistake_goes_through(self, tmp_path):
        with pytest.raises(TypeError):
            write_atomic(locate(str(tmp_path / "a")), "text")
        assert list(tmp_path.iterdir()) == []


class TestFindParquet:
    @pytest.fixture
    def table(self, root) -> str:
        fill(
            root, ["b.parquet", "a.parquet", "sub/c.parquet", "_capray/plan/d.parquet", "sub/_x/e.parquet", "_dataset.json"]
        )
        return root

    def names(self, uri: str, root: str) -> list[str]:
        found = find_parquet(uri)
        assert {entry.size for entry in found} == {3}
        return [entry.uri.removeprefix(f"{root}/") for entry in found]

    def test_a_file(self, table):
        assert self.names(f"{table}/sub/c.parquet", table) == ["sub/c.parquet"]

    def test_a_folder_without_what_is_private(self, table):
        assert self.names(table, table) == ["a.parquet", "b.parquet", "sub/c.parquet"]

    def test_a_folder_with_a_slash_behind(self, table):
        assert self.names(f"{table}/", table) == ["a.parquet", "b.parquet", "sub/c.parquet"]

    def test_a_private_folder_asked_for_by_name(self, table):
        assert self.names(f"{table}/_capray", table) == ["_capray/plan/d.parquet"]

    def test_a_glob(self, table):
        assert self.names(f"{table}/*.parquet", table) == ["a.parquet", "b.parquet"]
        assert self.names(f"{table}/[a]*.parquet", table) == ["a.parquet"]

    def test_a_glob_that_meets_folders_and_other_files(self, table):
        assert self.names(f"{table}/*", table) == ["a.parquet", "b.parquet"]

    def test_a_folder_whose_name_looks_like_a_glob(self, root):
        fill(root, ["table [v2]/a.parquet"])
        assert self.names(f"{root}/table [v2]", root) == ["table [v2]/a.parquet"]

    def test_none(self, table):
        for uri in (f"{table}/nothing", f"{table}/*.pq"):
            with pytest.raises(CaprayError, match="no Parquet files at '.*'|not found"):
                find_parquet(uri)
        fill(table, ["texts/a.txt"])
        with pytest.raises(DataError, match=f"no Parquet files at '{table}/texts'"):
            find_parquet(f"{table}/texts")
