"""A captioner as a folder: ``config.json``, ``vocabulary.json``, ``model.safetensors``. Nothing pickled.

``config.json`` is written last and carries the SHA-256 of the other two, so a folder that is half written, mixed or
damaged is recognised. The folder may be local or on S3.
"""

from __future__ import annotations

import hashlib
import json

import safetensors.torch
import torch
from torch.nn.modules.batchnorm import _BatchNorm

import capray
from capray.config import Architecture
from capray.errors import CaprayError, CheckpointError, ConfigError
from capray.model.captioner import Captioner
from capray.model.captioner_files import CONFIG, FILES, VOCABULARY, WEIGHTS, model_id_of
from capray.storage import list_names, locate, read_bytes, write_atomic
from capray.vocabulary import Vocabulary

SCHEMA_VERSION = 1
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin", ".joblib")


def pack(captioner: Captioner, half: bool = False) -> dict[str, bytes]:
    """The files of ``captioner``'s folder, ``config.json`` last; ``half`` stores the weights in float16.

    Raises:
        CheckpointError: a weight is too large for float16.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in captioner.state_dict().items()}
    if half:
        state = _halved(captioner, state)
    files = {WEIGHTS: safetensors.torch.save(state), VOCABULARY: captioner.vocabulary.to_json().encode()}
    config = {
        "schema_version": SCHEMA_VERSION,
        "capray_version": capray.__version__,
        "architecture": captioner.architecture.model_dump(mode="json"),
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    files[CONFIG] = json.dumps(config, indent=2).encode()
    return files


def _halved(captioner: Captioner, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` in float16, but for BatchNorm's tensors: few, and its variances may be tiny."""
    norms = [name for name, module in captioner.named_modules() if isinstance(module, _BatchNorm)]
    kept = {name for name in state if name.rpartition(".")[0] in norms}
    halved = {name: tensor if name in kept else tensor.half() for name, tensor in state.items()}
    for name, tensor in halved.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"weights of {name} are beyond 65,504, the largest number of float16")
    return halved


def save_captioner(captioner: Captioner, folder: str, half: bool = False) -> str:
    """Write ``captioner`` to ``folder`` (a path or URI), as ``pack`` does, and return its model_id."""
    files = pack(captioner, half)
    target = locate(folder)
    for name, data in files.items():
        write_atomic(target.join(name), data)
    return model_id_of(files)


def load_captioner(folder: str, device: torch.device | str = "cpu") -> tuple[Captioner, str]:
    """The captioner in ``folder`` (a path or URI), in evaluation mode on ``device``, and its model_id. Weights stored in
    float16 become float32.

    Raises:
        CheckpointError: the folder is missing, incomplete, damaged, from a newer schema, or holds a pickle.
    """
    files = _read_files(folder)
    architecture, digests = _parse_config(files[CONFIG], folder)
    for name, digest in digests.items():
        if hashlib.sha256(files[name]).hexdigest() != digest:
            raise CheckpointError(
                f"{folder!r} is damaged or half written: {name} is not the file that {CONFIG} was written with"
            )
    vocabulary = Vocabulary.from_json(files[VOCABULARY].decode())
    try:
        captioner = Captioner(architecture, vocabulary)
        captioner.load_state_dict(safetensors.torch.load(files[WEIGHTS]))
    except (CaprayError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder!r}: the weights do not fit the configuration: {error}") from error
    check_finite(captioner, folder)
    captioner.requires_grad_(False)
    return captioner.to(device).eval(), model_id_of(files)


def check_finite(captioner: Captioner, source: str) -> None:
    """Raise CheckpointError, naming ``source``, when weights of ``captioner`` are not finite numbers."""
    for name, values in captioner.state_dict().items():
        if not values.isfinite().all():
            raise CheckpointError(f"{source!r}: weight {name} holds NaN or infinity: it cannot caption")


def _read_files(folder: str) -> dict[str, bytes]:
    place = locate(folder)
    names = list_names(place)
    missing = [name for name in FILES if name not in names]
    if missing:
        pickles = [name for name in names if name.endswith(_PICKLES)]
        if pickles:
            raise CheckpointError(
                f"{folder!r} holds {pickles[0]}, a pickle, which can run code when loaded: capray reads only "
                f"{', '.join(FILES)}"
            )
        if len(missing) == len(FILES):
            nested = [sub for sub in ("best", "last") if CONFIG in list_names(place.join(sub))]
            hint = f"; did you mean {place.join(nested[0]).uri!r}?" if nested else ""
            raise ConfigError(f"{folder!r} is not a captioner folder: it has no {', '.join(missing)}{hint}")
        raise CheckpointError(f"{folder!r} is incomplete: it has no {', '.join(missing)}")
    return {name: read_bytes(place.join(name)) for name in FILES}


def _parse_config(data: bytes, folder: str) -> tuple[Architecture, dict[str, str]]:
    try:
        config = json.loads(data)
        version = config["schema_version"]
        if version > SCHEMA_VERSION:
            raise CheckpointError(
                f"{folder!r} has schema version {version}, this capray reads up to {SCHEMA_VERSION}: upgrade capray"
            )
        digests = config["sha256"]
        return Architecture.create(config["architecture"]), {name: digests[name] for name in (VOCABULARY, WEIGHTS)}
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{folder!r}: {CONFIG} is damaged: {error!r}") from error
