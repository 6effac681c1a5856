"""What a training works towards: cross-entropy with the reference's words or the captioner's own given, or a reward."""

from __future__ import annotations

from collections.abc import Sequence

from capray.config import TrainConfig
from capray.training.stages.base import Stage, Sums
from capray.training.stages.cross_entropy import CrossEntropy
from capray.training.stages.free_running import FreeRunning
from capray.training.stages.self_critical import SelfCritical


def prepare_stage(config: TrainConfig, captions: Sequence[Sequence[Sequence[int]]]) -> Stage:
    """The stage that ``config`` asks for, for the training ``captions`` of each image, as word ids."""
    if config.stage == "self_critical":
        return SelfCritical.prepare(config, captions)
    if config.teacher_forcing_ratio < 1 or config.teacher_forcing_decay is not None:
        return FreeRunning.prepare(config, captions)
    return CrossEntropy.prepare(config, captions)


__all__ = ["CrossEntropy", "FreeRunning", "SelfCritical", "Stage", "Sums", "prepare_stage"]
