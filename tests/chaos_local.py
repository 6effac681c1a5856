"""Rounds of chaos without Ray: the input, the store, the disk, the clock or the driver of a whole job is struck at a chosen
moment, and the same command is run until it ends well."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGTERM
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
from PIL.PngImagePlugin import PngInfo

from capray import storage
from capray.captioning import writer
from capray.captioning.job import caption
from capray.captioning.units import Unit
from capray.config import CaptionConfig
from capray.errors import CaprayError
from tests.chaos_driver import EXPIRY_SECONDS, Driver, Order, short_lease
from tests.conftest import SeaweedFS, image_bytes, make_model, tar_bytes, write_photos
from tests.local_executor import LocalExecutor, models_loaded_once
from tests.oracle import Digests, captions_by_bytes, check_exactly_once, digests, read_parts
from tests.proxy import FaultyProxy

NUM_PHOTOS = 28
MAX_RUNS = 8
PARTITION_SECONDS = 3.0
PATIENCE_SECONDS = 20.0

Photos = dict[str, bytes]
Play = Callable[["Round"], None]


@dataclass(frozen=True)
class Kind:
    """A fault, and where it can strike: ``folder``, ``shared`` (a folder without the kernel's locks) or ``bucket``."""

    name: str
    about: str
    places: tuple[str, ...]
    play: Play


KINDS: dict[str, Kind] = {}


def kind(name: str, about: str, *places: str) -> Callable[[Play], Play]:
    def add(play: Play) -> Play:
        KINDS[name] = Kind(name, about, places or ("folder", "bucket"), play)
        return play

    return add


class World:
    """What all rounds share: a model, two generations of photos, what an undisturbed run says of them, and a store."""

    def __init__(self, folder: Path, with_store: bool):
        self.folder = folder
        sys.path.insert(0, str(Path(__file__).parent / "faults"))  # Child processes load it.
        self.model = make_model(folder / "model", seed=0)
        self.first, self.second = (self._photos(seed) for seed in (1, 2))
        self.undisturbed: dict[bytes, str] = {}
        self.endpoint: str | None = None
        self.environment: dict[str, str] = {}
        if with_store:
            self.store = SeaweedFS(folder / "weed")
            os.environ.update(self.store.environment)
            self.store.start()
            self.endpoint = self.store.endpoint
            self.proxy = FaultyProxy(self.endpoint, stall_seconds=PARTITION_SECONDS)
            self.proxy.__enter__()
            self.environment = self.store.environment | {"AWS_ENDPOINT_URL": self.proxy.endpoint}
            self.bucket = self.store.make_bucket("capray-chaos")
            os.environ.update(self.environment)
        self._stack = ExitStack()
        self._stack.enter_context(models_loaded_once())
        for seed in (1, 2):
            caption(self.config(str(folder / f"photos-{seed}"), str(folder / f"undisturbed-{seed}")), LocalExecutor())
            self.undisturbed |= captions_by_bytes(str(folder / f"undisturbed-{seed}"))

    def config(self, place: str, output: str, **settings) -> CaptionConfig:
        return CaptionConfig(**self.settings(place, output) | settings)

    def settings(self, place: str, output: str) -> dict:
        return {
            "input": place,
            "output": output,
            "model": self.model,
            "batch_size": 4,
            "part_rows": 6,
            "fetch_concurrency": 4,
            "second_look_seconds": 0.2,
            "patience_seconds": PATIENCE_SECONDS,
        }

    def close(self) -> None:
        self._stack.close()
        if self.endpoint:
            self.proxy.__exit__(None, None, None)
            self.store.stop()

    def _photos(self, seed: int) -> Photos:
        return {Path(path).name: Path(path).read_bytes() for path in self._write(seed)}

    def _write(self, seed: int) -> list[str]:
        return write_photos(self.folder / f"photos-{seed}", NUM_PHOTOS, seed)


@dataclass
class Round:
    """One output, and what happens on the way to it.

    Attributes:
        wanted: the digests of the bytes each id may be captioned from.
        failed: images that cannot be captioned, with the kind of failure they must end with.
        struck: images captioned when the fault struck.
    """

    world: World
    kind: Kind
    number: int
    place: str
    rng: random.Random
    wanted: Digests = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    codes: list[int] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    struck: int | None = None
    num_captioned: int = 0
    redone: int = 0
    input: str = ""
    settings: dict = field(default_factory=dict)
    drivers: list[Driver] = field(default_factory=list)
    output: str = ""

    def __post_init__(self) -> None:
        name = f"{self.kind.name}-{self.number}"
        self.root = f"{self.world.bucket}/{name}" if self.place == "bucket" else str(self.world.folder / name)
        self.output = self.output or f"{self.root}/out"

    def check(self) -> None:
        """Play it; raises AssertionError when the promise is broken, or the fault never struck."""
        try:
            self.kind.play(self)
            self.finish()
        finally:
            for driver in self.drivers:
                driver.kill()
                self.num_captioned += driver.num_captioned
        assert self.struck is not None, "the strike never landed"
        captions = check_exactly_once(self.output, self.wanted, self.world.undisturbed, self.failed, self.world.endpoint)
        self.redone = self.num_captioned - len(captions)

    # What a round is made of.

    def lay(self, layout: str, photos: Photos, order: Iterable[str] | None = None) -> None:
        """Write the input: ``objects``, or a ``table``, ``tars`` or ``manifest`` with the photos in an order."""
        order = list(order or photos)
        for name, data in getattr(self, f"_{layout}")(photos, order).items():
            self.write(f"{self.root}/in/{name}", data)
        self.input = f"{self.root}/in/list.parquet" if layout == "manifest" else f"{self.root}/in"

    def run(self, executor: LocalExecutor | None = None, **settings) -> int:
        """The command, in this process; its exit code."""
        executor = executor or LocalExecutor()
        config = self.world.config(self.input, self.output, **self.settings | settings)
        try:
            caption(config, executor)
            self.codes.append(0)
            self.messages.append("")
        except CaprayError as error:
            self.codes.append(error.exit_code)
            self.messages.append(str(error))
        self.num_captioned += executor.num_captioned
        return self.codes[-1]

    def drive(self, **options) -> Driver:
        """The command, in a process of its own."""
        settings = self.world.settings(self.input, self.output) | self.settings
        folder = self.world.folder / f"driver-{self.kind.name}-{self.number}-{len(self.drivers)}"
        is_shared = self.place == "shared"
        driver = Driver(Order(settings, folder, self.world.environment, is_shared=is_shared, **options))
        self.drivers.append(driver)
        return driver

    def wait(self, driver: Driver) -> int:
        self.codes.append(driver.wait())
        self.messages.append(driver.text())
        return self.codes[-1]

    def finish(self) -> None:
        """The same command until it ends well, and once more: it finds nothing to do."""
        with short_lease(self.place == "shared"):
            for _ in range(MAX_RUNS):
                if self.run() == 0:
                    break
            assert self.codes[-1] == 0, f"it never ended well: {self.messages[-1]}"
            before = self.num_captioned
            assert self.run() == 0, self.messages[-1]
            assert self.num_captioned == before, "a finished output was captioned again"

    def strike(self) -> None:
        self.struck = self.struck if self.struck is not None else len(self.captioned())

    def at_block(self, action: Callable[[], None], low: int = 1, high: int = 5) -> LocalExecutor:
        """An executor that calls ``action`` once, after a block drawn by chance."""
        at = self.rng.randint(low, high)

        def hook(number: int) -> None:
            if number == at:
                self.strike()
                action()

        return LocalExecutor(after_block=hook)

    def captioned(self) -> set[str]:
        with suppress(FileNotFoundError):
            return {row["image_id"] for row in read_parts(self.output, "captions", self.world.endpoint)}
        return set()

    def digests(self) -> Digests:
        return digests(self.input, endpoint=self.world.endpoint)

    def write(self, uri: str, data: bytes) -> None:
        if uri.startswith("s3://"):
            self._fs.pipe_file(uri, data)
            return
        path = Path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_bytes(data)
        temporary.replace(path)

    @property
    def _fs(self):
        import s3fs

        return s3fs.S3FileSystem(endpoint_url=self.world.endpoint, use_listings_cache=False)

    def _objects(self, photos: Photos, order: list[str]) -> Photos:
        return {name: photos[name] for name in order}

    def _table(self, photos: Photos, order: list[str]) -> dict[str, bytes]:
        return {"table.parquet": parquet({"image_id": order, "image": [photos[name] for name in order]})}

    def _tars(self, photos: Photos, order: list[str]) -> dict[str, bytes]:
        """Four shards; which one a photo lies in does not follow from the order."""
        tars = {}
        for number in range(4):
            inside = [name for name in order if zlib.crc32(name.encode()) % 4 == number]
            tars[f"{number}.tar"] = tar_bytes({name: photos[name] for name in inside})
        return tars

    def _manifest(self, photos: Photos, order: list[str]) -> dict[str, bytes]:
        """A table of ids and URIs; the files are named after their bytes."""
        uris = []
        for name in order:
            uris.append(f"{self.root}/photos/{hashlib.md5(photos[name]).hexdigest()}.jpg")
            self.write(uris[-1], photos[name])
        return {"list.parquet": parquet({"image_id": order, "uri": uris})}


def parquet(columns: dict[str, list]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=7)
    return buffer.getvalue()


# The input is rewritten.

LAYOUTS = ("table", "tars", "manifest", "objects")


def _rewritten(layout: str, is_during: bool) -> Play:
    def play(round: Round) -> None:
        world = round.world
        round.lay(layout, world.first)
        before = round.digests()
        reordered = round.rng.sample(sorted(world.second), NUM_PHOTOS)

        def rewrite() -> None:
            round.lay(layout, world.second, reordered)

        if is_during:
            assert round.run(round.at_block(rewrite)) == 0, round.messages[-1]
            after = round.digests()
            round.wanted = {image_id: before[image_id] | after[image_id] for image_id in before}
            return
        round.run(limit=round.rng.randint(4, 20))
        done = round.captioned()
        round.strike()
        rewrite()
        after = round.digests()
        round.wanted = {image_id: (before if image_id in done else after)[image_id] for image_id in before}

    return play


for _layout in LAYOUTS:
    for _moment in ("between", "during"):
        _name = f"{_layout.rstrip('s')}-{_moment}"
        _when = "between two runs" if _moment == "between" else "while it is read"
        kind(_name, f"{_layout.rstrip('s')} rewritten, in another order, {_when}")(_rewritten(_layout, _moment == "during"))


@kind("shard-mended", "a corrupt shard, mended after a run that said so")
def shard_mended(round: Round) -> None:
    layout = round.rng.choice(["table", "tars"])
    round.lay(layout, round.world.first)
    good = round.digests()
    name = "z-other.parquet" if layout == "table" else "z-other.tar"
    other = {f"other {name}": data for name, data in round.world.second.items()}
    (data, *_) = getattr(round, f"_{layout}")(other, list(other)).values()
    round.write(f"{round.root}/in/{name}", b"\0" * 100 if layout == "table" else b"no tar" * 300)
    assert round.run() == 1 and name in round.messages[-1], round.messages[-1]
    round.strike()
    assert round.captioned() == set(good), "what could be read was captioned"
    round.write(f"{round.root}/in/{name}", data)
    round.wanted = round.digests()


# A machine's faults.


def _mount(round: Round, is_empty: bool, is_long: bool) -> None:
    """The input's folder goes away while a process, which has read files of this input only, captions it."""
    round.lay("objects", round.world.first)
    round.wanted = round.digests()
    round.settings["patience_seconds"] = 1.0 if is_long else PATIENCE_SECONDS
    place, aside = Path(round.input), Path(f"{round.input} away")
    driver = round.drive(block_seconds=0.05)
    assert driver.await_blocks(round.rng.randint(1, 5)), driver.text()
    round.strike()
    place.rename(aside)
    if is_empty:
        place.mkdir()
    if is_long:
        assert round.wait(driver) == 75, driver.text()
    else:
        time.sleep(2)
    if is_empty:
        place.rmdir()
    aside.rename(place)
    if not is_long:
        assert round.wait(driver) == 0, driver.text()


@kind("mount-dropped", "the input's mount away for 2 s", "folder")
def mount_dropped(round: Round) -> None:
    _mount(round, is_empty=False, is_long=False)


@kind("mount-away", "the input's mount away for good, and back for the next run", "folder")
def mount_away(round: Round) -> None:
    _mount(round, is_empty=False, is_long=True)


@kind("mount-empty", "an empty mountpoint, and the mount back for the next run", "folder")
def mount_empty(round: Round) -> None:
    _mount(round, is_empty=True, is_long=True)


@kind("endless-decode", "a decoder that never ends")
def endless_decode(round: Round) -> None:
    mark = PngInfo()
    mark.add_text("note", "HANGS-THE-DECODER")
    round.lay("objects", round.world.first | {"photo-0005-a.png": image_bytes(pnginfo=mark)})
    round.wanted = round.digests()
    (hanging,) = (image_id for image_id in round.wanted if image_id.endswith(".png"))
    round.failed = {hanging: "crashed"}

    def is_isolated(unit: Unit) -> bool:
        return hanging in unit.places["image_id"].to_pylist()

    assert round.run(LocalExecutor(is_isolated=is_isolated, decode_seconds=1.0)) == 0, round.messages[-1]
    round.strike()


@kind("clock", "a clock 10 minutes ahead in the first run")
def clock(round: Round) -> None:
    round.lay("objects", round.world.first | {"bad.jpg": b"this is no image"})
    round.wanted = round.digests()
    bad = f"{round.input}/bad.jpg"
    ahead = time.time_ns() + 600 * 10**9
    with mock.patch.object(writer.time, "time_ns", return_value=ahead):
        assert round.run() == 0, round.messages[-1]
    round.write(bad, round.world.second["photo-0001.jpg"][:-200])
    round.strike()
    assert round.run(retry_failed=()) == 0, round.messages[-1]
    round.failed = {bad: "truncated"}


@kind("disk-full", "the output's disk full, and room again for the next run", "folder")
def disk_full(round: Round) -> None:
    round.lay("objects", round.world.first)
    round.wanted = round.digests()
    with _small_disk(Path(round.root) / "disk") as disk:
        round.output = f"{disk}/out"
        filler = disk / "filler"

        def fill() -> None:
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                for _ in range(4096):
                    file.write(b"x" * 512)

        assert round.run(round.at_block(fill)) != 0
        assert "no space left" in round.messages[-1].lower(), round.messages[-1]
        filler.unlink()
        round.finish()
        kept = f"{round.root}/kept"
        subprocess.run(["cp", "-r", round.output, kept], check=True)
    round.output = kept


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    """A file system of a megabyte; without the right to mount one, a folder that is full as long as it holds ``filler``."""
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        replace_file = storage._replace_file

        def replace(*arguments) -> None:
            if (folder / "filler").exists():
                raise OSError(errno.ENOSPC, "No space left on device")
            replace_file(*arguments)

        with mock.patch.object(storage, "_replace_file", replace):
            yield folder
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


# The store.


@kind("partition", "the store partitioned during a PUT", "bucket")
def partition(round: Round) -> None:
    round.lay("objects", round.world.first)
    round.wanted = round.digests()
    proxy = round.world.proxy
    at, side = round.rng.randint(1, 4), round.rng.choice(["silent", "lose_answer"])
    write_atomic, count = writer.write_atomic, [0]

    def write(location, *arguments, **options):
        if "/captions/part-" in location.path:
            count[0] += 1
            if count[0] == at:
                round.strike()
                proxy.set_rates({f"write.{side}": 1.0, "read.silent": 1.0})
                threading.Timer(PARTITION_SECONDS, proxy.set_rates, [{}]).start()
        return write_atomic(location, *arguments, **options)

    with short_lease(), mock.patch.object(writer, "write_atomic", write):
        assert round.run() in (0, 75), round.messages[-1]
    time.sleep(PARTITION_SECONDS if round.codes[-1] else 0)


@kind("slow-down", "SlowDown on half the keys for a while", "bucket")
def slow_down(round: Round) -> None:
    round.lay("objects", round.world.first)
    round.wanted = round.digests()
    proxy = round.world.proxy
    before = proxy.injected["read.503"]
    with ExitStack() as undo:
        undo.callback(setattr, proxy, "only", "")
        undo.callback(proxy.set_rates, {})
        proxy.only = r"photo-\d*[02468]\.jpg"
        proxy.set_rates({"read.503": 1.0})
        threading.Timer(2, proxy.set_rates, [{}]).start()
        assert round.run() == 0, round.messages[-1]
    assert proxy.injected["read.503"] > before
    round.strike()


# The driver.


def _frozen(stop_at: str) -> Play:
    def play(round: Round) -> None:
        round.lay(round.rng.choice(["objects", "table"]), round.world.first)
        round.wanted = round.digests()
        frozen = round.drive(stop_at=stop_at)
        assert frozen.await_stop(), f"it never stopped: {frozen.text()}"
        round.strike()
        other = round.drive()
        if round.place == "folder":
            assert round.wait(other) == 75 and str(frozen.pid) in other.text(), other.text()
        else:
            time.sleep(EXPIRY_SECONDS)
            assert round.wait(other) == 0, other.text()
        frozen.send(SIGCONT)
        assert round.wait(frozen) == (0 if round.place == "folder" else 75), frozen.text()

    return play


for _name, _stop_at in {"listing": r"/plan/.*chunk-", "planning": r"/plan/.*units-", "put": "/captions/part-"}.items():
    kind(f"frozen-{_name}", f"the driver frozen past its lease: {_name}", "bucket", "shared", "folder")(_frozen(_stop_at))


def _signalled(round: Round, number: int, is_at_once: bool = False) -> None:
    round.lay("objects", round.world.first)
    round.wanted = round.digests()
    driver = round.drive(block_seconds=0.02)
    assert driver.await_blocks(round.rng.randint(1, 5)), driver.text()
    round.strike()
    driver.send(number)
    other = round.drive() if is_at_once else None
    round.wait(driver)
    if other is not None:
        round.wait(other)


@kind("killed", "kill -9 of the driver", "bucket", "shared", "folder")
def killed(round: Round) -> None:
    _signalled(round, SIGKILL)


@kind("terminated", "SIGTERM to the driver")
def terminated(round: Round) -> None:
    _signalled(round, SIGTERM)
    assert round.codes == [143], round.messages[-1]


@kind("dying", "SIGTERM to the driver, and the same command at once")
def dying(round: Round) -> None:
    _signalled(round, SIGTERM, is_at_once=True)


@kind("twice", "two runs started at once", "bucket", "shared", "folder")
def twice(round: Round) -> None:
    round.lay("objects", round.world.first)
    round.wanted = round.digests()
    drivers = [round.drive(block_seconds=0.05) for _ in range(2)]
    round.strike()
    assert sorted(round.wait(driver) for driver in drivers) == [0, 75], "\n".join(round.messages)
