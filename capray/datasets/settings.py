"""The settings of each data set. Loads no library that the command line would wait for."""

from __future__ import annotations

import math
import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from capray.config import Settings

_SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")


def check_split_name(name: str) -> str:
    """``name``; raises ValueError if it cannot stand in a file's name."""
    if not _SPLIT_NAME.fullmatch(name):
        raise ValueError(f"a split's name is letters, digits, '_', '-' and '.', not {name!r}")
    return name


class PrepareSettings(Settings):
    """What every data set's preparation shares: from where, to where, which images, in which splits."""

    positional: ClassVar[tuple[str, ...]] = ("raw", "output")

    raw: str
    """Folder or URI of the data set."""
    output: str
    """Folder or URI for the Samples table."""
    first: Annotated[int, Field(ge=1)] | None = None
    """Only the first N images, in the order of the caption file, that are there and have captions."""
    split_fractions: str | None = None
    """Divide the images again instead of by the data set's own splits, which then need not be there:
    `train=0.8,test=0.2`. A hash of the image id decides, so an image stays in its split whatever else is prepared; the
    sizes meet the fractions up to chance."""

    @field_validator("split_fractions")
    @classmethod
    def _fractions_of_the_whole(cls, text: str | None) -> str | None:
        if text is not None:
            _parse_fractions(text)
        return text

    @property
    def fractions(self) -> dict[str, float] | None:
        """``split_fractions`` by split, summing to 1."""
        return None if self.split_fractions is None else _parse_fractions(self.split_fractions)


def _parse_fractions(text: str) -> dict[str, float]:
    fractions: dict[str, float] = {}
    for part in text.split(","):
        split, _, number = (side.strip() for side in part.partition("="))
        try:
            fraction = float(number)
        except ValueError:
            raise ValueError(f"must be SPLIT=FRACTION,… (train=0.8,test=0.2), not {text!r}") from None
        if not 0 < fraction <= 1 or split in fractions:
            raise ValueError(f"needs each split once, with a fraction above 0 and at most 1, not {text!r}")
        fractions[check_split_name(split)] = fraction
    if not math.isclose(sum(fractions.values()), 1, abs_tol=1e-6):
        raise ValueError(f"the fractions must sum to 1, not to {sum(fractions.values()):g} ({text!r})")
    return fractions


class Flickr8kConfig(PrepareSettings):
    """Turn Flickr8k as it is distributed, or with Karpathy's JSON, into a Samples table."""

    raw: str
    """Folder with the images (`Images/` or `Flicker8k_Dataset/`), the captions (`Flickr8k.token.txt` or `captions.txt`)
    and the three split lists (`Flickr_8k.trainImages.txt` …), or Karpathy's `dataset_flickr8k.json` for both."""
    splits: Literal["original", "karpathy"] | None = None
    """Captions and splits: from the original text files or from Karpathy's JSON; when not given, from the original if
    they are there."""
    fetch: bool = False
    """Download what is missing (1.1 GB) into the folder first."""


class Flickr30kConfig(PrepareSettings):
    """Turn Flickr30k into a Samples table."""

    raw: str
    """Folder with the images (`flickr30k-images/`, `flickr30k_images/` or `Images/`) and the captions: Karpathy's
    `dataset_flickr30k.json`, which has splits too, `results_20130124.token`, or Kaggle's `results.csv`."""
    split_lists: tuple[str, ...] = ()
    """`SPLIT=FILE …`: files that list the images of a split, one a line, with or without `.jpg`; in place of
    Karpathy's splits."""
    fetch: bool = False
    """Flickr30k is given out on request only: says how to get it."""

    @field_validator("split_lists")
    @classmethod
    def _a_file_for_each_split(cls, lists: tuple[str, ...]) -> tuple[str, ...]:
        names = [text.partition("=")[0] for text in lists]
        for text, name in zip(lists, names, strict=True):
            if not text.partition("=")[2]:
                raise ValueError(f"must be SPLIT=FILE (train=train.txt), not {text!r}")
            check_split_name(name)
            if names.count(name) > 1:
                raise ValueError(f"names the split {name!r} twice")
        return lists

    @model_validator(mode="after")
    def _one_division(self) -> Self:
        if self.split_lists and self.split_fractions:
            raise ValueError("`split_lists` and `split_fractions` both divide the images: give one")
        return self


class CocoConfig(PrepareSettings):
    """Turn MS COCO into a Samples table. The digits at the end of an image id, before `.jpg`, are COCO's integer id."""

    raw: str
    """Folder with the images (`train2014/`, `val2014/` …, or those in `images/`) and the captions
    (`annotations/captions_train2014.json` …, or Karpathy's `dataset_coco.json`)."""
    splits: Literal["2014", "2017", "karpathy"] | None = None
    """Captions and splits: official ones of 2014 or 2017 (train, and val as dev), or Karpathy's of the images of 2014;
    when not given, those the folder holds."""
    restval: Literal["train", "leave-out"] = "train"
    """Karpathy's `restval`, the images of val2014 in neither dev nor test: with train, as is usual, or left out."""
    fetch: bool = False
    """Download what is missing into the folder first: 20 GB, and as much again while it is unpacked."""

    @field_validator("splits", mode="before")
    @classmethod
    def _year_as_text(cls, splits: object) -> object:
        return str(splits) if isinstance(splits, int) else splits

    @model_validator(mode="after")
    def _something_to_fetch(self) -> Self:
        if self.fetch and self.splits is None:
            raise ValueError("`fetch` needs `splits`: which COCO to download (2014, 2017, karpathy)")
        return self


class FolderConfig(PrepareSettings):
    """Turn any folder of images with a manifest of captions into a Samples table."""

    raw: str
    """Folder or URI below which the images are."""
    manifest: str | None = None
    """CSV, TSV, JSONL or Parquet table of image files and captions: one caption a row, or a list of them; when not
    given, the only such file in the folder."""
    image_column: str | None = None
    """Column of image files, relative to the folder; when not given, `file_name`, `filename`, `image`, `file` or `path`."""
    caption_column: str | None = None
    """Column of a caption or a list of captions; when not given, `caption`, `captions` or `text`."""
    split_column: str | None = None
    """Column of split names; when not given, `split`, if there is one."""


class ShapesConfig(Settings):
    """Draw a captioned data set of coloured shapes: no download, made on the spot."""

    positional: ClassVar[tuple[str, ...]] = ("output",)

    output: str
    """Folder or URI for the Samples table."""
    num_images: Annotated[int, Field(ge=10, le=1_000_000)] = 1000
    """Images to draw: 80 % train, 10 % dev, 10 % test."""
    image_size: Annotated[int, Field(ge=32, le=512)] = 64
    """Side of an image in pixels."""
    seed: int = 0
    """Seed of the scenes: the same seed draws the same images and captions."""
