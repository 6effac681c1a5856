"""Fetching a unit: every bad image is a row of its kind, in the plan's order; the number of blocks follows from the unit
alone; another look at an image tells a fault of the moment from a fault of the image.

What is read, and what storage does to it, is of ``test_reading``.
"""

import hashlib
import json
import os
from dataclasses import replace
from hashlib import md5
from pathlib import Path

import pyarrow as pa
import pytest
from PIL.PngImagePlugin import PngInfo

from capray.captioning.fetching import MAX_ATTEMPTS, Fetcher, Look, fetch_unit
from capray.captioning.isolation import CannotStart
from capray.captioning.rows import BLOCK, FETCHED, events_of, table_of, unit_row
from capray.captioning.units import num_blocks
from capray.config import ImageLimits, Preprocessing
from capray.errors import TryAgain
from capray.inputs.base import Changed, InputReading, Selection, TarMembers, TarUnreadable
from capray.inputs.places import PLACES
from capray.inputs.reader import Reader
from capray.inputs.witnesses import Known
from capray.tables import FINAL_FAILURES
from tests.conftest import image_bytes, write_photos, write_tar
from tests.test_reader import alone  # noqa: F401 (a fixture)


@pytest.fixture
def fetcher() -> Fetcher:
    reading = InputReading(Selection("/"), "image_id", "image")
    reader = Reader((reading,), ImageLimits(), concurrency=3, patience_seconds=0.2)
    return Fetcher(reader, Preprocessing(size=32), block_rows=4, run_id="run")


def places(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist([{"position": i, "input": 0, "kind": "object", **row} for i, row in enumerate(rows)], PLACES)


def fetch(fetcher: Fetcher, unit: pa.Table, *options, **others) -> tuple[list[dict], list]:
    """The rows of the unit, and the events that came with its last block."""
    blocks = list(fetcher.fetch(unit, *options, **others))
    assert len(blocks) == num_blocks(unit, fetcher.block_rows)
    assert all(block.schema.equals(BLOCK) and block.num_rows == 1 for block in blocks)
    tables = [table_of(block) for block in blocks]
    assert all(table.schema.equals(FETCHED) and table.num_rows <= fetcher.block_rows for table in tables)
    assert not any(map(events_of, blocks[:-1]))
    rows = pa.concat_tables(tables).to_pylist()
    assert all((row["pixels"] is None) == (row["error_type"] is not None) for row in rows)
    return rows, events_of(blocks[-1])


def kinds(rows: list[dict]) -> list[str | None]:
    return [row["error_type"] for row in rows]


def photo(i: int) -> bytes:
    from PIL import Image

    return image_bytes(Image.new("RGB", (40, 30), (i * 9 % 256, 30, 200)))


class TestObjects:
    @pytest.fixture
    def unit(self, tmp_path) -> pa.Table:
        paths = write_photos(tmp_path / "photos", 5)
        (tmp_path / "photos" / "text.jpg").write_text("no image")
        paths[2:2] = [str(tmp_path / "photos" / "text.jpg"), str(tmp_path / "gone.jpg"), None]
        return places([{"image_id": f"id-{i}", "uri": path} for i, path in enumerate(paths)])

    @pytest.mark.parametrize("careful", [False, True])
    def test_order_and_number_of_rows_are_kept(self, fetcher, unit, careful):
        rows, events = fetch(fetcher, unit, careful=careful)
        assert [row["image_id"] for row in rows] == [f"id-{i}" for i in range(8)]
        assert kinds(rows) == [None, None, "not_an_image", "missing", "missing", None, None, None]
        assert [row["certain"] for row in rows] == [None, None, True, False, True, None, None, None]
        assert {len(row["pixels"]) for row in rows if row["pixels"]} == {3072}
        assert events == []

    @pytest.mark.parametrize("block_rows", [1, 3, 4, 8, 100])
    def test_a_replay_gives_the_same_blocks(self, fetcher, unit, block_rows, monkeypatch):
        fetcher = replace(fetcher, block_rows=block_rows)

        def rows(blocks) -> list[list[dict]]:
            return [table_of(block).drop_columns("place").to_pylist() for block in blocks]

        first = rows(fetcher.fetch(unit))
        assert len(first) == -(-8 // block_rows)
        assert rows(fetcher.fetch(unit, careful=True)) == first
        assert rows(fetch_unit(unit_row(unit), fetcher)) == first
        monkeypatch.setattr("capray.cluster.task_attempt", lambda: MAX_ATTEMPTS)
        with pytest.raises(TryAgain, match="died 6 times with its process"):
            next(fetch_unit(unit_row(unit), fetcher))

    def test_a_known_size_above_the_limit_is_made_sure_of_and_not_read(self, fetcher, tmp_path, monkeypatch):
        large, gone = tmp_path / "large.jpg", tmp_path / "gone.jpg"
        large.touch()
        os.truncate(large, 10**9)
        monkeypatch.setattr("capray.inputs.reader.read_image", None)
        rows, _ = fetch(fetcher, places([{"image_id": "1", "uri": str(large), "size": 10**9}]))
        assert kinds(rows) == ["too_large"]
        rows, _ = fetch(fetcher, places([{"image_id": "1", "uri": str(gone), "size": 10**9}]))
        assert kinds(rows) == ["missing"]

    def test_what_is_not_certain_and_a_witness_a_block_can_be_looked_at_again(self, fetcher, unit):
        rows, _ = fetch(fetcher, unit)
        assert [row["image_id"] for row in rows if row["place"]] == ["id-0", "id-3", "id-5"]
        looks = fetcher.look([json.loads(row["place"]) for row in rows if row["place"]])
        assert [(look.image_id, look.kind) for look in looks] == [("id-0", None), ("id-3", "missing"), ("id-5", None)]
        assert [look.sha256 for look in looks] == [rows[0]["sha256"], None, rows[5]["sha256"]]

    def test_memory_and_processes_that_cannot_be_had_are_no_verdict(self, fetcher, unit, monkeypatch):
        def short_of_memory(*arguments):
            raise MemoryError

        def no_process(*arguments):
            raise CannotStart("no child")

        with monkeypatch.context() as patch:
            patch.setattr("capray.captioning.fetching.load", short_of_memory)
            rows, _ = fetch(fetcher, unit.slice(0, 1))
            assert (rows[0]["error_type"], rows[0]["certain"]) == ("crashed", False)
        monkeypatch.setattr("capray.captioning.isolation.Isolated.call", no_process)
        with pytest.raises(TryAgain, match="no child"):
            fetch(fetcher, unit.slice(0, 1), careful=True)


class TestTars:
    def row(self, tar: str) -> pa.Table:
        return places([{"image_id": tar, "kind": "tar", "container": tar, "size": os.path.getsize(tar)}])

    @pytest.mark.parametrize("careful", [False, True])
    def test_members_are_fetched_and_told(self, tmp_path, fetcher, careful):
        files = {f"{i}.png": photo(i) for i in range(7)}
        tar = write_tar(tmp_path / "x.tar", {"0.json": bytes(40_000), **files})
        rows, (told,) = fetch(fetcher, self.row(tar), careful=careful)
        assert [row["image_id"] for row in rows] == [row["uri"] for row in rows] == [f"{tar}#{name}" for name in files]
        assert [row["sha256"] for row in rows] == [hashlib.sha256(data).digest() for data in files.values()]
        assert isinstance(told, TarMembers)
        assert told.members["image_id"].to_pylist() == [row["image_id"] for row in rows]

    def test_skipped_ones_are_told_all_the_same(self, tmp_path, fetcher):
        tar = write_tar(tmp_path / "x.tar", {f"{i}.png": photo(i) for i in range(4)})
        skipped = frozenset(md5(f"{tar}#{i}.png".encode()).digest() for i in (0, 2))
        rows, (told,) = fetch(fetcher, self.row(tar), skipped)
        assert [row["image_id"] for row in rows] == [f"{tar}#1.png", f"{tar}#3.png"]
        assert told.members.num_rows == 4

    @pytest.mark.parametrize("number", [0, 4, 9])
    def test_the_number_of_blocks_does_not_depend_on_what_is_found(self, tmp_path, fetcher, number):
        """What does not fit is told, to be read by its place."""
        tar = write_tar(tmp_path / "x.tar", {f"{i}.png": photo(i) for i in range(number)})
        os.truncate(tar, 20 * 512)
        unit = places([{"image_id": tar, "kind": "tar", "container": tar, "size": 10240}])
        rows, (told,) = fetch(fetcher, unit)
        assert (len(rows), told.members.num_rows) == (min(number, 4), number)

    def test_one_that_changed_or_is_none(self, tmp_path, fetcher):
        tar = write_tar(tmp_path / "x.tar", {"0.png": photo(0)})
        unit = self.row(tar)
        changed = unit.set_column(unit.column_names.index("version"), "version", pa.array(["other"]))
        assert fetch(fetcher, changed) == ([], [Changed(0, tar)])
        (tmp_path / "x.tar").write_bytes(b"no tar" * 1000)
        rows, (event,) = fetch(fetcher, unit)
        assert (rows, type(event)) == ([], TarUnreadable)


class TestLooks:
    """A second look decides about what has been missing, truncated or crashed; not about what it could not see."""

    def look(self, fetcher: Fetcher, **row) -> Look:
        (look,) = fetcher.look(places([{"image_id": "1", **row}]).to_pylist())
        return look

    def test_a_file_is_missing_only_where_its_file_system_is_there(self, tmp_path, fetcher):
        (path,) = write_photos(tmp_path, 1)
        gone = {"uri": str(tmp_path / "nowhere" / "gone.jpg")}
        assert self.look(fetcher, **gone) == Look("1", "missing", f"{gone['uri']}: No such file or directory", certain=False)
        reading = replace(
            fetcher.reader.inputs[0], selection=Selection(f"{tmp_path}/"), known=Known((path,), f"{tmp_path}/")
        )
        fetcher = replace(fetcher, reader=replace(fetcher.reader, inputs=(reading,)))
        assert self.look(fetcher, **gone).certain
        Path(path).rename(tmp_path / "other.jpg")
        with pytest.raises(TryAgain, match="cannot be opened"):
            self.look(fetcher, **gone)

    def test_a_witness_that_opened_before_has_to_open_again(self, tmp_path, fetcher):
        row = {"image_id": "1", "uri": str(tmp_path / "gone.jpg"), "witness": str(tmp_path / "seen.jpg")}
        (tmp_path / "seen.jpg").touch()
        row = places([row]).to_pylist()[0] | row
        assert fetcher.look([row])[0].certain
        (tmp_path / "seen.jpg").unlink()
        with pytest.raises(TryAgain):
            fetcher.look([row])

    def test_bytes_that_are_truncated_again_are(self, tmp_path, fetcher):
        (tmp_path / "a.jpg").write_bytes(image_bytes(image_format="JPEG")[:200])
        look = self.look(fetcher, uri=str(tmp_path / "a.jpg"))
        assert (look.kind, look.certain) == ("truncated", True)

    @pytest.mark.parametrize(
        ("mark", "kind", "death"), [("KILLS", "crashed", "SIGABRT"), ("STARVES", "captioning_error", "SIGKILL")]
    )
    def test_what_kills_its_process_again_does_so_but_for_a_kernels_sigkill(
        self, tmp_path, fetcher, monkeypatch, mark, kind, death
    ):
        monkeypatch.syspath_prepend(Path(__file__).parent / "faults")
        note = PngInfo()
        note.add_text("note", f"{mark}-THE-DECODER")
        (tmp_path / "a.png").write_bytes(image_bytes(pnginfo=note))
        look = self.look(fetcher, uri=str(tmp_path / "a.png"))
        assert (look.kind, look.message) == (kind, f"decoding killed its process by {death}")
        assert (look.certain and look.kind in FINAL_FAILURES) == (kind == "crashed")

    def test_a_container_that_changed_tells_nothing(self, tmp_path, fetcher):
        tar = write_tar(tmp_path / "x.tar", {"0.png": photo(0)})
        row = {"kind": "member", "container": tar, "member": "1.png", "offset": 0, "size": 1000}
        look = self.look(fetcher, **row)
        assert (look.kind, look.certain) == ("unreadable_storage", False)
