"""The answer to a query as a file: CSV, Parquet, JSON lines, or COCO's results format."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

from capray.config import QueryConfig
from capray.errors import ConfigError
from capray.output import first_row
from capray.storage import locate, write_file

if TYPE_CHECKING:
    import duckdb

_FORMATS = {
    "csv": "FORMAT csv, HEADER",
    "parquet": "FORMAT parquet, COMPRESSION zstd",
    "jsonl": "FORMAT json",
    "coco": "FORMAT json, ARRAY true",
}


def export(connection: duckdb.DuckDBPyConnection, sql: str, config: QueryConfig) -> int:
    """Write the answer to ``sql`` to ``config.out``, which then is whole or not there; the number of rows.

    ``coco`` is the official results format, ``[{"image_id": 42, "caption": "a dog"}, …]``
    (https://cocodataset.org/#format-results): the integer id is the carried column ``config.coco_id``, or when that is
    None the digits at the end of the file's name, as in COCO's ``COCO_val2014_000000000042.jpg``.

    Raises:
        ConfigError: COCO's format for rows without captions, without integer ids, or with one id for several images.
        StorageError: the file cannot be written.
    """
    assert config.export is not None and config.out is not None
    if config.export == "coco":
        sql = _as_results(connection, sql, config.coco_id)
    elif config.export != "parquet":
        described = connection.execute(f"DESCRIBE {sql}").fetchall()
        blobs = [name for name, kind, *_ in described if kind == "BLOB"]
        if blobs:
            replaced = ", ".join(f'lower(hex("{name}")) AS "{name}"' for name in blobs)
            sql = f"SELECT * REPLACE ({replaced}) FROM ({sql}\n)"
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "answer")
        (count,) = first_row(connection, f"COPY ({sql}\n) TO '{file}' ({_FORMATS[config.export]})")
        write_file(locate(config.out), file)
    return count


def _as_results(connection: duckdb.DuckDBPyConnection, sql: str, coco_id: str | None) -> str:
    columns = [row[0] for row in connection.execute(f"DESCRIBE {sql}").fetchall()]
    for name in ("image_id", "caption"):
        if name not in columns:
            raise ConfigError(f"COCO's format needs the columns image_id and caption, not {', '.join(columns)}")
    if coco_id is None:
        number = r"TRY_CAST(regexp_extract(image_id, '(\d+)(\.[A-Za-z0-9]+)?$', 1) AS BIGINT)"
    else:
        if "source" not in columns:
            raise ConfigError(f"there is no column {coco_id!r}: no columns were carried along (capray caption --keep)")
        number = f"""TRY_CAST(source."{coco_id.replace('"', '""')}" AS BIGINT)"""
    connection.execute(
        f"CREATE OR REPLACE TEMP TABLE results AS SELECT image_id AS name, {number} AS image_id, caption FROM ({sql}\n)"
    )
    without = connection.execute("SELECT name FROM results WHERE image_id IS NULL LIMIT 1").fetchone()
    if without is not None:
        raise ConfigError(
            f"the image {without[0]!r} has no integer id: name the carried column that holds it with --coco-id COLUMN"
        )
    twice = connection.execute(
        "SELECT image_id, min(name), max(name) FROM results GROUP BY 1 HAVING count(*) > 1 LIMIT 1"
    ).fetchone()
    if twice is not None:
        raise ConfigError(f"the integer id {twice[0]} would be that of {twice[1]!r} and of {twice[2]!r}")
    return "SELECT image_id, caption FROM results ORDER BY image_id"
