"""The training job: settings checked, vocabulary built, Ray Train run, the outcome reported."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from capray import cluster
from capray.config import Augmentation, Decoding, ImageLimits, Preprocessing, TrainConfig, flag_of
from capray.datasets.samples import RECORD, SplitText, names_and_sizes, read_captions
from capray.errors import CaprayError, Interrupted, OutputConflictError
from capray.model.captioner_files import FILES, model_id_of
from capray.model.word_vectors import WordVectors, read_word_vectors
from capray.progress import ProgressDisplay
from capray.report.training_samples import pick_pictures
from capray.storage import exists, list_names, locate, read_bytes, write_atomic
from capray.tracking.model_format import write_model
from capray.tracking.registry import is_registered
from capray.tracking.runs import Model, Tracker
from capray.training.encoding import build_cache
from capray.training.features import Cache, cached_dataset, choose_root, identify
from capray.training.initial_captioner import Weights, adopt_captioner, build_captioner
from capray.training.metrics_board import board_class
from capray.training.sample_stream import EpochSeed, dataset
from capray.training.stages import prepare_stage
from capray.training.worker import WorkerSettings, is_finished, train_worker
from capray.training_files import HISTORY, SETTINGS
from capray.vocabulary import Vocabulary, tokenise
from capray.wording import counted

NOT_IDENTITY = {
    "output",
    "epochs",
    "patience",
    "num_workers",
    "gpus_per_worker",
    "cpus_per_worker",
    "max_restarts",
    "checkpoint_every_steps",
    "tracking_uri",
    "experiment",
    "register_as",
    "log_every_steps",
    "shuffle_buffer",
    "feature_cache",
}
"""Settings that may differ when a training is taken up again."""


ABORT_SECONDS = 10.0
"""How long a training that is stopped is waited for."""

Tokens = list[list[list[str]]]
"""The tokenised training captions of each image."""


@dataclass(frozen=True)
class TrainResult:
    """How a training ended: the folders of its captioners, the metrics of each epoch, and in ``registered`` the URI of the
    version in MLflow's model registry, where one was asked for and made."""

    best: str
    last: str
    best_epoch: int
    metrics: list[dict[str, float]]
    registered: str | None = None


def train(config: TrainConfig) -> TrainResult:
    """Train a captioner, or go on with a training that was interrupted.

    Raises:
        ConfigError: settings that do not fit each other, the cluster, or the training already in the output.
        DataError: the Samples table cannot be used.
        CheckpointError: the encoder's weights cannot be used.
        StorageError: the MLflow server does not answer at the start; later, that is only a warning.
        Interrupted: stopped by Ctrl-C or SIGTERM.
    """
    given = _absolute(config)
    previous = _check_output(given)
    tracker = Tracker(given)
    config, material = _gather(given)
    torch.manual_seed(config.seed)  # a random frozen encoder is the one the workers make
    captioner = build_captioner(config, material.vocabulary, material.word_vectors, material.weights)
    num_parameters = sum(p.numel() for p in captioner.parameters())
    num_trained = sum(p.numel() for p in captioner.parameters() if p.requires_grad)
    digest = _digest(config.samples)
    encoder = captioner.encoder
    root = choose_root(config, encoder)
    identity = identify(config, encoder, digest)
    del captioner

    parameters = {
        "num_parameters": num_parameters,
        "num_trained_parameters": num_trained,
        "vocabulary_size": len(material.vocabulary),
        "dataset_digest": digest,
    }
    with ProgressDisplay("starting Ray") as display:
        tracker.start(previous.get("mlflow_run_id"), parameters, digest, display.say)
        _write_record(given, tracker.run_id)
        display.say(_describe(material, num_parameters, num_trained, config))
        if material.word_vectors is not None:
            known, words = len(material.word_vectors.ids_N), len(material.vocabulary.words)
            display.say(f"word vectors for {known:,} of {words:,} words; the others start at random")
        try:
            if _is_over(config):
                display.say("all epochs are done")
            else:
                cluster.connect()
                gpus = cluster.gpus_each(config.gpus_per_worker)
                cpus = cluster.share_cpus(config.num_workers, config.cpus_per_worker, gpus, display.say)
                splits = {config.train_split: material.text, config.validation_split: material.validation}
                cache = build_cache(root, identity, encoder, config, splits, display) if root else None
                _fit(config, material, tracker, display, cache, cpus, gpus)
        except BaseException as error:
            tracker.close("KILLED" if isinstance(error, (KeyboardInterrupt, Interrupted)) else "FAILED")
            raise
        output = locate(config.output)
        history = json.loads(read_bytes(output.join(HISTORY)))
        model = None
        if tracker.run_id is not None:
            model = _model(config)
            tracker.put(model)
        tracker.close("FINISHED")
    registered = model.registered if model else None
    return TrainResult(
        output.join("best").uri, output.join("last").uri, history["best_epoch"], history["epochs"], registered
    )


def _is_over(config: TrainConfig) -> bool:
    """Whether the output holds all epochs already."""
    place = locate(config.output).join(HISTORY)
    if not exists(place):
        return False
    history = json.loads(read_bytes(place))
    return is_finished(len(history["epochs"]), history["best_epoch"], config)


def _model(config: TrainConfig) -> Model:
    """The best captioner, as MLflow is to have it."""
    best = locate(config.output).join("best")
    files = {name: read_bytes(best.join(name)) for name in FILES}

    def fill(folder: str, logged_model_id: str) -> None:
        write_model(folder, files, config.subset(Decoding), logged_model_id)

    return Model("captioner", fill, model_id_of(files), config.register_as)


@dataclass(frozen=True)
class Material:
    """What a training is made from.

    Attributes:
        text, validation: the captions of the two splits.
        tokens: of each image of ``text``, the words of each caption.
        weights: of the captioner it begins with.
    """

    text: SplitText
    validation: SplitText
    tokens: Tokens
    vocabulary: Vocabulary
    word_vectors: WordVectors | None
    weights: Weights | None


def _gather(config: TrainConfig) -> tuple[TrainConfig, Material]:
    """The material, and ``config`` with the architecture of the captioner that it begins with."""
    text = read_captions(config.samples, config.train_split)
    validation = read_captions(config.samples, config.validation_split)
    tokens = [[tokenise(caption) for caption in image] for image in text.captions]
    weights = vectors = None
    if config.init_from is not None:
        config, vocabulary, weights = adopt_captioner(config)
    else:
        captions = (words for image in tokens for words in image)
        vocabulary = Vocabulary.build(captions, config.min_word_count, config.max_vocabulary)
    if config.word_vectors is not None:
        vectors = read_word_vectors(config.word_vectors, vocabulary, config.embed_dim)
    return config, Material(text, validation, tokens, vocabulary, vectors, weights)


def _fit(
    config: TrainConfig,
    material: Material,
    tracker: Tracker,
    display: ProgressDisplay,
    cache: Cache | None,
    cpus: float,
    gpus: float,
) -> None:
    import ray
    from pyarrow.fs import FSSpecHandler, PyFileSystem
    from ray.exceptions import RayError
    from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    class UnequalShards(DataConfig):
        """Every row to exactly one worker; Ray's equal shards would drop the rows that do not divide."""

        def configure(self, datasets, world_size, worker_handles, worker_node_ids, **kwargs):
            shards: list[dict[str, Any]] = [{} for _ in range(world_size)]
            for name, data in datasets.items():
                for shard, split in zip(shards, data.streaming_split(world_size, equal=False), strict=True):
                    shard[name] = split
            return shards

    class StoppableTrainer(TorchTrainer):  # ty: ignore[unsupported-base]
        """Ctrl-C ends the training and not, without a word, the process."""

        controller: Any = None

        def _register_sigint_handler(self, controller):
            self.controller = controller

        def abort(self) -> None:
            with suppress(RayError):  # It ends itself.
                if self.controller is not None:
                    ray.get(self.controller.abort.remote(), timeout=ABORT_SECONDS)

    board, vocabulary, tokens = board_class().remote(), material.vocabulary, material.tokens
    epoch = measure_epoch(tokens, config)
    seed = EpochSeed(config.seed, board, config.subset(Augmentation), epoch.num_passes)

    def data(split: str, text: SplitText, epoch_seed: EpochSeed | None = None):
        if cache is not None:
            return cached_dataset(cache.splits[split], config.samples, split, text.units, vocabulary, epoch_seed)
        preprocessing, limits = config.subset(Preprocessing), config.subset(ImageLimits)
        return dataset(config.samples, split, text.units, vocabulary, preprocessing, limits, epoch_seed)

    limits = config.subset(ImageLimits)
    pictures = pick_pictures(config.samples, config.validation_split, material.validation.units, limits)
    settings = WorkerSettings(
        config.model_copy(update={"tracking_uri": None}),
        vocabulary.words,
        material.word_vectors,
        None if material.weights is None else ray.put(material.weights),
        ray.put(prepare_stage(config, [[vocabulary.encode(words) for words in image] for image in tokens])),
        pictures,
        board,
        num_threads=max(1, int(cpus)),
        num_images=material.text.num_images,
        num_pairs=epoch.num_pairs,
        encoder_sha256=cache.identity.encoder_sha256 if cache is not None else None,
    )
    output = locate(config.output)
    trainer = StoppableTrainer(
        train_worker,
        train_loop_config={"settings": settings},
        torch_config=TorchConfig(backend="gloo") if 0 < gpus < 1 else None,  # NCCL refuses two workers on a GPU.
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=output.path,
            storage_filesystem=None if output.is_local else PyFileSystem(FSSpecHandler(output.fs)),
            checkpoint_config=CheckpointConfig(num_to_keep=2),  # ty: ignore[invalid-argument-type]
            failure_config=FailureConfig(config.max_restarts),  # ty: ignore[invalid-argument-type]
        ),
        datasets={
            "train": data(config.train_split, material.text, seed),
            "validation": data(config.validation_split, material.validation),
        },
        dataset_config=UnequalShards(),
    )
    with _shown(board, display, tracker, config.epochs * epoch.num_pairs):
        try:
            trainer.fit()
        except KeyboardInterrupt as error:
            trainer.abort()
            raise Interrupted("stopped; the same command goes on from the last checkpoint") from error
        except TrainingFailedError as error:
            raise _cause(error) from error
        failure = ray.get(board.failure.remote())
        if failure is not None:
            raise failure


class Epoch(NamedTuple):
    """How many pairs an epoch has, and in how many passes over the images (see EpochSeed)."""

    num_pairs: int
    num_passes: int | None


def measure_epoch(tokens: Tokens, config: TrainConfig) -> Epoch:
    """What an epoch is over these captions; those without a word are left out."""
    counts = [sum(map(bool, image)) for image in tokens]
    if config.epoch == "pairs":
        return Epoch(sum(counts), max(counts))
    return Epoch(sum(map(bool, counts)) if config.captions_per_image == "1" else sum(counts), None)


@contextmanager
def _shown(board: Any, display: ProgressDisplay, tracker: Tracker, total: float):
    """Show what is on the board, and track what is to be, until the training is over."""
    import ray
    from ray.exceptions import RayError

    over = threading.Event()

    def show() -> None:
        state, lines, items = ray.get(board.read.remote())
        for line in lines:
            display.say(line)
        for item in items:
            tracker.put(item)
        if state:
            display.update(state.get("completed", 0), state["figures"], state.get("description"), total)

    def watch() -> None:
        while not over.wait(0.5):
            try:
                show()
            except RayError:
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
        time.sleep(0.1)
    finally:
        over.set()
        watcher.join(5)
        with suppress(RayError):
            show()


def _cause(error: Exception) -> CaprayError:
    """What went wrong, in a line: the last of the first worker's traceback."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    lines = [line for line in str(failures[0]).splitlines() if line.strip()]
    return CaprayError(f"training failed: {lines[-1] if lines else repr(failures[0])}")


def _absolute(config: TrainConfig) -> TrainConfig:
    """The settings with paths that hold in any process: Ray Train's workers have a working directory of their own."""
    paths = {"samples": locate(config.samples).uri, "output": locate(config.output).uri}
    if config.feature_cache not in ("auto", "none"):
        paths["feature_cache"] = locate(config.feature_cache).uri
    if config.weights is not None and (os.path.exists(config.weights) or "/" in config.weights):
        paths["weights"] = locate(config.weights).uri
    for name in ("init_from", "word_vectors"):
        if (path := getattr(config, name)) is not None and not is_registered(path):
            paths[name] = locate(path).uri
    return config.model_copy(update=paths)


def _describe(material: Material, parameters: int, trained: int, config: TrainConfig) -> str:
    captions = [words for image in material.tokens for words in image]
    lines = [
        f"training on {counted(len(material.tokens), 'image')} with {counted(len(captions), 'caption')}, validating on "
        f"{counted(material.validation.num_images, 'image')}; {counted(len(material.vocabulary), 'word')}; "
        f"{parameters:,} parameters, {trained:,} trained"
    ]
    cut = sum(len(words) > config.max_caption_words for words in captions)
    if cut:
        lines.append(f"{counted(cut, 'caption')} cut after {counted(config.max_caption_words, 'word')}")
    empty = sum(not words for words in captions)
    if empty:
        lines.append(f"{counted(empty, 'caption')} without a word left out")
    return "\n".join(lines)


def _digest(samples: str) -> str:
    """The digest `capray prepare` recorded; of the file names and sizes where there is no record."""
    record = locate(samples).join(RECORD)
    if exists(record):
        return json.loads(read_bytes(record))["digest"]
    return hashlib.sha256(names_and_sizes(samples).encode()).hexdigest()


def _identity(config: TrainConfig) -> dict[str, Any]:
    free = NOT_IDENTITY - {"epochs"} if config.schedule == "cosine" else NOT_IDENTITY
    return {name: value for name, value in config.model_dump(mode="json").items() if name not in free}


def _check_output(config: TrainConfig) -> dict[str, Any]:
    """The record of the training in the output, {} when there is none; an error when it is another training."""
    output = locate(config.output)
    record = output.join(SETTINGS)
    if not exists(record):
        if names := list_names(output):
            raise OutputConflictError(
                f"{config.output!r} holds {names[0]!r} and no training: choose a new folder or empty it"
            )
        return {}
    previous = json.loads(read_bytes(record))
    defaults = {name: field.default for name, field in TrainConfig.model_fields.items() if not field.is_required()}
    # What an older version did not know had its default.
    then = json.loads(json.dumps(defaults)) | previous["settings"]
    changed = [
        f"{flag_of(name)}: {then.get(name)!r} -> {now!r}" for name, now in _identity(config).items() if now != then.get(name)
    ]
    if changed:
        raise OutputConflictError(
            f"{config.output!r} holds a training with other settings ({'; '.join(changed)}): choose another output, or "
            "the same settings to go on with it"
        )
    return previous


def _write_record(config: TrainConfig, run_id: str | None) -> None:
    record = {"settings": _identity(config), "mlflow_run_id": run_id}
    write_atomic(locate(config.output).join(SETTINGS), json.dumps(record, indent=2).encode())
