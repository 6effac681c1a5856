"""MS COCO (Lin et al. 2014, Chen et al. 2015): the official captions of 2014 or 2017, or Karpathy's splits.

Images in ``train2014/``, ``val2014/``, ``train2017/``, ``val2017/``, or in those below ``images/``; captions in
``captions_<folder>.json`` or Karpathy's ``dataset_coco.json``, in ``annotations/`` or beside the images' folders. The
image id is the file name; ``coco_id`` gets COCO's integer id from it, as in SQL does
``regexp_extract(image_id, '(\\d+)\\.jpg$', 1)::BIGINT``.
"""

from __future__ import annotations

import re

from capray.datasets.archives import Archive, fetch
from capray.datasets.karpathy import KARPATHY_URL, find_karpathy, karpathy_archive, read_karpathy
from capray.datasets.raw_folder import find_file, find_folder, open_folder, photos_in, read_json
from capray.datasets.samples import Prepared
from capray.datasets.selection import RawDataset, prepare_dataset
from capray.datasets.settings import CocoConfig
from capray.errors import ConfigError, DataError
from capray.storage import Location, check_empty
from capray.wording import counted

_YEARS = ("2014", "2017")
_SPLITS = {"train": "train", "val": "dev"}
_FILE_NAME = re.compile(r"(?:.*\D)?(\d+)\.jpg")
_KARPATHYS_FOLDERS = ("train2014", "val2014")
_SERVER = "http://images.cocodataset.org"


def _annotations(year: str, size: int, checksum: str) -> Archive:
    name = f"captions_train{year}.json"
    url = f"{_SERVER}/annotations/annotations_trainval{year}.zip"
    return Archive(url, (f"annotations/{name}", name), "annotations/captions_*.json", size, checksum)


def _images(name: str, size: int, checksum: str) -> Archive:
    return Archive(f"{_SERVER}/zips/{name}.zip", (name, f"images/{name}"), size=size, checksum=checksum)


_IMAGES_2014 = (
    _images("val2014", 6_645_013_297, "sha256:fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0"),
    _images("train2014", 13_510_573_713, "sha256:ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775"),
)
ARCHIVES = {
    "2014": (
        _annotations("2014", 252_872_794, "sha256:031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009"),
        *_IMAGES_2014,
    ),
    "2017": (
        _annotations("2017", 252_907_541, "sha256:113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268"),
        _images("val2017", 815_585_330, "sha256:4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05"),
        _images("train2017", 19_336_861_798, "sha256:69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929"),
    ),
    "karpathy": (karpathy_archive("coco"), *_IMAGES_2014),
}
"""What ``fetch`` needs for each ``splits``. Sizes in bytes and SHA-256s as TensorFlow Datasets registers them
(`url_checksums/coco_captions.txt`)."""


def prepare_coco(config: CocoConfig) -> Prepared:
    """Write the Samples table of COCO: official train and val become train and dev; Karpathy's val becomes dev.

    Raises:
        DataError: a part of the layout is missing or malformed, an image is in two splits, or a file name does not hold
            the image's integer id.
        ConfigError: the output is not empty, the folder holds several kinds of captions and none is chosen, or ``fetch``
            with a folder that is not local.
        StorageError: the download failed.
    """
    check_empty(config.output)
    if config.fetch:
        assert config.splits is not None
        fetch(ARCHIVES[config.splits], config.raw)
    raw = open_folder(config.raw, "" if config.fetch else " (--fetch downloads COCO there)")
    splits = config.splits or _splits_of(raw)
    listing = _karpathy(raw, config.restval == "train") if splits == "karpathy" else _official(raw, splits)
    return prepare_dataset(listing, config, "coco")


def coco_id(image_id: str) -> int:
    """COCO's integer id of an image: the digits at the end of its file name, ``COCO_val2014_000000391895.jpg``.

    Raises:
        DataError: the name does not end in digits and ``.jpg``.
    """
    match = _FILE_NAME.fullmatch(image_id)
    if match is None:
        raise DataError(f"{image_id!r} is not named as COCO names its images: expected digits before .jpg")
    return int(match[1])


def _splits_of(raw: Location) -> str:
    """Which captions the folder holds."""
    found = [year for year in _YEARS if any(_captions_file(raw, f"{part}{year}") for part in _SPLITS)]
    if find_karpathy(raw, "coco"):
        found.append("karpathy")
    if not found:
        raise DataError(
            f"{raw.uri!r} has no captions: expected annotations/captions_train2014.json and captions_val2014.json, those of "
            "2017, or dataset_coco.json"
        )
    if len(found) > 1:
        raise ConfigError(f"{raw.uri!r} holds captions of {', '.join(found)}: choose with --splits")
    return found[0]


def _captions_file(raw: Location, part: str) -> Location | None:
    return find_file(raw, f"captions_{part}.json", ("annotations", ""))


def _photos(raw: Location, part: str, named_by: str) -> dict[str, Location]:
    folder = find_folder(raw, (part, f"images/{part}"))
    if folder is None:
        raise DataError(f"{raw.uri!r} has no folder {part}, nor images/{part}, whose images {named_by} names")
    return photos_in(folder)


def _official(raw: Location, year: str) -> RawDataset:
    listing = RawDataset({}, {}, {})
    assert listing.splits is not None
    for part, split in ((f"{part}{year}", split) for part, split in _SPLITS.items()):
        place = _captions_file(raw, part)
        if place is None:
            listing.notes.append(f"there is no captions_{part}.json, and so no {split} split")
            continue
        captions = _read_official(place, listing.notes)
        listing.images |= _photos(raw, part, f"captions_{part}.json")
        listing.captions |= captions
        listing.splits[split] = list(captions)
    if not listing.splits:
        raise DataError(f"{raw.uri!r} has no annotations/captions_train{year}.json nor captions_val{year}.json")
    return listing


def _read_official(place: Location, notes: list[str]) -> dict[str, list[str]]:
    """The captions by file name, in the order of the annotations; images without annotations come last."""
    content = read_json(place)
    file = place.path.rsplit("/", 1)[-1]
    for key in ("images", "annotations"):
        if not isinstance(content.get(key), list):
            raise DataError(f"{place.uri!r} is not a COCO captions file: it has no list {key!r}")
    names: dict[int, str] = {}
    num_repeated = 0
    for number, image in enumerate(content["images"]):
        try:
            image_id, name = image["id"], image["file_name"]
        except (KeyError, TypeError) as error:
            raise DataError(f"{file}, image {number}: expected id and file_name ({error})") from error
        _check_id(name, image_id, file)
        num_repeated += image_id in names
        names[image_id] = name
    captions: dict[str, list[str]] = {}
    seen: set[int] = set()
    num_stray = 0
    for number, annotation in enumerate(content["annotations"]):
        try:
            image_id, own_id, caption = annotation["image_id"], annotation["id"], annotation["caption"]
            text = caption.strip()
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{file}, annotation {number}: expected id, image_id and caption ({error}); captions are in captions_*.json"
            ) from error
        if own_id in seen:
            num_repeated += 1
        elif image_id not in names:
            num_stray += 1
        else:
            captions.setdefault(names[image_id], []).append(text)
        seen.add(own_id)
    if num_repeated:
        notes.append(f"{file}: {counted(num_repeated, 'entry', 'entries')} with a repeated id")
    if num_stray:
        notes.append(f"{file}: {counted(num_stray, 'caption')} without an image in it")
    return captions | {name: [] for name in names.values() if name not in captions}


def _karpathy(raw: Location, keep_restval: bool) -> RawDataset:
    place = find_karpathy(raw, "coco")
    if place is None:
        raise DataError(f"{raw.uri!r} has no dataset_coco.json: it is in {KARPATHY_URL}")
    notes: list[str] = []
    found = read_karpathy(place, "coco", notes, keep_restval)
    images: dict[str, Location] = {}
    for folder in sorted(found.folders):
        if folder not in _KARPATHYS_FOLDERS:
            raise DataError(f"{place.uri!r}: unknown filepath {folder!r}: expected {' or '.join(_KARPATHYS_FOLDERS)}")
        images |= _photos(raw, folder, "dataset_coco.json")
    for name, image_id in found.coco_ids.items():
        _check_id(name, image_id, "dataset_coco.json")
    return RawDataset(images, found.captions, found.splits, notes)


def _check_id(name: str, image_id: object, file: str) -> None:
    if not isinstance(name, str) or coco_id(name) != image_id:
        raise DataError(
            f"{file}: {name!r} has the id {image_id!r}, not the digits of its name: for other data in COCO's format use "
            "`capray prepare folder`"
        )
