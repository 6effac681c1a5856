"""Batches of one size captioned on a GPU with all of the work recorded as CUDA graphs: launching its kernels one by one
would take longer than they run.

The encoder and the first state are one graph, every GPU_STEPS steps of beam search another. Whether all captions have ended
is asked without waiting for the device: the flag of one such graph is read while the next runs. Images that are done stay in
the batch, and a smaller batch is filled up. Two batches run beside each other, each in a lane of its own: while one is
searched, or its thread is late, the device encodes the other.

Axes: B images, H rows, W columns.
"""

from __future__ import annotations

import queue
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from capray.config import Architecture, Decoding
from capray.device import is_device_error
from capray.model.beam import GPU_STEPS, Beams, Choice, Live
from capray.model.folding import FoldedEncoder
from capray.model.prepared import PreparedDecoder, SearchState

NUM_LANES = 2
NUM_AHEAD = 2
"""Parts of the search that the device is given before it is known whether those before have ended it: threads are late."""
warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # Nothing is written to it.


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
    """``encoder`` and ``decoder`` over batches as ``batches`` has them. Threads may call it at once: one gathers its images
    while the device computes others'."""

    def __init__(self, encoder: FoldedEncoder, decoder: PreparedDecoder, architecture: Architecture, batches: Batches):
        self.batches = batches
        self._lanes: queue.LifoQueue[_Lane] = queue.LifoQueue()
        for i in range(NUM_LANES):
            try:
                self._lanes.put(_Lane(encoder, decoder, architecture, batches))
            except Exception as error:
                if not i or not is_of_recording(error):
                    raise
                warnings.warn(f"captioning goes on with one batch at a time: {error}", stacklevel=2)
        torch.cuda.empty_cache()
        self._staged: queue.LifoQueue[torch.Tensor] = queue.LifoQueue()

    def __call__(self, images: Sequence[np.ndarray]) -> Beams:
        """The results of at most ``batches.size`` images, on the CPU."""
        staged_BHW3 = self._staging()
        try:
            gather(images, staged_BHW3[: len(images)])
            lane = self._lanes.get()
            try:
                return lane(staged_BHW3[: len(images)])
            finally:
                self._lanes.put(lane)
        finally:
            self._staged.put(staged_BHW3)

    def _staging(self) -> torch.Tensor:
        """Memory that the device reads from by itself; as much as there are threads."""
        try:
            return self._staged.get_nowait()
        except queue.Empty:
            batches = self.batches
            return torch.empty(batches.size, batches.height, batches.width, 3, dtype=torch.uint8, pin_memory=True)


def is_of_recording(error: Exception) -> bool:
    """Whether ``error`` tells only that work cannot be recorded, or that there is no memory for it."""
    return not is_device_error(error) or "captur" in str(error)


def gather(images: Sequence[np.ndarray], batch_BHW3: torch.Tensor) -> None:
    """Copy ``images`` to ``batch_BHW3`` in one call, beside which other threads run. (numpy's wants Python's lock back after
    each.)"""
    torch.stack([torch.from_numpy(image) for image in images], out=batch_BHW3)


class _Lane:
    """One batch at a time, on a stream of its own."""

    @torch.inference_mode()
    def __init__(self, encoder: FoldedEncoder, decoder: PreparedDecoder, architecture: Architecture, batches: Batches):
        self.encoder, self.decoder, self.architecture, self.batches = encoder, decoder, architecture, batches
        self.device = decoder.output_VX.device
        self.n_best = batches.decoding.n_best or batches.decoding.beam_size
        self.choice = Choice(batches.decoding, self.device)
        shape = batches.size, batches.height, batches.width, 3
        self._pixels_BHW3 = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        self._places_B = torch.arange(batches.size, device=self.device)
        self._is_padding_B = torch.zeros(batches.size, dtype=torch.bool, device=self.device)
        # Libraries keep memory for their work by the stream that it was recorded on: lanes must not share theirs.
        self._stream = torch.cuda.Stream(self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with _fastest_convolutions(), torch.cuda.stream(self._stream):
            self._record()

    def _record(self) -> None:
        max_length = self.batches.decoding.max_length
        for _ in range(2):  # What a library sets up at its first call cannot be recorded.
            self._search(*self._first_state(), range(max_length))
        self._stream.synchronize()
        memory_pool = torch.cuda.graph_pool_handle()
        self._begin, (beams, state) = self._recorded(self._first_state, memory_pool)
        self._parts: list[_Steps] = []
        for first in range(0, max_length, GPU_STEPS):
            steps = range(first, min(first + GPU_STEPS, max_length))
            graph, (beams, state, is_over) = self._recorded(
                lambda b=beams, s=state, steps=steps: self._search(b, s, steps), memory_pool
            )
            self._parts.append(_Steps(graph, beams, is_over))
        self._is_over = torch.zeros(len(self._parts), dtype=torch.bool, pin_memory=True)

    def _recorded(self, work: Callable[[], Any], memory_pool: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory_pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work()
        return graph, result

    def _first_state(self) -> tuple[Live, SearchState]:
        grid_BDhw = self.encoder(self._pixels_BHW3, self.architecture)
        memory = self.decoder.memory_of_grids([grid_BDhw], self.architecture.pool_grid)
        beams = Live.start(self.batches.size, self.batches.decoding.max_length, self.device)
        return beams, self.decoder.start(memory)

    def _search(self, beams: Live, state: SearchState, steps: range) -> tuple[Live, SearchState, torch.Tensor]:
        for t in steps:
            scores_BKV, state = self.decoder.next_scores(beams.last_BK, state)
            beams, parent_BK = self.choice(beams, scores_BKV, t)
            state = state.select(parent_BK)
        return beams, state, (beams.settled(self.n_best, self.batches.decoding) | self._is_padding_B).all()

    @torch.inference_mode()
    def __call__(self, staged_BHW3: torch.Tensor) -> Beams:
        count = len(staged_BHW3)
        with torch.cuda.stream(self._stream):
            self._pixels_BHW3[:count].copy_(staged_BHW3, non_blocking=True)
            torch.ge(self._places_B, count, out=self._is_padding_B)
            return Beams(*(part[:count] for part in self._run().cpu()))

    def _run(self) -> Beams:
        self._begin.replay()
        events: list[torch.cuda.Event] = []
        for i, part in enumerate(self._parts):
            if i >= NUM_AHEAD:
                events[i - NUM_AHEAD].synchronize()
                if self._is_over[i - NUM_AHEAD]:
                    break
            part.graph.replay()
            self._is_over[i : i + 1].copy_(part.is_over[None], non_blocking=True)
            events.append(torch.cuda.Event(blocking=True))
            events[-1].record()
            beams = part.beams
        return beams.best(self.n_best)


@contextmanager
def _fastest_convolutions():
    """cuDNN tries its ways at the first call of each size, and keeps to the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
