"""Centres an encoder's features before products in bf16. The means and deviations of channels follow from its BatchNorms;
means are subtracted from what a convolution sees and given back by its bias. Where a channel's mean is large beside its
deviation, a BatchNorm magnifies what rounding lost of it.

Axes: C channels.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional

from capray.model.fusing import LIMITS, SUMS, convolution_of


class Normal(NamedTuple):
    """The mean and deviation of each channel (C,), taken to be normally distributed."""

    mean: torch.Tensor
    deviation: torch.Tensor


def normals_of(folded: fx.GraphModule, norms: Mapping[fx.Node, nn.BatchNorm2d]) -> dict[fx.Node, Normal]:
    """Of all nodes of which it is known, given the BatchNorms that became part of nodes (or are nodes)."""
    found: dict[fx.Node, Normal] = {}
    for node in folded.graph.nodes:
        module = folded.get_submodule(str(node.target)) if node.op == "call_module" else None
        if node in norms:
            found[node] = Normal(norms[node].bias, norms[node].weight.abs())
        elif _is_sum(node) and all(part in found for part in node.args):
            first, second = (found[part] for part in node.args)
            found[node] = Normal(first.mean + second.mean, torch.hypot(first.deviation, second.deviation))
        elif type(module) in LIMITS and node.args[:1] and node.args[0] in found:
            found[node] = _cut_off(found[node.args[0]], LIMITS[type(module)][1])
    return found


def _is_sum(node: Any) -> bool:
    """Whether it is the sum of two nodes, and nothing else looks at one that is overwritten by it."""
    if node.op != "call_function" or node.target not in SUMS or node.kwargs or len(node.args) != 2:
        return False
    if not all(isinstance(part, fx.Node) for part in node.args):
        return False
    return node.target is not operator.iadd or len(node.args[0].users) == 1


def _cut_off(normal: Normal, high: float) -> Normal:
    """What is left of it between 0 and ``high``."""
    mean, square = _above(normal, 0.0)
    if high < math.inf:
        above, above_square = _above(normal, high)
        mean, square = mean - above, square - above_square - 2 * high * above
    return Normal(mean, (square - mean.square()).clamp(min=0).sqrt())


def _above(normal: Normal, limit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The means of max(x - limit, 0) and of its square."""
    mean, deviation = normal.mean - limit, normal.deviation.clamp(min=1e-12)
    density = torch.exp(-(mean / deviation).square() / 2) / math.sqrt(2 * math.pi)
    share = torch.special.ndtr(mean / deviation)
    return mean * share + deviation * density, (mean**2 + deviation**2) * share + mean * deviation * density


def centre(folded: fx.GraphModule, normals: dict[fx.Node, Normal]) -> None:
    """Take the means out of what convolutions give, where it goes to convolutions without padding alone, whose biases take
    them up; in place."""
    is_free: dict[Any, bool] = {}
    for node in reversed(folded.graph.nodes):
        users = list(node.users)
        is_free[node] = bool(users) and all(
            is_free[user] if _is_sum(user) else _is_unpadded(convolution_of(user, folded)) for user in users
        )
    taken: dict[Any, torch.Tensor] = {}
    for node in folded.graph.nodes:
        convolution = convolution_of(node, folded)
        if convolution is not None:
            if (mean := taken.get(node.args[0])) is not None:
                _add(convolution, _product(convolution, convolution.weight, mean))
            if is_free[node] and node in normals:
                taken[node] = normals[node].mean
                _add(convolution, -taken[node])
        elif _is_sum(node) and any(part in taken for part in node.args):
            taken[node] = reduce(operator.add, [taken[part] for part in node.args if part in taken])
        if node in taken and node in normals:
            normals[node] = normals[node]._replace(mean=normals[node].mean - taken[node])


def correct(folded: fx.GraphModule, normals: Mapping[fx.Node, Normal], dtype: torch.dtype) -> None:
    """Add to the biases what weights rounded to ``dtype`` are going to miss on average; in place.

    Nagel et al. 2019, section 4.2.
    """
    for node in folded.graph.nodes:
        convolution = convolution_of(node, folded)
        if convolution is not None and (normal := normals.get(node.args[0])) is not None:
            missing = convolution.weight - convolution.weight.to(dtype).to(convolution.weight.dtype)
            _add(convolution, _product(convolution, missing, normal.mean))


def _product(convolution: nn.Conv2d, weight: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """What ``weight`` in ``convolution`` gives where all of its input is ``mean``."""
    mean = mean.expand(convolution.in_channels)[None, :, None, None]
    return functional.conv2d(mean, weight.sum((2, 3), keepdim=True), groups=convolution.groups).flatten()


def _is_unpadded(convolution: nn.Conv2d | None) -> bool:
    return convolution is not None and convolution.padding == (0, 0)


def _add(convolution: nn.Conv2d, bias: torch.Tensor) -> None:
    assert convolution.bias is not None, "a folded convolution has a bias"
    convolution.bias = nn.Parameter(convolution.bias + bias, requires_grad=False)
