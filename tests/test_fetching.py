"""Fetching a unit: every bad image is a row of its kind, in the plan's order; a replay gives the same blocks."""

import hashlib
import io
import os
import tarfile
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from capray.captioning.fetching import Fetcher, fetch_unit
from capray.captioning.plan import UNITS_PER_FILE, Work
from capray.captioning.rows import BLOCK, FETCHED, unpack
from capray.config import ImageLimits, Preprocessing
from capray.inputs.base import Selection
from capray.inputs.places import MEMBERS, PLAN
from capray.storage import locate, write_atomic
from capray.tables import encode_parquet
from tests.conftest import image_bytes, write_photos


@pytest.fixture
def fetcher_of(tmp_path):
    """Makes a Fetcher of one unit of plan rows."""

    def make(rows: list[dict], block_rows: int = 4, selection: Selection | None = None, **limits) -> Fetcher:
        columns = [{"position": i, "input": 0, **row} for i, row in enumerate(rows)]
        table = pa.Table.from_pylist([{name: row.get(name) for name in PLAN.names} for row in columns], PLAN)
        file = locate(str(tmp_path / "units.parquet"))
        write_atomic(file, encode_parquet(table))
        work = Work([file], 1, len(rows), 0, block_rows)
        selections = (selection or Selection("/"),)
        return Fetcher(work, ("image",), selections, Preprocessing(size=32), ImageLimits(**limits), concurrency=3)

    return make


def fetch(fetcher: Fetcher, careful: bool = False) -> tuple[list[dict], dict]:
    """The rows of the unit, and what its last block tells of a tar."""
    blocks = list(fetcher.fetch(0, careful))
    assert all(block.schema.equals(BLOCK) and block.num_rows == 1 for block in blocks)
    tables = [unpack(block) for block in blocks]
    assert all(table.schema.equals(FETCHED) for table in tables)
    assert all(table.num_rows == fetcher.work.block_rows for table in tables[:-1])
    assert tables[-1].num_rows <= fetcher.work.block_rows
    assert len(tables) == 1 or tables[-1].num_rows
    assert all(block[name][0].as_py() is None for block in blocks[:-1] for name in ("container", "members", "fault"))
    last = blocks[-1].select(["input", "container", "fault"]).to_pylist()[0]
    members = unpack(blocks[-1], "members")
    last["members"] = None if members is None else members.to_pylist()
    return pa.concat_tables(tables).to_pylist(), last


def kinds(rows: list[dict]) -> list[str | None]:
    assert all((row["pixels"] is None) == (row["error_type"] is not None) for row in rows)
    return [row["error_type"] for row in rows]


def photo(i: int) -> bytes:
    from PIL import Image

    return image_bytes(Image.new("RGB", (40, 30), (i * 9 % 256, 30, 200)))


def write_tar(path, members: list[tuple[str, bytes]], **options) -> str:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


class TestObjects:
    @pytest.fixture
    def rows(self, tmp_path):
        paths = write_photos(tmp_path / "photos", 5)
        (tmp_path / "photos" / "text.jpg").write_text("no image")
        paths[2:2] = [str(tmp_path / "photos" / "text.jpg"), str(tmp_path / "gone.jpg"), None]
        return [{"image_id": f"id-{i}", "uri": path} for i, path in enumerate(paths)]

    @pytest.mark.parametrize("careful", [False, True])
    def test_order_and_number_of_rows_are_kept(self, fetcher_of, rows, careful):
        fetched, last = fetch(fetcher_of(rows), careful)
        assert [row["image_id"] for row in fetched] == [f"id-{i}" for i in range(8)]
        assert kinds(fetched) == [None, None, "not_an_image", "missing", "missing", None, None, None]
        assert {len(row["pixels"]) for row in fetched if row["pixels"]} == {3072}
        assert last == {"input": None, "container": None, "fault": None, "members": None}

    @pytest.mark.parametrize("block_rows", [1, 3, 4, 8, 100])
    def test_a_replay_gives_the_same_blocks(self, fetcher_of, rows, block_rows, monkeypatch):
        fetcher = fetcher_of(rows, block_rows)
        first = [block.to_pylist() for block in fetcher.fetch(0)]
        assert len(first) == -(-8 // block_rows)
        assert [block.to_pylist() for block in fetcher.fetch(0)] == first
        assert [block.to_pylist() for block in fetcher.fetch(0, careful=True)] == first
        monkeypatch.setattr("capray.cluster.task_attempt", lambda: 0)
        assert [block.to_pylist() for block in fetch_unit(pa.table({"id": [0]}), fetcher)] == first

    def test_a_known_size_above_the_limit_is_not_read(self, fetcher_of, monkeypatch, rows):
        def read(uri, max_bytes):
            raise AssertionError("read")

        monkeypatch.setattr("capray.captioning.fetching.read_image", read)
        fetched, _ = fetch(fetcher_of([{**rows[0], "size": 101}], max_image_bytes=100))
        assert kinds(fetched) == ["too_large"]

    def test_units_are_found_by_their_index(self, tmp_path, fetcher_of, rows):
        fetcher = fetcher_of(rows)
        second = locate(str(tmp_path / "second.parquet"))
        table = pq.read_table(fetcher.work.files[0].path).slice(5)
        write_atomic(second, encode_parquet(table, row_group_size=1))
        fetcher = replace(fetcher, work=replace(fetcher.work, files=[*fetcher.work.files, second], num_units=103))
        (block,) = fetcher.fetch(UNITS_PER_FILE + 2)
        assert unpack(block)["image_id"].to_pylist() == ["id-7"]

    def test_on_s3(self, fetcher_of, s3, tmp_path):
        fs = s3fs.S3FileSystem()
        for i, name in enumerate(["a b.png", "a#b.png", "a%2Fb.png", "\u00e4.png"]):
            fs.pipe_file(f"{s3}/{tmp_path.name}/{name}", photo(i))
        uris = [f"s3://{path}" for path in fs.ls(f"{s3}/{tmp_path.name}", refresh=True)]
        fetched, _ = fetch(fetcher_of([{"image_id": uri, "uri": uri} for uri in uris]))
        assert kinds(fetched) == [None] * 4


class TestParquet:
    """One row group of 700 rows: more than is read at once."""

    @pytest.fixture
    def container(self, tmp_path):
        images = [photo(i % 7) for i in range(700)]
        images[3], images[300] = None, b"no image"
        other = [b"not this row group"] * 10
        path = tmp_path / "images.parquet"
        schema = pa.schema([("n", pa.int64()), ("image", pa.binary())])
        with pq.ParquetWriter(path, schema) as writer:
            for part in (other, images):
                writer.write_table(pa.table({"n": range(len(part)), "image": part}, schema=schema))
        return str(path)

    def rows(self, container, numbers):
        return [{"image_id": f"{n}", "container": container, "row_group": 1, "row": n} for n in numbers]

    def test_only_the_wanted_rows(self, fetcher_of, container):
        numbers = [0, 3, 255, 256, 300, 699]
        fetched, last = fetch(fetcher_of(self.rows(container, numbers)))
        assert [row["image_id"] for row in fetched] == [str(n) for n in numbers]
        assert kinds(fetched) == [None, "missing", None, None, "not_an_image", None]
        assert fetched[3]["sha256"] == digest(photo(256 % 7))
        assert (last["container"], last["members"]) == (None, None)

    def test_a_row_group_larger_than_a_block(self, fetcher_of, container):
        fetcher = fetcher_of(self.rows(container, range(700)), block_rows=64)
        fetched, _ = fetch(fetcher)
        assert [row["image_id"] for row in fetched] == [str(n) for n in range(700)]
        assert kinds(fetched).count(None) == 698
        again, _ = fetch(fetcher, careful=True)
        assert again == fetched

    def test_two_row_groups_in_a_unit(self, fetcher_of, container):
        rows = self.rows(container, [1, 2])
        rows[0]["row_group"] = 0
        fetched, _ = fetch(fetcher_of(rows))
        assert kinds(fetched) == ["not_an_image", None]

    def test_what_happened_to_the_file_since(self, fetcher_of, container):
        rows = self.rows(container, [1, 700])
        assert kinds(fetch(fetcher_of(rows))[0]) == [None, "missing"]
        with open(container, "r+b") as file:
            file.truncate(os.path.getsize(container) - 5)
        assert kinds(fetch(fetcher_of(rows))[0]) == ["unreadable_storage"] * 2
        os.unlink(container)
        assert kinds(fetch(fetcher_of(rows))[0]) == ["unreadable_storage"] * 2


class TestWholeTar:
    ODD = ("a b.png", "a#b.png", "a%2Fb.png", "new\nline.png", "\u00e4.png", "d/" + "long" * 60 + ".PNG", "no suffix")

    def row(self, tar):
        return {"image_id": tar, "container": tar}

    @pytest.mark.parametrize("careful", [False, True])
    @pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    def test_members_are_fetched_and_told(self, tmp_path, fetcher_of, careful, layout):
        members = [(name, photo(i)) for i, name in enumerate(self.ODD)]
        others = [("0001.json", b"{}"), ("0001.txt", b"a caption"), ("folder", b"")]
        tar = write_tar(tmp_path / "x.tar", [*members[:2], *others, *members[2:]], format=layout)
        fetched, last = fetch(fetcher_of([self.row(tar)]), careful)
        ids = [f"{tar}#{name}" for name in self.ODD]
        assert [row["image_id"] for row in fetched] == [row["uri"] for row in fetched] == ids
        assert kinds(fetched) == [None] * len(ids)
        assert [row["sha256"] for row in fetched] == [digest(data) for _, data in members]
        assert (last["input"], last["container"], last["fault"]) == (0, tar, None)
        assert [(row["image_id"], row["member"]) for row in last["members"]] == list(zip(ids, self.ODD, strict=True))
        content = (tmp_path / "x.tar").read_bytes()
        for row, (_, data) in zip(last["members"], members, strict=True):
            assert content[row["offset"] : row["offset"] + row["size"]] == data

    def test_a_member_whose_name_is_not_utf8(self, tmp_path, fetcher_of):
        options = {"format": tarfile.GNU_FORMAT, "encoding": "latin-1"}
        tar = write_tar(tmp_path / "x.tar", [("caf\u00e9.png", photo(0))], **options)
        fetched, last = fetch(fetcher_of([self.row(tar)]))
        assert [row["image_id"] for row in fetched] == [f"{tar}#caf\\xe9.png"]
        assert kinds(fetched) == [None]
        fetched, _ = fetch(fetcher_of([{"image_id": "1", "container": tar, "member": last["members"][0]["member"]}]))
        assert kinds(fetched) == [None]

    def test_settled_members_are_skipped_but_told(self, tmp_path, fetcher_of):
        tar = write_tar(tmp_path / "x.tar", [(f"{i}.png", photo(i)) for i in range(10)])
        settled = [{**self.row(tar), "image_id": f"{tar}#{i}.png", "member": f"{i}.png"} for i in range(0, 10, 2)]
        fetched, last = fetch(fetcher_of([self.row(tar), *settled]))
        assert [row["image_id"] for row in fetched] == [f"{tar}#{i}.png" for i in range(1, 10, 2)]
        assert len(last["members"]) == 10
        settled = [{**self.row(tar), "image_id": f"{tar}#{i}.png", "member": f"{i}.png"} for i in range(10)]
        fetched, last = fetch(fetcher_of([self.row(tar), *settled]))
        assert (fetched, len(last["members"]), last["fault"]) == ([], 10, None)

    def test_only_the_selection(self, tmp_path, fetcher_of):
        tar = write_tar(tmp_path / "x.tar", [("keep/1.png", photo(1)), ("2.png", photo(2))])
        fetched, last = fetch(fetcher_of([self.row(tar)], selection=Selection(f"{tmp_path}/", ("*/1.png",))))
        assert (
            [row["image_id"] for row in fetched]
            == [row["image_id"] for row in last["members"]]
            == [f"{tar}#keep/1.png"]
        )

    def test_an_empty_tar_and_one_without_images(self, tmp_path, fetcher_of):
        for members in ([], [("a.json", b"{}")]):
            tar = write_tar(tmp_path / "x.tar", members)
            assert fetch(fetcher_of([self.row(tar)])) == (
                [],
                {"input": 0, "container": tar, "fault": None, "members": []},
            )

    def test_members_above_the_limit(self, tmp_path, fetcher_of):
        tar = write_tar(tmp_path / "x.tar", [("0.png", photo(0)), ("1.png", b"\x89PNG" * 500), ("2.png", photo(2))])
        fetched, last = fetch(fetcher_of([self.row(tar)], max_image_bytes=1000))
        assert kinds(fetched) == [None, "too_large", None]
        assert len(last["members"]) == 3

    def cut(self, tmp_path, size_of):
        tar = write_tar(tmp_path / "x.tar", [(f"{i}.png", photo(i) + b"\0" * 2000) for i in range(3)])
        with tarfile.open(tar) as file:
            members = file.getmembers()
        os.truncate(tar, size_of(members))
        return tar

    @pytest.mark.parametrize("careful", [False, True])
    @pytest.mark.parametrize("left", [0, 1, 40, 1000])
    def test_cut_within_a_member(self, tmp_path, fetcher_of, left, careful):
        tar = self.cut(tmp_path, lambda members: members[2].offset_data + left)
        fetched, last = fetch(fetcher_of([self.row(tar)]), careful)
        assert kinds(fetched) == [None, None, "truncated"]
        assert (last["container"], last["fault"], len(last["members"])) == (tar, None, 3)

    @pytest.mark.parametrize("left", [0, 1, 511])
    def test_cut_before_or_within_a_header(self, tmp_path, fetcher_of, left):
        tar = self.cut(tmp_path, lambda members: members[2].offset + left)
        fetched, last = fetch(fetcher_of([self.row(tar)]))
        assert kinds(fetched) == [None, None]
        assert last["members"] is None
        assert "damaged" in last["fault"]

    def test_a_header_that_is_spoilt_does_not_end_the_tar_unnoticed(self, tmp_path, fetcher_of):
        tar = write_tar(tmp_path / "x.tar", [(f"{i}.png", photo(i)) for i in range(3)])
        with tarfile.open(tar) as file:
            offset = file.getmembers()[1].offset
        with open(tar, "r+b") as file:
            file.seek(offset)
            file.write(b"\xff" * 512)
        fetched, last = fetch(fetcher_of([self.row(tar)]))
        assert kinds(fetched) == [None]
        assert (last["members"], "damaged" in last["fault"]) == (None, True)

    def test_what_is_no_tar(self, tmp_path, fetcher_of):
        for content in (b"no tar" * 500, b"", photo(1)):
            (tmp_path / "x.tar").write_bytes(content)
            fetched, last = fetch(fetcher_of([self.row(str(tmp_path / "x.tar"))]))
            assert (fetched, last["members"]) == ([], None)
            assert "no tar" in last["fault"]
        fetched, last = fetch(fetcher_of([self.row(str(tmp_path / "gone.tar"))]))
        assert (fetched, last["members"]) == ([], None)
        assert "No such file" in last["fault"]

    def test_a_name_that_stands_twice(self, tmp_path, fetcher_of):
        tar = write_tar(tmp_path / "x.tar", [("0.png", photo(0)), ("0.png", photo(1))])
        fetched, _ = fetch(fetcher_of([self.row(tar)]))
        assert [row["sha256"] for row in fetched] == [digest(photo(0))]

    @pytest.mark.parametrize("block_rows", [1, 3, 6, 100])
    def test_a_replay_gives_the_same_blocks(self, tmp_path, fetcher_of, block_rows):
        tar = write_tar(tmp_path / "x.tar", [(f"{i}.png", photo(i)) for i in range(6)])
        fetcher = fetcher_of([self.row(tar)], block_rows)
        first = [block.to_pylist() for block in fetcher.fetch(0)]
        assert len(first) == -(-6 // block_rows)
        assert [block.to_pylist() for block in fetcher.fetch(0, careful=True)] == first
        fetch(fetcher)

    def test_on_s3(self, tmp_path, fetcher_of, s3):
        path = write_tar(tmp_path / "x.tar", [(f"{i}.png", photo(i)) for i in range(6)])
        uri = f"{s3}/{tmp_path.name}/x.tar"
        s3fs.S3FileSystem().put_file(path, uri)
        fetched, last = fetch(fetcher_of([self.row(uri)]))
        assert kinds(fetched) == [None] * 6
        assert pa.Table.from_pylist(last["members"], MEMBERS).num_rows == 6
        rows = [{"container": uri, **member} for member in last["members"][2:5]]
        again, _ = fetch(fetcher_of(rows))
        assert [row["sha256"] for row in again] == [row["sha256"] for row in fetched[2:5]]


class TestKnownMembers:
    @pytest.fixture
    def tar(self, tmp_path):
        return write_tar(tmp_path / "x.tar", [(f"{i}.png", photo(i)) for i in range(8)])

    @pytest.mark.parametrize("by", ["name", "place"])
    @pytest.mark.parametrize("careful", [False, True])
    def test_those_wanted_are_read(self, fetcher_of, tar, by, careful):
        members = fetch(fetcher_of([{"image_id": tar, "container": tar}]))[1]["members"]
        rows = [{"image_id": f"id-{i}", "container": tar, "member": f"{i}.png"} for i in (1, 4, 7)]
        if by == "place":
            for row, i in zip(rows, (1, 4, 7), strict=True):
                row |= {"offset": members[i]["offset"], "size": members[i]["size"]}
        fetched, last = fetch(fetcher_of(rows), careful)
        assert [row["image_id"] for row in fetched] == ["id-1", "id-4", "id-7"]
        assert [row["sha256"] for row in fetched] == [digest(photo(i)) for i in (1, 4, 7)]
        assert last["members"] is None and last["container"] is None

    def test_one_that_is_not_there_is_missing(self, fetcher_of, tar):
        rows = [{"image_id": name, "container": tar, "member": name} for name in ("0.png", "gone.png")]
        fetched, _ = fetch(fetcher_of(rows))
        assert {row["image_id"]: row["error_type"] for row in fetched} == {"0.png": None, "gone.png": "missing"}

    def test_two_ids_of_one_member(self, fetcher_of, tar):
        rows = [{"image_id": name, "container": tar, "member": "0.png"} for name in ("a", "b")]
        fetched, _ = fetch(fetcher_of(rows))
        assert sorted(row["image_id"] for row in fetched) == ["a", "b"]
        assert kinds(fetched) == [None, None]

    def test_above_the_limit(self, fetcher_of, tar):
        place = {"offset": 512, "size": 10**6}
        for row in ({}, place):
            fetched, _ = fetch(
                fetcher_of([{"image_id": "0", "container": tar, "member": "0.png", **row}], max_image_bytes=10)
            )
            assert kinds(fetched) == ["too_large"]

    def test_what_happened_to_the_tar_since(self, fetcher_of, tar):
        with tarfile.open(tar) as file:
            member = file.getmembers()[5]
        place = {"offset": member.offset_data, "size": member.size}
        for data, kind in ((b"", "truncated"), (b"x" * 9, "truncated")):
            os.truncate(tar, member.offset_data)
            with open(tar, "ab") as file:
                file.write(data)
            rows = [{"image_id": "5", "container": tar, "member": "5.png", **place}]
            assert kinds(fetch(fetcher_of(rows))[0]) == [kind]
        rows = [{"image_id": f"{i}", "container": tar, "member": f"{i}.png"} for i in (1, 5, 6)]
        assert kinds(fetch(fetcher_of(rows))[0]) == [None, "truncated", "missing"]
        os.unlink(tar)
        assert kinds(fetch(fetcher_of(rows))[0]) == ["unreadable_storage"] * 3
        assert kinds(fetch(fetcher_of([row | place for row in rows]))[0]) == ["unreadable_storage"] * 3
