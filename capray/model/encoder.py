"""The convolutional encoder: an image becomes a grid of features.

Axes: B images, D channels, h and w rows and columns of the native grid.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import nn

from capray.errors import CheckpointError, ConfigError
from capray.model import timm_networks
from capray.model.mobilenet import mobilenet_v2_features
from capray.storage import locate, read_bytes

_NORMALISATIONS = (nn.modules.batchnorm._BatchNorm,)


def _tiny() -> nn.Sequential:
    """Four strided convolutions with group normalisation: trains from scratch in minutes, for demos and tests.

    One eighth of the input's side, 128 channels. Group normalisation keeps no running statistics, so training it
    needs none of the care that BatchNorm in a fine-tuned backbone does.
    """

    def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.GroupNorm(8, outputs),
            nn.ReLU(inplace=True),
        )

    channels_and_strides = ((3, 32, 2), (32, 64, 2), (64, 128, 2), (128, 128, 1))
    return _named((f"layer{i}", block(*shape)) for i, shape in enumerate(channels_and_strides, start=1))


def _named(blocks: Iterable[tuple[str, nn.Module]]) -> nn.Sequential:
    named: OrderedDict[str, nn.Module] = OrderedDict(blocks)
    return nn.Sequential(named)


def _backbone(name: str, weights: str | None) -> nn.Sequential:
    """The named network without its head, its blocks under torchvision's or timm's own names."""
    if name == "tiny":
        return _tiny()
    if name.startswith(timm_networks.PREFIX):
        return _named(timm_networks.children(name, pretrained=weights is not None))
    if name == "mobilenet_v2" and weights is None:
        return _named([("features", mobilenet_v2_features())])
    import torchvision  # Takes as long to import as torch does.

    try:
        network = torchvision.models.get_model(name, weights=weights)
    except ValueError as error:
        known = [n for n in torchvision.models.list_models(module=torchvision.models) if n.startswith(name[:4])]
        hint = f"; near it: {', '.join(known[:8])}" if known else ""
        raise ConfigError(f"encoder {name!r} with weights {weights!r}: {error}{hint}") from error
    except OSError as error:
        raise ConfigError(
            f"could not download the ImageNet weights ({weights}) of {name}: {error}; download them elsewhere and give "
            "the file: --weights FILE"
        ) from error
    if isinstance(network, torchvision.models.ResNet):
        stem_and_stages = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
        return _named((block, getattr(network, block)) for block in stem_and_stages)
    features = getattr(network, "features", None)
    if isinstance(features, nn.Sequential):
        return _named([("features", features)])
    raise ConfigError(f"encoder {name!r} gives no grid of features: choose a resnet, mobilenet_v2, densenet121 …")


def _read_weights(uri: str) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or .pth file; a .pth with anything but tensors is refused, never executed."""
    data = read_bytes(locate(uri))
    try:
        if uri.endswith(".safetensors"):
            import safetensors.torch

            return safetensors.torch.load(data)
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"cannot read the weights {uri!r}: {str(error).splitlines()[0]}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"the weights {uri!r} are not a mapping of names to tensors")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _load_weights(backbone: nn.Sequential, uri: str) -> None:
    wanted = backbone.state_dict()
    found = {name: tensor for name, tensor in _read_weights(uri).items() if name in wanted}
    missing = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    if missing:
        raise CheckpointError(
            f"the weights {uri!r} do not fit the encoder: {len(missing)} of {len(wanted)} tensors are missing, "
            f"{missing[0]!r} first"
        )
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"the weights {uri!r} do not fit the encoder: {name!r} is {tuple(tensor.shape)}, "
                f"not {tuple(wanted[name].shape)}"
            )
    backbone.load_state_dict(found, strict=False)


class Encoder(nn.Module):
    """A backbone whose feature map is a grid, frozen but for the blocks from ``fine_tune_from`` on.

    BatchNorm keeps its running statistics fixed whether frozen or fine-tuned: small batches and DDP shards would
    spoil them. Frozen blocks are in evaluation mode and get no gradients.

    Args:
        name: a torchvision model with a grid of features, one of timm's (``timm/resnet50``), or ``tiny``.
        weights: ``imagenet`` or a torchvision weights name (downloaded), a file or URI, or None for random ones.
        fine_tune_from: the first block to train, by its name in the backbone; ``all``; None to freeze everything.

    Raises:
        ConfigError: unknown name or block, or no grid.
        CheckpointError: the weights file is unreadable, unsafe, or does not fit.
    """

    def __init__(self, name: str, weights: str | None = None, fine_tune_from: str | None = None):
        super().__init__()
        self._is_timm = name.startswith(timm_networks.PREFIX)
        published = weights is not None and (weights == "imagenet" or weights.startswith("IMAGENET"))
        published_name = ("DEFAULT" if weights == "imagenet" else weights) if published else None
        if published and name == "tiny":
            raise ConfigError("encoder 'tiny' has no published weights: leave --weights out and give --fine-tune-from all")
        if published and self._is_timm and weights != "imagenet":
            raise ConfigError(
                f"weights {weights!r} is torchvision's, and encoder {name!r} timm's: give --weights imagenet, and choose "
                "among timm's by the encoder's tag (timm/NAME.TAG)"
            )
        self.backbone = _backbone(name, published_name).to(memory_format=torch.channels_last)
        if weights is not None and not published:
            _load_weights(self.backbone, weights)
        self._freeze(fine_tune_from)
        with torch.no_grad():
            grid = self.eval()(torch.zeros(1, 3, 64, 64))
        if grid.dim() != 4 or grid.shape[2] != grid.shape[3]:
            raise ConfigError(f"encoder {name!r} gives no grid of features but shape {tuple(grid.shape)}")
        self.dim: int = grid.shape[1]
        self.train()

    def _blocks(self) -> list[tuple[str, nn.Module]]:
        blocks = list(self.backbone.named_children())
        if self._is_timm:
            return timm_networks.blocks(blocks)
        if len(blocks) == 1 and isinstance(blocks[0][1], nn.Sequential):
            name, features = blocks[0]
            return [(f"{name}.{child}", block) for child, block in features.named_children()]
        return blocks

    def _freeze(self, fine_tune_from: str | None) -> None:
        blocks = self._blocks()
        names = [name for name, _ in blocks]
        if fine_tune_from is None:
            first = len(blocks)
        elif fine_tune_from == "all":
            first = 0
        elif fine_tune_from in names:
            first = names.index(fine_tune_from)
        else:
            raise ConfigError(f"--fine-tune-from {fine_tune_from!r} is no block of the encoder: {', '.join(names)}, all")
        self._frozen_names = tuple(f"backbone.{name}." for name in names[:first])
        self._frozen = [block for _, block in blocks[:first]]
        self._tuned = [block for _, block in blocks[first:]]
        for block in self._frozen:
            block.requires_grad_(False)

    @property
    def is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.parameters())

    @property
    def has_frozen_blocks(self) -> bool:
        return bool(self._frozen)

    def frozen_state(self) -> dict[str, torch.Tensor]:
        """The weights and statistics of the frozen blocks."""
        return {name: value for name, value in self.state_dict().items() if name.startswith(self._frozen_names)}

    def train(self, mode: bool = True) -> Encoder:
        super().train(mode)
        for block in self._frozen:
            block.eval()
        for module in self.modules():
            if isinstance(module, _NORMALISATIONS):
                module.eval()
        return self

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """The native grid (B, D, h, w) of normalised images."""
        return self.finish(self.begin(images_B3HW))

    @torch.no_grad()
    def begin(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """What the frozen blocks make of normalised images: the native grid where all are frozen."""
        for block in self._frozen:
            images_B3HW = block(images_B3HW)
        return images_B3HW

    def finish(self, features_BDhw: torch.Tensor) -> torch.Tensor:
        """The native grid from what ``begin`` gave."""
        if self._tuned:
            features_BDhw = features_BDhw.to(memory_format=torch.channels_last)
        for block in self._tuned:
            features_BDhw = block(features_BDhw)
        return features_BDhw
