"""Karpathy's JSON of a data set's captions and splits: `dataset_{flickr8k,flickr30k,coco}.json`.

From *Deep Visual-Semantic Alignments for Generating Image Descriptions* (Karpathy and Fei-Fei 2015), published as
`caption_datasets.zip`: an object with `dataset` and `images`, of which each has `filename`, `split` and `sentences` with
their `raw` text; COCO's have `filepath` (the folder) and `cocoid` too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from capray.datasets.archives import Archive
from capray.datasets.raw_folder import find_file, read_json
from capray.errors import DataError
from capray.storage import Location
from capray.wording import counted

KARPATHY_URL = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
SPLITS = {"train": "train", "restval": "train", "val": "dev", "test": "test"}
"""The split of the Samples table for each of Karpathy's."""

_FOLDERS = ("", "caption_datasets", "annotations")


@dataclass
class Karpathy:
    """What the JSON says, by file name."""

    captions: dict[str, list[str]] = field(default_factory=dict)
    splits: dict[str, list[str]] = field(default_factory=lambda: {split: [] for split in ("train", "dev", "test")})
    coco_ids: dict[str, Any] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)


def karpathy_archive(dataset: str) -> Archive:
    """The archive, of which only the JSON of ``dataset`` is unpacked. Size and SHA-256 as TensorFlow Datasets registers them
    (`url_checksums/coco_captions.txt`)."""
    name = f"dataset_{dataset}.json"
    places = (name, *(f"{folder}/{name}" for folder in _FOLDERS if folder))
    checksum = "sha256:4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817"
    return Archive(KARPATHY_URL, places, name, 36_745_453, checksum)


def find_karpathy(raw: Location, dataset: str) -> Location | None:
    """The JSON of ``dataset`` in ``raw``, or in its folder `caption_datasets` or `annotations`."""
    return find_file(raw, f"dataset_{dataset}.json", _FOLDERS)


def read_karpathy(place: Location, dataset: str, notes: list[str], keep_restval: bool = True) -> Karpathy:
    """The captions and splits of ``dataset``; an image that comes again is counted in ``notes``.

    Raises:
        DataError: the file is not Karpathy's, is of another data set, an image lacks a part or has an unknown split, or an
            image is in two splits.
    """
    content = read_json(place)
    if not isinstance(content.get("images"), list):
        raise DataError(f"{place.uri!r} is not Karpathy's JSON: it has no list 'images'")
    if content.get("dataset", dataset) != dataset:
        raise DataError(f"{place.uri!r} is of the data set {content['dataset']!r}, not {dataset!r}")
    found = Karpathy()
    split_of: dict[str, str] = {}
    num_repeated = 0
    for number, image in enumerate(content["images"]):
        try:
            name, own_split = image["filename"], image["split"]
            captions = [sentence["raw"] for sentence in image["sentences"]]
            folder = image.get("filepath", "")
            if not all(isinstance(text, str) for text in (name, own_split, folder, *captions)):
                raise TypeError("a name, split, folder or caption that is not a string")
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{place.uri!r}, image {number}: expected filename, split and sentences with their raw text ({error})"
            ) from error
        if own_split not in SPLITS:
            raise DataError(f"{place.uri!r}, image {number}: unknown split {own_split!r}: expected {', '.join(SPLITS)}")
        if name in split_of:
            if split_of[name] != own_split:
                raise DataError(f"{place.uri!r}: {name!r} is in both the {split_of[name]} and the {own_split} split")
            num_repeated += 1
            continue
        split_of[name] = own_split
        found.captions[name] = [text.strip() for text in captions]
        found.folders.add(folder)
        found.coco_ids[name] = image.get("cocoid")
        if own_split != "restval" or keep_restval:
            found.splits[SPLITS[own_split]].append(name)
    if num_repeated:
        notes.append(f"{place.path.rsplit('/', 1)[-1]}: {counted(num_repeated, 'entry', 'entries')} with a repeated image")
    return found
