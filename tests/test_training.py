"""Training: gradients that do not depend on how the batch is shared out, and the job on Ray."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import torch
from mlflow import MlflowClient

from capray.config import Architecture, ReportConfig, TrainConfig
from capray.datasets.samples import read_captions
from capray.errors import ConfigError, DataError, Interrupted, OutputConflictError
from capray.model.captioner import Captioner
from capray.model.checkpoint import load_captioner
from capray.model.loss import collate
from capray.report.training_report import report_training
from capray.tables import SAMPLES, encode_parquet
from capray.tracking.registry import find_model
from capray.training.job import TrainResult, measure_epoch, train
from capray.training.sample_stream import DECODED, Reading, draw_caption
from capray.training.stages import CrossEntropy
from capray.training.worker import Progress, TrainingStep, backward, empty_batch
from capray.vocabulary import Vocabulary, tokenise
from tests.conftest import TINY, in_process, ray_processes

SETTINGS = {
    **TINY,
    "fine_tune_from": "all",
    "batch_size": 40,
    "min_word_count": 1,
    "beam_size": 2,
    "max_length": 12,
    "learning_rate": 1e-3,
    "num_workers": 1,
    "cpus_per_worker": 1,
}
CAPTIONS = [[[4, 5, 6, 7, 8, 9, 10], [4]], [[5, 6]], [[7, 8, 9], [10, 11, 4, 5], [6, 6]], [[9, 9, 9, 9, 9]], [[4, 8]]]
PIXELS = np.random.default_rng(0).integers(0, 256, (len(CAPTIONS), 32, 32, 3), dtype=np.uint8)
SHARES = [[0, 2, 3], [1, 4]]
CONFIG = TrainConfig(samples="s", output="o", **SETTINGS)


def make_step() -> TrainingStep:
    torch.manual_seed(0)
    captioner = Captioner(Architecture(**TINY), Vocabulary([f"w{i}" for i in range(8)]), fine_tune_from="all")
    return TrainingStep(captioner, CrossEntropy(label_smoothing=0.1)).train()


def gradients(step, share, counts):
    """The gradient after ``backward`` on the images of ``share`` (none: a batch of nothing)."""
    if share:
        pixels, batch = list(PIXELS[share]), collate([CAPTIONS[i] for i in share], 50)
    else:
        pixels, batch = empty_batch(step.module.captioner if hasattr(step, "module") else step.captioner)
    backward(step, [(pixels, batch)], counts, CONFIG)
    return {name.removeprefix("module."): p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}


def worker(rank: int, divisions: list[list[list[int]]], counts: list[float], folder: str) -> None:
    """One DDP process of two: that of the test below, and one by ``python -c``."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    try:
        for number, shares in enumerate(divisions):
            step = torch.nn.parallel.DistributedDataParallel(make_step())
            torch.save(gradients(step, shares[rank], counts), f"{folder}/{number}-{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_workers_give_the_gradient_of_one_with_the_same_global_batch(tmp_path):
    """With unequal shares, and with one that has nothing."""
    divisions = [SHARES, [[0, 1, 2, 3, 4], []]]
    whole = collate(CAPTIONS, 50)
    counts = [float(whole.num_tokens), float(whole.num_captions)]
    expected = gradients(make_step(), list(range(len(CAPTIONS))), counts)
    code = "import sys, json; from tests.test_training import worker; a = json.loads(sys.argv[1]); worker(*a)"
    command = [sys.executable, "-c", code, json.dumps([1, divisions, counts, str(tmp_path)])]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1]) as other:
        try:
            worker(0, divisions, counts, str(tmp_path))
            assert other.wait(120) == 0
        finally:
            other.kill()
    for number, rank in product(range(2), range(2)):
        found = torch.load(tmp_path / f"{number}-{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_accumulated_batches_give_the_gradient_of_all_in_one():
    whole = collate(CAPTIONS, 50)
    counts = [float(whole.num_tokens), float(whole.num_captions)]
    step = make_step()
    parts = [(list(PIXELS[share]), collate([CAPTIONS[i] for i in share], 50)) for share in SHARES]
    losses = backward(step, parts, counts, CONFIG)
    expected = make_step()
    assert losses == pytest.approx(backward(expected, [(list(PIXELS), whole)], counts, CONFIG), rel=1e-5)
    for (name, found), wanted in zip(step.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, atol=1e-6, rtol=1e-4, msg=name)


class TestReading:
    def shard(self, captions, bad=()):
        rows = [
            {
                "image_id": str(i),
                "pixels": None if i in bad else bytes(2 * 2 * 3),
                "height": 2,
                "width": 2,
                "captions": ["x"] * len(image),
                "words": image,
            }
            for i, image in enumerate(captions)
        ]
        return Shard(pa.Table.from_pylist(rows, DECODED))

    def test_batches_hold_at_most_so_many_pairs_and_every_image_once(self):
        captions = [[[4]] * (1 + i % 5) for i in range(40)]
        batches = list(Reading().batches(self.shard(captions), 12, one_caption=False, seed=0))
        assert [i for batch in batches for i in batch.ids] == [str(i) for i in range(40)]
        pairs = [sum(len(words) for words in batch.words) for batch in batches]
        assert max(pairs) <= 12 and min(pairs[:-1]) > 12 - 5

    def test_an_image_with_more_captions_than_a_batch_is_not_lost(self):
        batches = list(Reading().batches(self.shard([[[4]] * 9]), 2, one_caption=False, seed=0))
        assert [len(batch.words[0]) for batch in batches] == [9]

    def test_one_caption_per_image_is_drawn_anew_with_the_seed(self):
        shard = self.shard([[[4], [5], [6], [7], [8]]] * 20)
        drawn = [
            [words[0][0] for batch in Reading().batches(shard, 5, one_caption=True, seed=seed) for words in batch.words]
            for seed in (0, 0, 1)
        ]
        assert len(drawn[0]) == 20
        assert drawn[0] == drawn[1] != drawn[2]

    def test_what_is_left_out_is_counted(self):
        reading = Reading()
        batches = list(reading.batches(self.shard([[[4]], [[]], [[5], []], [[6]]], bad=[3]), 10, False, seed=0))
        assert [batch.words for batch in batches] == [[[[4]], [[5]]]]
        assert (reading.undecodable, reading.without_captions) == (1, 1)


class TestAnEpochOfPairs:
    """Images with 3, 1, 0 and 2 captions that have a word, and one that could not be decoded."""

    def table(self):
        captions = [[[4], [5], [6]], [[], [7]], [[]], [[8], [8]], [[9], [10]]]
        rows = [
            {"image_id": str(i), "pixels": b"x", "height": None if i == 4 else 1, "width": 1, "captions": [], "words": w}
            for i, w in enumerate(captions)
        ]
        return pa.Table.from_pylist(rows, DECODED)

    def passes(self, epoch):
        return [draw_caption(self.table(), epoch, number) for number in range(4)]

    def test_has_every_pair_once_an_image_at_most_once_in_a_pass(self):
        passes = self.passes("0 0")
        drawn = Counter((row["image_id"], *row["words"][0]) for p in passes for row in p.to_pylist() if row["words"])
        assert drawn == {("0", 4): 1, ("0", 5): 1, ("0", 6): 1, ("1", 7): 1, ("3", 8): 2}
        assert [p["image_id"].to_pylist() for p in passes] == [["0", "1", "2", "3", "4"], ["0", "3"], ["0"], []]
        assert all(p.schema == DECODED for p in passes)

    def test_draws_by_the_epoch_and_the_image(self):
        assert self.passes("0 0") == self.passes("0 0")
        orders = {str([p["words"][0].as_py() for p in self.passes(f"0 {epoch}")[:3]]) for epoch in range(20)}
        assert 1 < len(orders) <= 6

    def test_is_measured(self):
        tokens = [[["a"], ["b", "c"], []], [["d"]], [[]]]
        one = CONFIG.model_copy(update={"captions_per_image": "1"})
        assert measure_epoch(tokens, CONFIG) == (3, None)
        assert measure_epoch(tokens, one) == (2, None)
        assert measure_epoch(tokens, one.model_copy(update={"epoch": "pairs"})) == (3, 2)

    @pytest.mark.usefixtures("ray_cluster")
    def test_trains_on_them(self, samples, tmp_path):
        odd = with_oddities(samples, tmp_path / "odd")
        settings = {"captions_per_image": "1", "epoch": "pairs", "batch_size": 8, "schedule": "cosine", "flip": 0.5}
        with in_process():
            (metrics,) = run(odd, tmp_path / "out", epochs=1, select_by="cider_d", tracking_uri="none", **settings).metrics
        captions = [image for image in read_captions(odd, "train").captions if any(tokenise(c) for c in image)]
        assert metrics["train_images"] == sum(map(len, captions[1:])), "the first image is damaged"
        assert 0 <= metrics["cider_d"] <= 10


def test_progress_stored_before_there_was_a_choice_of_metrics_is_read():
    stored = {"epoch": 3, "step": 9, "best_bleu_4": 0.2, "best_epoch": 2, "history": []}
    assert Progress.stored(stored) == Progress(3, 9, 0.2, 2, [])
    assert Progress.stored(asdict(Progress(best_score=0.5))) == Progress(best_score=0.5)


class Shard:
    """As much of a Ray Train shard as reading uses."""

    def __init__(self, table):
        self.table = table

    def iter_batches(self, batch_size, **_):
        return (self.table.slice(i, batch_size) for i in range(0, self.table.num_rows, batch_size))


def run(samples, output, **settings):
    return train(TrainConfig(samples=samples, output=str(output), **{**SETTINGS, **settings}))


class TestRefusals:
    def test_a_split_without_images(self, samples, tmp_path):
        with pytest.raises(DataError, match=r"no images in split 'val'.*dev \(6\), test \(6\), train \(48\)"):
            run(samples, tmp_path / "out", validation_split="val")

    def test_a_table_that_is_none(self, tmp_path):
        pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match="no column 'image_id'"):
            read_captions(str(tmp_path), "train")

    def test_weights_for_another_encoder(self, samples, tmp_path):
        with pytest.raises(ConfigError, match="'tiny' has no published weights"):
            run(samples, tmp_path / "out", weights="imagenet")

    def test_a_captioner_of_another_shape_to_start_from(self, samples, model, tmp_path):
        settings = {"samples": samples, "output": str(tmp_path / "out"), "init_from": model}
        with pytest.raises(ConfigError, match="--hidden-dim 64 does not fit the captioner .*, which has 32"):
            train(TrainConfig(**settings, hidden_dim=64))
        with pytest.raises(ConfigError, match="not a captioner folder"):
            train(TrainConfig(**settings | {"init_from": str(tmp_path)}))

    def test_word_vectors_of_another_width(self, samples, tmp_path):
        (tmp_path / "vectors.txt").write_text("circle 1 2 3\n")
        with pytest.raises(ConfigError, match="give --embed-dim 3"):
            run(samples, tmp_path / "out", word_vectors=str(tmp_path / "vectors.txt"))

    def test_a_remote_output_needs_a_tracking_server(self, samples, s3):
        with pytest.raises(ConfigError, match="needs --tracking-uri: an MLflow server"):
            run(samples, f"{s3}/training")

    def test_an_output_that_holds_other_things(self, samples, tmp_path):
        (tmp_path / "thesis.txt").write_text("mine")
        with pytest.raises(OutputConflictError, match="holds 'thesis.txt' and no training"):
            run(samples, tmp_path)


def with_oddities(samples, folder) -> str:
    """The samples, one training image damaged, one with no word in its captions, one with a single caption."""
    folder.mkdir()
    for file in Path(samples).glob("*.parquet"):
        rows = pq.read_table(file).to_pylist()
        if file.name.startswith("train"):
            rows[0]["image"] = rows[0]["image"][:100]
            rows[1]["captions"] = ["...", ""]
            rows[2]["captions"] = rows[2]["captions"][:1]
        (folder / file.name).write_bytes(encode_parquet(pa.Table.from_pylist(rows, SAMPLES), 10))
    return str(folder)


CHANCE = {
    "captions_per_image": "1",
    "batch_size": 4,
    "accumulate_batches": 2,
    "grid_dropout": 0.2,
    "output_dropout": 0.3,
    "teacher_forcing_ratio": 0.5,
    "flip": 0.5,
    "ema_decay": 0.9,
    "schedule": "step",
    "schedule_epochs": 1,
}
"""What draws from chance or keeps a state between epochs (but for crops and colours, of which test_augmentation is)."""


@contextmanager
def a_worker_killed_in_the_second_epoch(output: str) -> Iterator[list[dict]]:
    """Kill one of the workers that run within the block as soon as ``output``, on S3, has a checkpoint of the midst of the
    second epoch; the metrics of the epochs there were then."""
    fs = s3fs.S3FileSystem(use_listings_cache=False)
    before: list[dict] = []

    def is_midway() -> bool:
        try:
            snapshot = json.loads(fs.cat_file(f"{output}/checkpoints/checkpoint_manager_snapshot.json"))
        except FileNotFoundError:
            return False
        metrics = snapshot["latest_checkpoint_result"]["metrics"]
        return (metrics["epoch"], metrics["step_in_epoch"]) == (1, 5)

    def kill() -> None:
        while not is_midway():
            time.sleep(0.05)
        before.extend(json.loads(fs.cat_file(f"{output}/history.json"))["epochs"])
        os.kill(max(ray_processes("RayTrainWorker")), signal.SIGKILL)

    with ThreadPoolExecutor(1) as pool:
        killer = pool.submit(kill)
        yield before
        killer.result()
    assert before


@contextmanager
def interrupted_after(num_epochs: int, output: str) -> Iterator[None]:
    """Ctrl-C once ``output``, on S3, has so many epochs."""
    fs, history = s3fs.S3FileSystem(use_listings_cache=False), f"{output}/history.json"

    def interrupt() -> None:
        while not fs.exists(history) or len(json.loads(fs.cat_file(history))["epochs"]) < num_epochs:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ThreadPoolExecutor(1) as pool:
            interrupter = pool.submit(interrupt)
            yield
            interrupter.result()
    finally:
        signal.signal(signal.SIGINT, before)


VECTORS = {"and": np.arange(16.0), "circle": -np.arange(16.0)}


def without_times(metrics: list[dict]) -> list[dict]:
    return [{k: v for k, v in epoch.items() if "second" not in k} for epoch in metrics]


@dataclass
class Trainings:
    """One whose worker was killed, and which was then stopped by Ctrl-C and taken up, and one that was never stopped."""

    samples: str
    output: str
    settings: dict
    store: str
    before: list[dict]
    killed: TrainResult
    said: str
    folder: Path
    whole: TrainResult


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_cluster")
class TestATrainingWhoseWorkerIsKilled:
    @pytest.fixture(scope="class")
    def trainings(self, samples, s3, ray_cluster, tmp_path_factory) -> Iterator[Trainings]:
        folder = tmp_path_factory.mktemp("trainings")
        odd = with_oddities(samples, folder / "odd")
        text = "".join(f"{word} {' '.join(map(str, vector))}\n" for word, vector in VECTORS.items())
        (folder / "vectors.txt").write_text(text)
        settings = {**CHANCE, "word_vectors": str(folder / "vectors.txt"), "freeze_word_vectors": True}
        store, output = f"sqlite:///{folder}/mlflow.db", f"{s3}/killed"
        with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as said:
            patch.chdir(folder)  # MLflow's own place for files
            with (
                interrupted_after(3, output),
                pytest.raises(Interrupted, match="goes on from the last checkpoint"),
                a_worker_killed_in_the_second_epoch(output) as before,
            ):
                run(odd, output, epochs=1000, **settings, tracking_uri=store, checkpoint_every_steps=5)
            assert not ray_processes("RayTrainWorker"), "they do not go on in the cluster"
            done = len(json.loads(s3fs.S3FileSystem(use_listings_cache=False).cat_file(f"{output}/history.json"))["epochs"])
            killed = run(odd, output, epochs=done + 1, **settings, tracking_uri=store)
            with in_process():
                whole = run(odd, folder / "whole", epochs=len(killed.metrics), **settings)
            yield Trainings(odd, output, settings, store, before, killed, said.getvalue(), folder / "whole", whole)

    def test_an_epoch_with_a_checkpoint_is_not_done_again(self, trainings):
        assert trainings.killed.metrics[0] == trainings.before[0]

    def test_it_goes_on_in_the_midst_of_an_epoch(self, trainings):
        assert "epoch 2 goes on after step 5\n" in trainings.said

    def test_it_has_the_losses_and_weights_of_one_that_was_never_stopped(self, trainings):
        killed, whole = trainings.killed, trainings.whole
        assert without_times(killed.metrics) == without_times(whole.metrics)
        assert load_captioner(killed.last)[1] == load_captioner(whole.last)[1]

    def test_what_is_left_out_is_said(self, trainings):
        assert "word vectors for 2 of " in trainings.said
        assert "2 captions without a word left out" in trainings.said
        assert "1 image that could not be decoded" in trainings.said

    def test_its_figures(self, trainings):
        metrics = trainings.whole.metrics
        assert [epoch["learning_rate"] for epoch in metrics[:3]] == pytest.approx([1e-3, 0.8e-3, 0.64e-3])
        for number, epoch in enumerate(metrics, 1):
            assert (epoch["epoch"], epoch["train_images"], epoch["val_images"]) == (number, 46, 6)
            assert 0 < epoch["train_loss"] < 10
            assert all(0 <= epoch[f"val_{fed}_top5_accuracy"] <= 1 for fed in ("free_running", "teacher_forced"))
            assert epoch["val_perplexity"] == pytest.approx(np.exp(epoch["val_loss"]))

    def test_it_is_tracked_and_reported(self, trainings):
        check_tracking(trainings.store, trainings.killed)
        whole = trainings.whole
        assert check_tracking(f"sqlite:///{trainings.folder}/mlflow.db", whole) == len(whole.metrics) >= 4
        check_report(trainings.folder, len(whole.metrics))

    def test_word_vectors_stay_as_they_are_given(self, trainings):
        captioner, _ = load_captioner(trainings.whole.last)
        for word, vector in VECTORS.items():
            row = captioner.decoder.embedding.weight[captioner.vocabulary.encode([word])[0]]
            assert row.tolist() == pytest.approx(vector.tolist())

    def test_other_settings_are_refused(self, trainings):
        settings = {**trainings.settings, "tracking_uri": trainings.store, "learning_rate": 0.5}
        with pytest.raises(OutputConflictError, match="--learning-rate: 0.001 -> 0.5"):
            run(trainings.samples, trainings.output, epochs=4, **settings)

    def test_a_second_stage_starts_from_its_captioner(self, trainings, tmp_path):
        first, _ = load_captioner(trainings.whole.last)
        second = TrainConfig(
            samples=trainings.samples,
            output=str(tmp_path / "second"),
            init_from=trainings.whole.last,
            fine_tune_from="layer4",
            freeze_word_vectors=True,
            epochs=1,
            tracking_uri="none",
            cpus_per_worker=1,
            encoder_learning_rate=1e-3,
        )
        with in_process():
            tuned, _ = load_captioner(train(second).last)
        assert tuned.architecture == first.architecture and tuned.vocabulary.words == first.vocabulary.words
        changed = {name: not torch.equal(value, first.state_dict()[name]) for name, value in tuned.state_dict().items()}
        assert changed["encoder.backbone.layer4.0.weight"] and changed["decoder.output.weight"]
        assert not changed["encoder.backbone.layer3.0.weight"] and not changed["decoder.embedding.weight"]


def check_report(output, num_epochs):
    said = report_training(ReportConfig(training=str(output), html=str(output.parent / "report.html")))
    assert said.endswith(f"{num_epochs} epochs, 6 samples")
    assert (output.parent / "report.html").read_text().count("data:image/jpeg") == 6


def check_tracking(store, result) -> int:
    """The points of the curve of BLEU-4: an epoch that is done again after a kill is told again, to the same value."""
    client = MlflowClient(store)
    (experiment,) = [e for e in client.search_experiments() if e.name == "capray"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["hidden_dim"] == str(TINY["hidden_dim"])
    assert "tracking_uri" not in found.data.params
    history = client.get_metric_history(found.info.run_id, "bleu_4")
    points = [(m.step, m.value) for m in history]
    assert list(dict.fromkeys(points)) == [(e["epoch"], e["bleu_4"]) for e in result.metrics]
    logged = find_model(f"runs:/{found.info.run_id}/captioner", store)
    assert load_captioner(logged)[1] == load_captioner(result.best)[1]
    samples = {file.path for file in client.list_artifacts(found.info.run_id, "samples")}
    assert samples >= {"samples/epoch-001.json", "samples/epoch-001.html", "samples/epoch-002.json"}
    return len(points)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("ray_cluster")
def test_samples_and_output_on_s3_and_early_stopping(samples, s3):
    fs = s3fs.S3FileSystem()
    for file in Path(samples).iterdir():
        fs.put_file(str(file), f"{s3}/samples/{file.name}")
    settings = {"tracking_uri": "none", "attention": "none", "doubly_stochastic": 0, "captions_per_image": "1"}
    with in_process():
        result = run(f"{s3}/samples", f"{s3}/training", epochs=9, patience=1, learning_rate=1e-9, **settings)
    assert len(result.metrics) == 2, "no better after the first epoch"
    assert load_captioner(f"{s3}/training/best")[0].decoder.attention is None
