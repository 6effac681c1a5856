"""Captions per second of `capray caption` from an S3 server of this machine to Parquet, beside one in process.

    uv run python benchmarks/through_ray.py [--encoders mobilenet_v2 resnet101] [--images 2000] [--precision bf16]

One actor of one thread, 12 steps of five beams, photos of 500×375 from SeaweedFS (that of the tests). The rate is that
between the first and the last tenth of the images, by `captioned_at`; in process one thread captions such photos, JPEG
bytes in, 64 at a time, before the job and after it. Fetching, Ray and the S3 server have the other cores. Beside it: CPU
seconds of each, and most memory.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import s3fs
import torch
from captioning import NUM_STEPS, build, with_end_bias
from measuring import record
from photos import photos

from capray import cluster
from capray.captioning.job import caption
from capray.config import CPU_BATCH, CaptionConfig, Decoding
from capray.images import load
from capray.model.captioner import Captioner
from capray.model.checkpoint import save_captioner
from capray.output import Output

BAR = 0.85
SECONDS_BETWEEN = 2.0
NUM_DIFFERENT = 100
KINDS = {"CaptioningActor": "actor", "fetch_unit": "fetching", "ray::IDLE": "fetching", "weed": "S3 server"}
"""What a process is, by a mark in its title: one that fetches is idle in between. Others are Ray's own."""


class Watch:
    """CPU seconds of this process's children, by kind, and the most memory of one of each (USS, MiB)."""

    def __init__(self) -> None:
        self.kinds: dict[int, str] = {}
        self.seconds: dict[int, float] = {}
        self.memory: dict[str, float] = defaultdict(float)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self._own, self._before = self._cpu(psutil.Process()), self._children()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self._own = self._cpu(psutil.Process()) - self._own - self._watching

    @staticmethod
    def _cpu(process: psutil.Process) -> float:
        times = process.cpu_times()
        return times.user + times.system

    def _children(self) -> dict[int, float]:
        found = {}
        for process in psutil.Process().children(recursive=True):
            try:
                title = " ".join(process.cmdline())
                kind = next((kind for mark, kind in KINDS.items() if mark in title), "Ray's own")
                self.kinds[process.pid] = kind
                found[process.pid] = self._cpu(process)
                self.memory[kind] = max(self.memory[kind], process.memory_full_info().uss / 2**20)
            except psutil.Error:
                continue
        return found

    def _watch(self) -> None:
        while not self._done.wait(SECONDS_BETWEEN):
            self.seconds |= self._children()
            self.memory["driver"] = max(self.memory["driver"], psutil.Process().memory_full_info().uss / 2**20)
        self._watching = time.thread_time()  # Looking through a process's memory takes long.

    def cpu_seconds(self) -> dict[str, float]:
        total: dict[str, float] = defaultdict(float, driver=self._own)
        for pid, seconds in self.seconds.items():
            total[self.kinds[pid]] += seconds - self._before.get(pid, 0.0)
        return {kind: round(seconds, 1) for kind, seconds in total.items()}


def in_process(captioner: Captioner, precision: str, rounds: int = 3) -> list[float]:
    """Images per second of each round."""
    inference = with_end_bias(captioner, -50.0, precision)
    inference.batch_size = CPU_BATCH
    jpegs, rates = photos(CPU_BATCH), []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        inference([load(jpeg, captioner.architecture)[0] for jpeg in jpegs], Decoding(max_length=NUM_STEPS))
        rates.append(CPU_BATCH / (time.perf_counter() - started))
    return rates[1:]


def through_ray(bucket: str, model: Path, output: Path, precision: str) -> tuple[float, Watch]:
    config = CaptionConfig(
        input=bucket,
        output=str(output),
        model=str(model),
        precision=precision,
        max_length=NUM_STEPS,
        num_actors=1,
        threads_per_actor=1,
    )
    with Watch() as watch:
        summary = caption(config)
    assert not summary.failures, summary.text()
    with Output(str(output)).connect(("captions",)) as connection:
        rows = connection.execute("SELECT epoch_us(captioned_at) FROM captions").fetchnumpy()
    times = np.sort(next(iter(rows.values()))) / 1e6
    first, last = (int(len(times) * share) for share in (0.1, 0.9))
    return (last - first) / (times[last] - times[first]), watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="+", default=["mobilenet_v2", "resnet101"])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.conftest import SeaweedFS

    with tempfile.TemporaryDirectory() as folder:
        server = SeaweedFS(Path(folder, "s3"))
        os.environ.update(server.environment)
        server.start()
        try:
            bucket = server.make_bucket("photos")
            fs, jpegs = s3fs.S3FileSystem(), photos(NUM_DIFFERENT)
            fs.rm(f"{bucket}/probe")
            fs.pipe({f"{bucket}/{i:06d}.jpg": jpegs[i % len(jpegs)] for i in range(options.images)})
            cluster.connect()
            for encoder in options.encoders:
                captioner, model = build(encoder), Path(folder, encoder)
                rates = in_process(captioner, options.precision)
                save_captioner(captioner, str(model))
                rate, watch = through_ray(bucket, model, Path(folder, f"{encoder}-output"), options.precision)
                alone = median(rates + in_process(captioner, options.precision))
                record(
                    f"through Ray/{encoder}/{options.precision}",
                    rate,
                    "images/s",
                    alone,
                    BAR,
                    quotient=rate / alone,
                    images=options.images,
                    cpu_seconds=watch.cpu_seconds(),
                    most_memory_mib={kind: round(mib) for kind, mib in watch.memory.items()},
                )
        finally:
            server.stop()


if __name__ == "__main__":
    main()
