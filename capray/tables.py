"""The Arrow schemas of the tables capray reads and writes, and how a table becomes the bytes of a part."""

from __future__ import annotations

import io
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq

from capray.config import FailureKind

SCHEMA_VERSION = 1
"""Version of the output tables, in every part's metadata and in job.json."""

_METADATA = {"capray_schema_version": str(SCHEMA_VERSION)}

SAMPLES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("captions", pa.list_(pa.field("element", pa.string())), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ],
    metadata=_METADATA,
)
"""Images with their reference captions: encoded image bytes, raw captions, split name."""

_ALTERNATIVE = pa.struct([("caption", pa.string()), ("log_prob", pa.float32()), ("score", pa.float32())])

CAPTIONS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string()),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("log_prob", pa.float32(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("num_tokens", pa.int16(), nullable=False),
        pa.field("finished", pa.bool_(), nullable=False),
        pa.field("alternatives", pa.list_(pa.field("element", _ALTERNATIVE)), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("sha256", pa.binary(32), nullable=False),
        pa.field("model_id", pa.string(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("captioned_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ],
    metadata=_METADATA,
)
"""One row per captioned image. ``log_prob`` is natural, summed over tokens; ``score`` is what beams are ranked by."""


def captions_schema(source: pa.DataType | None = None, attention: bool = False) -> pa.Schema:
    """CAPTIONS with the columns a job asked for: ``source`` (a struct of carried columns), ``tokens`` and ``attention``
    (tokens x positions of the grid)."""
    fields = list(CAPTIONS)
    if source is not None:
        fields.append(pa.field("source", source))
    if attention:
        weights = pa.list_(pa.field("element", pa.list_(pa.field("element", pa.float32()))))
        fields.append(pa.field("tokens", pa.list_(pa.field("element", pa.string())), nullable=False))
        fields.append(pa.field("attention", weights, nullable=False))
    return pa.schema(fields, metadata=_METADATA)


FAILURES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string()),
        pa.field("error_type", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("failed_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ],
    metadata=_METADATA,
)
"""A log: one row per image and attempt that failed."""

FINAL_FAILURES: tuple[str, ...] = get_args(FailureKind)
"""Kinds of failure that another attempt is not expected to mend."""

TRANSIENT_FAILURES = ("denied", "unreadable_storage", "captioning_error")
"""Kinds of failure that another attempt may mend: retried once per run."""


def encode_parquet(table: pa.Table, row_group_size: int = 50_000, dictionary: list[str] | bool = True) -> bytes:
    """The bytes of a zstd-compressed Parquet file holding ``table``, columns ``dictionary`` (or all) encoded by one, with a
    checksum of each page."""
    buffer = io.BytesIO()
    options = {"row_group_size": row_group_size, "use_dictionary": dictionary, "write_page_checksum": True}
    pq.write_table(table, buffer, compression="zstd", **options)
    return buffer.getvalue()


def decode_parquet(data: bytes) -> pq.ParquetFile:
    """The Parquet file in ``data``; to read a page that is not as it was written is an OSError."""
    return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
