"""A loaded captioner that captions images: the one way to do so for the batch job, the server, `explain`, `evaluate` and
MLflow's model. Knows no Ray, no tables and no web.

The captioner is laid out for inference once (BatchNorm folded, weights cast, words as a table; see ``model.folding`` and
``model.prepared``), and its own weights stay as they are.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import torch

from capray.config import CPU_BATCH, GPU_BATCH, Decoding
from capray.device import DeviceError, is_device_error, is_out_of_memory
from capray.model.captioner import NO_CAPTION, Captioner, Hypothesis, autocast, hypotheses_of, search, stacked
from capray.model.checkpoint import load_captioner
from capray.model.decoder import Memory
from capray.model.folding import FoldedEncoder
from capray.model.graphs import Batches, GraphedSearch, is_of_recording
from capray.model.prepared import PreparedDecoder

NUM_THREADS = 4
"""That caption batches beside each other where CUDA graphs are recorded: two compute, one gathers, one writes."""
SWITCH_SECONDS = 0.0005
"""For how long a process that captions on a GPU lets one thread keep Python's lock from the others: by Python's own 5 ms the
GPU waits for a thread that would give it work, while another writes captions (benchmarks/gpu.py: 0.79 for 0.70)."""
LEAST_FILLED = 4
"""A batch of so many times fewer images than fit is not filled up for the CUDA graphs."""


class Captioned(NamedTuple):
    """What became of an image: its captions, best first, and the attention over the grid at each token of the best (None
    where it was not asked for); or no captions and why."""

    hypotheses: list[Hypothesis]
    attention: list[list[float]] | None = None
    error: str | None = None


class Explained(NamedTuple):
    """An image's best caption, its attention over the grid at each token (T, P), and each token's log-probability (T,)."""

    hypothesis: Hypothesis
    attention_TP: torch.Tensor
    log_probs_T: torch.Tensor


class Inference:
    """A captioner laid out for inference. Images are uint8 arrays (H, W, 3) at the encoder's input size, of any sizes.

    Args:
        captioner: in evaluation mode, on its device; later changes of its weights do not reach this.
        precision: fp32 or bf16.
        batch_size: most images captioned together; by the device when None.
        model_id: of the captioner, where it was loaded.

    On a GPU the second of two large batches of one kind, and those after it, run as CUDA graphs (``model.graphs``).
    """

    def __init__(self, captioner: Captioner, precision: str = "fp32", batch_size: int | None = None, model_id: str = ""):
        assert not captioner.training, "inference needs the captioner in evaluation mode"
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        self.captioner, self.precision, self.model_id = captioner, precision, model_id
        self.device = captioner.device
        self.batch_size = batch_size or (GPU_BATCH if self.device.type == "cuda" else CPU_BATCH)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.encoder = FoldedEncoder(captioner.encoder.backbone, dtype)
        self.decoder = PreparedDecoder(captioner.decoder, dtype)
        self._graphs = _Graphs(self) if self.device.type == "cuda" else None
        self._threads = ThreadPoolExecutor(NUM_THREADS, "captioning")

    @classmethod
    def load(
        cls, folder: str, device: torch.device | str | None = None, precision: str = "fp32", batch_size: int | None = None
    ) -> Inference:
        """The captioner in ``folder`` (a path or URI); on a GPU where there is one, when ``device`` is None.

        Raises:
            CheckpointError: as ``load_captioner`` does.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        captioner, model_id = load_captioner(folder, device)
        return cls(captioner, precision, batch_size, model_id)

    def __call__(self, images: Sequence[np.ndarray], decoding: Decoding, attention: bool = False) -> list[Captioned]:
        """What becomes of each image. A batch for which there is no memory is halved until there is; one that fails
        otherwise is tried image by image.

        Raises:
            DeviceError: the device failed; a process in which it did is of no more use.
        """
        batches, outcomes = _split(images, self.batch_size), []
        while batches:
            # Graphs are recorded while nothing else is under way.
            count = sum(1 for _ in takewhile(partial(self._is_recorded, decoding, attention), batches))
            if count:
                captioned = self._threads.map(lambda batch: self._carefully(batch, decoding, attention), batches[:count])
            else:
                captioned = iter([self._carefully(batches[0], decoding, attention)])
            outcomes += [outcome for part in captioned for outcome in part]
            batches = batches[max(count, 1) :]
        return outcomes

    def _is_recorded(self, decoding: Decoding, attention: bool, images: Sequence[np.ndarray]) -> bool:
        return self._graphs is not None and not attention and self._graphs.are_recorded(images, decoding)

    def memory(self, images: Sequence[np.ndarray]) -> Memory:
        """What teacher forcing attends over."""
        return self._memory(*self._grids(self._copied(images)))

    @torch.inference_mode()
    def explained(self, image: np.ndarray, decoding: Decoding) -> Explained | None:
        """The best caption of an image, and where the captioner looked; None where it gives no finite probability."""
        (hypotheses,), grids, places = self._search([image], decoding)
        if not hypotheses:
            return None
        best = hypotheses[0]
        memory = self._memory(grids, places)
        with autocast(self.device, self.precision):
            (alpha_TP,) = self.captioner.attend(memory, [best.token_ids])
            (log_probs_T,) = self.captioner.log_probs(memory, [best.token_ids])
        return Explained(best, alpha_TP, log_probs_T)

    def _carefully(self, images: Sequence[np.ndarray], decoding: Decoding, attention: bool) -> list[Captioned]:
        try:
            return self._together(images, decoding, attention)
        except Exception as error:
            if is_device_error(error):
                raise DeviceError(f"{type(error).__name__}: {error}") from error
            is_short = is_out_of_memory(error)
            kept = self._graphs if is_short and self._graphs is not None and self._graphs.keep_memory else None
            if len(images) == 1 and kept is None:
                return [Captioned([], None, f"{type(error).__name__}: {error}")]
            size = -(-len(images) // 2) if is_short else 1
        # Not while the exception is at hand: it keeps the batch's tensors.
        if kept is not None:
            kept.give_up("other batches need their memory")
            size = len(images)
        torch.cuda.empty_cache()
        return [outcome for part in _split(images, size) for outcome in self._carefully(part, decoding, attention)]

    @torch.inference_mode()
    def _together(self, images: Sequence[np.ndarray], decoding: Decoding, attention: bool) -> list[Captioned]:
        graphed = None if self._graphs is None or attention else self._graphs.fitting(images, decoding)
        if graphed is not None:
            return [_captioned(h) for h in _finite(hypotheses_of(graphed(images), self.captioner.vocabulary))]
        found, grids, places = self._search(images, decoding)
        weights: Sequence[torch.Tensor | None] = [None] * len(found)
        if attention:
            memory = self._memory(grids, places)
            with autocast(self.device, self.precision):
                weights = self.captioner.attend(memory, [h[0].token_ids if h else () for h in found])
        return [_captioned(*outcome) for outcome in zip(found, weights, strict=True)]

    @torch.inference_mode()
    def _search(
        self, images: Sequence[np.ndarray], decoding: Decoding
    ) -> tuple[list[list[Hypothesis]], list[torch.Tensor], torch.Tensor | None]:
        """The hypotheses of each image, none where the best has no finite probability; and its grids and places."""
        grids, places = self._grids(self._copied(images))
        memory = self.decoder.memory_of_grids(grids, self.captioner.architecture.pool_grid)
        memory = memory if places is None else memory.keep(places)
        found = search(self.decoder, memory, self.captioner.vocabulary, decoding)
        return _finite(found), grids, places

    @torch.inference_mode()
    def _memory(self, grids: list[torch.Tensor], places: torch.Tensor | None) -> Memory:
        with autocast(self.device, self.precision):
            memory = Memory.cat([self.captioner.memory_of_cached_grid(grid) for grid in grids])
        return memory if places is None else memory.select(places)

    def _copied(self, images: Sequence[np.ndarray]) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """The images on the device, as ``stacked`` has them."""
        batches, places = stacked(images)
        return [batch.to(self.device) for batch in batches], None if places is None else places.to(self.device)

    @torch.inference_mode()
    def _grids(
        self, pixels: tuple[list[torch.Tensor], torch.Tensor | None]
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        batches, places = pixels
        return [self.encoder(batch, self.captioner.architecture) for batch in batches], places


def _finite(found: list[list[Hypothesis]]) -> list[list[Hypothesis]]:
    """The hypotheses of each image, none where the best has no finite probability."""
    return [h if h and math.isfinite(h[0].log_prob) else [] for h in found]


def _captioned(hypotheses: list[Hypothesis], alpha_TP: torch.Tensor | None = None) -> Captioned:
    if not hypotheses:
        return Captioned([], None, NO_CAPTION)
    return Captioned(hypotheses, None if alpha_TP is None else alpha_TP.tolist())


class _Graphs:
    """CUDA graphs of the batches that come; one kind is kept. What comes once is not worth recording."""

    def __init__(self, inference: Inference):
        self.inference = inference
        self._lock = threading.Lock()
        self._last: Batches | None = None
        self._graphed: GraphedSearch | None = None
        self._unfit = False

    def fitting(self, images: Sequence[np.ndarray], decoding: Decoding) -> GraphedSearch | None:
        """The graphs for these images; None where they are better captioned without."""
        wanted = self._wanted(images, decoding)
        if wanted is None:
            return None
        with self._lock:
            if self._graphed is not None and self._graphed.batches == wanted:
                return self._graphed
            if wanted == self._last:
                self._graphed = None
                self._graphed = self._recorded(wanted)
            self._last = wanted
        return self._graphed

    def are_recorded(self, images: Sequence[np.ndarray], decoding: Decoding) -> bool:
        wanted, graphed = self._wanted(images, decoding), self._graphed
        return graphed is not None and graphed.batches == wanted

    @property
    def keep_memory(self) -> bool:
        return self._graphed is not None

    def _wanted(self, images: Sequence[np.ndarray], decoding: Decoding) -> Batches | None:
        shapes = {image.shape for image in images}
        if len(shapes) > 1 or LEAST_FILLED * len(images) < self.inference.batch_size or self._unfit:
            return None
        ((height, width, _),) = shapes
        return Batches(self.inference.batch_size, height, width, decoding)

    def _recorded(self, wanted: Batches) -> GraphedSearch | None:
        inference = self.inference
        try:
            return GraphedSearch(inference.encoder, inference.decoder, inference.captioner.architecture, wanted)
        except Exception as error:
            if not is_of_recording(error):
                raise
            self.give_up(error)
        return None

    def give_up(self, reason: object) -> None:
        """There are to be none from now on: they keep the memory that they were recorded with."""
        self._graphed, self._unfit = None, True
        warnings.warn(f"captioning goes on slower, without CUDA graphs: {reason}", stacklevel=2)
        torch.cuda.empty_cache()


def _split(images: Sequence[np.ndarray], size: int) -> list[Sequence[np.ndarray]]:
    return [images[start : start + size] for start in range(0, len(images), size)]
