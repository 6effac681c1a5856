"""Flickr8k as it is distributed (Hodosh et al. 2013), in the original layout or Kaggle's.

Images in ``Images/`` or ``Flicker8k_Dataset/``; captions in ``Flickr8k.token.txt`` (``NAME.jpg#k<TAB>caption``) or
``captions.txt`` (CSV, ``image,caption``); the splits in ``Flickr_8k.{train,dev,test}Images.txt``. The text files may lie
beside the images' folder or in ``Flickr8k_text/``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from capray.config import FlickrConfig
from capray.datasets.samples import Prepared, Sample, write_samples
from capray.errors import DataError
from capray.storage import Location, is_folder, iter_files, list_names, locate, read_bytes

SPLITS = {"train": "Flickr_8k.trainImages.txt", "dev": "Flickr_8k.devImages.txt", "test": "Flickr_8k.testImages.txt"}
_IMAGE_FOLDERS = ("Images", "Flicker8k_Dataset", "Flickr8k_Dataset/Flicker8k_Dataset")
_TEXT_FOLDERS = ("", "Flickr8k_text")
_TOKENS, _KAGGLE = "Flickr8k.token.txt", "captions.txt"


def prepare_flickr8k(config: FlickrConfig) -> Prepared:
    """Write the Samples table of Flickr8k. Images in no split, or without captions, are left out and counted.

    Raises:
        DataError: a part of the layout is missing or malformed, or an image is in two splits.
        ConfigError: the output is not empty.
    """
    raw = locate(config.raw)
    if not is_folder(raw):
        raise DataError(f"no folder at {config.raw!r}")
    images = _images(raw)
    captions = _captions(raw)
    notes: list[str] = []
    splits = {split: _split(raw, name, notes) for split, name in SPLITS.items()}
    listed: dict[str, str] = {}
    for split, names in splits.items():
        for name in names:
            if listed.setdefault(name, split) != split:
                raise DataError(f"{name!r} is listed in both the {listed[name]} and the {split} split")
    return write_samples(_samples(images, captions, splits, notes), config.output, "flickr8k", notes)


def _samples(
    images: dict[str, Location], captions: dict[str, list[str]], splits: dict[str, list[str]], notes: list[str]
) -> Iterator[Sample]:
    listed = {name for names in splits.values() for name in names}
    for split, names in splits.items():
        present = [name for name in names if name in images]
        captioned = [name for name in present if captions.get(name)]
        if len(present) < len(names):
            notes.append(f"{split}: {len(names) - len(present)} of {len(names)} listed images are missing")
        if len(captioned) < len(present):
            notes.append(f"{split}: {len(present) - len(captioned)} images have no captions and are left out")
        for name in captioned:
            yield Sample(name, read_bytes(images[name]), captions[name], split)
    unlisted = sum(name not in listed for name in images)
    if unlisted:
        notes.append(f"{unlisted} images are in no split and are left out")
    stray = sorted(name for name in captions if name not in images and name not in listed)
    if stray:
        notes.append(f"{len(stray)} caption ids name no image: {', '.join(stray[:5])}{' …' if len(stray) > 5 else ''}")


def _images(raw: Location) -> dict[str, Location]:
    for folder in _IMAGE_FOLDERS:
        place = raw.join(folder)
        if is_folder(place):
            names = (entry.path.rsplit("/", 1)[-1] for entry in iter_files(place))
            return {name: place.join(name) for name in names if name.lower().endswith((".jpg", ".jpeg"))}
    raise DataError(f"{raw.uri!r} has no folder of images: expected one of {', '.join(_IMAGE_FOLDERS)}")


def _text(raw: Location, name: str) -> str | None:
    for folder in _TEXT_FOLDERS:
        place = raw.join(folder) if folder else raw
        if name in list_names(place):
            return read_bytes(place.join(name)).decode("utf-8")
    return None


def _captions(raw: Location) -> dict[str, list[str]]:
    """The raw captions by image name, in the order of their numbers."""
    text = _text(raw, _TOKENS)
    if text is not None:
        numbered: dict[str, list[tuple[int, str]]] = {}
        for line_number, line in enumerate(text.splitlines(), start=1):
            key, tab, caption = line.partition("\t")
            name, sign, number = key.rpartition("#")
            if not tab or not sign or not number.isdigit():
                raise DataError(f"{_TOKENS}, line {line_number}: expected NAME.jpg#k<TAB>caption, not {line[:60]!r}")
            numbered.setdefault(name, []).append((int(number), caption.strip()))
        return {name: [caption for _, caption in sorted(found)] for name, found in numbered.items()}
    text = _text(raw, _KAGGLE)
    if text is None:
        raise DataError(f"{raw.uri!r} has no captions: expected {_TOKENS} or {_KAGGLE}")
    captions: dict[str, list[str]] = {}
    rows = csv.reader(io.StringIO(text))
    header = next(rows, [])
    if [column.strip() for column in header] != ["image", "caption"]:
        raise DataError(f"{_KAGGLE}: expected the header image,caption, not {','.join(header)[:60]!r}")
    for row in rows:
        if len(row) != 2:
            raise DataError(f"{_KAGGLE}, line {rows.line_num}: expected image,caption, not {','.join(row)[:60]!r}")
        captions.setdefault(row[0].strip(), []).append(row[1].strip())
    return captions


def _split(raw: Location, name: str, notes: list[str]) -> list[str]:
    """The image names of a split list, each once."""
    text = _text(raw, name)
    if text is None:
        raise DataError(
            f"{raw.uri!r} has no {name}: Kaggle's copy leaves the split lists out; they are in Flickr8k_text.zip of the "
            "original release"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    names = list(dict.fromkeys(lines))
    if len(names) < len(lines):
        notes.append(f"{name}: {len(lines) - len(names)} lines repeat an image")
    return names
