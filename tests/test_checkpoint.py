"""A captioner's folder rebuilds it exactly, and a folder that is none is refused with the reason."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from capray.config import Architecture, Decoding
from capray.errors import CheckpointError, ConfigError
from capray.model.captioner import Captioner
from capray.model.captioner_files import model_id_of
from capray.model.checkpoint import load_captioner, save_captioner
from capray.vocabulary import Vocabulary
from tests.conftest import TINY


@pytest.fixture
def folder(model, tmp_path) -> Path:
    for file in Path(model).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_round_trip(model, tmp_path):
    captioner, model_id = load_captioner(model)
    again_id = save_captioner(captioner, str(tmp_path / "again"))
    again, loaded_id = load_captioner(str(tmp_path / "again"))
    assert model_id == again_id == loaded_id
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))
    decoding = Decoding(beam_size=3)
    assert captioner.caption(captioner.encode(pixels), decoding) == again.caption(again.encode(pixels), decoding)


@pytest.mark.parametrize("settings", [{"tie_embeddings": True}, {"grid_projection": 24}], ids=str)
def test_options_of_the_decoder_come_back(settings, tmp_path):
    captioner = Captioner(Architecture(**TINY, **settings), Vocabulary(["a", "b"]))
    save_captioner(captioner, str(tmp_path / "saved"))
    again, _ = load_captioner(str(tmp_path / "saved"))
    assert again.architecture == captioner.architecture
    assert all(torch.equal(value, captioner.state_dict()[name]) for name, value in again.state_dict().items())


def test_the_folder_holds_three_files_and_the_id_is_made_of_them(model):
    files = {file.name: file.read_bytes() for file in Path(model).iterdir()}
    assert set(files) == {"config.json", "vocabulary.json", "model.safetensors"}
    assert model_id_of(files) == load_captioner(model)[1]
    assert model_id_of(files | {"vocabulary.json": b"{}"}) != model_id_of(files)


def test_on_s3(model, s3):
    captioner, model_id = load_captioner(model)
    assert save_captioner(captioner, f"{s3}/models/tiny") == model_id
    assert load_captioner(f"{s3}/models/tiny")[1] == model_id


def test_missing_folder(tmp_path):
    with pytest.raises(ConfigError, match="not a captioner folder"):
        load_captioner(str(tmp_path / "nothing"))


def test_a_training_folder_points_to_its_best(folder, tmp_path):
    outer = tmp_path / "training"
    outer.mkdir()
    (outer / "best").mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (outer / "best" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match="did you mean .*best"):
        load_captioner(str(outer))


def test_incomplete(folder):
    (folder / "vocabulary.json").unlink()
    with pytest.raises(CheckpointError, match=r"incomplete: it has no vocabulary\.json"):
        load_captioner(str(folder))


@pytest.mark.parametrize("name", ["vocabulary.json", "model.safetensors"])
def test_damaged(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"damaged or half written: {name}"):
        load_captioner(str(folder))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"schema_version": 1, "architecture": {"encoder": 3}, "sha256": {}}'])
def test_a_config_that_is_none(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        load_captioner(str(folder))


def test_newer_schema(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"schema_version": 99}))
    with pytest.raises(CheckpointError, match="schema version 99.*upgrade"):
        load_captioner(str(folder))


def test_a_pickle_is_refused_unopened(tmp_path):
    (tmp_path / "model.pth").write_bytes(b"not even a pickle")
    with pytest.raises(CheckpointError, match=r"model\.pth, a pickle"):
        load_captioner(str(tmp_path))


def test_weights_of_another_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    config["architecture"]["hidden_dim"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="do not fit the configuration"):
        load_captioner(str(folder))
