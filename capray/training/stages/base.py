"""What every stage of training is: a loss of images and their captions. Knows nothing of Ray or of how a batch is shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, Self

import torch

from capray.config import TrainConfig
from capray.model.captioner import Captioner
from capray.model.decoder import Memory
from capray.model.loss import Batch


class Sums(NamedTuple):
    """Sums over a batch: what is minimised, the stage's figure for people, and the doubly stochastic term."""

    objective: torch.Tensor
    figure: torch.Tensor
    regulariser: torch.Tensor


class Counts(NamedTuple):
    """By what a batch's Sums are divided, once both are summed over all workers: objective and figure by ``terms``, the
    regulariser by ``captions``."""

    terms: int
    captions: int


class Stage(Protocol):
    """One way to train. Stages travel to the workers: they hold settings and what they need of the training split."""

    figure: str
    """What its figure is called."""

    @classmethod
    def prepare(cls, config: TrainConfig, captions: Sequence[Sequence[Sequence[int]]]) -> Self:
        """The stage for the training ``captions`` of each image, as word ids."""
        ...

    def count(self, batch: Batch) -> Counts: ...

    def loss(self, captioner: Captioner, memory: Memory, batch: Batch, epoch: int) -> Sums:
        """The loss of ``batch``, over its images' ``memory``, in ``epoch`` (from 0)."""
        ...

    def scheduled(self, epoch: int) -> dict[str, float]:
        """Those of its settings that change from epoch to epoch."""
        ...
