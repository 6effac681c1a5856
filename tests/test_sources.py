"""Every kind of input is judged rightly and listed wholly: each image once, under its exact id."""

import csv
import errno
import gzip
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections import Counter
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from hypothesis import given, settings
from hypothesis import strategies as st

from capray.config import SourceSettings
from capray.errors import ConfigError, DataError, StorageError
from capray.inputs import open_sources
from capray.inputs.base import ContainerChanged, Selection, Source, rows_of
from capray.inputs.byte_reader import Stream
from capray.inputs.files import MAX_LEVELS
from capray.inputs.versions import entry_at, if_match
from capray.storage import locate, object_version, was_removed
from tests.conftest import write_tar

ODD = [
    "a b.jpg",
    "a#b.jpg",
    "a%2Fb.jpg",
    "new\nline.jpg",
    "\u00e4.jpg",
    "a\u0308.jpg",
    "\u732b.jpg",
    "q?[x]*.jpg",
    "a+b.jpg",
]


def opened(uri, keep=(), **options) -> Source:
    (source,) = open_sources((str(uri),), SourceSettings(**options), tuple(keep))
    return source


def listed(source: Source) -> list[dict]:
    """All wanted rows, every page taken up again behind itself on the way."""
    waiting = [(unit, None) for unit in source.units()]
    known = {unit for unit, _ in waiting}
    rows = []
    while waiting:
        unit, after = waiting.pop(0)
        page = next(iter(source.pages(unit, after)), None)
        if page is None:
            continue
        rows += source.selection.filter(page.rows).to_pylist()
        for name in page.found:
            if name not in known:
                known.add(name)
                waiting.append((name, None))
        if page.rows.num_rows or page.after != after:
            assert page.after is not None, "nothing says where to go on"
            waiting.append((unit, page.after))
    return rows


def some(rows: list[dict], *names: str) -> list[tuple]:
    return [tuple(row[name] for name in names) for row in rows]


def ids(uri, **options) -> list[str]:
    return [row["image_id"] for row in listed(opened(uri, **options))]


def hidden(source: Source) -> int:
    return sum(page.hidden for unit in source.units() for page in source.pages(unit))


def touch(folder: Path, *names: str) -> list[str]:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return [str(folder / name) for name in names]


def write_table(path: Path, columns: dict, **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def make_tar(path: Path, names: list[str]) -> str:
    return write_tar(path, dict.fromkeys(names, b"abc"))


class TestFolder:
    def test_nested_and_odd_names(self, tmp_path):
        paths = touch(tmp_path / "in", *ODD, "b/x.jpg", "b/c/d/e/y.png", "b/no suffix", *(f"b/{name}" for name in ODD))
        rows = listed(opened(tmp_path / "in"))
        assert sorted(row["image_id"] for row in rows) == sorted(paths)
        assert all(row["uri"] == row["image_id"] and row["size"] == 1 for row in rows)

    def test_hidden_files_are_left_out_and_counted(self, tmp_path):
        touch(tmp_path / "in", ".DS_Store", ".cache/a.jpg", "b/.hidden/c/d.jpg", "b/._e.jpg")
        shown = touch(tmp_path / "in", "b/f.jpg", "_g/h.jpg", "_i.jpg", "j.k.jpg")
        source = opened(tmp_path / "in")
        assert sorted(row["image_id"] for row in listed(source)) == sorted(shown)
        assert hidden(source) == 4

    def test_a_folder_whose_own_path_is_hidden(self, tmp_path):
        paths = touch(tmp_path / ".hidden" / "_in", "a.jpg")
        assert ids(tmp_path / ".hidden" / "_in") == paths

    def test_links(self, tmp_path):
        touch(tmp_path / "in", "a.jpg")
        touch(tmp_path / "other", "b.jpg")
        (tmp_path / "in" / "linked.jpg").symlink_to(tmp_path / "other" / "b.jpg")
        (tmp_path / "in" / "nowhere.jpg").symlink_to(tmp_path / "gone.jpg")
        (tmp_path / "in" / "folder").symlink_to(tmp_path / "other")
        (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
        os.mkfifo(tmp_path / "in" / "pipe.jpg")
        names = ["a.jpg", "linked.jpg", "nowhere.jpg", "folder/b.jpg"]
        assert ids(tmp_path / "in") == [str(tmp_path / "in" / name) for name in names]

    def test_links_hide_nothing(self, tmp_path):
        paths = touch(tmp_path / "in", "photos/a.jpg", "zoo/b.jpg")
        for name in (".latest", "a-latest"):
            (tmp_path / "in" / name).symlink_to("photos")
        touch(tmp_path / "other", "c.jpg")
        for name in (".other", "other"):
            (tmp_path / "in" / name).symlink_to(tmp_path / "other")
        touch(tmp_path / "in", ".store/d.jpg")
        (tmp_path / "in" / "data").symlink_to(".store")
        added = [str(tmp_path / "in" / name) for name in ("data/d.jpg", "other/c.jpg")]
        assert sorted(ids(tmp_path / "in")) == sorted([*paths, *added])
        assert sorted(ids(tmp_path / "in", exclude=("a-latest/*",))) == sorted([*paths, *added])

    def test_what_a_link_leads_to_is_listed_under_a_name_that_is_wanted(self, tmp_path):
        folder = tmp_path / "in"
        x, deep, tops = touch(folder, "x/x.jpg", "raw/deep/a.jpg", "raw/b.jpg")
        touch(tmp_path / "real", "c.jpg", "sub/d.jpg")
        (tmp_path / "real" / "loop").symlink_to(tmp_path / "real")
        (tmp_path / "real" / "sub" / "up").symlink_to(tmp_path / "real")
        for name in ("l", "m"):
            (folder / name).symlink_to(tmp_path / "real")
        (folder / "pick").symlink_to("raw/deep")
        (folder / "raw" / "up").symlink_to(folder)
        in_l, in_m, picked = (
            [f"{folder}/{name}" for name in names]
            for names in (("l/c.jpg", "l/sub/d.jpg"), ("m/c.jpg", "m/sub/d.jpg"), ("pick/a.jpg",))
        )
        assert sorted(ids(folder)) == sorted([x, deep, tops, *in_l])
        for glob in ("l", "l/*", "l/"):
            assert sorted(ids(folder, exclude=(glob,))) == sorted([x, deep, tops, *in_m])
        assert sorted(ids(folder, exclude=("raw",))) == sorted([x, *picked, *in_l])
        assert sorted(ids(folder, exclude=("raw/deep/*", "m"))) == sorted([x, tops, *picked, *in_l])
        assert sorted(ids(folder, include=("pick/*", "m/s*", "x/x.jpg"))) == sorted([x, *picked, in_m[1]])
        assert ids(folder, include=("*/deep/*",)) == [deep]

    def test_tars_behind_a_link_beside_one_that_is_excluded(self, tmp_path):
        tar = make_tar(tmp_path / "in" / "x.tar", ["a.jpg"])
        make_tar(tmp_path / "real" / "y.tar", ["a.jpg"])
        for name in ("l", "m"):
            (tmp_path / "in" / name).symlink_to(tmp_path / "real")
        for source in (tmp_path / "in", tmp_path / "in" / "**" / "*.tar"):
            assert sorted(ids(source, exclude=("l",))) == [f"{tmp_path}/in/m/y.tar", tar]

    def test_folders_of_one_inode_number_are_two_where_no_link_led(self, tmp_path, monkeypatch):
        paths = touch(tmp_path / "in", "a/a.jpg", "b/b.jpg")
        stat = os.stat

        def alike(path, **options):
            about = stat(path, **options)
            return os.stat_result([about[0], 7, *about[2:10]]) if str(path).endswith(("/a", "/b")) else about

        monkeypatch.setattr("capray.storage.os.stat", alike)
        assert ids(tmp_path / "in") == paths

    def test_a_folder_that_cannot_be_listed_is_a_unit_of_its_own(self, tmp_path, monkeypatch):
        paths = touch(tmp_path / "in", "a/b.jpg", "lost+found/c.jpg", "z.jpg")
        denied, scandir = str(tmp_path / "in" / "lost+found"), os.scandir

        def refusing(path):
            if path == denied:
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return scandir(path)

        monkeypatch.setattr("os.scandir", refusing)
        source = opened(tmp_path / "in")
        pages = list(source.pages(*source.units()))
        assert sorted(uri for page in pages for uri in page.rows["uri"].to_pylist()) == [paths[0], paths[2]]
        ((unit,),) = [page.found for page in pages if page.found]
        with pytest.raises(StorageError, match="permission denied"):
            list(source.pages(unit))
        excluding = opened(tmp_path / "in", exclude=("lost+found/*",))
        assert not any(page.found for page in excluding.pages(*excluding.units()))
        shutil.rmtree(denied)
        assert list(source.pages(unit)) == [], "it is gone"

    def test_a_folder_too_deep_for_a_path_is_a_fault(self, tmp_path, monkeypatch):
        """The system takes paths of 4,095 bytes."""
        paths = touch(tmp_path / "in", "a.jpg", "z.jpg")
        monkeypatch.chdir(tmp_path / "in")
        for _ in range(21):
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
        Path("deep.jpg").write_bytes(b"x")
        source = opened(tmp_path / "in")
        pages = list(source.pages(*source.units()))
        assert sorted(uri for page in pages for uri in page.rows["uri"].to_pylist()) == paths
        ((unit,),) = [page.found for page in pages if page.found]
        with pytest.raises(StorageError, match="File name too long"):
            list(source.pages(unit))

    def test_a_mount_that_is_away_is_not_removed(self, tmp_path):
        (tmp_path / "in" / "disk").mkdir(parents=True)
        touch(tmp_path / "in", "a.jpg")
        assert was_removed(f"{tmp_path}/in/b/c", f"{tmp_path}/in")
        assert not was_removed(f"{tmp_path}/in/disk/c/d", f"{tmp_path}/in"), "the mountpoint is empty"

    def test_a_name_that_is_not_utf8(self, tmp_path):
        folder = os.fsencode(tmp_path / "in")
        os.mkdir(folder)
        with open(os.path.join(folder, b"caf\xe9.jpg"), "wb") as file:
            file.write(b"x")
        assert ids(tmp_path / "in") == [f"{tmp_path}/in/caf\\xe9.jpg"]

    def test_one_file(self, tmp_path):
        (path,) = touch(tmp_path, "q[x]*.jpg")
        assert ids(path) == [path]

    @pytest.mark.parametrize("page", [1, 2, 3, 1000])
    def test_pages_go_on_behind_the_last_even_when_it_is_gone(self, tmp_path, monkeypatch, page):
        monkeypatch.setattr("capray.inputs.files.ROWS_PER_PAGE", page)
        names = ["a.jpg", "z.jpg", "b/a.jpg", "b/z.jpg", "b/c/a.jpg", "b-c/x.jpg", "b.c/x.jpg", "c/a.jpg"]
        paths = touch(tmp_path / "in", *names, *(f"{name}/{odd}" for name in ("d", "d!") for odd in ODD))
        source = opened(tmp_path / "in")
        (unit,) = source.units()
        whole = [row["image_id"] for page in source.pages(unit) for row in page.rows.to_pylist()]
        assert sorted(whole) == sorted(paths)
        assert [row["image_id"] for row in listed(source)] == whole
        first = next(iter(source.pages(unit)))
        os.unlink(first.rows["image_id"][-1].as_py())
        after = json.loads(json.dumps(first.after))
        rest = [row["image_id"] for page in source.pages(unit, after) for row in page.rows.to_pylist()]
        assert rest == whole[first.rows.num_rows :]

    @pytest.mark.parametrize("make", [False, True])
    def test_nothing_there(self, tmp_path, make):
        if make:
            (tmp_path / "in").mkdir()
        with pytest.raises(ConfigError, match="empty|nothing at"):
            opened(tmp_path / "in")

    @pytest.mark.parametrize("option", [{"split": "test"}, {"id_column": "a"}, {"uri_column": "u"}, {"image_column": "i"}])
    def test_settings_of_tables_mean_nothing(self, tmp_path, option):
        touch(tmp_path / "in", "a.jpg")
        with pytest.raises(ConfigError, match="does not apply"):
            opened(tmp_path / "in", **option)
        with pytest.raises(ConfigError, match="keep"):
            opened(tmp_path / "in", keep=["a"])


class TestPrefix:
    @pytest.fixture(scope="class")
    def prefix(self, s3, tmp_path_factory):
        """Objects on several levels, more than MAX_LEVELS, and a sibling whose name goes on."""
        root = f"{s3}/{tmp_path_factory.mktemp('prefix').name}"
        fs = s3fs.S3FileSystem()
        names = [f"{'/'.join('abcde'[:depth])}/{i:02d}.jpg".lstrip("/") for depth in range(6) for i in range(7)]
        names += [f"p{i}/q{j}/{k}.jpg" for i in range(3) for j in range(3) for k in range(3)]
        names += ["a b/c#d/%2F.jpg", "\u00e4/\u732b.jpg", "a+b/x.jpg", "a!/x.jpg", "a-/x.jpg", "a0/x.jpg"]
        for name in [*names, ".hidden/x.jpg", "a/.x.jpg"]:
            fs.pipe_file(f"{root}/in/{name}", b"x")
        fs.pipe_file(f"{root}/input/other.jpg", b"x")
        fs.pipe_file(f"{root}/in/empty.jpg", b"")
        fs.call_s3("put_object", Bucket=root.split("/")[2], Key=f"{root.split('/', 3)[3]}/in/folder/", Body=b"")
        return f"{root}/in", [f"{root}/in/{name}" for name in [*names, "empty.jpg"]]

    @pytest.mark.parametrize("slash", ["", "/"])
    def test_each_key_once(self, prefix, slash):
        root, uris = prefix
        source = opened(root + slash)
        rows = listed(source)
        assert Counter(row["image_id"] for row in rows) == Counter(uris)
        assert {row["size"] for row in rows if "empty" not in row["uri"]} == {1}

    def test_pages_go_on_behind_the_last_key(self, prefix, monkeypatch):
        root, uris = prefix
        source = opened(root)
        call = source.place.fs.call_s3
        calls = []

        def small_pages(method, **arguments):
            calls.append(arguments)
            return call(method, **arguments, MaxKeys=3)

        monkeypatch.setattr(source.place.fs, "call_s3", small_pages)
        assert Counter(row["image_id"] for row in listed(source)) == Counter(uris)
        assert any("StartAfter" in arguments for arguments in calls)
        deep = [arguments for arguments in calls if "Delimiter" not in arguments]
        assert all(arguments["Prefix"].removeprefix(root.split("/", 3)[3]).count("/") > MAX_LEVELS for arguments in deep)

    def test_many_keys(self, s3, tmp_path):
        from concurrent.futures import ThreadPoolExecutor

        fs = s3fs.S3FileSystem()
        names = [f"{i % 2}/{i:05d}.jpg" for i in range(2300)]
        uris = [f"{s3}/{tmp_path.name}/{name}" for name in names]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda uri: fs.pipe_file(uri, b"x"), uris))
        assert Counter(ids(f"{s3}/{tmp_path.name}")) == Counter(uris)

    def test_one_object(self, prefix):
        assert ids(prefix[1][0]) == prefix[1][:1]

    def test_an_empty_prefix(self, s3):
        with pytest.raises(ConfigError, match="no images at"):
            opened(f"{s3}/nothing-here")

    def test_no_such_bucket(self, s3):
        with pytest.raises(StorageError):
            opened("s3://capray-no-such-bucket/x")


class TestParquet:
    def test_images_in_several_files(self, tmp_path):
        for f in range(2):
            columns = {"image_id": [f"{f}-{i}" for i in range(5)], "image": [b"x"] * 5}
            write_table(tmp_path / "in" / f"part-{f}.parquet", columns, row_group_size=2)
        write_table(tmp_path / "in" / "_private" / "x.parquet", {"a": [1]})
        touch(tmp_path / "in", "README.md", "info.json", "_dataset.json")
        source = opened(tmp_path / "in")
        assert hidden(source) == 1, "a table might be missed, other files are not"
        assert (source.kind, source.image_column, source.source_type) == ("parquet", "image", None)
        rows = listed(source)
        assert sorted(
            (row["image_id"], os.path.basename(row["container"]), row["row_group"], row["row"]) for row in rows
        ) == [(f"{f}-{i}", f"part-{f}.parquet", i // 2, i % 2) for f in range(2) for i in range(5)]

    def test_uris(self, tmp_path):
        path = write_table(tmp_path / "x.parquet", {"url": ["/a", None], "image_id": ["1", "2"], "path": ["/p", "/q"]})
        source = opened(path)
        assert source.image_column is None
        assert some(listed(source), "kind", "image_id", "uri") == [("object", "1", "/a"), ("object", "2", None)]
        assert ids(path, id_column="path") == ["/p", "/q"]
        assert [row["uri"] for row in listed(opened(path, uri_column="path"))] == ["/p", "/q"]

    @pytest.mark.parametrize(
        ("first", "later"), [(pa.date32(), pa.timestamp("us")), (pa.timestamp("s"), pa.timestamp("us", "UTC"))]
    )
    def test_a_time_to_keep_is_not_cut_to_the_first_files_type(self, tmp_path, first, later):
        times = [datetime(2026, 1, 2), datetime(2026, 1, 2, 3, 4, 5, 678901)]
        for name, time, kind in zip("ab", times, (first, later), strict=True):
            write_table(tmp_path / f"{name}.parquet", {"uri": [name], "taken": pa.array([time]).cast(kind)})
        with pytest.raises(DataError, match=r"b\.parquet.*(column 'taken' holds timestamp|lose data)"):
            listed(opened(tmp_path, ["taken"]))
        write_table(tmp_path / "b.parquet", {"uri": ["b"], "taken": pa.array(times[:1]).cast(later)})
        assert {row["source"]["taken"].day for row in listed(opened(tmp_path, ["taken"]))} == {2}

    def test_chosen_columns_split_and_keep(self, tmp_path):
        columns = {
            "n": [3, 4, 5, 6],
            "jpg": pa.array([b"x"] * 4, pa.large_binary()),
            "uri": list("abcd"),
            "split": ["train", "test", None, "test"],
            "tags": [["t"], None, [], ["u", "v"]],
        }
        path = write_table(tmp_path / "x.parquet", columns, row_group_size=3)
        source = opened(path, ["tags", "n"], id_column="n", image_column="jpg", split="test")
        assert source.source_type == pa.struct([("tags", pa.list_(pa.field("element", pa.string()))), ("n", pa.int64())])
        assert some(listed(source), "kind", "image_id", "row_group", "row", "source") == [
            ("row", "4", 0, 1, {"tags": None, "n": 4}),
            ("row", "6", 1, 0, {"tags": ["u", "v"], "n": 6}),
        ]

    def test_columns_that_cannot_be_kept(self, tmp_path):
        ids, extension = pa.array(["a"]), pa.array(["{}"]).cast(pa.json_())
        nested = pa.array([["x"]], pa.list_(pa.string_view()))
        path = write_table(tmp_path / "x.parquet", {"uri": ids, "json": extension, "nested": nested})
        assert opened(path, ["json", "json"]).source_type == pa.struct([("json", pa.string())])
        with pytest.raises(ConfigError, match="column 'nested' .* cannot be kept"):
            opened(path, ["nested"])
        twice = pa.Table.from_arrays([ids, ids, ids], ["uri", "note", "note"])
        pq.write_table(twice, path)
        assert opened(path)
        with pytest.raises(DataError, match="several columns 'note'"):
            opened(path, ["note"])

    def test_views_are_kept_as_what_they_show(self, tmp_path):
        names, photos = ["a", "b"], [b"x", b"y"]
        columns = {
            "image_id": pa.array(names, pa.string_view()),
            "image": pa.array(photos, pa.binary_view()),
            "note": pa.array(names, pa.string_view()),
        }
        source = opened(write_table(tmp_path / "x.parquet", columns), ["note"])
        assert source.source_type == pa.struct([("note", pa.string())])
        assert some(listed(source), "image_id", "source") == [("a", {"note": "a"}), ("b", {"note": "b"})]

    @pytest.mark.parametrize(
        ("columns", "options", "message"),
        [
            ({"a": [1]}, {}, "no column of images or URIs"),
            ({"image": ["text"], "image_id": ["1"]}, {}, "not encoded image bytes"),
            ({"image": [b"x"]}, {}, "needs a column of image ids"),
            ({"uri": ["a"]}, {"split": "test"}, "no column 'split'"),
            ({"uri": ["a"]}, {"id_column": "b"}, "no column 'b'"),
            ({"uri": ["a"]}, {"uri_column": "b"}, "no column 'b'"),
            ({"uri": ["a"]}, {"image_column": "b"}, "no column 'b'"),
        ],
    )
    def test_columns_that_do_not_fit(self, tmp_path, columns, options, message):
        path = write_table(tmp_path / "x.parquet", columns)
        with pytest.raises(ConfigError, match=message):
            opened(path, **options)
        with pytest.raises(ConfigError, match="no column 'zz'"):
            opened(write_table(tmp_path / "y.parquet", {"uri": ["a"]}), ["zz"])

    def test_a_table_behind_many_private_files_is_still_one(self, tmp_path, monkeypatch):
        monkeypatch.setattr("capray.inputs._SAMPLE", 2)
        (tmp_path / "in" / "_features").mkdir(parents=True)
        for i in range(5):
            (tmp_path / "in" / "_features" / f"{i}.arrow").write_bytes(b"x")
        write_table(tmp_path / "in" / "samples" / "x.parquet", {"image_id": ["1"], "image": [b"x"]})
        assert opened(tmp_path / "in").kind == "parquet"

    def test_null_ids_other_columns_and_what_is_no_parquet(self, tmp_path):
        write_table(tmp_path / "in" / "0.parquet", {"uri": ["a", None]})
        write_table(tmp_path / "in" / "1.parquet", {"path": ["a"]})
        touch(tmp_path / "in", "2.parquet")
        source = opened(tmp_path / "in")
        for unit, message in zip(source.units(), ["without an image id", "has no column 'uri'", "2.parquet"], strict=True):
            with pytest.raises(DataError, match=message):
                list(source.pages(unit))
        with pytest.raises(DataError, match=r"2\.parquet"):
            opened(tmp_path / "in" / "2.parquet")

    def test_a_glob(self, tmp_path):
        paths = [write_table(tmp_path / "data" / f"train_{i}_.parquet", {"uri": [f"/{i}"]}) for i in range(3)]
        write_table(tmp_path / "data" / "_x.parquet", {"uri": ["/x"]})
        touch(tmp_path / "data", "other.jpg")
        source = opened(tmp_path / "data" / "*.parquet")
        assert source.units() == paths
        assert ids(tmp_path / "*" / "train_[01]_.parquet") == ["/0", "/1"]
        assert ids(paths[2]) == ["/2"]

    def test_types_that_differ_between_inputs(self, tmp_path):
        one = write_table(tmp_path / "1.parquet", {"uri": ["a"], "n": [1]})
        other = write_table(tmp_path / "2.parquet", {"uri": ["a"], "n": ["1"]})
        with pytest.raises(ConfigError, match="two outputs"):
            open_sources((one, other), SourceSettings(), ("n",))

    def test_on_s3(self, s3, tmp_path):
        path = write_table(tmp_path / "x.parquet", {"image_id": ["1"], "image": [b"x"]})
        fs = s3fs.S3FileSystem()
        for name in ("train_1.parquet", "b/train_2.parquet"):
            fs.put_file(path, f"{s3}/{tmp_path.name}/{name}")
        for uri, count in (("", 2), ("/*.parquet", 1), ("/train_1.parquet", 1)):
            rows = listed(opened(f"{s3}/{tmp_path.name}{uri}"))
            assert len(rows) == count
            assert all(row["container"].startswith(f"{s3}/{tmp_path.name}/") for row in rows)


class TestManifests:
    ROWS = (("1", "/abs/a.jpg", "x"), ("2", "s3://b/k#%20.jpg", 'say "hi", you'), ("3", "rel/\u00e4.jpg", "new\nline"))

    def content(self, ending: str) -> bytes:
        if ending == "jsonl":
            lines = [json.dumps({"image_id": a, "uri": b, "note": c}) for a, b, c in self.ROWS]
            return "\n\n".join(lines).encode()
        text = io.StringIO()
        writer = csv.writer(text, delimiter="\t" if ending == "tsv" else ",")
        writer.writerows([("note", "image_id", "uri"), *((c, a, b) for a, b, c in self.ROWS)])
        return text.getvalue().encode()

    @pytest.mark.parametrize("packed", ["", ".gz"])
    @pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
    def test_tables_of_text(self, tmp_path, ending, packed):
        content = self.content(ending)
        path = tmp_path / f"list.{ending}{packed}"
        path.write_bytes(gzip.compress(content) if packed else content)
        source = opened(path, ["note"])
        uris = ["/abs/a.jpg", "s3://b/k#%20.jpg", f"{tmp_path}/rel/\u00e4.jpg"]
        assert source.kind == "manifest"
        assert some(listed(source), "kind", "image_id", "uri", "source", "container") == [
            ("object", a, uri, {"note": c}, str(path)) for (a, _, c), uri in zip(self.ROWS, uris, strict=True)
        ]
        assert ids(path, id_column="note") == [c for *_, c in self.ROWS]
        assert ids(path, id_column="uri") == [b for _, b, _ in self.ROWS]

    @pytest.mark.parametrize("packed", ["", ".gz"])
    def test_text(self, tmp_path, packed):
        content = "a b.jpg\r\n\n/abs/a,b.jpg\ns3://b/\u00e4.jpg".encode()
        path = tmp_path / f"list.txt{packed}"
        path.write_bytes(gzip.compress(content) if packed else content)
        assert some(listed(opened(path)), "image_id", "uri") == [
            ("a b.jpg", f"{tmp_path}/a b.jpg"),
            ("/abs/a,b.jpg", "/abs/a,b.jpg"),
            ("s3://b/\u00e4.jpg", "s3://b/\u00e4.jpg"),
        ]
        for option in ({"id_column": "a"}, {"uri_column": "a"}, {"split": "a"}, {"image_column": "a"}):
            with pytest.raises(ConfigError, match="does not apply"):
                opened(path, **option)

    @pytest.mark.parametrize("rows", [1, 3, 10])
    @pytest.mark.parametrize("ending", ["jsonl", "txt"])
    def test_pages_go_on_behind_the_last(self, tmp_path, monkeypatch, rows, ending):
        monkeypatch.setattr("capray.inputs.parquet.ROWS_PER_PAGE", rows)
        names = [f"/{i}.jpg" for i in range(10)]
        lines = [json.dumps({"uri": name}) if ending == "jsonl" else name for name in names]
        (tmp_path / f"x.{ending}").write_text("\n".join(lines))
        assert ids(tmp_path / f"x.{ending}") == names

    def test_values_are_not_interpreted(self, tmp_path):
        (tmp_path / "x.csv").write_text("uri,image_id,n\n/a,007,NA\n/b,1e5,\n/c,true,null\n")
        rows = listed(opened(tmp_path / "x.csv", ["n"]))
        assert [(row["image_id"], row["source"]["n"]) for row in rows] == [("007", "NA"), ("1e5", None), ("true", "null")]

    def test_json_values_that_are_not_text(self, tmp_path):
        (tmp_path / "x.jsonl").write_text(
            '{"uri": "/a", "image_id": 7, "n": {"k": [1, null]}}\n{"uri": "/b", "image_id": 8}'
        )
        rows = listed(opened(tmp_path / "x.jsonl", ["n"]))
        assert [(row["image_id"], row["source"]["n"]) for row in rows] == [("7", '{"k": [1, null]}'), ("8", None)]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("x.csv", b"uri,image_id\n/a,\n", "without a value"),
            ("x.tsv", b'uri\tnote\n/a\t"Stop\n/b\tx\n/c\tgo"\n', "lines 2 to 4: a quoted value spans what could be rows"),
            ("x.csv", b'uri,note\n/a,"unclosed\n/b,x\n', "unexpected end of data"),
            ("x.csv", b"uri,image_id\n/a\n", "x.csv"),
            ("x.csv", b"", "is empty"),
            ("x.csv", b"uri\n\xff\xfe\n", "x.csv"),
            ("x.jsonl", b'{"uri": null}', "without a value"),
            ("x.jsonl", b"nonsense", "not JSON"),
            ("x.jsonl", b'["uri"]', "not a JSON object"),
            ("x.jsonl", b'{"uri": "\\ud800"}', "x.jsonl"),
            ("x.txt", b"/a\n\xff\n", "not UTF-8"),
            ("x.txt.gz", b"no gzip", "x.txt.gz"),
            ("x.csv.gz", gzip.compress(b"uri\n" + os.urandom(50_000).hex().encode())[:30_000], "x.csv.gz"),
        ],
    )
    def test_damage(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            listed(opened(tmp_path / name))

    @pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.txt", "x.parquet"])
    def test_http_is_refused(self, tmp_path, name):
        url = "https://example.org/a.jpg"
        buffer = io.BytesIO()
        pq.write_table(pa.table({"url": ["/a.jpg", url]}), buffer)
        contents = {"x.csv": f"uri\n{url}", "x.jsonl": json.dumps({"uri": url}), "x.txt": url}
        (tmp_path / name).write_bytes(contents[name].encode() if name in contents else buffer.getvalue())
        with pytest.raises(ConfigError, match="img2dataset"):
            listed(opened(tmp_path / name))
        with pytest.raises(ConfigError, match="img2dataset"):
            opened(url)

    def test_columns_that_are_not_there(self, tmp_path):
        (tmp_path / "x.csv").write_text("a,b\n1,2\n")
        for keep, options in (
            ([], {}),
            ([], {"uri_column": "c"}),
            ([], {"uri_column": "a", "id_column": "c"}),
            (["c"], {"uri_column": "a"}),
        ):
            with pytest.raises(ConfigError, match="no column"):
                listed(opened(tmp_path / "x.csv", keep, **options))

    def test_on_s3(self, s3, tmp_path):
        s3fs.S3FileSystem().pipe_file(f"{s3}/{tmp_path.name}/lists/x.txt", b"a/b.jpg\ns3://other/c.jpg")
        uris = [row["uri"] for row in listed(opened(f"{s3}/{tmp_path.name}/lists/x.txt"))]
        assert uris == [f"{s3}/{tmp_path.name}/lists/a/b.jpg", "s3://other/c.jpg"]


class TestInventory:
    KEYS = ("p/a b.jpg", "p/a+b%2F.jpg", "p/\u00e4,\u732b.jpg", 'p/"q".jpg')

    def make(self, s3, tmp_path, data: list[bytes], names: list[str], form: str, schema: str) -> str:
        fs = s3fs.S3FileSystem()
        bucket = s3.removeprefix("s3://")
        for name, content in zip(names, data, strict=True):
            fs.pipe_file(f"{bucket}/{tmp_path.name}/data/{name}", content)
        manifest = {
            "sourceBucket": "photos",
            "destinationBucket": f"arn:aws:s3:::{bucket}",
            "version": "2016-11-30",
            "fileFormat": form,
            "fileSchema": schema,
            "files": [{"key": f"{tmp_path.name}/data/{name}", "size": 1, "MD5checksum": ""} for name in names],
        }
        uri = f"{s3}/{tmp_path.name}/2026-01-01T00-00Z/manifest.json"
        fs.pipe_file(uri, json.dumps(manifest).encode())
        return uri

    @pytest.mark.parametrize("versions", [False, True])
    def test_csv(self, s3, tmp_path, versions):
        from urllib.parse import quote_plus

        text = io.StringIO()
        writer = csv.writer(text, quoting=csv.QUOTE_ALL)
        for i, key in enumerate(self.KEYS):
            name = quote_plus(key, safe="/")
            if versions:
                writer.writerow(["photos", name, f"v{i}", "true", "false", 10 + i])
                writer.writerow(["photos", name, "old", "false", "false", 1])
                writer.writerow(["photos", f"gone-{i}", "v", "true", "true", ""])
            else:
                writer.writerow(["photos", name, 10 + i])
        writer.writerow(["photos", "p/", "v", "true", "false", 0] if versions else ["photos", "p/", 0])
        schema = "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size" if versions else "Bucket, Key, Size"
        data = gzip.compress(text.getvalue().encode())
        uri = self.make(s3, tmp_path, [data], ["1.csv.gz"], "CSV", schema)
        source = opened(uri)
        assert source.kind == "inventory"
        rows = listed(source)
        assert (
            [row["image_id"] for row in rows] == [row["uri"] for row in rows] == [f"s3://photos/{key}" for key in self.KEYS]
        )
        assert [row["size"] for row in rows] == [10, 11, 12, 13]
        assert ids(uri, include=["p/a*"]) == [f"s3://photos/{key}" for key in self.KEYS[:2]]

    def test_parquet_in_several_files(self, s3, tmp_path):
        data = []
        for key in self.KEYS:
            columns = {
                "bucket": ["photos"] * 3,
                "key": [key, key, f"{key}-gone"],
                "version_id": ["2", "1", "1"],
                "is_latest": [True, False, True],
                "is_delete_marker": [False, False, True],
                "size": [10, 9, None],
            }
            sink = io.BytesIO()
            pq.write_table(pa.table(columns), sink)
            data.append(sink.getvalue())
        names = [f"{i}.parquet" for i in range(len(data))]
        uri = self.make(s3, tmp_path, data, names, "Parquet", "message s3.inventory { }")
        assert ids(uri) == [f"s3://photos/{key}" for key in self.KEYS]

    def test_what_is_not_one(self, s3, tmp_path):
        with pytest.raises(ConfigError, match="ORC"):
            opened(self.make(s3, tmp_path, [], [], "ORC", "struct<>"))
        (tmp_path / "manifest.json").write_text("{}")
        with pytest.raises(DataError, match="not the manifest.json"):
            opened(tmp_path / "manifest.json")
        source = opened(self.make(s3, tmp_path, [b"no gzip"], ["x.csv.gz"], "CSV", "Bucket, Key"))
        with pytest.raises(DataError, match=r"x\.csv\.gz"):
            listed(source)


class TestTars:
    def sidecar(self, tar: str, **columns) -> None:
        write_table(Path(tar.removesuffix(".tar") + ".parquet"), columns)

    def test_without_sidecars_a_tar_is_a_row(self, tmp_path):
        tars = [make_tar(tmp_path / "in" / f"{i}.tar", ["a.jpg"]) for i in range(3)]
        touch(tmp_path / "in", "0_stats.json")
        source = opened(tmp_path / "in")
        assert source.kind == "tar"
        assert some(listed(source), "kind", "image_id", "container", "size") == [("tar", tar, tar, 10240) for tar in tars]
        assert ids(tmp_path / "in" / "*.tar") == tars
        assert ids(tars[1]) == tars[1:2]
        for keep, options in ((["caption"], {}), ([], {"id_column": "n"})):
            with pytest.raises(DataError, match="no Parquet sidecar"):
                opened(tmp_path / "in", keep, **options)

    def test_with_sidecars_its_members_are(self, tmp_path):
        for t in range(2):
            tar = make_tar(tmp_path / "in" / f"{t}.tar", ["000.json", "000.webp", "002.webp"])
            self.sidecar(
                tar,
                key=["000", "001", "002"],
                status=["success", "failed_to_download", "success"],
                caption=["x", None, "z"],
                n=[t * 10, t * 10 + 1, t * 10 + 2],
            )
        source = opened(tmp_path / "in", ["caption"])
        assert (source.kind, source.source_type) == ("tar", pa.struct([("caption", pa.string())]))
        rows = listed(source)
        names = [f"{tmp_path}/in/{t}.tar#{key}.webp" for t in range(2) for key in ("000", "002")]
        assert [row["image_id"] for row in rows] == [row["uri"] for row in rows] == names
        assert [row["member"] for row in rows] == ["000.webp", "002.webp"] * 2
        assert [row["source"]["caption"] for row in rows] == ["x", "z"] * 2
        assert ids(tmp_path / "in", id_column="n") == ["0", "2", "10", "12"]
        assert ids(tmp_path / "in", include=["*000*"]) == names[::2]
        assert ids(tmp_path / "in", exclude=["1.tar"]) == names[:2]

    def test_ids_of_a_sidecar_end_as_the_first_image_does(self, tmp_path, monkeypatch):
        """Only headers are read for it, though what lies before the image is large."""
        monkeypatch.setattr(Stream, "_next", _counting(Stream._next, asked := []))
        sizes = {"d/000.json": 3, "d/000.npy": 10**7, "d/000.orig.webp": 10**7, "d/001.jpg": 1}
        path = write_tar(tmp_path / "in" / "0.tar", {name: bytes(size) for name, size in sizes.items()})
        self.sidecar(path, key=["d/000", "d/001"])
        rows = listed(opened(tmp_path / "in"))
        names = ["d/000.orig.webp", "d/001.orig.webp"]
        assert some(rows, "kind", "member", "image_id") == [("name", name, f"{path}#{name}") for name in names]
        assert sum(asked) < 100_000

    def test_one_tar_and_a_glob_find_sidecars(self, tmp_path):
        tar = make_tar(tmp_path / "in" / "train_0.tar", ["0.jpg"])
        self.sidecar(tar, key=["0"])
        assert ids(tmp_path / "in" / "*") == [f"{tar}#0.jpg"]

    def test_sidecars_that_do_not_fit(self, tmp_path):
        tar = make_tar(tmp_path / "in" / "0.tar", ["0.jpg"])
        self.sidecar(tar, key=["0"], n=pa.array([None], pa.int64()))
        with pytest.raises(DataError, match="without an image id"):
            listed(opened(tmp_path / "in", id_column="n"))
        with pytest.raises(ConfigError, match="no column 'm'"):
            opened(tmp_path / "in", ["m"])
        (tmp_path / "in" / "0.parquet").write_bytes(b"no parquet")
        with pytest.raises(DataError, match=r"0\.parquet"):
            opened(tmp_path / "in")

    def test_excluded_by_their_own_names_only(self, tmp_path):
        tars = [make_tar(tmp_path / "in" / f"{i}.tar", ["a.jpg"]) for i in range(3)]
        assert ids(tmp_path / "in", exclude=["1.tar"]) == [tars[0], tars[2]]
        assert ids(tmp_path / "in", include=["*#a.jpg"]) == tars, "its members are not known yet"

    def test_excluded_containers_are_none_of_the_input(self, tmp_path):
        folder = tmp_path / "in"
        write_table(folder / "a.parquet", {"uri": ["/a.jpg"]})
        write_table(folder / "old" / "b.parquet", {"uri": ["/b.jpg"]})
        (folder / "c.parquet").write_bytes(b"no table")
        source = opened(folder, exclude=["c.*", "old"])
        assert [*source.versions()] == source.units() == [f"{folder}/a.parquet"]
        assert ids(folder, exclude=["c.*", "old"]) == ["/a.jpg"]
        assert ids(folder / "a.parquet", exclude=["*/in/*"]) == ["/a.jpg"], "what is named itself is asked for"

    @pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar.zst"])
    def test_compressed_ones_are_refused(self, tmp_path, name):
        touch(tmp_path / "in", name)
        for uri in (tmp_path / "in", tmp_path / "in" / name):
            with pytest.raises(ConfigError, match="compressed tar"):
                opened(uri)


class TestKinds:
    @pytest.mark.parametrize(
        ("names", "kind"),
        [
            (["a.jpg"], "images"),
            (["a.jpg", "a.txt", "a.csv"], "images"),
            (["a.txt"], "images"),
            (["a.csv", "a.txt"], "images"),
            (["a.csv", "b/c.JSONL.gz", ".d.jpg", "_SUCCESS"], "manifest"),
            (["a.csv", "_MG_0001.JPG"], "images"),
            (["a.tar", "a.json", "a.parquet", "a.txt"], "tar"),
            (["_x/a.jpg", "b/a.tar", "_delta_log/_last_checkpoint"], "tar"),
        ],
    )
    def test_are_judged_from_names(self, tmp_path, names, kind):
        touch(tmp_path / "in", *names)
        for name in names:
            if name.endswith(".parquet"):
                write_table(tmp_path / "in" / name, {"key": ["0"]})
        assert opened(tmp_path / "in").kind == kind

    @pytest.mark.parametrize("photo", ["_MG_0001.JPG", "x/_a.jpg"])
    def test_an_underscore_hides_no_images_from_tables_or_tars(self, tmp_path, photo):
        """Cameras write such names; what writes tables lays other files of such names beside them."""
        touch(tmp_path / "in", photo, "_SUCCESS", "_delta_log/_last_checkpoint")
        touch(tmp_path / "in", "_old.parquet", ".thumbs/a.webp", "_x/a.jpg")
        write_table(tmp_path / "in" / "t.parquet", {"uri": ["/a.jpg"]})
        with pytest.raises(ConfigError, match=f"holds parquet files .* other kinds .*{photo}"):
            opened(tmp_path / "in")
        source = opened(tmp_path / "in", exclude=(photo,))
        assert [row["image_id"] for row in listed(source)] == ["/a.jpg"]
        assert hidden(source) == 3, "the table and the images"

    @pytest.mark.parametrize(("name", "kind"), [("b.parquet", "parquet"), ("b.tar", "tar")])
    def test_tables_or_tars_among_other_files_have_to_be_named(self, tmp_path, name, kind):
        """Whatever is dropped into a folder of theirs makes no images of them."""
        touch(tmp_path / "in", "a.jpg", name)
        with pytest.raises(ConfigError, match=f"holds {kind} files .*{name}.* other kinds .*a.jpg.*--input-kind {kind}"):
            opened(tmp_path / "in")
        assert opened(tmp_path / "in", input_kind="images").kind == "images"
        assert opened(tmp_path / "in", exclude=(f"*{name}",)).kind == "images"
        assert opened(tmp_path / "in", include=("*.jpg",)).kind == "images"

    def test_case_of_an_ending_means_nothing(self, tmp_path):
        for name, content in {"LIST.CSV.GZ": b"uri\n/x.jpg", "LIST.TXT.Gz": b"/x.jpg"}.items():
            (tmp_path / name).write_bytes(gzip.compress(content))
            assert ids(tmp_path / name) == ["/x.jpg"]
        tar = make_tar(tmp_path / "in" / "X.TAR", ["0.jpg"])
        assert ids(tmp_path / "in") == [tar]
        write_table(tmp_path / "in" / "X.PARQUET", {"key": ["0"]})
        assert ids(tmp_path / "in") == [f"{tar}#0.jpg"]
        write_table(tmp_path / "tables" / "T.PARQUET", {"uri": ["/y.jpg"]})
        assert ids(tmp_path / "tables") == ["/y.jpg"]

    def test_hidden_lists_are_left_out_and_counted(self, tmp_path):
        (tmp_path / "in").mkdir()
        for name in ("a.csv", ".b.csv", "_c.CSV"):
            (tmp_path / "in" / name).write_text(f"uri\n/{name}.jpg")
        source = opened(tmp_path / "in", input_kind="manifest")
        assert [row["image_id"] for row in listed(source)] == ["/a.csv.jpg"]
        assert sum(page.hidden for unit in source.units() for page in source.pages(unit)) == 2

    def test_may_be_forced(self, tmp_path):
        touch(tmp_path / "in", "a.jpg", "b.txt")
        (tmp_path / "in" / "b.txt").write_text("/x.jpg")
        tar = make_tar(tmp_path / "in" / "c.tar", ["x.jpg"])
        write_table(tmp_path / "in" / "d.parquet", {"uri": ["/y.jpg"]})
        assert ids(tmp_path / "in", input_kind="manifest") == ["/x.jpg"]
        assert ids(tmp_path / "in", input_kind="tar") == [tar]
        assert ids(tmp_path / "in", input_kind="parquet") == ["/y.jpg"]
        assert ids(tmp_path / "in" / "c.tar", input_kind="images") == [tar]
        with pytest.raises(DataError, match="not the manifest"):
            opened(tmp_path / "in" / "b.txt", input_kind="inventory")
        touch(tmp_path / "photos", "a.jpg")
        for kind in ("manifest", "tar", "parquet"):
            with pytest.raises(ConfigError, match="no files ending in"):
                opened(tmp_path / "photos", input_kind=kind)

    def test_versions_of_any_etag_keep_apart(self):
        """GCS's are base64; versions are joined by "+"."""
        version = object_version('"a+b/c=="', 7)
        assert "+" not in version and if_match(version) == {"IfMatch": '"a+b/c=="'}

    def test_a_glob_of_images_is_refused(self, tmp_path):
        touch(tmp_path / "in", "a.jpg")
        with pytest.raises(ConfigError, match="include"):
            opened(tmp_path / "in" / "*.jpg")
        with pytest.raises(ConfigError, match="no file matches"):
            opened(tmp_path / "in" / "*.png")


class TestSelection:
    @pytest.fixture
    def folder(self, tmp_path):
        touch(tmp_path / "in", "a.jpg", "b.png", "sub/a.jpg", "sub/c.JPG", "sub/[x].jpg", "new\nline.jpg")
        return tmp_path / "in"

    @pytest.mark.parametrize(
        ("options", "names"),
        [
            ({"include": ["*.jpg"]}, ["a.jpg", "new\nline.jpg", "sub/[x].jpg", "sub/a.jpg"]),
            ({"include": ["sub/*"]}, ["sub/[x].jpg", "sub/a.jpg", "sub/c.JPG"]),
            ({"include": ["a.*", "b.*"]}, ["a.jpg", "b.png"]),
            ({"exclude": ["*a.jpg", "*.JPG"]}, ["b.png", "new\nline.jpg", "sub/[x].jpg"]),
            ({"exclude": ["sub"]}, ["a.jpg", "b.png", "new\nline.jpg"]),
            ({"exclude": ["s*b/", "a"]}, ["a.jpg", "b.png", "new\nline.jpg"]),
            ({"include": ["sub/*"], "exclude": ["*/[[]x*"]}, ["sub/a.jpg", "sub/c.JPG"]),
            ({"include": ["in/*"]}, []),
        ],
    )
    def test_globs(self, folder, options, names):
        assert sorted(ids(folder, **options)) == [f"{folder}/{name}" for name in names]

    @settings(max_examples=25, deadline=None)
    @given(st.sets(st.text(min_size=1, max_size=8), max_size=40), st.integers(1, 9))
    def test_shards_are_a_partition(self, names, parts):
        rows = rows_of("object", {"image_id": sorted(names)})
        shards = [
            Selection.of(SourceSettings(shard=f"{part}/{parts}"), "/in").filter(rows)["image_id"].to_pylist()
            for part in range(1, parts + 1)
        ]
        assert sorted(name for shard in shards for name in shard) == sorted(names)

    def test_shards_of_a_folder_and_of_tars(self, folder):
        whole = ids(folder)
        assert sorted(name for i in (1, 2, 3) for name in ids(folder, shard=f"{i}/3")) == sorted(whole)
        with tempfile.TemporaryDirectory() as other:
            tars = [make_tar(Path(other, f"{i}.tar"), ["0.jpg", "1.jpg"]) for i in range(8)]
            without = [ids(other, shard=f"{i}/3") for i in (1, 2, 3)]
            assert sorted(name for part in without for name in part) == tars
            for tar in tars:
                write_table(Path(tar.removesuffix(".tar") + ".parquet"), {"key": ["0", "1"]})
            members = [{name.split("#")[0] for name in ids(other, shard=f"{i}/3")} for i in (1, 2, 3)]
            assert [sorted(part) for part in members] == without, "a tar is never shared out"


class TestVersions:
    """What changes between opening, listing and reading is noticed: rows carry the version their container was read in."""

    ROWS = 40

    def containers(self, folder: Path) -> dict[str, list[str]]:
        """An input of each kind that lists images in files: where it is, and the files of its unit."""
        names = [f"/{i}.jpg" for i in range(self.ROWS)]
        images = {"image_id": names, "image": [b"x"] * self.ROWS}
        table = write_table(folder / "images" / "x.parquet", images, row_group_size=10)
        uris = write_table(folder / "uris" / "x.parquet", {"uri": names}, row_group_size=10)
        tar = make_tar(folder / "tars" / "x.tar", ["0.jpg"])
        known = make_tar(folder / "known" / "x.tar", ["0.jpg"])
        sidecar = write_table(folder / "known" / "x.parquet", {"key": ["0"]})
        (folder / "x.txt").write_text("\n".join(names))
        (folder / "x.csv").write_text("\n".join(["uri", *names]))
        files = {table: [table], uris: [uris], tar: [tar], str(folder / "known"): [known, sidecar]}
        return files | {str(folder / name): [str(folder / name)] for name in ("x.txt", "x.csv")}

    def test_rows_carry_the_version_that_opening_saw(self, tmp_path, s3):
        fs = s3fs.S3FileSystem()
        for local, files in self.containers(tmp_path).items():
            there = f"{s3}/{tmp_path.name}"
            remote = [file.replace(str(tmp_path), there) for file in files]
            for file, other in zip(files, remote, strict=True):
                fs.put_file(file, other)
            for place, kept in ((local, files), (local.replace(str(tmp_path), there), remote)):
                source = opened(place)
                (unit,) = source.units()
                assert unit == kept[0]
                pages = list(source.pages(unit))
                assert {page.version for page in pages} == {source.versions()[unit]}
                assert source.versions()[unit] == "+".join(entry_at(locate(file)).version for file in kept)
                versions = {row["version"] for page in pages for row in page.rows.to_pylist()}
                beside = "+.parquet" if len(kept) > 1 else ""  # Of a sidecar, which is looked at again by its name.
                assert versions == {source.versions()[unit] + beside}

    def test_listing_again_sees_the_container_as_it_is_then(self, tmp_path):
        for place, files in self.containers(tmp_path).items():
            source = opened(place)
            assert listed(source)
            for file in reversed(files):
                os.utime(file, ns=(0, 0))
                (page, *_) = source.pages(files[0])
                assert page.version == "+".join(entry_at(locate(each)).version for each in files)
                os.rename(file, f"{file}-")
                with pytest.raises(DataError, match=os.path.basename(file)):
                    list(source.pages(files[0]))
                os.rename(f"{file}-", file)

    def test_pages_behind_another_version_are_refused(self, tmp_path):
        for place, files in self.containers(tmp_path).items():
            source = opened(place)
            if source.kind == "tar":
                continue  # It has one page.
            first = next(iter(source.pages(files[0])))
            after = json.loads(json.dumps(first.after))
            rest = [row for page in source.pages(files[0], after) for row in page.rows.to_pylist()]
            assert first.rows.num_rows + len(rest) == self.ROWS
            os.utime(files[0], ns=(0, 0))
            with pytest.raises(ContainerChanged, match=files[0]):
                list(source.pages(files[0], after))

    @pytest.mark.parametrize("name", ["x.txt", "x.csv", "x.jsonl", "x.txt.gz", "x.parquet"])
    @pytest.mark.parametrize("store", ["local", "s3"])
    def test_a_container_that_changes_while_it_is_listed(self, tmp_path, monkeypatch, request, name, store):
        """It is read in small pieces here; the same number of rows in another order follows in the middle."""
        monkeypatch.setattr("capray.inputs.parquet.ROWS_PER_PAGE", 100)
        monkeypatch.setattr(Stream, "_next", _in_pieces(4000))
        monkeypatch.setattr("capray.inputs.parquet.CHUNK_BYTES", 4000)
        monkeypatch.setattr("capray.inputs.parquet.CSV_BLOCK_BYTES", 10_000)
        names = [f"/{hashlib.sha256(b'%d' % i).hexdigest()}.jpg" for i in range(2000)]

        def write(names: list[str]) -> str:
            if name == "x.parquet":
                write_table(tmp_path / name, {"uri": names}, row_group_size=500)
            else:
                lines = {"txt": names, "csv": ["uri", *names], "jsonl": [json.dumps({"uri": uri}) for uri in names]}
                content = "\n".join(lines[name.split(".")[1]]).encode()
                (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
            if store == "local":
                return str(tmp_path / name)
            uri = f"{request.getfixturevalue('s3')}/{tmp_path.name}/{name}"
            s3fs.S3FileSystem().put_file(str(tmp_path / name), uri)
            return uri

        source = opened(write(names))
        (unit,) = source.units()
        pages = iter(source.pages(unit))
        next(pages)
        write(names[::-1])
        with pytest.raises(ContainerChanged) as caught:
            list(pages)
        assert caught.value.unit == unit
        again = [row["image_id"] for page in source.pages(unit) for row in page.rows.to_pylist()]
        assert again == names[::-1]


def _counting(whole, asked: list[int]):
    """``Stream._next``, which keeps how much each reading gave."""

    def read(stream: Stream, num_bytes: int) -> bytes:
        data = whole(stream, num_bytes)
        asked.append(len(data))
        return data

    return read


def _in_pieces(most: int):
    """``Stream._next`` with smaller pieces than pyarrow asks for."""
    whole = Stream._next
    return lambda stream, num_bytes: whole(stream, min(num_bytes, most))
