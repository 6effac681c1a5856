"""Rounds of chaos with Ray: a bucket is captioned on a cluster of two logical nodes; half way its processes are killed, its
store goes away or its devices fail, and the same command is run until it ends well."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from capray import images
from capray.config import Decoding
from capray.inference import Inference
from tests.conftest import SeaweedFS, free_port, make_model, write_photos
from tests.oracle import check_exactly_once, digests
from tests.proxy import FaultyProxy

NUM_PHOTOS = 84
PART_ROWS = 12
BATCH_SIZE = 4
SECONDS_PER_IMAGE = 0.1
"""What captioning is slowed down to, so that there is a middle to strike in."""
NETWORK = {
    "read.503": 0.05,
    "read.500": 0.03,
    "read.reset": 0.03,
    "read.reset_body": 0.03,
    "read.truncate": 0.03,
    "read.stall": 0.01,
    "read.expired": 0.01,
    "write.503": 0.05,
    "write.reset": 0.02,
    "write.lose_answer": 0.03,
    "write.drop": 0.02,
    "write.expired": 0.01,
}
KINDS = {
    "driver": "kill -9 of the driver",
    "actor": "kill -9 of the captioning actors",
    "worker": "kill -9 of the processes that fetch",
    "node": "a raylet killed with its workers",
    "store": "the store killed, and started again after 2 s",
    "network": "a share of all requests to the store broken",
    "sick-one": "the device of one of two actors sick for 10 s",
    "sick-all": "all devices sick, and well for the next run",
}
PATTERNS = {"actor": "ray::MapWorker.*CaptioningActor", "worker": r"ray::(MapBatches|IDLE|_map_task)"}
MAX_RUNS = 6
SICK_SECONDS = 10.0
MARK = f"CAPRAY_CHAOS={os.getpid()}"


def pids(pattern: str) -> list[int]:
    """Processes of this world's Ray: other Rays of the machine are left in peace."""
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True)
    ours = []
    for pid in found.stdout.split():
        with suppress(OSError):
            if MARK.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                ours.append(int(pid))
    return ours


def captions_of(photos: Path, model: str) -> dict[bytes, str]:
    """By SHA-256, what the captioner says to each photo: no job takes part."""
    captioner = Inference.load(model)
    found = {}
    for path in photos.iterdir():
        pixels, _, _ = images.load(path.read_bytes(), captioner.captioner.architecture)
        (captioned,) = captioner([pixels], Decoding())
        found[hashlib.sha256(path.read_bytes()).digest()] = captioned.hypotheses[0].caption
    return found


class World:
    """The cluster, the store behind its proxy, the photos and the model of all rounds."""

    def __init__(self, folder: Path):
        import s3fs
        from ray.cluster_utils import Cluster

        self.folder = folder
        self.log, self.sick = folder / "captioned", folder / "sick"
        self.log.touch()
        os.environ.update([MARK.split("=")])
        os.environ["CAPRAY_CHAOS_LOG"] = str(self.log)
        os.environ["CAPRAY_SICK_DEVICE"] = str(self.sick)
        os.environ["CAPRAY_CHAOS_DELAY"] = str(SECONDS_PER_IMAGE)
        # Else a lost node is noticed after a quarter of a minute.
        os.environ.setdefault("RAY_health_check_period_ms", "500")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent / "faults"), os.getcwd()])
        self.store = SeaweedFS(folder / "weed")
        self.proxy = FaultyProxy(self.store.endpoint, stall_seconds=2)
        os.environ.update(self.store.environment)
        self.store.start()
        self.proxy.__enter__()
        os.environ["AWS_ENDPOINT_URL"] = self.proxy.endpoint
        self.endpoint = self.store.endpoint
        self.bucket = self.store.make_bucket("capray-chaos")
        self.model = make_model(folder / "model", seed=0)
        self.fs = s3fs.S3FileSystem(endpoint_url=self.endpoint, use_listings_cache=False)
        write_photos(folder / "photos", NUM_PHOTOS)
        self.fs.put(str(folder / "photos"), f"{self.bucket}/", recursive=True)
        self.wanted = digests(f"{self.bucket}/photos", endpoint=self.endpoint)
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, "gcs_server_port": free_port()}
        )
        self.node = self.cluster.add_node(num_cpus=2)
        os.environ["RAY_ADDRESS"] = self.cluster.address
        self.undisturbed = captions_of(folder / "photos", self.model)

    def start(self, output: str, num_actors: int, log: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "capray", "caption", f"{self.bucket}/photos", output, "--model", self.model]
        command += ["--batch-size", str(BATCH_SIZE), "--num-actors", str(num_actors)]
        command += ["--part-rows", str(PART_ROWS), "--part-seconds", "5"]
        command += ["--precision", "fp32", "--second-look-seconds", "1", "--patience-seconds", "20"]
        with log.open("w") as file:
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    def num_captioned(self) -> int:
        """Images captioned so far, published or not."""
        return sum(int(line) for line in self.log.read_text().split())

    def num_parts(self, output: str) -> int:
        if not output.startswith("s3://"):
            return len(list(Path(output, "captions").glob("*.parquet")))
        with suppress(OSError):
            return len(self.fs.glob(f"{output}/captions/*.parquet"))
        return 0

    def kill(self, kind: str) -> bool:
        """Kill the processes of a kind; whether there were any."""
        struck = pids(PATTERNS[kind])
        for pid in struck:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return bool(struck)

    def close(self) -> None:
        self.cluster.shutdown()
        self.proxy.__exit__(None, None, None)
        self.store.stop()


@dataclass
class Round:
    """One output, and what happens to those who write it. Kinds joined by + strike one behind the other."""

    world: World
    kind: str
    number: int
    place: str
    rng: random.Random
    drivers: list[subprocess.Popen] = field(default_factory=list)
    logs: list[Path] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    struck: int | None = None
    redone: int = 0

    def __post_init__(self) -> None:
        name = f"out-{self.kind}-{self.number}"
        self.output = f"{self.world.bucket}/{name}" if self.place == "bucket" else str(self.world.folder / name)

    def check(self) -> None:
        """Raises AssertionError when the promise is broken, or the fault never struck."""
        world = self.world
        before = world.num_captioned()
        kinds = self.kind.split("+") if self.kind else []
        parts = range(1, NUM_PHOTOS // PART_ROWS - 2)
        strikes = list(zip(kinds, sorted(self.rng.choices(parts, k=len(kinds))), strict=True))
        text = ""
        try:
            for _ in range(MAX_RUNS):
                driver = self.start()
                while strikes and driver.poll() is None:
                    kind, threshold = strikes[0]
                    if kind == "network" or world.num_parts(self.output) >= threshold:
                        time.sleep(self.rng.random())
                        captioned = world.num_captioned() - before
                        if driver.poll() is None and self.strike(kind, driver):
                            strikes.pop(0)
                            self.struck = self.struck if self.struck is not None else max(0, captioned)
                    time.sleep(0.1)
                text = self.wait()
                self.heal()
                if 0 in self.codes:
                    break
            assert 0 in self.codes, text
            if self.codes[-1] != 0 or "network" in kinds:
                self.start()
                text = self.wait()
                assert self.codes[-1] == 0, text
        finally:
            self.heal()
            for driver in self.drivers:
                driver.kill()
        assert not strikes, f"these strikes never landed: {strikes}"
        captions = check_exactly_once(self.output, world.wanted, world.undisturbed, endpoint=world.endpoint)
        self.redone = world.num_captioned() - before - len(captions)
        if "sick-all" in kinds:
            assert 75 in self.codes, f"with all devices sick it ended with {self.codes}: {text}"

    def start(self) -> subprocess.Popen:
        log = self.world.folder / f"{self.kind}-{self.number}-{len(self.drivers)}.log"
        self.drivers.append(self.world.start(self.output, 2 if "sick" in self.kind else 1, log))
        self.logs.append(log)
        return self.drivers[-1]

    def wait(self) -> str:
        """The output of the last driver, when it has ended."""
        self.codes.append(self.drivers[-1].wait(timeout=300))
        return self.logs[-1].read_text()

    def heal(self) -> None:
        """The store and the devices work again."""
        self.world.proxy.set_rates({})
        self.world.sick.unlink(missing_ok=True)

    def strike(self, kind: str, driver: subprocess.Popen) -> bool:
        """Break something; whether it could be done."""
        world = self.world
        if kind in PATTERNS:
            return world.kill(kind)
        strikes: dict[str, Callable[[], None]] = {
            "driver": driver.kill,
            "node": self._lose_node,
            "store": self._lose_store,
            "network": lambda: world.proxy.set_rates(NETWORK),
            "sick-one": self._sicken_one,
            "sick-all": self._sicken_all,
        }
        strikes[kind]()
        return True

    def _lose_node(self) -> None:
        world = self.world
        world.cluster.remove_node(world.node, allow_graceful=False)
        world.node = world.cluster.add_node(num_cpus=2)

    def _lose_store(self) -> None:
        self.world.store.stop()
        time.sleep(2)
        self.world.store.start()

    def _sicken_all(self) -> None:
        self.world.sick.write_text("error *")

    def _sicken_one(self) -> None:
        self.world.sick.write_text(f"error {self.world.node.node_id}")
        time.sleep(SICK_SECONDS)
        self.world.sick.unlink()
