"""From what a data set lists to the samples that are written: which images, in which split, and what is left out.

Knows no data set's layout: each of them makes a ``RawDataset``, and ``prepare_dataset`` does the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from capray.datasets.samples import Prepared, Sample, write_samples
from capray.datasets.settings import PrepareSettings
from capray.errors import DataError
from capray.progress import ProgressDisplay
from capray.storage import Location, read_ahead, read_bytes
from capray.wording import counted

NUM_READERS = 16
NUM_READ_AHEAD = 64
_NAMES_SHOWN = 5


@dataclass
class RawDataset:
    """What a data set says it holds. Nothing of it need fit together."""

    images: dict[str, Location]
    """The images that are there, by image id."""
    captions: dict[str, list[str]]
    """Raw captions by image id, in the order of the caption file."""
    splits: dict[str, list[str]] | None
    """Image ids by split, each once within it; None when the images are to be divided by fractions."""
    notes: list[str] = field(default_factory=list)
    """What the reading of the layout already has to tell."""


def prepare_dataset(listing: RawDataset, settings: PrepareSettings, dataset: str) -> Prepared:
    """Write the Samples table of a data set.

    An image is used if it is there, has a caption that is not empty, is among the ``first`` such of the caption file, and
    belongs to a split: its own, or with ``split_fractions`` the one its id's hash falls into. What is not used is counted
    in the notes.

    Raises:
        ConfigError: the output is not empty.
        DataError: an image is in two splits, or no image can be used.
    """
    notes = listing.notes
    captions = {name: [text for text in texts if text.strip()] for name, texts in listing.captions.items()}
    num_empty = sum(map(len, listing.captions.values())) - sum(map(len, captions.values()))
    if num_empty:
        notes.append(f"{counted(num_empty, 'empty caption')} left out")
    usable = [name for name, texts in captions.items() if texts and name in listing.images]
    chosen = usable[: settings.first]
    fractions = settings.fractions
    if fractions is None:
        assert listing.splits is not None
        listed = _check_splits(listing.images, captions, listing.splits, notes)
        kept = set(chosen)
        splits = {split: [name for name in names if name in kept] for split, names in listing.splits.items()}
    else:
        listed = set(usable)
        splits = divide(chosen, fractions)
        notes += [f"{split}: no image's id falls into it" for split, names in splits.items() if not names]
    _judge_rest(listing.images, captions, listed, fractions is not None, notes)
    if settings.first is not None:
        if len(usable) < settings.first:
            notes.append(f"only {counted(len(usable), 'image')} with captions, fewer than the first {settings.first:,}")
        elif len(usable) > settings.first:
            notes.append(f"{counted(len(usable) - settings.first, 'image')} after the first {settings.first:,} left out")
    samples = _samples(listing.images, captions, splits, dataset)
    return write_samples(samples, settings.output, dataset, notes)


def divide(names: Iterable[str], fractions: dict[str, float]) -> dict[str, list[str]]:
    """``names`` by split: the SHA-256 of a name, as a number in [0, 1), falls between the fractions' running sums."""
    splits: dict[str, list[str]] = {split: [] for split in fractions}
    *others, last = fractions
    for name in names:
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
        reached = 0.0
        for split in others:
            reached += fractions[split]
            if number < reached:
                splits[split].append(name)
                break
        else:
            splits[last].append(name)
    return splits


def _check_splits(
    images: dict[str, Location], captions: dict[str, list[str]], splits: dict[str, list[str]], notes: list[str]
) -> set[str]:
    """Note the images that splits list but that are missing or have no caption; return all ids they list."""
    listed: dict[str, str] = {}
    for split, names in splits.items():
        for name in names:
            if listed.setdefault(name, split) != split:
                raise DataError(f"{name!r} is listed in both the {listed[name]} and the {split} split")
        present = [name for name in names if name in images]
        num_captioned = sum(bool(captions.get(name)) for name in present)
        if len(present) < len(names):
            notes.append(f"{split}: {len(names) - len(present):,} of {counted(len(names), 'listed image')} missing")
        if num_captioned < len(present):
            notes.append(f"{split}: {counted(len(present) - num_captioned, 'image')} without captions left out")
    return set(listed)


def _judge_rest(
    images: dict[str, Location], captions: dict[str, list[str]], listed: set[str], divided: bool, notes: list[str]
) -> None:
    unlisted = sum(name not in listed for name in images)
    if unlisted:
        notes.append(f"{counted(unlisted, 'image')} {'without captions' if divided else 'in no split'} left out")
    stray = sorted(name for name in captions if name not in images and name not in listed)
    if stray:
        more = " …" if len(stray) > _NAMES_SHOWN else ""
        notes.append(f"{counted(len(stray), 'caption id')} without an image: {', '.join(stray[:_NAMES_SHOWN])}{more}")


def _samples(
    images: dict[str, Location], captions: dict[str, list[str]], splits: dict[str, list[str]], dataset: str
) -> Iterator[Sample]:
    rows = [(name, split) for split, names in splits.items() for name in names]
    with ProgressDisplay(f"preparing {dataset}", total=len(rows)) as display:
        contents = read_ahead(read_bytes, (images[name] for name, _ in rows), NUM_READERS, NUM_READ_AHEAD)
        for done, ((name, split), content) in enumerate(zip(rows, contents, strict=True), start=1):
            yield Sample(name, content, captions[name], split)
            display.update(done, f"{done:,} of {len(rows):,} images")
