"""Listing and planning as the job does them, without Ray: seconds, memory, temporary space and requests of the driver.

    uv run python benchmarks/planning.py [--ids 10000000] [--done none half nearly] [--tars 10000] [--s3]

First a manifest of so many ids, of which none, half, or all but 10,000 are done: to the first unit, to all planned, and to
every id accounted for. With --tars the same number of images in tars that are half read. With --s3 the output lies on a
SeaweedFS of this machine (the tests' one), and requests are counted; 20,000 of the ids are listed as objects there, too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from capray.captioning.plan import Plan
from capray.captioning.run import MAX_WAVES, WAVE_GROWTH
from capray.captioning.settled import Settled
from capray.captioning.units import Work, read_units
from capray.config import CaptionConfig, QueryConfig, SourceSettings
from capray.inputs import open_sources
from capray.inputs.listing import Listing
from capray.output import Output
from capray.output.folder import MEMORY_LIMIT
from capray.query.answers import run_query
from capray.storage import locate, write_atomic
from capray.tables import CAPTIONS, SCHEMA_VERSION, encode_parquet

PART_ROWS = 50_000
BLOCK_ROWS = 64
LEFT = 10_000
KEYS_PER_PREFIX = 1000


def uri(number: int) -> str:
    return f"s3://bucket/photos/{number // KEYS_PER_PREFIX:06d}/{number:010d}.jpg"


def write_parts(output: Output, ids: list[str]) -> None:
    """Captions of ``ids`` as a job publishes them."""
    texts = pa.array([f"a photo of thing {i}" for i in range(997)])
    row = {"sha256": b"\0" * 32, "model_id": "m", "run_id": "r", "finished": True, "alternatives": []}
    for number, begin in enumerate(range(0, len(ids), PART_ROWS)):
        part = pa.array(ids[begin : begin + PART_ROWS])
        values = {"image_id": part, "uri": part, "caption": texts.take(pa.array(np.arange(len(part)) % 997))}
        columns = [
            values[field.name]
            if field.name in values
            else pa.repeat(pa.scalar(row[field.name], field.type), len(part))
            if field.name in row
            else pa.repeat(pa.scalar(1, pa.int64()), len(part)).cast(field.type)
            for field in CAPTIONS
        ]
        table = pa.table(columns, schema=CAPTIONS)
        write_atomic(output.captions.join(f"part-r-{number:05d}.parquet"), encode_parquet(table))


@dataclass
class Figures:
    """What one run of the planning came to."""

    first_unit: float = 0.0
    planned: float = 0.0
    accounted: float = 0.0
    cpu: float = 0.0
    num_images: int = 0
    num_units: int = 0
    num_files: int = 0
    num_waves: int = 0
    temporary_bytes: int = 0
    memory_bytes: int = 0
    lost: int = 0
    requests: Counter = field(default_factory=Counter)

    def text(self, ids: int) -> str:
        limit = float(MEMORY_LIMIT.removesuffix("GB")) * 1e9
        lines = [
            f"first unit after {self.first_unit:.1f} s, all planned after {self.planned:.1f} s, every id accounted for "
            f"after {self.accounted:.1f} s ({self.cpu:.1f} s of a CPU)",
            f"{self.num_images:,} images in {self.num_units:,} units, {self.num_files:,} plan files "
            f"(one for {ids / max(1, self.num_files):,.0f} ids), {self.num_waves} waves",
            f"memory at its peak {self.memory_bytes / 1e9:.2f} GB ({(self.memory_bytes - limit) / 1e9:.2f} beyond DuckDB's "
            f"limit), temporary space {self.temporary_bytes / ids:.0f} bytes an id",
        ]
        if self.requests:
            lines.append(f"{self.requests.total():,} requests: {dict(self.requests.most_common())}")
        return "\n".join(f"  {line}" for line in lines)


@contextlib.contextmanager
def watched(folder: str, figures: Figures) -> Generator[None]:
    """Notes how much space ``folder`` takes at most."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            with contextlib.suppress(OSError):
                size = sum(path.stat().st_blocks * 512 for path in Path(folder).rglob("*") if path.is_file())
                figures.temporary_bytes = max(figures.temporary_bytes, size)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield
    done.set()
    thread.join()


def plan_all(source: str, output: Output, figures: Figures) -> None:
    """List and plan in waves, as ``captioning/run.py`` does, then account for every id."""
    config = CaptionConfig(input=source, output=output.root.uri, model="none")
    started, cpu = time.perf_counter(), time.process_time()

    def take(work: Work) -> None:
        figures.num_images += work.num_images
        figures.num_units += work.num_units
        figures.num_files += len(work.files)
        if work.num_units and not figures.first_unit:
            next(iter(read_units(work.files[0])))
            figures.first_unit = time.perf_counter() - started

    listing = Listing(output.plan, "run", open_sources(config.inputs, config.subset(SourceSettings)), config, write_atomic)
    with Settled(output, "run") as settled, listing, watched(settled.folder, figures):
        plan = Plan(output, "run", listing, settled, write_atomic)
        settled.remove_duplicates(write_atomic)
        taken = planned = 0
        while not (listing.is_complete and taken == len(listing.chunks())):
            more = listing.wait(taken, 0.2)
            is_last = figures.num_waves >= MAX_WAVES - 1
            if more and (listing.is_complete or (not is_last and listing.num_rows >= WAVE_GROWTH * planned)):
                chunks = listing.chunks()
                figures.num_waves, planned = figures.num_waves + 1, listing.num_rows
                take(plan.fresh(chunks[taken:], BLOCK_ROWS))
                taken = len(chunks)
            elif more:
                time.sleep(0.2)  # `wait` returns at once, and would keep the listing's thread from its work.
        figures.planned = time.perf_counter() - started
        settled.remove_duplicates(write_atomic)
        wanted = plan.count_wanted()
        figures.lost, _ = plan.unaccounted()
        plan.current_failures()
        plan.unread_tars()
        assert wanted.duplicates == 0
        figures.accounted, figures.cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures.memory_bytes = peak if sys.platform == "darwin" else peak * 1024


@contextlib.contextmanager
def counted(output: Output, figures: Figures) -> Generator[None]:
    """Counts what is asked of the S3 server, each attempt of each request."""
    if output.root.is_local:
        yield
        return
    fs = output.root.fs
    fs.connect()

    def count(request, **_) -> None:
        figures.requests["LIST" if "list-type" in request.url else request.method] += 1

    fs.s3.meta.events.register("before-send.s3", count)
    yield
    fs.s3.meta.events.unregister("before-send.s3", count)


def measure(source: str, output_uri: str, with_query: bool) -> Figures:
    figures, output = Figures(), Output(output_uri)
    write_atomic(output.job, json.dumps({"schema_version": SCHEMA_VERSION}).encode())
    with counted(output, figures):
        plan_all(source, output, figures)
        if with_query:
            sql = "SELECT count(*), avg(num_tokens) FROM captions"
            run_query(QueryConfig(output=output_uri, sql=sql), io.StringIO())
    return figures


def run(source: str, output_uri: str, with_query: bool = False) -> Figures:
    """Measure in a process of its own, whose memory is the planning's alone."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, source, output_uri, with_query).result()


def done_of(ids: int, how: str) -> list[str]:
    if how == "none":
        return []
    if how == "half":
        return [uri(i) for i in range(0, ids, 2)]
    return [uri(i) for i in range(ids) if i % (ids // LEFT)]


def manifest(folder: str, ids: int) -> str:
    path = Path(folder, "manifest.csv")
    with path.open("w") as file:
        file.write("uri\n")
        file.writelines(f"{uri(i)}\n" for i in range(ids))
    return str(path)


def tars(folder: str, ids: int, number: int) -> tuple[str, list[str]]:
    """Tars of which the planning sees only their names and sizes, and the ids of every other image in them."""
    place = Path(folder, "tars")
    place.mkdir()
    each = ids // number
    done = []
    for i in range(number):
        path = place / f"{i:06d}.tar"
        with path.open("wb") as file:
            file.truncate(each * 100_000)
        done += [f"{path}#{member:06d}.jpg" for member in range(0, each, 2)]
    return str(place), done


def put_objects(place: str, ids: int) -> None:
    fs = locate(place).fs
    for begin in range(0, ids, 10_000):
        names = [uri(i).removeprefix("s3://bucket/") for i in range(begin, min(ids, begin + 10_000))]
        fs.pipe({f"{place}/{name}": b"x" for name in names})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, default=10_000_000)
    parser.add_argument("--done", nargs="*", choices=("none", "half", "nearly"), default=["none", "half", "nearly"])
    parser.add_argument("--tars", type=int, default=0)
    parser.add_argument("--s3", action="store_true")
    arguments = parser.parse_args()
    ids = arguments.ids
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        root = f"{folder}/out"
        if arguments.s3:
            sys.path.insert(0, str(Path(__file__).parents[1]))
            from tests.conftest import SeaweedFS

            server = SeaweedFS(Path(folder, "s3"))
            os.environ.update(server.environment)
            server.start()
            stack.callback(server.stop)
            root = server.make_bucket("planning")
        if arguments.tars:
            source, done = tars(folder, ids, arguments.tars)
            write_parts(Output(f"{root}/tars"), done)
            print(f"{ids:,} ids in {arguments.tars:,} tars, half of each done:")
            print(run(source, f"{root}/tars").text(ids), flush=True)
            return
        source = manifest(folder, ids)
        for how in arguments.done:
            done = done_of(ids, how)
            write_parts(Output(f"{root}/{how}"), done)
            print(f"{ids:,} ids of a manifest, {len(done):,} done:")
            figures = run(source, f"{root}/{how}", arguments.s3)
            print(figures.text(ids), flush=True)
            assert figures.num_images == figures.lost == ids - len(done), figures
        if arguments.s3:
            number = min(ids // 10, 20_000)
            put_objects(f"{root}/in", number)
            print(f"{number:,} ids of objects, {KEYS_PER_PREFIX:,} a prefix:")
            print(run(f"{root}/in", f"{root}/objects").text(number), flush=True)


if __name__ == "__main__":
    main()
