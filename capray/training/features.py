"""The feature cache: what the encoder's frozen blocks make of each image, computed once for all epochs and trainings.

A cache is stored at ``<root>/<key>/<split>/``. The key is a digest of all that the features depend on (FeatureIdentity), so
that another encoder, preprocessing or data set has another cache. Each row group of the Samples table has one Arrow
file, named after the row group's number and the SHA-256 of its bytes: builders beside each other cannot spoil a file, and
a damaged one is recognised. ``manifest.json`` comes last and says which files are the cache; what a killed build leaves
without it is checked and used by the next build. Captions are not cached.

Views of the training images, as augmentation changes them, are caches of their own, whose key has the view's number in it.

Where the whole encoder is frozen that is the native grid, before pooling; else it is what the first fine-tuned block is
given. It is cached as float16. ``encoding`` computes it; this module does without torch, so that the tasks that read start
quickly.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from capray.config import Augmentation, ImageLimits, Preprocessing, TrainConfig
from capray.datasets.samples import SplitText, names_and_sizes, read_unit
from capray.errors import ConfigError, DataError, StorageError
from capray.storage import Location, exists, is_folder, locate, read_bytes, write_atomic
from capray.training.mirroring import is_mirrored, mirrored_words
from capray.training.sample_stream import DECODED, EpochSeed, stream
from capray.vocabulary import Vocabulary, tokenise

if TYPE_CHECKING:
    from capray.model.encoder import Encoder

SCHEMA_VERSION = 1
FOLDER = "_features"
MANIFEST = "manifest.json"
GRIDS = pa.schema([("image_id", pa.string()), ("grid", pa.large_binary()), ("height", pa.int32()), ("width", pa.int32())])
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
    view: int = 0
    augmentation: dict[str, Any] | None = None
    """What changes the images of a ``view``; none in view 0, which is the images themselves."""

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def plain(self) -> dict[str, Any]:
        """As it is stored: without what is of views where there is none, so that caches without views keep their keys."""
        return {name: value for name, value in asdict(self).items() if self.view or name not in ("view", "augmentation")}

    def of_view(self, view: int, augmentation: Augmentation) -> FeatureIdentity:
        return replace(self, view=view, augmentation=augmentation.model_dump(mode="json")) if view else self


def view_seed(view: int, image_id: str) -> str:
    """What seeds the augmentation of an image's view: nothing of the training's, so that trainings share caches."""
    return f"view {view} {image_id}"


def identify(config: TrainConfig, encoder: Encoder, dataset_digest: str) -> FeatureIdentity:
    """The identity of ``config``'s features; ``dataset_digest`` is told together with the sizes of the table's files,
    which change with a table that is edited after `capray prepare`."""
    preprocessing, limits = (config.subset(group).model_dump(mode="json") for group in (Preprocessing, ImageLimits))
    dataset_digest = hashlib.sha256((dataset_digest + names_and_sizes(config.samples)).encode()).hexdigest()
    name = config.encoder if encoder.is_frozen else f"{config.encoder} before {config.fine_tune_from}"
    return FeatureIdentity(SCHEMA_VERSION, name, digest_of(encoder), preprocessing, limits, dataset_digest)


class CachedSplit(NamedTuple):
    """A finished cache of one view of a split: its folder and its files, in the order of the split's units."""

    folder: str
    files: list[str]


class Cache(NamedTuple):
    """The features of a training: what they are of, and the views of its splits by name."""

    identity: FeatureIdentity
    splits: dict[str, list[CachedSplit]]


def choose_root(config: TrainConfig, encoder: Encoder) -> str | None:
    """Where this training's features are cached; None when they are not.

    ``auto`` caches them when the whole encoder is frozen and images are not augmented, or in ``cached_views``: beside the
    samples where that is a folder that can be written, so that other trainings find them, else in the training's output.

    Raises:
        ConfigError: a cache was asked for, and no block of the encoder is frozen or the images are augmented anew in every
            epoch; or views were, and there is no cache to keep them in.
    """
    reason = None
    if not encoder.has_frozen_blocks:
        reason = f"frozen blocks of the encoder, and --fine-tune-from is {config.fine_tune_from!r}"
    elif config.augments and config.cached_views == 1:
        reason = "images that are the same in every epoch, and they are augmented (--cached-views 2 or more keeps views)"
    if config.feature_cache == "none" or (config.feature_cache == "auto" and (reason or not encoder.is_frozen)):
        if config.cached_views > 1:
            raise ConfigError(
                f"--cached-views {config.cached_views} needs a feature cache: give --feature-cache FOLDER"
                + (f", and {reason}" if reason else "")
            )
        return None
    if reason:
        raise ConfigError(f"--feature-cache {config.feature_cache!r} needs {reason}: give auto or none")
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
    way_out = f"delete {folder.uri!r} to have it rebuilt, or choose another --feature-cache"
    try:
        manifest = json.loads(read_bytes(place))
        files = [str(name) for name in manifest["files"]]
        told = {"identity": manifest["identity"], "split": manifest["split"], "images": manifest["images"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"the feature cache's {place.uri!r} is damaged ({error!r}): {way_out}") from error
    wanted = {"identity": identity.plain(), "split": split, "images": text.num_images}
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
    views: list[CachedSplit],
    samples: str,
    split: str,
    units: list[tuple[str, int]],
    vocabulary: Vocabulary,
    epoch_seed: EpochSeed | None = None,
):
    """As ``sample_stream.dataset``, with features in the place of pixels: of one of the ``views``, drawn by the seed for
    each unit and epoch; without a seed of the first, the images themselves."""
    views = views if epoch_seed is not None else views[:1]
    files = zip(*(view.files for view in views), strict=True)
    items = [{"unit": unit, "files": names} for unit, names in zip(units, files, strict=True)]
    folders = [view.folder for view in views]
    settings = {"samples": samples, "split": split, "vocabulary": vocabulary, "folders": folders}
    return stream(items, _read_cached, settings, epoch_seed)


def _read_cached(
    item: dict[str, Any],
    samples: str,
    split: str,
    vocabulary: Vocabulary,
    folders: list[str],
    augmentation: Augmentation | None = None,
    seed: str = "",
) -> pa.Table:
    view = random.Random(f"{seed} {item['unit']}").randrange(len(folders))
    table = read_unit(samples, item["unit"], split, ["image_id", "captions", "split"])
    grids = read_grids(locate(folders[view]), item["files"][view])
    ids, captions = table["image_id"].to_pylist(), table["captions"].to_pylist()
    if grids["image_id"].to_pylist() != ids:
        raise DataError(f"the feature cache {folders[view]!r} is of other images than {item['unit'][0]!r}: delete it")
    words = []
    for image_id, image in zip(ids, captions, strict=True):
        tokens = [tokenise(caption) for caption in image]
        if view and augmentation is not None and is_mirrored(tokens, augmentation, view_seed(view, image_id)):
            tokens = mirrored_words(tokens)
        words.append([vocabulary.encode(caption) for caption in tokens])
    columns = [table["image_id"], grids["grid"].cast(pa.binary()), grids["height"], grids["width"], captions, words]
    return pa.table(columns, schema=DECODED)
