"""The one CPU operator: a unit of the plan becomes blocks of decoded images at the encoder's input size.

A bad image becomes a row with its kind of failure. What a unit gives, and how it is cut, follows from the unit alone. From
the second attempt on (the first having died with its process) each image is decoded in a child process.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from capray import cluster
from capray.captioning.isolation import Crashed, Isolated
from capray.captioning.plan import Work
from capray.captioning.rows import BLOCK, block_of, fetched_schema
from capray.config import ImageLimits, Preprocessing
from capray.errors import CaprayError
from capray.images import ImageError, load
from capray.inputs.base import Selection
from capray.inputs.byte_reader import read_image, read_range
from capray.inputs.places import MEMBERS
from capray.inputs.tars import images_of, opened
from capray.storage import locate, storage_errors

DECODE_SECONDS = 60.0
"""An image that takes longer to decode is given up."""
_MESSAGE_LENGTH = 500
_SPARE_BYTES = 2**30
_BYTES_PER_PIXEL = 24
"""What decoding may need: a few copies in four channels."""

Row = dict[str, Any]
Data = bytes | ImageError
Decode = Callable[[bytes], tuple[np.ndarray, int, int]]


@dataclass(frozen=True)
class Loader:
    """``images.load`` with its settings."""

    preprocessing: Preprocessing
    limits: ImageLimits

    def __call__(self, data: bytes) -> tuple[np.ndarray, int, int]:
        return load(data, self.preprocessing, self.limits)


@dataclass
class _Rest:
    """What became known of a tar when it was read to its end."""

    number: int | None = None
    container: str | None = None
    members: pa.Table | None = None
    fault: str | None = None


@dataclass(frozen=True)
class Fetcher:
    """Fetches units of the plan, by their index.

    Args:
        image_columns: of each input, the column of its images if it is Parquet that holds them.
        selections: of each input, which of a tar's members are wanted.
        source_type: of the carried columns.
    """

    work: Work
    image_columns: tuple[str | None, ...]
    selections: tuple[Selection, ...]
    preprocessing: Preprocessing
    limits: ImageLimits
    concurrency: int
    source_type: pa.DataType | None = None
    schema: pa.Schema = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "schema", fetched_schema(self.source_type))

    def fetch(self, index: int, careful: bool = False) -> Iterator[pa.Table]:
        """The BLOCK rows of unit ``index``, at least one."""
        path, group = self.work.unit(index)
        rows = pq.ParquetFile(path, filesystem=self.work.files[0].fs).read_row_group(group).to_pylist()
        rest = _Rest()
        with self._decoder(careful) as decode:
            results = (self._result(row, data, decode) for row, data in self._images(rows, rest))
            block = list(islice(results, self.work.block_rows))
            while block:
                following = list(islice(results, self.work.block_rows)) if len(block) == self.work.block_rows else []
                table = pa.Table.from_pylist(block, schema=self.schema)
                if not following:
                    yield block_of(table, rest.number, rest.container, rest.members, rest.fault)
                    return
                yield block_of(table)
                block = following
        yield block_of(self.schema.empty_table(), rest.number, rest.container, rest.members, rest.fault)

    @contextmanager
    def _decoder(self, careful: bool) -> Generator[Decode]:
        loader = Loader(self.preprocessing, self.limits)
        if not careful:
            with _Watch() as watch:
                yield lambda data: watch.over(loader, data)
            return
        memory = _SPARE_BYTES + _BYTES_PER_PIXEL * self.limits.max_image_pixels + 4 * self.limits.max_image_bytes
        with Isolated(_loader, (self.preprocessing, self.limits), DECODE_SECONDS, memory) as child:

            def decode(data: bytes) -> tuple[np.ndarray, int, int]:
                try:
                    return child.call(data)
                except Crashed as error:
                    raise ImageError("crashed", f"decoding {error}") from error

            yield decode

    def _images(self, rows: list[Row], rest: _Rest) -> Iterator[tuple[Row, Data]]:
        for container, group in groupby(rows, key=lambda row: row["container"]):
            if container is None:
                yield from self._objects(group)
                continue
            among = list(group)
            if among[0]["row_group"] is not None:
                for number, of_group in groupby(among, key=lambda row: row["row_group"]):
                    yield from self._parquet_rows(container, number, list(of_group))
            elif among[0]["member"] is None:
                yield from self._whole_tar(among, rest)
            else:
                yield from self._members(container, among)

    def _objects(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Data]]:
        """Reads ahead of the decoding, by no more than ``concurrency`` images."""
        ahead: deque[tuple[Row, Future[Data]]] = deque()
        with ThreadPoolExecutor(self.concurrency) as pool:
            for row in rows:
                ahead.append((row, pool.submit(self._read, row)))
                if len(ahead) >= self.concurrency:
                    first, data = ahead.popleft()
                    yield first, data.result()
            for row, data in ahead:
                yield row, data.result()

    def _read(self, row: Row) -> Data:
        if row["uri"] is None:
            return ImageError("missing", "the row has no URI")
        if row["size"] is not None and row["size"] > self.limits.max_image_bytes:
            return self._too_large(row["size"])
        try:
            return read_image(row["uri"], self.limits.max_image_bytes)
        except ImageError as error:
            return error

    def _too_large(self, size: int) -> ImageError:
        return ImageError("too_large", f"{size} bytes, over the limit of {self.limits.max_image_bytes}")

    def _parquet_rows(self, container: str, group: int, rows: list[Row]) -> Iterator[tuple[Row, Data]]:
        column = self.image_columns[rows[0]["input"]]
        assert column is not None
        place = locate(container)
        waiting = deque(rows)
        first = 0
        try:
            with storage_errors(f"reading {container}"):
                file = pq.ParquetFile(place.path, filesystem=place.fs)
                for batch in file.iter_batches(256, row_groups=[group], columns=[column]):
                    while waiting and waiting[0]["row"] < first + batch.num_rows:
                        value = batch[0][waiting[0]["row"] - first].as_py()
                        missing = ImageError("missing", "the row has no image bytes")
                        yield waiting.popleft(), missing if value is None else value
                    first += batch.num_rows
                    if not waiting:
                        return
        except (CaprayError, pa.ArrowException) as error:
            problem = ImageError("unreadable_storage", f"{container}: {error}")
        else:
            problem = ImageError("missing", f"row group {group} of {container} has only {first} rows")
        for row in waiting:
            yield row, problem

    def _whole_tar(self, rows: list[Row], rest: _Rest) -> Iterator[tuple[Row, Data]]:
        """A tar whose members are not known: each is yielded unless it is settled, and all are told in ``rest``."""
        tar_row, done = rows[0], {row["image_id"] for row in rows[1:]}
        uri = tar_row["container"]
        selection = self.selections[tar_row["input"]]
        members: list[Row] = []
        rest.number, rest.container = tar_row["input"], uri
        try:
            with opened(uri) as tar:
                for member, data, whole in images_of(tar, self.limits.max_image_bytes):
                    image_id = f"{uri}#{member.name}"
                    if not selection.has(image_id):
                        continue
                    row = {
                        "image_id": image_id,
                        "member": member.name,
                        "offset": member.offset_data,
                        "size": member.size,
                    }
                    members.append(row)
                    if image_id not in done:
                        done.add(image_id)
                        yield row | {"uri": image_id, "source": None}, self._of_member(member.size, data, whole)
        except CaprayError as error:
            rest.fault = str(error)
        else:
            rest.members = pa.Table.from_pylist(members, schema=MEMBERS)

    def _of_member(self, size: int, data: bytes, whole: bool) -> Data:
        if size > self.limits.max_image_bytes:
            return self._too_large(size)
        if not whole:
            return ImageError("truncated", f"the tar ends within this member: {len(data)} of {size} bytes")
        return data

    def _members(self, container: str, rows: list[Row]) -> Iterator[tuple[Row, Data]]:
        """Members that are known by name, in one reading of the tar, or by their place in it."""
        if all(row["offset"] is not None for row in rows):
            yield from self._members_by_place(container, rows)
            return
        wanted: dict[str, list[Row]] = {}
        for row in rows:
            wanted.setdefault(row["member"], []).append(row)
        problem = ImageError("missing", f"{container} has no such member")
        try:
            with opened(container) as tar:
                for member, data, whole in images_of(tar, self.limits.max_image_bytes):
                    for row in wanted.pop(member.name, ()):
                        yield row, self._of_member(member.size, data, whole)
                    if not wanted:
                        return
        except CaprayError as error:
            problem = ImageError("unreadable_storage", str(error))
        for row in chain.from_iterable(wanted.values()):
            yield row, problem

    def _members_by_place(self, container: str, rows: list[Row]) -> Iterator[tuple[Row, Data]]:
        for row in rows:
            if row["size"] > self.limits.max_image_bytes:
                yield row, self._too_large(row["size"])
                continue
            try:
                data = read_range(container, row["offset"], row["offset"] + row["size"])
            except ImageError as error:
                yield row, ImageError("unreadable_storage", error.message)
            else:
                yield row, self._of_member(row["size"], data, len(data) == row["size"])

    def _result(self, row: Row, data: Data, decode: Decode) -> Row:
        result = {"image_id": row["image_id"], "uri": row["uri"], "source": row.get("source")}
        try:
            if isinstance(data, ImageError):
                raise data
            pixels, width, height = decode(data)
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


def _loader(preprocessing: Preprocessing, limits: ImageLimits) -> Loader:
    return Loader(preprocessing, limits)


class _Watch:
    """Ends this process when one image takes longer than DECODE_SECONDS: the next attempt will be careful with it."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._done = threading.Event()

    def over(self, loader: Loader, data: bytes) -> tuple[np.ndarray, int, int]:
        self._since = time.monotonic()
        try:
            return loader(data)
        finally:
            self._since = None

    def __enter__(self) -> _Watch:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(1):
            since = self._since
            if since is not None and time.monotonic() - since > DECODE_SECONDS:
                os._exit(1)


def fetch_unit(batch: pa.Table, fetcher: Fetcher) -> Iterator[pa.Table]:
    """Ray Data's function: a row of ``id``, the index of a unit, to its BLOCK rows."""
    (index,) = batch["id"].to_pylist()
    for block in fetcher.fetch(index, careful=cluster.task_attempt() > 0):
        yield block.cast(BLOCK)
