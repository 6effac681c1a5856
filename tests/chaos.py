"""Random faults, round after round, each judged by the oracle: `make chaos ROUNDS=30`.

A round captions a bucket with a driver of its own on a Ray of two logical nodes. Half way something is killed; the same
command is run until it ends well; then every id must stand once, with the caption of an undisturbed run.
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
from pathlib import Path

from tests.oracle import check_exactly_once, read_parts

NUM_PHOTOS = 120
PART_ROWS = 4
SETTINGS = ["--batch-size", "4", "--beam-size", "60", "--max-length", "250", "--num-actors", "1"]
KINDS = ("driver", "terminate", "actor", "worker", "node", "store")


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
    """The cluster, the store, the photos and the model of all rounds."""

    def __init__(self, folder: Path):
        from ray.cluster_utils import Cluster

        from tests.conftest import SeaweedFS, free_port, make_model, write_photos

        os.environ.update([MARK.split("=")])
        self.folder = folder
        self.store = SeaweedFS(folder / "weed")
        os.environ.update(self.store.environment)
        self.store.start()
        self.bucket = self.store.make_bucket("capray-chaos")
        self.model = make_model(folder / "model", seed=0)
        import s3fs

        fs = s3fs.S3FileSystem()
        paths = write_photos(folder / "photos", NUM_PHOTOS)
        fs.put(str(folder / "photos"), f"{self.bucket}/", recursive=True)
        self.wanted = {f"{self.bucket}/photos/{Path(path).name}" for path in paths}
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 3, "include_dashboard": False, "gcs_server_port": free_port()},
        )
        self.node = self.cluster.add_node(num_cpus=3)
        os.environ["RAY_ADDRESS"] = self.cluster.address

    def start(self, output: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "capray", "caption", f"{self.bucket}/photos", output, "--model", self.model]
        command += [*SETTINGS, "--part-rows", str(PART_ROWS), "--part-seconds", "5"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def hurt(self, kind: str, driver: subprocess.Popen) -> None:
        if kind == "driver":
            driver.kill()
        elif kind == "terminate":
            driver.terminate()
        elif kind in ("actor", "worker"):
            pattern = "ray::MapWorker.*CaptioningActor" if kind == "actor" else r"ray::MapBatches\(fetch"
            for pid in pids(pattern):
                os.kill(pid, signal.SIGKILL)
        elif kind == "node":
            self.cluster.remove_node(self.node, allow_graceful=False)
            self.node = self.cluster.add_node(num_cpus=3)
        elif kind == "store":
            self.store.stop()
            time.sleep(2)
            self.store.start()

    def close(self) -> None:
        self.cluster.shutdown()
        self.store.stop()


def parts_of(output: str) -> int:
    return len(list((Path(output) / "captions").glob("*.parquet")))


def one_round(world: World, kind: str, number: int, rng: random.Random, expected: dict[str, str]) -> dict:
    """What happened; raises AssertionError when the promise is broken."""
    output = str(world.folder / f"out-{number}")
    started, runs, hurt_at = time.monotonic(), 0, None
    threshold = rng.randint(1, NUM_PHOTOS // PART_ROWS - 4)
    while True:
        driver = world.start(output)
        runs += 1
        while hurt_at is None and driver.poll() is None:
            if parts_of(output) >= threshold:
                time.sleep(rng.random())
                world.hurt(kind, driver)
                hurt_at = len(read_parts(output, "captions"))
            time.sleep(0.05)
        text, _ = driver.communicate(timeout=400)
        if driver.returncode == 0:
            break
        assert runs < 6, text
    captions = check_exactly_once(output, world.wanted)
    assert captions == expected, "other captions than those of an undisturbed run"
    return {"kind": kind, "runs": runs, "published": hurt_at, "seconds": time.monotonic() - started}


def undisturbed(world: World) -> dict[str, str]:
    driver = world.start(str(world.folder / "undisturbed"))
    text, _ = driver.communicate(timeout=400)
    assert driver.returncode == 0, text
    return check_exactly_once(str(world.folder / "undisturbed"), world.wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=len(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    broken = 0
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        try:
            expected = undisturbed(world)
            print(f"{'round':>5}  {'killed':<10}{'runs':>5}{'published before':>18}{'seconds':>9}  verdict", flush=True)
            for number in range(arguments.rounds):
                kind = KINDS[number % len(KINDS)]
                try:
                    row = one_round(world, kind, number, rng, expected)
                    verdict = "every id once"
                except (AssertionError, subprocess.TimeoutExpired) as error:
                    row, verdict = {"runs": 0, "published": None, "seconds": 0.0}, f"BROKEN: {str(error)[-1500:]}"
                    broken += 1
                print(
                    f"{number:>5}  {kind:<10}{row['runs']:>5}{row['published']!s:>18}{row['seconds']:>9.0f}  {verdict}",
                    flush=True,
                )
        finally:
            world.close()
    sys.exit(broken > 0)


if __name__ == "__main__":
    main()
