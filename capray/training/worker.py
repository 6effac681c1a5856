"""What each Ray Train worker does: the steps, the validation, the checkpoints.

A worker reads its own shard and may run out of batches before the others; it then goes on with batches of nothing, so
that every gradient is that of the whole global batch: sums over all workers, divided by global counts.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import nn

from capray.cluster import end_with_raylet, own_error
from capray.config import Decoding, Optimisation, TrainConfig
from capray.errors import DataError
from capray.images import input_size
from capray.metrics import corpus_figures
from capray.model.accuracy import accuracy_sums
from capray.model.captioner import Captioner, autocast
from capray.model.checkpoint import pack
from capray.model.loss import Batch, collate
from capray.model.word_vectors import WordVectors
from capray.report.training_samples import page
from capray.storage import locate, write_atomic
from capray.tracking.runs import Item, Points, TextFile
from capray.training.features import digest_of
from capray.training.initial_captioner import build_captioner
from capray.training.optimisation import Optimiser, steps_per_epoch
from capray.training.sample_stream import ImageBatch, Reading
from capray.training.stages import Stage, Sums
from capray.training_files import HISTORY, SAMPLES
from capray.vocabulary import Vocabulary
from capray.wording import counted

CAPTIONER_WEIGHTS = "captioner.pt"
TRAINER_STATE = "trainer.pt"


@dataclass
class Progress:
    """How far a training is; saved with every checkpoint. ``step`` counts all steps, ``step_in_epoch`` those of an epoch
    that is not over."""

    epoch: int = 0
    step: int = 0
    best_score: float = -1.0
    best_epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    step_in_epoch: int = 0

    @classmethod
    def stored(cls, values: dict[str, Any]) -> Progress:
        """The progress from a checkpoint; 0.1.0 had but BLEU-4 to select by."""
        return cls(**{"best_score" if name == "best_bleu_4" else name: value for name, value in values.items()})


def is_finished(epoch: int, best_epoch: int, config: TrainConfig) -> bool:
    """Whether a training is over after ``epoch`` epochs, of which ``best_epoch`` was the best."""
    return epoch >= config.epochs or (config.patience is not None and epoch - best_epoch >= config.patience)


class TrainingStep(nn.Module):
    """Encode and decode in one forward pass, so that DDP sees one."""

    def __init__(self, captioner: Captioner, stage: Stage):
        super().__init__()
        self.captioner = captioner
        self.stage = stage

    def forward(self, pixels: list[np.ndarray], batch: Batch, epoch: int = 0) -> Sums:
        return self.stage.loss(self.captioner, self.captioner.encode_all(pixels), batch, epoch)


def reduce_sums(values: Sequence[float], device: torch.device) -> list[float]:
    """Each value summed over all workers."""
    totals = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(totals)
    return totals.tolist()


def gather_objects(value: Any) -> list[Any]:
    """The value of every worker, on every worker."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def empty_batch(captioner: Captioner) -> tuple[list[np.ndarray], Batch]:
    """A batch of one black image without captions: it moves no gradient but takes part in the exchange of them."""
    width, height = input_size(64, 64, captioner.architecture)
    captions = torch.zeros(1, 1, 1, dtype=torch.long)
    batch = Batch(captions, captions, torch.zeros(1, 1, dtype=torch.long))
    return [np.zeros((height, width, 3), np.uint8)], batch


def backward(
    step: nn.Module, batches: list[tuple[list, Batch]], counts: list[float], config: TrainConfig, epoch: int = 0
) -> np.ndarray:
    """Add the gradient of the global batch's loss; the local Sums.

    ``batches`` (pixels and captions) are this worker's part of the global batch, one or more; workers exchange gradients at
    the last. ``counts`` are the stage's Counts of the global batch, over all workers. DDP averages over workers, which is
    undone here: the loss is Σ objective / terms + doubly_stochastic · Σ regulariser / captions, whoever holds what.
    """
    device = next(step.parameters()).device
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    terms, captions = counts
    totals = np.zeros(3)
    for i, (pixels, batch) in enumerate(batches, start=1):
        alone = i < len(batches) and isinstance(step, nn.parallel.DistributedDataParallel)
        with step.no_sync() if alone else nullcontext():
            with autocast(device, config.precision):
                sums = step(pixels, batch.to(device), epoch)
            loss = sums.objective / terms + config.doubly_stochastic * sums.regulariser / captions
            (loss * world_size).backward()
        totals += [float(value.detach()) for value in sums]
    return totals


@dataclass
class EpochState:
    """What a checkpoint within an epoch has of each worker: its sums so far, those since the last point of the curves, the
    seconds it took, the learning rate it began with, and its random numbers, on the CPU and, where it has one, the GPU."""

    sums: list[float]
    unlogged: list[float]
    seconds: float
    learning_rate: float
    random: torch.Tensor
    random_on_gpu: torch.Tensor | None

    def seed(self, device: torch.device) -> None:
        torch.set_rng_state(self.random.cpu())
        if self.random_on_gpu is not None and device.type == "cuda":
            torch.cuda.set_rng_state(self.random_on_gpu.cpu(), device)


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker needs to know; it travels to its process.

    Attributes:
        weights: the captioner's to start from, in Ray's object store; None where it starts anew.
        stage: a Stage, in Ray's object store.
        pictures: the images whose captions are shown, as JPEGs by id.
        board: the actor that it tells its progress.
        num_images, num_pairs: of an epoch, over all workers.
        encoder_sha256: digest of the encoder whose features are cached; None without a cache.
    """

    config: TrainConfig
    words: list[str]
    word_vectors: WordVectors | None
    weights: ray.ObjectRef | None
    stage: ray.ObjectRef
    pictures: dict[str, bytes]
    board: Any
    num_threads: int
    num_images: int
    num_pairs: int
    encoder_sha256: str | None


class Worker:
    """One worker of a training."""

    def __init__(self, settings: WorkerSettings):
        self.config = config = settings.config
        self.board, self.pictures = settings.board, settings.pictures
        self.samples: list[dict[str, Any]] = []
        self.unlogged = np.zeros(3)
        self.unlogged_seconds = 0.0
        self.num_pairs = settings.num_pairs
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        torch.set_num_threads(settings.num_threads)
        torch.manual_seed(config.seed)
        vocabulary = Vocabulary(settings.words)
        weights = None if settings.weights is None else ray.get(settings.weights)
        self.captioner = build_captioner(config, vocabulary, settings.word_vectors, weights).to(self.device)
        self.stage: Stage = ray.get(settings.stage)
        self.step = ray.train.torch.prepare_model(TrainingStep(self.captioner, self.stage))
        steps = steps_per_epoch(settings.num_images, self.num_pairs, config, self.world_size)
        self.optimiser = Optimiser(self.captioner, config.subset(Optimisation), config.epochs * steps)
        self.progress = Progress()
        self.epoch_state: EpochState | None = None
        self.encoder_sha256 = settings.encoder_sha256
        self.reading = self._new_reading()
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            self._restore(checkpoint)
        if self.encoder_sha256 is not None and digest_of(self.captioner.encoder) != self.encoder_sha256:
            raise DataError(
                f"the encoder's weights {config.weights!r} are no longer those this training began with: put them back, "
                "or give --feature-cache none"
            )

    def _restore(self, checkpoint: ray.train.Checkpoint) -> None:
        with checkpoint.as_directory() as folder:
            weights, state = (
                torch.load(os.path.join(folder, name), map_location=self.device, weights_only=True)
                for name in (CAPTIONER_WEIGHTS, TRAINER_STATE)
            )
        self.captioner.load_state_dict(weights)
        self.optimiser.load_state_dict(state["optimiser"])
        self.progress = Progress.stored(state["progress"])
        done = self.progress.step_in_epoch
        if not done:
            if self.rank == 0:
                self.board.say.remote(f"going on after epoch {self.progress.epoch:,} of {self.config.epochs:,}")
            return
        if state["order_settings"] == self._order_settings():
            self.epoch_state = EpochState(**state["epoch_states"][self.rank])
            return
        self.progress.step -= done
        self.progress.step_in_epoch = 0
        self.optimiser.set_back(done)
        self._say_of_epoch(
            f"begins again with the weights it has after step {done:,}, as the number of workers, "
            "--shuffle-buffer or the feature cache is another"
        )

    def _order_settings(self) -> list[int | bool]:
        """What, with the seed and the data, says which images a step of an epoch has."""
        return [self.world_size, self.config.shuffle_buffer, self.reading.cached]

    def _say_of_epoch(self, what: str) -> None:
        if self.rank == 0:
            self.board.say.remote(f"epoch {self.progress.epoch + 1} {what}")

    def _new_reading(self) -> Reading:
        return Reading(cached=self.encoder_sha256 is not None)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or patience has run out."""
        return is_finished(self.progress.epoch, self.progress.best_epoch, self.config)

    def train(self) -> None:
        while not self.finished:
            metrics = self.train_epoch()
            self.optimiser.keep_weights()
            with self.optimiser.averaged():
                metrics |= self.validate()
            metrics = {name: float(value) for name, value in metrics.items()}
            self.optimiser.end_epoch(metrics)
            progress = self.progress
            progress.epoch += 1
            progress.step_in_epoch = 0
            progress.history.append({"epoch": progress.epoch, **metrics})
            score = metrics[self.config.select_by]
            improved = score > progress.best_score
            if improved:
                progress.best_score, progress.best_epoch = score, progress.epoch
            self._publish(metrics, improved)

    def train_epoch(self) -> dict[str, float]:
        """One epoch; its mean losses over all workers' terms and captions."""
        self.step.train()
        config, epoch = self.config, self.progress.epoch
        torch.manual_seed(config.seed * 1_000_003 + epoch * 1009 + self.rank)
        steps = self._train_steps()
        sums, learning_rate, seconds = np.zeros(len(Sums._fields) + 4), self.optimiser.learning_rate, 0.0
        if self.epoch_state is not None:
            done, self.epoch_state = self.epoch_state, None
            self._say_of_epoch(f"goes on after step {self.progress.step_in_epoch:,}")
            deque(islice(steps, self.progress.step_in_epoch), maxlen=0)
            done.seed(self.device)
            sums, learning_rate, seconds = np.array(done.sums), done.learning_rate, done.seconds
            self.unlogged[:] = done.unlogged
        started = time.monotonic() - seconds
        self.logged_at = time.monotonic() - self.unlogged_seconds
        for images in steps:
            batches = [(part.pixels, collate(part.words, config.max_caption_words)) for part in images]
            terms, captions = np.sum([self.stage.count(batch) for _, batch in batches] or [(0, 0)], 0).tolist()
            num_pairs = sum(batch.num_captions for _, batch in batches)
            local = [terms, captions, num_pairs, sum(len(part.ids) for part in images), len(images)]
            *counts, num_pairs, num_images, num_busy = reduce_sums(local, self.device)
            if not num_busy:
                break
            losses = backward(self.step, batches or [empty_batch(self.captioner)], counts, config, epoch)
            self.optimiser.step()
            self.progress.step += 1
            self.progress.step_in_epoch += 1
            sums += [*losses, terms, captions, num_images, num_pairs]
            self._log_step(losses[1], terms, local[3])
            self._show(sums, started)
            every = config.checkpoint_every_steps
            if every is not None and self.progress.step_in_epoch % every == 0:
                self._checkpoint({}, self._state_of_epoch(sums, started, learning_rate))
        *totals, _, _ = reduce_sums(sums.tolist(), self.device)
        objective, figure, regulariser, terms, captions = totals
        if not captions:
            raise DataError(f"no image of split {self.config.train_split!r} could be decoded")
        seconds = time.monotonic() - started
        self.unlogged_seconds = time.monotonic() - self.logged_at
        return {
            "train_objective": objective / terms + self.config.doubly_stochastic * regulariser / captions,
            f"train_{self.stage.figure}": figure / terms,
            "train_regulariser": regulariser / captions,
            "train_images": sums[5],
            "train_images_per_second": sums[5] / seconds,
            "train_seconds": seconds,
            "learning_rate": learning_rate,
            **self.stage.scheduled(epoch),
        }

    def _state_of_epoch(self, sums: np.ndarray, started: float, learning_rate: float) -> EpochState:
        return EpochState(
            sums.tolist(),
            self.unlogged.tolist(),
            time.monotonic() - started,
            learning_rate,
            torch.get_rng_state(),
            torch.cuda.get_rng_state(self.device).cpu() if self.device.type == "cuda" else None,
        )

    def _train_steps(self) -> Iterator[list[ImageBatch]]:
        """This worker's batches of each step of the epoch, then none for as long as the others go on."""
        config, epoch = self.config, self.progress.epoch
        if self.rank == 0:  # Nobody reads before all workers ask for it.
            ray.get(self.board.begin.remote(epoch))
        share, rest = divmod(config.batch_size, self.world_size)
        batches = self.reading.batches(
            ray.train.get_dataset_shard("train"),
            pairs_per_batch=share + (self.rank < rest),
            one_caption=config.captions_per_image == "1",
            seed=config.seed * 7919 + epoch * 104_729 + self.rank,
            shuffle_buffer=config.shuffle_buffer,
        )
        while True:
            yield list(islice(batches, config.accumulate_batches))

    def _log_step(self, figure: float, terms: float, num_images: float) -> None:
        """Every log_every_steps: the stage's figure and the throughput, over all workers, since the last time (validation
        apart)."""
        self.unlogged += [figure, terms, num_images]
        step = self.progress.step
        if step % self.config.log_every_steps:
            return
        figure, terms, num_images = reduce_sums(self.unlogged.tolist(), self.device)
        seconds = time.monotonic() - self.logged_at
        self.unlogged[:], self.logged_at = 0, time.monotonic()
        curves = {
            f"step/{self.stage.figure}": figure / terms,
            "step/learning_rate": self.optimiser.learning_rate,
            "step/images_per_second": num_images / seconds,
        }
        self._track(Points(curves, step))

    def _track(self, item: Item) -> None:
        if self.rank == 0:
            self.board.track.remote(item)

    def _show(self, sums: np.ndarray, started: float) -> None:
        if self.rank != 0:
            return
        _, figure, _, terms, _, num_images, pairs = sums
        mean = figure / terms if terms else math.nan
        rate = num_images / (time.monotonic() - started)
        epoch = self.progress.epoch
        self.board.post.remote(
            {
                "completed": epoch * self.num_pairs + pairs,
                "description": f"epoch {epoch + 1}/{self.config.epochs}",
                "figures": f"step {self.progress.step}  {self.stage.figure} {mean:.3f}  {rate:.1f} images/s",
            }
        )

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Free-running captions of the validation split, each image counted once, the teacher-forced loss, and how often the
        reference's next word is among the five likeliest."""
        self.step.eval()
        config, decoding = self.config, self.config.subset(Decoding)
        started = time.monotonic()
        captioned: list[tuple[str, str, list[str]]] = []
        sums = torch.zeros(4, dtype=torch.float64)
        shard = ray.train.get_dataset_shard("validation")
        for images in self.reading.batches(shard, 0, one_caption=False, seed=0, images_per_batch=64):
            batch = collate(images.words, config.max_caption_words).to(self.device)
            with autocast(self.device, config.precision):
                memory = self.captioner.encode_all(images.pixels)
                sums += torch.stack([part.sum() for part in accuracy_sums(self.captioner, memory, batch)]).cpu()
                best = self.captioner.caption(memory, decoding)
            texts = [hypotheses[0].caption if hypotheses else "" for hypotheses in best]
            captioned += zip(images.ids, texts, images.captions, strict=True)
            if self.rank == 0:
                self.board.post.remote({"figures": f"validating  {counted(len(captioned), 'image')}"})
        everyone = {image_id: rest for share in gather_objects(captioned) for image_id, *rest in share}
        nll, forced_hits, free_hits, tokens = reduce_sums(sums.tolist(), self.device)
        if not everyone:
            raise DataError(f"no image of split {config.validation_split!r} could be decoded")
        texts, references = zip(*everyone.values(), strict=True)
        figures = corpus_figures(references, texts, "bleu", "cider_d")
        self.samples = [
            {"image_id": i, "caption": everyone[i][0], "references": everyone[i][1]} for i in self.pictures if i in everyone
        ]
        seconds = time.monotonic() - started
        loss = nll / tokens
        return {
            "val_loss": loss,
            "val_perplexity": math.exp(min(loss, 700)),
            "val_teacher_forced_top5_accuracy": forced_hits / tokens,
            "val_free_running_top5_accuracy": free_hits / tokens,
            **figures,
            "val_images": float(len(everyone)),
            "val_images_per_second": len(everyone) / seconds,
        }

    def _publish(self, metrics: dict[str, float], improved: bool) -> None:
        """Write the captioner as `last` (and `best`), log the epoch, and report a checkpoint."""
        left_out = reduce_sums([self.reading.undecodable, self.reading.without_captions], self.device)
        self.reading = self._new_reading()
        if self.rank == 0:
            self._write(metrics, improved, left_out)
        self._checkpoint(metrics)

    def _write(self, metrics: dict[str, float], improved: bool, left_out: list[float]) -> None:
        with self.optimiser.averaged():
            files = pack(self.captioner)
        for name in ("last", "best") if improved else ("last",):
            for file, data in files.items():
                write_atomic(locate(self.config.output).join(name, file), data)
        history = {"best_epoch": self.progress.best_epoch, "epochs": self.progress.history}
        write_atomic(locate(self.config.output).join(HISTORY), json.dumps(history, indent=1).encode())
        self._track_epoch(metrics, improved)
        self._say(metrics, improved, *left_out)

    def _checkpoint(self, metrics: dict[str, float], epoch_state: EpochState | None = None) -> None:
        """Report a checkpoint to resume from: at an epoch's end, or within one that is at ``epoch_state``."""
        told = {**metrics, "epoch": self.progress.epoch, "step_in_epoch": self.progress.step_in_epoch}
        epoch_states = gather_objects(asdict(epoch_state)) if epoch_state is not None else None
        if self.rank != 0:
            ray.train.report(told)
            return
        state: dict[str, Any] = {"optimiser": self.optimiser.state_dict(), "progress": asdict(self.progress)}
        if epoch_states is not None:
            state |= {"epoch_states": epoch_states, "order_settings": self._order_settings()}
        with tempfile.TemporaryDirectory() as folder:
            torch.save(self.captioner.state_dict(), os.path.join(folder, CAPTIONER_WEIGHTS))
            torch.save(state, os.path.join(folder, TRAINER_STATE))
            ray.train.report(told, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def _track_epoch(self, metrics: dict[str, float], improved: bool) -> None:
        epoch = self.progress.epoch
        self._track(Points(metrics, epoch))
        if self.samples:
            path = f"samples/epoch-{epoch:03d}"
            text = json.dumps(self.samples, indent=1, ensure_ascii=False)
            self._track(TextFile(f"{path}.json", text))
            if improved:
                write_atomic(locate(self.config.output).join(SAMPLES), text.encode())
                self._track(TextFile(f"{path}.html", page(f"epoch {epoch}", self.pictures, self.samples)))

    def _say(self, metrics: dict[str, float], improved: bool, undecodable: float, without_captions: float) -> None:
        figure = self.stage.figure
        bleu = " ".join(f"{metrics[f'bleu_{n}']:.3f}" for n in range(1, 5))
        line = (
            f"epoch {self.progress.epoch}: {figure} {metrics[f'train_{figure}']:.4f}  val loss {metrics['val_loss']:.4f}  "
            f"BLEU-1..4 {bleu}  CIDEr-D {metrics['cider_d']:.3f}  "
            f"{metrics['train_images_per_second']:.1f} images/s{'  (best)' if improved else ''}"
        )
        if undecodable:
            line += f"\n  {counted(undecodable, 'image')} that could not be decoded left out"
        if without_captions:
            line += f"\n  {counted(without_captions, 'image')} without a caption with a word left out"
        self.board.say.remote(line)


def train_worker(loop_config: dict[str, WorkerSettings]) -> None:
    """Ray Train's entry point, which wants a mapping: the worker's ``settings``.

    A fault of the data or the settings would come again: it ends the training, on all workers alike, without the restarts
    that a lost worker gets.
    """
    end_with_raylet()
    settings = loop_config["settings"]
    try:
        Worker(settings).train()
        ray.get(settings.board.failure.remote())  # By now the board has all that was posted before.
    except Exception as error:
        fault = own_error(error)
        if fault is None:
            raise
        ray.get(settings.board.fail.remote(fault))
