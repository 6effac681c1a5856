"""The captioning actor: fetched images in, captions out. Loads the captioner once; keeps no rows between calls."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from capray.captioning.rows import RESULTS
from capray.config import Decoding
from capray.model.captioner import Hypothesis, autocast
from capray.model.checkpoint import load_captioner


class CaptioningActor:
    """Captions batches of fetched rows; a row that cannot be captioned becomes a failure, the others do not suffer.

    Args:
        model: the captioner's folder or URI.
        expected_model_id: what it was when the job began; another one is an error, not a mixture.
        on_gpu: whether the actor was given a GPU.
        num_threads: threads it may use on the CPU.
    """

    def __init__(
        self, model: str, expected_model_id: str, decoding: Decoding, precision: str, on_gpu: bool, num_threads: int
    ):
        torch.set_num_threads(num_threads)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        self.device = torch.device("cuda" if on_gpu else "cpu")
        self.captioner, model_id = load_captioner(model, self.device)
        if model_id != expected_model_id:
            raise RuntimeError(f"the model at {model!r} changed while the job ran: {model_id}, not {expected_model_id}")
        self.model_id = model_id
        self.decoding = decoding
        self.precision = precision

    def __call__(self, batch: pa.Table) -> pa.Table:
        """FETCHED rows to RESULTS rows, in their order (``run_id`` is the driver's to fill)."""
        rows = batch.to_pylist()
        good = [i for i, row in enumerate(rows) if row["pixels"] is not None]
        outcomes = dict(zip(good, self._caption([rows[i] for i in good]), strict=True))
        now = time.time_ns() // 1000
        return pa.Table.from_pylist([self._result(row, outcomes.get(i), now) for i, row in enumerate(rows)], RESULTS)

    def _caption(self, rows: list[dict[str, Any]]) -> list[list[Hypothesis] | str]:
        """The hypotheses of each image, or what went wrong. A batch that fails is tried again image by image."""
        if not rows:
            return []
        try:
            return list(self._caption_together(rows))
        except RuntimeError as error:
            if len(rows) == 1:
                return [f"{type(error).__name__}: {error}"]
            return [outcome for row in rows for outcome in self._caption([row])]

    @torch.inference_mode()
    def _caption_together(self, rows: list[dict[str, Any]]) -> list[list[Hypothesis]]:
        images = [
            np.frombuffer(row["pixels"], np.uint8).reshape(row["input_height"], row["input_width"], 3) for row in rows
        ]
        with autocast(self.device, self.precision):
            return self.captioner.caption(self.captioner.encode_all(images), self.decoding)

    def _result(self, row: dict[str, Any], outcome: list[Hypothesis] | str | None, now: int) -> dict[str, Any]:
        result = {name: row[name] for name in ("image_id", "uri", "error_type", "message")}
        if outcome is None:
            return result
        if not outcome or isinstance(outcome, str):
            message = outcome or "the model gave no finite probability"
            return result | {"error_type": "captioning_error", "message": message[:500]}
        best, *others = outcome
        return result | {
            "caption": best.caption,
            "log_prob": best.log_prob,
            "score": best.score,
            "num_tokens": best.num_tokens,
            "finished": best.finished,
            "alternatives": [{"caption": h.caption, "log_prob": h.log_prob, "score": h.score} for h in others],
            "width": row["width"],
            "height": row["height"],
            "sha256": row["sha256"],
            "model_id": self.model_id,
            "captioned_at": now,
        }
