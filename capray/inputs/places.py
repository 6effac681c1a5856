"""Where images are, as Arrow rows."""

from __future__ import annotations

import pyarrow as pa

PLAN = pa.schema(
    [
        pa.field("position", pa.int64(), nullable=False),
        pa.field("input", pa.int16(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string()),
        pa.field("container", pa.string()),
        pa.field("row_group", pa.int32()),
        pa.field("row", pa.int32()),
        pa.field("member", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("size", pa.int64()),
    ]
)
"""One wanted image: its place in the listing, the number of its input, its id, and where its bytes are: at a URI, or in a
container: row ``row`` of a row group of a Parquet file, or ``size`` bytes at ``offset`` of a tar (null while only the
member's name is known). A row with a container and neither row nor member is a tar whose members are not known yet."""

MEMBERS = pa.schema([("image_id", pa.string()), ("member", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
"""The images in a tar."""


def plan_schema(source: pa.DataType | None = None) -> pa.Schema:
    """PLAN, with the carried columns ``source`` where there are any."""
    return PLAN if source is None else PLAN.append(pa.field("source", source))
