"""timm's networks as encoders: found, refused, loaded, tuned, stored and opened again."""

import sys

import numpy as np
import pytest
import torch

from capray.config import Architecture, Decoding
from capray.errors import CheckpointError, ConfigError
from capray.inference import Inference
from capray.model.captioner import Captioner
from capray.model.checkpoint import load_captioner, save_captioner
from capray.model.encoder import Encoder
from capray.vocabulary import Vocabulary
from tests.conftest import SHARED_DATA

LITE0 = "timm/tf_efficientnet_lite0"


class TestWithoutTimm:
    @pytest.fixture(autouse=True)
    def _no_timm(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "timm", None)

    def test_it_is_told_what_to_install(self):
        with pytest.raises(ConfigError, match=r"needs timm: uv sync --extra timm"):
            Encoder("timm/resnet18")

    def test_efficientnet_lite0_needs_it_for_its_published_weights_alone(self):
        assert Encoder(LITE0).dim == 1280
        with pytest.raises(ConfigError, match="needs timm"):
            Encoder(LITE0, "imagenet")


@pytest.mark.parametrize("side", [64, 75, 224])
def test_efficientnet_lite0_is_timms(timm, side):
    """It has the same tensors and blocks, and computes the same of them."""
    torch.manual_seed(0)
    theirs = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    encoder = Encoder(LITE0).eval()
    for value in theirs.state_dict().values():
        if value.is_floating_point() and value.dim() < 2:
            value.mul_(torch.empty_like(value).uniform_(0.5, 1.5)).add_(torch.rand_like(value) / 10)
    state = {name: value for name, value in theirs.state_dict().items() if not name.startswith("classifier")}
    assert list(encoder.backbone.state_dict()) == list(state)
    for name, value in encoder.backbone.state_dict().items():
        if value.dim() == 4:
            assert float(value.std()) == pytest.approx(float(state[name].std()), rel=0.3), name
    encoder.backbone.load_state_dict(theirs.state_dict(), strict=False)
    images = torch.randn(2, 3, side, side)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(images), theirs.forward_features(images), atol=1e-4, rtol=1e-4)


@pytest.fixture
def timm():
    return pytest.importorskip("timm")


@pytest.mark.parametrize(
    ("name", "dim", "last"),
    [
        ("tf_efficientnet_lite0", 1280, "bn2"),
        ("resnet18", 512, "layer4"),
        ("mobilenetv3_small_100", 576, "blocks"),
        ("regnetx_002", 368, "s4"),
        ("convnext_atto", 320, "stages"),
        ("densenet121", 1024, "features"),
        ("resnetv2_50", 2048, "norm"),
    ],
)
def test_the_grid_is_timms(timm, name, dim, last):
    encoder = Encoder(f"timm/{name}").eval()
    assert encoder.dim == dim and list(dict(encoder.backbone.named_children()))[-1] == last
    network = timm.create_model(name, pretrained=False).eval()
    network.load_state_dict(encoder.backbone.state_dict(), strict=False)
    images = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        expected, found = network.forward_features(images), encoder(images)
    torch.testing.assert_close(found, expected, atol=1e-4 * max(1, float(expected.abs().max())), rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/vit_tiny_patch16_224", "no grid of features"),
        ("timm/swin_tiny_patch4_window7_224", "no grid of features"),
        ("timm/tf_efficientnet_light0", "no such network; near it: .*tf_efficientnet_lite0"),
        ("timm/", "no such network"),
    ],
)
def test_networks_without_a_grid_and_unknown_ones_are_refused(timm, name, message):
    with pytest.raises(ConfigError, match=message):
        Encoder(name)


@pytest.mark.parametrize("first", [None, "blocks.5", "all"])
def test_what_is_not_tuned_gets_no_gradient_and_statistics_stay(timm, first):
    encoder = Encoder(LITE0, fine_tune_from=first).train()
    before = {key: value.clone() for key, value in encoder.named_buffers()}
    grid = encoder(torch.randn(2, 3, 64, 64))
    assert grid.requires_grad == (first is not None)
    if first is not None:
        grid.sum().backward()
    for key, value in encoder.named_buffers():
        assert torch.equal(value, before[key]), key
    late = ("backbone.blocks.5", "backbone.blocks.6", "backbone.conv_head", "backbone.bn2")
    tuned = {"blocks.5": late, "all": "backbone."}
    for key, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == (first is not None and key.startswith(tuned[first])), key


def test_an_unknown_block_is_refused_with_the_known_ones(timm):
    with pytest.raises(ConfigError, match=r"conv_stem, bn1, blocks.0, .*blocks.6, conv_head, bn2, all"):
        Encoder(LITE0, fine_tune_from="blocks.9")


class TestWeights:
    def test_a_file_in_timms_layout_fits_whatever_head_it_carries(self, timm, tmp_path):
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        torch.save(network.state_dict(), tmp_path / "weights.pth")
        encoder = Encoder(LITE0, str(tmp_path / "weights.pth"))
        assert torch.equal(encoder.backbone.conv_head.weight, network.conv_head.weight)

    def test_imagenet_is_timms_own(self, timm, monkeypatch):
        create, asked = timm.create_model, []

        def stand_in(name, pretrained):
            asked.append((name, pretrained))
            return create(name, pretrained=False)

        monkeypatch.setattr(timm, "create_model", stand_in)
        Encoder("timm/tf_efficientnet_lite0.in1k", "imagenet")
        Encoder("timm/resnet18")
        assert asked == [("tf_efficientnet_lite0.in1k", True), ("resnet18", False)]

    def test_a_download_that_fails_is_told_with_the_way_around_it(self, timm, monkeypatch):
        def fail(*_, **__):
            raise RuntimeError("no route to huggingface.co")

        monkeypatch.setattr(timm, "create_model", fail)
        with pytest.raises(ConfigError, match="no route to huggingface.co; download them elsewhere .*--weights FILE"):
            Encoder(LITE0, "imagenet")

    def test_torchvisions_names_of_weights_are_refused(self, timm):
        with pytest.raises(ConfigError, match="IMAGENET1K_V1.*give --weights imagenet"):
            Encoder(LITE0, "IMAGENET1K_V1")

    def test_those_of_imagenet(self, timm):
        path = SHARED_DATA / "weights" / "tf_efficientnet_lite0-imagenet-timmlayout.pth"
        if not path.exists():
            pytest.skip("no ImageNet weights in CAPRAY_TEST_DATA")
        encoder = Encoder(LITE0, str(path)).eval()
        state = torch.load(path, weights_only=True)
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
        network.load_state_dict(state)
        images = torch.randn(1, 3, 224, 224)
        with torch.inference_mode():
            torch.testing.assert_close(encoder(images), network.forward_features(images), atol=1e-4, rtol=1e-4)


class TestCaptioner:
    @pytest.fixture
    def captioner(self, timm):
        torch.manual_seed(0)
        mean_and_std = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        shape = {"grid_projection": 16, "attention_dim": 8, "embed_dim": 8, "hidden_dim": 16}
        architecture = Architecture(encoder="timm/mobilenetv3_small_100", size=64, **mean_and_std, **shape)
        return Captioner(architecture, Vocabulary(["a", "dog", "runs"])).eval()

    def test_it_is_stored_and_opened(self, captioner, tmp_path):
        save_captioner(captioner, str(tmp_path / "model"))
        opened, _ = load_captioner(str(tmp_path / "model"))
        state = opened.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in captioner.state_dict().items())
        images = [np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8) for i in range(2)]
        first, second = (Inference(c)(images, Decoding(max_length=5)) for c in (captioner, opened))
        assert first == second and all(found.hypotheses for found in first)

    def test_without_timm_it_is_told_what_to_install(self, captioner, tmp_path, monkeypatch):
        save_captioner(captioner, str(tmp_path / "model"))
        monkeypatch.setitem(sys.modules, "timm", None)
        with pytest.raises(CheckpointError, match=r"uv sync --extra timm"):
            load_captioner(str(tmp_path / "model"))
