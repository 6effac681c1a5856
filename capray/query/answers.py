"""Questions to a captioning output, asked of DuckDB, and their answers printed."""

from __future__ import annotations

import csv
import json
import re
import sys
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.table import Table

from capray.config import QueryConfig
from capray.errors import ConfigError
from capray.output import first_row, require_output
from capray.query.export import export
from capray.query.search import search_sql
from capray.query.views import NAMES, create_views
from capray.storage import locate
from capray.wording import counted

if TYPE_CHECKING:
    import duckdb

NUM_ROWS_SHOWN = 5
NUM_FOUND_SHOWN = 20
_NAMES_PART = re.compile(r"""file ['"][^'"]*\.parquet['"]""", re.IGNORECASE)
"""What tells that a file cannot be read from what a function refuses: DuckDB raises the same."""

_COUNTS = """
SELECT (SELECT count(*) FROM captions) AS captions,
       (SELECT count(*) FROM failures) AS failures,
       (SELECT count(DISTINCT run_id) FROM (SELECT run_id FROM captions UNION ALL SELECT run_id FROM failure_log)) AS runs,
       round(avg(num_tokens), 1) AS mean_tokens,
       round(count(*) / nullif(extract(epoch FROM max(captioned_at) - min(captioned_at)), 0), 1) AS images_per_second
FROM captions
"""
_ROWS = f"SELECT image_id, caption, round(score::DOUBLE, 3) AS score FROM captions ORDER BY image_id LIMIT {NUM_ROWS_SHOWN}"


def run_query(config: QueryConfig, stream: TextIO | None = None) -> None:
    """Print the answer to ``config.sql``, a search, a condition or a sample; or without any the output's counts, failure
    kinds and a few rows. With ``config.export`` the answer is written to a file.

    Raises:
        ConfigError: no captioning output, or SQL that DuckDB refuses (with its message).
        StorageError: a part cannot be read.
    """
    import duckdb

    stream = stream or sys.stdout
    others = [locate(config.join)] if config.join is not None else []
    with require_output(config.output).connect(("captions", "failures"), *others) as connection:
        try:
            create_views(connection, config.join)
            if config.export is not None and config.out is not None:
                count = export(connection, _question(connection, config) or "FROM captions", config)
                print(f"wrote {counted(count, 'row')} to {config.out}", file=stream)
                return
            question = _question(connection, config)
            answers = [_answer(connection, sql) for sql in ([question] if question else _summary(connection))]
        except (
            duckdb.ProgrammingError,
            duckdb.DataError,
            duckdb.NotSupportedError,
            duckdb.TransactionException,
            OverflowError,  # An interval that is too long for Python's.
        ) as error:
            if isinstance(error, duckdb.InvalidInputException) and _NAMES_PART.search(str(error)):
                raise
            raise ConfigError(f"{error}\n  (views: {', '.join(NAMES)})") from error
    for names, rows in answers:
        _WRITERS[config.format](names, rows, stream)


def _question(connection: duckdb.DuckDBPyConnection, config: QueryConfig) -> str | None:
    """The query that the settings ask; None for none."""
    if config.sql is not None:
        if not config.sql.strip(" ;\n\t"):
            raise ConfigError(f"{config.sql!r} holds no query")
        return config.sql.rstrip(" ;\n\t")
    limit = config.limit or (None if config.export else NUM_FOUND_SHOWN)
    limited = f" LIMIT {limit}" if limit else ""
    if config.search is not None:
        return search_sql(connection, config.search, config.where) + limited
    if config.where is None and config.sample is None and config.limit is None:
        return None
    columns = "*" if config.export else "image_id, caption, round(score::DOUBLE, 3) AS score"
    sql = f"SELECT {columns} FROM captions" + (f" WHERE {config.where}" if config.where else "")
    if config.sample is not None:
        return f"SELECT * FROM ({sql}) USING SAMPLE reservoir({config.sample} ROWS) REPEATABLE ({config.seed})"
    return f"{sql} ORDER BY image_id{limited}"


def _answer(connection: duckdb.DuckDBPyConnection, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    result = connection.execute(sql)
    if result is None:
        raise ConfigError(f"{sql!r} holds no query")
    return [column[0] for column in result.description or []], result.fetchall()


def _summary(connection: duckdb.DuckDBPyConnection) -> list[str]:
    (failures,) = first_row(connection, "SELECT count(*) FROM failures")
    return [_COUNTS, *(["FROM failure_kinds"] if failures else []), _ROWS]


def _write_table(names: list[str], rows: list[tuple[Any, ...]], stream: TextIO) -> None:
    table = Table(*names)
    for row in rows:
        table.add_row(*("" if value is None else _plain(value) for value in row))
    console = Console(file=stream, width=None if stream.isatty() else 160, highlight=False, markup=False, emoji=False)
    console.print(table)


def _write_csv(names: list[str], rows: list[tuple[Any, ...]], stream: TextIO) -> None:
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(["" if value is None else _plain(value) for value in row] for row in rows)


def _write_json(names: list[str], rows: list[tuple[Any, ...]], stream: TextIO) -> None:
    records = [dict(zip(names, row, strict=True)) for row in rows]
    json.dump(records, stream, indent=1, ensure_ascii=False, default=_plain)
    stream.write("\n")


def _plain(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


_WRITERS = {"table": _write_table, "csv": _write_csv, "json": _write_json}
