"""A frozen encoder laid out for inference. The encoder itself, and with it the checkpoint, stays as it is.

BatchNorm in evaluation mode is an affine map of each channel: behind a convolution it becomes part of its weights.
"""

from __future__ import annotations

import copy

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from capray.config import Preprocessing
from capray.images import normalise, statistics_of
from capray.model.efficientnet import BatchNormReLU6, SameConvolution
from capray.model.fusing import DEVIATION, Patches, cast, fuse, take_patches
from capray.model.gpu import kernels_of
from capray.model.means import centre, correct, normals_of

CPU_MICRO_BATCH = 8
"""Images a CPU encodes at once: more fall out of its caches, fewer do not pay for the calls."""
GPU_MICRO_BATCH = 256
"""Images a GPU encodes at once: enough to fill it, and the memory of the early layers stays bounded."""


def fold_batchnorm(backbone: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy of ``backbone`` whose BatchNorms are part of the convolutions before them, where they follow one directly, in
    fp32; its biases make up for weights rounded to ``dtype``.

    What cannot be traced is copied as it is.
    """
    try:
        plain = _without_fused_layers(_copy(backbone))
        folded = fx.GraphModule(plain, _Tracer().trace(plain))
    except Exception:  # Python that depends on the images: nothing to fold safely.
        return _copy(backbone)
    modules = dict(folded.named_modules())
    for node in list(folded.graph.nodes):
        if node.op == "call_module" and isinstance(modules[node.target], nn.Identity):
            node.replace_all_uses_with(node.args[0])
            folded.graph.erase_node(node)
    norms = {}
    calls = [node.target for node in folded.graph.nodes if node.op == "call_module"]
    for node in list(folded.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        if modules[node.target].affine:
            norms[node] = modules[node.target]
        (source,) = node.args
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        if not _is_plain(modules[source.target]) or calls.count(source.target) > 1:
            continue
        convolution = fuse_conv_bn_eval(modules[source.target], modules[node.target])
        folded.set_submodule(str(source.target), convolution)
        modules[source.target] = convolution
        if node in norms:
            norms[source] = norms.pop(node)
        node.replace_all_uses_with(source)
        folded.graph.erase_node(node)
    normals = normals_of(folded, norms)
    for node, normal in normals.items():
        node.meta[DEVIATION] = normal.deviation
    centre(folded, normals)
    if dtype != torch.float32:
        correct(folded, normals, dtype)
    folded.delete_all_unused_submodules()
    folded.recompile()
    return folded


class _Tracer(fx.Tracer):
    """Takes every kind of convolution as one: timm's that pads by the image's size (TensorFlow's SAME) cannot be traced."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)


def _is_plain(module: nn.Module) -> bool:
    """Whether a convolution uses its weights as they are, and gives nothing but their product. (One that standardises them
    does not.)"""
    return type(module) in (nn.Conv2d, SameConvolution) or _is_timms(module, "Conv2dSame")


def _without_fused_layers(module: nn.Module) -> nn.Module:
    """``module``, changed in place: a BatchNorm with an activation in it becomes the two, one after the other."""
    for name, part in list(module.named_modules()):
        if isinstance(part, BatchNormReLU6) or _is_timms(part, "BatchNormAct2d"):
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
        folded = fold_batchnorm(backbone, dtype)
        self.patches = Patches()
        is_cuda = next(iter(backbone.parameters()), torch.empty(0)).is_cuda
        if is_cuda and dtype != torch.float32:
            self.patches = take_patches(folded)
        if not is_cuda or dtype != torch.float32:
            fuse(folded)
        self.backbone = cast(folded, dtype)
        self.dtype = dtype

    def forward(self, pixels_BHW3: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
        """The native grid (B, D, h, w) of uint8 images on the encoder's device."""
        size = GPU_MICRO_BATCH if pixels_BHW3.is_cuda else CPU_MICRO_BATCH
        grids = [self.backbone(self._normalised(part, preprocessing)) for part in pixels_BHW3.split(size)]
        return grids[0] if len(grids) == 1 else torch.cat(grids)

    def _normalised(self, pixels_BHW3: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
        if kernels := kernels_of(pixels_BHW3.device):
            statistics = statistics_of(preprocessing, pixels_BHW3.device)
            return kernels.patches_of(pixels_BHW3, *statistics, self.dtype, self.patches)
        images_B3HW = normalise(pixels_BHW3, preprocessing).to(self.dtype)
        return images_B3HW if self.patches == Patches() else self.patches.of(images_B3HW)
