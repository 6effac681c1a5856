"""Rows of text files: CSV, TSV and JSON lines. Knows nothing of what they say, nor where the lines come from."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from typing import Any

from capray.errors import DataError

csv.field_size_limit(2**24)


def csv_rows(lines: Iterable[str], name: str, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """The header and the rows of CSV, each with the number of the line it ends in; empty lines are left out.

    A quoted value may span lines, but none that could be a row: a quote that was never meant as one, or never closed, hides
    the rows behind it.

    Raises:
        DataError: what is no CSV, with ``name`` and the line.
    """
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    before = 0
    try:
        for row in rows:
            begin, before = before + 1, rows.line_num
            if not row:
                continue
            header = row if header is None else header
            if len(row) != len(header):
                raise DataError(
                    f"{name}, line {before}: {len(row)} fields, not {len(header)} as in the header; quote those with "
                    f"{delimiter!r} in them"
                )
            if before > begin and any(_hides_row(value, delimiter, len(header)) for value in row):
                raise DataError(
                    f"{name}, lines {begin} to {before}: a quoted value spans what could be rows of their own; double the "
                    "quote if it is none, or write the list as JSON lines or Parquet"
                )
            yield before, row
    except csv.Error as error:
        raise DataError(f"{name}, line {rows.line_num}: {error}") from error


def _hides_row(value: str, delimiter: str, num_fields: int) -> bool:
    return any(line.count(delimiter) >= num_fields - 1 for line in value.splitlines()[1:])


def json_rows(lines: Iterable[str], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of JSON lines, each with the number of its line; blank lines are left out.

    Raises:
        DataError: a line that is no JSON object, with ``name`` and the line.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{name}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{name}, line {number} is not a JSON object: {line.strip()[:60]!r}")
        yield number, row
