"""torchvision's MobileNetV2 up to its grid, under torchvision's names, without torchvision, which takes as long to import as
torch does.

Sandler et al. 2018, table 2. Its weights, and what it computes of them, are torchvision's.
"""

from __future__ import annotations

import torch
from torch import nn

_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels, blocks, and stride of the first block."""


def _convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    padding = (kernel - 1) // 2
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class _InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        self.conv = nn.Sequential(
            *([_convolution(inputs, hidden, kernel=1)] if expansion > 1 else []),
            _convolution(hidden, hidden, stride=stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.is_residual else self.conv(x)


def mobilenet_v2_features() -> nn.Sequential:
    """What torchvision calls ``features``, with random weights."""
    channels = 32
    blocks: list[nn.Module] = [_convolution(3, channels, stride=2)]
    for expansion, outputs, count, first_stride in _STAGES:
        for i in range(count):
            blocks.append(_InvertedResidual(channels, outputs, 1 if i else first_stride, expansion))
            channels = outputs
    features = nn.Sequential(*blocks, _convolution(channels, 1280, kernel=1))
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return features
