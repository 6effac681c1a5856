"""Rows per second of the writer alone, encoding and publishing captions to a local folder.

    uv run python benchmarks/writer.py

The reference is what the driver must keep up with: 100,000 rows/s is more than a thousand GPUs caption.
"""

from __future__ import annotations

import tempfile
import time

import pyarrow as pa

from capray.captioning.rows import RESULTS
from capray.captioning.writer import PartWriter
from capray.output import Output

REFERENCE = 100_000
ROWS_PER_TABLE = 512
NUM_TABLES = 600


def results(first: int) -> pa.Table:
    """A block of captions as the actors give them."""
    caption = "a brown dog runs through the tall grass near a wooden fence"
    rows = [
        {
            "image_id": f"s3://bucket/photos/{first + i:09d}.jpg",
            "uri": f"s3://bucket/photos/{first + i:09d}.jpg",
            "caption": f"{caption} {first + i}",
            "log_prob": -9.5 - i / 1000,
            "score": -0.9 - i / 10_000,
            "num_tokens": 13,
            "finished": True,
            "alternatives": [
                {"caption": f"{caption} {k} {i}", "log_prob": -10.0 - k, "score": -1.0 - k} for k in range(4)
            ],
            "width": 640,
            "height": 480,
            "sha256": (first + i).to_bytes(32, "little"),
            "model_id": "0" * 64,
            "captioned_at": 1_700_000_000_000_000 + first + i,
        }
        for i in range(ROWS_PER_TABLE)
    ]
    return pa.Table.from_pylist(rows, RESULTS)


def main() -> None:
    tables = [results(i * ROWS_PER_TABLE) for i in range(20)]
    with tempfile.TemporaryDirectory() as folder:
        writer = PartWriter(Output(folder), "benchmark", 50_000, 60, before_publish=lambda: None)
        started = time.perf_counter()
        for i in range(NUM_TABLES):
            writer.add(tables[i % len(tables)])
        writer.flush()
        rate = writer.num_captions / (time.perf_counter() - started)
    print(f"writer: {rate:,.0f} rows/s, {rate / REFERENCE:.1f} times the reference of {REFERENCE:,}")


if __name__ == "__main__":
    main()
