"""Filling the feature cache: Ray Data actors that decode, encode and write one unit of the Samples table at a time."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from capray import cluster
from capray.config import Augmentation, ImageLimits, Preprocessing, TrainConfig
from capray.datasets.samples import SplitText, read_unit
from capray.errors import DataError, Interrupted
from capray.images import ImageError, load, normalise
from capray.model.encoder import Encoder
from capray.progress import ProgressDisplay
from capray.storage import Location, list_names, locate, write_atomic
from capray.training.augmentation import augment
from capray.training.features import (
    FILE,
    GRIDS,
    MANIFEST,
    Cache,
    CachedSplit,
    FeatureIdentity,
    read_grids,
    read_manifest,
    view_seed,
)
from capray.vocabulary import tokenise
from capray.wording import counted

IMAGES_PER_BATCH = 32
IMAGES_PER_ACTOR = 50
"""At least; fewer are encoded sooner than another process has started."""


def build_cache(
    root: str,
    identity: FeatureIdentity,
    encoder: Encoder,
    config: TrainConfig,
    splits: dict[str, SplitText],
    display: ProgressDisplay,
) -> Cache:
    """The cache of ``splits`` below ``root``, of the training split in all its views; what is missing of it is built with
    ``encoder``.

    Raises:
        DataError: what is there is not this cache, or an image's features do not fit float16.
        StorageError: it cannot be read or written.
        Interrupted: stopped by Ctrl-C.
    """
    found: dict[tuple[str, int], CachedSplit] = {}
    missing: list[_Missing] = []
    wanted = [(split, view) for split in splits for view in range(config.cached_views if split == config.train_split else 1)]
    for split, view in wanted:
        text, of_view = splits[split], identity.of_view(view, config.subset(Augmentation))
        folder = locate(root).join(of_view.key, split)
        cached = read_manifest(folder, of_view, split, text)
        names = set(list_names(folder, ".arrow"))
        told = f"split {split}" + (f", view {view + 1} of {config.cached_views}," if view else "")
        if cached is None or not names.issuperset(cached.files):
            display.say(f"encoding the {counted(text.num_images, 'image')} of {told} once, into {folder.uri}")
            missing.append(_Missing(split, of_view, text, folder, names))
        else:
            display.say(f"features of {told} are read from {folder.uri}")
            found[split, view] = cached
    if missing:
        try:
            found |= _build(missing, encoder, config, display)
        except KeyboardInterrupt as error:
            raise Interrupted("stopped; the same command goes on with what was encoded") from error
    return Cache(identity, {split: [found[key] for key in wanted if key[0] == split] for split in splits})


@dataclass
class _Missing:
    """A view of a split to encode, and what has come of it."""

    split: str
    identity: FeatureIdentity
    text: SplitText
    folder: Location
    names: set[str]
    files: dict[int, str] = field(default_factory=dict)
    undecodable: list[str] = field(default_factory=list)
    images: int = 0

    def items(self) -> list[dict[str, Any]]:
        there = {int(match[1]): name for name in sorted(self.names) if (match := FILE.fullmatch(name))}
        return [
            {
                "split": self.split,
                "view": self.identity.view,
                "folder": self.folder.uri,
                "number": number,
                "path": path,
                "row_group": group,
                "there": there.get(number, ""),
            }
            for number, (path, group) in enumerate(self.text.units)
        ]

    def publish(self) -> CachedSplit:
        if self.images != self.text.num_images:
            raise DataError(
                f"split {self.split!r} changed while it was encoded: {self.images:,} images, not {self.text.num_images:,}"
            )
        manifest = {
            "identity": self.identity.plain(),
            "split": self.split,
            "images": self.images,
            "undecodable": sorted(self.undecodable),
            "files": [self.files[number] for number in sorted(self.files)],
        }
        write_atomic(self.folder.join(MANIFEST), json.dumps(manifest, indent=1).encode())
        return CachedSplit(self.folder.uri, manifest["files"])


def _build(
    missing: list[_Missing], encoder: Encoder, config: TrainConfig, display: ProgressDisplay
) -> dict[tuple[str, int], CachedSplit]:
    """All splits by one pool of actors, whose start takes longer than a small split."""
    from ray.exceptions import RayError

    items = [item for part in missing for item in part.items()]
    num_images = sum(part.text.num_images for part in missing)
    parts, found = {(part.split, part.identity.view): part for part in missing}, {}
    try:
        for row in _encoded(items, encoder, config, num_images):
            part = parts[key := (row["split"], row["view"])]
            part.files[row["number"]] = row["file"]
            part.undecodable += row["undecodable"]
            part.images += row["images"]
            if len(part.files) == len(part.text.units):
                found[key] = part.publish()
            images = sum(part.images for part in missing)
            display.update(images, counted(images, "image"), "encoding", num_images)
    except RayError as error:
        raise cluster.own_error(error) or error from error
    return found


def _encoded(
    items: list[dict[str, Any]], encoder: Encoder, config: TrainConfig, num_images: int
) -> Iterable[dict[str, Any]]:
    """What the actors say of each item, as it is done."""
    import ray
    import ray.data

    cpus, gpus = cluster.cluster_resources()
    on_gpu = cluster.gpus_each(config.gpus_per_worker) > 0
    devices = int((gpus or config.num_workers) if on_gpu else cpus - 1)
    num_actors = max(1, min(len(items), num_images // IMAGES_PER_ACTOR, devices))
    num_cpus = max(1, int(cpus - 1) // num_actors) if on_gpu else 1
    encoded = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Encoding,
        fn_constructor_args=(ray.put(encoder), config, on_gpu, num_cpus),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        num_cpus=num_cpus,
        num_gpus=1 if on_gpu else None,
    )
    return encoded.iter_rows()


class _Encoding:
    """The actor: units of the Samples table to files of the cache."""

    def __init__(self, encoder: Any, config: TrainConfig, on_gpu: bool, num_threads: int):
        """``encoder`` is a reference to it."""
        import ray

        cluster.end_with_raylet()

        torch.set_num_threads(num_threads)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        self.device = torch.device("cuda" if on_gpu else "cpu")
        self.encoder = ray.get(encoder).eval().to(self.device)
        self.config = config
        self.pool = ThreadPoolExecutor(num_threads)

    def __call__(self, unit: pa.Table) -> pa.Table:
        (item,) = unit.to_pylist()
        name, folder = item["there"], locate(item["folder"])
        table = read_grids(folder, name) if name else None
        if table is None:
            unit = item["path"], item["row_group"]
            rows = read_unit(self.config.samples, unit, item["split"])
            table = self._encode(rows, item["view"])
            data = _to_bytes(table)
            name = f"unit-{item['number']:06d}-{hashlib.sha256(data).hexdigest()}.arrow"
            write_atomic(folder.join(name), data)
        ids, nulls = table["image_id"].to_pylist(), table["grid"].is_null().to_pylist()
        undecodable = [image_id for image_id, null in zip(ids, nulls, strict=True) if null]
        result = {
            "split": item["split"],
            "view": item["view"],
            "number": item["number"],
            "file": name,
            "images": len(ids),
            "undecodable": undecodable,
        }
        columns = [("split", pa.string()), ("view", pa.int64()), ("number", pa.int64())]
        columns += [("file", pa.string()), ("images", pa.int64()), ("undecodable", pa.list_(pa.string()))]
        return pa.Table.from_pylist([result], pa.schema(columns))

    def _encode(self, rows: pa.Table, view: int) -> pa.Table:
        ids = rows["image_id"].to_pylist()
        settings = self.config.subset(Preprocessing), self.config.subset(ImageLimits)
        decoded = self.pool.map(partial(_decoded, settings=settings), rows["image"].to_pylist())
        if view:
            decoded = map(partial(_augmented, config=self.config, view=view), decoded, ids, rows["captions"].to_pylist())
        grids: list[np.ndarray | None] = []
        while batch := list(islice(decoded, IMAGES_PER_BATCH)):
            grids += self._grids(batch)
        for image_id, grid in zip(ids, grids, strict=True):
            if grid is not None and not np.isfinite(grid).all():
                raise DataError(f"features of {image_id!r} are beyond float16: give --feature-cache none")
        shapes = [(None, None) if grid is None else grid.shape[1:] for grid in grids]
        heights, widths = zip(*shapes, strict=True)
        data = [None if grid is None else grid.tobytes() for grid in grids]
        return pa.table([ids, data, heights, widths], schema=GRIDS)

    @torch.inference_mode()
    def _grids(self, pixels: Sequence[np.ndarray | None]) -> list[np.ndarray | None]:
        """The features of each image (D, h, w); images of one size are encoded together."""
        grids: list[np.ndarray | None] = [None] * len(pixels)
        by_shape: dict[tuple[int, ...], dict[int, np.ndarray]] = defaultdict(dict)
        for i, image in enumerate(pixels):
            if image is not None:
                by_shape[image.shape][i] = image
        for places in by_shape.values():
            batch = torch.from_numpy(np.stack(list(places.values()))).to(self.device)
            encoded = self.encoder.begin(normalise(batch, self.config.subset(Preprocessing))).half().cpu()
            for i, grid in zip(places, encoded.contiguous().numpy(), strict=True):
                grids[i] = grid
        return grids


def _decoded(image: bytes, settings: tuple[Preprocessing, ImageLimits]) -> np.ndarray | None:
    try:
        return load(image, *settings)[0]
    except ImageError:
        return None


def _augmented(
    pixels: np.ndarray | None, image_id: str, captions: list[str], config: TrainConfig, view: int
) -> np.ndarray | None:
    """An image as the augmentation changes it in ``view``, None as it is; not called in the threads that decode, as torch
    has one source of random numbers."""
    if pixels is None:
        return None
    words = [tokenise(caption) for caption in captions]
    return augment(pixels, words, config.subset(Augmentation), view_seed(view, image_id))[0]


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()
