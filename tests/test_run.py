"""One run, without Ray: waves and passes, second looks, the breaker, limits, what is published when a run ends early."""

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from capray.captioning import run as run_module
from capray.captioning import writer
from capray.captioning.actor import CaptioningActor, CaptioningSettings
from capray.captioning.job import caption
from capray.captioning.plan import Plan
from capray.captioning.record import Summary
from capray.captioning.stream import Stalled
from capray.config import CaptionConfig, CompactConfig, SourceSettings, VerifyConfig
from capray.errors import CaprayError, ConfigError, DataError, Interrupted, StorageError, StorageUnavailable, TryAgain
from capray.images import ImageError
from capray.inputs import byte_reader, files, listing, open_sources, reader
from capray.inputs import witnesses as witnesses_module
from capray.output import Output
from capray.output.compact import compact
from capray.output.verify import verify
from tests.conftest import write_photos, write_tar
from tests.local_executor import LocalExecutor, models_loaded_once
from tests.oracle import check_exactly_once, current_failures, digests, read_parts


class Job:
    """A folder of photos, and the command that captions it."""

    def __init__(self, folder: Path, model: str):
        self.input, self.output, self.model = folder / "in", folder / "out", model
        self.executor = LocalExecutor()

    def run(self, executor: LocalExecutor | None = None, **settings) -> Summary:
        self.executor = executor or LocalExecutor()
        options = {"batch_size": 4, "part_rows": 10, "second_look_seconds": 0.1, "patience_seconds": 5.0}
        options |= {"input": str(self.input), "output": str(self.output), "model": self.model}
        return caption(CaptionConfig(**options | settings), self.executor)

    def check(self, failed: dict[str, str] | None = None) -> set[str]:
        """Every image stands once, made of its bytes; the captioned ids."""
        return set(check_exactly_once(str(self.output), digests(str(self.input)), failed=failed))

    def failures(self) -> list[dict]:
        return sorted(read_parts(str(self.output), "failures"), key=lambda row: row["failed_at"])

    def kinds(self) -> list[str]:
        return [row["error_type"] for row in self.failures()]


@pytest.fixture
def job(tmp_path, model) -> Job:
    return Job(tmp_path, model)


@pytest.fixture(scope="module", autouse=True)
def models_once():
    with models_loaded_once():
        yield


def at_block(number: int, action) -> LocalExecutor:
    return LocalExecutor(after_block=lambda n: action() if n == number else None)


def write_tars(folder: Path, num_tars: int, num_photos: int) -> None:
    for number in range(num_tars):
        photos = map(Path, write_photos(folder.parent / f"photos-{number}", num_photos, seed=number))
        write_tar(folder / f"{number:03d}.tar", {photo.name: photo.read_bytes() for photo in photos})


def encoded(name: str, shade: int = 0, mode: str = "RGB") -> bytes:
    """An image in Pillow's format ``name``."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (shade, 200 - shade, 90)).convert(mode).save(file, name)
    return file.getvalue()


def test_all_is_captioned_once_and_then_nothing_is_left_to_do(job):
    write_photos(job.input, 30)
    bad = job.input / "bad.jpg"
    bad.write_bytes(b"this is no image")
    summary = job.run()
    assert (summary.images, summary.captions, summary.passes) == (31, 30, 1)
    job.check({str(bad): "not_an_image"})
    again = job.run()
    assert (again.captioned_before, again.captions, again.passes) == (30, 0, 0)
    assert again.current_failures == {"not_an_image": 1}


def test_a_tar_with_a_sidecar_that_was_cut_is_captioned_whole_when_it_is_mended(job):
    write_tars(job.input, 1, 10)
    tar = job.input / "000.tar"
    whole = tar.read_bytes()
    pq.write_table(pa.table({"key": [f"photo-{i:04d}" for i in range(10)]}), tar.with_suffix(".parquet"))
    with tarfile.open(tar) as file:
        os.truncate(tar, file.getmembers()[6].offset_data + 10)
    first = job.run()
    assert (first.captions, first.current_failures) == (6, {"unreadable_storage": 4})
    tar.write_bytes(whole)
    second = job.run()
    assert (second.captions, second.current_failures) == (4, {})
    tar.with_suffix(".parquet").unlink()
    job.check()


@pytest.mark.parametrize("is_reading", [False, True])
def test_a_sidecar_that_comes_later_than_its_tar_does_not_give_ids_to_other_images(job, monkeypatch, is_reading):
    """The new tar is there, with the sidecar of the old one."""
    write_tars(job.input, 1, 8)
    sidecar, numbers = job.input / "000.parquet", range(8)
    contents = [digest(job.input.parent / "photos-0" / f"photo-{i:04d}.jpg") for i in numbers]

    def write(ids: list[str]) -> None:
        pq.write_table(pa.table({"key": [f"photo-{i:04d}" for i in numbers], "id": ids}), sidecar)

    write([str(i) for i in numbers])
    news = iter([[str(7 - i) for i in numbers]])

    def replace_sidecar() -> None:
        if (ids := next(news, None)) is not None:
            write(ids)

    executor, images_of = LocalExecutor(), reader.images_of
    if is_reading:

        def images(*arguments):
            yield from images_of(*arguments)
            replace_sidecar()

        monkeypatch.setattr(reader, "images_of", lambda *arguments: [*images(*arguments)])
    else:
        executor = LocalExecutor(before_unit=lambda number: replace_sidecar())
    job.run(executor, id_column="id")
    captions = read_parts(str(job.output), "captions")
    assert {row["image_id"]: row["sha256"] for row in captions} == {str(7 - i): contents[i] for i in numbers}
    assert executor.num_units > 1


def sha256s(job: Job) -> dict[str, bytes]:
    return {row["image_id"]: row["sha256"] for row in read_parts(str(job.output), "captions")}


def digest(path: str | Path) -> bytes:
    return hashlib.sha256(Path(path).read_bytes()).digest()


def spoil(file: Path, begin: int, end: int) -> None:
    data = bytearray(file.read_bytes())
    for at in range(begin, end if end > 0 else len(data) + end):
        data[at] ^= 0x5A
    file.write_bytes(data)


def test_no_temporary_space_is_said(job, tmp_path, monkeypatch):
    write_photos(job.input, 2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(StorageError, match="no temporary space: .*set TMPDIR"):
        job.run()


@pytest.mark.parametrize("damage", ["cut", "zeroes"])
@pytest.mark.parametrize("table", ["captions", "failures"])
def test_a_damaged_part_is_named_with_the_way_out_which_works(job, table, damage):
    write_photos(job.input, 6)
    bad = job.input / "bad.jpg"
    bad.write_text("no image")
    job.run()
    (part,) = (job.output / table).iterdir()
    whole = part.read_bytes()
    part.write_bytes(whole[:400] if damage == "cut" else whole[:4] + bytes(len(whole) // 4) + whole[4 + len(whole) // 4 :])
    with pytest.raises(StorageError, match=rf"{part.name}' is damaged.*put it back.*delete it.*same command") as caught:
        job.run()
    assert caught.value.exit_code == 1
    part.unlink()
    job.run()
    job.check({str(bad): "not_an_image"})


@pytest.mark.parametrize("table", ["captions", "failures"])
def test_a_bit_that_flips_in_a_part_gives_no_caption_to_another_id(job, table):
    write_photos(job.input, 6)
    (job.input / "bad.jpg").write_text("no image")
    job.run()
    (part,) = (job.output / table).iterdir()
    whole, ids = part.read_bytes(), pq.read_table(part)["image_id"]

    def is_unnoticed(at: int) -> bool:
        part.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with suppress(pa.ArrowException, OSError):
            found = pq.read_table(part)["image_id"]
            found.validate(full=True)
            return found != ids
        return False

    assert any(map(is_unnoticed, range(4, len(whole) // 2)))
    with pytest.raises(StorageError, match=f"{part.name}' is damaged"):
        job.run()
    assert f"{part.name} cannot be read" in verify(VerifyConfig(output=str(job.output))).problems[0]
    with pytest.raises(DataError, match=f"{part.name}' is damaged"):
        compact(CompactConfig(output=str(job.output), new=f"{job.output}-copy"))


def test_of_two_runs_the_later_id_is_the_newer_within_a_second_too():
    ids = []
    for _ in range(50):
        ids.append(Output.new_run_id())
        time.sleep(1e-5)
    assert ids == sorted(ids)


def test_a_damaged_listing_is_made_again(job):
    write_photos(job.input, 6)
    job.run(limit=3)
    for chunk in (job.output / "_capray" / "plan").glob("*/chunk-*.parquet"):
        size = int.from_bytes(chunk.read_bytes()[-8:-4], "little")
        spoil(chunk, chunk.stat().st_size - 8 - size, -8)
    job.run()
    job.check()


class TestManifestsOfSeveralFolders:
    """A URI relative to its manifest is the id as it is written: two images must not hide behind one."""

    @pytest.fixture
    def lists(self, job) -> list[Path]:
        folders = [job.input / name for name in "ab"]
        for seed, folder in enumerate(folders):
            names = [Path(path).name for path in write_photos(folder, 3, seed=seed)]
            (folder / "list.csv").write_text("\n".join(["path,key", *(f"{n},{seed}-{n}" for n in names)]) + "\n")
        return [folder / "list.csv" for folder in folders]

    def run(self, job, lists, **settings) -> Summary:
        return job.run(input=str(lists[0]), also=tuple(map(str, lists[1:])), **settings)

    def test_are_refused_when_they_name_two_files_alike_and_ids_are_the_way_out(self, job, lists):
        with pytest.raises(ConfigError, match=r"'.*/a/list\.csv' and '.*/b/list\.csv' .*photo-0000.*--id-column"):
            self.run(job, lists)
        summary = self.run(job, lists, id_column="key")
        assert (summary.images, summary.captions, summary.duplicates) == (6, 6, 0)

    def test_keep_their_ids_when_all_differ(self, job, lists):
        for i, path in enumerate(sorted(lists[1].parent.glob("*.jpg"))):
            path.rename(path.with_name(f"other-{i}.jpg"))
        lists[1].write_text("".join(f"{line}\n" for line in ("path", *(f"other-{i}.jpg" for i in range(3)))))
        assert self.run(job, lists).captions == 6
        assert {"photo-0001.jpg", "other-1.jpg"} <= {row["image_id"] for row in read_parts(str(job.output), "captions")}

    def test_one_after_the_other_are_told_apart_by_their_uris(self, job, lists):
        first, second = (self.run(job, [each]) for each in lists)
        assert (first.elsewhere, second.captions, second.elsewhere) == (0, 0, 3)
        where = [str(each.with_name("photo-0000.jpg")) for each in lists]
        assert second.first_elsewhere == ("photo-0000.jpg", *where)
        assert (
            f"3 captions whose image is at another URI than its id is listed at, first: photo-0000.jpg is of {where[0]}, not"
            in (second.text())
        )
        for each, number in zip(lists, (0, 3), strict=True):
            result = verify(VerifyConfig(output=str(job.output), against=(str(each),)))
            assert (result.counts["ids_elsewhere"], result.problems) == (number, [])
            assert bool(number) == any("image is at another URI" in note for note in result.notes)

    def test_may_repeat_what_is_the_same_file(self, job, lists):
        whole = lists[1].parent / "photo-0000.jpg"
        beside = lists[0].with_name("again.csv")
        beside.write_text("path\nphoto-0001.jpg\n")
        for path in lists:
            path.write_text(f"path\n{whole}\n")
        summary = self.run(job, [*lists, beside])
        assert (summary.captions, summary.duplicates) == (2, 1)


class TestOneBadContainer:
    def test_or_many_before_the_first_good_one(self, job):
        job.input.mkdir()
        for number in range(30):
            (job.input / f"{number:02}.parquet").write_bytes(b"damaged")
        pq.write_table(pa.table({"image_id": ["a"], "image": [encoded("JPEG")]}), job.input / "z.parquet")
        with pytest.raises(DataError, match="30 files or folders"):
            job.run()
        assert list(sha256s(job)) == ["a"]

    """It is named, the others are captioned, and mended it is captioned too."""

    @pytest.fixture
    def tables(self, job, tmp_path) -> list[Path]:
        job.input.mkdir()
        photos = [Path(path).read_bytes() for path in write_photos(tmp_path / "photos", 9)]
        for number in range(3):
            table = pa.table({"image_id": [f"{number}-{i}" for i in range(3)], "image": photos[3 * number :][:3]})
            pq.write_table(table, job.input / f"{number}.parquet", compression="zstd")
        return sorted(job.input.iterdir())

    @pytest.mark.parametrize("which", [0, 1])
    @pytest.mark.parametrize("damage", ["junk", "thrift", "ids", "cut", "columns", "link", "denied"])
    def test_a_table(self, job, tables, damage, which, monkeypatch):
        table, whole = tables[which], tables[which].read_bytes()
        size = int.from_bytes(whole[-8:-4], "little")
        if damage == "junk":
            table.write_bytes(b"junk" * 100)
        elif damage == "thrift":
            spoil(table, len(whole) - 8 - size, -8)
        elif damage == "ids":
            spoil(table, 4, 60)
        elif damage == "cut":
            os.truncate(table, len(whole) // 2)
        elif damage == "columns":
            twice = pa.table([pa.array(["x"]), pa.array(["y"]), pa.array([b"z"])], ["image_id", "image_id", "image"])
            pq.write_table(twice, table)
        elif damage == "link":
            table.unlink()
            table.symlink_to("/nowhere")
        else:
            read = byte_reader._read_file
            denied = PermissionError(errno.EACCES, "Permission denied")

            def refuse(path, *arguments):
                if path == str(table):
                    raise denied
                return read(path, *arguments)

            monkeypatch.setattr(byte_reader, "_read_file", refuse)
        with pytest.raises(DataError, match=rf"1 file or folder .*{table.name}"):
            job.run()
        assert len(sha256s(job)) == 6
        monkeypatch.undo()
        table.unlink(missing_ok=True)
        table.write_bytes(whole)
        job.run()
        assert len(sha256s(job)) == 9

    def test_a_page_of_images_costs_its_row_group(self, job, tmp_path):
        photos = [Path(path).read_bytes() for path in write_photos(tmp_path / "photos", 24)]
        job.input.mkdir()
        table = pa.table({"image_id": [f"{i:02d}" for i in range(24)], "image": photos})
        file = job.input / "0.parquet"
        pq.write_table(table, file, row_group_size=4, compression="zstd")
        column = pq.read_metadata(file).row_group(1).column(1)
        begin = column.dictionary_page_offset or column.data_page_offset
        spoil(file, begin + column.total_compressed_size // 2, begin + column.total_compressed_size)
        assert job.run(batch_size=64).current_failures == {"unreadable_storage": 4}
        assert "row group 1" in job.failures()[0]["message"] and "0.parquet" in job.failures()[0]["message"]

    def test_one_csv_of_several_without_the_column(self, job, tmp_path):
        photos = write_photos(tmp_path / "photos", 3)
        job.input.mkdir()
        (job.input / "0.csv").write_text("\n".join(["uri", *photos]))
        (job.input / "1.csv").write_text("other\nx")
        with pytest.raises(DataError, match=r"1\.csv.* no column of URIs"):
            job.run(input=f"{job.input}/*.csv")
        assert len(sha256s(job)) == 3

    def test_a_quote_that_is_not_closed(self, job, tmp_path):
        """The CSV's rest was one URI, and missing."""
        photos = write_photos(tmp_path / "photos", 5)
        manifest = tmp_path / "list.csv"
        manifest.write_text("\n".join(["uri", photos[0], f'"{photos[1]}', *photos[2:]]))
        with pytest.raises(DataError, match="line 6: unexpected end of data"):
            job.run(input=str(manifest))
        assert not job.failures()

    @pytest.mark.parametrize("uri", ["ftp://host/x.jpg", "zip://a.jpg::/tmp/x.zip", "hdfs://host/x", "nothing://x"])
    def test_a_line_of_a_list_that_no_file_system_serves_costs_its_row(self, job, tmp_path, uri):
        manifest = tmp_path / "list.txt"
        manifest.write_text("\n".join([*write_photos(tmp_path / "photos", 3), uri]))
        assert job.run(input=str(manifest)).current_failures == {"unreadable_storage": 1}
        assert len(sha256s(job)) == 3


class TestWhatFailedAndWasMended:
    """Versions tell, not clocks."""

    def write(self, job, second: bytes, *times: float) -> None:
        job.input.mkdir(exist_ok=True)
        table = pa.table({"image_id": ["a", "b"], "image": [encoded("PNG"), second]})
        pq.write_table(table, job.input / "t.parquet")
        if times:
            os.utime(job.input / "t.parquet", (*times, *times))

    def test_with_an_older_time(self, job):
        self.write(job, b"no image at all")
        assert job.run().current_failures == {"not_an_image": 1}
        self.write(job, encoded("PNG", 9), time.time() - 86_400)
        assert (job.run().captions, job.run().passes) == (1, 0)

    def test_by_a_table_put_in_its_place_under_its_size_and_a_tar(self, job):
        tar = job.input / "0.tar"
        write_tar(tar, {"a.png": encoded("PNG"), "b.png": b"no image"})
        assert job.run().current_failures == {"not_an_image": 1}
        write_tar(tar, {"a.png": encoded("PNG"), "b.png": encoded("PNG", 9)})
        os.utime(tar, (1, 1))
        assert job.run().captions == 1

    @pytest.mark.parametrize("at", [2e9, 2e13])
    def test_with_a_time_in_the_future_and_is_no_image_it_is_attempted_once(self, job, at):
        for second, failed in ((b"no image", 1), (b"still no image", 2)):
            self.write(job, second, at)
            for _ in range(3):
                job.run()
            assert len(job.failures()) == failed

    def test_after_a_run_whose_clock_was_ahead(self, job, monkeypatch):
        self.write(job, b"no image")
        now = time.time_ns
        with monkeypatch.context() as patch:
            patch.setattr(writer.time, "time_ns", lambda: now() + 600 * 10**9)
            job.run()
        self.write(job, encoded("PNG", 9))
        assert job.run().captions == 1

    @pytest.mark.parametrize("kind", ["table", "tar"])
    def test_in_the_version_that_was_read_not_in_the_one_that_was_opened(self, job, kind):
        """It is rewritten while the run goes, and put back as it was."""
        path = job.input / ("t.parquet" if kind == "table" else "t.tar")

        def write(images: list[bytes]) -> None:
            if kind == "tar":
                write_tar(path, {f"{i}.png": image for i, image in enumerate(images)})
            else:
                path.parent.mkdir(exist_ok=True)
                ids = [str(i) for i in range(len(images))]
                pq.write_table(pa.table({"image_id": ids, "image": images}), path, row_group_size=4)

        good = [encoded("PNG", i) for i in range(16)]
        write(good)
        os.utime(path, (1000, 1000))
        kept = path.read_bytes()
        job.run(limit=4)
        job.run(
            LocalExecutor(num_threads=1, before_unit=lambda n: write([*good[:8], *[b"no image"] * 8]) if n == 0 else None)
        )
        assert set(job.kinds()) == {"not_an_image"}
        path.write_bytes(kept)
        os.utime(path, (1000, 1000))
        assert job.run().current_failures == {}

    def test_in_a_compacted_copy_too(self, job):
        self.write(job, b"no image at all")
        job.run()
        copy = str(job.output.with_name("copy"))
        compact(CompactConfig(output=str(job.output), new=copy))
        self.write(job, encoded("PNG", 9), time.time() - 86_400)
        assert job.run(output=copy).captions == 1

    @pytest.mark.parametrize("at", [2e9, 2e13, 1.0])
    def test_in_an_output_that_knows_no_versions_file_times_tell(self, job, at):
        self.write(job, b"no image")
        job.run()
        shutil.rmtree(job.output / "_capray" / "versions")
        self.write(job, encoded("PNG", 9), at)
        assert job.run().captions == (at > 1)


def test_a_limit_comes_to_a_tar_behind_many_that_are_done(job):
    write_tars(job.input, 14, 2)
    job.run()
    write_tar(job.input / "999.tar", {f"{i}.png": encoded("PNG", i) for i in range(3)})
    assert job.run(limit=2).captions >= 2
    job.run(limit=2)
    assert len(sha256s(job)) == 31


class TestASidecarThatNamesFewer:
    """The others are said."""

    @pytest.mark.parametrize("named", [2, 5])
    def test_than_its_tar_holds(self, job, named):
        images = {f"{i}.png": encoded("PNG", i) for i in range(5)}
        write_tar(job.input / "0.tar", {**images, "4.mask.png": encoded("PNG"), "4.json": b"{}"})
        pq.write_table(pa.table({"key": [str(i) for i in range(named)]}), job.input / "0.parquet")
        summary = job.run()
        assert summary.captions == named
        assert summary.left_out == ({"unnamed": (4, f"{job.input}/0.tar#2.png")} if named == 2 else {})
        assert ("note: 4 files in tars left out: not named by the Parquet sidecar" in summary.text()) == (named == 2)

    def test_and_globs_that_leave_the_others_out(self, job):
        write_tar(job.input / "0.tar", {f"{i}.png": encoded("PNG", i) for i in range(5)})
        pq.write_table(pa.table({"key": ["0", "1", "2"]}), job.input / "0.parquet")
        assert job.run(include=("*#[03].png",)).left_out == {"unnamed": (1, f"{job.input}/0.tar#3.png")}


class TestRelativeUris:
    def test_in_a_parquet_table_start_at_the_table(self, job, tmp_path, monkeypatch):
        (photo,) = write_photos(job.input, 1)
        (other,) = write_photos(tmp_path / "elsewhere", 1, seed=1)
        assert Path(photo).name == Path(other).name
        monkeypatch.chdir(tmp_path / "elsewhere")
        table = job.input / "t.parquet"
        pq.write_table(pa.table({"uri": [Path(photo).name]}), table)
        job.run(input=str(table))
        assert sha256s(job) == {Path(photo).name: digest(photo)}

    def test_of_tables_in_two_folders_that_name_two_files_alike_are_refused(self, job):
        for name in "ab":
            (photo,) = write_photos(job.input / name, 1, seed=ord(name))
            pq.write_table(pa.table({"uri": [Path(photo).name]}), job.input / name / "t.parquet")
        with pytest.raises(ConfigError, match="--id-column"):
            job.run(input=f"{job.input}/*/t.parquet")

    def test_that_go_up_behind_a_link_are_what_they_are_to_the_system(self, job, tmp_path):
        (there,) = write_photos(tmp_path / "x", 1)
        (tmp_path / "x" / "y").mkdir()
        write_photos(job.input, 1, seed=1)
        (job.input / "link").symlink_to(tmp_path / "x" / "y")
        manifest = job.input / "list.txt"
        manifest.write_text("link/../photo-0000.jpg\n")
        job.run(input=str(manifest))
        assert sha256s(job) == {"link/../photo-0000.jpg": digest(there)}
        job.run(input=f"{job.input}/link/..", output=f"{job.output}-2")
        assert {row["image_id"] for row in read_parts(f"{job.output}-2", "captions")} == {there}


def test_an_output_moved_away_is_not_begun_anew_and_goes_on_where_it_is(job):
    write_photos(job.input, 24)
    moved = job.output.with_name("moved")
    with pytest.raises(StorageError, match="not found"):
        job.run(at_block(3, lambda: job.output.rename(moved)), part_rows=4)
    assert not job.output.exists()
    moved.rename(job.output)
    job.run()
    job.check()


def test_an_input_that_fails_wholly_ends_with_an_error_whatever_the_output_held(job, tmp_path):
    write_photos(job.input, 4)
    job.run()
    (tmp_path / "bad").mkdir()
    for i in range(3):
        (tmp_path / "bad" / f"{i}.jpg").write_bytes(b"this is no image")
    with pytest.raises(CaprayError, match="no image could be captioned, all 3"):
        job.run(input=str(tmp_path / "bad"))


def test_what_failed_at_a_place_that_is_listed_no_longer_is_read_from_where_it_is(job):
    """An id in two lists, one of which named a bad file, and names it no longer."""
    good, other = write_photos(job.input.parent / "photos", 2)
    bad = job.input.parent / "bad.jpg"
    bad.write_bytes(b"this is no image")
    job.input.mkdir()
    (job.input / "a.csv").write_text(f"image_id,uri\nx,{bad}\ny,{other}\n")
    assert job.run().current_failures == {"not_an_image": 1}
    (job.input / "b.csv").write_text(f"image_id,uri\nx,{good}\n")
    (job.input / "a.csv").write_text(f"image_id,uri\ny,{other}\n")
    assert (job.run().captions, job.run().captions) == (1, 0)
    assert sha256s(job) == {"x": digest(good), "y": digest(other)}


class TestIdsOfJsonLines:
    @pytest.mark.parametrize(
        "lines",
        ['{"image_id": "", "uri": "/a.jpg"}\n{"image_id": "", "uri": "/b.jpg"}', '{"path": "/a.jpg"}\n{"uri": "/b.jpg"}'],
    )
    def test_without_an_id_or_under_another_name(self, job, lines):
        job.input.mkdir()
        (job.input / "list.jsonl").write_text(lines)
        with pytest.raises(DataError, match=r"line 1: 'image_id'.* without a value|line 2 has its URI in 'uri'"):
            job.run(input=f"{job.input}/list.jsonl")

    @pytest.mark.parametrize("first", [0, 2])
    def test_are_in_all_records_or_in_none(self, job, first):
        photos = [Path(path).name for path in write_photos(job.input, 4)]
        records = [{"uri": name, "image_id": f"id-{i}"} for i, name in enumerate(photos)]
        del records[first]["image_id"]
        manifest = job.input / "list.jsonl"
        manifest.write_text("\n" + "".join(f"{json.dumps(record)}\n" for record in records))
        with pytest.raises(DataError, match=rf"list\.jsonl', line {3 if first == 0 else 4}\b.*'image_id'"):
            job.run(input=str(manifest))
        job.run(input=str(manifest), id_column="uri")
        assert set(sha256s(job)) == set(photos)

    def test_a_number_and_its_text_are_one(self, job):
        photos = [Path(path).name for path in write_photos(job.input, 2)]
        manifest = job.input / "list.jsonl"
        manifest.write_text(
            "".join(json.dumps({"uri": u, "image_id": i}) + "\n" for u, i in zip(photos, (1, "1"), strict=True))
        )
        summary = job.run(input=str(manifest))
        assert (summary.captions, summary.duplicates) == (1, 1)


class TestWhatOfATarIsAnImage:
    @pytest.fixture(scope="class")
    def files(self) -> dict[str, bytes]:
        formats = ("a.tga TGA", "b.ico ICO", "c.pcx PCX", "d.sgi SGI", "e.dib BMP", "f.jpf JPEG2000", "g BMP", "h/i.x PPM")
        rgb = {name: encoded(kind) for name, kind in map(str.split, formats)}
        return rgb | {"grey.pgm": encoded("PPM", mode="L"), "bits.pbm": encoded("PPM", mode="1")}

    def test_it_is_what_is_one_in_a_folder(self, job, files, tmp_path):
        for name, data in files.items():
            path = tmp_path / "photos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        folder = job.run(input=str(tmp_path / "photos"), output=str(tmp_path / "beside"))
        write_tar(job.input / "0.tar", files)
        assert job.run().captions == folder.captions == len(files)
        prefix = f"{job.input}/0.tar#"
        assert {name.removeprefix(prefix) for name in sha256s(job)} == set(files)

    def test_what_is_none_is_counted_but_for_what_lies_beside_images(self, job):
        others = {"x.dat": b"BM is no bitmap", "notes": b"P5 Piccadilly", "readme.txt": b"BMW", "0.cls": b"3", "empty": b""}
        for number in range(2):
            write_tar(job.input / f"{number}.tar", {"0.png": encoded("PNG", number), **others})
        first = job.run(limit=1)
        for summary in (job.run(), job.run()):
            number, name = summary.left_out["no_image"]
            assert (number, name.rpartition("#")[2]) == (6, "x.dat")
            assert (
                "note: 6 files in tars left out: without an image's name, and not beginning like an image" in summary.text()
            )
        assert (first.captions, summary.captioned_before) == (1, 2)


class TestOddInputs:
    """What no image is lost in, and none takes the place of another."""

    def test_sparse_members_of_a_tar(self, job, tmp_path):
        """`tar -S` packs them: read by their places they were other bytes than in a first reading."""
        photos = tmp_path / "photos"
        for i in range(0, 120, 40):
            for path in write_photos(photos / str(i), 40, seed=i):
                Path(path).rename(photos / f"{i}-{Path(path).name}")
            holes = photos / f"{i}-sparse.bmp"
            Image.new("RGB", (100, 100)).save(holes)
            data = holes.read_bytes()
            with holes.open("wb") as file:
                file.write(data[:4096])
                file.truncate(len(data) - 1)
                file.seek(len(data) - 1)
                file.write(data[-1:])
            (photos / str(i)).rmdir()
        names = sorted(path.name for path in photos.iterdir())
        job.input.mkdir()
        subprocess.run(["tar", "-S", "-cf", str(job.input / "0.tar"), "-C", str(photos), *names], check=True)
        summary = job.run()
        assert summary.passes == 2, "some were read by their places"
        assert sha256s(job) == {f"{job.input}/0.tar#{name}": digest(photos / name) for name in names}

    def test_a_link_to_itself_and_a_linked_folder_of_tars(self, job, tmp_path):
        write_tars(tmp_path / "elsewhere", 1, 3)
        write_tars(job.input, 1, 2)
        (job.input / "linked").symlink_to(tmp_path / "elsewhere")
        (job.input / "again").symlink_to(job.input)
        assert job.run().captions == 5
        write_photos(tmp_path / "images", 1)
        (tmp_path / "images" / "a.jpg").symlink_to("a.jpg")
        output = str(tmp_path / "out2")
        assert job.run(input=str(tmp_path / "images"), output=output).current_failures == {"missing": 1}

    def test_images_behind_a_thousand_tars_are_not_left_out_unsaid(self, job, tmp_path, monkeypatch):
        monkeypatch.setattr("capray.inputs._SAMPLE", 3)
        write_tars(job.input, 3, 1)
        write_photos(job.input / "z", 2)
        with pytest.raises(ConfigError, match="tar files .* and files of other kinds .*--input-kind tar"):
            job.run()
        assert job.run(input_kind="tar").captions == 3

    def test_what_is_dropped_among_tars_is_the_users_to_judge(self, job):
        """Once the tars were read as images of their own, and their images never."""
        write_tars(job.input, 3, 4)
        job.run(limit=4)
        (job.input / "preview.jpg").write_bytes(encoded("JPEG"))
        with pytest.raises(ConfigError, match=r"tar files .* and files of other kinds \('.*preview.jpg'") as caught:
            job.run()
        assert caught.value.exit_code == 2
        assert job.run(exclude=("preview.jpg",)).captioned_before == 4
        assert len(sha256s(job)) == 12
        assert job.run(input_kind="tar").captions == 0

    def test_tars_that_turn_up_late_among_images_are_faults(self, job, monkeypatch):
        monkeypatch.setattr("capray.inputs._SAMPLE", 3)
        write_photos(job.input, 5)
        write_tars(job.input / "z", 2, 1)  # And its two photos beside it.
        (job.input / "z" / "images.PARQUET").touch()
        with pytest.raises(DataError, match=r"3 files or folders .* lies among images: caption it as another input"):
            job.run()
        assert len(sha256s(job)) == 7 and not job.kinds()
        with monkeypatch.context() as patch:  # Moved away, as it says; the listing is not closed, since it has a limit.
            patch.setattr("capray.inputs._SAMPLE", 3)
            os.rename(job.input / "z", job.input.with_name("z"))
            write_photos(job.input, 6)
            assert job.run(limit=1).status == "complete"
            os.rename(job.input.with_name("z"), job.input / "z")
        assert job.run(exclude=("*.tar", "*.PARQUET")).status == "complete"
        with pytest.raises(DataError, match="images.PARQUET' lies among tars and has none beside it"):
            job.run(exclude=("photo*",))

    def test_a_table_among_tars_that_has_no_tar_is_a_fault(self, job):
        write_tars(job.input, 1, 2)
        pq.write_table(pa.table({"key": ["a"]}), job.input / "001.parquet")
        with pytest.raises(DataError, match=r"001.parquet' lies among tars and has none beside it"):
            job.run()
        assert len(sha256s(job)) == 2
        assert job.run(exclude=("*001.parquet",)).status == "complete"

    def test_a_sidecar_s_image_is_the_one_of_its_very_name_wherever_it_stands(self, job):
        names = ["1.jpg", "2.png", "1.png", "2.jpg", "3.png"]
        images = {name: encoded("PNG" if name.endswith("png") else "JPEG", 30 * i) for i, name in enumerate(names)}
        write_tar(job.input / "0.tar", images)
        pq.write_table(pa.table({"key": ["1", "2", "3"]}), job.input / "0.parquet")
        job.run()
        found = {"1.jpg": "1.jpg", "2.jpg": "2.jpg", "3.jpg": "3.png"}
        assert sha256s(job) == {
            f"{job.input}/0.tar#{image_id}": hashlib.sha256(images[name]).digest() for image_id, name in found.items()
        }

    def test_members_of_names_that_only_look_alike(self, job):
        names = ["x\udcff.jpg", r"x\xff.jpg", "y.jpg"]
        images = {name: encoded("JPEG", 30 * i) for i, name in enumerate(names)}
        write_tar(job.input / "0.tar", images, errors="surrogateescape")
        assert job.run().images == 3
        assert {image_id.rpartition("#")[2] for image_id in sha256s(job)} == {r"x\xff.jpg", r"x\x5cxff.jpg", "y.jpg"}
        assert job.run().captions == 0
        verified = verify(VerifyConfig(output=str(job.output), check_bytes=3))
        assert not verified.problems and verified.counts["images_same"] == 3

    def test_links_among_the_matches_of_a_glob(self, job, tmp_path):
        write_tars(job.input, 1, 2)
        elsewhere = tmp_path / "elsewhere" / "deep"
        elsewhere.parent.mkdir()
        write_tars(elsewhere, 2, 3)
        (job.input / "linked.tar").symlink_to(elsewhere / "001.tar")
        (job.input / "nowhere.tar").symlink_to(tmp_path / "away.tar")
        with pytest.raises(DataError, match="nowhere.tar"):
            job.run(input=f"{job.input}/*.tar")
        assert len(sha256s(job)) == 5
        (job.input / "nowhere.tar").unlink()
        (job.input / "folder").symlink_to(elsewhere)
        (elsewhere / "again").symlink_to(elsewhere)
        for pattern in ("*/*.tar", "**/0*.tar"):
            output = f"{job.output}-{len(pattern)}"
            job.run(input=f"{job.input}/{pattern}", output=output)
            found = {row["image_id"].rpartition("#")[0] for row in read_parts(output, "captions")}
            inside = {f"{job.input}/folder/000.tar", f"{job.input}/folder/001.tar"}
            assert found == inside | ({f"{job.input}/000.tar"} if "**" in pattern else set())

    def test_tars_behind_a_link_to_a_folder_with_a_hidden_name(self, job):
        write_tars(job.input, 1, 1)
        (job.input / "_versions").mkdir()
        write_tars(job.input / "_versions" / "5", 1, 2)
        (job.input / "current").symlink_to("_versions/5")
        assert job.run().captions == 3

    def test_images_behind_a_link_with_a_name_that_hides_tables(self, job, tmp_path):
        write_photos(tmp_path / "elsewhere", 2)
        job.input.mkdir()
        (job.input / "_photos").symlink_to(tmp_path / "elsewhere")
        assert job.run().captions == 2

    def test_folders_on_a_globs_way_that_are_away(self, job, tmp_path):
        write_tars(job.input, 1, 2)
        (job.input / "b").symlink_to(tmp_path / "away")
        with pytest.raises(StorageError, match=r"/b' cannot be listed|permission denied to .*/b"):
            job.run(input=f"{job.input}/*/*.tar")
        (job.input / "c").mkdir()
        write_tar(job.input / "c" / "1.tar", {"1.png": encoded("PNG")})
        assert job.run(input=f"{job.input}/*/*.tar", exclude=("b",)).captions == 1
        (job.input / "b").rename(job.input / ".#b")
        assert job.run(input=f"{job.input}/*/*.tar").captions == 0

    @pytest.mark.parametrize("pattern", ["", "/**/*.tar"])
    def test_links_to_folders_of_tars_that_are_away(self, job, tmp_path, pattern):
        write_tars(job.input, 1, 2)
        (job.input / "b").symlink_to(tmp_path / "away")
        with pytest.raises(StorageError, match=r"/b' cannot be listed, or links to nowhere"):
            job.run(input=f"{job.input}{pattern}")

    @pytest.mark.parametrize("pattern", ["", "/*/*.tar", "/**/*.tar", "late"])
    def test_a_mount_that_does_not_answer_is_not_passed_over(self, job, monkeypatch, pattern):
        """As a FUSE file system does whose process has died."""
        if pattern == "late":
            monkeypatch.setattr("capray.inputs._SAMPLE", 4)
            pattern = ""
            (job.input / "a").mkdir(parents=True)
            for i in range(9):
                (job.input / "a" / f"{i}_stats.json").touch()
        for name in "ab":
            write_tar(job.input / name / "1.tar", {"1.png": encoded("PNG")})
        dead = str(job.input / "b")

        def answering(function):
            def call(path, *arguments, **options):
                if isinstance(path, str) and (path + "/").startswith(dead + "/"):
                    raise OSError(errno.ENOTCONN, "Transport endpoint is not connected", path)
                return function(path, *arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("stat", "lstat", "scandir", "listdir"):
                patch.setattr(os, name, answering(getattr(os, name)))
            with pytest.raises(StorageError, match=r"/b.* cannot be listed|not connected"):
                job.run(input=f"{job.input}{pattern}")
        assert job.run(input=f"{job.input}{pattern}").captions == 2
        with pytest.raises(ConfigError, match="no file matches"):
            job.run(input=f"{job.input}/nowhere/**/*.tar")

    def test_hidden_tables_are_counted_once_though_the_first_is_listed_again(self, job):
        job.input.mkdir()
        photos = [Path(path).read_bytes() for path in write_photos(job.input.parent / "photos", 6)]
        for name, begin in (("a", 0), ("b", 3), ("_c", 0)):
            table = pa.table({"image_id": [f"{name}{i}" for i in range(3)], "image": photos[begin : begin + 3]})
            pq.write_table(table, job.input / f"{name}.parquet")
        assert job.run(limit=1).hidden_files == 1
        pq.write_table(pa.table({"image_id": ["new"], "image": photos[:1]}), job.input / "a.parquet")
        assert job.run().hidden_files == 1

    def test_a_part_behind_a_link_is_there(self, job):
        write_photos(job.input, 12)
        job.run()
        part = next((job.output / "captions").iterdir())
        moved = job.output.with_name("moved.parquet")
        part.rename(moved)
        part.symlink_to(moved)
        assert (job.run().captions, job.run().captioned_before) == (0, 12)

    def test_an_id_in_a_tar_and_in_a_table_stands_once(self, job, tmp_path):
        write_tars(job.input, 1, 3)
        photos = [Path(path).read_bytes() for path in write_photos(tmp_path / "others", 4, seed=9)]
        ids = [*(f"{job.input}/000.tar#photo-{i:04d}.jpg" for i in range(2)), "x", "y"]
        table = tmp_path / "t.parquet"
        pq.write_table(pa.table({"image_id": ids, "image": photos}), table)
        summary = job.run(also=(str(table),))
        assert (summary.captions, summary.captioned_before, summary.duplicates) == (5, 0, 2)
        assert len(sha256s(job)) == 5

    def test_an_id_of_two_sidecars_that_two_shards_caption_is_found_by_verify(self, job):
        write_tars(job.input, 12, 1)
        for tar in job.input.glob("*.tar"):
            pq.write_table(pa.table({"key": ["photo-0000"], "name": ["the same"]}), tar.with_suffix(".parquet"))
        outputs = tuple(f"{job.output}-{i}" for i in (1, 2))
        for i, output in enumerate(outputs, 1):
            assert job.run(output=output, id_column="name", shard=f"{i}/2").captions == 1
        (problem,) = verify(VerifyConfig(output=outputs[0], also=outputs[1:])).problems
        assert problem.startswith("1 id has more than one caption: the same (")

    @pytest.mark.parametrize("is_tar", [True, False])
    def test_globs_that_choose_nothing_are_a_mistake(self, job, is_tar):
        if is_tar:
            write_tars(job.input, 2, 2)
        else:
            write_photos(job.input, 2)
        for options in ({"include": ("*.nope",)}, {"exclude": ("*.jpg", "*.tar#*")}):
            with pytest.raises(ConfigError, match=r"no images at .*/in' that --include and --exclude choose"):
                job.run(**options)
        assert job.run().captions in (2, 4)

    def test_nothing_but_junk_is_a_fault_each_time(self, job):
        """Fewer than what stops a job early."""
        job.input.mkdir()
        for i in range(3):
            (job.input / f"{i}.jpg").write_text("version https://git-lfs.github.com/spec/v1\n")
        for _ in range(2):
            with pytest.raises(CaprayError, match=r"no image .*all 3 .*failed.*not_an_image: not an image") as caught:
                job.run()
            assert caught.value.exit_code == 1
        write_photos(job.input, 1)
        assert job.run().captions == 1

    def test_a_shard_without_images(self, job):
        write_tars(job.input, 1, 2)
        shards = [job.run(shard=f"{i}/3", output=f"{job.output}-{i}") for i in (1, 2, 3)]
        assert sorted(summary.captions for summary in shards) == [0, 0, 2]
        outputs = [f"{job.output}-{i}" for i in (1, 2, 3)]
        verification = verify(VerifyConfig(output=outputs[0], also=tuple(outputs[1:]), against=(str(job.input),)))
        assert not verification.problems

    def test_a_file_whose_name_is_no_utf8(self, job):
        """Its id has the bytes in words; it is there all the same."""
        (photo,) = write_photos(job.input, 1)
        os.rename(photo, os.fsencode(job.input) + b"/caf\xe9.jpg")
        assert job.run().captions == 1
        assert list(sha256s(job)) == [f"{job.input}/caf\\xe9.jpg"]

    def test_names_that_are_no_utf8_and_names_that_look_like_their_ids(self, job):
        names = [b"\xff", rb"\xff", rb"\xe9" + b"\xfe", b"\xe9\xfe", rb"\x5c", rb"\x5cxff", rb"a\b", rb"\x41", b"ok"]
        photos = write_photos(job.input, len(names))
        wanted = {digest(path) for path in photos}
        for photo, name in zip(photos, names, strict=True):
            os.rename(photo, os.fsencode(job.input) + b"/" + name)
        summary = job.run()
        assert (summary.captions, summary.duplicates) == (len(names), 0)
        captions = sha256s(job)
        assert set(captions.values()) == wanted
        ids = {name.rpartition("/")[2] for name in captions}
        assert ids >= {r"\xff", r"\x5cxff", r"\x5cxe9\xfe", r"a\b", r"\x41", "ok"}

    @pytest.mark.parametrize("kind", ["tar", "sidecar", "table", "list"])
    def test_containers_whose_names_are_no_utf8(self, job, tmp_path, kind):
        folder = job.input / os.fsdecode(b"\xe9")
        folder.mkdir(parents=True)
        for name, shade in ((os.fsdecode(b"caf\xe9"), 30), (r"caf\xe9", 60), ("plain", 90)):
            data = encoded("JPEG", shade)
            path = folder / f"{name}.parquet"
            if kind == "table":
                (tmp_path / "table").write_bytes(b"")
                pq.write_table(pa.table({"image_id": [str(shade)], "image": [data]}), tmp_path / "table")
                (tmp_path / "table").rename(path)
            elif kind == "list":
                (folder / f"{shade}.jpg").write_bytes(data)
                (tmp_path / "lists").mkdir(exist_ok=True)
                path = tmp_path / "lists" / f"{name}.csv"
                path.write_text(f"uri\n{job.input}/\\xe9/{shade}.jpg\n")
            else:
                write_tar(path.with_suffix(".tar"), {"0.jpg": data})
                if kind == "sidecar":
                    pq.write_table(pa.table({"key": ["0"]}), tmp_path / "table")
                    (tmp_path / "table").rename(path)
        source = str(tmp_path / "lists" if kind == "list" else job.input)
        assert job.run(input=source).captions == 3
        assert job.run(input=source).captions == 0
        verified = verify(VerifyConfig(output=str(job.output), against=(source,), check_bytes=3))
        assert not verified.problems and verified.counts["images_same"] == 3
        if kind in ("tar", "sidecar"):
            names = {name.removeprefix(source) for name in sha256s(job)}
            assert names == {rf"/\xe9/{name}.tar#0.jpg" for name in (r"caf\xe9", r"caf\x5cxe9", "plain")}

    def test_a_list_whose_name_is_no_utf8_is_read_again_when_it_was_rewritten(self, job, tmp_path):
        photos = write_photos(tmp_path / "photos", 4)
        job.input.mkdir()
        manifest = job.input / os.fsdecode(b"caf\xe9.csv")
        manifest.write_text(f"uri\n{photos[0]}\n")
        add = lambda: manifest.write_text("uri\n" + "\n".join(photos) + "\n")  # noqa: E731
        assert job.run(at_block(1, add)).captions == 4

    def test_photos_whose_names_look_like_those_of_tars_and_their_members(self, job):
        for photo, name in zip(write_photos(job.input, 4), ("x.tar#1.jpg", "x.tar.jpg", "y.tgz.PNG", "z.jpg"), strict=True):
            os.rename(photo, job.input / name)
        assert job.run().captions == 4
        verified = verify(VerifyConfig(output=str(job.output), check_bytes=10))
        assert not verified.problems and verified.counts["images_same"] == 4
        (job.input / "x.tar#1.jpg").unlink()
        (problem,) = verify(VerifyConfig(output=str(job.output), check_bytes=10)).problems
        assert "x.tar#1.jpg cannot be read again" in problem

    def test_an_input_whose_name_is_no_utf8(self, job, tmp_path):
        with pytest.raises(ConfigError, match="no UTF-8"):
            job.run(input=os.fsdecode(bytes(tmp_path) + b"/\xff"))

    def test_a_list_named_like_a_glob_that_is_gone_is_not_another_list(self, job):
        photos = write_photos(job.input, 4)
        lists = [job.input.with_name(name) for name in ("list[1].txt", "list1.txt")]
        for number, each in enumerate(lists):
            each.write_text("\n".join(photos[2 * number :][:2]))
        assert job.run(input=str(lists[0])).captions == 2
        assert job.run(input=f"{job.input.parent}/list[01].txt").captions == 2, "a glob is one"
        lists[0].unlink()
        with pytest.raises(TryAgain, match=r"list\[1\]\.txt' was a file that a run on this output read, and is gone"):
            job.run(input=str(lists[0]))

    def test_an_input_that_was_there_before(self, job):
        write_photos(job.input, 4)
        job.run(limit=2)
        job.input.rename(job.input.with_name("away"))
        for _ in range(2):
            with pytest.raises(TryAgain, match="could read it before: is a mount away"):
                job.run()
            job.input.mkdir(exist_ok=True)
        job.input.rmdir()
        job.input.with_name("away").rename(job.input)
        job.run()
        job.check()
        with pytest.raises(ConfigError, match="nothing at"):
            job.run(input=str(job.input.with_name("mistyped")))
        with pytest.raises(ConfigError, match="does not apply"):
            job.run(split="dev")  # A mistake stays one.

    def test_an_output_is_no_input(self, job):
        write_photos(job.input, 1)
        job.run()
        with pytest.raises(ConfigError, match="is a captioning output: name the images"):
            job.run(input=str(job.output), output=str(job.output.with_name("another")))

    def test_an_input_of_tars_that_has_none_now(self, job):
        """All its tars are on a mount, say, at whose place a file says that it is away."""
        write_tars(job.input, 2, 2)
        job.run(limit=1)
        aside = job.input.rename(job.input.with_name("aside"))
        write_photos(job.input, 1)
        with pytest.raises(TryAgain, match=r"was read as tar .* now holds none: .* give --input-kind images"):
            job.run()
        shutil.rmtree(job.input)
        aside.rename(job.input)
        assert job.run().current_failures == {}

    @pytest.mark.parametrize("retry_failed", [None, ()])
    def test_a_limit_comes_to_all_images_in_the_end(self, job, retry_failed):
        for path in write_photos(job.input, 8)[:3]:
            Path(path).write_bytes(b"junk")
        for _ in range(4):
            job.run(limit=2, retry_failed=retry_failed)
        assert len(sha256s(job)) == 5 and len(current_failures(str(job.output))) == 3

    def test_keys_of_a_sidecar_with_dots(self, job, tmp_path):
        photos = write_photos(tmp_path / "photos", 3)
        images = {f"img.{letter}.jpg": Path(photo).read_bytes() for letter, photo in zip("abc", photos, strict=True)}
        write_tar(job.input / "0.tar", images)
        pq.write_table(pa.table({"key": [f"img.{x}" for x in "abc"], "sid": [*"ABC"]}), job.input / "0.parquet")
        job.run(id_column="sid")
        assert sha256s(job) == {name: digest(photo) for name, photo in zip("ABC", photos, strict=True)}

    @pytest.mark.parametrize("has_sidecar", [False, True])
    @pytest.mark.parametrize("damage", ["zeros in the midst", "zeros to the end"])
    def test_a_tar_with_zeros(self, job, damage, has_sidecar):
        write_tars(job.input, 1, 100)
        tar = job.input / "000.tar"
        if has_sidecar:
            pq.write_table(pa.table({"key": [f"photo-{i:04d}" for i in range(100)]}), tar.with_suffix(".parquet"))
        with tarfile.open(tar) as file:
            at = file.getmembers()[5].offset
        whole = tar.read_bytes()
        end = at + 512 if damage == "zeros in the midst" else len(whole)
        tar.write_bytes(whole[:at] + bytes(end - at) + whole[end:])
        if has_sidecar:
            assert job.run().current_failures == {"unreadable_storage": 95}
        else:
            with pytest.raises(DataError, match=r"000\.tar.* damaged, or no tar"):
                job.run()
        tar.write_bytes(whole)
        assert job.run().current_failures == {}
        assert len(sha256s(job)) == 100

    def test_two_tars_one_behind_the_other(self, job):
        write_tars(job.input, 2, 3)
        first, second = job.input / "000.tar", job.input / "001.tar"
        first.write_bytes(first.read_bytes() + second.read_bytes())
        with pytest.raises(DataError, match="something follows its end"):
            job.run()

    def test_links_in_a_tar_have_rows(self, job, tmp_path):
        write_tars(job.input, 1, 2)
        with tarfile.open(job.input / "000.tar", "a") as tar:
            link = tarfile.TarInfo("linked.jpg")
            link.type, link.linkname = tarfile.LNKTYPE, "photo-0000.jpg"
            tar.addfile(link)
        summary = job.run()
        assert (summary.captions, summary.current_failures) == (2, {"unsupported_format": 1})
        (failure,) = job.failures()
        assert failure["image_id"].endswith("#linked.jpg") and "--hard-dereference" in failure["message"]

    def test_a_table_with_another_type_of_images(self, job, tmp_path):
        job.input.mkdir()
        photos = [Path(path).read_bytes() for path in write_photos(tmp_path / "photos", 4)]
        for number, held in enumerate((photos[:2], [{"bytes": data, "path": ""} for data in photos[2:]])):
            ids = [f"{number}-{i}" for i in range(2)]
            pq.write_table(pa.table({"image_id": ids, "image": held}), job.input / f"{number}.parquet")
        with pytest.raises(DataError, match=r"column 'image' of .*1\.parquet' holds struct"):
            job.run()
        pq.write_table(pa.table({"image_id": ["1-0", "1-1"], "image": photos[2:]}), job.input / "1.parquet")
        assert (job.run().current_failures, len(sha256s(job))) == ({}, 4)

    def test_ids_that_are_no_utf_8(self, job, tmp_path):
        job.input.mkdir()
        ids = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xe9\xe9"))
        pq.write_table(pa.table({"image_id": ids, "image": [b"x"]}), job.input / "latin.parquet")
        with pytest.raises(DataError, match=r"latin\.parquet.* UTF8"):
            job.run()

    def test_an_input_that_is_of_another_kind_now(self, job, tmp_path):
        for path in write_photos(tmp_path / "photos", 6):
            job.input.mkdir(exist_ok=True)
            shutil.copy(path, job.input)
        job.run(limit=2)
        shutil.rmtree(job.input)
        job.input.mkdir()
        photos = [Path(path).read_bytes() for path in write_photos(tmp_path / "others", 4, seed=1)]
        pq.write_table(pa.table({"image_id": [*"abcd"], "image": photos}), job.input / "t.parquet")
        summary = job.run()
        assert (summary.images, summary.captions, summary.current_failures) == (4, 4, {})

    def test_a_photo_that_was_too_large_when_it_was_listed(self, job):
        paths = write_photos(job.input, 20)
        small = Path(paths[-1]).read_bytes()
        Path(paths[-1]).write_bytes(small + bytes(50_000))
        job.run(limit=4, max_image_bytes=40_000)
        Path(paths[-1]).write_bytes(small)
        assert job.run(max_image_bytes=40_000).current_failures == {}
        job.check()

    def test_a_tar_in_two_inputs(self, job):
        write_tars(job.input, 1, 6)
        summary = job.run(also=(str(job.input / "000.tar"),))
        assert (summary.images, summary.captions, summary.captioned_before) == (6, 6, 0)
        job.check()

    @pytest.mark.parametrize("text", ["", '{"model_id": ', "[]"])
    def test_a_damaged_job_json(self, job, text):
        write_photos(job.input, 4)
        job.run(limit=2)
        (job.output / "_capray" / "job.json").write_text(text)
        with pytest.raises(DataError, match=r"job\.json is damaged .*: put it back, or choose another output"):
            job.run()


class TestAnOutputThatIsAllButDone:
    def test_new_images_are_found_beside_a_shard_that_cannot_be_read(self, job, tmp_path):
        write_tars(job.input, 1, 3)
        (job.input / "bad.tar").write_bytes(b"no tar" * 1000)
        photos = tmp_path / "new"
        write_photos(photos, 2)
        for _ in range(2):
            with pytest.raises(DataError, match=r"bad\.tar"):
                job.run(also=(str(photos),))
        write_photos(photos / "more", 4, seed=1)
        with pytest.raises(DataError, match=r"bad\.tar"):
            job.run(also=(str(photos),))
        assert len(read_parts(str(job.output), "captions")) == 3 + 2 + 4

    def test_one_image_that_stays_denied_ends_no_run(self, job, monkeypatch):
        write_photos(job.input, 5)
        denied = job.input / "photo-0003.jpg"
        read_image = reader.read_image

        def refusing(uri, *arguments):
            if uri == str(denied):
                raise ImageError("denied", "no")
            return read_image(uri, *arguments)

        monkeypatch.setattr(reader, "read_image", refusing)
        for _ in range(2):
            assert job.run().current_failures == {"denied": 1}

    def test_many_bad_images_are_tried_again(self, job):
        write_photos(job.input, 30)
        job.run()
        for number in range(250):
            (job.input / f"bad-{number}.jpg").write_bytes(b"no image")
        assert job.run().current_failures == {"not_an_image": 250}
        assert job.run(retry_failed=()).current_failures == {"not_an_image": 250}


class TestWaves:
    @pytest.fixture
    def passes(self, monkeypatch) -> list[int]:
        """The number of images of each pass."""
        passes: list[int] = []
        tables = LocalExecutor.tables

        def counted(self, work, *arguments):
            passes.append(work.num_images)
            return tables(self, work, *arguments)

        monkeypatch.setattr(LocalExecutor, "tables", counted)
        return passes

    def test_captioning_begins_before_all_is_listed_and_each_wave_is_larger(self, job, passes, monkeypatch):
        for name in ("FIRST_CHUNK_ROWS", "MAX_CHUNK_ROWS"):
            monkeypatch.setattr(listing, name, 10)
        monkeypatch.setattr(files, "ROWS_PER_PAGE", 10)
        write_atomic = writer.write_atomic

        def slow(location, *arguments) -> None:
            time.sleep(0.05 if "chunk-" in location.path else 0)
            write_atomic(location, *arguments)

        monkeypatch.setattr(writer, "write_atomic", slow)
        write_photos(job.input, 180)
        job.run()
        job.check()
        assert sum(passes) == 180 and len(passes) <= run_module.MAX_WAVES
        assert passes[0] < 180
        for number in range(1, len(passes) - 1):
            assert passes[number] >= (run_module.WAVE_GROWTH - 1) * sum(passes[:number])

    def test_a_pass_that_waits_for_lost_actors_is_planned_again(self, job, passes, monkeypatch):
        write_photos(job.input, 30)
        counted = LocalExecutor.tables
        stalls = [True]

        @contextmanager
        def stalling(self, *arguments):
            with counted(self, *arguments) as tables:

                def some():
                    for number, table in enumerate(tables):
                        if stalls and number == 3:
                            stalls.clear()
                            raise Stalled
                        yield table

                yield some()

        monkeypatch.setattr(LocalExecutor, "tables", stalling)
        job.run()
        job.check()
        assert len(passes) == 2 and passes[0] == 30 and 0 < passes[1] < 30


class TestLimit:
    def test_attempts_so_many_and_the_same_command_goes_on(self, job):
        write_photos(job.input, 30)
        assert [job.run(limit=12).captions for _ in range(3)] == [12, 12, 6]
        job.check()

    def test_wherever_they_lie(self, job):
        """Tars without sidecars: a run goes on with further shards until it has its number."""
        write_tars(job.input, num_tars=8, num_photos=3)
        assert 12 <= job.run(limit=12).captions <= 15
        job.run()
        job.check()


class TestSecondLooks:
    def test_what_is_missing_twice_is_final(self, job):
        paths = write_photos(job.input, 20)
        gone = Path(paths[-1])
        summary = job.run(LocalExecutor(before_unit=lambda n: gone.unlink(missing_ok=True)))
        assert summary.current_failures == {"missing": 1} and summary.second_looks == 1
        assert job.kinds() == ["unreadable_storage", "missing"]
        assert job.failures()[0]["message"].startswith("missing, to be looked at again")

    def test_what_is_back_for_the_second_is_captioned(self, job):
        paths = write_photos(job.input, 20)
        path, aside = Path(paths[0]), job.input.parent / "aside"
        path.rename(aside)
        aside.rename(path)

        def hide(number: int) -> None:
            if number == 0:
                path.rename(aside)

        def show(number: int) -> None:
            if number == 2:
                aside.rename(path)

        job.run(LocalExecutor(before_unit=hide, after_block=show))
        job.check()
        assert job.kinds() == ["unreadable_storage"]

    def test_a_truncated_file_is_looked_at_again_too(self, job):
        paths = write_photos(job.input, 8)
        Path(paths[3]).write_bytes(Path(paths[3]).read_bytes()[:-300])
        assert job.run().current_failures == {"truncated": 1}
        assert job.kinds() == ["unreadable_storage", "truncated"]


class TestMountsBelowTheInput:
    """A file of one mount says nothing of another: images of one that is away are waited for, and never ``missing``."""

    @pytest.fixture
    def disk(self, job) -> Path:
        """A disk that is linked into the input, beside images of the input's own."""
        write_photos(job.input / "a", 8)
        disk = job.input.with_name("disk")
        write_photos(disk, 8, seed=1)
        (job.input / "b").symlink_to(disk)
        return disk

    @contextmanager
    def away(self, disk: Path, is_empty: bool):
        aside = disk.with_name("aside")
        disk.rename(aside)
        if is_empty:
            disk.mkdir()
        yield
        if is_empty:
            disk.rmdir()
        aside.rename(disk)

    @pytest.mark.parametrize("is_empty", [True, False])
    def test_away_when_a_run_goes_on(self, job, disk, is_empty):
        job.run(limit=4)
        with (
            self.away(disk, is_empty),
            pytest.raises(TryAgain, match=r"/b is empty, and|/b links to what is not there.*same command again"),
        ):
            job.run(patience_seconds=0.3)
        summary = job.run()
        assert (summary.captioned_before + summary.captions, summary.current_failures) == (16, {})
        assert "missing" not in job.kinds()

    @pytest.mark.parametrize("kind", ["tars", "lists"])
    def test_containers_away_when_a_run_goes_on(self, job, kind, monkeypatch):
        monkeypatch.setattr(listing, "AWAY_SECONDS", 0.1)
        for i in range(3):
            photos = write_photos(job.input.parent / f"photos-{i}", 4, seed=i)
            if kind == "tars":
                write_tar(job.input / f"{i}" / "x.tar", {Path(path).name: Path(path).read_bytes() for path in photos})
            else:
                (job.input / f"{i}").mkdir(parents=True)
                (job.input / f"{i}" / "x.csv").write_text("uri\n" + "\n".join(photos))
        job.run(limit=4)
        with self.away(job.input / "2", True), pytest.raises(TryAgain, match="2 is empty, and"):
            job.run()
        assert job.run().current_failures == {}
        assert len(sha256s(job)) == 12

    @pytest.mark.parametrize(
        "where", ["below", "linked", "the input", "above the input", "a list's", "a list's top", "a list's file://", "bound"]
    )
    def test_away_from_a_mountpoint_that_holds_something_when_another_process_goes_on(self, job, mount, monkeypatch, where):
        is_linked = where == "linked"
        places = {"linked": job.input.with_name("disk"), "the input": job.input, "above the input": job.input.parent / "m"}
        mounted = places.get(where, job.input / "b")
        job.input.with_name("real").mkdir()
        monkeypatch.setattr("capray.inputs._SAMPLE", 4)
        is_all = where in ("the input", "above the input")
        if not is_all:
            write_photos(job.input / "a", 8)
        mount(mounted, bound_to=job.input.with_name("real") if where == "bound" else None)
        deep = mounted if where == "a list's top" else mounted / "deep"
        content = {Path(path): Path(path).read_bytes() for path in write_photos(deep, 8, seed=1)}
        if is_linked:
            (job.input / "b").symlink_to(mounted)
        source = str(deep if where == "above the input" else job.input)
        if where.startswith("a list's"):
            source, scheme = f"{job.input.with_name('list')}.txt", "file://" if "://" in where else ""
            Path(source).write_text("\n".join(f"{scheme}{path}" for path in sorted(job.input.rglob("*.jpg"))))
        job.run(limit=4, input=source)
        subprocess.run(["umount", "-l", mounted], check=True)
        (mounted / "NOT-MOUNTED").touch()
        if where == "above the input":
            write_photos(deep, 1, seed=9)[0]  # Downloaded while the disk was away, say.
            os.rename(deep / "photo-0000.jpg", deep / "other.jpg")
        monkeypatch.setattr(witnesses_module.witnesses, "_folders", {})
        with pytest.raises(TryAgain, match="was a mount when its images were listed"):
            job.run(patience_seconds=0.2, input=source)
        deep.mkdir(exist_ok=True)
        for path, data in content.items():
            path.write_bytes(data)
        assert job.run(input=source).current_failures == {}, "what is there is read, mount or none"
        assert len(sha256s(job)) == (8 if is_all else 16)

    @pytest.mark.parametrize("is_resumed", [False, True])
    def test_away_while_its_folders_are_listed(self, job, mount, monkeypatch, is_resumed):
        """What was listed then is not all there is."""
        write_photos(job.input / "a", 2)
        mounted, walk = mount(job.input / "b"), files.walk
        write_photos(mounted / "deep", 2)
        (source,) = open_sources((str(job.input),), SourceSettings())

        def leave() -> None:
            subprocess.run(["umount", "-l", mounted], check=True)
            (mounted / "NOT-MOUNTED").touch()

        def leaving(*of):
            for number, each in enumerate(walk(*of)):
                if number == 1:
                    leave()
                yield each

        unit = f"1:{mounted}/deep" if is_resumed else f"0:{job.input}"
        if is_resumed:
            leave()
        else:
            monkeypatch.setattr(files, "walk", leaving)
        with pytest.raises(StorageUnavailable, match=r"in/b was a mount when its images were listed.*--relist"):
            list(source.pages(unit))

    def test_one_behind_a_link_goes_away_while_it_is_listed_first(self, job, mount, monkeypatch):
        write_photos(job.input / "a", 2)
        mounted, walk = mount(job.input.with_name("disk")), files.walk
        for name in ("deep", "deep2"):
            write_photos(mounted / name, 2)
        (job.input / "b").symlink_to(mounted)

        def leaving(*of):
            for folder, names in walk(*of):
                yield folder, names
                if folder.endswith("b/deep"):
                    subprocess.run(["umount", "-l", mounted], check=True)
                    (mounted / "NOT-MOUNTED").touch()

        monkeypatch.setattr(files, "walk", leaving)
        with pytest.raises(TryAgain, match="disk was a mount when its images were listed"):
            job.run(patience_seconds=0.3)
        assert job.kinds() == []

    @pytest.mark.parametrize(("name", "exclude"), [(".snapshot", ()), ("skip", ("skip",)), ("a/skip", ("a/s*/*",))])
    def test_one_that_is_left_out_may_go(self, job, mount, monkeypatch, name, exclude):
        paths = write_photos(job.input / "a", 2)
        mounted, walk = mount(job.input / name), files.walk
        write_photos(mounted / "deep", 2)
        (source,) = open_sources((str(job.input),), SourceSettings(exclude=exclude))

        def leaving(*of):
            for number, each in enumerate(walk(*of)):
                if number == 0:
                    subprocess.run(["umount", "-l", mounted], check=True)
                yield each

        monkeypatch.setattr(files, "walk", leaving)
        (page,) = source.pages(*source.units())
        assert sorted(page.rows["uri"].to_pylist()) == paths

    def test_one_that_is_left_out_and_asked_for_by_a_link_is_noted(self, job, mount):
        write_photos(job.input / "a", 2)
        mounted = mount(job.input / "disk")
        write_photos(mounted, 2)
        (job.input / "linked").symlink_to(mounted)
        (source,) = open_sources((str(job.input),), SourceSettings(exclude=("disk",)))
        assert str(mounted) not in source.mounts
        (page,) = source.pages(*source.units())
        assert page.rows.num_rows == 4 and str(mounted) in source.mounts

    def test_a_folder_that_does_not_answer_holds_up_no_listing(self, job, monkeypatch):
        monkeypatch.setattr(witnesses_module, "OPEN_SECONDS", 0.1)
        realpath = os.path.realpath
        monkeypatch.setattr(os.path, "realpath", lambda path: time.sleep(1) if "dead" in path else realpath(path))
        assert witnesses_module.mounts_of("/", ["/dead"]) == set()

    def test_one_that_was_never_there(self, job):
        paths = [*write_photos(job.input / "a", 4), *write_photos(job.input / "b", 4, seed=1)]
        manifest = job.input.with_name("list.txt")
        manifest.write_text("".join(f"{path}\n" for path in paths))
        with self.away(job.input / "b", True), pytest.raises(TryAgain, match="in/b is empty, and"):
            job.run(input=str(manifest), patience_seconds=0.3)
        assert "missing" not in job.kinds()
        assert job.run(input=str(manifest)).current_failures == {}
        check_exactly_once(str(job.output), digests(str(job.input)))

    def test_away_in_the_midst_of_a_run(self, job, mount):
        write_photos(job.input / "a", 8)
        mounted = mount(job.input / "b")
        write_photos(mounted, 16, seed=1)

        def leave() -> None:
            subprocess.run(["umount", "-l", mounted], check=True)
            (mounted / "NOT-MOUNTED").touch()  # What lies in the mountpoint is on another device.

        with pytest.raises(TryAgain, match=r"in/b was a mount when its images were listed"):
            job.run(at_block(3, leave), patience_seconds=0.3)
        assert "missing" not in job.kinds()

    @pytest.mark.parametrize("where", ["list", "link"])
    def test_away_in_the_midst_of_the_run_that_lists(self, job, mount, monkeypatch, where):
        """Which mounts there are behind links and in lists turns up while the job lists."""
        source, mounted = job.input, mount(job.input.with_name("disk"))
        photos = write_photos(mounted, 16, seed=1)
        write_photos(source / "a", 4)
        if where == "list":
            source = source.with_name("list.txt")
            source.write_text("".join(f"{path}\n" for path in photos))
        else:
            (source / "b").symlink_to(mounted)

        def leave() -> None:
            subprocess.run(["umount", "-l", mounted], check=True)
            (mounted / "NOT-MOUNTED").touch()
            monkeypatch.setattr(witnesses_module.witnesses, "_folders", {})  # As in a process that has read nothing yet.

        with pytest.raises(TryAgain, match="was a mount when its images were listed"):
            job.run(at_block(1, leave), input=str(source), patience_seconds=0.3)
        assert "missing" not in job.kinds()

    @pytest.mark.parametrize("change", ["nothing", "an image more", "another setting"])
    @pytest.mark.parametrize("where", ["below", "the input", "a list's"])
    def test_away_when_another_listing_begins(self, job, mount, where, change):
        """Whether the last one was finished or was of other settings: what was on the mount is not passed over."""
        source, mounted = job.input, mount(job.input if where == "the input" else job.input / "b")
        photos = write_photos(mounted / "deep", 4, seed=1)
        if where == "below":
            write_photos(source / "a", 4)
        if where == "a list's":
            source = source.with_name("list.txt")
            source.write_text("".join(f"{path}\n" for path in photos))
        num_images = job.run(input=str(source)).images
        subprocess.run(["umount", "-l", mounted], check=True)
        (mounted / "NOT-MOUNTED").touch()
        if change == "an image more" and where == "a list's":
            source.write_text("".join(f"{path}\n" for path in [*photos, f"{mounted}/more.jpg"]))
        elif change == "an image more":
            write_photos(job.input / "c", 1, seed=2)
        settings = {"exclude": ("*.txt",)} if change == "another setting" else {}
        with pytest.raises(TryAgain, match="was a mount when its images were listed.*--relist"):
            job.run(input=str(source), patience_seconds=0.3, **settings)
        assert job.kinds() == []
        mount(mounted)
        write_photos(mounted / "deep", 4, seed=1)
        job.run(input=str(source), **settings)
        assert len(sha256s(job)) == num_images + (where == "below" and change == "an image more")

    @pytest.mark.parametrize("is_linked", [False, True])
    def test_away_and_excluded_when_another_listing_begins(self, job, mount, is_linked):
        write_photos(job.input / "a", 4)
        write_photos(mount(job.input / "b"), 4, seed=1)
        source = job.input.with_name("link") if is_linked else job.input
        if is_linked:
            source.symlink_to(job.input)
        job.run(input=str(source))
        subprocess.run(["umount", "-l", job.input / "b"], check=True)
        assert job.run(input=str(source), exclude=("b",)).images == 4

    @pytest.mark.parametrize("between", [[], ["other"]])
    @pytest.mark.parametrize("exclude", [(), ("*_disk*",)])
    def test_away_with_images_that_lists_name(self, job, mount, monkeypatch, exclude, between):
        """Whatever their folder is called and whatever names are excluded; also when other inputs were captioned between."""
        mounted = mount(job.input / "_disk")
        photos = write_photos(mounted, 8, seed=1)
        rows = "".join(f"{i},{path}\n" for i, path in enumerate(photos))
        (job.input / "list.csv").write_text(f"image_id,path\n{rows}")
        job.run(limit=4, exclude=exclude)
        for name in between:
            job.run(input=str(Path(write_photos(job.input.with_name(name), 1, seed=2)[0]).parent))
        subprocess.run(["umount", "-l", mounted], check=True)
        (mounted / "NOT-MOUNTED").touch()
        monkeypatch.setattr(witnesses_module.witnesses, "_folders", {})
        with pytest.raises(TryAgain, match="was a mount when its images were listed"):
            job.run(patience_seconds=0.3, exclude=exclude)
        assert "missing" not in job.kinds()

    def test_an_image_or_a_folder_that_was_deleted_is_missing(self, job):
        paths = [path for name in "abc" for path in write_photos(job.input / name, 4, seed=ord(name))]
        job.run(limit=2)
        os.unlink(paths[3])
        shutil.rmtree(job.input / "b")
        (job.input / "c" / "more").mkdir()
        assert job.run().current_failures == {"missing": 5}
        assert job.kinds().count("missing") == 5


def test_deterministic_captions_do_not_depend_on_what_lies_beside_them(job, tmp_path):
    photos = write_photos(job.input, 9)
    outputs, batch_sizes = [], []

    def actor(settings: CaptioningSettings) -> CaptioningActor:
        batch_sizes.append(settings.batch_size)
        return CaptioningActor(settings)

    for name, chosen in (("all", photos), ("some", photos[3:8])):
        manifest, output = tmp_path / f"{name}.txt", str(tmp_path / name)
        manifest.write_text("".join(f"{path}\n" for path in chosen))
        settings = {"input": str(manifest), "output": output, "precision": "bf16", "batch_size": 9}
        job.run(LocalExecutor(actor), deterministic=True, **settings)
        rows = read_parts(output, "captions")
        outputs.append({row["image_id"]: (row["caption"], row["log_prob"], row["alternatives"]) for row in rows})
    assert batch_sizes == [1, 1]
    every, some = outputs
    assert some.keys() == set(photos[3:8]) and some == {key: every[key] for key in some}
    with pytest.raises(ConfigError, match="deterministic: True -> False"):
        job.run(**settings)


@pytest.mark.parametrize("limit", [{}, {"max_bad_images": 0.5}])
def test_bad_images_that_come_first_stop_a_run_but_not_every_run(job, monkeypatch, limit):
    """They are looked at again before it ends, and are out of the way of the next."""
    monkeypatch.setattr("capray.captioning.failure_limits.HOPELESS_AFTER", 20)
    photos = [Path(path) for path in write_photos(job.input, 40)]
    for path in photos[:30]:
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CaprayError, match="2[0-9] of them as truncated|of the last 2[0-9] images failed"):
        job.run(**limit)
    assert job.kinds().count("truncated") >= 20
    for _ in range(2):
        with suppress(CaprayError):
            job.run(**limit)
    job.check(dict.fromkeys(map(str, photos[:30]), "truncated"))


class TestBreaker:
    """Images that could be read all of a sudden cannot."""

    @pytest.fixture
    def paths(self, job) -> list[Path]:
        return [Path(path) for path in write_photos(job.input, 160)]

    def test_a_storage_that_gives_junk_is_no_verdict_on_images(self, job, paths):
        sound = {path: path.read_bytes() for path in paths}

        def spoil() -> None:
            for path in paths:
                path.write_bytes(b"junk")

        with pytest.raises(TryAgain, match="failed all of a sudden.*nothing final was recorded"):
            job.run(at_block(20, spoil))
        assert "not_an_image" in job.kinds()
        assert set(current_failures(str(job.output)).values()) == {"unreadable_storage"}, "superseded"
        for path, data in sound.items():
            path.write_bytes(data)
        job.run()
        job.check()

    def test_images_that_are_bad_are_told_apart(self, job, paths):
        bad = {str(path): "not_an_image" for path in paths[80:]}
        for path in bad:
            Path(path).write_bytes(b"junk")
        assert job.run().current_failures == {"not_an_image": 80}
        job.check(bad)


class TestEndingEarly:
    def test_a_run_told_to_stop_publishes_what_it_has_first(self, job):
        write_photos(job.input, 40)
        with pytest.raises(Interrupted) as stopped:
            job.run(at_block(4, lambda: os.kill(os.getpid(), signal.SIGTERM)), part_rows=1000)
        assert stopped.value.exit_code == 143
        captions = read_parts(str(job.output), "captions")
        assert len(captions) == job.executor.num_captioned >= 16
        (record,) = (job.output / "_capray" / "runs").glob("*.json")
        assert json.loads(record.read_text())["status"] == "interrupted"
        job.run()
        job.check()

    @pytest.mark.parametrize("stage", ["fresh", "remaining", "count_wanted"])
    def test_it_is_told_to_stop_while_it_plans(self, job, monkeypatch, stage):
        """Planning a billion takes long, and what sends the signal kills soon after."""

        def plan(*arguments) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)

        write_photos(job.input, 20)
        with monkeypatch.context() as patched:
            patched.setattr(Plan, stage, plan)
            started = time.monotonic()
            with pytest.raises(Interrupted):
                job.run()
            assert time.monotonic() - started < 20
        assert len(read_parts(str(job.output), "captions")) == (0 if stage == "fresh" else 20)
        (record,) = (job.output / "_capray" / "runs").glob("*.json")
        assert json.loads(record.read_text())["status"] == "interrupted"
        job.run()
        job.check()

    def test_a_failure_of_the_job_keeps_its_traceback(self, job):
        write_photos(job.input, 40)

        def fail() -> None:
            raise RuntimeError("a mistake of ours")

        with pytest.raises(RuntimeError):
            job.run(at_block(4, fail))
        (traceback,) = (job.output / "_capray" / "runs").glob("*.traceback.txt")
        assert "a mistake of ours" in traceback.read_text()
        assert read_parts(str(job.output), "captions")
        job.run()
        job.check()

    def test_settings_and_host_are_in_the_record(self, job):
        write_photos(job.input, 4)
        summary = job.run()
        record = json.loads((job.output / "_capray" / "runs" / f"{summary.run_id}.json").read_text())
        assert record["settings"]["batch_size"] == 4 and record["host"] and record["versions"]["capray"]
        assert (record["status"], record["captions"]) == ("complete", 4)


class TestWhatChanges:
    def table(self, job: Job, seed: int) -> None:
        """A table of 40 photos, in an order of its own."""
        photos = [Path(path).read_bytes() for path in write_photos(job.input.parent / "photos", 40, seed)]
        ids = [f"{number:02d}" for number in range(40)]
        order = sorted(range(40), key=lambda number: (number * 7 + seed) % 40)
        job.input.mkdir(exist_ok=True)
        table = pa.table({"image_id": [ids[i] for i in order], "image": [photos[i] for i in order]})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=6)
        (job.input / "new").write_bytes(buffer.getvalue())
        (job.input / "new").rename(job.input / "table.parquet")

    def test_captions_that_were_done_are_kept_and_counted(self, job):
        self.table(job, seed=0)
        before = digests(str(job.input))
        job.run(limit=12)
        done = {row["image_id"] for row in read_parts(str(job.output), "captions")}
        self.table(job, seed=1)
        after = digests(str(job.input))
        summary = job.run()
        assert summary.kept == len(done) == 12
        check_exactly_once(str(job.output), {i: (before if i in done else after)[i] for i in before})

    @pytest.mark.parametrize("kind", ["table", "list", "tar", "tar with sidecar"])
    def test_what_failed_in_a_container_is_asked_again_when_that_is_rewritten(self, job, tmp_path, kind):
        """And only then, and once."""
        paths = write_photos(tmp_path / "photos", 3)
        job.input.mkdir()
        source = {"table": "x.parquet", "list": "x.jsonl"}.get(kind, "x.tar")

        def write(whole: bool) -> None:
            if kind == "table":
                images = [Path(path).read_bytes() if whole or i != 1 else None for i, path in enumerate(paths)]
                pq.write_table(pa.table({"image_id": [*"abc"], "image": images}), job.input / source)
            elif kind == "list":
                rows = [{"image_id": "abc"[i], "uri": path if whole or i != 1 else None} for i, path in enumerate(paths)]
                (job.input / source).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
            else:
                bad = tmp_path / "bad.jpg"
                bad.write_text("no image")
                with tarfile.open(job.input / source, "w") as tar:
                    for i, path in enumerate(paths):
                        tar.add(path if whole or i != 1 else bad, f"{i}.jpg")
                if kind == "tar with sidecar":
                    pq.write_table(pa.table({"key": ["0", "1", "2"]}), job.input / "x.parquet")

        def run() -> tuple[int, int, int]:
            summary = job.run(input=str(job.input / source))
            return summary.captions, sum(summary.failures.values()), sum(summary.current_failures.values())

        write(whole=False)
        assert run() == (2, 1, 1)
        assert run() == (0, 0, 1)
        write(whole=False)
        assert run() == (0, 1, 1)
        assert run() == (0, 0, 1)
        write(whole=True)
        assert run() == (1, 0, 0)

    def test_an_image_that_is_mended_while_its_table_is_read_is_captioned(self, job):
        """Its failure is published after the change: times tell nothing."""
        photos = [Path(path).read_bytes() for path in write_photos(job.input.with_name("photos"), 28)]
        job.input.mkdir()

        def write(first: bytes) -> None:
            table = pa.table({"image_id": [f"{i:02d}" for i in range(28)], "image": [first, *photos[1:]]})
            pq.write_table(table, job.input / "new", row_group_size=4)
            (job.input / "new").rename(job.input / "table.parquet")

        def rewrite(number: int) -> None:
            if number == 1:
                time.sleep(0.1)
                write(photos[0])

        write(b"none")
        job.run(LocalExecutor(num_threads=1, after_block=rewrite))
        assert "not_an_image" in job.kinds()
        assert job.run().current_failures == {}
        assert len(sha256s(job)) == 28

    @pytest.mark.parametrize("times", [1, 9])
    def test_a_list_that_is_rewritten_while_its_images_are_read(self, job, times):
        """Its ids are of other images now, and one is new."""
        paths = write_photos(job.input, 9)
        table, versions = job.input.with_name("list.csv"), iter(range(times))

        def write(names: list[str]) -> None:
            table.write_text("image_id,path\n" + "".join(f"{i},{name}\n" for i, name in enumerate(names)))

        def rewrite(number: int) -> None:
            if next(versions, None) is not None:
                write([*paths[:8][::-1], paths[8], *paths[: number + 1]])

        write(paths[:8])
        executor = LocalExecutor(before_unit=rewrite)
        if times > 1:
            with pytest.raises(TryAgain, match="changes again and again"):
                job.run(executor, input=str(table))
            return
        summary = job.run(executor, input=str(table))
        assert (summary.images, summary.captions, summary.elsewhere) == (10, 10, 8)
        assert summary.first_elsewhere == ("0", paths[0], paths[7])

    def test_what_changes_again_and_again_is_a_fault_of_this_run(self, job):
        self.table(job, seed=0)
        seeds = iter(range(1, 1000))
        with pytest.raises(TryAgain, match="changes again and again"):
            job.run(LocalExecutor(num_threads=1, before_unit=lambda number: self.table(job, next(seeds))))
        job.run()
        assert len(read_parts(str(job.output), "captions")) == 40


def test_a_store_that_cannot_be_written_ends_the_run_with_one_message(job, monkeypatch):
    write_photos(job.input, 40)

    def refuse(location, *arguments):
        raise StorageError(f"writing {location.uri}: permission denied")

    with pytest.raises(StorageError, match="permission denied"):
        job.run(at_block(3, lambda: monkeypatch.setattr("capray.captioning.writer.write_atomic", refuse)))
    monkeypatch.undo()
    job.run()
    job.check()
