"""What BatchNorms tell of the features behind them, and what is made of it."""

import pytest
import torch
from torch import nn

from capray.model.folding import fold_batchnorm
from capray.model.fusing import LIMITS
from capray.model.means import Normal, _cut_off


@pytest.mark.parametrize("activation", LIMITS)
def test_the_mean_and_deviation_of_what_is_cut_off(activation):
    torch.manual_seed(0)
    normal = Normal(torch.tensor([0.0, -2.0, 1.0, 5.5, 9.0, 3.0]), torch.tensor([1.0, 0.5, 3.0, 2.0, 1.0, 0.0]))
    drawn = activation()(normal.mean + normal.deviation * torch.randn(500_000, 6))
    found = _cut_off(normal, LIMITS[activation][1])
    torch.testing.assert_close(found.mean, drawn.mean(0), atol=0.01, rtol=0)
    torch.testing.assert_close(found.deviation, drawn.std(0), atol=0.01, rtol=0)


class Linear(nn.Module):
    """Sums of features that vary little beside their means, seen by convolutions alone."""

    def __init__(self, last: str):
        super().__init__()
        self.how = last
        self.first, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.second, self.second_norm = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.narrow, self.narrow_norm = nn.Conv2d(8, 1, 1), nn.BatchNorm2d(1)
        self.last = nn.Conv2d(8, 8, 3, padding=int(last == "padded"), groups=2)

    def forward(self, images):
        x = self.norm(self.first(images))
        x = x + self.second_norm(self.second(x))
        x += self.narrow_norm(self.narrow(x))
        if self.how == "twice":
            return self.last(x) + self.last(x)
        return self.last(input=x) if self.how == "by keyword" else self.last(x)


@pytest.mark.parametrize("last", ["plain", "padded", "twice", "by keyword"])
def test_means_are_taken_out_where_nothing_else_sees_them(last):
    torch.manual_seed(0)
    backbone, images = Linear(last), torch.randn(4, 3, 9, 9)
    for norm in (backbone.norm, backbone.second_norm, backbone.narrow_norm):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 5, 5)
        norm.momentum = None
    backbone.train()(images)
    backbone.eval().requires_grad_(False)
    folded, seen = fold_batchnorm(backbone), []
    folded.last.register_forward_pre_hook(
        lambda module, *inputs: seen.extend([*inputs[0], *inputs[1].values()]), with_kwargs=True
    )
    torch.testing.assert_close(folded(images), backbone(images), atol=1e-4, rtol=1e-4)
    assert (float(seen[0].mean((0, 2, 3)).abs().max()) < 1e-4) == (last == "plain")


def test_weights_that_are_rounded_give_the_same_mean():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64), nn.ReLU6(), nn.Conv2d(64, 8, 1), nn.BatchNorm2d(8)]
    backbone, images = nn.Sequential(*layers).requires_grad_(False), torch.randn(8, 3, 40, 40)
    layers[1].bias.normal_(3, 3)
    layers[1].momentum = layers[4].momentum = None
    backbone.train()(images)
    expected = backbone.eval()(images).mean((0, 2, 3))
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        folded = fold_batchnorm(backbone, dtype)
        weight = folded.get_submodule("3").weight
        weight.copy_(weight.bfloat16())
        errors.append(float((folded(images).mean((0, 2, 3)) - expected).norm()))
    assert errors[1] < errors[0] / 4


def test_a_batchnorm_without_weights_is_folded_all_the_same():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 8, 1)).eval()
    images = torch.randn(2, 3, 5, 5)
    found = fold_batchnorm(backbone, torch.bfloat16)(images)
    torch.testing.assert_close(found, backbone(images))
