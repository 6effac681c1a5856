"""Captioning blocks: what an image does costs its row; what the device does ends the process, and no image is blamed."""

import importlib.util
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from capray import cluster
from capray import inference as inference_module
from capray.captioning import actor as actors
from capray.captioning import isolation
from capray.captioning.actor import CaptioningActor, CaptioningSettings
from capray.captioning.canary import canary_score
from capray.captioning.isolation import Crashed, Isolated
from capray.captioning.rows import FETCHED, block_of, events_of, results_schema, table_of
from capray.config import Decoding
from capray.device import is_device_error, is_out_of_memory
from capray.errors import CheckpointError, TryAgain
from capray.inference import Inference
from capray.inputs.base import Changed
from capray.inputs.places import with_source
from capray.model.checkpoint import load_captioner
from tests.conftest import make_model

FAULTS = Path(__file__).parent / "faults"
SHA = bytes(32)
KILLER = (255, 0, 255)
STARVED = (0, 255, 255)
"""The colours of images whose process dies when it captions them: by a bug, and for want of memory (faults)."""


class Ended(BaseException):
    """This process would have ended."""


@pytest.fixture(autouse=True)
def _ends(monkeypatch):
    def end(code):
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)


@pytest.fixture
def notices(monkeypatch) -> list[str]:
    told = []
    monkeypatch.setattr(cluster, "post_notice", lambda run_id, text: told.append(text))
    return told


@pytest.fixture
def device(monkeypatch, tmp_path) -> Path:
    """While this file exists, the device of this process and of its children is as its text says (faults)."""
    sick = tmp_path / "sick"
    monkeypatch.setenv("CAPRAY_SICK_DEVICE", str(sick))
    monkeypatch.syspath_prepend(FAULTS)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    for name in ("_copied", "_grids"):
        monkeypatch.setattr(inference_module.Inference, name, getattr(inference_module.Inference, name))
    spec = importlib.util.spec_from_file_location("faults", FAULTS / "sitecustomize.py")
    faults = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faults)
    faults._arm_inference(inference_module)
    return sick


@pytest.fixture
def restarted(monkeypatch):
    monkeypatch.setattr(cluster, "count_restart", lambda: 1)


@pytest.fixture(scope="module")
def loaded(model):
    return load_captioner(model)


@pytest.fixture
def settings(model, loaded) -> CaptioningSettings:
    return CaptioningSettings(
        model, loaded[1], Decoding(beam_size=2, max_length=6), "fp32", False, 4, False, 1, run_id="run", patience_seconds=0
    )


def photo(name: str, colour=None, **values) -> dict:
    pixels = np.random.default_rng(len(name)).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    if colour is not None:
        pixels[:] = colour
    size = {"input_height": 32, "input_width": 32, "width": 40, "height": 30}
    row = {"image_id": name, "uri": f"/{name}", "pixels": pixels.tobytes(), "sha256": SHA, "careful": False}
    return row | size | {"node": "node-1"} | values


def caption(actor: CaptioningActor, *rows: dict) -> list[dict]:
    source = actor.settings.source_type
    table = pa.Table.from_pylist(list(rows), with_source(FETCHED, source))
    result = table_of(actor(block_of(table)))
    assert result.schema == results_schema(source, actor.settings.attention)
    return result.to_pylist()


def outcomes(rows: list[dict]) -> dict[str, str]:
    return {row["image_id"]: row["error_type"] or "captioned" for row in rows}


class TestABlock:
    def test_several_are_captioned_together_and_come_back_one_by_one(self, settings):
        actor = CaptioningActor(settings)
        images = [photo("a"), photo("bb"), photo("ccc")]
        lost = {"image_id": "lost", "uri": "/lost", "careful": False, "error_type": "missing", "message": "gone"}
        groups = [[images[0]], [], [{**lost, "certain": False}, images[1], images[2]]]
        blocks = [block_of(pa.Table.from_pylist(group, FETCHED)) for group in groups]
        results = actor(pa.concat_tables(blocks))
        together = [table_of(results.slice(i, 1)).to_pylist() for i in range(results.num_rows)]
        assert [[row["image_id"] for row in group] for group in together] == [["a"], [], ["lost", "bb", "ccc"]]
        (alone,) = caption(actor, images[1])
        assert together[2][1]["caption"] == alone["caption"] and together[2][0]["error_type"] == "missing"

    def test_has_the_captioners_captions_and_failures_pass_through(self, settings, loaded):
        failure = {"error_type": "missing", "message": "gone", "certain": False, "place": "{}", "node": "node-2"}
        lost = {"image_id": "lost", "uri": "/lost", "careful": False, **failure}
        actor = CaptioningActor(settings)
        table = pa.Table.from_pylist([photo("a", place="{1}"), lost, photo("bb")], FETCHED)
        block = actor(block_of(table, [Changed(0, "t.parquet")]))
        assert events_of(block) == [Changed(0, "t.parquet")]
        first, second, third = table_of(block).to_pylist()
        assert second.items() >= {**failure, "image_id": "lost", "uri": "/lost", "caption": None}.items()
        captioner, model_id = loaded
        for row, name in ((first, "a"), (third, "bb")):
            pixels = np.frombuffer(photo(name)["pixels"], np.uint8).reshape(32, 32, 3)
            ((best, other),) = captioner.caption(captioner.encode_all([pixels]), settings.decoding)
            assert (row["caption"], row["num_tokens"], row["finished"]) == (best.caption, best.num_tokens, best.finished)
            assert row["log_prob"] == pytest.approx(best.log_prob, abs=1e-4)
            assert [found["caption"] for found in row["alternatives"]] == [other.caption]
            assert (row["width"], row["height"], row["sha256"], row["model_id"]) == (40, 30, SHA, model_id)
            assert (row["error_type"], row["certain"], row["node"]) == (None, None, "node-1")
        assert (first["place"], third["place"]) == ("{1}", None)

    def test_carries_attention_and_columns_of_the_source(self, settings):
        source = pa.struct([("split", pa.string())])
        actor = CaptioningActor(replace(settings, attention=True, source_type=source))
        (row,) = caption(actor, photo("a", source={"split": "dev"}))
        assert row["source"] == {"split": "dev"}
        assert len(row["tokens"]) == len(row["attention"]) == row["num_tokens"]

    def test_may_hold_nothing_readable(self, settings):
        actor = CaptioningActor(settings)
        assert caption(actor) == []
        assert outcomes(caption(actor, photo("a", pixels=None, error_type="denied", message="", certain=True))) == {
            "a": "denied"
        }


class TestOneImagesFault:
    def test_is_its_own(self, settings, monkeypatch):
        """What cannot be computed for one image costs the others of its batch nothing."""
        copied = inference_module.Inference._copied

        def copy(self, images):
            if any((image == 7).all() for image in images):
                raise ValueError("odd " + "x" * 1000)
            return copied(self, images)

        monkeypatch.setattr(inference_module.Inference, "_copied", copy)
        rows = caption(CaptioningActor(settings), photo("a"), photo("odd", 7), photo("bb"), photo("ccc"))
        assert outcomes(rows) == {"a": "captioned", "odd": "captioning_error", "bb": "captioned", "ccc": "captioned"}
        assert rows[1]["message"].startswith("ValueError: odd xx") and len(rows[1]["message"]) == 500
        assert rows[1]["certain"] is True

    def test_a_batch_for_which_there_is_no_memory_is_halved(self, settings, monkeypatch):
        copied = inference_module.Inference._copied
        sizes = []

        def copy(self, images):
            sizes.append(len(images))
            if len(images) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return copied(self, images)

        actor = CaptioningActor(settings)
        monkeypatch.setattr(inference_module.Inference, "_copied", copy)
        rows = caption(actor, *(photo(name) for name in ("a", "bb", "ccc")))
        assert set(outcomes(rows).values()) == {"captioned"}
        assert sizes == [3, 2, 1, 1, 1]

    @pytest.mark.parametrize(
        ("text", "is_devices", "is_memorys"),
        [
            ("CUDA error: an illegal memory access was encountered", True, False),
            ("CUDA error: uncorrectable ECC error encountered", True, False),
            ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`", True, False),
            ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR", True, False),
            ("No CUDA GPUs are available", True, False),
            ("CUDA unknown error - this may be due to an incorrectly set up environment", True, False),
            ("Unexpected error from cudaGetDeviceCount()", True, False),
            ("Torch not compiled with CUDA enabled", True, False),
            ("GET was unable to find an engine to execute this computation", False, True),
            ("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear with a non-contiguous input", False, False),
            ("CUDA error: out of memory", False, True),
            ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", False, True),
            ("Calculated padded input size per channel: (2 x 2)", False, False),
        ],
    )
    def test_is_told_from_the_devices(self, text, is_devices, is_memorys):
        error = RuntimeError(text)
        assert (is_device_error(error), is_out_of_memory(error)) == (is_devices, is_memorys)


class TestAnImageThatKillsItsProcess:
    def test_costs_its_row_alone_in_a_restarted_actor(self, settings, restarted, device, notices, monkeypatch):
        """A careful child is killed (really), and another one captions the rest; once is no proof. Care ends after some
        blocks."""
        monkeypatch.setattr(actors, "CAREFUL_BLOCKS", 1)
        ended = []
        monkeypatch.setattr(cluster, "end_restarts", lambda: ended.append(True))
        actor = CaptioningActor(settings)
        child = actor._child._child
        assert child is not None and child.poll() is None
        rows = caption(actor, photo("a"), photo("killer", KILLER, place="{1}"), photo("bb"))
        assert outcomes(rows) == {"a": "captioned", "killer": "crashed", "bb": "captioned"}
        assert rows[1]["message"] == f"captioning killed its process by {signal.SIGABRT.name}"
        assert (rows[1]["certain"], rows[1]["place"], rows[1]["node"]) == (False, "{1}", "node-1")
        assert "restarted" in notices[0] and "child process" in notices[0]
        assert child.poll() is not None and actor._child._child is None
        caption(actor, photo("a"))
        assert actor._child._child is None and len(ended) == 1

    def test_is_taken_care_of_in_a_healthy_one_and_proven_by_a_second_time(self, settings, device, monkeypatch, tmp_path):
        """Only the marked image is captioned apart."""
        actor = CaptioningActor(settings)
        log = tmp_path / "log"
        monkeypatch.setenv("CAPRAY_CHAOS_LOG", str(log))
        monkeypatch.setenv("CAPRAY_CHAOS_DELAY", "0")
        rows = caption(actor, photo("a"), photo("killer", KILLER, careful=True), photo("bb"))
        assert outcomes(rows) == {"a": "captioned", "killer": "crashed", "bb": "captioned"}
        assert rows[1]["certain"] is True
        assert log.read_text().split()[0] == "2"
        assert actor._child._child is None, "the child is gone, and its memory with it"

    def test_is_proven_by_no_sigkill_which_is_the_machines(self, settings, device):
        rows = caption(CaptioningActor(settings), photo("starved", STARVED, careful=True))
        assert outcomes(rows) == {"starved": "crashed"}
        assert (rows[0]["message"], rows[0]["certain"]) == ("captioning killed its process by SIGKILL", False)


class TestAChildThatCannotStart:
    def test_is_tried_again(self, settings, monkeypatch, notices):
        monkeypatch.setattr(isolation.sys, "executable", "/nowhere/python")
        monkeypatch.setattr(actors, "PAUSE_SECONDS", (0.01, 0.01))
        actor = CaptioningActor(replace(settings, patience_seconds=60))

        def mend(run_id, text):
            notices.append(text)
            monkeypatch.undo()

        monkeypatch.setattr(cluster, "post_notice", mend)
        assert outcomes(caption(actor, photo("a", careful=True))) == {"a": "captioned"}
        assert "cannot be started" in notices[0] and "yet" in notices[0]

    def test_stops_the_job_in_the_end_and_is_no_images_failure(self, settings, monkeypatch):
        monkeypatch.setattr(isolation.sys, "executable", "/nowhere/python")
        actor = CaptioningActor(settings)
        with pytest.raises(TryAgain, match="cannot be started.*nothing was recorded against images.*same command"):
            caption(actor, photo("a", careful=True))


class TestASickDevice:
    def test_ends_the_process_in_a_batch(self, settings, device, notices):
        actor = CaptioningActor(settings)
        device.write_text("error")
        with pytest.raises(Ended):
            caption(actor, photo("a"))
        assert "the device failed" in notices[0] and "illegal memory access" in notices[0]

    def test_ends_the_process_in_the_careful_child_too(self, settings, device, notices):
        actor = CaptioningActor(settings)
        device.write_text("error")
        with pytest.raises(Ended):
            caption(actor, photo("a", careful=True))
        assert "the device failed" in notices[0]

    @pytest.mark.parametrize("sickness", ["nan", "drift"])
    def test_is_found_by_the_canary(self, settings, device, notices, monkeypatch, sickness):
        """NaN at once, for it makes failures; a drift at the next canary. The rows of that block are not returned."""
        monkeypatch.setattr(actors, "CANARY_BLOCKS", 2)
        actor = CaptioningActor(settings)
        caption(actor, photo("a"))
        device.write_text(sickness)
        with pytest.raises(Ended):
            caption(actor, photo("a"))
        assert "canary" in notices[0]

    def test_is_found_at_the_start_by_the_drivers_captioner(self, settings, loaded, device, notices):
        score = canary_score(Inference(loaded[0]))
        CaptioningActor(replace(settings, canary=score))
        device.write_text("drift")
        with pytest.raises(Ended):
            CaptioningActor(replace(settings, canary=score))
        assert "as on the driver" in notices[0]

    def test_another_precision_is_no_sickness(self, settings, tmp_path):
        for seed in range(3):
            model = make_model(tmp_path / str(seed), seed)
            captioner, model_id = load_captioner(model)
            bf16 = replace(
                settings, model=model, model_id=model_id, precision="bf16", canary=canary_score(Inference(captioner))
            )
            assert outcomes(caption(CaptioningActor(bf16), photo("a"))) == {"a": "captioned"}

    def test_a_model_without_probabilities_is_no_sickness(self, settings, device):
        """It gives the driver's canary none either: then images fail, and the job stops for that."""
        device.write_text("nan")
        actor = CaptioningActor(replace(settings, canary=float("nan")))
        rows = caption(actor, photo("a"))
        assert outcomes(rows) == {"a": "captioning_error"}
        assert rows[0]["message"] == "the model gave no finite probability"

    def test_is_waited_for_by_a_restarted_actor(self, settings, restarted, device, monkeypatch):
        """It is asked in a child process, before the actor is there."""
        monkeypatch.setattr(actors, "PAUSE_SECONDS", (0.01, 0.01))
        device.write_text("error")
        told = []

        def hear(run_id, text):
            told.append(text)
            if "does not work yet" in text:
                device.unlink()

        monkeypatch.setattr(cluster, "post_notice", hear)
        actor = CaptioningActor(replace(settings, patience_seconds=60))
        assert len(told) == 2 and "illegal memory access" in told[1]
        assert outcomes(caption(actor, photo("a"))) == {"a": "captioned"}

    def test_that_stays_sick_stops_the_job_with_one_message(self, settings, restarted, device):
        device.write_text("nan")
        actor = CaptioningActor(settings)
        for _ in range(2):
            with pytest.raises(TryAgain, match="the device does not work.*no finite.*nothing was recorded against images"):
                caption(actor, photo("a"))

    def test_an_actor_that_dies_again_and_again_stops_the_job(self, settings, monkeypatch):
        monkeypatch.setattr(cluster, "count_restart", lambda: actors.MAX_RESTARTS + 1)
        with pytest.raises(TryAgain, match="died 7 times in a row"):
            caption(CaptioningActor(settings), photo("a"))

    def test_that_hangs_ends_the_process(self, settings, device):
        """No other process is needed to notice it; and outside Ray nobody hears of it."""
        with Isolated(hurried_actor, (settings,), 60) as process:
            block = block_of(pa.Table.from_pylist([photo("a")], FETCHED))
            assert table_of(process.call(block)).num_rows == 1
            device.write_text("hang")
            with pytest.raises(Crashed, match="ended its process with 1"):
                process.call(block)


def hurried_actor(settings):
    actors.CAPTION_SECONDS = 1.0
    return CaptioningActor(settings)


def test_a_model_that_is_another_one_now(settings):
    actor = CaptioningActor(replace(settings, model_id="0" * 64))
    with pytest.raises(CheckpointError, match="changed while the job ran"):
        caption(actor, photo("a"))


def test_an_error_that_has_come_through_ray_is_as_it_was_raised():
    """Ray Data appends advice to a message; the job ends with one message of ours."""
    from ray.data._internal.util import _annotate_exception_with_retry_context as annotate
    from ray.exceptions import RayTaskError

    error = TryAgain("the device does not work")
    how = {"description": "apply UDF transform", "attempts": 1, "max_attempts": 1, "total_backoff_s": 0.0}
    error = annotate(error, **how, exception_str="")
    assert str(error) != "the device does not work"
    own = cluster.own_error(RayTaskError("map", "…", error).as_instanceof_cause())
    assert isinstance(own, TryAgain) and str(own) == "the device does not work"


class TestInRay:
    def test_notices_of_tasks_are_taken_once_in_their_order(self, ray_cluster):
        import ray

        @ray.remote(num_cpus=0.5)
        def tell(text):
            cluster.post_notice("run of notices", text)
            cluster.post_notice("another run", "not for this one")

        for text in ("first", "second"):
            ray.get(tell.remote(text))
        cluster.post_notice("run of notices", "third")
        assert cluster.take_notices("run of notices") == ["first", "second", "third"]
        assert cluster.take_notices("run of notices") == []
        assert len(cluster.take_notices("another run")) == 2

    def test_restarts_are_counted_until_one_works(self, ray_cluster, tmp_path):
        """An actor whose process ends while it is built is started again, too."""
        import ray

        @ray.remote(num_cpus=0.5, max_restarts=-1, max_task_retries=-1)
        class Mortal:
            def __init__(self):
                self.restarts = cluster.count_restart()
                if self.restarts < 2:
                    os._exit(1)

            def die_once(self, marker):
                if not marker.exists():
                    marker.touch()
                    os._exit(1)
                return self.restarts

            def work(self):
                cluster.end_restarts()
                return self.restarts

        actor = Mortal.remote()
        assert ray.get(actor.work.remote()) == 2
        assert ray.get(actor.die_once.remote(tmp_path / "died")) == 2, "1 at first, for which it ends once more"
        ray.kill(actor)
