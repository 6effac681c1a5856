"""The feature cache: what the encoder's frozen blocks make of each image, computed once for all epochs and trainings.

A cache is stored at ``<root>/<key>/<split>/``. The key is a digest of all that the features depend on (FeatureIdentity), so
that another encoder, preprocessing or data set has another cache. Each row group of the Samples table has one Arrow
file, named after the row group's number and the SHA-256 of its bytes: builders beside each other cannot spoil a file, and
a damaged one is recognised. ``manifest.json`` comes last and says which files are the cache; what a killed build leaves
without it is checked and used by the next build. Captions are not cached.

Where the whole encoder is frozen that is the native grid, before pooling; else it is what the first fine-tuned block is
given. It is cached as float16. ``encoding`` computes it; this module does without torch, so that the tasks that read start
quickly.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from capray.config import ImageLimits, Preprocessing, TrainConfig
from capray.datasets.samples import SplitText, read_unit
from capray.errors import ConfigError, DataError, StorageError
from capray.storage import Location, exists, find_parquet, is_folder, locate, read_bytes, write_atomic
from capray.training.sample_stream import DECODED, EpochSeed, stream
from capray.vocabulary import Vocabulary, tokenise

if TYPE_CHECKING:
    from capray.model.encoder import Encoder

SCHEMA_VERSION = 1
FOLDER = "_features"
MANIFEST = "manifest.json"
GRIDS = pa.schema(
    [("image_id", pa.string()), ("grid", pa.large_binary()), ("height", pa.int32()), ("width", pa.int32())]
)
"""The features of an image, float16, channels first; null where the image could not be decoded."""

FILE = re.compile(r"unit-(\d{6,})-([0-9a-f]{64})\.arrow")


def digest_of(encoder: Encoder) -> str:
    """SHA-256 over the tensors of the encoder's frozen blocks, with their names and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.frozen_state().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class FeatureIdentity:
    """All that the features depend on, in plain values."""

    schema_version: int
    encoder: str
    encoder_sha256: str
    preprocessing: dict[str, Any]
    limits: dict[str, Any]
    dataset_digest: str

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def identify(config: TrainConfig, encoder: Encoder, dataset_digest: str) -> FeatureIdentity:
    """The identity of ``config``'s features; ``dataset_digest`` is told together with the sizes of the table's files,
    which change with a table that is edited after `capray prepare`."""
    settings = (config.subset(group).model_dump(mode="json") for group in (Preprocessing, ImageLimits))
    sizes = "".join(f"{entry.path.rsplit('/', 1)[-1]} {entry.size}\n" for entry in find_parquet(config.samples))
    dataset_digest = hashlib.sha256((dataset_digest + sizes).encode()).hexdigest()
    name = config.encoder if encoder.is_frozen else f"{config.encoder} before {config.fine_tune_from}"
    return FeatureIdentity(SCHEMA_VERSION, name, digest_of(encoder), *settings, dataset_digest)


class CachedSplit(NamedTuple):
    """A finished cache of one split: its folder and its files, in the order of the split's units."""

    folder: str
    files: list[str]


class Cache(NamedTuple):
    """The features of a training: what they are of, and its splits by name."""

    identity: FeatureIdentity
    splits: dict[str, CachedSplit]


def choose_root(config: TrainConfig, encoder: Encoder) -> str | None:
    """Where this training's features are cached; None when they are not.

    ``auto`` caches them when the whole encoder is frozen and images are not augmented: beside the samples where that is a
    folder that can be written, so that other trainings find them, else in the training's output.

    Raises:
        ConfigError: a cache was asked for, and no block of the encoder is frozen or the images are augmented.
    """
    reason = None
    if not encoder.has_frozen_blocks:
        reason = f"frozen blocks of the encoder, and fine_tune_from is {config.fine_tune_from!r}"
    elif config.augments:
        reason = "images that are the same in every epoch, and they are augmented"
    if config.feature_cache == "none" or (config.feature_cache == "auto" and (reason or not encoder.is_frozen)):
        return None
    if reason:
        raise ConfigError(f"feature_cache {config.feature_cache!r} needs {reason}: set it to auto or none")
    if config.feature_cache != "auto":
        return config.feature_cache
    beside = locate(config.samples)
    if is_folder(beside):
        try:
            write_atomic(beside.join(FOLDER, ".writable"), b"")
            return beside.join(FOLDER).uri
        except StorageError:
            pass
    return locate(config.output).join(FOLDER).uri


def read_manifest(folder: Location, identity: FeatureIdentity, split: str, text: SplitText) -> CachedSplit | None:
    place = folder.join(MANIFEST)
    if not exists(place):
        return None
    way_out = f"delete {folder.uri!r} to have it rebuilt, or choose another feature_cache"
    try:
        manifest = json.loads(read_bytes(place))
        files = [str(name) for name in manifest["files"]]
        told = {"identity": manifest["identity"], "split": manifest["split"], "images": manifest["images"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"the feature cache's {place.uri!r} is damaged ({error!r}): {way_out}") from error
    wanted = {"identity": asdict(identity), "split": split, "images": text.num_images}
    for name, value in wanted.items():
        if told[name] != value:
            raise DataError(
                f"the feature cache {folder.uri!r} was built for something else (its {name}: {told[name]!r}, not "
                f"{value!r}): {way_out}"
            )
    numbers = [int(match[1]) if (match := FILE.fullmatch(name)) else None for name in files]
    if numbers != list(range(len(text.units))):
        raise DataError(f"the feature cache's {place.uri!r} is damaged (its files are not its units): {way_out}")
    return CachedSplit(folder.uri, files)


def read_grids(folder: Location, name: str) -> pa.Table:
    """The GRIDS of one file.

    Raises:
        DataError: its bytes are not those it is named after.
    """
    place = folder.join(name)
    data = read_bytes(place)
    match = FILE.fullmatch(name)
    if match is None or hashlib.sha256(data).hexdigest() != match[2]:
        raise DataError(f"{place.uri!r} of the feature cache is damaged: delete it, and it is rebuilt")
    return pa.ipc.open_file(pa.py_buffer(data)).read_all()


def cached_dataset(
    cache: CachedSplit,
    samples: str,
    split: str,
    units: list[tuple[str, int]],
    vocabulary: Vocabulary,
    epoch_seed: EpochSeed | None = None,
):
    """As ``sample_stream.dataset``, with the features of ``cache`` in the place of pixels."""
    items = [
        {"path": path, "row_group": group, "file": file} for (path, group), file in zip(units, cache.files, strict=True)
    ]
    settings = {"samples": samples, "split": split, "vocabulary": vocabulary, "folder": cache.folder}
    return stream(items, _read_cached, settings, epoch_seed)


def _read_cached(unit: dict[str, Any], samples: str, split: str, vocabulary: Vocabulary, folder: str) -> pa.Table:
    table = read_unit(samples, (unit["path"], unit["row_group"]), split, ["image_id", "captions", "split"])
    grids = read_grids(locate(folder), unit["file"])
    if grids["image_id"].to_pylist() != table["image_id"].to_pylist():
        raise DataError(f"the feature cache {folder!r} is of other images than {unit['path']!r}: delete it")
    captions = table["captions"].to_pylist()
    words = [[vocabulary.encode(tokenise(caption)) for caption in image] for image in captions]
    columns = [table["image_id"], grids["grid"].cast(pa.binary()), grids["height"], grids["width"], captions, words]
    return pa.table(columns, schema=DECODED)
