"""A loaded captioner that captions images: the one way to do so for the batch job, the server, `explain`, `evaluate` and
MLflow's model. Knows no Ray, no tables and no web.

The captioner is laid out for inference once (BatchNorm folded, weights cast, words as a table; see ``model.folding`` and
``model.prepared``), and its own weights stay as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from capray.config import Decoding
from capray.images import normalise
from capray.model.captioner import NO_CAPTION, Captioner, Hypothesis, autocast, search
from capray.model.checkpoint import load_captioner
from capray.model.decoder import Memory
from capray.model.folding import FoldedEncoder
from capray.model.prepared import PreparedDecoder, SearchMemory

CPU_BATCH, GPU_BATCH = 64, 512
"""Images captioned together, where nothing else is asked for."""


class DeviceFailed(RuntimeError):
    """The GPU itself failed: nothing works on it any more in this process."""


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


class _Pixels(NamedTuple):
    """Images on the device, those of one size together, and where each stood."""

    batches: list[torch.Tensor]
    order: list[int]
    copied: torch.cuda.Event | None = None


class Inference:
    """A captioner laid out for inference. Images are uint8 arrays (H, W, 3) at the encoder's input size, of any sizes.

    Args:
        captioner: in evaluation mode, on its device; later changes of its weights do not reach this.
        precision: fp32 or bf16.
        batch_size: most images captioned together; by the device when None.
        model_id: of the captioner, where it was loaded.
    """

    def __init__(
        self, captioner: Captioner, precision: str = "fp32", batch_size: int | None = None, model_id: str = ""
    ):
        assert not captioner.training, "inference needs the captioner in evaluation mode"
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        self.captioner, self.precision, self.model_id = captioner, precision, model_id
        self.device = captioner.device
        self.batch_size = batch_size or (GPU_BATCH if self.device.type == "cuda" else CPU_BATCH)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.encoder = FoldedEncoder(captioner.encoder.backbone, dtype)
        self.decoder = PreparedDecoder(captioner.decoder, dtype)
        self.attention_is = "not compiled"
        """Whether attention is compiled, in words; see ``compile_attention``."""

    @classmethod
    def load(
        cls,
        folder: str,
        device: torch.device | str | None = None,
        precision: str = "fp32",
        batch_size: int | None = None,
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
            DeviceFailed: the GPU failed; the process is of no more use.
        """
        starts = range(0, len(images), self.batch_size)
        return [
            outcome
            for start in starts
            for outcome in self._carefully(images[start : start + self.batch_size], decoding, attention)
        ]

    def blocks(
        self, blocks: Iterable[Sequence[np.ndarray]], decoding: Decoding, attention: bool = False
    ) -> Iterator[list[Captioned]]:
        """As calling this with each block; on a GPU the next block is copied there while this one is captioned."""
        if self.device.type != "cuda":
            yield from (self(block, decoding, attention) for block in blocks)
            return
        with ThreadPoolExecutor(1) as copying:
            batches = ((block, s) for block in blocks for s in range(0, max(len(block), 1), self.batch_size))
            waiting = None
            parts: list[Captioned] = []
            for block, start in batches:
                images = block[start : start + self.batch_size]
                following = (images, start + self.batch_size >= len(block), copying.submit(self._copied, images))
                if waiting is not None:
                    parts += self._carefully(waiting[0], decoding, attention, waiting[2].result())
                    if waiting[1]:
                        yield parts
                        parts = []
                waiting = following
            if waiting is not None:
                yield parts + self._carefully(waiting[0], decoding, attention, waiting[2].result())

    def memory(self, images: Sequence[np.ndarray]) -> Memory:
        """What teacher forcing attends over."""
        grids, order = self._grids(self._copied(images))
        with torch.inference_mode(), autocast(self.device, self.precision):
            memory = Memory.cat([self.captioner.recall(grid) for grid in grids])
        return memory if order is None else memory.select(order)

    def explained(self, image: np.ndarray, decoding: Decoding) -> Explained | None:
        """The best caption of an image, and where the captioner looked; None where it gives no finite probability."""
        (outcome,) = self._together(self._copied([image]), decoding, attention=False)
        if not outcome.hypotheses:
            return None
        best = outcome.hypotheses[0]
        memory = self.memory([image])
        with torch.inference_mode(), autocast(self.device, self.precision):
            (alpha_TP,) = self.captioner.attend(memory, [best.token_ids])
            (log_probs_T,) = self.captioner.log_probs(memory, [best.token_ids])
        return Explained(best, alpha_TP, log_probs_T)

    def compile_attention(self, images: Sequence[np.ndarray], beam_size: int) -> str:
        """Have attention compiled, if that works and pays for batches like ``images``; what came of it, in words. Captions
        change by rounding."""
        memory, _ = self._search_memory(self._copied(images))
        self.attention_is = self.decoder.compile_attention(memory, beam_size)
        return self.attention_is

    def _carefully(
        self, images: Sequence[np.ndarray], decoding: Decoding, attention: bool, pixels: _Pixels | None = None
    ) -> list[Captioned]:
        if not images:
            return []
        try:
            return self._together(pixels or self._copied(images), decoding, attention)
        except torch.OutOfMemoryError as error:
            if len(images) == 1:
                return [Captioned([], None, f"{type(error).__name__}: {error}")]
        except RuntimeError as error:
            if "CUDA error" in str(error):
                raise DeviceFailed(str(error)) from error
            if len(images) == 1:
                return [Captioned([], None, f"{type(error).__name__}: {error}")]
            return [outcome for image in images for outcome in self._carefully([image], decoding, attention)]
        # Only here is the failed batch's memory given back: the error held on to it.
        pixels = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(images) // 2
        return [
            *self._carefully(images[:half], decoding, attention),
            *self._carefully(images[half:], decoding, attention),
        ]

    @torch.inference_mode()
    def _together(self, pixels: _Pixels, decoding: Decoding, attention: bool) -> list[Captioned]:
        memory, grids = self._search_memory(pixels)
        found = search(self.decoder, memory, self.captioner.vocabulary, decoding)
        weights: Sequence[torch.Tensor | None] = [None] * len(found)
        if attention:
            with autocast(self.device, self.precision):
                whole = Memory.cat([self.captioner.recall(grid) for grid in grids])
                if (order := self._places(pixels)) is not None:
                    whole = whole.select(order)
                weights = self.captioner.attend(whole, [h[0].token_ids if h else () for h in found])
        return [
            Captioned(hypotheses, alpha if alpha is None else alpha.tolist())
            if hypotheses
            else Captioned([], None, NO_CAPTION)
            for hypotheses, alpha in zip(found, weights, strict=True)
        ]

    def _copied(self, images: Sequence[np.ndarray]) -> _Pixels:
        """The images on the device; to a GPU from pinned memory and on a stream of its own, to go on beside its work."""
        by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, image in enumerate(images):
            by_shape[image.shape].append(i)
        order = [i for group in by_shape.values() for i in group]
        batches = [torch.from_numpy(np.stack([images[i] for i in group])) for group in by_shape.values()]
        if self.device.type != "cuda":
            return _Pixels(batches, order)
        with torch.cuda.stream(torch.cuda.Stream(self.device)) as stream:
            batches = [batch.pin_memory().to(self.device, non_blocking=True) for batch in batches]
            copied = torch.cuda.Event()
            copied.record(stream)
        return _Pixels(batches, order, copied)

    def _places(self, pixels: _Pixels) -> torch.Tensor | None:
        """Where the images of the batches stand in the order they were given; None where nothing moved."""
        if pixels.order == list(range(len(pixels.order))):
            return None
        return torch.tensor(np.argsort(pixels.order), device=self.device)

    @torch.inference_mode()
    def _grids(self, pixels: _Pixels) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        if pixels.copied is not None:
            torch.cuda.current_stream().wait_event(pixels.copied)
            for batch in pixels.batches:
                batch.record_stream(torch.cuda.current_stream())
        grids = [self.encoder(normalise(batch, self.captioner.architecture)) for batch in pixels.batches]
        return grids, self._places(pixels)

    @torch.inference_mode()
    def _search_memory(self, pixels: _Pixels) -> tuple[SearchMemory, list[torch.Tensor]]:
        grids, order = self._grids(pixels)
        memory = self.decoder.remember(grids, self.captioner.architecture.pool_grid)
        return memory if order is None else memory.keep(order), grids
