"""Blocks per second that Ray carries through the job's operators when nothing is read, decoded or captioned, and the CPU
time that each costs the driver's machine: how far one driver reaches.

    uv run python benchmarks/streaming.py [--blocks 2000] [--block-rows 64] [--side 224]

Blocks hold as many bytes as real ones. The CPU time is that of the driver's process, the raylet and the GCS server, apart
from that of the workers, which a cluster has elsewhere.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import numpy as np
import psutil
import pyarrow as pa

from capray.captioning import stream
from capray.captioning.actor import CaptioningSettings
from capray.captioning.fetching import Fetcher
from capray.captioning.rows import FETCHED, block_of, results_schema, table_of, with_table
from capray.captioning.stream import RayExecutor
from capray.captioning.units import UnitFiles, Work
from capray.config import CaptionConfig, Decoding
from capray.inputs.places import PLACES
from capray.storage import Location, locate, write_atomic


@dataclass(frozen=True)
class BlankFetcher:
    """Gives each unit one block of blank images."""

    side: int
    run_id: str = "benchmark"

    def fetch(self, places: pa.Table, skipped: object, careful: bool) -> Iterator[pa.Table]:
        number = places.num_rows
        columns = {"image_id": places["image_id"], "pixels": pa.array([bytes(3 * self.side**2)] * number, pa.binary())}
        table = pa.table([columns.get(field.name, pa.nulls(number, field.type)) for field in FETCHED], schema=FETCHED)
        yield block_of(table)


class BlankActor:
    """Gives each image an empty caption."""

    def __init__(self, settings: CaptioningSettings):
        self.schema = results_schema()

    def __call__(self, block: pa.Table) -> pa.Table:
        ids = table_of(block)["image_id"]
        table = pa.table(
            [ids if field.name == "image_id" else pa.nulls(len(ids), field.type) for field in self.schema],
            schema=self.schema,
        )
        return with_table(block, table)


def plan(folder: Location, num_images: int, block_rows: int) -> Work:
    names = [f"s3://bucket/photos/{i:010d}.jpg" for i in range(num_images)]
    same = {"position": np.arange(num_images), "image_id": names, "uri": names}
    same |= {"kind": ["object"] * num_images, "input": np.zeros(num_images, np.int16)}
    places = pa.table(
        [pa.array(same[f.name], f.type) if f.name in same else pa.nulls(num_images, f.type) for f in PLACES],
        schema=PLACES,
    )
    with UnitFiles(folder, 0, PLACES, block_rows, write_atomic) as files:
        for begin in range(0, num_images, 50_000):
            files.add(places.slice(begin, 50_000))
    return Work(files.files, files.num_units, num_images, 0)


def driver_seconds() -> float:
    """CPU seconds so far of this process, the raylet and the GCS server."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    mine = [p for p in processes if p == processes[0] or p.name() in ("raylet", "gcs_server")]
    return sum(sum(p.cpu_times()[:2]) for p in mine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2000)
    parser.add_argument("--block-rows", type=int, default=64)
    parser.add_argument("--side", type=int, default=224)
    args = parser.parse_args()
    config = CaptionConfig(input="unused", output="unused", model="unused", num_actors=1)
    settings = CaptioningSettings("unused", "unused", config.subset(Decoding), "fp32", False, args.block_rows, False, 1)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(stream, "CaptioningActor", BlankActor),
        mock.patch.object(stream, "transfer_model", return_value=None),
    ):
        work = plan(locate(folder), args.blocks * args.block_rows, args.block_rows)
        executor = RayExecutor(config, "benchmark", print)
        assert executor.pool.num_actors == 1
        fetcher: Fetcher = BlankFetcher(args.side)  # ty: ignore[invalid-assignment]
        times: list[float] = []
        before = 0.0
        with executor.tables(work, fetcher, settings) as tables:
            for table in tables:
                if table is None:
                    continue
                times.append(time.perf_counter())
                if len(times) == args.blocks // 10:
                    before = driver_seconds()
    measured = len(times) - args.blocks // 10
    seconds = times[-1] - times[args.blocks // 10 - 1]
    print(f"{len(times):,} blocks of {args.block_rows} images at {args.side}x{args.side}, all cores of one machine:")
    print(f"  {measured / seconds:.0f} blocks/s ({measured * args.block_rows / seconds:,.0f} images/s)")
    cost = (driver_seconds() - before) / measured
    print(f"  {1000 * cost:.1f} ms of the driver's, raylet's and GCS server's CPU time for each")


if __name__ == "__main__":
    main()
