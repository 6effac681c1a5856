"""Reading objects: exact names, whole bytes or a typed failure, whatever the store and the network do on the way.

S3 is a real server behind ``tests.proxy``. Waits are shrunk; what is tried again, and how often, is not.
"""

import hashlib
import io
import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import ClassVar

import fsspec
import pyarrow as pa
import pytest
import s3fs
from botocore.exceptions import ClientError
from fsspec.implementations.memory import MemoryFileSystem
from tenacity import wait_exponential_jitter

from capray import storage
from capray.errors import StorageError, StorageUnavailable, TryAgain
from capray.images import ImageError
from capray.inputs import byte_reader as reading
from capray.inputs.byte_reader import Patience, Stream, read_image
from capray.inputs.throttle import Throttle
from capray.inputs.versions import VersionChanged
from capray.output.compact import _schema_of
from capray.storage import is_file, iter_files, locate, read_bytes, write_atomic
from capray.tables import encode_parquet
from tests.conftest import tar_bytes
from tests.proxy import FaultyProxy

KIB, MIB = 2**10, 2**20
NAMES = [
    "a b.jpg",
    " lead and trail ",
    "gr\u00f6\u00dfe.jpg",
    "gro\u0308\u00dfe.jpg",
    "\U0001f600.jpg",
    "x#1.jpg",
    "q?x=1&y.jpg",
    "x?versionId=3",
    "y%2Fz.jpg",
    "100%.jpg",
    "%zz",
    "+plus+.jpg",
    "new\nline.jpg",
    "[a-z]*?.jpg",
    "{a,b}.jpg",
    "ends.in.dots...",
    "..hidden",
    "~",
    "'\"<>|;$.jpg",
    "sub/deep/c.jpg",
]
S3_NAMES = [*NAMES, "a//b.jpg", "s3://x/y.jpg", "\x01.jpg"]


def open_stream(uri: str, start: int = 0, chunk_bytes: int = 8 * MIB) -> io.BufferedReader:
    return io.BufferedReader(Stream(uri, start, chunk_bytes), chunk_bytes)


@pytest.fixture
def forget(s3):
    """Drops cached clients, so that the next one sees the environment as it is then."""
    s3fs.S3FileSystem.clear_instance_cache()
    yield s3fs.S3FileSystem.clear_instance_cache
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def put(s3, tmp_path):
    """Writes an object, past the proxy; returns its URI."""
    fs = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"], skip_instance_cache=True)
    bucket = s3.removeprefix("s3://")

    def put(name: str, data: bytes) -> str:
        key = f"{tmp_path.name}/{name}"
        fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data)
        return f"{s3}/{key}"

    return put


@pytest.fixture
def proxy(put, forget, monkeypatch):
    """The proxy, in the place of the server."""
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], seed=7) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture
def configure(forget, monkeypatch):
    def configure(attempts: int = 5, read_timeout: float = 10) -> None:
        options = storage.S3_OPTIONS["config_kwargs"]
        retries = {**options["retries"], "total_max_attempts": attempts}
        options = {**options, "retries": retries, "read_timeout": read_timeout}
        monkeypatch.setattr(storage, "S3_OPTIONS", {**storage.S3_OPTIONS, "config_kwargs": options})
        shorter = SimpleNamespace(random=lambda: random.random() / 10)
        monkeypatch.setattr("botocore.retryhandler.random", shorter)
        monkeypatch.setattr(reading, "_WAIT", wait_exponential_jitter(initial=0.01, max=0.1, jitter=0.05))

    return configure


@pytest.fixture
def answer(forget, monkeypatch):
    """Makes a server that gives every request these bytes and hangs up; counts them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        count = []

        def serve(data: bytes) -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    count.append(1)
                    connection.sendall(data)

        def answer(head: str, body: bytes) -> list[int]:
            data = head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body
            threading.Thread(target=serve, args=(data,), daemon=True).start()
            return count

        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield answer
        server.shutdown(socket.SHUT_RDWR)


def failure_of(uri, max_bytes=1000) -> ImageError:
    with pytest.raises(ImageError) as caught:
        read_image(uri, max_bytes)
    error = caught.value
    assert error.message.startswith(f"{uri}: ") and len(error.message) > len(uri) + 5
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "?") not in error.message
    return error


def kind_of(uri, max_bytes=1000) -> str:
    return failure_of(uri, max_bytes).kind


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(autouse=True)
def unthrottled(monkeypatch):
    """No test reads as slowly as a store has asked for in another."""
    monkeypatch.setattr(reading, "_throttle", Throttle())


class TestOutcomes:
    def test_what_is_not_there_is_missing(self, tmp_path, s3, forget):
        (tmp_path / "file").touch()
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        for name in ("nothing.jpg", "", "file/x.jpg", "loop", "x" * 300, "a\0b"):
            assert kind_of(f"{tmp_path}/{name}".rstrip("/")) == "missing", name
        for name in ("nothing.jpg", "", "x" * 2000, "\udcff.jpg"):
            assert kind_of(f"{s3}/{name}") == "missing", name
        with pytest.raises(StorageError, match="s3://capray-no-such-bucket/x.jpg: there is no such bucket"):
            read_image("s3://capray-no-such-bucket/x.jpg", 10)
        assert kind_of("s3://No_Bucket_Has!This Name/x.jpg") == "missing"
        assert kind_of("s3://") == "missing"

    @pytest.mark.parametrize("code", ["NoSuchBucket", "NoSuchAccessPoint", "AccessDenied", "InvalidBucketName"])
    def test_a_definite_answer_is_not_waited_for_and_a_store_that_is_not_there_blames_no_image(
        self, s3, forget, monkeypatch, code
    ):
        async def refuse(*arguments):
            status = {"AccessDenied": 403, "InvalidBucketName": 400}.get(code, 404)
            raise ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")

        monkeypatch.setattr(reading, "_read_s3", refuse)
        kinds = {"AccessDenied": "denied", "InvalidBucketName": "missing"}
        began = time.monotonic()
        with pytest.raises(ImageError if code in kinds else StorageError) as caught:
            read_image(f"{s3}/x.jpg", 10, Patience(60))
        assert time.monotonic() - began < 5
        assert getattr(caught.value, "kind", None) == kinds.get(code)

    def test_what_is_no_file_does_not_hold_the_reader_up(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        assert kind_of(str(tmp_path / "pipe")) == "missing"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_a_file_that_may_not_be_read_is_denied(self, tmp_path):
        (tmp_path / "a").touch(stat.S_IWUSR)
        assert kind_of(str(tmp_path / "a")) == "denied"

    def test_wrong_credentials_are_denied(self, put, forget, monkeypatch):
        uri = put("secret.jpg", b"1")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
        assert kind_of(uri) == "denied"
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        forget()
        error = failure_of(uri)
        assert error.kind == "denied" and "InvalidAccessKeyId" in error.message

    def test_no_credentials_are_denied(self, put, forget, monkeypatch, tmp_path):
        uri = put("x.jpg", b"1")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        error = failure_of(uri)
        assert error.kind == "denied" and "NoCredentialsError" in error.message
        monkeypatch.setenv("AWS_PROFILE", "unheard-of")
        forget()
        assert kind_of(uri) == "denied"

    def test_a_scheme_that_nothing_serves(self):
        assert kind_of("s4://bucket/x.jpg") == "unreadable_storage"

    def test_no_more_is_read_than_the_limit_shows(self, tmp_path, put):
        (tmp_path / "large.jpg").write_bytes(b"x" * 5000)
        for uri in (str(tmp_path / "large.jpg"), put("large.jpg", b"x" * 5000)):
            assert read_image(uri, 1000) == b"x" * 1001
            assert read_image(uri, 4999) == read_image(uri, 5000) == read_image(uri, 10**9) == b"x" * 5000

    def test_empty_objects_are_read(self, tmp_path, put):
        (tmp_path / "empty.jpg").touch()
        assert read_image(str(tmp_path / "empty.jpg"), 10) == read_image(put("empty.jpg", b""), 10) == b""

    def test_secrets_of_other_stores_are_not_told(self, configure):
        configure()
        with pytest.raises(ImageError) as caught:
            read_image("http://user:hunter2@127.0.0.1:9/x.jpg?X-Amz-Signature=c0ffee&token=t0ken", 10)
        assert caught.value.kind == "unreadable_storage"
        assert caught.value.message == "http://127.0.0.1:9/x.jpg: ClientConnectorError"


class TestNames:
    @pytest.mark.parametrize("store", ["local", "s3"])
    def test_every_name_is_taken_literally(self, store, tmp_path, request):
        names = NAMES if store == "local" else S3_NAMES
        uris = []
        for i, name in enumerate(names):
            if store == "local":
                path = tmp_path / "files" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"%d" % i)
                uris.append(str(path))
            else:
                uris.append(request.getfixturevalue("put")(name, b"%d" % i))
        assert [read_image(uri, 10) for uri in uris] == [b"%d" % i for i in range(len(names))]
        assert [open_stream(uri).read() for uri in uris] == [b"%d" % i for i in range(len(names))]

    @pytest.mark.parametrize("name", ["a/../b", "../b", "./c", "d/.", "g/..", "//lead"])
    def test_what_looks_like_a_path_reaches_s3_as_it_is(self, name, s3, proxy):
        """This server refuses most of them; S3 has them."""
        with pytest.raises(ImageError):
            read_image(f"{s3}/x/{name}", 10)
        assert proxy.targets == [f"/{s3.removeprefix('s3://')}/x/{name}"]


class TestFaults:
    def test_at_modest_rates_every_image_arrives(self, put, proxy, configure):
        rng = random.Random(0)
        images = [rng.randbytes(rng.randrange(1, 50_000)) for _ in range(150)]
        with ThreadPoolExecutor(16) as pool:
            uris = list(pool.map(put, map(str, range(len(images))), images))
            configure(read_timeout=4)
            proxy.stall_seconds = 8
            rates = {"503": 0.02, "500": 0.02, "reset": 0.02, "reset_body": 0.02, "truncate": 0.02, "stall": 0.01}
            proxy.set_rates({f"read.{name}": rate for name, rate in rates.items()})
            read = list(pool.map(lambda uri: read_image(uri, 50_000), uris))
        assert list(map(digest, read)) == list(map(digest, images))
        assert set(proxy.injected) == set(proxy.rates)
        assert proxy.requests["GET"] == len(images) + proxy.injected.total()

    @pytest.mark.parametrize("fault", ["503", "500", "reset", "silent"])
    def test_requests_that_never_succeed(self, fault, put, proxy, configure):
        uri = put("x.jpg", b"1" * 1000)
        configure(attempts=3, read_timeout=1.5 if fault == "silent" else 10)
        proxy.set_rates({f"read.{fault}": 1})
        started = time.monotonic()
        assert kind_of(uri) == "unreadable_storage"
        # aiohttp itself asks once more, at once, when a connection was lost.
        assert proxy.requests.total() == (6 if fault == "reset" else 3)
        assert time.monotonic() - started < 20

    @pytest.mark.parametrize("fault", ["reset_body", "truncate", "stall"])
    def test_answers_that_never_arrive_whole(self, fault, put, proxy, configure):
        uri = put("x.jpg", b"1" * 1000)
        configure(read_timeout=1.5 if fault == "stall" else 10)
        proxy.set_rates({f"read.{fault}": 1})
        started = time.monotonic()
        assert kind_of(uri) == "unreadable_storage"
        assert proxy.requests.total() == 4
        assert time.monotonic() - started < 20

    @pytest.mark.parametrize("fault", ["denied", "skewed", "archived"])
    def test_refusals_are_not_asked_again(self, fault, put, proxy):
        uri = put("x.jpg", b"1" * 1000)
        proxy.set_rates({f"read.{fault}": 1})
        assert kind_of(uri) == ("archived" if fault == "archived" else "denied")
        assert proxy.requests.total() == 1

    @pytest.mark.parametrize("fault", ["expired", "expired_403"])
    def test_expired_credentials_are_read_again_once(self, fault, put, proxy):
        uri = put("x.jpg", b"1" * 1000)
        proxy.set_rates({f"read.{fault}": 1})
        with pytest.raises(TryAgain, match="credentials have expired"):
            read_image(uri, 1000)
        assert proxy.requests.total() == 2

    def test_what_is_missing_is_not_asked_again(self, s3, proxy):
        assert kind_of(f"{s3}/nothing.jpg") == "missing"
        assert proxy.requests.total() == 1

    def test_a_store_that_refuses_connections(self, s3, configure, monkeypatch):
        configure(attempts=2)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        started = time.monotonic()
        assert kind_of(f"{s3}/photo.jpg") == "unreadable_storage"
        assert time.monotonic() - started < 20

    def test_five_requests_are_all(self, put, proxy, configure):
        uri = put("x.jpg", b"1")
        configure()
        proxy.set_rates({"read.503": 1})
        assert kind_of(uri) == "unreadable_storage"
        assert proxy.requests.total() == 5

    @pytest.mark.parametrize("length", ["", "\nContent-Length: 4"])
    def test_a_short_body_is_never_the_whole(self, length, s3, answer, configure):
        """The first of these announces nothing: only the range tells."""
        configure()
        count = answer(f"HTTP/1.1 206 Partial\nContent-Range: bytes 0-9/10{length}", b"1234")
        error = failure_of(f"{s3}/x.jpg")
        assert (error.kind, len(count)) == ("unreadable_storage", 4)
        assert "4 of 10 bytes" in error.message

    def test_another_range_than_asked_for(self, s3, answer, configure):
        configure()
        answer("HTTP/1.1 206 Partial\nContent-Range: bytes 6-9/10\nContent-Length: 4", b"1234")
        assert "given 'bytes 6-9/10'" in failure_of(f"{s3}/x.jpg").message

    def test_a_store_that_knows_no_ranges(self, s3, answer, configure):
        configure()
        answer("HTTP/1.1 200 OK\nContent-Length: 10", b"0123456789")
        assert read_image(f"{s3}/x.jpg", 100) == open_stream(f"{s3}/x.jpg").read() == b"0123456789"
        assert read_image(f"{s3}/x.jpg", 4) == b"01234"
        stream = open_stream(f"{s3}/x.jpg", start=7)
        assert stream.read() == b"789"

    def test_an_answer_without_its_size(self, s3, answer, configure):
        configure()
        answer("HTTP/1.1 200 OK\nTransfer-Encoding: chunked", b"4\r\n0123\r\n0\r\n\r\n")
        assert read_image(f"{s3}/x.jpg", 100) == b"0123"

    def test_a_listing_without_a_body_is_not_the_end_of_it(self, s3, answer):
        answer("HTTP/1.1 200 OK\nContent-Length: 0", b"")
        with pytest.raises(StorageUnavailable, match=r"empty answer to listing 'capray-tests' below 'photos/'"):
            list(iter_files(locate(f"{s3}/photos")))

    def test_a_store_that_is_busy_does_not_say_that_there_is_no_such_file(self, put, proxy, configure):
        table = put("x.parquet", encode_parquet(pa.table({"id": ["a"]})))
        configure(attempts=1)
        proxy.set_rates({"read.503": 1})
        with pytest.raises(StorageUnavailable):
            is_file(locate(table))
        with pytest.raises(StorageUnavailable):
            _schema_of(locate(table))

    def test_what_is_no_http(self, s3, answer, configure):
        configure(attempts=2)
        answer("220 smtp.example.com ESMTP", b"")
        assert kind_of(f"{s3}/x.jpg") == "unreadable_storage"

    def test_many_read_at_once_and_outlast_an_outage(self, put, proxy):
        """Several times as many as botocore's default pool lets through, with all refused at first."""
        uri = put("x.jpg", b"1" * 1000)
        read_image(uri, 1000)
        with ThreadPoolExecutor(40) as pool:
            proxy.set_rates({"read.500": 1})
            waiting = [pool.submit(read_image, uri, 1000) for _ in range(40)]
            while proxy.injected["read.500"] < 40:
                time.sleep(0.01)
            proxy.stall_seconds = 2
            proxy.set_rates({"read.stall": 1})
            started = time.monotonic()
            assert {digest(future.result()) for future in waiting} == {digest(b"1" * 1000)}
            assert time.monotonic() - started < 20


class TestAStoreThatIsAway:
    @pytest.fixture
    def uri(self, put, proxy, configure) -> str:
        configure(attempts=2)
        uri = put("x.jpg", b"1" * 1000)
        assert len(read_image(uri, 1000)) == 1000
        return uri

    @pytest.mark.parametrize("fault", ["reset", "500"])
    def test_is_waited_for(self, uri, proxy, fault):
        told: list[str] = []
        proxy.set_rates({f"read.{fault}": 1})
        threading.Timer(3, proxy.set_rates, [{}]).start()
        assert len(read_image(uri, 1000, Patience(30, notify=told.append))) == 1000
        assert [text.partition(" of ")[0] for text in told] == ["waiting: the store"]

    def test_for_longer_stops_the_job_with_nothing_recorded(self, uri, proxy):
        proxy.set_rates({"read.reset": 1})
        with pytest.raises(TryAgain, match="does not answer, and has not for 0.5 s: run the same command again"):
            read_image(uri, 1000, Patience(0.5))

    def test_is_told_from_an_object_that_never_comes(self, uri, proxy):
        proxy.only = "x.jpg"
        proxy.set_rates({"read.reset": 1})
        with pytest.raises(ImageError) as caught:
            read_image(uri, 1000, Patience(30))
        assert caught.value.kind == "unreadable_storage"


class TestStream:
    @pytest.fixture
    def data(self) -> bytes:
        return random.Random(1).randbytes(100 * KIB)

    @pytest.fixture(params=["local", "s3"])
    def uri(self, request, data, tmp_path) -> str:
        if request.param == "s3":
            return request.getfixturevalue("put")("data.bin", data)
        (tmp_path / "data.bin").write_bytes(data)
        return str(tmp_path / "data.bin")

    def test_it_reads_as_a_file_does(self, uri, data):
        rng = random.Random(2)
        file = io.BytesIO(data)
        with open_stream(uri, chunk_bytes=7 * KIB) as stream:
            assert stream.readable() and stream.seekable() and not stream.writable()
            for _ in range(300):
                whence = rng.randrange(3)
                offset = {0: rng.randrange(120 * KIB), 1: rng.randrange(9 * KIB), 2: -rng.randrange(100 * KIB)}[whence]
                if rng.random() < 0.3:
                    assert stream.seek(offset, whence) == file.seek(offset, whence)
                size = rng.choice([0, 1, 512, 5 * KIB, 7 * KIB, 30 * KIB])
                assert stream.read(size) == file.read(size)
                assert stream.tell() == file.tell()
            stream.seek(10)
            assert stream.read() == data[10:]
            assert stream.read() == stream.read(5) == b""
            with pytest.raises(ValueError):
                stream.seek(-1)

    def test_from_a_place_on(self, uri, data):
        stream = open_stream(uri, start=90 * KIB, chunk_bytes=KIB)
        assert stream.tell() == 90 * KIB
        assert stream.read(10) == data[90 * KIB : 90 * KIB + 10]
        assert stream.seek(-5, os.SEEK_END) == 100 * KIB - 5
        assert stream.read() == data[-5:]
        for start in (100 * KIB, 10**9):
            behind = open_stream(uri, start=start)
            assert behind.read(10) == b""
            assert behind.seek(0, os.SEEK_END) == 100 * KIB

    def test_nothing_at_all(self, tmp_path, put):
        (tmp_path / "empty").touch()
        for uri in (str(tmp_path / "empty"), put("empty", b"")):
            stream = open_stream(uri)
            assert stream.seek(0, os.SEEK_END) == 0
            assert stream.read() == open_stream(uri).read(1) == b""

    def test_failures_come_when_it_is_read(self, tmp_path, s3):
        for uri in (f"{s3}/nothing.tar", str(tmp_path / "nothing.tar")):
            for read in (lambda s: s.read(), lambda s: s.read(1), lambda s: s.seek(0, os.SEEK_END), lambda s: s.peek()):
                stream = open_stream(uri)
                for _ in range(2):
                    with pytest.raises(ImageError) as caught:
                        read(stream)
                    assert caught.value.kind == "missing"

    def test_failures_in_the_middle_and_going_on_after_them(self, put, data, proxy, configure):
        stream = open_stream(put("data.bin", data), chunk_bytes=10 * KIB)
        configure(attempts=1)
        assert stream.read(10 * KIB) == data[: 10 * KIB]
        for fault, kind in (("503", "unreadable_storage"), ("truncate", "unreadable_storage"), ("denied", "denied")):
            proxy.set_rates({f"read.{fault}": 1})
            with pytest.raises(ImageError) as caught:
                stream.read(1)
            assert caught.value.kind == kind
        proxy.set_rates({})
        assert stream.read() == data[10 * KIB :]

    def test_an_object_that_changes_is_not_read_on(self, tmp_path, put):
        def write(data: bytes) -> list[str]:
            (tmp_path / "x.bin").write_bytes(data)
            return [str(tmp_path / "x.bin"), put("x.bin", data)]

        for old, new in ((b"1" * 100, b"2" * 100), (b"1" * 100, b"1" * 50), (b"1" * 100, b"1" * 200)):
            streams = [open_stream(uri, chunk_bytes=60) for uri in write(old)]
            assert [stream.read(60) for stream in streams] == [b"1" * 60] * 2
            time.sleep(0.02)
            write(new)
            for stream in streams:
                with pytest.raises(VersionChanged):
                    stream.read()

    @pytest.mark.parametrize("member_kib", [20, 700])
    def test_a_tar_through_faults(self, member_kib, put, proxy, configure):
        rng = random.Random(3)
        members = {f"{i}.jpg": rng.randbytes(member_kib * KIB + i) for i in range(6000 // member_kib)}
        content = tar_bytes(members)
        uri = put("x.tar", content)
        configure()
        proxy.set_rates({"read.503": 0.05, "read.reset": 0.05, "read.reset_body": 0.05, "read.truncate": 0.05})
        stream = open_stream(uri, chunk_bytes=256 * KIB)
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            read = {member.name: digest(tar.extractfile(member).read()) for member in tar}
        assert read == {name: digest(data) for name, data in members.items()}
        assert proxy.injected.total() > 0
        num_chunks = len(content) / (256 * KIB)
        # A member larger than a chunk ends within one, and the next begins with another.
        allowed = num_chunks + 1 + (2 * len(members) if member_kib > 256 else 0)
        assert num_chunks <= proxy.requests["GET"] - proxy.injected.total() <= allowed

    def test_a_large_read_comes_in_chunks(self, put, data, proxy):
        uri = put("data.bin", data)
        for read in (lambda s: s.read(), lambda s: s.read(100 * KIB), lambda s: s.read(10**9)):
            proxy.requests.clear()
            assert read(open_stream(uri, chunk_bytes=10 * KIB)) == data
            assert proxy.requests == {"GET": 10}


class TestOtherStores:
    """Any other fsspec store: it is asked which version it has, as it cannot be asked for one."""

    class Store(MemoryFileSystem):
        protocol = "versioned"
        store: ClassVar[dict] = {}
        reads: ClassVar[int] = 0
        looks: ClassVar[int] = 0
        after_read: ClassVar[Callable[[], None]] = staticmethod(lambda: None)

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.replace("versioned://", "memory://"))

        def info(self, path, **options):
            type(self).looks += 1
            return super().info(path, **options) | {"ETag": hashlib.md5(self.store[path].getvalue()).hexdigest()}

        def cat_file(self, path, start=None, end=None, **options):
            type(self).reads += 1
            data = super().cat_file(path, start, end, **options)
            self.after_read()
            return data

    @pytest.fixture
    def store(self, monkeypatch):
        fsspec.register_implementation("versioned", self.Store, clobber=True)
        fs = fsspec.filesystem("versioned")
        fs.store.clear()
        fs.pipe_file("/a.bin", b"0123456789")
        monkeypatch.setattr(self.Store, "reads", 0)
        monkeypatch.setattr(self.Store, "looks", 0)
        return fs

    def test_a_small_file_has_one_version_however_it_is_read(self, store):
        """A first answer that was the whole file once told no version, and all later ones another."""
        whole, start = Stream("versioned://a.bin"), Stream("versioned://a.bin")
        assert (whole.readall(), start.read(3)) == (b"0123456789", b"012")
        assert whole.version == start.version != ""
        assert Stream("versioned://a.bin", version=whole.version).readall() == b"0123456789"
        store.pipe_file("/a.bin", b"9876543210")
        with pytest.raises(VersionChanged):
            Stream("versioned://a.bin", version=whole.version).readall()

    def test_a_file_written_to_while_its_version_is_found_out_is_read_again(self, store, monkeypatch):
        def change():
            if self.Store.reads == 1:
                store.pipe_file("/a.bin", b"abcde")

        monkeypatch.setattr(self.Store, "after_read", staticmethod(change))
        stream = Stream("versioned://a.bin")
        assert stream.readall() == b"abcde" and self.Store.reads > 1

    def test_an_image_takes_one_request(self, store):
        assert read_image("versioned://a.bin", 1000) == b"0123456789"
        assert (self.Store.reads, self.Store.looks) == (1, 0)


class TestStorage:
    """What ``capray.storage`` writes and reads in one piece."""

    def test_at_modest_rates_everything_arrives(self, s3, proxy, configure, tmp_path):
        configure()
        faults = ("503", "500", "reset", "lose_answer", "drop")
        proxy.set_rates({f"write.{name}": 0.03 for name in faults} | {"read.503": 0.04, "read.reset": 0.04})
        places = [locate(f"{s3}/{tmp_path.name}/{i}") for i in range(100)]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(write_atomic, places, [b"%d" % i for i in range(100)]))
            assert list(pool.map(read_bytes, places)) == [b"%d" % i for i in range(100)]
        assert set(proxy.injected) == set(proxy.rates)

    @pytest.mark.parametrize("fault", ["503", "lose_answer", "drop"])
    def test_writes_that_never_succeed(self, fault, s3, proxy, configure, tmp_path):
        configure(attempts=2)
        place = locate(f"{s3}/{tmp_path.name}/x")
        proxy.set_rates({f"write.{fault}": 1})
        with pytest.raises(StorageError, match=f"writing {place.uri}"):
            write_atomic(place, b"1")
        # botocore's two, s3fs's two, and aiohttp's two when a connection was lost.
        assert proxy.requests["PUT"] == (4 if fault == "503" else 8)
        if fault == "lose_answer":
            assert read_bytes(place) == b"1"

    def test_what_is_large_is_one_request(self, s3, proxy, tmp_path):
        data = b"0123456789abcdef" * (101 * MIB // 16)
        place = locate(f"{s3}/{tmp_path.name}/large")
        write_atomic(place, data)
        assert read_bytes(place) == data
        assert proxy.requests == {"PUT": 1, "GET": 1}
        place.fs.rm_file(place.path)


def test_the_proxy_as_a_process_of_its_own(put, forget, monkeypatch):
    uri = put("photo 1.jpg", b"1" * 100)
    arguments = ["--upstream", os.environ["AWS_ENDPOINT_URL"], "--rate", "read.denied=1", "--only", r"photo \d"]
    command = [sys.executable, "-m", "tests.proxy", *arguments, "--seed", "7", "--port", "0"]
    root = os.path.dirname(os.path.dirname(__file__))
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        monkeypatch.setenv("AWS_ENDPOINT_URL", process.stdout.readline().strip())
        forget()
        assert kind_of(uri) == "denied"
        assert read_image(put("other.jpg", b"2"), 10) == b"2"
        process.send_signal(signal.SIGTERM)
        report = json.loads(process.stdout.read())
    assert report == {"requests": {"GET": 2}, "injected": {"read.denied": 1}}
