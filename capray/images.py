"""Bytes to RGB to tensor: the one preprocessing, for training, batch and serving.

``decode`` refuses what is no image with a typed error, ``fit`` brings an image to the encoder's input size as uint8
(what travels between processes), ``normalise`` makes floats of it on the device. Knows nothing of files or tables.

Axes: B images, H rows, W columns, 3 channels.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from capray.config import ImageLimits, Preprocessing

Image.init()
_WANTED = ("JPEG", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA", "PCX", "SGI")
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)
"""Pillow's decoders that may run (JPEG opens MPO too). Left out are those that start other programs (EPS) or that no
photo needs."""

_MAX_ASPECT = 4
"""With keep-aspect the longer side is at most this many times the shorter; what is longer is squashed to it."""

_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"RIFF": "WEBP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"BM": "BMP",
}
_UNSUPPORTED_MAGIC = {b"%PDF": "PDF", b"%!PS": "PostScript", b"8BPS": "Photoshop", b"<svg": "SVG", b"gimp xcf": "XCF"}


class ImageError(Exception):
    """An image that cannot be used: ``kind`` is one of the final failures of ``tables``."""

    def __init__(self, kind: str, message: str):
        super().__init__(kind, message)
        self.kind = kind
        self.message = message


@dataclass(frozen=True)
class Decoded:
    """An upright RGB image, and the size its file declares in pixels after EXIF orientation."""

    image: Image.Image
    width: int
    height: int


def decode(data: bytes, limits: ImageLimits | None = None, at_least: int | None = None) -> Decoded:
    """The image in ``data``, upright, in RGB, alpha over white, 16 bits scaled to 8, the first frame of several.

    Args:
        data: an encoded image; its type is judged by content.
        limits: what is refused before decoding.
        at_least: both sides may be reduced while they stay at or above this many pixels: a JPEG is then decoded
            at half, a quarter or an eighth of its size, which is several times faster.

    Raises:
        ImageError: of kind too_large, not_an_image, truncated, unsupported_format or decode_error.
    """
    limits = limits or ImageLimits()
    if len(data) > limits.max_image_bytes:
        raise ImageError("too_large", f"{len(data)} bytes, over the limit of {limits.max_image_bytes}")
    if not data:
        raise ImageError("truncated", "0 bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise _unidentified(data) from error
        except Exception as error:
            raise _decoding_error(error) from error
        if image.width * image.height > limits.max_image_pixels:
            raise ImageError(
                "too_large", f"{image.width}x{image.height} pixels, over the limit of {limits.max_image_pixels}"
            )
        try:
            width, height = image.size
            if image.getexif().get(0x0112) in (5, 6, 7, 8):
                width, height = height, width
            if at_least:
                image.draft(None, (at_least, at_least))
            image.load()
            return Decoded(_to_rgb(ImageOps.exif_transpose(image)), width, height)
        except Exception as error:
            raise _decoding_error(error) from error


def _unidentified(data: bytes) -> ImageError:
    head = data[:64].lstrip()
    for magic, name in _UNSUPPORTED_MAGIC.items():
        if head.startswith(magic):
            return ImageError("unsupported_format", f"{name} files are not read")
    if data[4:8] == b"ftyp":
        return ImageError("unsupported_format", f"{data[8:12].decode('latin-1')} files are not read")
    for magic, name in _MAGIC.items():
        if data.startswith(magic):
            return ImageError("truncated", f"a {name} file that ends within its header, after {len(data)} bytes")
    return ImageError("not_an_image", f"not an image: begins with {data[:8]!r}")


def _decoding_error(error: Exception) -> ImageError:
    message = f"{type(error).__name__}: {error}"
    text = str(error).lower()
    if isinstance(error, Image.DecompressionBombError):
        return ImageError("too_large", message)
    if isinstance(error, EOFError) or any(sign in text for sign in ("truncated", "unexpected end", "not enough data")):
        return ImageError("truncated", message)
    return ImageError("decode_error", message)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Integers are on a scale of 16 bits; floats on one of 0 to 1 where they fit it, else of 8 bits."""
    if values.dtype.kind == "f":
        scale = 255.0 if values.size and values.max() <= 1 else 1.0
        return np.clip(np.nan_to_num(values) * scale, 0, 255).astype(np.uint8)
    return (np.clip(values.astype(np.int64), 0, 65535) >> 8).astype(np.uint8)


def input_size(width: int, height: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """(width, height) of the encoder's input for an image of ``width`` x ``height`` pixels."""
    size = preprocessing.size
    if preprocessing.resize != "keep-aspect":
        return size, size
    shorter = min(width, height)
    longest = size * _MAX_ASPECT
    return min(round(width * size / shorter), longest), min(round(height * size / shorter), longest)


def fit(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """``image`` (RGB) at the encoder's input size: uint8, shape (H, W, 3)."""
    resample = Image.Resampling[preprocessing.interpolation.upper()]
    size = preprocessing.size
    width, height = image.size
    if preprocessing.resize == "pad":
        scale = size / max(width, height)
        inner = (max(1, round(width * scale)), max(1, round(height * scale)))
        canvas = Image.new("RGB", (size, size), tuple(round(255 * value) for value in preprocessing.mean))
        canvas.paste(image.resize(inner, resample), ((size - inner[0]) // 2, (size - inner[1]) // 2))
        return np.asarray(canvas)
    if preprocessing.resize == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return np.asarray(image.resize((size, size), resample, box=(left, top, left + side, top + side)))
    return np.asarray(image.resize(input_size(width, height, preprocessing), resample))


def load(data: bytes, preprocessing: Preprocessing, limits: ImageLimits | None = None) -> tuple[np.ndarray, int, int]:
    """``decode`` and ``fit`` in one: the pixels (H, W, 3) uint8, and the image's own width and height in pixels."""
    decoded = decode(data, limits, at_least=2 * preprocessing.size)
    return fit(decoded.image, preprocessing), decoded.width, decoded.height


def normalise(pixels_BHW3, preprocessing: Preprocessing):
    """uint8 pixels to the encoder's input: float32 (B, 3, H, W), channels last in memory, on the pixels' device."""
    import torch

    device = pixels_BHW3.device
    mean = torch.tensor(preprocessing.mean, device=device) * 255
    std = torch.tensor(preprocessing.std, device=device) * 255
    return ((pixels_BHW3.float() - mean) / std).permute(0, 3, 1, 2)
