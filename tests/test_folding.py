"""The folded encoder: the same grids as the encoder's own, for every family it can be of."""

import math

import pytest
import torch
from torch import nn

from capray.config import Preprocessing
from capray.images import normalise
from capray.model import fusing
from capray.model.encoder import Encoder
from capray.model.folding import FoldedEncoder, fold_batchnorm
from capray.model.fusing import FusedConvolution, MaxPool, Patches, fuse, has_onednn, take_patches

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
    "timm/gcresnet33ts",  # Adds a convolution of the mean to a grid
]


PREPROCESSING = Preprocessing()


def noise(count: int) -> torch.Tensor:
    """Images (B, 64, 64, 3), uint8."""
    return torch.randint(0, 256, (count, 64, 64, 3), dtype=torch.uint8)


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


@pytest.fixture(scope="module", params=FAMILIES)
def encoder(request) -> Encoder:
    return encoder_with_statistics(request.param)


def test_the_folded_encoder_gives_the_same_grid(encoder):
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    pixels, folded = noise(3), FoldedEncoder(encoder.backbone)
    with torch.inference_mode():
        expected, found = encoder(normalise(pixels, PREPROCESSING)), folded(pixels, PREPROCESSING)
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found / scale, expected / scale, atol=2e-5, rtol=1e-4)
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
    pixels, folded = noise(19), FoldedEncoder(encoder.backbone)
    with torch.inference_mode():
        expected = encoder(normalise(pixels, PREPROCESSING))
        torch.testing.assert_close(folded(pixels, PREPROCESSING), expected, atol=1e-4, rtol=1e-4)


def test_a_backbone_that_cannot_be_traced_is_taken_as_it_is():
    class Branching(nn.Module):
        def forward(self, images):
            return images * 2 if images.sum() > 0 else images

    pixels = torch.full((1, 8, 8, 3), 255, dtype=torch.uint8)
    assert torch.equal(FoldedEncoder(Branching())(pixels, PREPROCESSING), normalise(pixels, PREPROCESSING) * 2)


def test_the_layout_for_gpus_gives_the_same_grid(encoder):
    folded = fold_batchnorm(encoder.backbone)
    patches = take_patches(folded)
    fuse(folded)
    for size in (64, 65, 70):
        images = torch.randn(2, 3, size, size)
        with torch.inference_mode():
            expected, found = encoder(images), folded(patches.of(images))
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found / scale, expected / scale, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "vgg16"])
def test_no_sum_and_no_activation_is_left_beside_convolutions(name):
    folded = fold_batchnorm(encoder_with_statistics(name).backbone)
    assert take_patches(folded) != Patches()
    fuse(folded)
    assert all(node.op != "call_function" for node in folded.graph.nodes)
    calls = [folded.get_submodule(str(node.target)) for node in folded.graph.nodes if node.op == "call_module"]
    left = {type(module) for module in calls if getattr(module, "bias", None) is not None or not hasattr(module, "weight")}
    assert left <= {FusedConvolution, MaxPool, nn.Identity}
    assert any(module.is_cudnns for module in calls if isinstance(module, FusedConvolution)) == (name != "mobilenet_v2")


def grids(backbone: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a backbone gives, and what it does laid out for GPUs."""
    folded = fold_batchnorm(backbone)
    patches = take_patches(folded)
    fuse(folded)
    with torch.inference_mode():
        return backbone(images.clone()), folded(patches.of(images))


def test_what_is_changed_in_place_is_not_overtaken():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.short, self.long, self.last = (nn.Conv2d(n, 8, 1) for n in (3, 8, 8, 8))
            self.relu = nn.ReLU(inplace=True)

        def forward(self, images):
            x = self.first(images)
            y = self.short(x)
            x = self.relu(x)
            x = y + self.long(x)
            z = x * 2
            z += self.last(z)
            return self.relu(input=z) + z

    torch.manual_seed(0)
    expected, found = grids(InPlace().eval(), torch.randn(1, 3, 8, 8))
    torch.testing.assert_close(found, expected)


def test_a_convolution_that_is_stretched_over_what_it_is_added_to():
    class Context(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.context, self.relu = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.ReLU()

        def forward(self, images):
            x = self.first(images)
            return self.relu(self.context(x.mean((2, 3), keepdim=True)) + x)

    torch.manual_seed(0)
    expected, found = grids(Context().eval(), torch.randn(1, 3, 8, 8))
    torch.testing.assert_close(found, expected)
    convolution = FusedConvolution(nn.Conv2d(8, 8, 3, stride=2, padding=1, dilation=2), 0, 6)
    x = torch.randn(2, 8, 21, 30)
    assert convolution(x).shape == convolution._shape(x)


def test_what_is_used_twice_or_summed_otherwise_is_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again, self.relu = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
            self.last, self.other = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, images):
            x = self.first(images)
            x = self.relu(self.again(x)) + self.again(x) * 2
            y = self.last(x)
            return torch.add(self.other(y + y), x, alpha=2) + 1

    torch.manual_seed(0)
    backbone, images = Twice().eval(), torch.randn(1, 3, 8, 8)
    folded = fold_batchnorm(backbone)
    patches = take_patches(folded)
    fuse(folded)
    torch.testing.assert_close(folded(patches.of(images)), backbone(images))


@torch.no_grad()
def encoder_that_magnifies(pixels: torch.Tensor) -> Encoder:
    """Its BatchNorms have seen ``pixels``: channels vary little beside their means, and what varies is magnified again."""
    torch.manual_seed(0)
    encoder = Encoder("mobilenet_v2")
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.05, 0.3)
        nn.init.normal_(norm.bias, 2, 2)
        norm.momentum = None
        norm.train()
    encoder.backbone(normalise(pixels, PREPROCESSING))
    return encoder.eval()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of what varies."""
    return float((found.float() - expected).norm() / (expected - expected.mean((0, 2, 3), keepdim=True)).norm())


@torch.inference_mode()
def test_bf16_keeps_what_batchnorms_magnify():
    pixels = noise(32)
    encoder = encoder_that_magnifies(pixels)
    expected, folded = encoder(normalise(pixels, PREPROCESSING)), FoldedEncoder(encoder.backbone, torch.bfloat16)
    bound = 0.21 if has_onednn(torch.bfloat16) else 0.32
    assert relative_error(folded(pixels, PREPROCESSING), expected) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["tiny", "resnet18", "mobilenet_v2", "timm/gcresnet33ts"])
@torch.inference_mode()
def test_onednns_convolutions_give_what_torchs_do(name, dtype, monkeypatch):
    encoder, tolerance = encoder_with_statistics(name), 1e-5 if dtype == torch.float32 else 0.02
    plain, fused = FoldedEncoder(encoder.backbone, dtype), FoldedEncoder(encoder.backbone, dtype)
    for module in plain.modules():
        if isinstance(module, FusedConvolution):
            module.is_onednns = False
    for pixels in (noise(9), noise(2)[:, :50], noise(9)):  # Weights are laid out for each size.
        expected, found = plain(pixels, PREPROCESSING), fused(pixels, PREPROCESSING)
        assert found.dtype == dtype
        assert (found - expected).float().norm() < tolerance * expected.float().norm()
    monkeypatch.setattr(fusing, "has_onednn", lambda dtype: False)
    assert torch.equal(FoldedEncoder(encoder.backbone, dtype)(pixels, PREPROCESSING), expected)


def test_without_onednns_private_operations_there_are_torchs(monkeypatch):
    monkeypatch.setattr(fusing, "_ONEDNN", None)
    assert not has_onednn.__wrapped__(torch.float32)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_nan_in_the_weights_is_not_lost(part):
    encoder = encoder_with_statistics("mobilenet_v2")
    with torch.no_grad():
        getattr(encoder.backbone.features[2].conv[0][1], part)[3] = math.nan
    assert FoldedEncoder(encoder.backbone)(noise(1), PREPROCESSING).isnan().any()


def test_a_bias_whose_rounding_matters_is_not_cudnns():
    convolution = nn.Conv2d(8, 8, 1).requires_grad_(False)
    for bias, is_cudnns in ((3.3, True), (300.3, False)):
        convolution.bias.fill_(bias)
        fused = FusedConvolution(convolution, 0.0, math.inf, deviation=torch.full((8,), 0.5))
        fused.cast(torch.bfloat16, is_onednns=False)
        assert fused.is_cudnns == is_cudnns
        assert fused.weight.dtype == torch.bfloat16 and torch.equal(fused.bias, convolution.bias)
