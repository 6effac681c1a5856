"""The replica that captions: requests that come close together are one batch for the batch job's own code."""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve
from ray.serve.metrics import Histogram

from capray.captioning.actor import Captioning
from capray.captioning.shipping import Shipment

Row = dict[str, Any]


class Replica:
    """A loaded captioner. A row has ``pixels`` (the bytes of uint8 RGB), ``input_height`` and ``input_width``."""

    def __init__(self, arguments: tuple, shipment: Shipment | None, batch_size: int, batch_wait_seconds: float):
        """``arguments`` are those of Captioning; ``shipment`` brings the model where it lies on the driver's disk."""
        if shipment is not None:
            arguments = (shipment.receive(), *arguments[1:])
        self.captioning = Captioning(*arguments)
        self.batches = Histogram(
            "capray_batch_size", description="Images captioned together", boundaries=[1, 2, 4, 8, 16, 32, 64, 128, 256]
        )
        self.caption.set_max_batch_size(batch_size)  # ty: ignore[missing-attribute]
        self.caption.set_batch_wait_timeout_s(batch_wait_seconds)  # ty: ignore[missing-attribute]

    def model_id(self) -> str:
        return self.captioning.model_id

    @serve.batch
    async def caption(self, rows: list[Row]) -> list[dict[str, Any] | str]:
        """Each row's captions, best first, with the tokens of the best and the attention at each; or what went wrong.

        ``batch`` is how many were captioned together.
        """
        outcomes = await asyncio.to_thread(self.captioning, rows)
        self.batches.observe(len(rows))
        answers: list[dict[str, Any] | str] = []
        for outcome in outcomes:
            if isinstance(outcome, str):
                answers.append(outcome)
                continue
            hypotheses, attention = outcome
            if not hypotheses:
                answers.append("the model gave no finite probability")
                continue
            answers.append(
                {
                    "hypotheses": hypotheses,
                    "tokens": self.captioning.captioner.vocabulary.tokens(hypotheses[0].token_ids),
                    "attention": attention,
                    "batch": len(rows),
                }
            )
        return answers
