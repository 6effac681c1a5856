"""Whichever write under an output is a run's last, the output stays readable, and the same command completes it.

The real job, plan and loop, without Ray, on a model of S3 and in a real folder. Every write of a run is visited, in what it
left behind: as the last one before a crash, and as one that lands late, when another run has completed the output.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from capray.captioning import lease_file
from capray.captioning.job import caption
from capray.captioning.record import Summary
from capray.config import CaptionConfig
from capray.errors import CaprayError
from capray.storage import locate
from tests.conftest import make_model, write_photos
from tests.local_executor import LocalExecutor, models_loaded_once
from tests.model_store import Fault, ModelFileSystem, Store
from tests.oracle import captions_by_bytes, check_exactly_once, digests

BUCKET = "model://bucket/out"
PREFIX = "bucket/out/"

Files = dict[str, bytes]
"""An output, by the names of its files."""


@dataclass
class World:
    """Inputs of a folder and a tar with an image in each that is none, a model, and an undisturbed run's captions."""

    folder: Path

    def __post_init__(self) -> None:
        photos = write_photos(self.folder / "photos", 4)
        bad = self.folder / "photos" / "photo-0002-a.jpg"
        bad.write_bytes(b"no image")
        self.inputs = [str(self.folder / "photos"), str(self.folder / "shard.tar")]
        with tarfile.open(self.inputs[1], "w") as tar:
            tar.add(photos[0], "a.jpg")
            tar.add(bad, "b.jpg")
            tar.add(write_photos(self.folder / "more", 1, seed=1)[0], "c.jpg")
        self.model = make_model(self.folder / "model", seed=0)
        self.wanted = digests(*self.inputs)
        self.failed = {str(bad): "not_an_image", f"{self.inputs[1]}#b.jpg": "not_an_image"}
        self.undisturbed: dict[bytes, str] | None = None

    def run(self, output: str) -> Summary:
        """The command. The run that holds the lease is dead; waiting until that shows would take its time."""
        config = CaptionConfig(
            input=self.inputs[0],
            also=(self.inputs[1],),
            output=output,
            model=self.model,
            batch_size=2,
            part_rows=3,
            steal_lease=True,
        )
        return caption(config, LocalExecutor())

    def look(self, files: Files) -> set[str]:
        """What holds at every moment: all parts can be read, and no id stands twice; the captioned ids."""
        ids = []
        for name, data in files.items():
            if name.startswith(("captions/", "failures/")):
                table = pq.read_table(io.BytesIO(data))
                ids += table["image_id"].to_pylist() if name.startswith("captions/") else []
        assert len(ids) == len(set(ids)), ids
        return set(ids)

    def check(self, output: str) -> None:
        check_exactly_once(output, self.wanted, self.undisturbed, self.failed)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    with models_loaded_once():
        world = World(tmp_path_factory.mktemp("world"))
        place = str(tmp_path_factory.mktemp("undisturbed"))
        world.run(place)
        world.check(place)
        world.undisturbed = captions_by_bytes(place)
        yield world


def bucket(files: Files | None = None) -> Store:
    """A store with an output in it."""
    store = ModelFileSystem.store = Store()
    store.objects = {PREFIX + name: data for name, data in (files or {}).items()}
    lease_file._proved.add((locate(BUCKET).fs, "bucket"))
    return store


def files_in(store: Store) -> Files:
    return {path.removeprefix(PREFIX): data for path, data in store.objects.items()}


def write_files(files: Files, folder: Path) -> str:
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(folder)


def read_files(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.timeout(600)
def test_every_write_on_s3(world, tmp_path):
    states: list[Files] = [{}]
    store = bucket()
    store.after_write = lambda: states.append(files_in(store))
    world.run(BUCKET)
    assert len(states) > 20
    seen: set[str] = set()
    for before, after in itertools.pairwise(states):
        now = world.look(after)
        assert seen <= now, "captions vanished"
        seen = now
        store = bucket(before)
        world.run(BUCKET)
        world.check(write_files(files_in(store), tmp_path / "out"))
        # The write that was not made then, by a run that was frozen and woke up.
        late = {name: data for name, data in after.items() if before.get(name) != data}
        if any(name.startswith(("captions/", "failures/", "_capray/plan/")) for name in late):
            store = bucket(files_in(store) | late)
            assert world.run(BUCKET).captions == 0
            world.check(write_files(files_in(store), tmp_path / "out"))


@pytest.mark.timeout(600)
def test_every_kind_of_write_in_a_folder(world, tmp_path, monkeypatch):
    """A file is written under another name, synced and renamed: before the first renaming of each kind the power fails."""
    out = tmp_path / "out"
    states: dict[str, Files] = {}
    replace = os.replace

    def replaced(source, target) -> None:
        if str(target).startswith(str(out)):
            files = read_files(out)
            temporary = str(Path(source).relative_to(out))
            kind = Path(target).parent.name + re.match(r"[a-z]*", Path(target).name)[0]
            states.setdefault(kind, files | {temporary: files[temporary][: len(files[temporary]) // 2]})
        replace(source, target)

    monkeypatch.setattr(os, "replace", replaced)
    world.run(str(out))
    monkeypatch.undo()
    assert len(states) >= 6
    for files in states.values():
        world.look(files)
        world.run(write_files(files, out))
        world.check(str(out))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", [Fault.FAILS, Fault.ANSWER_LOST])
@pytest.mark.parametrize("name", ["chunk-", "units-", "members-", "job.json", "captions/part-", "failures/part-", "runs/"])
def test_a_write_that_is_refused_or_goes_unanswered(world, tmp_path, name, fault):
    store = bucket()
    store.write_fault = (name, fault)
    try:
        world.run(BUCKET)
    except CaprayError:
        assert fault is Fault.FAILS
        world.look(files_in(store))
        world.run(BUCKET)
    assert store.write_fault is None, "it was met"
    world.check(write_files(files_in(store), tmp_path / "out"))
