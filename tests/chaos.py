"""Random faults, round after round, each judged by the oracle: `make chaos ROUNDS=30`.

A round captions a bucket with a driver of its own on a Ray of two logical nodes, into a folder and into the bucket by
turns. Somewhere on the way something is broken; the same command is run until it ends well; then every id must stand
once, with the caption of an undisturbed run.

    driver     kill -9 of the driver             terminate  SIGTERM to the driver
    actor      kill -9 of the captioning actors  worker     kill -9 of the processes that fetch
    node       a raylet killed with its workers  store      SeaweedFS killed and started again
    network    a proxy breaks a share of all requests to the store
    frozen     the driver stopped past its lease, another run beside it, then woken
    dying      SIGTERM, and the same command at once
    twice      two runs started at once

Kinds joined by + strike one after the other in one round: actor+node+driver.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.oracle import check_exactly_once

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
KINDS = ("driver", "actor", "node", "worker", "store", "terminate", "network", "dying", "twice", "frozen")
PATTERNS = {"actor": "ray::MapWorker.*CaptioningActor", "worker": r"ray::(MapBatches|IDLE|_map_task)"}
MAX_RUNS = 6
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


class World:
    """The cluster, the store behind its proxy, the photos and the model of all rounds."""

    def __init__(self, folder: Path, num_photos: int):
        import s3fs
        from ray.cluster_utils import Cluster

        from tests.conftest import SeaweedFS, free_port, make_model, write_photos
        from tests.proxy import FaultyProxy

        self.folder, self.num_photos = folder, num_photos
        self.log = folder / "captioned"
        self.log.touch()
        os.environ.update([MARK.split("=")])
        os.environ["CAPRAY_CHAOS_LOG"] = str(self.log)
        os.environ["CAPRAY_CHAOS_DELAY"] = str(SECONDS_PER_IMAGE)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent / "faults"), os.getcwd()])
        self.store = SeaweedFS(folder / "weed")
        self.proxy = FaultyProxy(self.store.endpoint, stall_seconds=2)
        os.environ.update(self.store.environment)
        self.store.start()
        self.proxy.__enter__()
        os.environ["AWS_ENDPOINT_URL"] = self.proxy.endpoint
        self.bucket = self.store.make_bucket("capray-chaos")
        self.model = make_model(folder / "model", seed=0)
        self.fs = s3fs.S3FileSystem(use_listings_cache=False)
        paths = write_photos(folder / "photos", num_photos)
        self.fs.put(str(folder / "photos"), f"{self.bucket}/", recursive=True)
        self.wanted = {f"{self.bucket}/photos/{Path(path).name}" for path in paths}
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 3, "include_dashboard": False, "gcs_server_port": free_port()},
        )
        self.node = self.cluster.add_node(num_cpus=3)
        os.environ["RAY_ADDRESS"] = self.cluster.address

    def start(self, output: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "capray", "caption", f"{self.bucket}/photos", output, "--model", self.model]
        command += ["--batch-size", str(BATCH_SIZE), "--num-actors", "1"]
        command += ["--part-rows", str(PART_ROWS), "--part-seconds", "5"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def num_captioned(self) -> int:
        """Images captioned so far, published or not."""
        return sum(int(line) for line in self.log.read_text().split())

    def num_parts(self, output: str) -> int:
        if not output.startswith("s3://"):
            return len(list(Path(output, "captions").glob("*.parquet")))
        with suppress(OSError):
            return len(self.fs.glob(f"{output}/captions/*.parquet"))
        return 0

    def copy(self, output: str) -> str:
        """A local folder that holds ``output``."""
        if not output.startswith("s3://"):
            return output
        local = str(self.folder / output.rpartition("/")[2])
        for table in ("captions", "failures"):
            Path(local, table).mkdir(parents=True, exist_ok=True)
            for path in self.fs.glob(f"{output}/{table}/*.parquet"):
                self.fs.get_file(path, f"{local}/{table}/{Path(path).name}")
        return local

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
    """One output, and what happens to its drivers."""

    world: World
    kind: str
    output: str
    rng: random.Random
    drivers: list[subprocess.Popen] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    captioned_when_struck: int | None = None

    def run(self, undisturbed: dict[str, str] | None = None) -> dict[str, str]:
        """The captions; raises AssertionError when the promise is broken."""
        world = self.world
        kinds = self.kind.split("+") if self.kind else []
        parts = range(1, world.num_photos // PART_ROWS - 2)
        strikes = list(zip(kinds, sorted(self.rng.choices(parts, k=len(kinds))), strict=True))
        if self.kind == "network":
            world.proxy.set_rates(NETWORK)
        try:
            for number in range(MAX_RUNS):
                driver = self.start()
                if self.kind == "twice" and number == 0:
                    self.start()
                    self.captioned_when_struck = 0
                    strikes.clear()
                while strikes and driver.poll() is None:
                    kind, threshold = strikes[0]
                    if world.num_parts(self.output) >= threshold:
                        time.sleep(self.rng.random())
                        before = world.num_captioned()
                        if self.strike(kind, driver):
                            strikes.pop(0)
                            self.captioned_when_struck = self.captioned_when_struck or before
                    time.sleep(0.1)
                text = self.wait()
                if 0 in self.codes:
                    break
                world.proxy.set_rates({})
            assert 0 in self.codes, text
            if self.kind == "network":
                world.proxy.set_rates({})
                self.start()
                text = self.wait()
                assert self.codes[-1] == 0, text
        finally:
            world.proxy.set_rates({})
            for driver in self.drivers:
                driver.kill()
        return check_exactly_once(world.copy(self.output), world.wanted, undisturbed)

    def start(self) -> subprocess.Popen:
        self.drivers.append(self.world.start(self.output))
        return self.drivers[-1]

    def wait(self) -> str:
        """The output of all drivers, when they have ended."""
        texts = [driver.communicate(timeout=300)[0] for driver in self.drivers[len(self.codes) :]]
        self.codes += [driver.returncode for driver in self.drivers[len(self.codes) :]]
        return "\n".join(texts)

    def strike(self, kind: str, driver: subprocess.Popen) -> bool:
        """Break something; whether it could be done."""
        world = self.world
        if kind in PATTERNS:
            return world.kill(kind)
        if kind == "driver":
            driver.kill()
        elif kind == "terminate":
            driver.terminate()
        elif kind == "dying":
            driver.terminate()
            self.start()
        elif kind == "frozen":
            driver.send_signal(signal.SIGSTOP)
            self.start().wait(timeout=300)
            driver.send_signal(signal.SIGCONT)
        elif kind == "node":
            world.cluster.remove_node(world.node, allow_graceful=False)
            world.node = world.cluster.add_node(num_cpus=3)
        elif kind == "store":
            world.store.stop()
            time.sleep(2)
            world.store.start()
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=None, help="how many; one of each kind when not given")
    parser.add_argument("--kinds", nargs="+", default=KINDS, help=f"of {', '.join(KINDS)}, or several joined by +")
    parser.add_argument("--photos", type=int, default=120, help="how many to caption, 48 at least")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if unknown := {part for kind in arguments.kinds for part in kind.split("+")} - set(KINDS):
        parser.error(f"unknown kinds: {', '.join(sorted(unknown))}")
    for kind in arguments.kinds:
        if "+" in kind and {"network", "twice"} & set(kind.split("+")):
            parser.error(f"{kind}: network and twice are of a whole round and cannot be joined")
    rng = random.Random(arguments.seed)
    kinds = arguments.kinds
    broken = 0
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), arguments.photos)
        try:
            expected = Round(world, "", str(world.folder / "undisturbed"), rng).run()
            print(f"{world.num_photos} photos, parts of {PART_ROWS}; redone: images captioned more than once in all")
            print(
                f"{'round':>5}  {'fault':<18}{'output':<8}{'exit codes':<14}{'struck at':>9}{'redone':>8}{'seconds':>9}"
            )
            for number in range(arguments.rounds or len(kinds)):
                kind = kinds[number % len(kinds)]
                is_remote = (number + number // len(kinds)) % 2
                place = f"{world.bucket}/out-{number}" if is_remote else str(world.folder / f"out-{number}")
                this, started, before = Round(world, kind, place, rng), time.monotonic(), world.num_captioned()
                try:
                    this.run(expected)
                    verdict = "every id once"
                except (AssertionError, subprocess.TimeoutExpired) as error:
                    verdict = f"BROKEN: {str(error)[-1500:]}"
                    broken += 1
                redone = world.num_captioned() - before - world.num_photos
                struck = "-" if this.captioned_when_struck is None else max(0, this.captioned_when_struck - before)
                codes = " ".join(map(str, this.codes))
                print(
                    f"{number:>5}  {kind:<18}{'bucket' if is_remote else 'folder':<8}{codes:<14}{struck:>9}{redone:>8}"
                    f"{time.monotonic() - started:>9.0f}  {verdict}",
                    flush=True,
                )
            print(f"broken: {broken}; broken on the way by the proxy: {dict(world.proxy.injected)}")
        finally:
            world.close()
    sys.exit(broken > 0)


if __name__ == "__main__":
    main()
