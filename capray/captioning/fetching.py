"""The one CPU operator: a block of the plan becomes fetched, decoded images at the encoder's input size.

A bad image becomes a row with its kind of failure. One call returns one block, its rows those of the plan in their order.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capray.captioning.plan import Work
from capray.captioning.reading import read_image
from capray.captioning.rows import FETCHED
from capray.captioning.sources import read_rows
from capray.config import ImageLimits, Preprocessing
from capray.errors import CaprayError
from capray.images import ImageError, load
from capray.storage import locate

_MESSAGE_LENGTH = 500


@dataclass(frozen=True)
class Fetcher:
    """Fetches blocks of the plan, by their index."""

    work: Work
    input_uri: str
    image_column: str | None
    preprocessing: Preprocessing
    limits: ImageLimits
    concurrency: int

    def fetch(self, index: int) -> pa.Table:
        """The FETCHED rows of block ``index``."""
        path, group = self.work.block(index)
        plan = pq.ParquetFile(path, filesystem=self.work.files[0].fs).read_row_group(group)
        rows = plan.to_pylist()
        inline = self._inline_images(rows)
        with ThreadPoolExecutor(self.concurrency) as pool:
            fetched = list(pool.map(self._fetch, rows, (inline.get(i) for i in range(len(rows)))))
        return pa.Table.from_pylist(fetched, schema=FETCHED)

    def _inline_images(self, rows: list[dict[str, Any]]) -> dict[int, bytes | ImageError | None]:
        """The bytes of the rows whose images lie in a Parquet container, by index; each row group is read once."""
        groups: dict[tuple[str, int], list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            if row["container"] is not None:
                groups[row["container"], row["row_group"]].append(i)
        images: dict[int, bytes | ImageError | None] = {}
        for (container, group), indices in groups.items():
            assert self.image_column is not None
            positions = [rows[i]["row"] for i in indices]
            try:
                values = read_rows(locate(self.input_uri), container, group, self.image_column, positions)
            except CaprayError as error:
                images |= dict.fromkeys(indices, ImageError("unreadable_storage", str(error)))
            else:
                images |= zip(indices, values, strict=True)
        return images

    def _fetch(self, row: dict[str, Any], inline: bytes | ImageError | None) -> dict[str, Any]:
        result = {"image_id": row["image_id"], "uri": row["uri"]}
        try:
            if isinstance(inline, ImageError):
                raise inline
            data = inline
            if row["container"] is None:
                if row["uri"] is None:
                    raise ImageError("missing", "the row has no URI")
                data = read_image(row["uri"], self.limits.max_image_bytes)
            if data is None:
                raise ImageError("missing", "the row has no image bytes")
            pixels, width, height = load(data, self.preprocessing, self.limits)
        except ImageError as error:
            return result | {"error_type": error.kind, "message": error.message[:_MESSAGE_LENGTH]}
        return result | {
            "pixels": pixels.tobytes(),
            "input_height": pixels.shape[0],
            "input_width": pixels.shape[1],
            "width": width,
            "height": height,
            "sha256": hashlib.sha256(data).digest(),
        }


def fetch_block(batch: dict[str, Any], fetcher: Fetcher) -> pa.Table:
    """Ray Data's function: ``{"id": [index]}`` to the rows of that block."""
    (index,) = batch["id"]
    return fetcher.fetch(int(index))
