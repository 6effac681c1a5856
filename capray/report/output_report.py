"""The report on a captioning output: what was done, what failed, what the captions are like."""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from capray.config import ImageLimits, ReportConfig
from capray.errors import ConfigError
from capray.images import ImageError, decode
from capray.inputs.byte_reader import read_image
from capray.inputs.tars import BEHIND_TAR
from capray.output import first_row, require_output
from capray.query.views import create_views
from capray.report.charts import bars, lines
from capray.report.rendering import data_uri, encoded, render
from capray.storage import locate, write_atomic
from capray.wording import counted

if TYPE_CHECKING:
    import duckdb

NUM_BINS = 40
NUM_COMMON = 25
NUM_EXAMPLES = 3
NUM_SEARCHABLE = 5000
"""Captions in the page for its search box: all, or at most this many, drawn at random."""
THUMBNAIL = 240
"""Longer side of a thumbnail in pixels."""
_COLUMNS = "image_id, uri, caption, score::DOUBLE AS score, num_tokens"
Row = dict[str, Any]


@dataclass(frozen=True)
class Gallery:
    """Some captions, each with its picture where that can be read."""

    title: str
    rows: list[Row]


def report_output(config: ReportConfig) -> str:
    """Write the report on the captioning output ``config.output`` to ``config.html``; what was written, in a line.

    It reads the tables, and the images of the gallery alone: from the URIs in the captions, or from ``config.images``, a
    table with the columns image_id and image.

    Raises:
        ConfigError: no captioning output, or ``config.images`` is no such table.
        StorageError: a part cannot be read, or the page cannot be written.
    """
    assert config.output is not None
    output = require_output(config.output)
    others = [locate(config.images)] if config.images is not None else []
    with output.connect(("captions", "failures"), *others) as connection:
        create_views(connection, config.images)
        galleries = _galleries(connection, config)
        pictures = _pictures(connection, galleries, config)
        html = render(
            "report.html",
            title=config.output,
            job=output.read_job(),
            counts=_counts(connection),
            failures=_failures(connection),
            runs=_rows(connection, "FROM runs"),
            rate=_rate(connection),
            histograms=[_histogram(connection, *what) for what in (("num_tokens", "tokens"), ("score", "score"))],
            captions=_rows(connection, f"FROM caption_counts LIMIT {NUM_COMMON}"),
            words=_rows(connection, f"FROM words LIMIT {NUM_COMMON}"),
            galleries=galleries,
            pictures=pictures,
            searchable=_rows(
                connection, _drawn("image_id, caption, round(score::DOUBLE, 2) AS score", NUM_SEARCHABLE, config.seed)
            ),
        )
    write_atomic(locate(config.html), html.encode())
    shown = sum(picture is not None for picture in pictures.values())
    return f"wrote {config.html}: {shown} of {counted(len(pictures), 'picture')} could be shown"


def _rows(connection: duckdb.DuckDBPyConnection, sql: str, *values: Any) -> list[Row]:
    result = connection.execute(sql, values or None)
    names = [column[0] for column in result.description or []]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def _drawn(columns: str, number: int, seed: int) -> str:
    return f"SELECT * FROM (SELECT {columns} FROM captions) USING SAMPLE reservoir({number} ROWS) REPEATABLE ({seed})"


def _counts(connection: duckdb.DuckDBPyConnection) -> Row:
    (counts,) = _rows(
        connection,
        """SELECT count(*) AS captions, count(DISTINCT caption) AS distinct_captions, avg(num_tokens) AS mean_tokens,
                  count(*) FILTER (NOT finished) AS unfinished, min(captioned_at) AS first_at,
                  max(captioned_at) AS last_at, (SELECT count(*) FROM failures) AS failures FROM captions""",
    )
    return counts


def _failures(connection: duckdb.DuckDBPyConnection) -> list[Row]:
    kinds = _rows(connection, "SELECT error_type, images FROM failure_kinds")
    for kind in kinds:
        kind["examples"] = _rows(
            connection,
            f"SELECT image_id, message FROM failures WHERE error_type = ? ORDER BY image_id LIMIT {NUM_EXAMPLES}",
            kind["error_type"],
        )
    return kinds


def _rate(connection: duckdb.DuckDBPyConnection) -> str | None:
    """The chart of images a second over the hours of work; None when it took less than half a minute. Pauses between runs
    of a job are shown as they are: nothing was done in them."""
    (seconds,) = first_row(connection, "SELECT extract(epoch FROM max(captioned_at) - min(captioned_at)) FROM captions")
    if seconds is None or seconds < 30:
        return None
    width = max(10.0, seconds / NUM_BINS)
    found = connection.execute(
        """SELECT least(floor(extract(epoch FROM captioned_at - (SELECT min(captioned_at) FROM captions)) / ?), ?) AS bin,
        count(*) FROM captions GROUP BY 1""",
        [width, math.ceil(seconds / width) - 1],
    ).fetchall()
    images = {int(place): count for place, count in found}
    places = range(max(images) + 1)
    return lines(
        {"images/s": [images.get(place, 0) / width for place in places]},
        [place * width / 60 for place in places],
        "minutes since the first caption",
        "images/s",
    )


def _histogram(connection: duckdb.DuckDBPyConnection, column: str, label: str) -> tuple[str, str] | None:
    finite = f"FROM captions WHERE isfinite({column}::DOUBLE)"
    low, high = first_row(connection, f"SELECT min({column})::DOUBLE, max({column})::DOUBLE {finite}")
    if low is None:
        return None
    width = (high - low) / NUM_BINS
    width = float(max(1, math.ceil(width))) if column == "num_tokens" else max(width, 1e-6)
    found = connection.execute(
        f"SELECT least(floor(({column}::DOUBLE - ?) / ?), ?) AS bin, count(*) {finite} GROUP BY 1 ORDER BY 1",
        [low, width, NUM_BINS if column == "num_tokens" else NUM_BINS - 1],
    ).fetchall()
    return label, bars([low + place * width for place, _ in found], [count for _, count in found], width, label)


def _galleries(connection: duckdb.DuckDBPyConnection, config: ReportConfig) -> list[Gallery]:
    number = config.pictures
    if not number:
        return []
    ordered = f"SELECT {_COLUMNS} FROM captions ORDER BY {{}}, image_id LIMIT {number}"
    return [
        Gallery("Drawn at random", _rows(connection, _drawn(_COLUMNS, number, config.seed))),
        Gallery("The surest", _rows(connection, ordered.format("score DESC"))),
        Gallery("The least sure", _rows(connection, ordered.format("score"))),
        Gallery("The longest", _rows(connection, ordered.format("num_tokens DESC"))),
    ]


def _pictures(
    connection: duckdb.DuckDBPyConnection, galleries: Iterable[Gallery], config: ReportConfig
) -> dict[str, str | None]:
    """The thumbnail of each image shown, by id; None for one that cannot be read."""
    wanted = {row["image_id"]: row["uri"] for gallery in galleries for row in gallery.rows}
    limits = ImageLimits()
    if config.images is not None:
        columns = {row[0]: row[1] for row in connection.execute("DESCRIBE source_table").fetchall()}
        if columns.get("image") != "BLOB":
            raise ConfigError(
                f"{config.images!r} has no column `image` of encoded images, but "
                f"{', '.join(f'{name} ({kind})' for name, kind in columns.items())}"
            )
        connection.execute("CREATE TEMP TABLE shown AS SELECT unnest(?::VARCHAR[]) AS image_id", [list(wanted)])
        found = dict(
            connection.execute("SELECT image_id, image FROM source_table SEMI JOIN shown USING (image_id)").fetchall()
        )

    def picture(image_id: str) -> str | None:
        try:
            if config.images is not None:
                data = found.get(image_id)
            else:
                uri = wanted[image_id]
                data = read_image(uri, limits.max_image_bytes) if uri is not None and not BEHIND_TAR.search(uri) else None
            return None if data is None else thumbnail(data, limits)
        except ImageError:
            return None

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(wanted, pool.map(picture, wanted), strict=True))


def thumbnail(data: bytes, limits: ImageLimits) -> str:
    """A small JPEG of an encoded image, as the source of an ``<img>``. Raises ImageError when it is none."""
    image = decode(data, limits, at_least=THUMBNAIL).image
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)
    return data_uri(encoded(image, "JPEG"), "JPEG")
