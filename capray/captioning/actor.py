"""The captioning actor: blocks of fetched images in, blocks of captions out. Keeps no rows between calls.

A failure of an image becomes a row. When the device fails, the process ends, and the actor Ray starts in its place waits
until the device works again: nothing is recorded against images. A restarted actor is careful: it captions its first blocks,
among which is what may have killed the process, image by image in a child process.
"""

from __future__ import annotations

import atexit
import gc
import math
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, NoReturn, TypeVar

import numpy as np
import pyarrow as pa
import torch

from capray import cluster
from capray.captioning.canary import canary_score, is_near, is_same
from capray.captioning.isolation import CannotStart, Crashed, Isolated, KilledFromOutside, deadline
from capray.captioning.model_transfer import ModelTransfer
from capray.captioning.rows import results_schema, table_of, with_table
from capray.config import Decoding
from capray.device import DeviceError, is_device_error, is_out_of_memory
from capray.errors import CaprayError, CheckpointError, StorageError, TryAgain
from capray.inference import SWITCH_SECONDS, Captioned, Inference

CAREFUL_BLOCKS = 8
"""Blocks an actor takes care with after it was restarted: more than it is given at once (stream.MAX_IN_FLIGHT)."""
CANARY_BLOCKS = 32
"""Blocks between two looks at the canary."""
CAPTION_SECONDS = 300.0
"""An image that takes longer by itself is given up. Several together may take as much again for each IMAGES_PER_DEADLINE."""
IMAGES_PER_DEADLINE = 32
LOAD_SECONDS = 600.0
MAX_RESTARTS = 6
"""An actor restarted so often in a row, without a block captioned in between, stops the job."""
PAUSE_SECONDS = (1.0, 30.0)
"""The first and the longest pause between two attempts at what may pass."""
_MESSAGE_LENGTH = 500

Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class CaptioningSettings:
    """What captioning needs to know; it travels to actors and their child processes.

    Attributes:
        model: the captioner's folder or URI.
        model_id: what it was when the job began; another one is an error, not a mixture.
        attention: whether to return attention weights.
        batch_size: images captioned together; by the device when None.
        num_threads: threads it may use on the CPU.
        source_type: of the carried columns.
        run_id: the run, to which notices are posted; "" where nobody reads them.
        patience_seconds: how long to wait for a device, or a child process, that does not work.
        canary: ``canary_score`` of the driver's own captioner. None: not compared; NaN: the model gives the canary no
            caption on any device, and it is not looked at.
        transfer: copies the model to nodes that cannot read the driver's disk.
    """

    model: str
    model_id: str
    decoding: Decoding
    precision: str
    attention: bool
    batch_size: int | None
    on_gpu: bool
    num_threads: int
    source_type: pa.DataType | None = None
    run_id: str = ""
    patience_seconds: float = 600
    canary: float | None = None
    transfer: ModelTransfer | None = None

    def on_this_node(self) -> CaptioningSettings:
        """The same, with a model that this node can read."""
        if self.transfer is None:
            return self
        return replace(self, model=self.transfer.local_folder(), transfer=None)


@dataclass(frozen=True)
class NotCaptioned:
    """Why an image has no caption: its failure, as ``images.ImageError`` has it."""

    kind: str
    message: str
    certain: bool = True


Outcome = Captioned | NotCaptioned


class Captioning:
    """A loaded captioner with its settings: fetched rows to outcomes.

    Raises:
        CheckpointError: the model cannot be loaded, or is another one now.
        DeviceError: the device failed.
    """

    def __init__(self, settings: CaptioningSettings):
        torch.set_num_threads(settings.num_threads)
        self.settings = settings
        device = "cuda" if settings.on_gpu else "cpu"
        try:
            self.inference = Inference.load(settings.model, device, settings.precision, settings.batch_size)
        except Exception as error:
            if is_device_error(error) or is_out_of_memory(error):
                raise DeviceError(f"{type(error).__name__}: {error}") from error
            raise
        if self.inference.model_id != settings.model_id:
            raise CheckpointError(
                f"the model at {settings.model!r} changed while the job ran: it is {self.inference.model_id[:12]}… now, not "
                f"{settings.model_id[:12]}…: put the one back that the job began with"
            )
        self._canary: float | None = None

    def __call__(self, rows: list[Row]) -> list[Outcome]:
        """The outcome of each row, all of which have pixels."""
        images = [np.frombuffer(row["pixels"], np.uint8).reshape(row["input_height"], row["input_width"], 3) for row in rows]
        found = self.inference(images, self.settings.decoding, self.settings.attention)
        return [each if each.error is None else NotCaptioned("captioning_error", each.error) for each in found]

    def check_device(self) -> None:
        """Caption the canary, whose score is to be near that of the driver's captioner, and afterwards stay the same.

        Raises:
            DeviceError: it is not, or there is none.
        """
        expected = self.settings.canary
        if expected is not None and math.isnan(expected):
            return
        try:
            score = canary_score(self.inference)
        except Exception as error:
            raise DeviceError(f"the canary cannot be captioned: {type(error).__name__}: {error}") from error
        if not math.isfinite(score):
            raise DeviceError("the canary's caption has no finite probability")
        if self._canary is not None:
            if not is_same(score, self._canary):
                raise DeviceError(f"the canary's score was {self._canary:.4f} and is {score:.4f} now")
        elif expected is not None and not is_near(score, expected):
            raise DeviceError(f"the canary's score is {score:.4f}, not {expected:.4f} as on the driver")
        else:
            self._canary = score


class _ChildCaptioning:
    """Captioning in a child process: the outcomes of rows; without any, the device is checked."""

    def __init__(self, settings: CaptioningSettings):
        self.captioning = Captioning(settings)

    def __call__(self, rows: list[Row]) -> list[Outcome]:
        if not rows:
            self.captioning.check_device()
        return self.captioning(rows)


class CaptioningActor:
    """Captions blocks of fetched rows; a row that cannot be captioned becomes a failure, the others do not suffer.

    It raises nothing when it is built, which may be in the place of another one: what stops the job is raised by each call.
    """

    def __init__(self, settings: CaptioningSettings):
        cluster.end_with_raylet()
        self.node = f"{socket.gethostname()} {cluster.node_id()[:8]}".rstrip()
        self.settings = settings
        self.schema = results_schema(settings.source_type, settings.attention)
        self._error: CaprayError | None = None
        self._blocks_since_canary = 0
        self._restarts = cluster.count_restart()
        self.careful_blocks = CAREFUL_BLOCKS if self._restarts else 0
        try:
            self.settings = settings.on_this_node()
            self._child = Isolated(_ChildCaptioning, (self.settings,), CAPTION_SECONDS)
            if self._restarts:
                self._recover()
            self._patiently("the model cannot be read", self._load, StorageError)
        except DeviceError as error:
            self._end(f"the device failed ({error})")
        except CaprayError as error:
            self._error = error

    def __call__(self, blocks: pa.Table) -> pa.Table:
        """BLOCK rows of FETCHED images to as many of results, in their order (``run_id`` is the driver's to fill). Their
        images are captioned together.

        Raises:
            TryAgain: the device, or what it takes to use it carefully, has not worked for ``patience_seconds``.
            CaprayError: the model cannot be used.
        """
        if self._error is not None:
            raise self._error
        parts = [blocks.slice(i, 1) for i in range(blocks.num_rows)]
        tables = [table_of(part) for part in parts]
        rows = [row for table in tables for row in table.to_pylist()]
        readable = [i for i, row in enumerate(rows) if row["pixels"] is not None]
        outcomes: dict[int, Outcome] = {}
        if readable:
            try:
                outcomes = dict(zip(readable, self._outcomes([rows[i] for i in readable]), strict=True))
            except DeviceError as error:
                self._end(f"the device failed ({error})")
            if self._restarts:
                cluster.end_restarts()
                self._restarts = 0
        now = time.time_ns() // 1000
        results = iter([self._result(row, outcomes.get(i), now) for i, row in enumerate(rows)])
        captioned = [pa.Table.from_pylist(list(islice(results, table.num_rows)), self.schema) for table in tables]
        return pa.concat_tables(map(with_table, parts, captioned))

    def _load(self) -> None:
        with deadline(LOAD_SECONDS, self._late("loading the model")):
            self.captioning = Captioning(self.settings)
            self.captioning.check_device()
        gc.collect()
        gc.freeze()  # What is loaded by now stays; looking through it again and again takes longer than writing captions.
        atexit.register(gc.unfreeze)
        if self.settings.on_gpu:
            sys.setswitchinterval(SWITCH_SECONDS)

    def _recover(self) -> None:
        """Wait until the device works in a child process."""
        self._notify(
            f"captioning actor restarted on {self.node}: it captions its next {CAREFUL_BLOCKS} blocks image by image in a "
            "child process"
        )
        if self._restarts > MAX_RESTARTS:
            raise self._giving_up(f"it died {self._restarts} times in a row without captioning a block")
        self._patiently("the device does not work", self._probe, CannotStart, StorageError, Crashed, DeviceError)

    def _probe(self) -> None:
        try:
            self._child.call([])
        except DeviceError:
            self._child.close()  # Nothing works any more in a process in which a device failed.
            raise

    def _outcomes(self, rows: list[Row]) -> list[Outcome]:
        is_risky = [bool(self.careful_blocks or row["careful"]) for row in rows]
        others = [row for row, risky in zip(rows, is_risky, strict=True) if not risky]
        with deadline(CAPTION_SECONDS * (1 + len(others) / IMAGES_PER_DEADLINE), self._late("a batch")):
            together = iter(self.captioning(others))
        outcomes = [self._carefully(row) if risky else next(together) for row, risky in zip(rows, is_risky, strict=True)]
        self.careful_blocks = max(0, self.careful_blocks - 1)
        if not self.careful_blocks:
            self._child.close()
        self._blocks_since_canary += 1
        if self._blocks_since_canary >= CANARY_BLOCKS or any(isinstance(found, NotCaptioned) for found in outcomes):
            self._check_device()
        return outcomes

    def _check_device(self) -> None:
        with deadline(CAPTION_SECONDS, self._late("the canary")):
            self.captioning.check_device()
        self._blocks_since_canary = 0

    def _carefully(self, row: Row) -> Outcome:
        """An image in the child process. That it was the image that crashed it is certain the second time, and
        never when it was killed from outside."""
        try:
            call = partial(self._child.call, [row])
            (outcome,) = self._patiently(
                "no child process can be started to caption a suspect image", call, CannotStart, StorageError
            )
        except Crashed as error:
            self._check_device()
            is_proof = row["careful"] and not isinstance(error, KilledFromOutside)
            return NotCaptioned("crashed", f"captioning {error}", certain=bool(is_proof))
        return outcome

    def _patiently(self, trouble: str, attempt: Callable[[], T], *passing: type[Exception]) -> T:
        """What ``attempt`` gives, tried again while it raises what may be ``passing``.

        Raises:
            TryAgain: it did so for ``patience_seconds``.
        """
        patience = self.settings.patience_seconds
        until = time.monotonic() + patience
        pause, longest = PAUSE_SECONDS
        while True:
            try:
                return attempt()
            except passing as error:
                left = until - time.monotonic()
                reason = str(error)[:_MESSAGE_LENGTH]
                if left <= 0:
                    raise self._giving_up(f"{trouble}, for {patience:g} seconds now: {reason}") from error
                self._notify(f"captioning on {self.node}: {trouble} yet ({reason})")
            time.sleep(min(pause, left))
            pause = min(2 * pause, longest)

    def _giving_up(self, why: str) -> TryAgain:
        return TryAgain(
            f"captioning on {self.node}: {why}; nothing was recorded against images: mend the node or leave it out, and run "
            "the same command again"
        )

    def _notify(self, text: str) -> None:
        cluster.post_notice(self.settings.run_id, text)

    def _late(self, what: str) -> Callable[[str], None]:
        """What ends this process when ``what`` takes too long."""
        return lambda reason: self._end(f"{what} {reason}")

    def _end(self, reason: str) -> NoReturn:
        """End this process, as its device fails or hangs: Ray starts the actor again."""
        text = f"captioning on {self.node}: {reason[:_MESSAGE_LENGTH]}; its actor starts again"
        print(text, file=sys.stderr, flush=True)
        self._notify(text)
        os._exit(1)

    def _result(self, row: Row, outcome: Outcome | None, now: int) -> Row:
        passed_on = ("image_id", "uri", "error_type", "message", "certain", "place", "node", "sha256")
        result = {name: row[name] for name in passed_on}
        if outcome is None:
            return result
        if isinstance(outcome, NotCaptioned):
            message = outcome.message[:_MESSAGE_LENGTH]
            return result | {"error_type": outcome.kind, "message": message, "certain": outcome.certain}
        best, *others = outcome.hypotheses
        result |= {
            "caption": best.caption,
            "log_prob": best.log_prob,
            "score": best.score,
            "num_tokens": best.num_tokens,
            "finished": best.finished,
            "alternatives": [{"caption": h.caption, "log_prob": h.log_prob, "score": h.score} for h in others],
            "width": row["width"],
            "height": row["height"],
            "model_id": self.settings.model_id,
            "captioned_at": now,
            "source": row.get("source"),
        }
        if outcome.attention is not None:
            tokens = self.captioning.inference.captioner.vocabulary.tokens(best.token_ids)
            result |= {"tokens": tokens, "attention": outcome.attention}
        return result
