"""Reading by places: what stands under an id was listed under it, and no fault of a mount, network or store is an image's.

Containers are changed behind the listing's back, files and stores taken away. S3 is a real server behind ``tests.proxy``.
"""

import io
import os
import pickle
import shutil
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import md5
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from capray.config import ImageLimits, SourceSettings
from capray.errors import StorageError, TryAgain
from capray.images import ImageError
from capray.inputs import byte_reader, open_sources
from capray.inputs import witnesses as witnesses_module
from capray.inputs.base import Changed, Failed, Found, TarMembers, TarUnreadable
from capray.inputs.byte_reader import Stream
from capray.inputs.places import PLACES, Row
from capray.inputs.reader import Reader
from capray.inputs.throttle import Throttle
from capray.inputs.witnesses import Known, Witnesses
from tests.conftest import write_photos, write_tar
from tests.test_byte_reader import configure, forget, proxy, put  # noqa: F401 (fixtures)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Each test as if in a process of its own, with short waits."""
    seen = Witnesses()
    for module in ("byte_reader", "reader"):
        monkeypatch.setattr(f"capray.inputs.{module}.witnesses", seen)
    monkeypatch.setattr(byte_reader, "_throttle", Throttle())
    monkeypatch.setattr(byte_reader, "_SLOW_DOWN_SECONDS", 0.05)
    monkeypatch.setattr(witnesses_module, "POLL_SECONDS", 0.05)
    return seen


def listed(uri, **options) -> tuple[Reader, list[Row]]:
    """What reads an input, and its rows."""
    sources = open_sources((str(uri),), SourceSettings(**options))
    pages = [page for unit in sources[0].units() for page in sources[0].pages(unit)]
    rows = [row for page in pages for row in sources[0].selection.filter(page.rows).to_pylist()]
    empty = dict.fromkeys(PLACES.names)
    rows = [empty | {"position": i, "input": 0} | row for i, row in enumerate(rows)]
    return Reader.of(sources, ImageLimits(), concurrency=3, patience_seconds=20), rows


def read(reader: Reader, rows: list[Row], *options) -> tuple[dict[str, bytes | str], list]:
    """By id the bytes or the kind of failure, and the events; each id once."""
    outcomes = list(reader.read(rows, *options))
    images = [outcome for outcome in outcomes if isinstance(outcome, (Found, Failed))]
    by_id = {image.row["image_id"]: image.data if isinstance(image, Found) else image.error.kind for image in images}
    assert len(by_id) == len(images)
    return by_id, [outcome for outcome in outcomes if outcome not in images]


def error_of(reader: Reader, row: Row) -> ImageError:
    (outcome,) = reader.read([row])
    assert isinstance(outcome, Failed)
    return outcome.error


def data(name: str) -> bytes:
    return name.encode() * 50


def write_table(path: Path, names: list[str], **options) -> str:
    path.parent.mkdir(exist_ok=True, parents=True)
    columns = {"image_id": names, "image": [data(name) for name in names]}
    pq.write_table(pa.table(columns), path, row_group_size=10, **options)
    return str(path)


def as_members(reader: Reader, rows: list[Row]) -> list[Row]:
    """The images of a tar by their places, as its reading tells them."""
    *_, told = reader.read(rows)
    assert isinstance(told, TarMembers)
    return [rows[0] | member | {"kind": "member", "version": told.version} for member in told.members.to_pylist()]


def unseen(path: str, change) -> None:
    """Change a file so that neither its size nor its time tells."""
    before = os.stat(path)
    change()
    assert os.path.getsize(path) == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


class Mount:
    """A folder that can be away, with or without its empty mount point."""

    def __init__(self, path: Path):
        self.path, self._other = path, path.with_name(f"{path.name}-elsewhere")

    def leave(self, empty: bool = False) -> None:
        self.path.rename(self._other)
        if empty:
            self.path.mkdir()

    def come_back(self, seconds: float = 0) -> threading.Timer:
        def mount() -> None:
            if self.path.exists():
                self.path.rmdir()
            self._other.rename(self.path)

        timer = threading.Timer(seconds, mount)
        timer.start()
        return timer


class TestTables:
    NAMES = tuple(f"{i:02d}" for i in range(40))

    @pytest.fixture(params=["local", "s3"])
    def store(self, request, tmp_path):
        """Writes the table, here or there; returns its URI."""

        def write(names: list[str]) -> str:
            path = write_table(tmp_path / "x.parquet", names)
            if request.param == "local":
                return path
            uri = f"{request.getfixturevalue('s3')}/{tmp_path.name}/x.parquet"
            s3fs.S3FileSystem().put_file(path, uri)
            return uri

        return write

    def test_rows_are_read_with_their_ids(self, store):
        reader, rows = listed(store(self.NAMES))
        for wanted in (rows, rows[3:4], [rows[i] for i in (0, 9, 10, 39)]):
            images, events = read(pickle.loads(pickle.dumps(reader)), wanted)
            assert (images, events) == ({row["image_id"]: data(row["image_id"]) for row in wanted}, [])

    @pytest.mark.parametrize("names", [NAMES[::-1], NAMES[:10], NAMES[1:], [*NAMES, "more"]])
    def test_a_table_that_was_written_anew_gives_no_other_bytes(self, store, names):
        reader, rows = listed(uri := store(self.NAMES))
        assert store(names) == uri
        assert read(reader, rows) == ({}, [Changed(0, uri)])

    def test_ids_are_compared_even_when_the_version_is_the_same(self, tmp_path):
        path = write_table(tmp_path / "x.parquet", self.NAMES, compression="none", use_dictionary=False)
        reader, rows = listed(path)
        order = [*self.NAMES[:15], *self.NAMES[:14:-1]]
        unseen(path, lambda: write_table(Path(path), order, compression="none", use_dictionary=False))
        images, events = read(reader, rows)
        assert images == {name: data(name) for name in self.NAMES[:15]}
        assert events == [Changed(0, path)]

    def test_other_containers_of_the_unit_are_read_all_the_same(self, tmp_path):
        for name in "ab":
            write_table(tmp_path / "in" / f"{name}.parquet", [f"{name}{i}" for i in range(3)])
        reader, rows = listed(tmp_path / "in")
        write_table(tmp_path / "in" / "a.parquet", ["a2", "a1", "a0"])
        images, events = read(reader, rows)
        assert images == {name: data(name) for name in ("b0", "b1", "b2")}
        assert events == [Changed(0, str(tmp_path / "in" / "a.parquet"))]

    def test_replaced_between_two_requests(self, s3, tmp_path, monkeypatch):
        """Each answer but the first comes from another object: If-Match has S3 refuse."""
        uri = f"{s3}/{tmp_path.name}/x.parquet"
        old = write_table(tmp_path / "old.parquet", self.NAMES)
        new = write_table(tmp_path / "new.parquet", self.NAMES[::-1])
        fs = s3fs.S3FileSystem()
        fs.put_file(old, uri)
        reader, rows = listed(uri)
        fetch, count = byte_reader._read, []

        def replacing(*arguments):
            count.append(1)
            if len(count) == 2:
                fs.put_file(new, uri)
            return fetch(*arguments)

        monkeypatch.setattr(byte_reader, "_read", replacing)
        assert read(reader, rows) == ({}, [Changed(0, uri)])
        assert len(count) == 2

    def test_an_image_that_is_null(self, tmp_path):
        pq.write_table(pa.table({"image_id": ["1"], "image": pa.array([None], pa.binary())}), tmp_path / "x.parquet")
        error = error_of(reader := listed(tmp_path / "x.parquet")[0], listed(tmp_path / "x.parquet")[1][0])
        assert (error.kind, error.certain, reader.limits) == ("missing", True, ImageLimits())

    def test_damage_and_absence_are_storage_s(self, tmp_path):
        path = write_table(tmp_path / "x.parquet", self.NAMES)
        reader, rows = listed(path)
        at = pq.read_metadata(path).row_group(1).column(1).dictionary_page_offset
        content = Path(path).read_bytes()
        unseen(path, lambda: Path(path).write_bytes(content[:at] + b"\xff" * 50 + content[at + 50 :]))
        images, events = read(reader, rows)
        assert {images[name] for name in self.NAMES[10:20]} == {"unreadable_storage"}
        assert all(images[name] == data(name) for name in self.NAMES[:10])
        assert events == []
        os.unlink(path)
        write_table(tmp_path / "other.parquet", ["other"])
        read(*listed(tmp_path / "other.parquet"))
        assert set(read(reader, rows)[0].values()) == {"unreadable_storage"}, "the mount is there, the table is not"

    def test_one_that_is_gone_from_s3_has_changed(self, s3, tmp_path):
        uri = f"{s3}/{tmp_path.name}/x.parquet"
        fs = s3fs.S3FileSystem()
        fs.put_file(write_table(tmp_path / "x.parquet", self.NAMES), uri)
        reader, rows = listed(uri)
        fs.rm_file(uri)
        assert read(reader, rows) == ({}, [Changed(0, uri)])


FILES = {f"d/{i}.png": b"\x89PNG%d" % i * 300 for i in range(8)}
ODD = {name: b"\x89PNG" + name.encode() for name in ("a#b.png", "d/" + "long" * 60 + ".png", "\u00e4.png")}


class TestTars:
    @pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    def test_what_reading_it_whole_tells_can_be_read_by_place(self, tmp_path, layout):
        files = FILES | ODD
        tar = write_tar(tmp_path / "x.tar", {"0.json": b"{}", **files}, format=layout)
        reader, rows = listed(tar)
        wanted = {f"{tar}#{name}": content for name, content in files.items()}
        images, (told,) = read(reader, rows)
        assert images == wanted
        assert isinstance(told, TarMembers) and told.version == rows[0]["version"]
        members = as_members(reader, rows)
        assert read(reader, members) == (wanted, [])
        assert read(reader, members[5:7])[0] == {row["image_id"]: wanted[row["image_id"]] for row in members[5:7]}
        found = [outcome.row for outcome in reader.read(rows) if isinstance(outcome, Found)]
        assert read(reader, found) == (wanted, []), "a place is enough to look at an image again"

    def test_names_that_are_not_utf8_and_names_that_stand_twice(self, tmp_path):
        options = {"format": tarfile.GNU_FORMAT, "encoding": "latin-1"}
        tar = write_tar(tmp_path / "x.tar", {"caf\u00e9.png": b"\x89PNG1"}, **options)
        with tarfile.open(tar, "a") as file:
            for content in (b"\x89PNG2", b"\x89PNG3"):
                info = tarfile.TarInfo("2.png")
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
        reader, rows = listed(tar)
        wanted = {f"{tar}#caf\\xe9.png": b"\x89PNG1", f"{tar}#2.png": b"\x89PNG2"}
        images, (told,) = read(reader, rows)
        assert images == wanted
        assert told.members.num_rows == 3, "who plans counts the third as a duplicate"
        assert read(reader, as_members(reader, rows)[:2]) == (wanted, [])

    @pytest.mark.parametrize("left", [-512, -1, 0, 1, 40, 1000])
    def test_cut_off_within_a_member_or_a_header(self, tmp_path, left):
        tar = write_tar(tmp_path / "x.tar", {f"{i}.png": b"\x89PNG" * 500 for i in range(3)})
        with tarfile.open(tar) as file:
            os.truncate(tar, file.getmembers()[2].offset_data + left)
        reader, rows = listed(tar)
        images, (told,) = read(reader, rows)
        assert list(images) == [f"{tar}#0.png", f"{tar}#1.png"]
        assert isinstance(told, TarUnreadable)
        assert ("damaged" if left < 0 else "cut off within 2.png") in told.message

    def test_what_is_no_tar_and_what_is_spoilt(self, tmp_path):
        tar = write_tar(tmp_path / "x.tar", FILES)
        content = Path(tar).read_bytes()
        with tarfile.open(tar) as file:
            offset = file.getmembers()[1].offset
        for spoilt, number in (
            (content[:offset] + b"\xff" * 512 + content[offset + 512 :], 1),
            (b"no tar" * 500, 0),
            (b"", 0),
        ):
            Path(tar).write_bytes(spoilt)
            images, (event,) = read(*listed(tar))
            assert (len(images), type(event)) == (number, TarUnreadable)
            assert "damaged, or no tar" in event.message
        write_tar(Path(tar), {})
        images, (told,) = read(*listed(tar))
        assert (images, told.members.num_rows) == ({}, 0)

    def test_skipped_and_unwanted_ones(self, tmp_path):
        tar = write_tar(tmp_path / "x.tar", FILES)
        reader, rows = listed(tar, exclude=["*5.png"])
        skipped = {md5(f"{tar}#d/{i}.png".encode()).digest() for i in (1, 2)}
        images, (told,) = read(reader, rows, skipped)
        assert sorted(images) == [f"{tar}#d/{i}.png" for i in (0, 3, 4, 6, 7)]
        assert told.members.num_rows == 7

    @pytest.mark.parametrize("kind", ["tar", "member", "name"])
    @pytest.mark.parametrize("store", ["local", "s3"])
    def test_one_that_was_written_anew_gives_no_other_bytes(self, tmp_path, request, kind, store):
        names = list(FILES)
        place, fs = f"{tmp_path}/x.tar", None
        if store == "s3":
            place, fs = f"{request.getfixturevalue('s3')}/{tmp_path.name}/x.tar", s3fs.S3FileSystem()

        def write(files: dict[str, bytes]) -> None:
            path = write_tar(tmp_path / "x.tar", files)
            if fs:
                fs.put_file(path, place)

        write(FILES)
        reader, rows = listed(place)
        if kind == "member":
            rows = as_members(reader, rows)
        elif kind == "name":
            rows = [rows[0] | {"kind": "name", "member": name, "image_id": name} for name in names]
        time.sleep(0.01)
        write(dict(zip(names, reversed(FILES.values()), strict=True)))
        assert read(reader, rows) == ({}, [Changed(0, place)])

    def test_headers_are_compared_even_when_the_version_is_the_same(self, tmp_path):
        tar = write_tar(tmp_path / "x.tar", FILES)
        reader, rows = listed(tar)
        members = as_members(reader, rows)
        unseen(tar, lambda: write_tar(Path(tar), dict(reversed(FILES.items()))))
        assert read(reader, members) == ({}, [Changed(0, tar)])
        unseen(
            tar, lambda: Path(tar).write_bytes(b"no tar" * (os.path.getsize(tar) // 6) + b"  "[: os.path.getsize(tar) % 6])
        )
        assert read(reader, members) == ({}, [Changed(0, tar)])
        ((event,),) = (read(reader, rows)[1],)
        assert isinstance(event, TarUnreadable) and "no tar" in event.message

    def test_large_members_are_not_read(self, tmp_path):
        tar = write_tar(tmp_path / "x.tar", {"a.png": b"\x89PNG" * 20_000, "b.png": b"\x89PNG"})
        reader, rows = listed(tar)
        members = as_members(reader, rows)
        reader = replace(reader, limits=ImageLimits(max_image_bytes=1000))
        for places in (rows, members):
            assert read(reader, places)[0] == {f"{tar}#a.png": "too_large", f"{tar}#b.png": b"\x89PNG"}

    def test_names_of_a_sidecar_are_matched_by_key(self, tmp_path):
        """Suffixes differ within a tar; keys are unique."""
        files = {
            "0.jpg": b"\xff\xd8\xff0",
            "0.json": b"{}",
            "1.png": b"\x89PNG1",
            "2.webp": b"RIFF....WEBP2",
            "3.bin": b"GIF83",
        }
        tar = write_tar(tmp_path / "in" / "x.tar", files)
        pq.write_table(pa.table({"key": ["0", "1", "2", "3", "4"]}), tmp_path / "in" / "x.parquet")
        reader, rows = listed(tmp_path / "in")
        images, events = read(reader, rows)
        contents = [files["0.jpg"], files["1.png"], files["2.webp"], files["3.bin"], "missing"]
        assert images == dict(zip((f"{tar}#{i}.jpg" for i in range(5)), contents, strict=True))
        assert events == []
        found = [outcome.row for outcome in reader.read(rows) if isinstance(outcome, Found)]
        assert {row["kind"] for row in found} == {"member"}
        assert read(reader, found)[0] == dict(list(images.items())[:4])

    def test_the_very_name_goes_before_another_of_its_key(self, tmp_path):
        files = {
            "0.a.jpg": b"\xff\xd8\xffa",
            "0.b.jpg": b"\xff\xd8\xffb",
            "1.b.jpg": b"\xff\xd8\xffB",
            "1.a.jpg": b"\xff\xd8\xffA",
        }
        tar = write_tar(tmp_path / "in" / "x.tar", files)
        pq.write_table(pa.table({"key": ["0", "1"]}), tmp_path / "in" / "x.parquet")
        images, _ = read(*listed(tmp_path / "in"))
        assert images == {f"{tar}#{name}": files[name] for name in ("0.a.jpg", "1.a.jpg")}

    def test_one_that_is_cut_off(self, tmp_path):
        tar = write_tar(tmp_path / "x.tar", FILES)
        with tarfile.open(tar) as file:
            offset = file.getmembers()[5].offset_data
        os.truncate(tar, offset + 10)
        reader, rows = listed(tar)
        names = [rows[0] | {"kind": "name", "member": name, "image_id": name} for name in FILES]
        images, _ = read(reader, names)
        assert [images[name] == content for name, content in FILES.items()] == [True] * 5 + [False] * 3
        errors = [outcome.error for outcome in reader.read(names) if isinstance(outcome, Failed)]
        assert [(error.kind, error.certain) for error in errors] == [("unreadable_storage", True)] * 3


class TestMounts:
    """A folder of images on a mount, seven of which were read before it goes away."""

    @pytest.fixture
    def photos(self, tmp_path) -> Mount:
        folder = tmp_path / "mnt" / "photos"
        folder.mkdir(parents=True)
        for i in range(60):
            (folder / f"{i:02d}.jpg").write_bytes(b"%d" % i)
        return Mount(folder)

    @pytest.mark.parametrize("empty", [False, True])
    def test_away_for_a_while(self, photos, empty):
        reader, rows = listed(photos.path)
        assert "missing" not in read(reader, rows[:7])[0].values()
        photos.leave(empty)
        back = photos.come_back(2)
        notices = []
        images, _ = read(reader, rows[7:], (), notices.append)
        back.join()
        assert images == {row["image_id"]: b"%d" % i for i, row in enumerate(rows) if i >= 7}
        expected = "photos is empty, and" if empty else "which was there before, cannot be opened"
        assert any(expected in text for text in notices)

    def test_a_process_that_never_saw_it_relies_on_what_opening_saw(self, photos, alone):
        reader, rows = listed(photos.path)
        photos.leave(empty=True)
        photos.come_back(0.5)
        assert not alone._folders
        assert "missing" not in read(reader, rows)[0].values()

    def test_away_for_good_stops_the_job_with_one_message(self, photos):
        reader, rows = listed(photos.path)
        photos.leave()
        with pytest.raises(TryAgain, match=r"photos/\d\d.jpg, which was there before.*run the same command again"):
            read(replace(reader, patience_seconds=0.5), rows)

    def test_away_in_the_middle_of_a_tar(self, tmp_path, monkeypatch):
        read_next = Stream._next
        monkeypatch.setattr(Stream, "_next", lambda stream, num_bytes: read_next(stream, min(num_bytes, 1024)))
        mount = Mount(tmp_path / "mnt")
        tar = write_tar(tmp_path / "mnt" / "x.tar", FILES)
        reader, rows = listed(tar)
        outcomes = reader.read(rows)
        images = [next(outcomes)]
        mount.leave()
        mount.come_back(0.5)
        *rest, told = outcomes
        assert [image.data for image in images + rest] == list(FILES.values())
        assert isinstance(told, TarMembers)

    def test_an_image_that_is_gone_is_missing_not_surely(self, photos, alone):
        reader, rows = listed(photos.path)
        os.unlink(rows[3]["uri"])
        images, _ = read(reader, rows)
        assert [name for name, content in images.items() if content == "missing"] == [rows[3]["uri"]]
        (failed,) = reader.read(rows[3:4])
        assert not failed.error.certain
        assert os.path.exists(failed.row["witness"]), "whoever looks again has to open it too"
        photos.leave()
        alone.__init__()
        reader = replace(reader, inputs=(replace(reader.inputs[0], known=Known()),), patience_seconds=0.2)
        with pytest.raises(TryAgain):
            list(reader.read([failed.row]))

    def test_a_folder_that_was_deleted_is_no_mount_that_is_away(self, photos):
        for name in ("a", "b"):
            (photos.path / name).mkdir()
            (photos.path / name / "x.jpg").write_bytes(b"1")
        reader, rows = listed(photos.path)
        read(reader, rows)
        shutil.rmtree(photos.path / "b")
        images, _ = read(reader, [row for row in rows if row["uri"].endswith("b/x.jpg")])
        assert list(images.values()) == ["missing"]

    def test_images_of_a_manifest_vouch_for_those_beside_them(self, tmp_path, photos, alone):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "list.txt").write_text("\n".join(str(photos.path / f"{i:02d}.jpg") for i in range(60)))
        reader, rows = listed(tmp_path / "other" / "list.txt")
        assert reader.inputs[0].known.files == (), "the manifest may be elsewhere than its images"
        alone.__init__()
        read(reader, rows[:1])
        photos.leave(empty=True)
        photos.come_back(0.5)
        assert "missing" not in read(reader, rows)[0].values()

    def test_a_file_without_witnesses_is_not_waited_for(self, tmp_path):
        (tmp_path / "list.txt").write_text("/nowhere/at/all.jpg")
        reader, rows = listed(tmp_path / "list.txt")
        (failed,) = reader.read(rows)
        assert (failed.error.kind, failed.error.certain, "witness" in failed.row) == ("missing", False, False)


class TestReadsThatDoNotReturn:
    def test_are_left_behind(self, tmp_path, monkeypatch):
        """As from a hard NFS mount whose server is gone: here a pipe that nobody writes to."""
        (tmp_path / "in").mkdir()
        for name in ("a", "b", "c"):
            (tmp_path / "in" / f"{name}.jpg").write_bytes(name.encode())
        reader, rows = listed(tmp_path / "in")
        os.mkfifo(pipe := tmp_path / "pipe")
        open_file = os.open

        def hanging(path, flags, *options, **others):
            return (
                open_file(pipe, os.O_RDONLY) if str(path).endswith("b.jpg") else open_file(path, flags, *options, **others)
            )

        monkeypatch.setattr(byte_reader.os, "open", hanging)
        monkeypatch.setattr(byte_reader, "READ_SECONDS", 0.3)
        monkeypatch.setattr(byte_reader, "_LAST_ATTEMPT_SECONDS", 0)
        images, _ = read(reader, rows)
        assert [images[row["uri"]] for row in rows] == [b"a", "unreadable_storage", b"c"]
        error = error_of(reader, rows[1])
        assert "no answer within 0.3 s" in error.message
        os.close(open_file(pipe, os.O_WRONLY))

    def test_a_mount_that_hangs_is_waited_for(self, tmp_path, monkeypatch):
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.jpg").write_bytes(b"a")
        reader, rows = listed(tmp_path / "in")
        open_file, back = os.open, threading.Event()

        def hanging(path, *options, **others):
            if str(path).startswith(f"{tmp_path}/in/"):
                back.wait()
            return open_file(path, *options, **others)

        monkeypatch.setattr(byte_reader.os, "open", hanging)
        monkeypatch.setattr(byte_reader, "READ_SECONDS", 0.2)
        monkeypatch.setattr(byte_reader, "_LAST_ATTEMPT_SECONDS", 0)
        monkeypatch.setattr(witnesses_module, "OPEN_SECONDS", 0.2)
        threading.Timer(1, back.set).start()
        assert read(reader, rows)[0] == {rows[0]["uri"]: b"a"}


class TestShortReads:
    def test_are_never_truncated_images(self, tmp_path, monkeypatch, configure):  # noqa: F811
        """A device that gives fewer bytes than the file has."""
        configure()
        (tmp_path / "a.jpg").write_bytes(b"1" * 1000)
        reader, rows = listed(tmp_path / "a.jpg")
        os.truncate(tmp_path / "a.jpg", 600)
        fstat, short = os.fstat, [2]

        def claims_more(handle):
            about = fstat(handle)
            if about.st_size != 600 or not short[0]:
                return about
            short[0] -= 1
            fields = list(about)
            fields[6] = 1000
            return os.stat_result(fields, {"st_mtime_ns": about.st_mtime_ns})

        monkeypatch.setattr(byte_reader.os, "fstat", claims_more)
        assert read(reader, rows)[0] == {rows[0]["uri"]: b"1" * 600}, "tried again"
        short[0] = 10**6
        error = error_of(reader, rows[0])
        assert (error.kind, error.certain) == ("unreadable_storage", True)
        assert "600 of 1000 bytes" in error.message


class TestObjectStores:
    @pytest.fixture
    def photos(self, put):  # noqa: F811
        """Sixteen objects, and what reads them by their URIs in a manifest or not."""
        uris = [put(f"in/{i:02d}.jpg", b"%d" % i) for i in range(16)]
        return listed(uris[0].rpartition("/")[0])

    def test_a_key_that_is_gone_is_missing_for_sure(self, photos):
        reader, rows = photos
        s3fs.S3FileSystem().rm_file(rows[2]["uri"])
        error = error_of(reader, rows[2])
        assert (error.kind, error.certain) == ("missing", True)

    def test_a_bucket_that_is_gone_is_no_image_s_fault(self, photos, put, tmp_path):  # noqa: F811
        reader, rows = photos
        with pytest.raises(StorageError, match="no such bucket"):
            list(reader.read([rows[0] | {"uri": "s3://capray-no-such-bucket/x.jpg"}]))
        reader, rows = listed(put("list.txt", f"{rows[0]['uri']}\ns3://capray-no-such-bucket/x.jpg".encode()))
        assert list(read(reader, rows)[0].values()) == [b"0", "unreadable_storage"], "of a list it is one row's"

    def test_an_archived_object(self, photos, proxy):  # noqa: F811
        reader, rows = photos
        proxy.only = "07.jpg"
        proxy.set_rates({"read.archived": 1})
        images, _ = read(reader, rows)
        assert [name for name, content in images.items() if content == "archived"] == [rows[7]["uri"]]
        assert error_of(reader, rows[7]).certain

    @pytest.mark.parametrize("fault", ["expired", "expired_403"])
    def test_credentials_that_expire(self, photos, proxy, fault):  # noqa: F811
        reader, rows = photos
        assert read(reader, rows)[0][rows[0]["uri"]] == b"0"
        before = s3fs.S3FileSystem.current()._s3
        proxy.set_rates({f"read.{fault}": 1})
        with pytest.raises(TryAgain, match="credentials have expired.*renew them and run the same command again"):
            read(reader, rows)
        assert s3fs.S3FileSystem.current()._s3 is not before, "a new session has read them again"
        proxy.set_rates({f"read.{fault}": 0.02})
        assert [*read(reader, rows)[0].values()] == [b"%d" % i for i in range(16)]

    def test_slow_down_on_half_the_keys(self, photos, proxy, configure):  # noqa: F811
        """Until the store has recovered nothing counts as failed; requests get fewer meanwhile."""
        configure(attempts=2)
        reader, rows = photos
        proxy.only = r"[02468]\.jpg"
        proxy.set_rates({"read.503": 1})
        notices = []
        reading = ThreadPoolExecutor(1).submit(read, replace(reader, concurrency=16), rows, (), notices.append)
        while proxy.injected["read.503"] < 40:
            time.sleep(0.05)
        proxy.set_rates({})
        images, _ = reading.result()
        assert list(images.values()) == [b"%d" % i for i in range(16)]
        assert notices and all("asks to slow down" in text for text in notices)
        assert byte_reader._throttle.limit < 16
        proxy.set_rates({"read.503": 1})
        images, _ = read(replace(reader, patience_seconds=0.5), rows)
        assert list(images.values()).count("unreadable_storage") == 8


class TestThrottle:
    def test_half_at_once_then_one_more_each_round(self, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        throttle = Throttle(16)
        for _ in range(16):
            throttle.__enter__()
        throttle.slow_down()
        throttle.slow_down()
        assert (throttle.limit, throttle.news(), throttle.news()) == (8, 8, None), "those were asked together"
        now[0] += 2
        throttle.slow_down()
        assert throttle.limit == 4
        for _ in range(16):
            throttle.__exit__(ValueError, ValueError(), None)
        for _ in range(4):
            with throttle:
                pass
        assert throttle.limit == 5

    def test_no_more_are_open_than_the_limit(self):
        throttle, most, lock = Throttle(4), [0, 0], threading.Lock()

        def work() -> None:
            with throttle:
                with lock:
                    most[0] += 1
                    most[1] = max(most)
                time.sleep(0.01)
                with lock:
                    most[0] -= 1

        threads = [threading.Thread(target=work) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == [0, 4]


def test_what_no_one_thought_of_is_a_container_s_fault(tmp_path, monkeypatch):
    reader, rows = listed(write_table(tmp_path / "x.parquet", ["0", "1"]))
    monkeypatch.setattr("capray.inputs.reader.opened_parquet", lambda stream: 1 / 0)
    assert set(read(reader, rows)[0].values()) == {"unreadable_storage"}


def test_an_unexpected_error_fails_one_image(tmp_path, monkeypatch):
    reader, rows = listed(str(Path(write_photos(tmp_path, 2)[0]).parent))
    monkeypatch.setattr("capray.inputs.reader.read_image", lambda *_: 1 / 0)
    assert set(read(reader, rows)[0].values()) == {"unreadable_storage"}
