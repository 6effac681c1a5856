"""Cross-entropy with the captioner's own words fed, always or at random (scheduled sampling).

Bengio, Vinyals, Jaitly, Shazeer (2015), *Scheduled Sampling for Sequence Prediction with Recurrent Neural Networks*.

Axes: B images, K captions of an image, T steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch

from capray.config import ScheduledSampling, TrainConfig
from capray.model.captioner import Captioner
from capray.model.decoder import Memory
from capray.model.loss import Batch, loss_sums
from capray.training.stages.base import Sums
from capray.training.stages.cross_entropy import CrossEntropy


class FreeRunning(CrossEntropy):
    """The words fed are chosen under the dropout that the captioner then learns under."""

    def __init__(self, sampling: ScheduledSampling, label_smoothing: float):
        super().__init__(label_smoothing)
        self.sampling = sampling

    @classmethod
    def prepare(cls, config: TrainConfig, captions: Sequence[Sequence[Sequence[int]]]) -> Self:
        return cls(config.subset(ScheduledSampling), config.label_smoothing)

    def loss(self, captioner: Captioner, memory: Memory, batch: Batch, epoch: int) -> Sums:
        mask_BKTH = captioner.decoder.dropout_mask(*batch.inputs_BKT.shape)
        fed = feed_own_words(captioner, memory, batch, teacher_forcing_ratio(self.sampling, epoch), mask_BKTH)
        return Sums(*loss_sums(captioner, memory, fed, self.label_smoothing, mask_BKTH))

    def scheduled(self, epoch: int) -> dict[str, float]:
        return {"teacher_forcing_ratio": teacher_forcing_ratio(self.sampling, epoch)}


def teacher_forcing_ratio(config: ScheduledSampling, epoch: int) -> float:
    """The probability at ``epoch`` (from 0) that the decoder is fed the reference's previous word (section 2.4)."""
    decay = config.teacher_forcing_decay
    ratio = config.teacher_forcing_ratio
    if decay is None:
        return ratio
    if config.teacher_forcing_schedule == "linear":
        ratio -= decay * epoch
    elif config.teacher_forcing_schedule == "exponential":
        ratio *= decay**epoch
    else:
        ratio *= decay / (decay + math.exp(min(epoch / decay, 700)))
    return max(ratio, config.min_teacher_forcing_ratio)


@torch.no_grad()
def feed_own_words(
    captioner: Captioner, memory: Memory, batch: Batch, ratio: float, dropout_mask_BKTH: torch.Tensor | None = None
) -> Batch:
    """``batch`` with each input after ``<start>`` kept with probability ``ratio``, and else replaced by the likeliest word
    that the captioner gives after the inputs before it.

    Choosing a word passes no gradient, so a teacher-forced pass over the new inputs has the gradient of free running,
    where both have the same ``dropout_mask_BKTH``.
    """
    if ratio >= 1:
        return batch
    decoder = captioner.decoder
    inputs_BKT = batch.inputs_BKT.clone()
    is_own_BKT = torch.rand(inputs_BKT.shape, device=inputs_BKT.device) >= ratio
    weights = decoder.weights()
    state = decoder.start(memory, inputs_BKT.shape[1])
    for t in range(inputs_BKT.shape[-1] - 1):
        state, _ = decoder.step(decoder.embedding(inputs_BKT[..., t]), state, memory, weights)
        mask_BKH = None if dropout_mask_BKTH is None else dropout_mask_BKTH[:, :, t]
        own_BK = decoder.logits(state.hidden_BKH, mask_BKH).argmax(-1)
        inputs_BKT[..., t + 1] = torch.where(is_own_BKT[..., t + 1], own_BK, inputs_BKT[..., t + 1])
    torch.clear_autocast_cache()  # It holds casts of the weights now that would pass no gradient on.
    return batch._replace(inputs_BKT=inputs_BKT)
