"""The Samples table as a stream of training batches: decoding in Ray Data tasks, batching in the worker.

Axes: B images, H rows, W columns.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from capray.config import Augmentation, ImageLimits, Preprocessing
from capray.datasets.samples import read_unit
from capray.images import ImageError, load
from capray.vocabulary import Vocabulary, tokenise

DECODED = pa.schema(
    [
        ("image_id", pa.string()),
        ("pixels", pa.binary()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("captions", pa.list_(pa.string())),
        ("words", pa.list_(pa.list_(pa.int32()))),
    ]
)
"""Images at the encoder's input size (uint8; null where the image could not be decoded), raw captions and word ids. Of a
feature cache, ``pixels`` are native grids (float16, channels first) and ``height`` and ``width`` theirs."""


class EpochSeed(NamedTuple):
    """Seeds shuffling, augmentation and the drawing of pairs from the training's ``seed``, the epoch and the pass in it.

    Ray Data runs the same tasks in every epoch, so they ask ``board``, an actor, whose ``epoch`` tells how many epochs are
    over; an epoch must not start before it does. An epoch of pairs has ``num_passes`` passes over the images, as many as
    the most captions of one; an image brings another of its captions to each (see ``draw_caption``).
    """

    seed: int
    board: Any
    augmentation: Augmentation
    num_passes: int | None = None


def dataset(
    samples: str,
    split: str,
    units: list[tuple[str, int]],
    vocabulary: Vocabulary,
    preprocessing: Preprocessing,
    limits: ImageLimits,
    epoch_seed: EpochSeed | None = None,
):
    """A Ray Dataset of ``split``, stored in ``units``, in the DECODED schema, read and decoded in tasks of their own."""
    settings = {
        "samples": samples,
        "split": split,
        "vocabulary": vocabulary,
        "preprocessing": preprocessing,
        "limits": limits,
    }
    return stream(units, _read_and_decode, settings, epoch_seed)


def stream(items: list[Any], read: Callable[..., pa.Table], settings: dict[str, Any], epoch_seed: EpochSeed | None = None):
    """A Ray Dataset of what ``read`` makes of each of ``items``, with ``settings``, in a task of its own.

    Items are rows and one operator does the rest: Ray's own ``read_parquet`` spends seconds on listing each time it is
    read again. Blocks keep their order, so that workers get the same ones each time. With an ``epoch_seed`` the n-th task
    reads the n-th of the items as the seed and the epoch shuffle them, pass by pass; Ray's own shuffling of blocks knows
    how often this dataset was read, not which epoch of a training it is that goes on.
    """
    import ray.data

    num_tasks = len(items) * ((epoch_seed and epoch_seed.num_passes) or 1)
    data = ray.data.from_items(list(range(num_tasks)), override_num_blocks=num_tasks).map_batches(
        _read_item,  # ty: ignore[invalid-argument-type]
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"items": items, "read": read, "settings": settings, "epoch_seed": epoch_seed},
    )
    data.context.execution_options.preserve_order = True
    return data


def _read_item(
    place: pa.Table,
    items: list[Any],
    read: Callable[..., pa.Table],
    settings: dict[str, Any],
    epoch_seed: EpochSeed | None,
) -> pa.Table:
    number = place["item"][0].as_py()
    if epoch_seed is None:
        return read(items[number], **settings)
    import ray

    epoch = f"{epoch_seed.seed} {ray.get(epoch_seed.board.epoch.remote())}"
    pass_number, number = divmod(number, len(items))
    seed = f"{epoch} {pass_number}" if pass_number else epoch
    items = random.Random(seed).sample(items, len(items))
    if epoch_seed.augmentation.augments:
        settings = {**settings, "augmentation": epoch_seed.augmentation, "seed": seed}
    table = read(items[number], **settings)
    return table if epoch_seed.num_passes is None else draw_caption(table, epoch, pass_number)


def draw_caption(table: pa.Table, epoch: str, pass_number: int) -> pa.Table:
    """``table`` (DECODED) with one caption of each image, drawn without replacement over the passes of ``epoch``.

    Images whose captions are all drawn already are left out. What cannot be used at all stays in the first pass.
    """
    kept, drawn = [], []
    for i, row in enumerate(table.select(["image_id", "height", "words"]).to_pylist()):
        words = [] if row["height"] is None else [caption for caption in row["words"] if caption]
        order = random.Random(f"{epoch} {row['image_id']}").sample(words, len(words))
        if pass_number < max(1, len(words)):
            kept.append(i)
            drawn.append(order[pass_number : pass_number + 1])
    columns = {**{name: table[name].take(pa.array(kept, pa.int64())) for name in DECODED.names}, "words": drawn}
    return pa.table(columns, schema=DECODED)


def _read_and_decode(
    unit: tuple[str, int],
    samples: str,
    split: str,
    vocabulary: Vocabulary,
    preprocessing: Preprocessing,
    limits: ImageLimits,
    augmentation: Augmentation | None = None,
    seed: str = "",
) -> pa.Table:
    table = read_unit(samples, unit, split)
    pixels, heights, widths, words = [], [], [], []
    for image_id, image, captions in zip(*(table[name] for name in ("image_id", "image", "captions")), strict=True):
        tokens = [tokenise(caption) for caption in captions.as_py()]
        try:
            array, _, _ = load(image.as_py(), preprocessing, limits)
        except ImageError:
            array = None
        if augmentation is not None and array is not None:
            from capray.training.augmentation import augment

            array, tokens = augment(array, tokens, augmentation, f"{seed} {image_id}")
        pixels.append(None if array is None else array.tobytes())
        heights.append(None if array is None else array.shape[0])
        widths.append(None if array is None else array.shape[1])
        words.append([vocabulary.encode(caption) for caption in tokens])
    return pa.table([table["image_id"], pixels, heights, widths, table["captions"], words], schema=DECODED)


class ImageBatch(NamedTuple):
    """A batch as it leaves reading: pixels (H, W, 3) uint8 or cached grids (D, h, w) float16, word ids of the captions of
    each, raw captions, ids."""

    ids: list[str]
    pixels: list[np.ndarray]
    words: list[list[list[int]]]
    captions: list[list[str]]

    def longest_first(self) -> ImageBatch:
        """The same images, that with the longest caption first: the decoder likes them so."""
        images = sorted(zip(*self, strict=True), key=lambda image: -max(map(len, image[2])))
        return ImageBatch(*map(list, zip(*images, strict=True)))


class Reading:
    """Counts what reading had to leave out; ``batches`` streams one pass over a worker's shard, of pixels or of cached
    features."""

    def __init__(self, cached: bool = False) -> None:
        self.cached = cached
        self.undecodable = 0
        self.without_captions = 0

    def rows(self, shard: Any, shuffle_buffer: int | None = None, seed: int = 0) -> Iterator[dict[str, Any]]:
        shuffling = {"local_shuffle_buffer_size": shuffle_buffer, "local_shuffle_seed": seed} if shuffle_buffer else {}
        for table in shard.iter_batches(batch_size=32, batch_format="pyarrow", prefetch_batches=4, **shuffling):
            yield from table.to_pylist()

    def batches(
        self,
        shard: Any,
        pairs_per_batch: int,
        one_caption: bool,
        seed: int,
        shuffle_buffer: int | None = None,
        images_per_batch: int | None = None,
    ) -> Iterator[ImageBatch]:
        """Batches of at most ``pairs_per_batch`` image-caption pairs (but at least one image), or of
        ``images_per_batch`` images where that is given; ``one_caption`` draws one caption of each image."""
        rng = random.Random(seed)
        batch, pairs = ImageBatch([], [], [], []), 0
        for row in self.rows(shard, shuffle_buffer, seed):
            if row["pixels"] is None:
                self.undecodable += 1
                continue
            words = [caption for caption in row["words"] if caption]
            if not words:
                self.without_captions += 1
                continue
            if one_caption:
                words = [rng.choice(words)]
            full = len(batch.ids) == images_per_batch if images_per_batch else pairs + len(words) > pairs_per_batch
            if batch.ids and full:
                yield batch.longest_first()
                batch, pairs = ImageBatch([], [], [], []), 0
            size = row["height"], row["width"]
            dtype, shape = (np.float16, (-1, *size)) if self.cached else (np.uint8, (*size, 3))
            batch.ids.append(row["image_id"])
            batch.pixels.append(np.frombuffer(row["pixels"], dtype).reshape(shape))
            batch.words.append(words)
            batch.captions.append(row["captions"])
            pairs += len(words)
        if batch.ids:
            yield batch.longest_first()
