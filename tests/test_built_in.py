"""The captioner that comes with capray: what captions where no model is given."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from capray.captioning.actor import CaptioningActor
from capray.captioning.job import caption
from capray.captioning.model_transfer import transfer_model
from capray.cli import run
from capray.config import IN_THE_BOX, Architecture, CaptionConfig, Decoding
from capray.errors import CheckpointError, ConfigError, OutputConflictError
from capray.inference import Inference
from capray.model import captioner_files
from capray.model.captioner import Captioner
from capray.model.checkpoint import load_captioner, save_captioner
from capray.tracking.registry import find_model
from capray.vocabulary import Vocabulary
from tests.conftest import TINY, image_bytes, make_model, write_photos
from tests.local_executor import LocalExecutor

FOLDER = Path(find_model(IN_THE_BOX))
FIRST_LINE = f"captioner: {IN_THE_BOX}, which comes with capray (--model chooses another)"


def write_photo(place: Path) -> str:
    """A green meadow under a blue sky, with something brown."""
    picture = Image.new("RGB", (320, 240), (110, 170, 230))
    picture.paste((60, 140, 50), (0, 120, 320, 240))
    picture.paste((120, 80, 40), (120, 90, 200, 170))
    place.write_bytes(image_bytes(picture, "JPEG"))
    return str(place)


class TestTheCaptioner:
    def test_it_is_small_and_opens_as_float32(self):
        assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 20_000_000
        captioner, _ = load_captioner(str(FOLDER))
        assert {value.dtype for value in captioner.parameters()} == {torch.float32}
        stored = safetensors.torch.load_file(FOLDER / "model.safetensors")
        assert stored["decoder.output.weight"].dtype == torch.float16

    def test_it_captions_a_photo_in_a_process_that_reaches_no_network_and_loads_no_more_than_it_needs(self, tmp_path):
        program = (
            "import socket, sys\n"
            "def refuse(*_): raise AssertionError('a connection')\n"
            "socket.socket.connect = socket.getaddrinfo = refuse\n"
            "from capray.cli import run\n"
            f"code = run(['caption', {write_photo(tmp_path / 'photo.jpg')!r}])\n"
            "print(sorted({'ray', 'mlflow', 'duckdb', 'torchvision', 'torch._dynamo'} & set(sys.modules)))\n"
            "sys.exit(code)\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, FIRST_LINE + "\n")
        line, loaded = done.stdout.splitlines()
        path, words = line.split("\t")
        assert path == str(tmp_path / "photo.jpg") and len(words.split()) >= 3
        assert loaded == "[]"


def test_a_name_that_does_not_come_with_capray():
    with pytest.raises(ConfigError, match=r"no captioner 'builtin:coco' comes with capray: builtin:flickr8k"):
        find_model("builtin:coco")


@pytest.fixture
def in_the_box(tmp_path, monkeypatch) -> Path:
    """A tiny captioner in the place of the one that comes with capray."""
    monkeypatch.setattr(captioner_files, "_CAPTIONERS", tmp_path / "captioners")
    return Path(make_model(tmp_path / "captioners" / "flickr8k", seed=0))


class TestWhereNoModelIsGiven:
    def test_it_captions_photos(self, in_the_box, tmp_path, capsys):
        (photo,) = write_photos(tmp_path, 1)
        assert run(["caption", photo]) == 0
        out, err = capsys.readouterr()
        assert out.startswith(f"{photo}\tword") and err == FIRST_LINE + "\n"
        assert run(["caption", photo, "--model", str(in_the_box)]) == 0
        assert capsys.readouterr() == (out, "")
        assert run(["caption", photo, "--model", str(in_the_box), "--json"]) == 0
        about = json.loads(capsys.readouterr().out)
        assert f"{about['image']}\t{about['caption']}\n" == out and about["log_prob"] < 0
        assert run(["caption", photo, "--model", IN_THE_BOX]) == 0
        assert capsys.readouterr() == (out, "")

    def test_it_explains(self, in_the_box, tmp_path, capsys):
        (photo,) = write_photos(tmp_path, 1)
        assert run(["explain", photo, "--html", str(tmp_path / "page.html"), "--max-length", "5"]) == 0
        out, err = capsys.readouterr()
        assert out.startswith(f"{photo}\tword") and err == FIRST_LINE + "\n"

    @pytest.mark.usefixtures("ray_cluster")
    def test_it_reaches_other_nodes(self, in_the_box):
        model_id = load_captioner(str(in_the_box))[1]
        transfer = transfer_model(find_model(IN_THE_BOX), model_id)
        elsewhere = replace(transfer, node_id="another").local_folder()
        try:
            assert elsewhere != str(in_the_box) and load_captioner(elsewhere)[1] == model_id
        finally:
            shutil.rmtree(elsewhere)


class TestAnOutputKeepsItsModel:
    @pytest.fixture
    def job(self, tmp_path, in_the_box):
        """Captions more and more photos into one output, with the default model or another; the summary."""
        count = 0

        def run_it(**settings):
            nonlocal count
            count += 1
            write_photos(tmp_path / "photos", count, seed=count)
            few = {"batch_size": 4, "beam_size": 2, "max_length": 6}
            config = CaptionConfig(input=str(tmp_path / "photos"), output=str(tmp_path / "out"), **few, **settings)
            return caption(config, LocalExecutor(CaptioningActor))

        return run_it

    def test_the_one_that_comes_with_capray(self, job, in_the_box, tmp_path, capsys):
        first = job()
        assert capsys.readouterr().err.splitlines()[0] == FIRST_LINE
        assert job().model_id == first.model_id
        before = tmp_path / "before"
        shutil.copytree(in_the_box, before)
        make_model(in_the_box, seed=1)
        with pytest.raises(OutputConflictError, match=r"not by the one that comes with this capray: give it with --model"):
            job()
        assert job(model=str(before)).model_id == first.model_id
        assert job().model_id == first.model_id, "the last run says where it is"

    def test_another(self, job, tmp_path, capsys):
        other = make_model(tmp_path / "other", seed=1)
        first = job(model=other)
        assert "captioner:" not in capsys.readouterr().err
        again = job()
        assert (again.model_id, again.captions) == (first.model_id, 1)
        assert capsys.readouterr().err.splitlines()[0] == f"captioner: {other}, with which '{tmp_path}/out' was begun"
        with pytest.raises(OutputConflictError, match="was written by model"):
            job(model=IN_THE_BOX)
        shutil.rmtree(other)
        with pytest.raises(OutputConflictError, match=r"was written by model \w{12}… \(it was at '.*other'\), not by"):
            job()


class TestFloat16:
    def test_the_captions_stay(self, model, tmp_path, capsys):
        assert run(["shrink", model, str(tmp_path / "small")]) == 0
        assert re.search(r"wrote .*small \(model_id \w{64}\), 0\.\d MB", capsys.readouterr().out)
        rng = np.random.default_rng(0)
        images = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(100)]
        pair = (Inference.load(folder, "cpu") for folder in (model, str(tmp_path / "small")))
        ours, small = ([outcome.hypotheses[0] for outcome in inference(images, Decoding())] for inference in pair)
        same = [(one, other) for one, other in zip(ours, small, strict=True) if one.caption == other.caption]
        assert len(same) >= 95
        assert max(abs(one.log_prob - other.log_prob) for one, other in same) < 0.1

    def test_batchnorm_stays_float32(self, tmp_path):
        architecture = Architecture(**TINY | {"encoder": "mobilenet_v2"})
        save_captioner(Captioner(architecture, Vocabulary(["a", "b"])), str(tmp_path), half=True)
        stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
        assert {stored[f"encoder.backbone.features.0.1.{name}"].dtype for name in ("weight", "running_var")} == {
            torch.float32
        }
        assert stored["encoder.backbone.features.0.0.weight"].dtype == torch.float16

    def test_weights_beyond_its_range_are_refused(self, tmp_path):
        captioner = Captioner(Architecture(**TINY), Vocabulary(["a", "b"]))
        with torch.no_grad():
            captioner.decoder.output.bias[0] = 1e5
        with pytest.raises(CheckpointError, match=r"decoder\.output\.bias are beyond 65,504"):
            save_captioner(captioner, str(tmp_path / "small"), half=True)

    def test_an_output_that_is_not_empty(self, model, capsys):
        assert run(["shrink", model, model]) == 2
        assert "not empty" in capsys.readouterr().err
