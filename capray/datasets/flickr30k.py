"""Flickr30k (Young et al. 2014): Karpathy's JSON, the original token file, or Kaggle's CSV.

Images in ``flickr30k-images/`` (the original archive), ``flickr30k_images/`` (Kaggle's, there twice, one in the other) or
``Images/``. Captions and splits in ``dataset_flickr30k.json``; or captions alone in ``results_20130124.token``
(``NAME.jpg#k<TAB>caption``) or ``results.csv`` (``NAME.jpg| k| caption``), with split lists or fractions given beside.
"""

from __future__ import annotations

import re

from capray.datasets.karpathy import KARPATHY_URL, find_karpathy, read_karpathy
from capray.datasets.raw_folder import (
    find_file,
    find_photos,
    in_order,
    lines_of,
    open_folder,
    read_names,
    read_text,
    read_tokens,
)
from capray.datasets.samples import Prepared
from capray.datasets.selection import RawDataset, prepare_dataset
from capray.datasets.settings import Flickr30kConfig
from capray.errors import ConfigError, DataError
from capray.storage import Location, check_empty, is_file, locate
from capray.wording import counted

_IMAGE_FOLDERS = ("flickr30k-images", "flickr30k_images/flickr30k_images", "flickr30k_images", "Images")
_TEXT_FOLDERS = ("", "flickr30k_images", "flickr30k")
_JSON, _TOKENS, _KAGGLE = "dataset_flickr30k.json", "results_20130124.token", "results.csv"
_KAGGLE_HEADER = re.compile(r"image_name\s*\|\s*comment_number\s*\|\s*comment\s*")
_KAGGLE_LINE = re.compile(r"(?P<name>[^|]+)\|\s*(?P<number>\d+)\s*(?P<bar>\|?)(?P<caption>.*)")
REQUEST = (
    "Flickr30k is given out on request only: fill in the form at https://shannon.cs.illinois.edu/DenotationGraph/, unpack "
    "flickr30k-images.tar.gz and flickr30k.tar.gz (results_20130124.token) into the folder, and for Karpathy's splits put "
    f"{_JSON} of {KARPATHY_URL} beside them"
)


def prepare_flickr30k(config: Flickr30kConfig) -> Prepared:
    """Write the Samples table of Flickr30k. Images in no split, or without captions, are left out and counted.

    Raises:
        DataError: a part of the layout is missing or malformed, nothing says how to split the images, or an image is in
            two splits.
        ConfigError: the output is not empty, or ``fetch``.
    """
    if config.fetch:
        raise ConfigError(REQUEST)
    check_empty(config.output)
    raw = open_folder(config.raw, f". {REQUEST}")
    return prepare_dataset(_listing(raw, config), config, "flickr30k")


def _listing(raw: Location, config: Flickr30kConfig) -> RawDataset:
    images = find_photos(raw, _IMAGE_FOLDERS, f". {REQUEST}")
    notes: list[str] = []
    json = find_karpathy(raw, "flickr30k")
    tokens, kaggle = find_file(raw, _TOKENS, _TEXT_FOLDERS), find_file(raw, _KAGGLE, _TEXT_FOLDERS)
    if json:
        found = read_karpathy(json, "flickr30k", notes)
        captions, splits = found.captions, found.splits
    elif tokens:
        captions, splits = read_tokens(tokens), None
    elif kaggle:
        captions, splits = _read_kaggle(kaggle, notes), None
    else:
        raise DataError(f"{raw.uri!r} has no captions: expected {_JSON}, {_TOKENS} or {_KAGGLE}")
    if config.split_lists:
        splits = dict(_split_list(text, notes) for text in config.split_lists)
    elif splits is None and config.fractions is None:
        raise DataError(
            f"{raw.uri!r} has captions but no splits: put {_JSON} (in {KARPATHY_URL}) there, list the images of each split "
            "(--split-lists train=train.txt dev=val.txt …), or divide the images (--split-fractions train=0.8,test=0.2)"
        )
    return RawDataset(images, captions, splits, notes)


def _read_kaggle(place: Location, notes: list[str]) -> dict[str, list[str]]:
    """The captions by image name, in the order of their numbers."""
    header, _, body = read_text(place).partition("\n")
    if not _KAGGLE_HEADER.fullmatch(header.strip()):
        raise DataError(f"{_KAGGLE}: expected the header image_name| comment_number| comment, not {header[:60]!r}")
    numbered: dict[str, list[tuple[int, str]]] = {}
    num_without_bar = 0
    for line_number, line in lines_of(body, first=2):
        match = _KAGGLE_LINE.fullmatch(line)
        if match is None:
            raise DataError(f"{_KAGGLE}, line {line_number}: expected NAME.jpg| k| caption, not {line[:60]!r}")
        num_without_bar += not match["bar"]
        numbered.setdefault(match["name"].strip(), []).append((int(match["number"]), match["caption"].strip()))
    if num_without_bar:
        notes.append(f"{_KAGGLE}: {counted(num_without_bar, 'line')} without the second |, read as number and caption")
    return in_order(numbered)


def _split_list(text: str, notes: list[str]) -> tuple[str, list[str]]:
    split, _, uri = text.partition("=")
    place = locate(uri)
    if not is_file(place):
        raise DataError(f"no file at {uri!r} for the {split} split")
    return split, [name if name.lower().endswith(".jpg") else f"{name}.jpg" for name in read_names(place, notes)]
