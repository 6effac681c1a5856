"""Rows per second of the writer alone, encoding and publishing captions to a local folder.

    uv run python benchmarks/writer.py

The reference is what the driver must keep up with: 100,000 rows/s is more than a thousand GPUs caption. With attention a
row carries a weight for each of 49 positions at each of 13 tokens, some ten times the bytes.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from capray.captioning.rows import results_schema
from capray.captioning.writer import PartWriter
from capray.output import Output

REFERENCE = 100_000
ROWS_PER_TABLE = 512
NUM_TABLES = 600
POSITIONS = 49


def results(first: int, attention: bool) -> pa.Table:
    """A block of captions as the actors give them."""
    rng = np.random.default_rng(first)
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
            "alternatives": [{"caption": f"{caption} {k} {i}", "log_prob": -10.0 - k, "score": -1.0 - k} for k in range(4)],
            "width": 640,
            "height": 480,
            "sha256": (first + i).to_bytes(32, "little"),
            "model_id": "0" * 64,
            "captioned_at": 1_700_000_000_000_000 + first + i,
        }
        for i in range(ROWS_PER_TABLE)
    ]
    if attention:
        for row in rows:
            row["tokens"] = [*caption.split(), "<end>"]
            row["attention"] = rng.dirichlet(np.ones(POSITIONS), len(row["tokens"])).astype(np.float32).tolist()
    return pa.Table.from_pylist(rows, results_schema(None, attention))


def measure(attention: bool) -> None:
    tables = [results(i * ROWS_PER_TABLE, attention) for i in range(20)]
    num_tables = NUM_TABLES // 10 if attention else NUM_TABLES
    with tempfile.TemporaryDirectory() as folder:
        writer = PartWriter(
            Output(folder), "benchmark", 50_000, 60, before_publish=lambda: None, source_type=None, attention=attention
        )
        started = time.perf_counter()
        for i in range(num_tables):
            writer.add(tables[i % len(tables)])
        writer.flush()
        rate = writer.num_captions / (time.perf_counter() - started)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.parquet")) / writer.num_captions
    name = "writer, with attention" if attention else "writer"
    print(
        f"{name}: {rate:,.0f} rows/s, {rate / REFERENCE:.1f} times the reference of {REFERENCE:,}; {size:,.0f} bytes a row"
    )


if __name__ == "__main__":
    measure(attention=False)
    measure(attention=True)
