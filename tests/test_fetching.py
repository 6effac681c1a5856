"""Fetching a block: every bad image is a row of its kind, in the plan's order."""

import pyarrow as pa
import pytest
import s3fs

from capray.captioning.fetching import Fetcher
from capray.captioning.plan import Work
from capray.captioning.reading import read_image
from capray.captioning.rows import FETCHED, PLAN
from capray.config import ImageLimits, Preprocessing
from capray.images import ImageError
from capray.storage import locate, write_atomic
from capray.tables import encode_parquet
from tests.conftest import image_bytes, write_photos


def kind_of(uri, max_bytes=1000):
    with pytest.raises(ImageError) as caught:
        read_image(uri, max_bytes)
    return caught.value.kind


def test_what_is_not_there_is_missing(tmp_path, s3):
    assert kind_of(str(tmp_path / "nothing.jpg")) == "missing"
    assert kind_of(str(tmp_path)) == "missing"
    assert kind_of(f"{s3}/nothing.jpg") == "missing"
    assert kind_of("s3://capray-no-such-bucket/x.jpg") == "missing"


def test_what_may_not_be_read_is_denied(s3, monkeypatch):
    s3fs.S3FileSystem().pipe_file(f"{s3}/secret.jpg", image_bytes())
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        assert kind_of(f"{s3}/secret.jpg") == "denied"
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_store_that_does_not_answer_is_unreadable(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        assert kind_of(f"{s3}/photo.jpg") == "unreadable_storage"
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_no_more_is_read_than_the_limit_shows(tmp_path, s3):
    path = tmp_path / "large.jpg"
    path.write_bytes(b"x" * 5000)
    assert len(read_image(str(path), 1000)) == 1001
    s3fs.S3FileSystem().pipe_file(f"{s3}/large.jpg", b"x" * 5000)
    assert len(read_image(f"{s3}/large.jpg", 1000)) == 1001


def test_empty_objects_are_read(tmp_path, s3):
    (tmp_path / "empty.jpg").touch()
    s3fs.S3FileSystem().pipe_file(f"{s3}/empty.jpg", b"")
    assert read_image(str(tmp_path / "empty.jpg"), 10) == read_image(f"{s3}/empty.jpg", 10) == b""


def test_a_block_keeps_the_order_and_number_of_its_rows(tmp_path):
    paths = write_photos(tmp_path / "photos", 5)
    (tmp_path / "photos" / "text.jpg").write_text("no image")
    paths[2:2] = [str(tmp_path / "photos" / "text.jpg"), str(tmp_path / "gone.jpg")]
    rows = [{"position": i, "image_id": f"id-{i}", "uri": path} for i, path in enumerate(paths)]
    file = locate(str(tmp_path / "plan.parquet"))
    write_atomic(file, encode_parquet(pa.Table.from_pylist(rows, PLAN), row_group_size=4))
    work = Work([file], len(rows), 4)
    fetcher = Fetcher(work, str(tmp_path), None, Preprocessing(size=32), ImageLimits(), concurrency=3)

    blocks = [fetcher.fetch(i) for i in range(work.num_blocks)]
    assert [block.num_rows for block in blocks] == [4, 3]
    table = pa.concat_tables(blocks)
    assert table.schema.equals(FETCHED)
    assert table["image_id"].to_pylist() == [f"id-{i}" for i in range(7)]
    assert table["error_type"].to_pylist() == [None, None, "not_an_image", "missing", None, None, None]
    assert [len(p) if p else None for p in table["pixels"].to_pylist()] == [3072, 3072, None, None, 3072, 3072, 3072]
