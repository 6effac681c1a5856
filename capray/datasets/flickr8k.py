"""Flickr8k (Hodosh et al. 2013), in the original layout or Kaggle's, or with Karpathy's JSON.

Images in ``Images/`` or ``Flicker8k_Dataset/``; captions in ``Flickr8k.token.txt`` (``NAME.jpg#k<TAB>caption``) or
``captions.txt`` (CSV, ``image,caption``); the splits in ``Flickr_8k.{train,dev,test}Images.txt``. The text files may lie
beside the images' folder or in ``Flickr8k_text/``. ``dataset_flickr8k.json`` stands for captions and splits.
"""

from __future__ import annotations

import csv
import io

from capray.datasets.archives import Archive, fetch
from capray.datasets.karpathy import KARPATHY_URL, find_karpathy, karpathy_archive, read_karpathy
from capray.datasets.raw_folder import find_file, find_photos, open_folder, read_names, read_text, read_tokens
from capray.datasets.samples import Prepared
from capray.datasets.selection import RawDataset, prepare_dataset
from capray.datasets.settings import Flickr8kConfig
from capray.errors import DataError
from capray.storage import Location, check_empty

SPLITS = {"train": "Flickr_8k.trainImages.txt", "dev": "Flickr_8k.devImages.txt", "test": "Flickr_8k.testImages.txt"}
_IMAGE_FOLDERS = ("Images", "Flicker8k_Dataset", "Flickr8k_Dataset/Flicker8k_Dataset")
_TEXT_FOLDERS = ("", "Flickr8k_text")
_TOKENS, _KAGGLE = "Flickr8k.token.txt", "captions.txt"
_RELEASE = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"
ARCHIVES = (
    Archive(
        f"{_RELEASE}/Flickr8k_text.zip",
        tuple(f"{folder}/{SPLITS['test']}".lstrip("/") for folder in _TEXT_FOLDERS),
        checksum="md5:bf6c1abcb8e4a833b7f922104de18627",
    ),
    Archive(
        f"{_RELEASE}/Flickr8k_Dataset.zip",
        ("Flicker8k_Dataset", "Images", "Flickr8k_Dataset/Flicker8k_Dataset"),
        checksum="md5:f18a1e2920de5bd84dae7cf08ec78978",
    ),
)
"""The MD5s are those that R's torchvision (`flickr8k_dataset`) holds these archives to."""


def prepare_flickr8k(config: Flickr8kConfig) -> Prepared:
    """Write the Samples table of Flickr8k. Images in no split, or without captions, are left out and counted.

    Raises:
        DataError: a part of the layout is missing or malformed, or an image is in two splits.
        ConfigError: the output is not empty, or ``fetch`` with a folder that is not local.
        StorageError: the download failed.
    """
    check_empty(config.output)
    if config.fetch:
        json = (karpathy_archive("flickr8k"),) if config.splits == "karpathy" else ()
        fetch((*ARCHIVES, *json), config.raw)
    raw = open_folder(config.raw, "" if config.fetch else " (--fetch downloads Flickr8k there)")
    return prepare_dataset(_listing(raw, config), config, "flickr8k")


def _listing(raw: Location, config: Flickr8kConfig) -> RawDataset:
    images = find_photos(raw, _IMAGE_FOLDERS)
    notes: list[str] = []
    tokens, kaggle = find_file(raw, _TOKENS, _TEXT_FOLDERS), find_file(raw, _KAGGLE, _TEXT_FOLDERS)
    json = find_karpathy(raw, "flickr8k")
    if config.splits == "karpathy" and json is None:
        raise DataError(f"{raw.uri!r} has no dataset_flickr8k.json: it is in {KARPATHY_URL}")
    if json and (config.splits == "karpathy" or not (config.splits or tokens or kaggle)):
        found = read_karpathy(json, "flickr8k", notes)
        return RawDataset(images, found.captions, found.splits, notes)
    if tokens:
        captions = read_tokens(tokens)
    elif kaggle:
        captions = _read_kaggle(kaggle)
    else:
        raise DataError(f"{raw.uri!r} has no captions: expected {_TOKENS} or {_KAGGLE}")
    splits = None
    if config.fractions is None:
        splits = {split: read_names(_split_list(raw, name), notes) for split, name in SPLITS.items()}
    return RawDataset(images, captions, splits, notes)


def _read_kaggle(place: Location) -> dict[str, list[str]]:
    """The captions by image name, in the order of the file."""
    captions: dict[str, list[str]] = {}
    rows = csv.reader(io.StringIO(read_text(place)))
    header = next(rows, [])
    if [column.strip() for column in header] != ["image", "caption"]:
        raise DataError(f"{_KAGGLE}: expected the header image,caption, not {','.join(header)[:60]!r}")
    for row in rows:
        if len(row) != 2:
            raise DataError(f"{_KAGGLE}, line {rows.line_num}: expected image,caption, not {','.join(row)[:60]!r}")
        captions.setdefault(row[0].strip(), []).append(row[1].strip())
    return captions


def _split_list(raw: Location, name: str) -> Location:
    place = find_file(raw, name, _TEXT_FOLDERS)
    if place is None:
        raise DataError(
            f"{raw.uri!r} has no {name}: Kaggle's copy leaves the split lists out; they are in Flickr8k_text.zip of the "
            "original release (--fetch downloads it), or --split-fractions divides the images without them"
        )
    return place
