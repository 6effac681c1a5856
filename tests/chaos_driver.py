"""A captioning run without Ray in a process of its own, which can be killed, stopped, or stop itself at a chosen write."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

import pyarrow as pa

from capray.captioning import job, lease, lease_file, writer
from capray.captioning.actor import CaptioningSettings
from capray.captioning.job import caption
from capray.captioning.rows import table_of
from capray.config import CaptionConfig
from capray.errors import CaprayError
from capray.inputs import witnesses
from tests.local_executor import LocalExecutor, StandIn

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__, "tests.chaos"])
EXPIRY_SECONDS = 2.0


@contextmanager
def short_lease(is_shared: bool = False) -> Generator[None]:
    """A lease that expires soon; with ``is_shared`` as on a shared file system, without the kernel's lock."""
    with ExitStack() as patches:
        times = {"renew_seconds": 0.2, "publish_seconds": 0.6, "expiry_seconds": EXPIRY_SECONDS, "patience_seconds": 20.0}
        patches.enter_context(mock.patch.object(job, "Lease", partial(job.Lease, **times)))
        if is_shared:
            patches.enter_context(mock.patch.object(lease, "is_on_local_disk", return_value=False))
        yield


@dataclass(frozen=True)
class Order:
    """What a driver is to do.

    Attributes:
        settings: of CaptionConfig.
        folder: where it keeps its log, and the number of images it captioned.
        stop_at: a pattern of the write before which it stops itself (SIGSTOP), once.
        block_seconds: what each block takes.
    """

    settings: dict
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    stop_at: str = ""
    block_seconds: float = 0.0
    is_shared: bool = False


class Driver:
    """A process that carries out an order."""

    def __init__(self, order: Order):
        order.folder.mkdir(parents=True)
        self.order = order
        self._process = _CONTEXT.Process(target=_carry_out, args=(order,), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def is_over(self) -> bool:
        return self._process.exitcode is not None

    def await_stop(self, seconds: float = 30) -> bool:
        """Whether it has stopped itself, and did not end instead."""
        deadline = time.monotonic() + seconds
        while not self.is_over and time.monotonic() < deadline:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "T":
                return True
            time.sleep(0.01)
        return False

    def await_blocks(self, number: int, seconds: float = 30) -> bool:
        """Whether it has captioned so many blocks, and is at work still."""
        deadline = time.monotonic() + seconds
        while not self.is_over and time.monotonic() < deadline:
            if self._figures()[0] >= number:
                return True
            time.sleep(0.005)
        return False

    @property
    def num_captioned(self) -> int:
        return self._figures()[1]

    def wait(self, seconds: float = 120) -> int:
        """Its exit code."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"it did not end: {self.text()}"
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()
        self._process.join(10)

    def text(self) -> str:
        return (self.order.folder / "log").read_text()

    def _figures(self) -> tuple[int, int]:
        path = self.order.folder / "figures"
        blocks, images = path.read_text().split() if path.exists() else (0, 0)
        return int(blocks), int(images)


def _carry_out(order: Order) -> None:
    with open(order.folder / "log", "w") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
    os.environ.update(order.environment)

    executor = LocalExecutor(
        lambda settings: _Counting(settings, order.folder), after_block=lambda number: time.sleep(order.block_seconds)
    )
    with ExitStack() as patches:
        patches.enter_context(short_lease(order.is_shared))
        patches.enter_context(mock.patch.object(witnesses, "POLL_SECONDS", 0.2))
        # SeaweedFS takes seconds to show each process that it honours conditions.
        patches.enter_context(mock.patch.object(lease_file.SharedObject, "probe"))
        if order.stop_at:
            patches.enter_context(_stopping(order.stop_at))
        try:
            print(caption(CaptionConfig(**order.settings), executor=executor).text())
            code = 0
        except CaprayError as error:
            print(error)
            code = error.exit_code
    sys.stdout.flush()
    os._exit(code)


class _Counting(StandIn):
    """Keeps the numbers of blocks and images in a file."""

    def __init__(self, settings: CaptioningSettings, folder: Path):
        super().__init__(settings)
        self.folder, self.num_blocks, self.num_images = folder, 0, 0

    def __call__(self, block: pa.Table) -> pa.Table:
        results = super().__call__(block)
        self.num_blocks += 1
        self.num_images += table_of(results)["error_type"].null_count
        temporary = self.folder / "figures.new"
        temporary.write_text(f"{self.num_blocks} {self.num_images}")
        temporary.replace(self.folder / "figures")
        return results


@contextmanager
def _stopping(pattern: str) -> Generator[None]:
    """The process stops before the first write whose path has ``pattern`` in it, its lease checked, and not in the midst of
    renewing it (which lasts an instant, and is tests/test_lease.py's)."""
    write_atomic, is_to_stop = writer.write_atomic, [True]
    renewing, renew = threading.Lock(), lease.Lease._renew

    def renew_alone(self: lease.Lease) -> None:
        with renewing:
            renew(self)

    def write(location, *arguments, **options):
        if is_to_stop and re.search(pattern, location.path):
            is_to_stop.clear()
            with renewing:
                os.kill(os.getpid(), signal.SIGSTOP)
        return write_atomic(location, *arguments, **options)

    with mock.patch.object(writer, "write_atomic", write), mock.patch.object(lease.Lease, "_renew", renew_alone):
        yield
