"""The oracle of the other tests notices: negative controls, on an output of two parts in which something is wrong."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import write_photos, write_tar
from tests.oracle import captions_by_bytes, check_exactly_once, digests, merged


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def ids(tmp_path, output) -> list[str]:
    ids = write_photos(tmp_path / "photos", 4)
    for number in (0, 1):
        part(output, number, ids[2 * number : 2 * number + 2])
    return ids


def part(output, number, ids, captions_of=None, bytes_of=None) -> None:
    (output / "captions").mkdir(parents=True, exist_ok=True)
    rows = [
        {"image_id": i, "uri": i, "caption": f"of {c}", "sha256": sha256(b)}
        for i, c, b in zip(ids, captions_of or ids, bytes_of or ids, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), output / "captions" / f"part-a-{number:05d}.parquet")


def fail(output, *failures: tuple[str, str]) -> None:
    (output / "failures").mkdir(parents=True, exist_ok=True)
    rows = [
        {"image_id": image_id, "error_type": kind, "failed_at": datetime(2026, 1, 1, second=second, tzinfo=UTC)}
        for second, (image_id, kind) in enumerate(failures)
    ]
    pq.write_table(pa.Table.from_pylist(rows), output / "failures" / "part-a-00000.parquet")


def sha256(path: str) -> bytes:
    return hashlib.sha256(Path(path).read_bytes()).digest()


def check(output, ids, **options) -> None:
    check_exactly_once(str(output), set(ids), {sha256(i): f"of {i}" for i in ids}, **options)


def test_nothing_where_nothing_is_wrong(output, ids):
    check(output, ids)


def test_a_dropped_part(output, ids):
    (output / "captions" / "part-a-00001.parquet").unlink()
    with pytest.raises(AssertionError, match="neither captioned nor failed"):
        check(output, ids)


def test_a_doubled_part(output, ids):
    part(output, 2, ids[:2])
    with pytest.raises(AssertionError, match="more than once"):
        check(output, ids)


def test_a_truncated_part(output, ids):
    path = output / "captions" / "part-a-00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(pa.ArrowInvalid):
        check(output, ids)


def test_a_block_boundary_that_a_replay_shifted(output, ids):
    part(output, 1, ids[1:3])
    with pytest.raises(AssertionError, match="more than once"):
        check(output, ids)
    part(output, 1, ids[3:])
    with pytest.raises(AssertionError, match="neither captioned nor failed"):
        check(output, ids)


def test_rows_that_slid_against_their_ids(output, ids):
    part(output, 1, ids[2:], captions_of=ids[1:3])
    with pytest.raises(AssertionError, match="otherwise than in an undisturbed run"):
        check(output, ids)
    part(output, 1, ids[2:], captions_of=ids[1:3], bytes_of=ids[1:3])
    with pytest.raises(AssertionError, match="bytes it does not have: .*photo-0002"):
        check(output, ids)


def test_failures_that_nobody_expected(output, ids):
    part(output, 1, ids[2:3])
    fail(output, (ids[3], "missing"))
    with pytest.raises(AssertionError, match="not as expected: .*photo-0003.*missing"):
        check(output, ids)
    check(output, ids, failed={ids[3]: "missing"})
    with pytest.raises(AssertionError, match="not as expected"):
        check(output, ids, failed={ids[3]: "truncated"})
    with pytest.raises(AssertionError, match="should have failed as missing: .*photo-0000"):
        check(output, ids, failed={ids[0]: "missing", ids[3]: "missing"})


def test_the_latest_failure_is_the_current_one(output, ids):
    part(output, 1, ids[2:3])
    fail(output, (ids[3], "missing"), (ids[3], "unreadable_storage"))
    check(output, ids, failed={ids[3]: "unreadable_storage"})


@pytest.mark.parametrize("layout", ["table", "tar", "manifest"])
def test_bytes_of_containers(tmp_path, output, layout):
    """A caption that stands under another image's id, in each kind of container."""
    photos = write_photos(tmp_path / "photos", 4)
    wanted = digests(container(tmp_path, layout, photos))
    ids = list(wanted)
    assert list(wanted.values()) == [{sha256(path)} for path in photos]
    part(output, 0, ids, photos, photos)
    check_exactly_once(str(output), wanted, captions_by_bytes(str(output)))
    swapped = [photos[1], photos[0], *photos[2:]]
    part(output, 0, ids, swapped, swapped)
    with pytest.raises(AssertionError, match="from bytes it never had"):
        check_exactly_once(str(output), wanted)
    rewritten = digests(container(tmp_path, layout, swapped))
    check_exactly_once(str(output), merged(wanted, rewritten))


def container(folder: Path, layout: str, photos: list[str]) -> str:
    if layout == "table":
        images = {"image_id": list("abcd"), "image": [Path(photo).read_bytes() for photo in photos]}
        pq.write_table(pa.table(images), folder / "table.parquet")
        return str(folder / "table.parquet")
    if layout == "manifest":
        pq.write_table(pa.table({"image_id": list("abcd"), "uri": photos}), folder / "uris.parquet")
        return str(folder / "uris.parquet")
    images = {f"{number}.jpg": Path(photo).read_bytes() for number, photo in enumerate(photos)}
    return write_tar(folder / "shard.tar", images)
