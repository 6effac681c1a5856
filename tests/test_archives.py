"""Archives come whole or with a clear error, over a real server that cuts, refuses and changes; none unpacks outside."""

from __future__ import annotations

import hashlib
import io
import os
import random
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from requests import RequestException
from tenacity import wait_none

from capray.datasets import coco, download, flickr8k
from capray.datasets.archives import Archive, fetch, unpack
from capray.datasets.coco import prepare_coco
from capray.datasets.flickr8k import prepare_flickr8k
from capray.datasets.settings import CocoConfig, Flickr8kConfig
from capray.errors import ConfigError, DataError, StorageError
from capray.progress import ProgressDisplay
from tests import test_datasets as layouts
from tests.conftest import free_port
from tests.range_server import RangeServer, serving


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "WAIT", wait_none())
    monkeypatch.setattr(download, "CHUNK_BYTES", 1000)
    with serving() as running:
        yield running


def make_zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


PHOTOS = {f"photos/{i}.jpg": random.Random(i).randbytes(40_000) for i in range(5)}
ZIP = make_zip({"__MACOSX/photos/._0.jpg": b"junk", **PHOTOS, "readme.txt": b"read"})


def archive_of(server: RangeServer, data: bytes = ZIP, **options) -> Archive:
    server.files["set.zip"] = data
    return Archive(f"{server.url}/set.zip", ("photos",), **options)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WHOLE = {**PHOTOS, "readme.txt": b"read"}


class TestDownload:
    def test_all_at_once(self, server, tmp_path):
        fetch([archive_of(server)], str(tmp_path))
        assert files_below(tmp_path) == WHOLE
        assert server.log == [(None, 200)]
        assert not (tmp_path / ".capray-fetch").exists()

    def test_a_cut_connection_goes_on_where_it_was(self, server, tmp_path):
        server.cut_after = [70_999, 1, 50_000]
        fetch([archive_of(server)], str(tmp_path))
        assert files_below(tmp_path) == WHOLE
        assert server.log == [(None, 200), ("bytes=70000-", 206), ("bytes=70000-", 206), ("bytes=120000-", 206)]

    def test_more_cuts_than_attempts_as_long_as_bytes_come(self, server, tmp_path):
        server.cut_after = [20_000] * 9
        fetch([archive_of(server)], str(tmp_path))
        assert len(server.log) == 10 > download.ATTEMPTS
        assert files_below(tmp_path) == WHOLE

    def test_a_killed_process_goes_on_where_it_was(self, server, tmp_path):
        archive = archive_of(server, ZIP * 200)
        half = 300 * 2**16
        assert half < len(server.files["set.zip"]) - 2**20
        script = f"from capray.datasets.archives import *; fetch([{archive!r}], {str(tmp_path)!r})"
        server.cut_after = [half]
        server.on_request = lambda: time.sleep(3) if server.log else None
        child = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
        part = tmp_path / ".capray-fetch" / "set.zip.part"
        deadline = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size == half):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        child.kill()
        child.wait()
        server.on_request = lambda: None
        server.log.clear()
        fetch([archive], str(tmp_path))
        assert server.log[-1] == (f"bytes={half}-", 206)
        assert files_below(tmp_path) == WHOLE

    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(cuts=st.lists(st.integers(0, len(ZIP)), max_size=8), knows_ranges=st.booleans())
    def test_whatever_the_cuts_what_comes_is_the_file(self, server, tmp_path_factory, cuts, knows_ranges):
        folder = tmp_path_factory.mktemp("cuts")
        archive = archive_of(server)
        server.cut_after, server.knows_ranges = list(cuts), knows_ranges
        try:
            with ProgressDisplay("set.zip") as display:
                download.download(archive.url, folder / "set.zip", None, display)
        except RequestException:
            assert len(cuts) >= download.ATTEMPTS
        else:
            assert (folder / "set.zip").read_bytes() == ZIP
        server.cut_after = []

    def test_a_server_without_ranges_begins_anew(self, server, tmp_path):
        server.knows_ranges = False
        server.cut_after = [70_000]
        fetch([archive_of(server)], str(tmp_path))
        assert server.log == [(None, 200), ("bytes=70000-", 200)]
        assert files_below(tmp_path) == WHOLE

    def test_a_server_without_ranges_that_always_cuts_is_given_up(self, server, tmp_path):
        server.knows_ranges = False
        server.cut_after = [70_000] * 20
        with pytest.raises(StorageError, match="cannot download"):
            fetch([archive_of(server)], str(tmp_path))
        assert len(server.log) == 1 + download.ATTEMPTS

    def test_another_version_meanwhile_is_not_mixed_in(self, server, tmp_path):
        archive = archive_of(server)
        newer = make_zip({name: data[::-1] for name, data in PHOTOS.items()})
        server.cut_after = [70_000]
        server.on_request = lambda: server.files.update({"set.zip": newer}) if server.log else None
        fetch([archive], str(tmp_path))
        assert files_below(tmp_path) == {name: data[::-1] for name, data in PHOTOS.items()}
        assert server.log == [(None, 200), ("bytes=70000-", 200)]

    def test_another_size_meanwhile_without_an_etag(self, server, tmp_path):
        archive = archive_of(server)
        server.etags["set.zip"] = None
        newer = make_zip({**PHOTOS, "more.txt": b"more"})
        server.cut_after = [70_000]
        server.on_request = lambda: server.files.update({"set.zip": newer}) if server.log else None
        with pytest.raises(DataError, match=r"is damaged.*; it was removed: run the same command again"):
            fetch([archive], str(tmp_path))
        fetch([archive], str(tmp_path))
        assert files_below(tmp_path) == {**PHOTOS, "more.txt": b"more"}
        assert [status for _, status in server.log] == [200, 206, 200]

    def test_a_range_past_the_end_begins_anew(self, server, tmp_path):
        archive = archive_of(server)
        server.etags["set.zip"] = None
        server.cut_after = [len(ZIP) - 10]
        smaller = make_zip({"photos/0.jpg": b"small"})
        server.on_request = lambda: server.files.update({"set.zip": smaller}) if server.log else None
        fetch([archive], str(tmp_path))
        assert files_below(tmp_path) == {"photos/0.jpg": b"small"}
        assert [status for _, status in server.log] == [200, 416, 200]

    def test_a_server_that_recovers(self, server, tmp_path):
        server.answers = [503, 500, 429]
        fetch([archive_of(server)], str(tmp_path))
        assert files_below(tmp_path) == WHOLE

    def test_a_server_that_does_not_recover(self, server, tmp_path):
        server.answers = [503] * 50
        with pytest.raises(StorageError, match=r"cannot download http.*set\.zip: 503 Server Error: Service Unavail"):
            fetch([archive_of(server)], str(tmp_path))
        assert len(server.log) == download.ATTEMPTS

    def test_a_refusal_is_not_repeated_and_says_where_to_put_the_archive(self, server, tmp_path):
        archives = [Archive(f"{server.url}/{name}.zip", (name,)) for name in ("texts", "photos")]
        way_out = f"put a copy into {tmp_path} and run the same command again"
        with pytest.raises(StorageError, match=f"texts.zip: 404 Client Error: Not Found .*{way_out}"):
            fetch(archives, str(tmp_path))
        assert len(server.log) == 1

    def test_no_server(self, monkeypatch, tmp_path):
        monkeypatch.setattr(download, "WAIT", wait_none())
        with pytest.raises(StorageError, match="Connection refused; where it cannot be had"):
            fetch([Archive(f"http://127.0.0.1:{free_port()}/set.zip", ("photos",))], str(tmp_path))

    def test_a_folder_that_is_not_local(self):
        with pytest.raises(ConfigError, match="only be fetched into a local folder, not 's3://bucket/raw'"):
            fetch([], "s3://bucket/raw")


class TestChecks:
    def test_a_right_checksum(self, server, tmp_path):
        checksum = f"sha256:{hashlib.sha256(ZIP).hexdigest()}"
        fetch([archive_of(server, size=len(ZIP), checksum=checksum)], str(tmp_path))
        assert files_below(tmp_path) == WHOLE

    def test_a_wrong_checksum_leaves_nothing(self, server, tmp_path):
        archive = archive_of(server, checksum=f"md5:{hashlib.md5(b'other').hexdigest()}")
        with pytest.raises(DataError, match=r"set\.zip has the md5 \w{32}, not \w{32}: it is damaged or another"):
            fetch([archive], str(tmp_path))
        assert "photos/0.jpg" not in files_below(tmp_path)
        server.log.clear()
        with pytest.raises(DataError):
            fetch([archive], str(tmp_path))
        assert server.log == [(None, 200)]

    def test_another_size_is_refused_before_it_comes(self, server, tmp_path):
        with pytest.raises(StorageError, match=f"has {len(ZIP):,} bytes, not the 7 of the file that is meant"):
            fetch([archive_of(server, size=7)], str(tmp_path))
        assert not (tmp_path / ".capray-fetch" / "set.zip.part").exists()

    def test_a_login_page_instead(self, server, tmp_path):
        with pytest.raises(DataError, match="is no zip archive: it begins with b'<html>"):
            fetch([archive_of(server, b"<html>log in</html>")], str(tmp_path))

    def test_a_damaged_member(self, server, tmp_path):
        at = ZIP.index(PHOTOS["photos/2.jpg"]) + 100
        damaged = ZIP[:at] + bytes([ZIP[at] ^ 1]) + ZIP[at + 1 :]
        with pytest.raises(DataError, match=r"is damaged, or encrypted \(Bad CRC-32 for file 'photos/2\.jpg'\);"):
            fetch([archive_of(server, damaged)], str(tmp_path))
        left = files_below(tmp_path)
        assert "photos/1.jpg" in left and not any("2.jpg" in name for name in left)

    def test_a_full_disk_is_told_before_it_is_full(self, server, tmp_path, monkeypatch):
        usage = download.shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(StorageError, match=r"set\.zip\.part needs .* more, and 1\.0 kB are free"):
            fetch([archive_of(server)], str(tmp_path))


class TestWhatIsThereAlready:
    def test_an_archive_put_there_by_hand_is_used_and_kept(self, server, tmp_path):
        archive = archive_of(server, size=len(ZIP))
        (tmp_path / "set.zip").write_bytes(ZIP)
        fetch([archive], str(tmp_path))
        assert files_below(tmp_path) == {**WHOLE, "set.zip": ZIP}
        assert server.log == []

    def test_what_is_unpacked_is_not_fetched(self, server, tmp_path, capsys):
        (tmp_path / "photos").mkdir()
        fetch([archive_of(server)], str(tmp_path))
        assert server.log == []
        assert f"set.zip: not needed, {tmp_path}/photos is there" in capsys.readouterr().err

    def test_an_unpacking_that_was_interrupted_goes_on(self, server, tmp_path, monkeypatch):
        archive = archive_of(server)
        replace = os.replace

        def interrupted(source, target):
            if str(target).endswith("photos/2.jpg"):
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch([archive], str(tmp_path))
        monkeypatch.undo()
        assert len(list((tmp_path / "photos").iterdir())) == 2
        server.log.clear()
        fetch([archive], str(tmp_path))
        assert files_below(tmp_path) == WHOLE
        assert server.log == []

    def test_another_file_is_not_written_over(self, server, tmp_path):
        (tmp_path / "readme.txt").write_bytes(b"my own notes")
        with pytest.raises(StorageError, match=r"readme\.txt is there and is not the archive's 'readme\.txt': move it away"):
            fetch([archive_of(server)], str(tmp_path))
        assert (tmp_path / "readme.txt").read_bytes() == b"my own notes"


class TestUnpack:
    def unpack(self, data: bytes, folder: Path, only: str = "*") -> None:
        path = folder.parent / "set.zip"
        path.write_bytes(data)
        folder.mkdir()
        with ProgressDisplay("set.zip") as display:
            unpack(path, Archive("http://example.org/set.zip", (), only), folder, display)

    @pytest.mark.parametrize("name", ["../out.txt", "/tmp/out.txt", "a/../../out.txt", "..\\out.txt", "C:/out.txt"])
    def test_nothing_lands_outside(self, tmp_path, name):
        outside = Path("/tmp/out.txt").exists()
        self.unpack(make_zip({"good.txt": b"good", name: b"bad"}), tmp_path / "in" / "raw")
        assert sorted(files_below(tmp_path / "in" / "raw").values()) == [b"bad", b"good"]
        assert set(files_below(tmp_path)) - {"set.zip", "in/set.zip"} == {
            f"in/raw/{name}" for name in files_below(tmp_path / "in" / "raw")
        }
        assert Path("/tmp/out.txt").exists() == outside

    @pytest.fixture(autouse=True)
    def _room(self, tmp_path):
        (tmp_path / "in").mkdir()

    def test_links_lead_nowhere(self, tmp_path):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            link = zipfile.ZipInfo("photos")
            link.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(link, "/etc")
        self.unpack(buffer.getvalue(), tmp_path / "in" / "raw")
        assert (tmp_path / "in" / "raw" / "photos").read_text() == "/etc"
        assert not (tmp_path / "in" / "raw" / "photos").is_symlink()

    def test_only_what_is_wanted(self, tmp_path):
        members = {"annotations/captions_val2014.json": b"{}", "annotations/instances_val2014.json": b"[]"}
        self.unpack(make_zip(members), tmp_path / "in" / "raw", "annotations/captions_*.json")
        assert set(files_below(tmp_path / "in" / "raw")) == {"annotations/captions_val2014.json"}


class TestDataSets:
    def test_flickr8k(self, server, tmp_path, monkeypatch):
        raw = layouts.original(tmp_path / "made")
        texts = {path.name: path.read_bytes() for path in raw.iterdir() if path.is_file()}
        photos = {f"Flicker8k_Dataset/{p.name}": p.read_bytes() for p in (raw / "Flicker8k_Dataset").iterdir()}
        server.files = {"Flickr8k_text.zip": make_zip(texts), "Flickr8k_Dataset.zip": make_zip(photos)}
        server.cut_after = [100]
        local = [Archive(f"{server.url}/{real.name}", real.unpacks_to) for real in flickr8k.ARCHIVES]
        monkeypatch.setattr(flickr8k, "ARCHIVES", tuple(local))
        config = Flickr8kConfig(raw=str(tmp_path / "raw"), output=str(tmp_path / "out"), fetch=True)
        prepared = prepare_flickr8k(config)
        assert sum(counts.images for counts in prepared.splits.values()) == 4
        server.log.clear()
        prepare_flickr8k(config.model_copy(update={"output": str(tmp_path / "again")}))
        assert server.log == []

    @pytest.mark.parametrize("splits", ["2014", "2017", "karpathy"])
    def test_coco(self, server, tmp_path, monkeypatch, splits):
        year = "2017" if splits == "2017" else "2014"
        raw = layouts.coco_folder(tmp_path / "made", year)
        layouts.write_karpathy(raw, "coco", layouts.KARPATHYS_COCO)
        for part in (f"train{year}", f"val{year}"):
            photos = {f"{part}/{path.name}": path.read_bytes() for path in (raw / part).iterdir()}
            server.files[f"{part}.zip"] = make_zip(photos)
        annotations = {f"annotations/{path.name}": path.read_bytes() for path in (raw / "annotations").iterdir()}
        server.files[f"annotations_trainval{year}.zip"] = make_zip(annotations)
        server.files["caption_datasets.zip"] = make_zip(
            {"dataset_coco.json": (raw / "dataset_coco.json").read_bytes(), "dataset_flickr8k.json": b"{}"}
        )

        def local(real: Archive) -> Archive:
            return Archive(f"{server.url}/{real.name}", real.unpacks_to, real.only)

        archives = {key: tuple(map(local, values)) for key, values in coco.ARCHIVES.items()}
        monkeypatch.setattr(coco, "ARCHIVES", archives)
        prepared = prepare_coco(
            CocoConfig(raw=str(tmp_path / "raw"), output=str(tmp_path / "out"), splits=splits, fetch=True)
        )
        assert sum(counts.images for counts in prepared.splits.values()) >= 3
        left = {path.name for path in (tmp_path / "raw").iterdir()}
        assert left == {f"train{year}", f"val{year}", "dataset_coco.json" if splits == "karpathy" else "annotations"}
