"""What the benchmarks caption: JPEGs of the size of Flickr's, drawn."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

JPEG_SIZE = (500, 375)


def photos(count: int) -> list[bytes]:
    """``count`` different photos of JPEG_SIZE."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        pixels = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize(JPEG_SIZE, Image.Resampling.BICUBIC).save(buffer, "JPEG")
        found.append(buffer.getvalue())
    return found
