"""Checkpoints of sgrvinod's "a PyTorch Tutorial to Image Captioning" as captioners.

That tutorial is a widely copied Show, Attend and Tell: ResNet-101, a grid of 14 x 14, ReLU attention, a gate, an LSTM that
starts from two linear layers of the mean grid. capray's captioner has all its parts, so the import renames tensors and
reorders the rows of words; what the imported captioner computes is the same. Its images are squashed to 256 x 256 by
Pillow's bilinear filter (what ``scipy.misc.imresize`` did).
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
import torchvision

from capray.config import Architecture, ImportSgrvinodConfig
from capray.errors import CheckpointError, ConfigError
from capray.importing.torchfile import Module, TorchFile
from capray.model.captioner import Captioner
from capray.model.checkpoint import check_finite, save_captioner
from capray.storage import check_empty, locate, read_bytes
from capray.vocabulary import SPECIAL_TOKENS, Vocabulary

_CLASSES = [
    f"{module}.{name}" for module in ("models", "__main__") for name in ("Encoder", "Attention", "DecoderWithAttention")
]
"""The tutorial's modules lie in its models.py; whoever runs it in a notebook has them in ``__main__``."""

_BLOCKS = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
"""The children of the tutorial's ``resnet`` by torchvision's names; 2 and 3 hold no tensors."""

_MODULES = {
    "attention.encoder_att": "attention.grid",
    "attention.decoder_att": "attention.query",
    "attention.full_att": "attention.energy",
    "embedding": "embedding",
    "decode_step": "cell",
    "init_h": "initial_hidden",
    "init_c": "initial_cell",
    "f_beta": "gate",
    "fc": "output",
}
"""The modules of the tutorial's decoder by capray's names."""

_BY_WORD = ("embedding.weight", "fc.weight", "fc.bias")
"""The decoder's tensors with a row for each word."""

_NEEDED = (*_BY_WORD, "attention.encoder_att.weight", "decode_step.weight_hh")

_COUNT = "num_batches_tracked"
"""What torch 0.4.0 does not count, and nothing here reads."""


@dataclass(frozen=True)
class Imported:
    """What an import wrote."""

    output: str
    model_id: str
    architecture: Architecture
    num_words: int

    def text(self) -> str:
        grid = self.architecture.pool_grid
        return (
            f"{self.architecture.encoder}, grid {grid}x{grid}, {self.num_words:,} words\n"
            f"wrote {self.output} (model_id {self.model_id})"
        )


def import_sgrvinod(config: ImportSgrvinodConfig) -> Imported:
    """Turn a checkpoint of the tutorial and its word map into a captioner folder. Nothing in the file is executed.

    Raises:
        ConfigError: the output is not empty.
        CheckpointError: the checkpoint is unsafe, damaged or another model's, or the word map is not its own.
        StorageError: a file cannot be read, or the output not written.
    """
    check_empty(config.output)
    words, order = _read_word_map(config.word_map)
    file = TorchFile(read_bytes(locate(config.checkpoint)), config.checkpoint, _CLASSES)
    encoder, decoder = _module(file, "encoder", "Encoder"), _module(file, "decoder", "DecoderWithAttention")
    backbone = {_in_torchvision(name): tensor for name, tensor in file.state_dict(encoder).items()}
    head = _by_our_words(file.state_dict(decoder), order, config)
    captioner = Captioner(_architecture(file, encoder, decoder, backbone, head), Vocabulary(words))
    state = {f"encoder.backbone.{name}": tensor for name, tensor in backbone.items()}
    state |= {f"decoder.{_in_capray(name)}": tensor for name, tensor in head.items()}
    _load(captioner, state, file.uri)
    model_id = save_captioner(captioner, config.output)
    return Imported(config.output, model_id, captioner.architecture, len(words))


def _read_word_map(uri: str) -> tuple[list[str], list[int]]:
    """The words, and for each of capray's ids the tutorial's: special tokens first, then the words in its order."""
    try:
        ids = json.loads(read_bytes(locate(uri)))
    except ValueError as error:
        raise CheckpointError(f"the word map {uri!r} is not JSON: {error}") from error
    if not isinstance(ids, dict) or not all(type(i) is int for i in ids.values()):
        raise CheckpointError(f"the word map {uri!r} is no mapping of words to ids")
    missing = [token for token in SPECIAL_TOKENS if token not in ids]
    if missing:
        raise CheckpointError(f"the word map {uri!r} has no {', '.join(missing)}")
    tokens = sorted(ids, key=ids.__getitem__)
    for expected, token in enumerate(tokens):
        if ids[token] != expected:
            raise CheckpointError(
                f"the word map {uri!r} does not number its {len(ids)} words from 0 on: {token!r} has {ids[token]}, "
                f"where {expected} is due"
            )
    words = [token for token in tokens if token not in SPECIAL_TOKENS]
    return words, [ids[token] for token in (*SPECIAL_TOKENS, *words)]


def _module(file: TorchFile, key: str, class_name: str) -> Module:
    found = dict.get(file.root, key) if isinstance(file.root, dict) else None
    if isinstance(found, Module) and type(found).__name__ == "DataParallel":
        found = found.child("module")
    if isinstance(found, Module) and type(found).__name__ == class_name:
        return found
    what = f"has no {key!r}" if found is None else f"has a {type(found).__name__} as {key!r}"
    raise CheckpointError(
        f"{file.uri!r} is no checkpoint of the tutorial: it {what}, where its train.py saves the whole {class_name} module"
    )


def _in_torchvision(name: str) -> str:
    """``resnet.4.0.conv1.weight`` is ``layer1.0.conv1.weight``."""
    child, dot, rest = name.removeprefix("resnet.").partition(".")
    return f"{_BLOCKS.get(child, child)}{dot}{rest}"


def _in_capray(name: str) -> str:
    module, _, parameter = name.rpartition(".")
    return f"{_MODULES.get(module, module)}.{parameter}"


def _by_our_words(head: dict[str, torch.Tensor], order: list[int], config: ImportSgrvinodConfig) -> dict[str, torch.Tensor]:
    """``head`` with the rows of words in the order of capray's ids."""
    for name in _NEEDED:
        if name not in head or head[name].dim() == 0:
            raise CheckpointError(f"{config.checkpoint!r} is no checkpoint of the tutorial: its decoder has no {name}")
    for name in _BY_WORD:
        if len(head[name]) != len(order):
            raise CheckpointError(
                f"the word map {config.word_map!r} has {len(order):,} entries, and {name} in {config.checkpoint!r} "
                f"{len(head[name]):,} rows: give the word map the checkpoint was trained with"
            )
    return head | {name: head[name][order] for name in _BY_WORD}


def _architecture(
    file: TorchFile, encoder: Module, decoder: Module, backbone: dict[str, torch.Tensor], head: dict[str, torch.Tensor]
) -> Architecture:
    pool = _part(file, encoder, "adaptive_pool", "AdaptiveAvgPool2d")
    dropout = _part(file, decoder, "dropout", "Dropout")
    _part(file, decoder, "attention.relu", "ReLU")
    grid = pool.attributes.get("output_size")
    is_square = isinstance(grid, tuple) and len(grid) == 2 and grid[0] == grid[1]
    try:
        return Architecture.create(
            encoder=_encoder(backbone, file.uri),
            pool_grid=grid[0] if is_square else grid,
            resize="squash",
            size=256,
            interpolation="bilinear",
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            attention="additive",
            attention_activation="relu",
            attention_dim=len(head["attention.encoder_att.weight"]),
            embed_dim=head["embedding.weight"].shape[-1],
            hidden_dim=head["decode_step.weight_hh"].shape[-1],
            cell="lstm",
            initial_state="linear",
            gate=True,
            grid_dropout=0.0,
            output_dropout=dropout.attributes.get("p"),
        )
    except ConfigError as error:
        raise CheckpointError(f"{file.uri!r} is no checkpoint of the tutorial: {error}") from error


def _part(file: TorchFile, module: Module, name: str, class_name: str) -> Module:
    found = module.child(name)
    if found is None or type(found).__name__ != class_name:
        raise CheckpointError(f"{file.uri!r} is no checkpoint of the tutorial: its {name} is no {class_name}")
    return found


def _encoder(backbone: dict[str, torch.Tensor], uri: str) -> str:
    """Torchvision's name of the ResNet that has these tensors."""
    shapes = {name: tensor.shape for name, tensor in backbone.items() if not name.endswith(_COUNT)}
    for name in torchvision.models.list_models(torchvision.models, include="*resne*"):
        with torch.device("meta"):
            network = torchvision.models.get_model(name, weights=None)
        wanted = {name: tensor.shape for name, tensor in network.state_dict().items() if not name.endswith(_COUNT)}
        if shapes == {name: shape for name, shape in wanted.items() if not name.startswith("fc.")}:
            return name
    raise CheckpointError(f"{uri!r} has an encoder of {len(shapes)} tensors that is none of torchvision's ResNets")


def _load(captioner: Captioner, state: dict[str, torch.Tensor], uri: str) -> None:
    wanted = captioner.state_dict()
    for name, tensor in wanted.items():
        if name not in state and not name.endswith(_COUNT):
            raise CheckpointError(f"{uri!r} is no checkpoint of the tutorial: it has nothing for {name}")
        if name in state and state[name].shape != tensor.shape:
            raise CheckpointError(f"{uri!r} has {tuple(state[name].shape)} for {name}, not {tuple(tensor.shape)}")
    unknown = [name for name in state if name not in wanted]
    if unknown:
        raise CheckpointError(f"{uri!r} is no checkpoint of the tutorial: it has {unknown[0]} besides")
    captioner.load_state_dict(state, strict=False)
    check_finite(captioner, uri)
