"""Cross-entropy with the reference's words given (teacher forcing), and label smoothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from capray.config import TrainConfig
from capray.model.captioner import Captioner
from capray.model.decoder import Memory
from capray.model.loss import Batch, loss_sums
from capray.training.stages.base import Counts, Sums


class CrossEntropy:
    figure = "loss"

    def __init__(self, label_smoothing: float):
        self.label_smoothing = label_smoothing

    @classmethod
    def prepare(cls, config: TrainConfig, captions: Sequence[Sequence[Sequence[int]]]) -> Self:
        return cls(config.label_smoothing)

    def count(self, batch: Batch) -> Counts:
        return Counts(batch.num_tokens, batch.num_captions)

    def loss(self, captioner: Captioner, memory: Memory, batch: Batch, epoch: int) -> Sums:
        return Sums(*loss_sums(captioner, memory, batch, self.label_smoothing))

    def scheduled(self, epoch: int) -> dict[str, float]:
        return {"teacher_forcing_ratio": 1.0}
