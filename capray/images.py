"""Bytes to RGB to tensor: the one preprocessing, for training, batch and serving.

``decode`` refuses what is no image with a typed error, ``fit`` brings an image to the encoder's input size as uint8
(what travels between processes), ``normalise`` makes floats of it on the device. Knows nothing of files or tables.

Axes: B images, H rows, W columns, 3 channels.
"""

from __future__ import annotations

import io
import posixpath
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from capray.config import ImageLimits, Preprocessing

Image.init()
_WANTED = ("JPEG", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA", "PCX", "SGI")
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)
"""Pillow's decoders that may run (JPEG opens MPO too). Left out are those that start other programs (EPS) or that no
photo needs."""

_ENDED_BY = {ending[1:] for ending, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")}
ENDINGS = frozenset(_ENDED_BY | {"heic", "heif"})
"""What an image's name ends with, in lower case, behind the last dot: Pillow's endings of FORMATS, and those of HEIC, which
has a kind of failure."""


_MAX_ASPECT = 4
"""With keep-aspect the longer side is at most this many times the shorter; what is longer is squashed to it."""

_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"RIFF": "WEBP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"II+\x00": "TIFF",
    b"\x00\x00\x01\x00": "ICO",
    b"\xff\x4f\xff\x51": "JPEG2000",
    b"\x00\x00\x00\x0cjP  ": "JPEG2000",
}
_UNSUPPORTED_MAGIC = {
    b"%PDF": "PDF",
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript",
    b"8BPS": "Photoshop",
    b"gimp xcf": "XCF",
    b"<svg": "SVG",
    b"\xff\x0a": "JPEG XL",
    b"\x00\x00\x00\x0cJXL ": "JPEG XL",
    b"II\xbc\x01": "JPEG XR",
    b"qoif": "QOI",
    b"icns": "ICNS",
    b"DDS ": "DDS",
    b"BLP1": "BLP",
    b"BLP2": "BLP",
    b"Image type:": "IM",
    b"DanM": "MSP",
    b"LinS": "MSP",
    b"SIMPLE  =": "FITS",
    b"/* XPM": "XPM",
}
_BRANDS = {
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIC"),
    b"crx ": "Canon raw",
}
_SIGNS = re.compile(
    b"|".join(
        (
            rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8|RIFF....WEBP",
            rb"II[*+]\x00|MM\x00[*+]|II\x00\*|MM\*\x00",
            rb"\xff\x4f\xff\x51|\x00\x00\x00\x0cjP  ",
            rb"....ftyp(?:avi[fs]|hei[cmsx]|hev[cx]|m[is]f1)",
            rb"\x00\x00\x01\x00[^\x00]\x00",
            rb"(?:BM.{12})?(?:\x0c\x00{3}.{4}|[\x28\x34\x38\x40\x6c\x7c]\x00{3}.{8})\x01\x00",
            rb"P[0-6fFy]\s+(?:#[^\n]*\s+)*\d+\s+\d+\s",
            rb"\x0a[\x00\x02\x03\x05][\x00\x01][\x01\x02\x04\x08]",
            rb"\x01\xda[\x00\x01][\x01\x02]\x00[\x01-\x03]",
        )
    ),
    re.DOTALL,
)
"""How files of FORMATS and HEIC begin, less TGA, which has no sign. Where Pillow asks for two bytes that may begin other
files, what follows is asked for too."""
_HEADER_BYTES = 128
"""The longest header that Pillow needs to recognise a format: PCX's."""
_TRUNCATED = ("truncated", "unexpected end", "not enough", "reached eof", "expected to read")
_UNSUPPORTED = ("unsupported", "not supported", "not yet supported", "cannot handle", "unknown pixel mode")
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAX_JPEG_REPEATS = 100
"""Scans, or EXIF segments, of one JPEG: each scan costs a pass over all pixels, and Pillow joins the EXIF segments in
quadratic time. Encoders write about ten scans and one segment."""
_MAX_JPEG2000_TILES = 16_384
"""OpenJPEG keeps 10 KB for each, however small."""
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")

warnings.filterwarnings("ignore", module=r"PIL\.")


def ends_like_image(name: str) -> bool:
    """Whether a file's ``name`` ends like an image's."""
    return posixpath.splitext(name)[1][1:].lower() in ENDINGS


UNCERTAIN = ("missing", "truncated", "decode_error", "crashed")
"""Kinds of failure that a short read, a file just being written, a mount that is away or a sick node or device look like."""


class ImageError(Exception):
    """An image that cannot be used, or not be had now: ``kind`` is one of the failures of ``tables``.

    ``certain`` is False where a fault of a disk, node or device could have had the same effect, which is so of UNCERTAIN
    unless told otherwise: only a second observation, later, makes such a failure final.
    """

    def __init__(self, kind: str, message: str, certain: bool | None = None):
        super().__init__(kind, message, certain)
        self.kind = kind
        self.message = message
        self.certain = kind not in UNCERTAIN if certain is None else certain


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
        raise ImageError("too_large", f"{len(data):,} bytes, over the limit of {limits.max_image_bytes:,}")
    if not data:
        raise ImageError("truncated", "0 bytes")
    _refuse_costly(data, limits)
    if data.startswith(b"BM") and b"\x00" not in data[:18]:
        raise ImageError("not_an_image", f"not an image: begins with {data[:8]!r}")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except Exception as error:
        raise _decoding_error(error, data) from error
    try:
        _refuse_pixels(*image.size, limits)
        if isinstance(image, TiffImageFile):
            _check_tile_size(image, limits)
        elif image.format == "JPEG2000":
            _check_tiles(data)
        elif image.format == "PNG":
            _check_png(data)
        elif image.format == "TGA" and data[2] in (1, 9) and not data[1]:
            raise ImageError("not_an_image", "not an image: a TGA header without its palette")
        elif image.format == "PCX" and _lacks_palette(image, data):
            raise ImageError("truncated", "a PCX file without its palette")
        declared = image.size
        reduced = image.draft(None, (at_least, at_least)) if at_least else None
        image.load()
        if image.format in ("JPEG", "MPO") and _jpeg_stops_early(image, data, at_least):
            raise ImageError("truncated", "a JPEG whose data ends before its picture does")
        orientation = _orientation(image)
        upright = _to_rgb(image)
        if orientation in _TRANSPOSE:
            upright = upright.transpose(_TRANSPOSE[orientation])
    except ImageError:
        raise
    except Exception as error:
        raise _decoding_error(error, data) from error
    if not reduced:
        width, height = upright.size
    else:
        width, height = declared[::-1] if orientation >= 5 else declared
    return Decoded(upright, width, height)


def begins_like_image(head: bytes) -> bool:
    """Whether the first bytes of a file, at least 32 unless it is shorter, are those of an image, whatever its name."""
    return _SIGNS.match(head) is not None


def _refuse_pixels(width: int, height: int, limits: ImageLimits, where: str = "") -> None:
    if width * height > limits.max_image_pixels:
        message = f"{width}x{height} pixels {where}".rstrip()
        raise ImageError("too_large", f"{message}, over the limit of {limits.max_image_pixels}")


def _check_tile_size(image: TiffImageFile, limits: ImageLimits) -> None:
    """A TIFF is unpacked tile by tile, and a tile may be larger than the image."""
    width, height = image.tag_v2.get(322, 1), image.tag_v2.get(323, 1)
    if not isinstance(width, int) or not isinstance(height, int):
        raise ImageError("decode_error", f"a TIFF with tiles of {width!r} by {height!r}")
    _refuse_pixels(width, height, limits, "in a tile")


def _refuse_costly(data: bytes, limits: ImageLimits) -> None:
    """Refuse what would be costly already while Pillow opens it, or costs more than its pixels tell."""
    if data.startswith(b"\x00\x00\x01\x00"):
        for header in re.finditer(rb"\x89PNG\r\n\x1a\n....IHDR(.{8})", data, re.DOTALL):
            _refuse_pixels(*struct.unpack(">2I", header[1]), limits, "in an icon")
    if data.startswith(b"\xff\xd8"):
        for marker, sign, what in ((0xDA, b"", "scans"), (0xE1, b"Exif\x00\x00", "EXIF segments")):
            if data.count(sign or bytes((0xFF, marker))) > _MAX_JPEG_REPEATS:
                found = [at for kind, at in _jpeg_markers(data) if kind == marker and data.startswith(sign, at + 2)]
                if len(found) > _MAX_JPEG_REPEATS:
                    raise ImageError("too_large", f"a JPEG of {len(found)} {what}, over the limit of {_MAX_JPEG_REPEATS}")


def _jpeg_markers(data: bytes) -> Iterator[tuple[int, int]]:
    """The markers of a JPEG up to the end of its first image, and where each one's segment begins."""
    position = 2
    while found := _JPEG_MARKER.search(data, position):
        position = found.end()
        yield found[1][0], position
        if found[1] == b"\xd9":
            return
        position += int.from_bytes(data[position : position + 2], "big")


def _jpeg_stops_early(image: Image.Image, data: bytes, at_least: int | None) -> bool:
    """Whether a JPEG is cut off although Pillow decodes it.

    Zeros without an end marker before them are the rest of a file that was made at its full length and never filled.
    Otherwise, libjpeg makes what is missing grey and says nothing. A last pixel of that grey raises the suspicion; bytes
    put in before the end marker decide: a decoder that still waits for data takes them for pixels.
    """
    if _ends_in_zeros(data) and not any(kind == 0xD9 for kind, _ in _jpeg_markers(data)):
        return True
    last = image.getpixel((image.width - 1, image.height - 1))
    if any(value not in (127, 128) for value in (last if isinstance(last, tuple) else (last,))):
        return False
    end = next((at - 2 for kind, at in _jpeg_markers(data) if kind == 0xD9), len(data))
    noise = b"".join(bytes((*range(37, 250, 9), 0xFF, restart)) for restart in range(0xD0, 0xD8))
    other = Image.open(io.BytesIO(data[:end] + noise + data[end:]), formats=["JPEG"])
    if at_least:
        other.draft(None, (at_least, at_least))
    return ImageChops.difference(image.convert("RGB"), other.convert("RGB")).getbbox() is not None


def _check_png(data: bytes) -> None:
    """Pillow leaves the checksums of the pixels unread."""
    position = 8
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        end = position + 8 + length
        checksum = data[end : end + 4]
        kind = data[position + 4 : position + 8]
        if kind == b"IDAT" and len(checksum) == 4 and zlib.crc32(data[position + 4 : end]) != int.from_bytes(checksum):
            raise ImageError("truncated" if _ends_in_zeros(data) else "decode_error", f"damaged PNG data at byte {position}")
        position = end + 4


def _check_tiles(data: bytes) -> None:
    """OpenJPEG leaves black, and says nothing, the tiles of a JPEG 2000 that ends between two of them."""
    start = data.index(b"\xff\x4f\xff\x51")
    right, bottom, _, _, width, height, left, top = struct.unpack_from(">8I", data, start + 8)
    tiles = -((left - right) // width) * -((top - bottom) // height)
    if tiles > _MAX_JPEG2000_TILES:
        raise ImageError("too_large", f"a JPEG 2000 of {tiles} tiles, over the limit of {_MAX_JPEG2000_TILES}")
    seen = set()
    position = data.find(b"\xff\x90\x00\x0a", start)
    while position >= 0 and data.startswith(b"\xff\x90\x00\x0a", position):
        tile, length = struct.unpack_from(">HI", data, position + 4)
        seen.add(tile)
        position = position + length if length else len(data)
    if len(seen) < tiles:
        raise ImageError("truncated", f"a JPEG 2000 file with {len(seen)} of its {tiles} tiles")


def _lacks_palette(image: Image.Image, data: bytes) -> bool:
    """Pillow takes a PCX of 256 colours for a grey one when its palette, which comes last, is missing."""
    coloured = data[1] == 5 and data[3] == 8 and data[65] == 1
    return coloured and image.mode == "L" and data[-769:-768] != b"\x0c"


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:
        return 1
    return orientation if orientation in _TRANSPOSE else 1


def _unidentified(data: bytes) -> ImageError:
    if not data.strip(b"\0"):
        return ImageError("truncated", f"{len(data)} bytes, all zero")
    text = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    for magic, name in _UNSUPPORTED_MAGIC.items():
        if text.startswith(magic) or data.startswith(magic):
            return ImageError("unsupported_format", f"{name} files are not read")
    if text.startswith((b"<?xml", b"<!--", b"<!DOCTYPE svg")) and b"<svg" in text and b"<html" not in text:
        return ImageError("unsupported_format", "SVG files are not read")
    if data[4:8] == b"ftyp" and data[8:12] in _BRANDS:
        return ImageError("unsupported_format", f"{_BRANDS[data[8:12]]} files are not read")
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis"):
        return _decoding_error(SyntaxError("not a valid AVIF file"), data)
    if data.startswith(b"RIFF") and not b"WEBP".startswith(data[8:12]):
        return ImageError("not_an_image", f"not an image: RIFF of kind {data[8:12]!r}")
    for magic, name in _MAGIC.items():
        if data.startswith(magic) and name in Image.OPEN:
            try:
                Image.OPEN[name][0](io.BytesIO(data), "")
            except Exception as error:
                return _decoding_error(error.__cause__ or error, data)
    if len(data) < _HEADER_BYTES and (begins_like_image(data) or any(magic.startswith(data) for magic in _MAGIC)):
        return ImageError("truncated", f"{len(data)} bytes, as an image begins")
    return ImageError("not_an_image", f"not an image: begins with {data[:8]!r}")


def _decoding_error(error: BaseException, data: bytes) -> ImageError:
    message = f"{type(error).__name__}: {error}"
    text = message.lower()
    if isinstance(error, Image.DecompressionBombError):
        return ImageError("too_large", message)
    ran_out = isinstance(error, (EOFError, IndexError, struct.error)) or any(sign in text for sign in _TRUNCATED)
    if ran_out or _ends_early(data) or _ends_in_zeros(data):
        return ImageError("truncated", f"{message} ({len(data)} bytes)")
    if any(sign in text for sign in _UNSUPPORTED):
        return ImageError("unsupported_format", message)
    return ImageError("decode_error", message)


def _ends_in_zeros(data: bytes) -> bool:
    """Whether the end may be of a file that was made at its full length and never filled."""
    return data.endswith(bytes(16))


def _ends_early(data: bytes) -> bool:
    """Whether a file that could not be decoded is shorter than it says itself."""
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xda" not in data
    if data.startswith(b"RIFF"):
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if data.startswith((b"II*\x00", b"MM\x00*")):
        order = "little" if data.startswith(b"II") else "big"
        directory = int.from_bytes(data[4:8], order)
        return len(data) < directory + 2 + 12 * int.from_bytes(data[directory : directory + 2], order)
    if data[4:8] in (b"ftyp", b"jP  "):
        position, length = 0, 8
        while length >= 8 and position + 8 <= len(data):
            length = int.from_bytes(data[position : position + 4], "big")
            position += length
        return position != len(data) and length >= 8
    return False


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        tags = getattr(image, "tag_v2", {})
        values = np.asarray(image)
        if tags.get(258) == (12,):
            values = values << 4
        pixels = _to_8_bits(values)
        if tags.get(262) == 0:
            pixels = 255 - pixels
        if isinstance(image.info.get("transparency"), int):
            pixels[values == image.info["transparency"]] = 255
        return Image.fromarray(pixels).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Integers are on a scale of 16 bits; floats on one of 0 to 1 where they fit it, else of 8 bits."""
    if values.dtype.kind == "f":
        scale = 255.0 if values.max(where=np.isfinite(values), initial=0) <= 1 else 1.0
        return np.multiply(np.clip(np.nan_to_num(values), 0, 255 / scale), scale).astype(np.uint8)
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
    mean_3, std_3 = statistics_of(preprocessing, pixels_BHW3.device)
    return pixels_BHW3.float().sub_(mean_3).div_(std_3).permute(0, 3, 1, 2)


def statistics_of(preprocessing: Preprocessing, device) -> tuple:
    """Mean and standard deviation of the channels (3,) by which ``normalise`` goes, for pixels from 0 to 255."""
    return _channels(preprocessing.mean, device), _channels(preprocessing.std, device)


@lru_cache
def _channels(values: tuple[float, ...], device):
    """``values`` of the channels as a tensor on ``device``, for pixels from 0 to 255. It is kept there: a copy from the host
    would wait for the device."""
    import torch

    with torch.inference_mode(False):
        return torch.tensor(values, device=device) * 255
