"""Proving an output of ten million captions against its source, and compacting one of a million: seconds and memory.

    uv run python benchmarks/verification.py [--ids 10000000] [--compact 1000000]

The reference: 4 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

import duckdb

from capray.config import CompactConfig, VerifyConfig
from capray.output import Output
from capray.output.compact import compact
from capray.output.verify import verify
from capray.storage import write_atomic
from capray.tables import CAPTIONS, encode_parquet

PART_ROWS = 50_000
_URI = "'s3://bucket/photos/' || lpad((i // 1000)::VARCHAR, 6, '0') || '/' || lpad(i::VARCHAR, 10, '0') || '.jpg'"


def write(folder: str, ids: int) -> None:
    """A manifest of ``ids`` URIs and an output that has them all, in parts of ids that lie far apart."""
    stride = max(1, ids // 1000)
    output = Output(f"{folder}/out")
    with duckdb.connect() as connection:
        for number, first in enumerate(range(0, ids, PART_ROWS)):
            rows = connection.sql(f"""
                SELECT {_URI} AS image_id, image_id AS uri, 'a photo of thing ' || hash(i) % 997 AS caption,
                       -(i % 1000) / 100 AS log_prob, log_prob AS score, 5 AS num_tokens, true AS finished,
                       []::STRUCT(caption VARCHAR, log_prob FLOAT, score FLOAT)[] AS alternatives, 640 AS width,
                       480 AS height, unhex(sha256(i::VARCHAR)) AS sha256, 'm' AS model_id, 'r' AS run_id,
                       '2026-01-02 03:04:05'::TIMESTAMP AS captioned_at
                FROM (SELECT (n * {stride}) % {ids} + n * {stride} // {ids} AS i
                      FROM range({first}, {min(first + PART_ROWS, ids)}) t(n))
            """).to_arrow_table()
            captioned_at = rows["captioned_at"].cast("timestamp[us]").cast(CAPTIONS.field("captioned_at").type)
            rows = rows.set_column(rows.column_names.index("captioned_at"), "captioned_at", captioned_at)
            part = output.captions.join(f"part-r-{number:05d}.parquet")
            write_atomic(part, encode_parquet(rows.cast(CAPTIONS)))
    job = {"schema_version": 1, "model_id": "m", "precision": "fp32", "decoding": {}}
    write_atomic(output.job, json.dumps(job).encode())
    with duckdb.connect() as connection:
        connection.execute(f"COPY (SELECT {_URI} AS uri FROM range({ids}) t(i)) TO '{folder}/manifest.csv' (HEADER)")
    size = sum(entry.stat().st_size for entry in os.scandir(output.captions.path)) / 2**20
    print(f"{ids:,} captions, {size:,.0f} MiB", flush=True)


def measure_verify(folder: str, ids: int) -> None:
    result = verify(VerifyConfig(output=f"{folder}/out", against=(f"{folder}/manifest.csv",)))
    assert not result.problems and result.counts["ids_wanted"] == ids, result.text()
    print(result.text())
    memory = result.peak_memory_bytes / 2**30
    print(f"verify: {ids:,} ids in {result.seconds:.1f} s, peak memory {memory:.2f} GiB (reference 4)")


def measure_compact(folder: str, ids: int) -> None:
    started = time.perf_counter()
    result = compact(CompactConfig(output=f"{folder}/out", new=f"{folder}/new"))
    seconds = time.perf_counter() - started
    assert result.captions == ids, result
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(result.text())
    print(f"compact: {ids:,} captions in {seconds:.1f} s, peak memory {memory:.2f} GiB (reference 4)")


STEPS = {"write": write, "verify": measure_verify, "compact": measure_compact}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, default=10_000_000)
    parser.add_argument("--compact", type=int, default=1_000_000)
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        step, folder = arguments.step
        STEPS[step](folder, arguments.ids)
        return
    for measured, ids in (("verify", arguments.ids), ("compact", arguments.compact)):
        with tempfile.TemporaryDirectory() as folder:
            for step in ("write", measured):
                # A process begins with the peak memory of the one that starts it, so this one does no work.
                subprocess.run([sys.executable, __file__, "--ids", str(ids), "--step", step, folder], check=True)


if __name__ == "__main__":
    main()
