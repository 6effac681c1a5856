"""The folded encoder: the same grids as the encoder's own, for every family it can be of."""

import pytest
import torch
from torch import nn

from capray.model.encoder import Encoder
from capray.model.folding import FoldedEncoder, fold_batchnorm, fuse_activations

FAMILIES = [
    "tiny",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "densenet121",
    "efficientnet_b0",
    "convnext_tiny",
    "vgg11_bn",
    "squeezenet1_1",
    "timm/tf_efficientnet_lite0",
    "timm/tf_efficientnet_b0",
    "timm/resnet18",
    "timm/resnetv2_50",  # Standardises its convolutions' weights
    "timm/mobilenetv3_small_100",
    "timm/regnetx_002",
    "timm/rexnet_100",
    "timm/convnext_atto",
]


def encoder_with_statistics(name: str) -> Encoder:
    """An encoder whose BatchNorms have seen images: statistics, weights and biases that are not 0 and 1."""
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    encoder = Encoder(name)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return encoder.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_folded_encoder_gives_the_same_grid(name):
    encoder = encoder_with_statistics(name)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    images = torch.randn(3, 3, 64, 64).to(memory_format=torch.channels_last)
    folded = FoldedEncoder(encoder.backbone)
    with torch.inference_mode():
        expected, found = encoder(images), folded(images)
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found / scale, expected / scale, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "efficientnet_b0", "timm/tf_efficientnet_lite0", "timm/tf_efficientnet_b0"]
)
def test_no_batchnorm_is_left(name):
    folded = FoldedEncoder(encoder_with_statistics(name).backbone)
    left = [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not left and "batch_norm" not in folded.backbone.code


def test_more_images_than_a_micro_batch():
    encoder = encoder_with_statistics("resnet18")
    images = torch.randn(19, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(FoldedEncoder(encoder.backbone)(images), encoder(images), atol=1e-4, rtol=1e-4)


def test_a_backbone_that_cannot_be_traced_is_taken_as_it_is():
    class Branching(nn.Module):
        def forward(self, images):
            return images * 2 if images.sum() > 0 else images

    images = torch.ones(1, 3, 8, 8)
    assert torch.equal(FoldedEncoder(Branching())(images), images * 2)


@pytest.mark.parametrize(("name", "left"), [("resnet50", 1), ("mobilenet_v2", 35), ("densenet121", 62), ("vgg16", 1)])
def test_relus_become_part_of_convolutions(name, left):
    encoder = encoder_with_statistics(name)
    images = torch.randn(2, 3, 64, 64)
    fused = fuse_activations(fold_batchnorm(encoder.backbone))
    with torch.inference_mode():
        expected, found = encoder(images), fused(images)
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found / scale, expected / scale, atol=1e-5, rtol=1e-4)
    calls = [node for node in fused.graph.nodes if node.op == "call_module"]
    relus = [node for node in calls if isinstance(fused.get_submodule(node.target), (nn.ReLU, nn.ReLU6))]
    assert len(relus) == left
