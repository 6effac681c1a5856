"""The record of a run in ``_capray/runs``: its settings, where it runs and how far it is, rewritten as a heartbeat.

A run writes its own record only. Knows nothing of how images are captioned.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from typing import Any

from capray import __version__
from capray.captioning.lease import own_ray_job
from capray.inputs.base import LEFT_OUT
from capray.output import Output
from capray.progress import duration
from capray.storage import Write
from capray.tables import FINAL_FAILURES
from capray.wording import counted

HEARTBEAT_SECONDS = 30.0
_VERSIONS = ("ray", "torch", "torchvision", "pyarrow", "pillow", "duckdb", "s3fs")


@dataclass
class Summary:
    """What a run did, and where the output stands.

    Attributes:
        images: ids the inputs name, ``duplicates`` further rows that repeat one.
        left_out: of the files in tars that are no images of the job's: by the reason in LEFT_OUT how many, and one's name.
        left: images and shards known of that are neither captioned nor settled as failed: those behind a ``limit``.
        captioned_before: captions of other runs.
        kept: captions of this output whose table or shard has changed since they were made.
        elsewhere: captions under listed ids that are of images at other URIs than are listed.
        first_elsewhere: the id of the first, where its image was, and where it is listed.
    """

    output: str
    run_id: str
    model_id: str
    status: str = "running"
    images: int = 0
    duplicates: int = 0
    hidden_files: int = 0
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)
    left: int = 0
    kept: int = 0
    elsewhere: int = 0
    first_elsewhere: tuple[str, str, str] | None = None
    captioned_before: int = 0
    captions: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    current_failures: dict[str, int] = field(default_factory=dict)
    second_looks: int = 0
    parts: int = 0
    seconds: float = 0.0
    images_per_second: float = 0.0
    passes: int = 0

    def json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def text(self) -> str:
        lines = [
            f"{counted(self.images, 'image')}: {self.captioned_before + self.captions:,} captioned, "
            f"{sum(self.current_failures.values()):,} failed",
            f"this run: {counted(self.captions, 'caption')}, {counted(sum(self.failures.values()), 'failed attempt')} in "
            f"{duration(self.seconds)} ({self.images_per_second:.1f} images/s), {counted(self.parts, 'part')}",
        ]
        lines += [f"  {kind}: {count:,}" for kind, count in sorted(self.current_failures.items())]
        notes = []
        if self.duplicates:
            notes.append(f"{counted(self.duplicates, 'row')} of the input with a repeated image id, captioned once")
        if self.kept:
            notes.append(f"{counted(self.kept, 'caption')} kept, of tables or shards that have changed since")
        if self.first_elsewhere:
            image_id, before, now = self.first_elsewhere
            notes.append(
                f"{counted(self.elsewhere, 'caption')} whose image is at another URI than its id is listed at, first: "
                f"{image_id} is of {before}, not {now}: give --id-column, or another output; moved data sets are fine "
                "as they are"
            )
        if final := sum(number for kind, number in self.current_failures.items() if kind in FINAL_FAILURES):
            notes.append(f"{counted(final, 'final failure')}: --retry-failed attempts such images again (mended ones, say)")
        if self.left:
            notes.append(
                "stopped at the limit; the same command goes on "
                f"({counted(self.left, 'image or shard', 'images or shards')} known of)"
            )
        if self.hidden_files:
            notes.append(
                f"{counted(self.hidden_files, 'hidden file')} left out (names that begin with ., in tables and shards _)"
            )
        notes += [
            f"{counted(number, 'file')} in tars left out: {LEFT_OUT[reason]} ({name})"
            for reason, (number, name) in self.left_out.items()
        ]
        return "\n".join([*lines, *(f"  note: {note}" for note in notes), f"tables in {self.output}"])


@cache
def _versions() -> dict[str, str]:
    names = {name: version(name) for name in _VERSIONS}
    return {"capray": __version__, "python": platform.python_version()} | names


class RunRecord:
    """Writes ``runs/<run_id>.json``, as a context every HEARTBEAT_SECONDS.

    Args:
        write: publishes bytes, while the run may write.
        settings: those that were given, without secrets.
        kinds: as what kind each input is read.
        summary: gives what is to be written.
    """

    def __init__(
        self,
        write: Write,
        output: Output,
        run_id: str,
        settings: dict[str, Any],
        kinds: list[str],
        summary: Callable[[], Summary],
    ):
        self.place = output.runs.join(f"{run_id}.json")
        self.traceback = output.runs.join(f"{run_id}.traceback.txt")
        self._write, self._summary = write, summary
        self._about = {
            "settings": settings,
            "kinds": kinds,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "ray_job": own_ray_job(),
            "versions": _versions(),
            "started_at": datetime.now(UTC).isoformat(),
        }
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> RunRecord:
        self.write()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()

    def write(self) -> None:
        """Write the record as things stand."""
        with self._lock:
            record = {**asdict(self._summary()), **self._about, "updated_at": datetime.now(UTC).isoformat()}
            self._write(self.place, json.dumps(record, indent=2).encode())

    def keep_traceback(self, error: BaseException) -> str | None:
        """Store the traceback of ``error``; its place, None when it cannot be written."""
        with suppress(Exception):
            self._write(self.traceback, "".join(traceback.format_exception(error)).encode())
            return self.traceback.uri
        return None

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with suppress(Exception):  # A later one may succeed; what must not be missed is written by `write`.
                self.write()
