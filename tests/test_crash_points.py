"""Whichever write under an output is a run's last, the output stays readable, and the same command completes it.

The real job, plan and loop, without Ray, on a model of S3 and on a real folder: every write is visited, in each way it can
go wrong.
"""

from __future__ import annotations

import builtins
import io
import os
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import pyarrow.parquet as pq
import pytest

from capray.captioning import job, lease_file
from capray.captioning.job import caption
from capray.captioning.record import Summary
from capray.config import CaptionConfig
from capray.errors import CaprayError
from capray.storage import locate
from tests.conftest import make_model, write_photos
from tests.local_executor import LocalExecutor
from tests.model_store import Crash, Fault, ModelFileSystem, Store
from tests.oracle import captions_by_bytes, check_exactly_once, digests


class Bucket:
    """An output on the model of S3."""

    uri = "model://bucket/out"

    def __init__(self, scratch: Path):
        self.scratch = scratch
        self.store = ModelFileSystem.store = Store()
        lease_file._proved.add((locate(self.uri).fs, "bucket"))

    @contextmanager
    def process(self, fault_at: int | None, fault: Fault) -> Iterator[None]:
        """In it, the write of that number meets the fault."""
        store = self.store
        store.num_writes = 0
        store.write_faults = {} if fault_at is None else {fault_at: fault}
        yield
        store.is_process_dead, store.write_faults = False, {}

    @property
    def num_writes(self) -> int:
        return self.store.num_writes

    def copy(self) -> Path:
        """A folder that holds the output."""
        folder = self.scratch / f"copy-{len(list(self.scratch.iterdir()))}"
        for path, data in self.store.objects.items():
            file = folder / path.removeprefix("bucket/out/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        return folder


class Folder:
    """An output in a real folder. The system calls that change it are numbered, and one may be the process's last; half of
    what was never synced is lost then."""

    def __init__(self, scratch: Path):
        self.uri = str(scratch / "out")
        self.num_writes = 0
        self._fault_at: int | None = None
        self._fault = Fault.CRASH_BEFORE
        self._is_dead = False
        self._unsynced: set[int] = set()
        self._lock = threading.RLock()

    @contextmanager
    def process(self, fault_at: int | None, fault: Fault) -> Iterator[None]:
        self.num_writes, self._fault_at, self._fault, self._is_dead = 0, fault_at, fault, False
        with ExitStack() as patches:
            for name in ("replace", "unlink", "remove"):
                call = self._numbered(getattr(os, name))
                patches.enter_context(mock.patch.object(os, name, call))
            patches.enter_context(mock.patch.object(os, "fsync", self._sync(os.fsync)))
            patches.enter_context(mock.patch.object(builtins, "open", self._open(builtins.open)))
            yield
        if self._is_dead:
            for path in Path(self.uri).rglob("*"):
                if path.is_file() and path.stat().st_ino in self._unsynced:
                    os.truncate(path, path.stat().st_size // 2)
        self._unsynced.clear()

    def copy(self) -> Path:
        return Path(self.uri)

    def _call(self, action: Callable, *arguments):
        with self._lock:
            if self._is_dead:
                raise Crash
            is_last = self.num_writes == self._fault_at
            self.num_writes += 1
            if is_last:
                self._is_dead = True
            if not is_last or self._fault is Fault.CRASH_AFTER:
                answer = action(*arguments)
            if is_last:
                raise Crash
            return answer

    def _numbered(self, action: Callable) -> Callable:
        def call(path, *arguments, **options):
            if str(path).startswith(self.uri):
                return self._call(lambda: action(path, *arguments, **options))
            return action(path, *arguments, **options)

        return call

    def _sync(self, fsync: Callable) -> Callable:
        def call(handle: int) -> None:
            if self._is_dead:
                raise Crash
            fsync(handle)
            self._unsynced.discard(os.fstat(handle).st_ino)

        return call

    def _open(self, opened: Callable) -> Callable:
        def call(path, mode: str = "r", *arguments, **options):
            if not str(path).startswith(self.uri):
                return opened(path, mode, *arguments, **options)
            if self._is_dead:
                raise Crash
            file = opened(path, mode, *arguments, **options)
            if "r" in mode:
                return file
            self._unsynced.add(os.fstat(file.fileno()).st_ino)
            return _File(file, self._call)

        return call


class _File:
    """A file being written: the process may end with half of a write in it. The system closes it then."""

    def __init__(self, file, call: Callable):
        self._file, self._call = file, call

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        self._file.write(data[: len(data) // 2])
        self._call(self._file.write, data[len(data) // 2 :])


Place = Bucket | Folder


class World:
    """Inputs of a folder and a tar, two of whose images are none, a model, and what an undisturbed run makes of them."""

    def __init__(self, folder: Path):
        photos = write_photos(folder / "photos", 5)
        (folder / "photos" / "photo-0003-a.jpg").write_bytes(b"this is no image")
        self.inputs = [str(folder / "photos"), str(folder / "shard.tar")]
        with tarfile.open(self.inputs[1], "w") as tar:
            for name, data in {
                "a.jpg": Path(photos[0]).read_bytes(),
                "b.jpg": b"none",
                "c.jpg": _photo(folder),
            }.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        self.model = make_model(folder / "model", seed=0)
        self.wanted = digests(*self.inputs)
        bad = (f"{self.inputs[0]}/photo-0003-a.jpg", f"{self.inputs[1]}#b.jpg")
        self.failed = dict.fromkeys(bad, "not_an_image")
        self.undisturbed: dict[bytes, str] | None = None
        self.seen: set[str] = set()

    def run(self, place: Place, fault_at: int | None = None, fault: Fault = Fault.CRASH_BEFORE) -> Summary | None:
        """A run whose write of that number meets the fault; None when it did not complete."""
        config = CaptionConfig(
            input=self.inputs[0],
            also=(self.inputs[1],),
            output=place.uri,
            model=self.model,
            batch_size=2,
            part_rows=3,
            steal_lease=True,  # The run that holds it is dead; waiting for that to show would take its time.
        )
        before = set(threading.enumerate())
        with place.process(fault_at, fault):
            try:
                summary = caption(config, LocalExecutor())
            except (Crash, CaprayError):
                summary = None
            # Nothing of a process that ended may write in the next one.
            for thread in set(threading.enumerate()) - before:
                thread.join(5 if summary is None else 0)
        self.look(place)
        return summary

    def look(self, place: Place) -> None:
        """What holds at every moment: all parts can be read, no id stands twice, and what stood there once still does."""
        ids: Counter[str] = Counter()
        for file in sorted(place.copy().glob("captions/*")):
            ids.update(pq.read_table(file)["image_id"].to_pylist())
        assert set(ids.values()) <= {1}, ids
        assert self.seen <= ids.keys(), "captions vanished"
        self.seen = set(ids)

    def check(self, place: Place) -> None:
        """Run until it is complete: once is enough."""
        assert self.run(place) is not None, "a run that meets nothing completes"
        check_exactly_once(str(place.copy()), self.wanted, self.undisturbed, self.failed)
        self.seen.clear()


def _photo(folder: Path) -> bytes:
    (path,) = write_photos(folder / "more", 1, seed=1)
    return Path(path).read_bytes()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    with ExitStack() as patches:
        for name in ("load_captioner", "canary_score"):
            patches.enter_context(mock.patch.object(job, name, cache(getattr(job, name))))
        world = World(tmp_path_factory.mktemp("world"))
        place = Folder(tmp_path_factory.mktemp("undisturbed"))
        world.check(place)
        world.undisturbed = captions_by_bytes(place.uri)
        yield world


def num_writes(world: World, place: Place) -> int:
    """In a run that meets nothing."""
    world.check(place)
    return place.num_writes


@pytest.mark.parametrize("fault", Fault)
def test_every_write_on_s3(world, tmp_path, fault):
    number = num_writes(world, Bucket(tmp_path))
    assert number >= 10
    for at in range(number):
        place = Bucket(tmp_path)
        world.run(place, at, fault)
        world.check(place)


@pytest.mark.parametrize("fault", [Fault.CRASH_BEFORE, Fault.CRASH_AFTER])
def test_every_write_in_a_folder(world, tmp_path, fault):
    number = num_writes(world, Folder(tmp_path / "undisturbed"))
    assert number >= 20
    for at in range(number):
        place = Folder(tmp_path / str(at))
        world.run(place, at, fault)
        world.check(place)
