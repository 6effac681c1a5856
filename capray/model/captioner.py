"""Encoder, decoder, vocabulary and preprocessing as one: images in, captions out.

Axes: B images, K captions of an image, N captions of all images, T steps, P positions, D grid channels, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from capray.config import Architecture, Decoding
from capray.images import normalise
from capray.model.beam import Beams, beam_search
from capray.model.decoder import Decoder, Memory
from capray.model.encoder import Encoder
from capray.model.prepared import PreparedDecoder, SearchMemory
from capray.vocabulary import PAD, START, Vocabulary

NO_CAPTION = "the model gave no finite probability"
"""Why an image has no hypothesis (see ``Captioner.caption``)."""


class Hypothesis(NamedTuple):
    """One caption of an image.

    ``log_prob`` is natural and summed over ``num_tokens`` tokens, ``<end>`` included; ``score`` is after length
    normalisation; ``finished`` tells whether it ended with ``<end>``; ``token_ids`` are what was emitted.
    """

    caption: str
    log_prob: float
    score: float
    num_tokens: int
    finished: bool
    token_ids: tuple[int, ...] = ()


def autocast(device: torch.device | str, precision: str) -> AbstractContextManager:
    """The arithmetic named by ``precision`` (fp32 or bf16) on ``device``."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


class Captioner(nn.Module):
    """A captioner: ``encode`` images once, then ``teacher_force`` captions or ``caption`` freely over that memory.

    Args:
        architecture: its shape and preprocessing.
        vocabulary: its words.
        weights: the encoder's initial weights (see Encoder); None when a checkpoint brings them.
        fine_tune_from: the encoder's first block to train (see Encoder).

    Raises:
        ConfigError, CheckpointError: as Encoder and Attention do.
    """

    def __init__(
        self,
        architecture: Architecture,
        vocabulary: Vocabulary,
        weights: str | None = None,
        fine_tune_from: str | None = None,
    ):
        super().__init__()
        self.architecture = architecture
        self.vocabulary = vocabulary
        self.encoder = Encoder(architecture.encoder, weights, fine_tune_from)
        self.decoder = Decoder(architecture, self.encoder.dim, len(vocabulary))
        self.grid_dropout = nn.Dropout(architecture.grid_dropout)

    @property
    def device(self) -> torch.device:
        return self.decoder.output.weight.device

    def encode(self, pixels_BHW3: torch.Tensor) -> Memory:
        """The memory of a batch of uint8 images at the encoder's input size, on any device."""
        images = normalise(pixels_BHW3.to(self.device, non_blocking=True), self.architecture)
        return self.memory_of_grid(self.encoder(images))

    def memory_of_grid(self, grid_BDhw: torch.Tensor) -> Memory:
        """The memory of a native grid. Projection and pooling are linear, so the grid is projected before it is pooled."""
        grid_BDhw = self.grid_dropout(grid_BDhw)
        size = grid_BDhw.shape[2:]
        grid_BPD = grid_BDhw.flatten(2).transpose(1, 2)
        pool = self.architecture.pool_grid
        memory = self.decoder.memory_of_grid(grid_BPD)
        if pool is None or tuple(size) == (pool, pool):
            return memory
        return Memory(*(_pool(part, size, pool) for part in memory))

    def memory_of_cached_grid(self, grid_BDhw: torch.Tensor) -> Memory:
        """The memory of native grids that were kept from an earlier encoding (float16), on any device."""
        return self.memory_of_grid(self._received(grid_BDhw))

    def _encode_cached(self, features_BDhw: torch.Tensor) -> Memory:
        return self.memory_of_grid(self.encoder.finish(self._received(features_BDhw)))

    def _received(self, kept: torch.Tensor) -> torch.Tensor:
        return kept.to(self.device, _dtype_of_autocast(self.device), non_blocking=True)

    def encode_all(self, images: Sequence[np.ndarray]) -> Memory:
        """The memory of images (H, W, 3), uint8, or of what the encoder's frozen blocks made of them (D, h, w), float16, of
        any sizes: each size is encoded as a batch of its own."""
        batches, places = stacked(images)
        memory = Memory.cat([self.encode(b) if b.dtype == torch.uint8 else self._encode_cached(b) for b in batches])
        return memory if places is None else memory.select(places.to(self.device))

    def forward(
        self, memory: Memory, inputs_BKT: torch.Tensor, lengths_BK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Teacher forcing: the states (B, K, T, H) and attention (B, K, T, P); see ``Decoder.teacher_force``."""
        return self.decoder.teacher_force(memory, inputs_BKT, lengths_BK)

    @torch.inference_mode()
    def caption(self, memory: Memory, decoding: Decoding) -> list[list[Hypothesis]]:
        """The ``n_best`` captions of each image, best first. The captioner must be in evaluation mode.

        An image for which the model gives no finite probability (NaN) gets an empty list.
        """
        assert not self.training, "captioning needs the captioner in evaluation mode"
        prepared = PreparedDecoder(self.decoder, _dtype_of_autocast(self.device))
        with torch.autocast(self.device.type, enabled=False):
            return search(prepared, prepared.search_memory(memory), self.vocabulary, decoding)

    @torch.inference_mode()
    def attend(self, memory: Memory, token_ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The attention over the grid at each token of a caption per image: (tokens, P) each, on the CPU."""
        _, alpha_B1TP = self._follow(memory, token_ids)
        return [alpha_TP[: len(ids)].float().cpu() for alpha_TP, ids in zip(alpha_B1TP[:, 0], token_ids, strict=True)]

    @torch.inference_mode()
    def log_probs(self, memory: Memory, token_ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The log-probability of each token of a caption per image after those before it: (tokens,) each, on the CPU."""
        hidden_B1TH, _ = self._follow(memory, token_ids)
        logits_BTV = self.decoder.logits(hidden_B1TH[:, 0]).float()
        return [
            logits_TV[: len(ids)].log_softmax(-1).cpu().gather(1, torch.tensor(ids)[:, None])[:, 0]
            for logits_TV, ids in zip(logits_BTV, token_ids, strict=True)
        ]

    def _follow(self, memory: Memory, token_ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Teacher forcing of a caption per image."""
        lengths = [len(ids) for ids in token_ids]
        inputs_B1T = torch.full((len(lengths), 1, max(lengths, default=0)), PAD, device=self.device)
        for i, ids in enumerate(token_ids):
            inputs_B1T[i, 0, : len(ids)] = torch.tensor([START, *ids][: len(ids)])
        return self(memory, inputs_B1T, torch.tensor(lengths, device=self.device)[:, None])


@torch.inference_mode()
def search(
    decoder: PreparedDecoder, memory: SearchMemory, vocabulary: Vocabulary, decoding: Decoding
) -> list[list[Hypothesis]]:
    """As ``Captioner.caption``, with a decoder that was prepared once for many batches."""
    beams = beam_search(decoder.next_scores, decoder.start(memory), len(memory.grid_BQD), decoding, memory.grid_BQD.device)
    return hypotheses_of(beams, vocabulary)


def stacked(images: Sequence[np.ndarray]) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """``images`` as a batch for each of their sizes, and where in the batches, one after the other, each image is; None
    where they are in their order."""
    by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, image in enumerate(images):
        by_shape[image.shape].append(i)
    order = [i for group in by_shape.values() for i in group]
    batches = [torch.from_numpy(np.stack([images[i] for i in group])) for group in by_shape.values()]
    return batches, None if order == list(range(len(order))) else torch.tensor(np.argsort(order))


def hypotheses_of(beams: Beams, vocabulary: Vocabulary) -> list[list[Hypothesis]]:
    """``beams`` as captions. By columns: it is done for thousands at once, while other threads wait for Python's lock."""
    num_images, n_best, _ = beams.tokens_BNT.shape
    tokens_NT, counts_N = beams.tokens_BNT.flatten(0, 1).cpu().numpy(), beams.num_tokens_BN.flatten().cpu().numpy()
    captions = vocabulary.texts(tokens_NT, counts_N)
    counts, (log_probs, scores, finished) = counts_N.tolist(), (part.flatten().tolist() for part in beams[2:])
    tokens = [tuple(row[:count]) for row, count in zip(tokens_NT.tolist(), counts, strict=True)]
    found = list(map(Hypothesis, captions, log_probs, scores, counts, finished, tokens))
    by_image = [found[i : i + n_best] for i in range(0, num_images * n_best, n_best)]
    return by_image if all(counts) else [[each for each in image if each.num_tokens] for image in by_image]


def _dtype_of_autocast(device: torch.device) -> torch.dtype:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


def _pool(part_BPX: torch.Tensor, size: torch.Size, pool: int) -> torch.Tensor:
    grid = part_BPX.transpose(1, 2).unflatten(2, tuple(size))
    return nn.functional.adaptive_avg_pool2d(grid, pool).flatten(2).transpose(1, 2)
