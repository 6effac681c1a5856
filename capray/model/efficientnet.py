"""timm's tf_efficientnet_lite0 up to its grid, under timm's names. It needs no timm, which is an extra and slow to load.

EfficientNet (Tan and Le 2019, table 1) without squeeze-and-excitation and with ReLU6, as TensorFlow's EfficientNet-Lite has
it. Its weights, and what it computes of them, are timm's.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

NAME = "tf_efficientnet_lite0"
_STAGES = ((2, 3, 24, 2), (2, 5, 40, 2), (3, 3, 80, 2), (3, 5, 112, 1), (4, 5, 192, 2), (1, 3, 320, 1))
"""Blocks, kernel, channels, and stride of the first block, from the second stage on."""
_EXPANSION = 6


class SameConvolution(nn.Conv2d):
    """Pads as TensorFlow's SAME does: by the image's size, and more behind than before."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        padding = []
        for side, kernel, stride in zip(reversed(input.shape[2:]), self.kernel_size, self.stride, strict=True):
            total = max(0, (-(-side // stride) - 1) * stride + kernel - side)
            padding += [total // 2, total - total // 2]
        return self._conv_forward(functional.pad(input, padding), self.weight, self.bias)


class BatchNormReLU6(nn.BatchNorm2d):
    """BatchNorm and ReLU6 in one; its parts are named as in timm's BatchNormAct2d."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-3)
        self.drop, self.act = nn.Identity(), nn.ReLU6(inplace=True)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(input))


def _convolution(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    if stride > 1:
        return SameConvolution(inputs, outputs, kernel, stride, groups=groups, bias=False)
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)


class _Block(nn.Module):
    """An inverted residual; without expansion, a depthwise separable convolution."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        depthwise = _convolution(hidden, hidden, kernel, stride, groups=hidden)
        last, norm = _convolution(hidden, outputs), nn.BatchNorm2d(outputs, eps=1e-3)
        if expansion == 1:
            names, parts = ("conv_dw", "bn1", "conv_pw", "bn2"), (depthwise, BatchNormReLU6(hidden), last, norm)
        else:
            names = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
            widening = _convolution(inputs, hidden), BatchNormReLU6(hidden)
            parts = (*widening, depthwise, BatchNormReLU6(hidden), last, norm)
        for name, part in zip(names, parts, strict=True):
            self.add_module(name, part)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for part in self.children():
            y = part(y)
        return x + y if self.is_residual else y


def efficientnet_lite0() -> list[tuple[str, nn.Module]]:
    """The parts up to the grid, with random weights; they run one after the other."""
    stages, channels = [nn.Sequential(_Block(32, 16, 3, 1, 1))], 16
    for count, kernel, outputs, stride in _STAGES:
        blocks = []
        for i in range(count):
            blocks.append(_Block(channels, outputs, kernel, 1 if i else stride, _EXPANSION))
            channels = outputs
        stages.append(nn.Sequential(*blocks))
    parts = [
        ("conv_stem", _convolution(3, 32, 3, 2)),
        ("bn1", BatchNormReLU6(32)),
        ("blocks", nn.Sequential(*stages)),
        ("conv_head", _convolution(channels, 1280)),
        ("bn2", BatchNormReLU6(1280)),
    ]
    for _, part in parts:
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
    return parts
