"""A few validation images beside what the captioner says of them and what people said: a page for people to judge by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from capray.config import ImageLimits
from capray.images import ImageError, decode
from capray.pages import data_uri, encoded
from capray.storage import locate, storage_errors

NUM_PICTURES = 8
SIDE = 256
"""Longer side of a picture in pixels."""

_STYLE = """
body { font: 14px system-ui, sans-serif; display: grid; gap: 20px }
body { grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)) }
figure { margin: 0 } img { max-width: 100% } b { display: block; margin: 4px 0 }
ul { margin: 0; padding-left: 18px } li, small { color: #666 }
"""


def pick_pictures(
    samples: str, split: str, units: Sequence[tuple[str, int]], limits: ImageLimits, number: int = NUM_PICTURES
) -> dict[str, bytes]:
    """The first ``number`` images of ``split`` that can be decoded and have captions: small JPEGs by image id."""
    pictures: dict[str, bytes] = {}
    fs = locate(samples).fs
    for path, group in units:
        with storage_errors(f"reading {path}"):
            table = pq.ParquetFile(path, filesystem=fs).read_row_group(group)
        for row in table.to_pylist():
            if len(pictures) == number:
                return pictures
            if row["split"] != split or not row["captions"]:
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
    figures = []
    for sample in samples:
        picture = pictures.get(sample["image_id"])
        if picture is None:
            continue
        references = "".join(f"<li>{escape(reference)}</li>" for reference in sample["references"])
        source = data_uri(picture, "JPEG")
        figures.append(
            f'<figure><img src="{source}" alt="">'
            f"<figcaption><b>{escape(sample['caption'])}</b><ul>{references}</ul>"
            f"<small>{escape(sample['image_id'])}</small></figcaption></figure>"
        )
    return f'<!doctype html><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>{"".join(figures)}\n'
