"""What a training tells MLflow, against a real server, and one that goes away."""

import base64
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from capray.captioning.actor import CaptioningActor
from capray.captioning.job import caption
from capray.captioning.model_transfer import ModelTransfer
from capray.captioning.photos import caption_photos
from capray.config import CaptionConfig, Decoding, TrainConfig
from capray.errors import CheckpointError, ConfigError, StorageError
from capray.images import load
from capray.model.captioner_files import FILES
from capray.model.checkpoint import load_captioner
from capray.tracking.model_format import write_model
from capray.tracking.registry import find_model, without_credentials
from capray.tracking.runs import Points, TextFile, Tracker, shown_settings
from capray.training.job import train
from tests.conftest import free_port, in_process, write_photos
from tests.local_executor import LocalExecutor
from tests.mlflow_server import MlflowServer
from tests.oracle import check_exactly_once
from tests.test_training import SETTINGS

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()


def config_of(samples, output, **settings) -> TrainConfig:
    return TrainConfig(samples=str(samples), output=str(output), **{**SETTINGS, **settings})


def start(config, known_run_id=None, **parameters):
    """A started tracker, and what it says."""
    said: list[str] = []
    tracker = Tracker(config)
    tracker.start(known_run_id, parameters, "d" * 64, said.append)
    return tracker, said


def read(server, run_id, path) -> str:
    return Path(server.client.download_artifacts(run_id, path)).read_text("utf-8")


class Trained:
    """A training that was tracked and registered."""

    def __init__(self, server, samples, folder):
        self.config = config_of(
            samples,
            folder / "first",
            epochs=2,
            log_every_steps=2,
            tracking_uri=server.uri,
            experiment="trained",
            register_as="shapes",
        )
        with in_process():
            self.result = train(self.config)
        client = server.client
        (self.run,) = client.search_runs([client.get_experiment_by_name("trained").experiment_id])
        self.run_id = self.run.info.run_id
        self.model_id = load_captioner(self.result.best)[1]


@pytest.fixture(scope="module")
def trained(server, samples, ray_cluster, tmp_path_factory):
    return Trained(server, samples, tmp_path_factory.mktemp("trained"))


@pytest.mark.slow
class TestATrainedRun:
    def test_has_the_settings_the_data_and_the_code(self, server, trained, samples):
        run, config = trained.run, trained.config
        assert run.info.status == "FINISHED"
        for name, value in config.model_dump(mode="json").items():
            assert run.data.params.get(name) == (None if name == "tracking_uri" else str(value))
        digest = json.loads((Path(samples) / "_dataset.json").read_text())["digest"]
        assert run.data.params["dataset_digest"] == digest
        assert run.inputs.dataset_inputs[0].dataset.digest == digest[:36]
        assert run.data.tags["capray.version"]
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        assert run.data.tags.get("mlflow.source.git.commit", "") == head.stdout.strip()

    def test_its_settings_can_be_trained_with(self, server, trained):
        settings = yaml.safe_load(read(server, trained.run_id, "config.yaml"))
        assert TrainConfig.create(settings, tracking_uri=server.uri) == trained.config

    def test_has_a_curve_per_step_and_one_per_epoch(self, server, trained):
        history = {
            name: [(m.step, m.value) for m in server.client.get_metric_history(trained.run_id, name)]
            for name in ("bleu_4", "train_loss", "step/loss", "step/learning_rate", "step/images_per_second")
        }
        epochs = trained.result.metrics
        assert history["bleu_4"] == [(e["epoch"], e["bleu_4"]) for e in epochs]
        assert [e["train_images"] for e in epochs] == [48, 48]
        steps = [step for step, _ in history["step/loss"]]
        assert steps == list(range(2, 2 * len(steps) + 1, 2)) and len(steps) >= 4
        assert {value for _, value in history["step/learning_rate"]} == {trained.config.learning_rate}
        assert min(value for _, value in history["step/images_per_second"]) > 0
        losses = [value for _, value in history["step/loss"]]
        assert min(losses) <= history["train_loss"][0][1] <= max(losses), "means of one epoch's steps"

    def test_shows_pictures_with_captions_for_each_best_epoch(self, server, trained):
        names = {file.path for file in server.client.list_artifacts(trained.run_id, "samples")}
        assert {"samples/epoch-001.json", "samples/epoch-002.json", "samples/epoch-001.html"} <= names
        samples = json.loads(read(server, trained.run_id, "samples/epoch-001.json"))
        page = read(server, trained.run_id, "samples/epoch-001.html")
        assert len(samples) == 6 and page.count("<img ") == 6
        assert all(reference in page for sample in samples for reference in sample["references"])

    def test_its_model_captions_as_the_captioner_does(self, server, trained, tmp_path, monkeypatch):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        mlflow.set_tracking_uri(server.uri)
        photos = [Path(path).read_bytes() for path in write_photos(tmp_path, 3)]
        model = mlflow.pyfunc.load_model(trained.result.registered)
        found = model.predict(pd.DataFrame({"image": photos}), params={"beam_size": 3})
        check_captions(found, trained.result.best, photos, trained.config.subset(Decoding), beam_size=3)

    def test_the_same_command_again_registers_nothing_new(self, server, trained):
        again = train(trained.config)
        assert again.registered == trained.result.registered == "models:/shapes/1"
        assert len(server.client.search_model_versions("name = 'shapes'")) == 1
        assert len(server.client.get_run(trained.run_id).outputs.model_outputs) == 1

    def test_every_name_of_its_model_is_the_captioner(self, server, trained):
        server.client.set_registered_model_alias("shapes", "champion", "1")
        (output,) = server.client.get_run(trained.run_id).outputs.model_outputs
        names = ["shapes/1", "shapes@champion", "shapes/latest", output.model_id]
        for name in [*(f"models:/{name}" for name in names), f"runs:/{trained.run_id}/captioner"]:
            assert load_captioner(find_model(name, server.uri))[1] == trained.model_id, name

    def test_captions_a_folder_by_its_registered_name(self, server, trained, tmp_path, monkeypatch):
        photos = write_photos(tmp_path / "photos", 4)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        config = CaptionConfig(input=str(tmp_path / "photos"), output=str(tmp_path / "out"), model="models:/shapes@champion")
        server.client.set_registered_model_alias("shapes", "champion", "1")
        assert caption(config, LocalExecutor(CaptioningActor)).model_id == trained.model_id
        assert set(check_exactly_once(str(tmp_path / "out"), set(photos))) == set(photos)

    def test_a_training_starts_from_its_registered_name(self, server, trained, samples, tmp_path):
        config = TrainConfig(
            samples=samples,
            output=str(tmp_path / "second"),
            init_from="models:/shapes/1",
            learning_rate=1e-12,
            fine_tune_from="all",
            encoder_learning_rate=1e-12,
            epochs=1,
            cpus_per_worker=1,
            tracking_uri=server.uri,
            experiment="second",
        )
        with in_process():
            result = train(config)
        tuned, first = (load_captioner(folder)[0] for folder in (result.last, trained.result.best))
        assert tuned.vocabulary.words == first.vocabulary.words
        for name, value in first.state_dict().items():
            torch.testing.assert_close(tuned.state_dict()[name], value, atol=1e-6, rtol=1e-5, msg=name)
        (run,) = server.client.search_runs([server.client.get_experiment_by_name("second").experiment_id])
        assert run.data.params["init_from"] == "models:/shapes/1"

    def test_captions_a_photo_by_its_registered_name(self, server, trained, tmp_path, capsys):
        (photo,) = write_photos(tmp_path, 1)
        caption_photos([photo], CaptionConfig(input=photo, model="models:/shapes/1", tracking_uri=server.uri))
        assert capsys.readouterr().out.startswith(f"{photo}\t")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("models:/shapse/1", "no registered model 'shapse'"),
            ("models:/shapes/7", "no version '7'; its latest: 1"),
            ("models:/shapes@best", "no alias 'best'; its aliases: "),
            ("models:/shapes", "names no version: models:/shapes/1"),
            ("models:/m-1234", "no logged model 'm-1234'"),
            ("runs:/1234/captioner", "no run '1234'"),
        ],
    )
    def test_what_is_not_there_is_named(self, server, trained, name, message):
        with pytest.raises(ConfigError) as error:
            find_model(name, server.uri)
        assert message in str(error.value)

    def test_a_run_without_that_model(self, server, trained):
        with pytest.raises(ConfigError, match="no model and no artifacts of the name 'model'"):
            find_model(f"runs:/{trained.run_id}/model", server.uri)
        with pytest.raises(CheckpointError, match="no captioner of capray's"):
            find_model(f"runs:/{trained.run_id}/samples", server.uri)


def check_captions(found, best, photos, decoding, **parameters):
    captioner, _ = load_captioner(best)
    pixels = [load(photo, captioner.architecture)[0] for photo in photos]
    decoding = decoding.model_copy(update=parameters)
    expected = [hypotheses[0] for hypotheses in captioner.caption(captioner.encode_all(pixels), decoding)]
    assert list(found["caption"]) == [hypothesis.caption for hypothesis in expected]
    np.testing.assert_allclose(found["log_prob"], [h.log_prob for h in expected], atol=1e-4)
    np.testing.assert_allclose(found["score"], [h.score for h in expected], atol=1e-4)
    assert found["error"].isna().all()


class TestFlavour:
    @pytest.fixture(scope="class")
    def folder(self, model, tmp_path_factory):
        folder = tmp_path_factory.mktemp("flavour") / "model"
        files = {name: (Path(model) / name).read_bytes() for name in FILES}
        write_model(str(folder), files, Decoding(beam_size=2, max_length=6))
        return folder

    def test_holds_no_pickle_and_nothing_of_the_working_folder(self, folder):
        suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
        assert suffixes == {"", ".json", ".safetensors", ".yaml", ".txt"}

    def test_bytes_paths_and_bad_images_under_their_index(self, folder, model, tmp_path):
        paths = write_photos(tmp_path, 3)
        photos = [Path(path).read_bytes() for path in paths]
        frame = pd.DataFrame(
            {"image": [photos[0], None, b"no image", None], "uri": [None, paths[1], None, "/no/such/photo.jpg"]},
            index=[7, 3, 9, 1],
        )
        found = mlflow.pyfunc.load_model(str(folder)).predict(frame)
        assert list(found.index) == [7, 3, 9, 1]
        check_captions(found.loc[[7, 3]], model, photos[:2], Decoding(beam_size=2, max_length=6))
        assert found.loc[[9, 1], "caption"].isna().all()
        assert "not_an_image" in found.loc[9, "error"] or "image" in found.loc[9, "error"]
        assert "/no/such/photo.jpg" in found.loc[1, "error"]

    def test_a_parameter_out_of_its_range(self, folder, tmp_path):
        frame = pd.DataFrame({"image": [Path(write_photos(tmp_path, 1)[0]).read_bytes()]})
        with pytest.raises(ConfigError, match="beam_size"):
            mlflow.pyfunc.load_model(str(folder)).predict(frame, params={"beam_size": 0})

    def test_a_frame_without_images(self, folder):
        with pytest.raises(Exception, match="image"):
            mlflow.pyfunc.load_model(str(folder)).predict(pd.DataFrame({"picture": [b""]}))

    @pytest.mark.slow
    def test_answers_requests_with_base64(self, folder, model, tmp_path):
        port = free_port()
        command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(folder), "--env-manager", "local"]
        with open(tmp_path / "log", "w") as log:
            serving = subprocess.Popen(
                [*command, "-p", str(port)], start_new_session=True, stdout=log, stderr=log, cwd=tmp_path
            )
        try:
            photo = Path(write_photos(tmp_path, 1)[0]).read_bytes()
            records = [{"image": base64.b64encode(photo).decode()}]
            answer = post(f"http://127.0.0.1:{port}/invocations", {"dataframe_records": records}, serving)
        finally:
            os.killpg(serving.pid, 9)
            serving.wait()
        check_captions(pd.DataFrame(answer["predictions"]), model, [photo], Decoding(beam_size=2, max_length=6))


def post(url, body, server):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    deadline = time.monotonic() + 300
    while True:
        try:
            return json.load(urllib.request.urlopen(request, timeout=60))
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.5)


def test_a_long_setting_is_cut_visibly_and_whole_in_the_file(server, tmp_path):
    config = config_of(tmp_path / ("x" * 200) / ("y" * 200) / ("z" * 200), tmp_path / "out", tracking_uri=server.uri)
    tracker, said = start(config)
    tracker.close("FINISHED")
    assert not said
    run = server.client.get_run(tracker.run_id)
    assert len(run.data.params["samples"]) == 500
    assert run.data.params["samples"].endswith("… (whole in config.yaml)")
    assert yaml.safe_load(read(server, tracker.run_id, "config.yaml"))["samples"] == config.samples


class TestAServerThatFails:
    """The server of the tests above; the test that does not start it again comes last."""

    @pytest.fixture(autouse=True)
    def few_attempts(self, monkeypatch):
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    def test_is_an_error_at_the_start_before_the_samples_are_read(self, tmp_path):
        began = time.monotonic()
        uri = f"http://me:secret@127.0.0.1:{free_port()}"
        with pytest.raises(StorageError, match="MLflow at 'http://…@127.0.0.1:.*connection refused.*'none'") as error:
            train(config_of(tmp_path / "no-samples", tmp_path / "out", tracking_uri=uri))
        assert "secret" not in str(error.value)
        assert time.monotonic() - began < 30
        assert not (tmp_path / "out").exists()

    def test_a_registry_that_does_not_answer(self):
        with pytest.raises(StorageError, match="connection refused"):
            find_model("models:/shapes/1", f"http://127.0.0.1:{free_port()}")

    def test_a_registry_that_is_not_named(self, monkeypatch):
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with pytest.raises(ConfigError, match="give --tracking-uri, or set MLFLOW_TRACKING_URI"):
            find_model("models:/shapes/1")

    @pytest.mark.slow
    def test_away_for_a_while_it_gets_all_of_it_in_the_end(self, server, tmp_path):
        tracker, said = start(config_of(tmp_path, tmp_path / "out", tracking_uri=server.uri))
        tracker.put(Points({"a": 1.0}, 1))
        wait_until(lambda: server.client.get_run(tracker.run_id).data.metrics == {"a": 1.0})
        server.stop()
        for step in range(2, 3000):
            tracker.put(Points({"a": float(step)}, step))
        tracker.put(TextFile("samples/one.json", "[]"))
        wait_until(lambda: said)
        server.start()
        wait_until(lambda: len(said) == 2)
        tracker.close("FINISHED")
        assert said[0].startswith("MLflow fails (connection refused); the training goes on")
        assert said[1:] == ["MLflow answers again"]
        found = server.client.get_metric_history(tracker.run_id, "a")
        assert [m.step for m in found] == list(range(1, 3000))
        assert read(server, tracker.run_id, "samples/one.json") == "[]"
        assert server.client.get_run(tracker.run_id).info.status == "FINISHED"

        resumed, said = start(config_of(tmp_path, tmp_path / "out", tracking_uri=server.uri), tracker.run_id)
        assert resumed.run_id == tracker.run_id
        assert server.client.get_run(tracker.run_id).info.status == "RUNNING"
        resumed.put(TextFile("../../outside.txt", "x"))
        resumed.close("KILLED")
        assert said[-1].startswith(f"tracking is incomplete: {server.uri} lacks files in ../.. (")
        assert server.client.get_run(tracker.run_id).info.status == "KILLED", "what is refused holds up nothing"

    @pytest.mark.slow
    def test_gone_for_good_it_does_not_end_the_training(self, server, samples, tmp_path, ray_cluster, capfd, monkeypatch):
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # The training is shorter than MLflow's own retries.
        close = Tracker.close

        def close_when_noticed(tracker: Tracker, status: str) -> None:
            """A longer training would notice; this one may be over before."""
            wait_until(lambda: tracker._is_failing)
            close(tracker, status)

        monkeypatch.setattr(Tracker, "close", close_when_noticed)
        output = tmp_path / "out"

        def kill_when_started():
            wait_until((output / "training.json").exists)
            server.stop()

        killer = threading.Thread(target=kill_when_started)
        killer.start()
        with in_process():
            result = train(config_of(samples, output, epochs=2, log_every_steps=1, tracking_uri=server.uri))
        killer.join()
        said = capfd.readouterr().err
        assert len(result.metrics) == 2 and result.registered is None
        assert said.count("MLflow fails (connection refused)") == 1
        assert said.count("tracking is incomplete") == 1
        assert "the captioner, the end of the run (connection refused)" in said
        load_captioner(result.best)


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_credentials_are_shown_nowhere(tmp_path):
    weights = "https://me:secret@host/weights.pth?X-Amz-Signature=secret"
    config = config_of(tmp_path, tmp_path / "o", weights=weights, tracking_uri="http://me:secret@mlflow:5000")
    assert "secret" not in json.dumps(shown_settings(config))
    assert shown_settings(config)["weights"] == "https://…@host/weights.pth?…"
    assert without_credentials("s3://bucket/a@b/c") == "s3://bucket/a@b/c"


def test_a_name_that_no_registry_takes(tmp_path):
    with pytest.raises(ConfigError, match="register_as: must be a name without"):
        TrainConfig.create(samples="s", output="o", register_as="team/shapes")
    with pytest.raises(ConfigError, match="register_as needs an MLflow server"):
        TrainConfig.create(samples="s", output="o", register_as="shapes", tracking_uri="none")


@pytest.mark.usefixtures("ray_cluster")
def test_a_model_travels_to_a_node_that_does_not_have_it(model, tmp_path, monkeypatch):
    import ray

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files = tuple(ray.put((Path(model) / name).read_bytes()) for name in FILES)
    model_id = load_captioner(model)[1]
    here = ray.get_runtime_context().get_node_id()
    assert ModelTransfer(model, model_id, here, files).local_folder() == model
    copy = ModelTransfer("/no/such/folder", model_id, "another node", files).local_folder()
    assert Path(copy).is_relative_to(tmp_path)
    assert load_captioner(copy)[1] == model_id
