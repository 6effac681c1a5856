"""What older versions wrote is opened, finished and gone on with: nothing is locked out by an upgrade.

tests/fixtures/make.py says how a version's world was made and what is in it. It lies under /tmp where it lay then, for
listings and ids hold absolute paths; outputs are worked on in copies.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas as pd
import pytest
import yaml

from capray import cli
from capray.config import CaptionConfig, Decoding, TrainConfig, VerifyConfig
from capray.images import load
from capray.model.checkpoint import load_captioner
from capray.output.verify import verify
from tests.chaos_driver import short_lease
from tests.conftest import in_process
from tests.local_executor import captioning_in_process
from tests.oracle import check_exactly_once, digests, read_parts

FIXTURES = Path(__file__).parent / "fixtures"
VERSIONS = sorted(path.name for path in FIXTURES.glob("v*"))

pytestmark = pytest.mark.timeout(300)


@dataclass
class World:
    """What a version left: its files below ``home``, and what it said about them in ``expected``."""

    home: Path
    expected: dict[str, Any]

    @property
    def photos(self) -> list[Path]:
        return [self.home / "photos" / name for name in self.expected["photos"]]


@pytest.fixture(scope="module", params=VERSIONS)
def world(request) -> Iterator[World]:
    home = Path("/tmp") / f"capray-{request.param}"
    with open(f"{home}.lock", "w") as lock:  # Another session of tests may be there.
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(home, ignore_errors=True)
        with tarfile.open(FIXTURES / request.param / "world.tar.xz") as archive:
            archive.extractall(home.parent, filter="data")
        yield World(home, json.loads((FIXTURES / request.param / "expected.json").read_text()))
        shutil.rmtree(home)


@pytest.fixture
def without_ray() -> Iterator[None]:
    with captioning_in_process():
        yield


class HalfDone:
    """A copy of the output ``name``, left with its lease as the kill left it, or without.

    Attributes:
        command: the one that began it.
        captions: by SHA-256, what the old version says of an image.
    """

    def __init__(self, world: World, name: str, copy: Path, leased: bool = False):
        self.expected = world.expected["outputs"][name]
        self.captions = {bytes.fromhex(digest): text for digest, text in world.expected["captions"].items()}
        original = str(world.home / "out" / name)
        self.output = copy / "out"
        shutil.copytree(original, self.output)
        self.lease, self.job = (self.output / "_capray" / file for file in ("lease.json", "job.json"))
        self.inputs = self.expected["command"][1 : self.expected["command"].index(original)]
        self.command = [str(self.output) if word == original else word for word in self.expected["command"]]
        self.before = self.parts()
        if not leased:
            self.lease.unlink(missing_ok=True)

    def parts(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for table in ("captions", "failures") for path in self.rows_of(table)}

    def rows_of(self, table: str) -> list[Path]:
        return sorted((self.output / table).glob("*.parquet"))

    def finish(self) -> None:
        """The same command does the rest, and the whole is what an undisturbed run of the old version gave."""
        assert cli.run(self.command) == 0
        wanted = digests(*self.inputs)
        check_exactly_once(str(self.output), wanted, self.captions, self.expected["failed"])
        num_rows = sum(len(read_parts(str(self.output), table)) for table in ("captions", "failures"))
        assert num_rows == len(wanted), "what was done is not done again"
        parts = self.parts()
        assert parts.items() >= self.before.items(), "parts of the old version stay as they are"
        assert not self.lease.exists()
        verification = verify(VerifyConfig(output=str(self.output), against=tuple(self.inputs)))
        assert not verification.problems, verification.text()
        assert cli.run(self.command) == 0
        assert self.parts() == parts, "there is nothing left to do"


@pytest.mark.parametrize("name", ["listing", "table"])
def test_an_output_half_done_is_finished_by_the_same_command(world, name, tmp_path, without_ray):
    HalfDone(world, name, tmp_path).finish()


def test_and_on_ray(world, tmp_path, ray_cluster):
    HalfDone(world, "tars", tmp_path).finish()


@pytest.mark.slow
def test_a_lease_left_behind_is_taken_over(world, tmp_path, without_ray):
    """The host and process of the old lease are unknown here, so it has to run out."""
    half_done = HalfDone(world, "folder", tmp_path, leased=True)
    assert half_done.lease.exists()
    with short_lease():
        half_done.finish()


@contextmanager
def renewed(lease: Path) -> Iterator[dict[str, Any]]:
    """The lease of an older version that runs on another node, which renews it."""
    claim = json.loads(lease.read_text()) | {"host": "another-node", "boot": "of another-node"}
    over = threading.Event()

    def write() -> None:
        claim["sequence"] += 1
        lease.with_suffix(".new").write_text(json.dumps(claim))
        os.replace(lease.with_suffix(".new"), lease)

    def renew() -> None:
        while not over.wait(0.2):
            write()

    write()
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield claim
    finally:
        over.set()
        thread.join()


def test_a_live_lease_of_an_older_version_is_honoured(world, tmp_path, capfd):
    half_done = HalfDone(world, "folder", tmp_path, leased=True)
    with renewed(half_done.lease) as claim:
        assert cli.run(half_done.command) not in (0, 1)
        assert json.loads(half_done.lease.read_text())["token"] == claim["token"]
    assert f"process {claim['pid']} on another-node" in capfd.readouterr().err
    assert half_done.parts() == half_done.before


def test_a_file_of_the_input_that_could_not_be_read_is_asked_again_when_it_is_mended(world, tmp_path, without_ray):
    half_done = HalfDone(world, "torn", tmp_path)
    shutil.copy(world.home / "mended" / "torn.parquet", world.home / "torn" / "torn.parquet")
    half_done.finish()


def test_settings_the_version_of_an_output_did_not_know_count_as_their_defaults(world, tmp_path, capfd, without_ray):
    half_done = HalfDone(world, "table", tmp_path)
    job = json.loads(half_done.job.read_text())
    for name in ("n_best", "length_penalty", "no_repeat_ngram", "allow_unk"):
        del job["decoding"][name]
    for name in ("kept_columns", "attention", "shard"):
        del job[name]
    half_done.job.write_text(json.dumps(job))
    for flags in (["--no-repeat-ngram", "2"], ["--attention"], ["--shard", "1/2"]):
        assert cli.run([*half_done.command, *flags]) == 2
        assert flags[0] in capfd.readouterr().err
    half_done.finish()


def test_an_output_half_done_can_be_queried_and_verified(world, tmp_path, capsys):
    half_done = HalfDone(world, "folder", tmp_path, leased=True)
    assert cli.run(["query", str(half_done.output), "SELECT count(*) AS n FROM captions", "--format", "csv"]) == 0
    assert capsys.readouterr().out.split() == ["n", str(len(read_parts(str(half_done.output), "captions")))]
    assert not verify(VerifyConfig(output=str(half_done.output))).problems


TIMES = ("train_seconds", "train_images_per_second", "val_images_per_second")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_training_half_done_goes_on_as_if_it_had_never_been_stopped(world, ray_cluster):
    history = world.home / "training" / "history.json"
    (first,) = json.loads(history.read_text())["epochs"]
    with in_process():
        assert cli.run(world.expected["training"]["command"]) == 0
    epochs = json.loads(history.read_text())["epochs"]
    assert epochs[0] == first
    for found, wanted in zip(epochs, world.expected["training"]["metrics"], strict=True):
        assert found.keys() >= wanted.keys()
        rest = wanted.keys() - set(TIMES)
        assert {name: found[name] for name in rest} == pytest.approx({name: wanted[name] for name in rest}, rel=1e-3)
    for name in ("best", "last"):
        load_captioner(str(world.home / "training" / name))


def test_settings_the_version_of_a_training_did_not_know_count_as_their_defaults(world, tmp_path, capfd):
    training = tmp_path / "training"
    shutil.copytree(world.home / "training", training)
    place = training / "training.json"
    record = json.loads(place.read_text())
    for name in ("color_jitter", "label_smoothing", "initial_state", "mean", "max_image_pixels", "feature_cache"):
        record["settings"].pop(name, None)
    place.write_text(json.dumps(record))
    done = len(json.loads((training / "history.json").read_text())["epochs"])
    command = list(world.expected["training"]["command"])
    command[command.index(str(world.home / "training"))] = str(training)
    command[command.index("--epochs") + 1] = str(done)
    assert cli.run([*command, "--label-smoothing", "0.3"]) == 2
    assert "--label-smoothing" in capfd.readouterr().err
    assert cli.run(command) == 0, "all epochs are done"


def test_the_captioner_captions_as_it_did(world):
    captioner, model_id = load_captioner(str(world.home / "captioner"))
    pixels = [load(photo.read_bytes(), captioner.architecture)[0] for photo in world.photos]
    found = captioner.caption(captioner.encode_all(pixels), Decoding(**world.expected["decoding"]))
    assert len({best.caption for best, *_ in found}) > 3, "they would not tell one image from another"
    for (best, *_), wanted in zip(found, world.expected["captioner"], strict=True):
        assert (model_id, best.caption) == (wanted["model_id"], wanted["caption"])
        assert (best.log_prob, best.score) == pytest.approx((wanted["log_prob"], wanted["score"]), abs=1e-3)


def test_the_model_in_mlflow_predicts_as_it_did(world):
    model = mlflow.pyfunc.load_model(str(world.home / "mlflow-model"))
    frame = pd.DataFrame({"image": [photo.read_bytes() for photo in world.photos]})
    found = model.predict(frame, params=world.expected["decoding"]).to_dict("records")
    for row, wanted in zip(found, world.expected["mlflow"], strict=True):
        assert (row["caption"], row["error"]) == (wanted["caption"], None)
        assert (row["log_prob"], row["score"]) == pytest.approx((wanted["log_prob"], wanted["score"]), abs=1e-3)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("name", "config"), [("caption", CaptionConfig), ("train", TrainConfig)])
def test_a_file_of_settings_means_what_it_meant(version, name, config):
    path = FIXTURES / version / f"{name}.yaml"
    meant = yaml.safe_load(path.read_text())
    found = config.from_yaml(path).model_dump(mode="json")
    assert {key: found[key] for key in meant} == meant
