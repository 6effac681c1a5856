"""What flows through the job, as Arrow columns: planned images, fetched images, results."""

from __future__ import annotations

import pyarrow as pa

from capray.tables import CAPTIONS

PLAN = pa.schema(
    [
        pa.field("position", pa.int64(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string()),
        pa.field("container", pa.string()),
        pa.field("row_group", pa.int32()),
        pa.field("row", pa.int32()),
    ]
)
"""One wanted image: its place in the source's order and its id, and either the URI of its bytes, or the Parquet file, row
group and row that hold them."""

FETCHED = pa.schema(
    [
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("pixels", pa.binary()),
        ("input_height", pa.int32()),
        ("input_width", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.binary(32)),
        ("error_type", pa.string()),
        ("message", pa.string()),
    ]
)
"""``pixels`` are uint8 at the encoder's input size; null, with the reason, where there is no image."""

RESULTS = pa.schema(
    [
        *(pa.field(field.name, field.type) for field in CAPTIONS),
        pa.field("error_type", pa.string()),
        pa.field("message", pa.string()),
    ]
)
"""The columns of a caption, or else why there is none."""
