"""The views a query finds beside ``captions``, ``failures`` and ``failure_log``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from capray.errors import ConfigError
from capray.storage import Location, find_parquet, locate

if TYPE_CHECKING:
    import duckdb

_VIEWS = {
    "caption_counts": "SELECT caption, count(*) AS images FROM captions GROUP BY ALL ORDER BY images DESC, caption",
    "words": """
        SELECT word, count(*) AS images
        FROM (SELECT DISTINCT image_id, unnest(string_split(caption, ' ')) AS word FROM captions)
        WHERE word <> '' GROUP BY ALL ORDER BY images DESC, word
    """,
    "failure_kinds": """
        SELECT error_type, count(*) AS images, min(message) AS example FROM failures GROUP BY ALL ORDER BY images DESC
    """,
    "runs": """
        SELECT run_id, count(*) FILTER (captioned) AS captions, count(*) FILTER (NOT captioned) AS failures,
               min(moment) AS first_at, max(moment) AS last_at
        FROM (SELECT run_id, captioned_at AS moment, true AS captioned FROM captions
              UNION ALL SELECT run_id, failed_at, false FROM failure_log)
        GROUP BY ALL ORDER BY first_at, run_id
    """,
}
NAMES = ("captions", "failures", "failure_log", *_VIEWS)


def create_views(connection: duckdb.DuckDBPyConnection, join: str | None) -> None:
    """The common questions as views, and with ``join`` (Parquet, CSV or JSON lines: a file, a folder of Parquet or a
    glob) the views ``source_table`` of its rows and ``joined`` of the captions with them.

    Raises:
        ConfigError: the table has no column image_id.
        StorageError: it cannot be read.
    """
    for name, sql in _VIEWS.items():
        connection.execute(f"CREATE VIEW {name} AS {sql}")
    if join is None:
        return
    connection.execute(f"CREATE VIEW source_table AS SELECT * FROM {_reader(join)}")
    columns = [row[0] for row in connection.execute("DESCRIBE source_table").fetchall()]
    if "image_id" not in columns:
        raise ConfigError(
            f"{join!r} has no column image_id to join by, but {', '.join(columns)}: rename one in a copy, or read the file "
            "in the query itself"
        )
    connection.execute("CREATE VIEW joined AS SELECT * FROM captions JOIN source_table USING (image_id)")


def _reader(uri: str) -> str:
    from capray.output import duckdb_path, parquet_files, quoted

    location = locate(uri)
    for suffixes, function in (
        ((".csv", ".tsv", ".csv.gz", ".tsv.gz"), "read_csv"),
        ((".jsonl", ".ndjson", ".json", ".jsonl.gz"), "read_json"),
    ):
        if uri.lower().endswith(suffixes):
            return f"{function}({quoted(duckdb_path(location))})"
    files = [Location(entry.uri, location.fs, entry.path) for entry in find_parquet(uri)]
    return parquet_files(files, "union_by_name")
