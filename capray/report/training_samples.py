"""A few validation images beside what the captioner says of them and what people said: a page for people to judge by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from capray.config import ImageLimits
from capray.datasets.samples import read_unit
from capray.images import ImageError, decode
from capray.report.rendering import data_uri, encoded, render

NUM_PICTURES = 8
SIDE = 256
"""Longer side of a picture in pixels."""


def pick_pictures(samples: str, split: str, units: Sequence[tuple[str, int]], limits: ImageLimits) -> dict[str, bytes]:
    """The first NUM_PICTURES images of ``split`` that can be decoded and have captions: small JPEGs by image id."""
    pictures: dict[str, bytes] = {}
    for unit in units:
        for row in read_unit(samples, unit, split).to_pylist():
            if len(pictures) == NUM_PICTURES:
                return pictures
            if not row["captions"]:
                continue
            try:
                image = decode(row["image"], limits, at_least=SIDE).image
            except ImageError:
                continue
            image.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR)
            pictures[row["image_id"]] = encoded(image, "JPEG")
    return pictures


def page(title: str, pictures: Mapping[str, bytes], samples: Sequence[Mapping[str, Any]]) -> str:
    """One HTML file with everything in it; ``samples`` have ``image_id``, ``caption`` and ``references``."""
    shown = {image_id: data_uri(picture, "JPEG") for image_id, picture in pictures.items()}
    return render("samples.html", title=title, samples=samples, pictures=shown)
