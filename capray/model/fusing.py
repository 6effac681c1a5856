"""A folded encoder in which each convolution is one with the sum and the activation behind it. On GPUs in bf16 the sums,
activations and poolings between convolutions, and a first convolution that sees three channels, take longer than all the
other convolutions. On CPUs oneDNN has convolutions with activations, and with biases in fp32.

Axes: B images, C channels, H rows, W columns; h, w those of patches.
"""

from __future__ import annotations

import math
import operator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional

from capray.model.gpu import kernels_of

MOST_LOST = 1 / 64
"""Of the deviation of what a convolution gives, by rounding its bias."""
CHANNELS = 8
"""To a multiple of which an image's channels are filled up: with fewer a GPU's matrix units are not used."""


class Patches(NamedTuple):
    """How images are laid out so that a first convolution of some stride becomes one of stride 1: the pixels of a patch of
    stride x stride are its channels (as ``pixel_unshuffle`` orders them), and patches of zeros take the place of padding."""

    stride: int = 1
    kernel: int = 1
    padding: int = 0
    num_channels: int = 3

    @property
    def before(self) -> int:
        """Patches of zeros before the image's first, on each axis."""
        return -(-self.padding // self.stride)

    @property
    def num_taps(self) -> int:
        """Patches that the kernel covers, on each axis."""
        return -(-(self.before * self.stride - self.padding + self.kernel) // self.stride)

    def count(self, side: int) -> int:
        """Patches along a side of so many pixels."""
        return (side + 2 * self.padding - self.kernel) // self.stride + self.num_taps

    def of(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """The patches (B, C, h, w) of normalised images."""
        around = []
        for side in (images_B3HW.shape[3], images_B3HW.shape[2]):
            start = self.before * self.stride
            around += [start, self.count(side) * self.stride - start - side]
        patches_BChw = functional.pixel_unshuffle(functional.pad(images_B3HW, around), self.stride)
        added = self.num_channels - patches_BChw.shape[1]
        return functional.pad(patches_BChw, (0, 0, 0, 0, 0, added)).contiguous(memory_format=torch.channels_last)


def take_patches(folded: nn.Module) -> Patches:
    """The layout that ``folded``, changed in place, takes its images in."""
    if not isinstance(folded, fx.GraphModule):
        return Patches()
    (images,) = (node for node in folded.graph.nodes if node.op == "placeholder")
    convolution = convolution_of(next(iter(images.users)), folded) if len(images.users) == 1 else None
    if convolution is None or convolution.groups != 1:
        return Patches()
    sizes = convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation
    if any(first != second for first, second in sizes) or convolution.dilation[0] != 1:
        return Patches()
    (kernel, _), (stride, _), (padding, _), _ = sizes
    used = 3 * stride**2
    patches = Patches(stride, kernel, padding, math.ceil(used / CHANNELS) * CHANNELS)
    start, size = patches.before * stride - padding, patches.num_taps * stride
    weight = functional.pad(convolution.weight, (start, size - start - kernel) * 2)
    weight = functional.pad(functional.pixel_unshuffle(weight, stride), (0, 0, 0, 0, 0, patches.num_channels - used))
    convolution.weight = nn.Parameter(weight, requires_grad=False)
    convolution.in_channels, convolution.kernel_size = patches.num_channels, (patches.num_taps, patches.num_taps)
    convolution.stride, convolution.padding = (1, 1), (0, 0)
    return patches


def fuse(folded: nn.Module) -> None:
    """Make one of each convolution, the sum behind it and the ReLU or ReLU6 behind those, and give max-pooling its kernel;
    in place."""
    if not isinstance(folded, fx.GraphModule):
        return
    for node in list(folded.graph.nodes):
        if node.op != "call_module":
            continue
        module = folded.get_submodule(str(node.target))
        if type(module) in LIMITS:
            low, high = LIMITS[type(module)]
            _fuse_up_to(folded, node, low, high)
        elif type(module) is nn.MaxPool2d and _is_simple(module):
            folded.set_submodule(str(node.target), MaxPool(module))
    for node in list(folded.graph.nodes):
        if convolution_of(node, folded) is None:
            continue
        user = next(iter(node.users), None)
        is_summed = len(node.users) == 1 and user is not None and user.target in SUMS
        _fuse_up_to(folded, user if is_summed else node, -math.inf, math.inf)
    folded.recompile()


DEVIATION = "deviation"
"""In a node's ``meta``: of each channel that it gives."""
LIMITS: dict[type, tuple[float, float]] = {nn.ReLU: (0.0, math.inf), nn.ReLU6: (0.0, 6.0)}
SUMS = (operator.add, operator.iadd, torch.add)


def cast(folded: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``folded`` with weights in ``dtype``, channels last; the biases of fused convolutions stay in fp32."""
    fused = [module for module in folded.modules() if isinstance(module, FusedConvolution)]
    tensors = [*folded.state_dict().values(), *(module.bias for module in fused)]
    folded = folded.to(dtype).to(memory_format=torch.channels_last)
    # oneDNN's ReLU makes 0 of NaN, which is to come out where weights are broken.
    is_onednns = all(t.device.type == "cpu" and bool(t.isfinite().all()) for t in tensors) and has_onednn(dtype)
    for module in fused:
        module.cast(dtype, is_onednns)
    return folded


def _fuse_up_to(folded: fx.GraphModule, last: Any, low: float, high: float) -> None:
    """One module of what ends with ``last``, where that is a convolution, a sum of one and something else, or what cuts one
    of these off at ``low`` and ``high``."""
    replaced, source, added = [last], last, None
    if last.op == "call_module" and type(folded.get_submodule(str(last.target))) in LIMITS:
        if len(last.args) != 1:
            return
        (source,) = last.args
        replaced.append(source)
    if source.op == "call_function" and source.target in SUMS and (source is last or len(source.users) == 1):
        if source.kwargs or len(source.args) != 2 or source.args[0] is source.args[1]:
            return
        if not all(isinstance(part, fx.Node) for part in source.args):
            return
        if source.target is operator.iadd and len(source.args[0].users) > 1:  # They see what is added.
            return
        source, added = sorted(source.args, key=lambda part: not _is_free(part, folded))
        replaced.append(source)
    if not isinstance(source, fx.Node) or (source is not last and not _is_free(source, folded)):
        return
    convolution = convolution_of(source, folded)
    if convolution is None or (source is not last and any(_overwrites(user, folded) for user in source.args[0].users)):
        return
    if added is not None and _is_free(added, folded):  # What both add to each channel is added once.
        other = convolution_of(added, folded)
        convolution.bias = nn.Parameter(convolution.bias + other.bias, requires_grad=False)
        other.bias = None
    fused = FusedConvolution(convolution, low, high, source.meta.get(DEVIATION))
    folded.set_submodule(str(source.target), fused)
    with folded.graph.inserting_before(last):
        arguments = source.args if added is None else (*source.args, added)
        last.replace_all_uses_with(folded.graph.call_module(str(source.target), arguments))
    for node in dict.fromkeys(replaced):
        folded.graph.erase_node(node)


def convolution_of(node: Any, folded: fx.GraphModule) -> Any:
    """The convolution with a bias that ``node`` is; None where it is something else, or used elsewhere too."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 1:
        return None
    module = folded.get_submodule(str(node.target))
    if type(module) is not nn.Conv2d or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None
    is_shared = sum(other.target == node.target for other in folded.graph.nodes) > 1
    return None if module.bias is None or is_shared else module


def _is_free(node: Any, folded: fx.GraphModule) -> bool:
    """Whether ``node`` is a convolution whose result nothing else looks at."""
    return convolution_of(node, folded) is not None and len(node.users) == 1


def _overwrites(node: fx.Node, folded: fx.GraphModule) -> bool:
    """Whether ``node`` may change its input in place, before which a convolution cannot be moved behind it."""
    if node.op == "call_module":
        return bool(getattr(folded.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.target is operator.iadd or name.endswith("_") or bool(node.kwargs.get("inplace", False))


def _is_simple(pool: nn.MaxPool2d) -> bool:
    numbers = pool.kernel_size, pool.stride, pool.padding
    return all(isinstance(n, int) for n in numbers) and pool.dilation == 1 and not (pool.ceil_mode or pool.return_indices)


class FusedConvolution(nn.Module):
    """convolution(x) + z, cut off at ``low`` and ``high``. The bias stays in fp32 when the weights are cast.

    Args:
        deviation: of each of the convolution's channels (C,), where it is known.
    """

    def __init__(self, convolution: nn.Conv2d, low: float, high: float, deviation: torch.Tensor | None = None):
        super().__init__()
        assert convolution.bias is not None, "a folded convolution has a bias"
        self.weight, self.bias = convolution.weight, convolution.bias.detach()
        self.settings: Any = convolution.stride, convolution.padding, convolution.dilation, convolution.groups
        self.low, self.high = low, high
        is_aligned = convolution.in_channels % CHANNELS == 0 and convolution.out_channels % CHANNELS == 0
        self.is_cudnns = (low, high) == LIMITS[nn.ReLU] and convolution.groups == 1 and is_aligned
        self.deviation = deviation
        self._rounded_bias = self.bias
        self.is_onednns = False
        self._packed: tuple[torch.Size, torch.Tensor] | None = None
        """A shape of ``x``, and the weights as oneDNN has laid them out for it."""

    def cast(self, dtype: torch.dtype, is_onednns: bool) -> None:
        """Cast the weights, and choose among the ways to compute it."""
        self.to(dtype).to(memory_format=torch.channels_last)
        self._rounded_bias = self.bias.to(dtype)
        if self.deviation is not None:  # cuDNN takes the bias in the weights' type.
            lost = (self._rounded_bias - self.bias).norm()
            self.is_cudnns &= bool(lost <= MOST_LOST * self.deviation.norm())
        self.is_onednns = is_onednns

    def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        if self.is_onednns:
            return self._by_onednn(x, z)
        # What is of another shape is stretched as it is added.
        is_plain = z is None or z.shape == self._shape(x)
        if x.is_cuda and self.is_cudnns and is_plain:
            if z is None:
                return torch.cudnn_convolution_relu(x, self.weight, self._rounded_bias, *self.settings)
            return torch.cudnn_convolution_add_relu(x, self.weight, z, 1.0, self._rounded_bias, *self.settings)
        if is_plain and (kernels := kernels_of(x.device)):
            x = functional.conv2d(x, self.weight, None, *self.settings)
            return kernels.biased(x, self.bias, z, self.low, self.high)
        x = functional.conv2d(x, self.weight, self.bias.to(x.dtype), *self.settings)
        x = x if z is None else x + z
        return x if self._is_free else x.clamp(self.low, self.high)

    @property
    def _is_free(self) -> bool:
        return (self.low, self.high) == (-math.inf, math.inf)

    def _by_onednn(self, x: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
        stride, padding, dilation, groups = self.settings
        settings, weight = (padding, stride, dilation, groups), self.weight
        if x.dtype != torch.float32:  # For which weights need not be laid out.
            packed = self._packed
            if packed is None or packed[0] != x.shape:  # Other threads may do so, too.
                packed = self._packed = x.shape, _ONEDNN._reorder_convolution_weight(weight, *settings, x.shape)
            _, weight = packed
        limits = _NO_LIMITS if self._is_free or z is not None else ("hardtanh", [self.low, self.high])
        y = _ONEDNN._convolution_pointwise(x, weight, self.bias, *settings, *limits, "")
        if z is None:
            return y
        y = y.add_(z) if y.shape == z.shape else y + z
        return y if self._is_free else y.clamp_(self.low, self.high)

    def _shape(self, x: torch.Tensor) -> tuple[int, ...]:
        """Of the convolution's result."""
        (num_channels, _, *kernel), (stride, padding, dilation, _) = self.weight.shape, self.settings
        places = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
        return len(x), num_channels, *((side + 2 * p - d * (k - 1) - 1) // s + 1 for side, k, s, p, d in places)


_ONEDNN = torch.ops.mkldnn
_NO_LIMITS: tuple[str, list[float]] = ("none", [])


@lru_cache
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether this CPU and this torch have oneDNN's convolutions (private operations of torch's) as they are called here."""
    settings, bias = ((0, 0), (1, 1), (1, 1), 1), torch.arange(CHANNELS) - 10.0
    x, weight = (torch.ones(shape, dtype=dtype) for shape in ((1, CHANNELS, 1, 1), (CHANNELS, CHANNELS, 1, 1)))
    try:
        weight = _ONEDNN._reorder_convolution_weight(weight, *settings, x.shape)
        y = _ONEDNN._convolution_pointwise(x, weight, bias, *settings, "hardtanh", [0.0, 3.5], "")
    except Exception:
        return False
    return torch.equal(y.flatten(), (CHANNELS + bias).clamp(0.0, 3.5).to(dtype))


class MaxPool(nn.Module):
    """nn.MaxPool2d, whose own kernel for channels last takes several times as long as the memory would."""

    def __init__(self, pool: nn.MaxPool2d):
        super().__init__()
        self.pool = pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if kernels := kernels_of(x.device):
            return kernels.max_pooled(x, self.pool.kernel_size, self.pool.stride, self.pool.padding)
        return self.pool(x)
