"""Every published recipe is a valid variant of the defaults, and trains."""

import re
from pathlib import Path

import pytest
import torchvision
import yaml

from capray.config import Architecture, TrainConfig
from capray.datasets.settings import ShapesConfig
from capray.datasets.shapes import prepare_shapes
from capray.model.captioner import Captioner
from capray.model.checkpoint import load_captioner, save_captioner
from capray.training.job import train
from capray.vocabulary import Vocabulary
from tests.conftest import in_process

FOLDER = Path(__file__).parents[1] / "jobs" / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SMALL = {
    "weights": None,
    "size": 64,
    "min_word_count": 1,
    "max_length": 6,
    "batch_size": 4,
    "epochs": 1,
    "num_workers": 1,
    "cpus_per_worker": 1,
    "tracking_uri": "none",
    "feature_cache": "none",
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_only_what_differs_from_the_defaults(name):
    values = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    config = TrainConfig.create(values, samples="s", output="o")
    same = [key for key in values if getattr(config, key) == TrainConfig.model_fields[key].default]
    assert not same


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> str:
    """8 training images, one for validation, one for testing."""
    folder = str(tmp_path_factory.mktemp("drawings") / "samples")
    prepare_shapes(ShapesConfig(output=folder, num_images=10))
    return folder


def small_encoder(config: TrainConfig) -> TrainConfig:
    """The smallest ResNet in the place of another: its blocks have the same names."""
    if not config.encoder.startswith("resnet"):
        return config
    assert config.encoder in torchvision.models.list_models()
    return config.model_copy(update={"encoder": "resnet18"})


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(name, drawings, tmp_path):
    small = {**SMALL, "samples": drawings, "output": str(tmp_path / "out")}
    first_stage, *later = re.split(r"-stage\d", name)
    if later:
        del small["min_word_count"], small["size"]
        small["feature_cache"] = str(tmp_path / "cache")
        first = small_encoder(TrainConfig.from_yaml(FOLDER / f"{first_stage}.yaml", **SMALL | small))
        captioner = Captioner(first.subset(Architecture), Vocabulary(["circle", "a", "square"]))
        small["init_from"] = str(tmp_path / "stage-1")
        save_captioner(captioner, small["init_from"])
    config = TrainConfig.from_yaml(FOLDER / f"{name}.yaml", **small)
    config = config if later else small_encoder(config)
    with in_process():
        result = train(config)
    assert len(result.metrics) == 1
    trained, _ = load_captioner(result.best)
    if later:
        assert trained.vocabulary.words == ["circle", "a", "square"]
        assert trained.architecture == captioner.architecture
    else:
        assert trained.architecture == config.subset(Architecture)
