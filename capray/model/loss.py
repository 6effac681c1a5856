"""The captioning loss, as sums: the caller divides by global counts, so that unequal shards do not change the gradient.

Axes: B images, K captions of an image, T steps, P positions, N scored tokens, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from capray.model.captioner import Captioner
from capray.model.decoder import Memory
from capray.vocabulary import END, PAD, START, UNK

BANNED = [PAD, START, UNK]
"""Tokens that captions do not hold (``<unk>`` unless ``allow_unk``)."""


class Batch(NamedTuple):
    """Images with their captions as token ids.

    ``inputs_BKT`` begins with ``<start>``; ``targets_BKT`` is one ahead and ends with ``<end>`` (unless the caption was
    cut); both are padded with ``<pad>``. Captions of an image come longest first; images with fewer captions than K are
    padded with captions of length 0.
    """

    inputs_BKT: torch.Tensor
    targets_BKT: torch.Tensor
    lengths_BK: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(part.to(device, non_blocking=True) for part in self))

    @property
    def num_tokens(self) -> int:
        return int(self.lengths_BK.sum())

    @property
    def num_captions(self) -> int:
        return int((self.lengths_BK > 0).sum())


def collate(captions: list[list[list[int]]], max_words: int) -> Batch:
    """The batch of images given as lists of captions given as lists of word ids (ragged in both).

    Captions longer than ``max_words`` are cut and then not scored on ``<end>``: they do not end there.
    """
    rows = []
    for image in captions:
        image_rows = [[START, *words[:max_words], *([END] if len(words) <= max_words else [])] for words in image]
        rows.append(sorted(image_rows, key=len, reverse=True))
    num_captions = max((len(image) for image in rows), default=0)
    num_steps = max((len(row) - 1 for image in rows for row in image), default=0)
    tokens = torch.full((len(rows), num_captions, num_steps + 1), PAD)
    lengths = torch.zeros(len(rows), num_captions, dtype=torch.long)
    for b, image in enumerate(rows):
        for k, row in enumerate(image):
            tokens[b, k, : len(row)] = torch.tensor(row)
            lengths[b, k] = len(row) - 1
    return Batch(tokens[..., :-1].clone(), tokens[..., 1:].clone(), lengths)


class LossSums(NamedTuple):
    """Sums over the scored tokens or captions of a batch, all differentiable.

    ``objective``: label-smoothed cross-entropy over tokens; ``nll``: the plain negative log-likelihood over tokens;
    ``regulariser``: the doubly stochastic term, summed over captions.
    """

    objective: torch.Tensor
    nll: torch.Tensor
    regulariser: torch.Tensor


def loss_sums(
    captioner: Captioner,
    memory: Memory,
    batch: Batch,
    label_smoothing: float = 0.0,
    dropout_mask_BKTH: torch.Tensor | None = None,
) -> LossSums:
    """The loss of ``batch`` over ``memory``, as sums.

    Label smoothing spreads its share evenly over the tokens that can be emitted: all but ``<pad>``, ``<start>`` and
    ``<unk>``.
    ``dropout_mask_BKTH`` is that under which words were chosen before (see ``Decoder.dropout_mask``).
    """
    states_BKTH, alpha_BKTP = captioner(memory, batch.inputs_BKT, batch.lengths_BK)
    steps = torch.arange(batch.inputs_BKT.shape[-1], device=batch.lengths_BK.device)
    scored_BKT = steps < batch.lengths_BK[..., None]
    mask_NH = None if dropout_mask_BKTH is None else dropout_mask_BKTH[scored_BKT]
    log_probs_NV = captioner.decoder.logits(states_BKTH[scored_BKT], mask_NH).float().log_softmax(-1)
    nll = functional.nll_loss(log_probs_NV, batch.targets_BKT[scored_BKT], reduction="sum")
    objective = nll
    if label_smoothing:
        num_emittable = log_probs_NV.shape[-1] - len(BANNED)
        emittable = log_probs_NV.sum() - log_probs_NV[:, BANNED].sum()
        objective = (1 - label_smoothing) * nll - label_smoothing / num_emittable * emittable
    return LossSums(objective, nll, doubly_stochastic(alpha_BKTP, batch.lengths_BK))


def doubly_stochastic(alpha_BKTP: torch.Tensor, lengths_BK: torch.Tensor) -> torch.Tensor:
    """Show, Attend and Tell's term (section 4.2.1, eq. 14), (1 - Σ_t α)² averaged over positions, summed over captions; 0
    without attention. ``alpha_BKTP`` is 0 past a caption's length."""
    if alpha_BKTP.shape[-1] == 0:
        return alpha_BKTP.new_zeros(())
    return ((1 - alpha_BKTP.sum(2)) ** 2).mean(-1)[lengths_BK > 0].sum()
