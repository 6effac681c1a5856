"""The replica that captions: requests that come close together are one batch for the batch job's own code."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from typing import Any

from ray.serve.metrics import Histogram

from capray.captioning.actor import Captioning, CaptioningSettings, NotCaptioned, Outcome
from capray.device import DeviceError

Row = dict[str, Any]
Answer = dict[str, Any] | str


class Replica:
    """A loaded captioner. A row has ``pixels`` (the bytes of uint8 RGB), ``input_height`` and ``input_width``."""

    def __init__(self, settings: CaptioningSettings, batch_wait_seconds: float):
        self.captioning = Captioning(settings.on_this_node())
        self.batches = Histogram(
            "capray_batch_size", description="Images captioned together", boundaries=[1, 2, 4, 8, 16, 32, 64, 128, 256]
        )
        self.batch_size, self.batch_wait_seconds = self.captioning.inference.batch_size, batch_wait_seconds
        self.waiting: asyncio.Queue[tuple[Row, asyncio.Future[Answer]]] = asyncio.Queue()
        self.work: asyncio.Task[None] | None = None

    def model_id(self) -> str:
        return self.captioning.settings.model_id

    async def caption(self, row: Row) -> Answer:
        """The row's captions, best first, with the tokens of the best and the attention at each; or what went wrong.

        ``batch`` is how many rows were captioned together. A caller that is cancelled gives up its place.
        """
        loop = asyncio.get_running_loop()
        if self.work is None or self.work.done():
            self.work = loop.create_task(self._work())
        answer: asyncio.Future[Answer] = loop.create_future()
        self.waiting.put_nowait((row, answer))
        return await answer

    async def _work(self) -> None:
        """Caption all that waits, batch after batch. (Ray Serve's own batching forms batches while another one runs: those
        of a busy replica stay small, 1.7 of 32 photos that waited.)"""
        while True:
            batch = await self._next_batch()
            if not batch:
                continue
            found: list[Answer]
            try:
                found = await asyncio.to_thread(self._caption, [row for row, _ in batch])
            except Exception as error:
                found = [f"captioning failed: {error!r}"] * len(batch)
            for (_, answer), outcome in zip(batch, found, strict=True):
                if not answer.done():
                    answer.set_result(outcome)

    async def _next_batch(self) -> list[tuple[Row, asyncio.Future[Answer]]]:
        """What waits and is still wanted, once anything does; the first of it waits a moment for others."""
        batch = [await self.waiting.get()]
        with suppress(TimeoutError):
            async with asyncio.timeout(self.batch_wait_seconds):
                while len(batch) < self.batch_size:
                    batch.append(await self.waiting.get())
        return [(row, answer) for row, answer in batch if not answer.done()]

    def _caption(self, rows: list[Row]) -> list[Answer]:
        self.batches.observe(len(rows))
        answers: list[Answer] = []
        for outcome in self._outcomes(rows):
            if isinstance(outcome, NotCaptioned):
                answers.append(outcome.message)
                continue
            tokens = self.captioning.inference.captioner.vocabulary.tokens(outcome.hypotheses[0].token_ids)
            found = {"hypotheses": outcome.hypotheses, "tokens": tokens, "attention": outcome.attention}
            answers.append(found | {"batch": len(rows)})
        return answers

    def _outcomes(self, rows: list[Row]) -> list[Outcome]:
        """The captions of ``rows``. When the device fails, nothing works in this process any more: it ends, and Ray Serve
        starts another."""
        try:
            return self.captioning(rows)
        except DeviceError as error:
            print(f"the device failed, its replica ends: {error}", file=sys.stderr, flush=True)
            os._exit(1)
