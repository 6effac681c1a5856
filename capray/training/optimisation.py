"""From gradients to weights: optimiser, learning-rate schedule, moving average, and all of their state in one.

torch's own implementations, put together from settings. Knows nothing of Ray or of images.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import PARAM_LIST, AveragedModel

from capray.config import Optimisation, TrainConfig
from capray.model.captioner import Captioner


def build_optimizer(captioner: Captioner, config: Optimisation) -> torch.optim.Optimizer:
    """The optimiser of what ``captioner`` trains: the decoder, and the encoder's fine-tuned blocks at their own rate.

    Fused where torch has it (not for RMSprop): on a CPU Adam's step takes a quarter of the time or less.
    """
    rates = {captioner.decoder: config.learning_rate, captioner.encoder: config.encoder_learning_rate}
    trained = {part: [p for p in part.parameters() if p.requires_grad] for part in rates}
    groups = [{"params": trained[part], "lr": rate} for part, rate in rates.items() if trained[part]]
    decay = config.weight_decay
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, weight_decay=decay, fused=True)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=decay, fused=True)
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, weight_decay=decay, momentum=config.momentum)
    return torch.optim.SGD(groups, lr=config.learning_rate, weight_decay=decay, momentum=config.momentum, fused=True)


class CosineWithWarmup:
    """The factor of the learning rate before step ``step`` (from 0): linear warm-up to 1, then half a cosine down to 0
    (SGDR's eq. 5 without restarts, Loshchilov and Hutter 2017)."""

    def __init__(self, warmup_steps: int, num_steps: int):
        self.warmup_steps = warmup_steps
        self.num_steps = num_steps

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        return (1 + math.cos(math.pi * min(1.0, progress))) / 2


class MovingAverage:
    """Follows the weights with the decay min(``decay``, (1 + n) / (10 + n)) at the n-th step, so that the random start is
    soon forgotten (as in TensorFlow's ExponentialMovingAverage with num_updates)."""

    def __init__(self, decay: float):
        self.decay = decay

    @torch.no_grad()
    def __call__(self, averages: PARAM_LIST, weights: PARAM_LIST, num_averaged: torch.Tensor | int) -> None:
        step = int(num_averaged)
        torch._foreach_lerp_(averages, weights, 1 - min(self.decay, (1 + step) / (10 + step)))


def steps_per_epoch(num_images: int, num_pairs: int, config: TrainConfig, num_workers: int) -> int:
    """The steps of one epoch over ``num_pairs`` pairs: exactly with one caption of an image in a step, else close to it, as
    images fill a worker's batch as far as their captions fit whole."""
    if config.captions_per_image == "1":
        return math.ceil(num_pairs / (config.batch_size * config.accumulate_batches))
    pairs_per_image = max(1, num_pairs / num_images)
    images_per_batch = max(1, int(config.batch_size // num_workers / pairs_per_image))
    return math.ceil(num_images / (images_per_batch * num_workers * config.accumulate_batches))


class Optimiser:
    """Clips, steps, schedules and averages; ``state_dict`` has all that going on exactly needs.

    Args:
        captioner: what is trained; its requires_grad are as they will stay.
        config: optimiser, schedule and averaging.
        num_steps: the steps the whole training will take, for the cosine.
    """

    def __init__(self, captioner: Captioner, config: Optimisation, num_steps: int):
        self.config = config
        self.parameters = [p for p in captioner.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(captioner, config)
        self.scheduler = self._build_scheduler(num_steps)
        self.epochs: list[list[torch.Tensor]] = []
        """The weights at the end of the last ``average_epochs``."""
        self.average: AveragedModel | None = None
        if config.ema_decay is not None:
            trained = nn.ParameterList(self.parameters)
            self.average = AveragedModel(trained, multi_avg_fn=MovingAverage(config.ema_decay))

    def _build_scheduler(self, num_steps: int):
        config = self.config
        if config.schedule == "step":
            return lr_scheduler.StepLR(self.optimizer, config.schedule_epochs, config.schedule_factor)
        if config.schedule == "cosine":
            return lr_scheduler.LambdaLR(self.optimizer, CosineWithWarmup(config.warmup_steps, num_steps))
        if config.schedule == "plateau":
            return lr_scheduler.ReduceLROnPlateau(
                self.optimizer,
                mode="min" if config.schedule_metric == "val_loss" else "max",
                factor=config.schedule_factor,
                patience=config.schedule_epochs - 1,  # torch cuts after one more.
                threshold=0.0,
                threshold_mode="abs",
                eps=0.0,
            )
        return None

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def step(self) -> None:
        """One step along the gradients, which are clipped, and cleared."""
        if self.config.clip == "norm":
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip_threshold)
        elif self.config.clip == "value":
            nn.utils.clip_grad_value_(self.parameters, self.config.clip_threshold)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(nn.ParameterList(self.parameters))
        if isinstance(self.scheduler, lr_scheduler.LambdaLR):
            self.scheduler.step()

    def set_back(self, num_steps: int) -> None:
        """Let the schedule count ``num_steps`` fewer, which are made again."""
        if isinstance(self.scheduler, lr_scheduler.LambdaLR):
            self.scheduler.last_epoch -= num_steps
            factors = [factor(self.scheduler.last_epoch) for factor in self.scheduler.lr_lambdas]
            for group, base, factor in zip(self.optimizer.param_groups, self.scheduler.base_lrs, factors, strict=True):
                group["lr"] = base * factor

    def keep_weights(self) -> None:
        """Keep the weights as they are after the steps of an epoch, where the epochs' mean is wanted."""
        if self.config.average_epochs is not None:
            kept = [p.detach().clone() for p in self.parameters]
            self.epochs = [*self.epochs, kept][-self.config.average_epochs :]

    def end_epoch(self, metrics: dict[str, float]) -> None:
        """What the schedule makes of the epoch's metrics, which must be the same on all workers."""
        if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(metrics[self.config.schedule_metric])
        elif isinstance(self.scheduler, lr_scheduler.StepLR):
            self.scheduler.step()

    @contextmanager
    def averaged(self) -> Generator[None]:
        """The captioner has its averaged weights meanwhile (its own where no average is kept)."""
        average = self._average()
        if average is None:
            yield
            return
        own = [p.detach().clone() for p in self.parameters]
        _copy(average, self.parameters)
        try:
            yield
        finally:
            _copy(own, self.parameters)

    def _average(self) -> Iterable[torch.Tensor] | None:
        if self.epochs:
            return [torch.stack(weights).mean(0) for weights in zip(*self.epochs, strict=True)]
        return None if self.average is None else self.average.parameters()

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and containers only."""
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler, "average": self.average}
        state = {name: part.state_dict() for name, part in parts.items() if part is not None}
        return {**state, "epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.epochs = state.get("epochs", [])


@torch.no_grad()
def _copy(values: Iterable[torch.Tensor], into: Iterable[torch.Tensor]) -> None:
    for value, target in zip(values, into, strict=True):
        target.copy_(value)
