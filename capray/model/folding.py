"""A frozen encoder laid out for inference. The encoder itself, and with it the checkpoint, stays as it is.

BatchNorm in evaluation mode is an affine map of each channel: behind a convolution it becomes part of its weights.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

CPU_MICRO_BATCH = 8
"""Images a CPU encodes at once: more fall out of its caches, fewer do not pay for the calls."""
GPU_MICRO_BATCH = 128
"""Images a GPU encodes at once: enough to fill it, and the memory of the early layers stays bounded."""


def fold_batchnorm(backbone: nn.Module) -> nn.Module:
    """A copy of ``backbone`` whose BatchNorms are part of the convolutions before them, where they follow one directly.

    What cannot be traced is copied as it is.
    """
    try:
        plain = _without_fused_layers(_copy(backbone))
        folded = fx.GraphModule(plain, _Tracer().trace(plain))
    except Exception:  # Python that depends on the images: nothing to fold safely.
        return _copy(backbone)
    modules = dict(folded.named_modules())
    calls = [node.target for node in folded.graph.nodes if node.op == "call_module"]
    for node in list(folded.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        (source,) = node.args
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        if not _is_plain(modules[source.target]) or calls.count(source.target) > 1:
            continue
        convolution = fuse_conv_bn_eval(modules[source.target], modules[node.target])
        folded.set_submodule(str(source.target), convolution)
        modules[source.target] = convolution
        node.replace_all_uses_with(source)
        folded.graph.erase_node(node)
    folded.delete_all_unused_submodules()
    folded.recompile()
    return folded


def fuse_activations(folded: nn.Module) -> nn.Module:
    """``folded`` with each convolution, the sum behind it and the ReLU behind those in one kernel of cuDNN's, for GPUs: by
    themselves the sums and ReLUs of a ResNet take longer than its convolutions."""
    if not isinstance(folded, fx.GraphModule):
        return folded
    modules = dict(folded.named_modules())

    def convolution_of(node: object) -> nn.Conv2d | None:
        """The convolution that ``node`` is, where nothing else looks at its result."""
        if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) > 1:
            return None
        module = modules[str(node.target)]
        return module if type(module) is nn.Conv2d and _can_be_fused(module) else None

    for node in list(folded.graph.nodes):
        if node.op != "call_module" or type(modules[node.target]) is not nn.ReLU:
            continue
        (source,), added, replaced = node.args, None, [node]
        if source.op == "call_function" and source.target in _SUMS and len(source.users) == 1:
            replaced.append(source)
            source, added = sorted(source.args, key=lambda part: convolution_of(part) is None)
        convolution = convolution_of(source)
        if convolution is None:
            continue
        fused = _ConvolutionReLU(convolution)
        if (other := convolution_of(added)) and other.bias is not None:  # What it adds to each channel is added once.
            fused.bias = nn.Parameter(fused.bias + other.bias, requires_grad=False)
            other.bias = None
        folded.set_submodule(str(source.target), fused)
        modules[source.target] = fused
        with folded.graph.inserting_before(node):
            arguments = source.args if added is None else (*source.args, added)
            node.replace_all_uses_with(folded.graph.call_module(source.target, arguments))
        for each in (*replaced, source):
            folded.graph.erase_node(each)
    folded.recompile()
    return folded


_SUMS = (operator.add, operator.iadd, torch.add)


def _can_be_fused(convolution: nn.Conv2d) -> bool:
    plain = convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)
    return plain and convolution.groups == 1 and convolution.bias is not None and convolution.in_channels % 8 == 0


class _ConvolutionReLU(nn.Module):
    """relu(convolution(x) + z)."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        assert convolution.bias is not None, "a folded convolution has a bias"
        self.weight, self.bias = convolution.weight, convolution.bias
        self.settings: Any = convolution.stride, convolution.padding, convolution.dilation, convolution.groups

    def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        if not x.is_cuda:
            x = nn.functional.conv2d(x, self.weight, self.bias, *self.settings)
            return torch.relu(x if z is None else x + z)
        if z is None:
            return torch.cudnn_convolution_relu(x, self.weight, self.bias, *self.settings)
        return torch.cudnn_convolution_add_relu(x, self.weight, z, 1.0, self.bias, *self.settings)


class _Tracer(fx.Tracer):
    """Takes every kind of convolution as one: timm's that pads by the image's size (TensorFlow's SAME) cannot be traced."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)


def _is_plain(module: nn.Module) -> bool:
    """Whether a convolution uses its weights as they are, and gives nothing but their product. (One that standardises them
    does not.)"""
    return type(module) is nn.Conv2d or (isinstance(module, nn.Conv2d) and _is_timms(module, "Conv2dSame"))


def _without_fused_layers(module: nn.Module) -> nn.Module:
    """``module``, changed in place: timm's BatchNorm with an activation in it becomes the two, one after the other."""
    for name, part in list(module.named_modules()):
        if _is_timms(part, "BatchNormAct2d"):
            norm = nn.BatchNorm2d(part.num_features, part.eps, device=part.weight.device, dtype=part.weight.dtype)
            norm.load_state_dict({key: value for key, value in part.state_dict().items() if "." not in key})
            norm.eval().requires_grad_(False)
            module.set_submodule(name, nn.Sequential(norm, part.drop, part.act))
    return module


def _is_timms(module: nn.Module, name: str) -> bool:
    """Whether ``module`` is of timm's layer ``name``, without loading timm."""
    return type(module).__name__ == name and type(module).__module__.startswith("timm.layers.")


def _copy(module: nn.Module) -> nn.Module:
    """A deep copy in evaluation mode; hooks and gradients are left behind."""
    return copy.deepcopy(module).eval().requires_grad_(False)


class FoldedEncoder(nn.Module):
    """The encoder's backbone with BatchNorm folded, its weights in ``dtype`` once, channels last; images are encoded a few
    at a time, which changes nothing but rounding."""

    def __init__(self, backbone: nn.Module, dtype: torch.dtype = torch.float32):
        super().__init__()
        folded = fold_batchnorm(backbone)
        if dtype != torch.float32 and next(iter(backbone.parameters()), torch.empty(0)).is_cuda:
            folded = fuse_activations(folded)
        self.backbone = folded.to(dtype).to(memory_format=torch.channels_last)
        self.dtype = dtype

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """The native grid (B, D, h, w) of normalised images."""
        size = GPU_MICRO_BATCH if images_B3HW.is_cuda else CPU_MICRO_BATCH
        images_B3HW = images_B3HW.to(self.dtype)
        if len(images_B3HW) <= size:
            return self.backbone(images_B3HW)
        return torch.cat([self.backbone(part) for part in images_B3HW.split(size)])
