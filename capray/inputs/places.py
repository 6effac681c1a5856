"""Where images are, as Arrow rows: what a listing stores, a plan is made of, and fetching reads."""

from __future__ import annotations

from typing import Any, Literal

import pyarrow as pa

from capray.tables import encode_parquet

Kind = Literal["object", "row", "member", "name", "tar"]
"""What a place is: an object or file of its own; a row of a Parquet table; a member of a tar whose place in it is known;
one of which only the name is known (from a sidecar); or a whole tar whose members are not known yet."""

PLACES = pa.schema(
    [
        pa.field("position", pa.int64(), nullable=False),
        pa.field("input", pa.int16(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("uri", pa.string()),
        pa.field("container", pa.string()),
        pa.field("version", pa.string()),
        pa.field("row_group", pa.int32()),
        pa.field("row", pa.int32()),
        pa.field("member", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("size", pa.int64()),
    ]
)
"""One wanted image (or a ``tar`` of them): its place in the listing, the number of its input, its id, and where it is.

uri: what the captions table shows: where the bytes are; null for a ``row`` (inline bytes), and for an ``object`` whose
    table names none. Of a ``member`` or ``name`` the tar's URI, ``#``, and the member.
container: the file that lists the image: a table, manifest or tar; null for an object that was found by listing.
version: of the container when it was listed (``versions.py``); rows of another version of it do not count. Of a ``name`` the
    tar's, its sidecar's and the ending of that, with "+" between them.
row_group, row: of a ``row``. ``row`` of a ``name`` is how many members the tar's sidecar names.
member, offset: of a ``member``: its name and the byte where its header begins; of a ``name`` the name alone.
size: bytes of the object, or of a ``member`` from its header's first byte to its data's last; of a ``tar`` all its bytes.
"""

MEMBERS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("member", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
    ]
)
"""The images in a tar that was read to its end, as ``PLACES`` has them."""

Row = dict[str, Any]
"""A row of PLACES."""


def with_source(schema: pa.Schema, source: pa.DataType | None) -> pa.Schema:
    """``schema``, with the carried columns ``source`` where there are any."""
    return schema if source is None else schema.append(pa.field("source", source))


def encode_places(rows: pa.Table) -> bytes:
    """Rows of places as the bytes of a Parquet file. Ids and URIs are as good as never the same: no dictionary helps."""
    return encode_parquet(rows, dictionary=["kind", "container", "version"])
