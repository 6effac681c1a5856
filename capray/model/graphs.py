"""Batches of one size captioned on a GPU with all of the work recorded as CUDA graphs: a beam step is a hundred small
kernels, and launching them one by one would take longer than they run.

The encoder and the first state are one graph, every GPU_STEPS steps of beam search another. Between those the end is tested,
without waiting for the device: a flag of the steps before arrives while the next run. Nothing leaves the batch early, and a
smaller batch is filled up.

Axes: B images, H rows, W columns.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from capray.config import Decoding, Preprocessing
from capray.images import normalise
from capray.model.beam import GPU_STEPS, Beams, Choice, Live
from capray.model.folding import FoldedEncoder
from capray.model.prepared import PreparedDecoder, SearchState

NUM_STAGED = 3
"""Batches that threads may prepare at once: one is computed, one is copied, one is gathered."""


class Batches(NamedTuple):
    """What was recorded: batches of ``size`` images of ``height`` and ``width`` pixels, decoded so."""

    size: int
    height: int
    width: int
    decoding: Decoding


class _Steps(NamedTuple):
    """A recorded part of the search, and where it leaves its beams and whether all are settled."""

    graph: torch.cuda.CUDAGraph
    beams: Live
    is_over: torch.Tensor


class GraphedSearch:
    """``encoder`` and ``decoder`` over batches as ``batches`` has them. Threads may call it at once: one prepares its images
    while the device computes another's.

    Args:
        pool: the side that grids are pooled to.
    """

    @torch.inference_mode()
    def __init__(
        self,
        encoder: FoldedEncoder,
        decoder: PreparedDecoder,
        preprocessing: Preprocessing,
        pool: int | None,
        batches: Batches,
    ):
        self.batches, self.preprocessing, self.pool = batches, preprocessing, pool
        self.device = decoder.output_VX.device
        self.n_best = batches.decoding.n_best or batches.decoding.beam_size
        self.encoder, self.decoder = encoder, decoder
        self.choice = Choice(batches.decoding, self.device)
        shape = batches.size, batches.height, batches.width, 3
        self._pixels_BHW3 = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        self._places_B = torch.arange(batches.size, device=self.device)
        self._is_padding_B = torch.zeros(batches.size, dtype=torch.bool, device=self.device)
        self._copying = torch.cuda.Stream(self.device)
        self._computing = threading.Lock()
        self._staged: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        for _ in range(NUM_STAGED):
            self._staged.put(torch.empty(shape, dtype=torch.uint8, pin_memory=True))
        with _fastest_convolutions():
            self._record()

    def _record(self) -> None:
        max_length = self.batches.decoding.max_length
        self._warm_up(max_length)
        memory_pool = torch.cuda.graph_pool_handle()
        self._begin, (beams, state) = _recorded(self._first_state, memory_pool)
        self._parts: list[_Steps] = []
        for first in range(0, max_length, GPU_STEPS):
            steps = range(first, min(first + GPU_STEPS, max_length))
            graph, (beams, state, is_over) = _recorded(
                lambda b=beams, s=state, steps=steps: self._search(b, s, steps), memory_pool
            )
            self._parts.append(_Steps(graph, beams, is_over))
        self._is_over = torch.zeros(len(self._parts), dtype=torch.bool, pin_memory=True)

    def _warm_up(self, max_length: int) -> None:
        """What a library sets up at its first call cannot be recorded."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                beams, state = self._first_state()
                self._search(beams, state, range(max_length))
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)

    def _first_state(self) -> tuple[Live, SearchState]:
        grid_BDhw = self.encoder(normalise(self._pixels_BHW3, self.preprocessing))
        memory = self.decoder.memory_of_grids([grid_BDhw], self.pool)
        beams = Live.start(self.batches.size, self.batches.decoding.max_length, self.device)
        return beams, self.decoder.start(memory)

    def _search(self, beams: Live, state: SearchState, steps: range) -> tuple[Live, SearchState, torch.Tensor]:
        for t in steps:
            scores_BKV, state = self.decoder.next_scores(beams.last_BK, state)
            beams, parent_BK = self.choice(beams, scores_BKV, t)
            state = state.select(parent_BK)
        return beams, state, (beams.settled(self.n_best, self.batches.decoding) | self._is_padding_B).all()

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> Beams:
        """The results of at most ``batches.size`` images, on the CPU."""
        staged_BHW3 = self._staged.get()
        try:
            count = len(images)
            np.stack(images, out=staged_BHW3.numpy()[:count])
            with torch.cuda.stream(self._copying):
                pixels_BHW3 = staged_BHW3[:count].to(self.device, non_blocking=True)
                copied = self._copying.record_event()
            with self._computing:
                stream = torch.cuda.current_stream(self.device)
                stream.wait_event(copied)
                pixels_BHW3.record_stream(stream)
                self._pixels_BHW3[:count] = pixels_BHW3
                torch.ge(self._places_B, count, out=self._is_padding_B)
                return Beams(*(part[:count] for part in self._run().cpu()))
        finally:
            self._staged.put(staged_BHW3)

    def _run(self) -> Beams:
        self._begin.replay()
        events: list[torch.cuda.Event] = []
        for i, part in enumerate(self._parts):
            part.graph.replay()
            self._is_over[i : i + 1].copy_(part.is_over[None], non_blocking=True)
            events.append(torch.cuda.Event(blocking=True))
            events[-1].record()
            if i:
                events[i - 1].synchronize()
                if self._is_over[i - 1]:
                    break
        return part.beams.best(self.n_best)


def _recorded(work: Callable[[], Any], memory_pool: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory_pool, capture_error_mode="thread_local"):
        result = work()
    return graph, result


@contextmanager
def _fastest_convolutions():
    """cuDNN tries its ways at the first call of each size, and keeps to the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
