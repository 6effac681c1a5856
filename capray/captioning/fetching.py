"""What runs in tasks: a unit of the plan becomes blocks of decoded images at the encoder's input size. Loads no torch, whose
import each of the processes would pay for.

A bad image becomes a row with its kind of failure. How many blocks a unit gives follows from the unit alone, whatever is
found. From the second attempt on (the first having died with its process) each image is decoded in a child process.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Container, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import pyarrow as pa

from capray import cluster
from capray.captioning.isolation import CannotStart, Crashed, Isolated, KilledFromOutside
from capray.captioning.rows import BLOCK, FETCHED, block_of, unit_of, unit_row
from capray.captioning.units import num_blocks, read_units
from capray.config import ImageLimits, Preprocessing
from capray.errors import TryAgain
from capray.images import UNCERTAIN, ImageError, load
from capray.inputs.base import Event, Failed, Found
from capray.inputs.places import Row, with_source
from capray.inputs.reader import FetchOutcome, Reader
from capray.storage import locate

DECODE_SECONDS = 60.0
"""An image that takes longer to decode is given up."""
MAX_ATTEMPTS = 6
"""A task whose process died so often is given up, and the job with it: it is careful from the second attempt on, so that no
image kills it."""
_MESSAGE_LENGTH = 500
_SPARE_BYTES = 2**30
_BYTES_PER_PIXEL = 24
"""What decoding may need: a few copies in four channels."""

Decode = Callable[[bytes], tuple[np.ndarray, int, int]]


def loader(preprocessing: Preprocessing, limits: ImageLimits) -> Decode:
    """``images.load`` with its settings."""
    return lambda data: load(data, preprocessing, limits)


@dataclass(frozen=True)
class Look:
    """Another look at an image: the kind of failure it had, None when it was read and decoded.

    ``certain``: the failure is final, as no other fault could have had this effect twice.
    """

    image_id: str
    kind: str | None
    message: str = ""
    certain: bool = False
    sha256: bytes | None = None


@dataclass(frozen=True)
class Fetcher:
    """Reads and decodes the images of units. It travels with every task, so it holds nothing that grows with the plan.

    Args:
        run_id: the run, to which notices are posted.
        careful_ids: images that have killed a captioning process before (a few).
        source_type: of the carried columns.
        decode_seconds: an image that takes longer to decode is given up.
    """

    reader: Reader
    preprocessing: Preprocessing
    block_rows: int
    run_id: str
    careful_ids: frozenset[str] = frozenset()
    source_type: pa.DataType | None = None
    decode_seconds: float = DECODE_SECONDS
    schema: pa.Schema = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "schema", with_source(FETCHED, self.source_type))

    def fetch(self, places: pa.Table, skipped: Container[bytes] = (), careful: bool = False) -> Iterator[pa.Table]:
        """The ``num_blocks`` BLOCK rows of a unit. Of a tar that holds more images than fit into them the rest is not
        decoded: its members are reported, and can be read by their places.

        Args:
            skipped: the MD5 digests of the ids of images to leave out of a tar.
            careful: whether to decode in a child process.
        """
        number = num_blocks(places, self.block_rows)
        events: list[Event] = []
        outcomes = self._outcomes(places.to_pylist(), skipped, events)
        with self._decoder(careful) as decode:
            for index in range(number):
                rows = [self._fetched(outcome, decode) for outcome in islice(outcomes, self.block_rows)]
                _add_witness(rows)
                is_last = index == number - 1
                if is_last:
                    for _ in outcomes:
                        pass
                table = pa.Table.from_pylist([row for row, _ in rows], schema=self.schema)
                yield block_of(table, events if is_last else ())

    def look(self, places: list[Row]) -> list[Look]:
        """Read and decode images once more, carefully."""
        looks: dict[str, Look] = {}
        events: list[Event] = []
        with self._decoder(careful=True) as decode:
            for outcome in self._outcomes(places, (), events):
                row, place = self._fetched(outcome, decode)
                kind = row.get("error_type")
                certain = kind is not None and (row["certain"] or _is_proof(kind, place))
                looks[place["image_id"]] = Look(
                    place["image_id"], kind, row.get("message") or "", certain, row.get("sha256")
                )
        changed = "its container has changed"
        return [looks.get(id_, Look(id_, "unreadable_storage", changed)) for id_ in (p["image_id"] for p in places)]

    def _outcomes(self, rows: list[Row], skipped: Container[bytes], events: list[Event]) -> Iterator[FetchOutcome]:
        for outcome in self.reader.read(rows, skipped, lambda text: cluster.post_notice(self.run_id, text)):
            if isinstance(outcome, (Found, Failed)):
                yield outcome
            else:
                events.append(outcome)

    @contextmanager
    def _decoder(self, careful: bool) -> Generator[Decode]:
        limits = self.reader.limits
        if not careful:
            with _Watchdog(loader(self.preprocessing, limits), self.decode_seconds) as watch:
                yield watch
            return
        memory = _SPARE_BYTES + _BYTES_PER_PIXEL * limits.max_image_pixels + 4 * limits.max_image_bytes
        with Isolated(loader, (self.preprocessing, limits), self.decode_seconds, memory) as child:

            def decode(data: bytes) -> tuple[np.ndarray, int, int]:
                try:
                    return child.call(data)
                except KilledFromOutside as error:
                    raise ImageError("captioning_error", f"decoding {error}") from error
                except Crashed as error:
                    raise ImageError("crashed", f"decoding {error}") from error

            yield decode

    def _fetched(self, outcome: FetchOutcome, decode: Decode) -> tuple[Row, Row]:
        """A FETCHED row, and the place of its image."""
        place = outcome.row
        result = {
            "image_id": place["image_id"],
            "uri": place["uri"],
            "source": place.get("source"),
            "careful": place["image_id"] in self.careful_ids,
            "node": cluster.node_id(),
        }
        try:
            if isinstance(outcome, Failed):
                raise outcome.error
            result["sha256"] = hashlib.sha256(outcome.data).digest()
            pixels, width, height = decode(outcome.data)
        except ImageError as error:
            return result | _failure(place, error), place
        except CannotStart as error:
            raise TryAgain(f"{error} on {socket.gethostname()}: run the same command again") from error
        except MemoryError:
            return result | _failure(place, ImageError("crashed", "decoding needs more memory than there is")), place
        except Exception as error:
            return result | _failure(place, ImageError("decode_error", f"{type(error).__name__}: {error}")), place
        found = {
            "pixels": pixels.tobytes(),
            "input_height": pixels.shape[0],
            "input_width": pixels.shape[1],
            "width": width,
            "height": height,
        }
        return result | found, place


def _failure(place: Row, error: ImageError) -> Row:
    return {
        "error_type": error.kind,
        "message": error.message[:_MESSAGE_LENGTH],
        "certain": error.certain,
        "place": None if error.certain else _as_json(place),
    }


def _add_witness(rows: list[tuple[Row, Row]]) -> None:
    """Give the first readable image its place, by which it can be looked at again."""
    for row, place in rows:
        if "pixels" in row:
            row["place"] = _as_json(place)
            return


def _as_json(place: Row) -> str:
    return json.dumps({name: value for name, value in place.items() if name != "source"})


def _is_proof(kind: str, place: Row) -> bool:
    """Whether a failure seen once more is final. A missing file is only where its file system was proved to be there."""
    if kind not in UNCERTAIN:
        return False
    return kind != "missing" or "witness" in place or not locate(place["uri"]).is_local


class _Watchdog:
    """Ends this process when one image takes too long: the next attempt will be careful with it."""

    def __init__(self, decode: Decode, seconds: float) -> None:
        self._decode, self._seconds = decode, seconds
        self._since: float | None = None
        self._done = threading.Event()

    def __call__(self, data: bytes) -> tuple[np.ndarray, int, int]:
        self._since = time.monotonic()
        try:
            return self._decode(data)
        finally:
            self._since = None

    def __enter__(self) -> _Watchdog:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._seconds)):
            since = self._since
            if since is not None and time.monotonic() - since > self._seconds:
                os._exit(1)


def expand(batch: pa.Table) -> Iterator[pa.Table]:
    """Ray Data's function: a row with a plan file to its UNIT rows."""
    (file,) = batch["file"].to_pylist()
    for unit in read_units(locate(file)):
        yield unit_row(unit.places, unit.skipped)


def fetch_unit(batch: pa.Table, fetcher: Fetcher) -> Iterator[pa.Table]:
    """Ray Data's function: a UNIT row to its BLOCK rows.

    Raises:
        TryAgain: the processes of this task die again and again.
    """
    attempt = cluster.task_attempt()
    if attempt:
        cluster.post_notice(fetcher.run_id, f"a fetching process died; attempt {attempt + 1}, each image in a child process")
    if attempt >= MAX_ATTEMPTS:
        raise TryAgain(
            f"a fetching task died {attempt} times with its process, most likely for want of memory on its node: give the "
            "nodes more memory, or lower --max-image-pixels or --fetch-concurrency, and run the same command again"
        )
    for block in fetcher.fetch(*unit_of(batch), careful=attempt > 0):
        yield block.cast(BLOCK)
