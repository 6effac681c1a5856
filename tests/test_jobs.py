"""What is given to `ray job submit`: a real head with its own ports, folder and token; train, then caption."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import yaml
from mlflow import MlflowClient
from PIL import Image

from capray.config import TrainConfig
from capray.tables import SAMPLES, encode_parquet
from capray.training.job import train
from tests.conftest import TINY, free_port, image_bytes, in_process

ROOT = Path(__file__).parents[1]
RAY = str(Path(sys.executable).parent / "ray")


@pytest.fixture
def head(s3):
    """A Ray head with token authentication; the environment its clients need."""
    folder = tempfile.mkdtemp(prefix="capray-head-", dir="/tmp")  # Ray's socket paths must stay short.
    token = Path(folder) / "token"
    token.write_text(uuid.uuid4().hex)
    dashboard, gcs = free_port(), free_port()
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", f"--port={gcs}", f"--temp-dir={folder}/ray"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_port()}"]
    command += [f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats"]
    with open(f"{folder}/log", "w") as log:
        started = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield environment | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        os.killpg(started.pid, signal.SIGTERM)
        try:
            started.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def submit(head, script, *arguments) -> str:
    """Submit a job, wait for its end and return its log; it must succeed."""
    job_id = f"{Path(script).stem}-{uuid.uuid4().hex[:6]}"
    command = [RAY, "job", "submit", "--submission-id", job_id, "--working-dir", str(ROOT)]
    command += ["--runtime-env-json", '{"excludes": [".git", ".venv", "tests", "notebooks"]}', "--"]
    command += [sys.executable, script, *map(str, arguments)]
    deadline = time.monotonic() + 90
    while True:
        submitted = subprocess.run(command, env=head, capture_output=True, text=True)
        if f"'{job_id}' succeeded" in submitted.stdout:
            return submitted.stdout
        assert "Connection refused" in submitted.stderr and time.monotonic() < deadline, submitted.stdout + submitted.stderr
        time.sleep(1)


STANDSTILL = {
    **TINY,
    "size": 16,
    "batch_size": 40,
    "min_word_count": 1,
    "beam_size": 2,
    "max_length": 5,
    "learning_rate": 1e-12,
    "epochs": 1,
    "cpus_per_worker": 0.5,
}
"""A training that changes nothing, so that figures depend on who counts alone."""


def noise(folder: Path) -> str:
    """20 training and 150 validation images with captions of chance."""
    rng = np.random.default_rng(0)
    words = ["a", "red", "green", "dog", "runs", "sits", "here", "now"]
    folder.mkdir()
    for split, number in (("train", 20), ("dev", 150)):
        rows = [
            {
                "image_id": f"{split}-{i:04d}",
                "image": image_bytes(Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))),
                "captions": [" ".join(rng.choice(words, 1 + int(rng.integers(6)))) for _ in range(1 + i % 3)],
                "split": split,
            }
            for i in range(number)
        ]
        (folder / f"{split}.parquet").write_bytes(encode_parquet(pa.Table.from_pylist(rows, SAMPLES), 70))
    return str(folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_submit_train_with_two_workers_who_validate_as_one_does_which_goes_on_then_caption_from_s3(
    head, samples, s3, ray_cluster, tmp_path
):
    settings, noisy = tmp_path / "tiny.yaml", noise(tmp_path / "samples")
    settings.write_text(yaml.safe_dump(STANDSTILL))
    training, prefix = tmp_path / "training", f"{s3}/jobs-{uuid.uuid4().hex[:6]}"
    log = submit(
        head, "jobs/train.py", noisy, training, "--config", settings, "--num-workers", "2", "--checkpoint-every-steps", "1"
    )
    assert "best epoch 1" in log
    assert "encoding the 20 images of split train once" in log, "the frozen encoder's features are cached"
    client = MlflowClient(f"sqlite:///{training}/mlflow.db")
    experiment = client.get_experiment_by_name("capray")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.data.params["num_workers"]) == ("FINISHED", "2")
    assert {"train_loss", "val_loss", "bleu_4"} <= run.data.metrics.keys()
    with in_process():
        (one,) = train(TrainConfig(samples=noisy, output=str(tmp_path / "one"), tracking_uri="none", **STANDSTILL)).metrics
    (two,) = json.loads((training / "history.json").read_text())["epochs"]
    assert one["val_images"] == two["val_images"] == 150
    assert one["train_images"] == two["train_images"] == 20
    for name in ("val_loss", "val_perplexity", "bleu_1", "bleu_2", "bleu_3", "bleu_4"):
        assert two[name] == pytest.approx(one[name], rel=1e-5), name
    assert one["bleu_1"] > 0
    settings = {**STANDSTILL, "epochs": 2}
    with in_process():
        assert train(TrainConfig(samples=noisy, output=str(training), **settings)).metrics[0] == two, "one worker goes on"
    (again,) = client.search_runs([experiment.experiment_id])
    assert (again.info.run_id, again.info.status) == (run.info.run_id, "FINISHED")

    fs = s3fs.S3FileSystem(use_listings_cache=False)
    table = pq.read_table(f"{samples}/test-00000.parquet")
    for row in table.to_pylist():
        fs.pipe_file(f"{prefix}/photos/{row['image_id']}", row["image"])
    fs.put(str(training / "best"), f"{prefix}/model", recursive=True)
    log = submit(
        head, "jobs/caption.py", f"{prefix}/photos", f"{prefix}/out", "--model", f"{prefix}/model", "--num-actors", "1"
    )
    assert "6 images: 6 captioned, 0 failed" in log
    (part,) = fs.ls(f"{prefix}/out/captions")
    found = pq.read_table(part, filesystem=fs)
    assert set(found["image_id"].to_pylist()) == {f"{prefix}/photos/{i}" for i in table["image_id"].to_pylist()}


def test_the_cluster_file_is_one_that_ray_accepts():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    config.setdefault("cluster_synced_files", [])
    validate_config(config)
    start = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "ray-2." not in " ".join(config["setup_commands"]), "the nightly wheel of the defaults"


@pytest.mark.parametrize("recipe", sorted((ROOT / "jobs" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid_settings(recipe):
    TrainConfig.from_yaml(recipe, samples="s", output="o")
