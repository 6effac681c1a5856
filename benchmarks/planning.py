"""From a manifest of ten million ids, nearly all done, to the first unit of work: seconds and memory of the driver.

    uv run python benchmarks/planning.py [--ids 10000000] [--left 10000]

The references: 60 seconds, 4 GiB.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import pyarrow as pa

from capray.captioning.plan import Plan
from capray.config import CaptionConfig, SourceSettings
from capray.inputs import open_sources
from capray.inputs.listing import Listing
from capray.output import Output
from capray.storage import write_atomic
from capray.tables import CAPTIONS, encode_parquet

PART_ROWS = 50_000


def uri(number: int) -> str:
    return f"s3://bucket/photos/{number // 1000:06d}/{number:010d}.jpg"


def write_part(output: Output, number: int, ids: list[str]) -> None:
    """A part of captions as a job publishes them."""
    rows = len(ids)
    values = {
        "image_id": ids,
        "uri": ids,
        "caption": [f"a photo of thing {i % 997}" for i in range(rows)],
        "alternatives": [[]] * rows,
        "sha256": [b"\0" * 32] * rows,
        "model_id": ["m"] * rows,
        "run_id": ["r"] * rows,
    }
    columns = [
        pa.array(values[field.name], field.type)
        if field.name in values
        else pa.repeat(pa.scalar(1, pa.int64()), rows).cast(field.type)
        if not pa.types.is_boolean(field.type)
        else pa.repeat(pa.scalar(True), rows)
        for field in CAPTIONS
    ]
    table = pa.table(columns, schema=CAPTIONS)
    write_atomic(output.captions.join(f"part-r-{number:05d}.parquet"), encode_parquet(table))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, default=10_000_000)
    parser.add_argument("--left", type=int, default=10_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "manifest.csv"
        with manifest.open("w") as file:
            file.write("uri\n")
            file.writelines(f"{uri(i)}\n" for i in range(arguments.ids))
        output = Output(f"{folder}/out")
        done = [i for i in range(arguments.ids) if i % (arguments.ids // arguments.left)]
        for number in range(0, len(done), PART_ROWS):
            write_part(output, number // PART_ROWS, [uri(i) for i in done[number : number + PART_ROWS]])
        del done
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        config = CaptionConfig(input=str(manifest), output=output.root.uri, model="none")
        started = time.perf_counter()
        sources = open_sources(config.inputs, config.subset(SourceSettings))
        listing = Listing(output, sources, config)
        plan = Plan(output, "benchmark", listing)
        first = None
        taken = found = 0
        with listing:
            while not (listing.is_complete and taken == len(listing.chunks())):
                listing.wait(taken, 1)
                chunks = listing.chunks()
                work = plan.fresh(chunks[taken:], 64)
                found += work.num_images
                taken = len(chunks)
                if work.num_units and first is None:
                    first = time.perf_counter() - started
            listed = time.perf_counter() - started
            wanted = plan.count_wanted()
            lost, _ = plan.unaccounted()
        total = time.perf_counter() - started
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (found, lost, wanted.duplicates) == (arguments.left, arguments.left, 0), (found, lost, wanted)
    print(
        f"{arguments.ids:,} ids, {arguments.left:,} of them to do: first unit after {first:.1f} s (reference 60), all "
        f"listed and planned after {listed:.1f} s, every id accounted for after {total:.1f} s; peak memory "
        f"{memory / 2**20:.2f} GiB (reference 4), {before / 2**20:.2f} of it before"
    )


if __name__ == "__main__":
    main()
