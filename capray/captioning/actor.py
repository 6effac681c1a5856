"""The captioning actor: blocks of fetched images in, blocks of captions out. Keeps no rows between calls.

An actor whose process died begins anew carefully: it captions its first blocks, among which is what killed it, image by
image in a child process.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from capray.captioning.isolation import Crashed, Isolated
from capray.captioning.model_transfer import Shipment
from capray.captioning.rows import repacked, results_schema, unpack
from capray.config import Decoding
from capray.model.captioner import NO_CAPTION, Hypothesis, autocast
from capray.model.checkpoint import load_captioner

CAREFUL_BLOCKS = 8
"""Blocks an actor takes care with after it was restarted: more than it is given at once (MAX_IN_FLIGHT)."""
MAX_IN_FLIGHT = 2
CAPTION_SECONDS = 300.0
"""An image that takes longer by itself is given up."""
_MESSAGE_LENGTH = 500

Row = dict[str, Any]
Outcome = tuple[list[Hypothesis], list[list[float]] | None] | str
"""The hypotheses of an image with the attention of the best, or what went wrong."""


class Captioning:
    """A loaded captioner with its settings: fetched rows to outcomes.

    Args:
        model: the captioner's folder or URI.
        expected_model_id: what it was when the job began; another one is an error, not a mixture.
        decoding, precision, attention: how to caption, and whether to tell the attention.
        batch_size: images captioned together.
        on_gpu: whether there is a GPU for it.
        num_threads: threads it may use on the CPU.
    """

    def __init__(
        self,
        model: str,
        expected_model_id: str,
        decoding: Decoding,
        precision: str,
        attention: bool,
        batch_size: int,
        on_gpu: bool,
        num_threads: int,
    ):
        torch.set_num_threads(num_threads)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        self.device = torch.device("cuda" if on_gpu else "cpu")
        self.captioner, self.model_id = load_captioner(model, self.device)
        if self.model_id != expected_model_id:
            raise RuntimeError(
                f"the model at {model!r} changed while the job ran: {self.model_id}, not {expected_model_id}"
            )
        self.decoding, self.precision, self.attention, self.batch_size = decoding, precision, attention, batch_size

    def __call__(self, rows: list[Row]) -> list[Outcome]:
        """The outcome of each row, all of which have pixels."""
        return [
            outcome
            for start in range(0, len(rows), self.batch_size)
            for outcome in self._caption(rows[start : start + self.batch_size])
        ]

    def _caption(self, rows: list[Row]) -> list[Outcome]:
        """A batch for which the GPU has no memory is halved until it has; one that fails otherwise is tried image by
        image. A fault of the device ends the process: nothing works on it any more."""
        try:
            return self._together(rows)
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                return [f"{type(error).__name__}: {error}"]
            torch.cuda.empty_cache()
            half = len(rows) // 2
            return [*self._caption(rows[:half]), *self._caption(rows[half:])]
        except RuntimeError as error:
            if "CUDA error" in str(error):
                print(f"the GPU failed, its process ends: {error}", file=sys.stderr, flush=True)
                os._exit(1)
            if len(rows) == 1:
                return [f"{type(error).__name__}: {error}"]
            return [outcome for row in rows for outcome in self._caption([row])]

    @torch.inference_mode()
    def _together(self, rows: list[Row]) -> list[Outcome]:
        images = [
            np.frombuffer(row["pixels"], np.uint8).reshape(row["input_height"], row["input_width"], 3) for row in rows
        ]
        with autocast(self.device, self.precision):
            memory = self.captioner.encode_all(images)
            found = self.captioner.caption(memory, self.decoding)
            if not self.attention:
                return [(hypotheses, None) for hypotheses in found]
            best = [hypotheses[0].token_ids if hypotheses else () for hypotheses in found]
            weights = self.captioner.attend(memory, best)
        return [(hypotheses, alpha.tolist()) for hypotheses, alpha in zip(found, weights, strict=True)]


class CaptioningActor:
    """Captions blocks of fetched rows; a row that cannot be captioned becomes a failure, the others do not suffer."""

    def __init__(self, arguments: tuple, source_type: pa.DataType | None, shipment: Shipment | None = None):
        """``arguments`` are those of Captioning; ``shipment`` brings the model where it lies on the driver's disk."""
        if shipment is not None:
            arguments = (shipment.receive(), *arguments[1:])
        self.arguments = arguments
        self.captioning = Captioning(*arguments)
        self.schema = results_schema(source_type, self.captioning.attention)
        self.careful_blocks = CAREFUL_BLOCKS if ray.get_runtime_context().was_current_actor_reconstructed else 0
        self._child: Isolated | None = None

    def __call__(self, block: pa.Table) -> pa.Table:
        """A BLOCK of FETCHED rows to one of RESULTS rows, in their order (``run_id`` is the driver's to fill)."""
        fetched = unpack(block)
        assert fetched is not None
        rows = fetched.to_pylist()
        good = [i for i, row in enumerate(rows) if row["pixels"] is not None]
        among = [rows[i] for i in good]
        if self.careful_blocks and good:
            found = self._carefully(among)
            self.careful_blocks -= 1
            if not self.careful_blocks and self._child is not None:
                self._child.close()
                self._child = None
        else:
            found = self.captioning(among)
        outcomes = dict(zip(good, found, strict=True))
        now = time.time_ns() // 1000
        results = [self._result(row, outcomes.get(i), now) for i, row in enumerate(rows)]
        return repacked(block, pa.Table.from_pylist(results, self.schema))

    def _carefully(self, rows: list[Row]) -> list[Outcome]:
        if self._child is None:
            self._child = Isolated(Captioning, self.arguments, CAPTION_SECONDS)
        outcomes: list[Outcome] = []
        for row in rows:
            try:
                outcomes += self._child.call([row])
            except Crashed as error:
                outcomes.append(f"crashed: captioning {error}")
        return outcomes

    def _result(self, row: Row, outcome: Outcome | None, now: int) -> Row:
        result = {name: row[name] for name in ("image_id", "uri", "error_type", "message")}
        if outcome is None:
            return result
        if isinstance(outcome, str) or not outcome[0]:
            message = outcome if isinstance(outcome, str) else NO_CAPTION
            kind = "crashed" if message.startswith("crashed: ") else "captioning_error"
            return result | {"error_type": kind, "message": message.removeprefix("crashed: ")[:_MESSAGE_LENGTH]}
        (best, *others), attention = outcome
        result |= {
            "caption": best.caption,
            "log_prob": best.log_prob,
            "score": best.score,
            "num_tokens": best.num_tokens,
            "finished": best.finished,
            "alternatives": [{"caption": h.caption, "log_prob": h.log_prob, "score": h.score} for h in others],
            "width": row["width"],
            "height": row["height"],
            "sha256": row["sha256"],
            "model_id": self.captioning.model_id,
            "captioned_at": now,
            "source": row.get("source"),
        }
        if attention is not None:
            tokens = self.captioning.captioner.vocabulary.tokens(best.token_ids)
            result |= {"tokens": tokens, "attention": attention}
        return result
