"""What flows through the job, as Arrow columns: planned images, fetched images, results.

Ray Data may cut and join blocks as it likes, and a replayed task that cuts elsewhere would lose or repeat rows. So a block
of ours travels as one row of Ray's, its table encoded in the column ``block``: there is nothing to cut.
"""

from __future__ import annotations

import pyarrow as pa

from capray.tables import captions_schema

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

BLOCK = pa.schema(
    [
        ("block", pa.binary()),
        ("input", pa.int16()),
        ("container", pa.string()),
        ("members", pa.binary()),
        ("fault", pa.string()),
    ]
)
"""One row: a block, and, when a tar was read to its end, which one, and its MEMBERS or why they cannot be had."""


def fetched_schema(source: pa.DataType | None = None) -> pa.Schema:
    return FETCHED if source is None else FETCHED.append(pa.field("source", source))


def results_schema(source: pa.DataType | None = None, attention: bool = False) -> pa.Schema:
    """The columns of a caption, or else why there is none."""
    fields = [pa.field(field.name, field.type) for field in captions_schema(source, attention)]
    return pa.schema([*fields, pa.field("error_type", pa.string()), pa.field("message", pa.string())])


RESULTS = results_schema()


def block_of(
    table: pa.Table,
    number: int | None = None,
    container: str | None = None,
    members: pa.Table | None = None,
    fault: str | None = None,
) -> pa.Table:
    """``table`` as a BLOCK row."""
    packed = None if members is None else _pack(members)
    values = (_pack(table), number, container, packed, fault)
    return pa.table([pa.array([value], column.type) for value, column in zip(values, BLOCK, strict=True)], schema=BLOCK)


def repacked(row: pa.Table, table: pa.Table) -> pa.Table:
    """The BLOCK ``row`` with another table in it."""
    return row.set_column(0, BLOCK.field("block"), pa.array([_pack(table)], pa.binary()))


def unpack(row: pa.Table, column: str = "block") -> pa.Table | None:
    """The table in ``column`` of a BLOCK row, without copying its buffers."""
    value = row[column][0]
    return pa.ipc.open_stream(value.as_buffer()).read_all() if value.is_valid else None


def _pack(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()
