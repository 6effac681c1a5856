"""What flows through the job, as Arrow tables: fetched images, results, and what was found out about containers.

Ray Data may cut and join blocks as it likes, and a replayed task that cuts elsewhere would lose or repeat rows. So a block
of this job travels as one row of a Ray block, its table encoded in the column ``block``: Ray has nothing to split.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pyarrow as pa

from capray.inputs.base import Changed, Event, LeftOut, TarMembers, TarUnreadable
from capray.inputs.places import MEMBERS
from capray.tables import captions_schema

_LOOK = [
    pa.field("error_type", pa.string()),
    pa.field("message", pa.string()),
    pa.field("certain", pa.bool_()),
    pa.field("place", pa.string()),
    pa.field("node", pa.string()),
]
"""Why there is no image or caption; whether that is certain; and where the image was looked for: its place as JSON (of what
is not certain, and of a block's first readable image), and the id of the node."""

FETCHED = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("pixels", pa.binary()),
        pa.field("input_height", pa.int32()),
        pa.field("input_width", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("sha256", pa.binary(32)),
        pa.field("careful", pa.bool_()),
        *_LOOK,
    ]
)
"""``pixels`` are uint8 at the encoder's input size; null, with the reason, where there is no image. A ``careful`` one has
killed a process before."""

EVENTS = pa.schema(
    [
        ("kind", pa.string()),
        ("input", pa.int16()),
        ("container", pa.string()),
        ("version", pa.string()),
        ("message", pa.string()),
        ("number", pa.int64()),
        ("example", pa.string()),
        ("members", pa.list_(pa.struct(MEMBERS))),
    ]
)
"""What was found out about containers while they were read."""

BLOCK = pa.schema([("block", pa.binary()), ("events", pa.binary())])
"""One row: a block, and the EVENTS that came with it."""

UNIT = pa.schema([("places", pa.binary()), ("skipped", pa.binary())])
"""One row: the places of a unit, and the MD5 digests of the ids that a tar is to be read without, one behind the other."""


def results_schema(source: pa.DataType | None = None, attention: bool = False) -> pa.Schema:
    """The columns of a caption, or else why there is none."""
    return pa.schema([*(pa.field(field.name, field.type) for field in captions_schema(source, attention)), *_LOOK])


def block_of(table: pa.Table, events: Sequence[Event] = ()) -> pa.Table:
    """``table`` as a BLOCK row."""
    packed = pack(pa.Table.from_pylist([_event_row(event) for event in events], EVENTS)) if events else None
    return pa.table({"block": [pack(table)], "events": pa.array([packed], pa.binary())}, schema=BLOCK)


def with_table(row: pa.Table, table: pa.Table) -> pa.Table:
    """The BLOCK ``row`` with another table in it."""
    return row.set_column(0, BLOCK.field("block"), pa.array([pack(table)], pa.binary()))


def table_of(row: pa.Table) -> pa.Table:
    """The table in a BLOCK row, without copying its buffers."""
    return unpack(row["block"][0])


def events_of(row: pa.Table) -> list[Event]:
    """The events in a BLOCK row."""
    if not row["events"][0].is_valid:
        return []
    return [_event(values) for values in unpack(row["events"][0]).to_pylist()]


def unit_row(places: pa.Table, skipped: Iterable[bytes] = ()) -> pa.Table:
    """The places of a unit as a UNIT row."""
    return pa.table({"places": [pack(places)], "skipped": [b"".join(skipped)]}, schema=UNIT)


def unit_of(row: pa.Table) -> tuple[pa.Table, frozenset[bytes]]:
    """The places in a UNIT row, and the digests to skip."""
    digests = row["skipped"][0].as_py()
    return unpack(row["places"][0]), frozenset(digests[i : i + 16] for i in range(0, len(digests), 16))


def pack(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def unpack(value: pa.Scalar) -> pa.Table:
    return pa.ipc.open_stream(value.as_buffer()).read_all()


def _event_row(event: Event) -> dict:
    row = {"kind": type(event).__name__, "input": event.input, "container": event.container}
    if isinstance(event, TarMembers):
        return row | {"version": event.version, "members": event.members.to_pylist()}
    if isinstance(event, LeftOut):
        return row | {"message": event.reason, "number": event.number, "example": event.example}
    return row | ({"message": event.message} if isinstance(event, TarUnreadable) else {})


def _event(row: dict) -> Event:
    number, container = row["input"], row["container"]
    if row["kind"] == Changed.__name__:
        return Changed(number, container)
    if row["kind"] == TarUnreadable.__name__:
        return TarUnreadable(number, container, row["message"])
    if row["kind"] == LeftOut.__name__:
        return LeftOut(number, container, row["message"], row["number"], row["example"])
    return TarMembers(number, container, row["version"], pa.Table.from_pylist(row["members"], MEMBERS))
