"""timm's networks as encoders: `timm/NAME`. timm is an extra of capray's and is loaded where one is built, but for
EfficientNet-Lite0 without its published weights."""

from __future__ import annotations

import copy
import difflib
from typing import Any

import torch
from torch import nn

from capray.errors import ConfigError
from capray.model import efficientnet

PREFIX = "timm/"

_CONTAINERS = ("blocks", "stages", "features", "layers")
"""What timm calls sequences of blocks."""
_SIDE = 64
"""Of the image that a network is tried with."""


def children(encoder: str, pretrained: bool) -> list[tuple[str, nn.Module]]:
    """The parts of ``encoder``'s network up to its grid, under timm's own names; they run one after the other.

    Raises:
        ConfigError: timm is not installed or knows no such network, its weights cannot be had, or it gives no grid, or not
            by a sequence of parts.
    """
    name = encoder.removeprefix(PREFIX)
    if name.partition(".")[0] == efficientnet.NAME and not pretrained:  # Behind a dot stands which weights.
        return efficientnet.efficientnet_lite0()
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"encoder {encoder!r} needs timm: uv sync --extra timm ({error})") from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), 6, 0.5)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ConfigError(f"encoder {encoder!r}: timm {timm.__version__} has no such network{hint}")
    try:
        network = timm.create_model(name, pretrained=pretrained)
    except Exception as error:  # Whatever its library for downloads raises; without pretrained it has raised nothing.
        raise ConfigError(
            f"could not get timm's weights of {encoder}: {error}; download them elsewhere and give the file: --weights FILE"
        ) from error
    parts = _up_to_grid(network)
    if parts is None:
        raise ConfigError(
            f"encoder {encoder!r} gives no grid of features by a sequence of parts: choose timm/resnet50, "
            "timm/tf_efficientnet_lite0, timm/mobilenetv3_large_100, timm/regnety_008 …"
        )
    return parts


@torch.no_grad()
def _up_to_grid(network: Any) -> list[tuple[str, nn.Module]] | None:
    """The first children of ``network`` that together give what its ``forward_features`` gives, a grid; None where no
    sequence of them does."""
    tried = copy.deepcopy(network).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image = torch.rand(1, 3, _SIDE, _SIDE)
        # A new network's BatchNorm changes nothing, and would not be missed.
        for values in tried.state_dict().values():
            if values.is_floating_point() and values.dim() < 2:
                values.mul_(torch.empty_like(values).uniform_(0.5, 1.5)).add_(torch.rand_like(values) / 10)
    names = []
    try:
        wanted = tried.forward_features(image.clone())
        if wanted.dim() != 4 or wanted.shape[2] != wanted.shape[3]:
            return None
        found = image
        for name, part in tried.named_children():
            found = part(found)
            names.append(name)
            if found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-5, rtol=1e-4):
                return [(name, network.get_submodule(name)) for name in names]
    except Exception:  # A part that takes something else, or a network that takes no image of this size.
        return None
    return None


def blocks(parts: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """The blocks of ``children`` by name, those of its sequences one by one (`blocks.3`)."""
    named = []
    for name, part in parts:
        if name in _CONTAINERS and type(part) is nn.Sequential:
            named += [(f"{name}.{child}", block) for child, block in part.named_children()]
        else:
            named.append((name, part))
    return named
