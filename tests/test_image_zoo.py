"""Any bytes whatever give the right picture or an ``ImageError``: formats, cuts, damage, bombs and odd files."""

import pickle
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from capray.config import ImageLimits, Preprocessing
from capray.images import Decoded, ImageError, decode, fit, load
from tests.conftest import image_bytes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

KINDS = {"too_large", "not_an_image", "truncated", "unsupported_format", "decode_error"}
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((64, 48))
GREY = PHOTO.convert("L")
TURNS = [None, *(Image.Transpose(turn) for turn in (0, 3, 1, 5, 4, 6, 2))]
"""What makes the upright picture of one stored with EXIF orientation 1 … 8."""


def frames(image_format: str, **options) -> bytes:
    others = [PHOTO.rotate(180), ImageOps.invert(PHOTO)]
    return image_bytes(PHOTO.copy(), image_format, save_all=True, append_images=others, **options)


FILES = {
    "jpeg": image_bytes(PHOTO, "JPEG", quality=95),
    "jpeg-progressive": image_bytes(PHOTO, "JPEG", quality=95, progressive=True),
    "jpeg-restarts": image_bytes(PHOTO, "JPEG", quality=95, restart_marker_blocks=3),
    "jpeg-cmyk": image_bytes(PHOTO.convert("CMYK"), "JPEG", quality=95),
    "mpo": frames("MPO", quality=95),
    "png": image_bytes(PHOTO, "PNG"),
    "png-animated": frames("PNG"),
    "png-palette": image_bytes(PHOTO.quantize(), "PNG"),
    "gif": image_bytes(PHOTO, "GIF"),
    "gif-animated": frames("GIF"),
    "bmp": image_bytes(PHOTO, "BMP"),
    "dib": image_bytes(PHOTO, "DIB"),
    "webp": image_bytes(PHOTO, "WEBP", quality=95),
    "webp-lossless": image_bytes(PHOTO, "WEBP", lossless=True),
    "webp-animated": frames("WEBP", lossless=True),
    "tiff": image_bytes(PHOTO, "TIFF"),
    "tiff-big": image_bytes(PHOTO, "TIFF", big_tiff=True),
    "tiff-pages": frames("TIFF"),
    "tiff-lzw": image_bytes(PHOTO, "TIFF", compression="tiff_lzw"),
    "tiff-deflate": image_bytes(PHOTO, "TIFF", compression="tiff_adobe_deflate"),
    "tiff-packbits": image_bytes(PHOTO, "TIFF", compression="packbits"),
    "tiff-jpeg": image_bytes(PHOTO, "TIFF", compression="jpeg", quality=95),
    "tiff-cmyk": image_bytes(PHOTO.convert("CMYK"), "TIFF"),
    "ppm": image_bytes(PHOTO, "PPM"),
    "avif": image_bytes(PHOTO, "AVIF", quality=95),
    "avif-animated": frames("AVIF", quality=95),
    "jpeg2000": image_bytes(PHOTO, "JPEG2000"),
    "jpeg2000-codestream": image_bytes(PHOTO, "JPEG2000", no_jp2=True),
    "jpeg2000-tiles": image_bytes(PHOTO, "JPEG2000", tile_size=(16, 16)),
    "ico": image_bytes(PHOTO, "ICO", sizes=[PHOTO.size]),
    "ico-bitmap": image_bytes(PHOTO, "ICO", sizes=[PHOTO.size], bitmap_format="bmp"),
    "tga": image_bytes(PHOTO, "TGA"),
    "tga-rle": image_bytes(PHOTO, "TGA", compression="tga_rle"),
    "pcx": image_bytes(PHOTO, "PCX"),
    "pcx-palette": image_bytes(PHOTO.quantize(), "PCX"),
    "sgi": image_bytes(PHOTO, "SGI"),
    "sgi-16-bits": image_bytes(PHOTO, "SGI", bpc=2),
}


def rgb(data: bytes, at_least: int | None = None) -> np.ndarray:
    return np.asarray(decode(data, at_least=at_least).image)


def distance(pixels: np.ndarray, expected: Image.Image | np.ndarray) -> float:
    expected = np.asarray(expected)
    assert pixels.shape == expected.shape
    return np.abs(pixels.astype(int) - expected.astype(int)).mean()


def outcome(data: bytes, **options) -> Decoded | ImageError:
    """An image that can be used, or an error of a right kind; whatever else fails the test."""
    try:
        decoded = decode(data, **options)
    except ImageError as error:
        failure = error
    else:
        assert decoded.image.mode == "RGB"
        assert decoded.image.size == (decoded.width, decoded.height)
        fit(decoded.image, Preprocessing(size=32, resize="keep-aspect"))
        return decoded
    assert failure.kind in KINDS
    return failure


def kind_of(data: bytes, limits: ImageLimits | None = None) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, limits)
    return caught.value.kind


def segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def png(width: int, height: int, *chunks: bytes, bits: int = 8, colour: int = 0) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def tiff(pixels: bytes, **changes: int) -> bytes:
    """A grey TIFF of 8 x 2 pixels in one strip or tile, tags changed or added by ``t<number>``."""
    tags = {256: 8, 257: 2, 258: 8, 259: 1, 262: 1, 277: 1} | {int(tag[1:]): value for tag, value in changes.items()}
    offset, length = (324, 325) if 322 in tags else (273, 279)
    tags |= {offset: 8 + 2 + 12 * (len(tags) + 2) + 4, length: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + pixels


def patched(data: bytes, at: int, values: bytes) -> bytes:
    return data[:at] + values + data[at + len(values) :]


class TestFormats:
    @pytest.mark.parametrize("name", FILES)
    def test_each_gives_the_picture_or_its_first_frame(self, name):
        limit = 12 if name.startswith(("gif", "png-palette", "pcx-palette")) else 3
        assert distance(rgb(FILES[name]), PHOTO) < limit

    @pytest.mark.parametrize("name", FILES)
    def test_a_cut_file_gives_the_whole_picture_or_an_error(self, name):
        data = FILES[name]
        whole = rgb(data)
        cuts = {len(data) * tenths // 10 for tenths in range(1, 10)} | {len(data) - last for last in (1, 2, 9, 30, 800)}
        cuts |= {*range(18, 128, 5)} if len(data) > 128 else set()  # A TGA has 18 bytes of header, and no sign.
        for cut in cuts:
            found = outcome(data[:cut])
            if isinstance(found, Decoded):
                assert np.array_equal(np.asarray(found.image), whole), f"cut to {cut} of {len(data)} bytes"
            else:
                assert found.kind in ("truncated", "decode_error") and not found.certain, cut

    @pytest.mark.parametrize("name", ["jpeg", "png", "webp", "avif", "jpeg2000", "gif", "tiff", "bmp", "ico"])
    def test_half_a_file_is_called_truncated(self, name):
        assert kind_of(FILES[name][: len(FILES[name]) // 2]) == "truncated"

    @pytest.mark.parametrize("beginning", [b"\xff\xd8", b"\x89PN", b"GIF", b"RI", b"II*", b"\xff\x4f", b"\x0a\x05\x01\x08"])
    def test_a_first_few_bytes_are_too(self, beginning):
        assert kind_of(beginning) == "truncated"

    def test_a_jpeg2000_cut_between_two_tiles_is_truncated(self):
        data = image_bytes(PHOTO, "JPEG2000", tile_size=(16, 16), no_jp2=True)
        starts = [at for at in range(len(data)) if data.startswith(b"\xff\x90\x00\x0a", at)]
        assert len(starts) == 12
        assert {kind_of(data[:start]) for start in starts} == {"truncated"}

    @pytest.mark.parametrize(
        ("image_format", "mode", "name"),
        [
            ("BLP", "P", "BLP"),
            ("DDS", "RGB", "DDS"),
            ("EPS", "RGB", "PostScript"),
            ("ICNS", "RGB", "ICNS"),
            ("IM", "RGB", "IM"),
            ("MSP", "1", "MSP"),
            ("PDF", "RGB", "PDF"),
            ("QOI", "RGB", "QOI"),
        ],
    )
    def test_what_is_not_read_is_named(self, image_format, mode, name):
        found = outcome(image_bytes(PHOTO.convert(mode), image_format))
        assert isinstance(found, ImageError)
        assert (found.kind, found.message) == ("unsupported_format", f"{name} files are not read")

    @pytest.mark.parametrize(("image_format", "mode"), [("PALM", "P"), ("SPIDER", "F"), ("XBM", "1")])
    def test_what_has_no_signature_is_no_image(self, image_format, mode):
        assert kind_of(image_bytes(PHOTO.convert(mode), image_format)) == "not_an_image"


NO_IMAGES = {
    b"\x00": "truncated",
    b"\xff": "truncated",
    b"\x00" * 100: "truncated",
    b"\n\n\n": "not_an_image",
    b"BMW is a make of car, and this is a text about it": "not_an_image",
    b"<!DOCTYPE html><html><body><svg></svg>404 Not Found</body></html>": "not_an_image",
    b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>": "not_an_image",
    b'{"error": "no such key"}': "not_an_image",
    b"PK\x03\x04" + bytes(30): "not_an_image",
    b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00isomiso2avc1mp41" + bytes(30): "not_an_image",
    b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(20): "not_an_image",
    b"\x00\x00\x01\xba" + bytes(8) + b"\x04\x00\x04\x00\x08\x00" + bytes(60): "not_an_image",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>": "unsupported_format: SVG",
    b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- drawn --><svg/>": "unsupported_format: SVG",
    b"%PDF-1.7\n": "unsupported_format: PDF",
    b"8BPS\x00\x01" + bytes(30): "unsupported_format: Photoshop",
    b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(40): "unsupported_format: HEIC",
    b"\x00\x00\x00\x0cJXL \r\n\x87\n" + bytes(20): "unsupported_format: JPEG XL",
    b"\xff\x0a" + bytes(20): "unsupported_format: JPEG XL",
    b"GIF89a": "truncated",
    b"RIFF\x24\x00\x00\x00WE": "truncated",
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR\x00\x00": "truncated",
    b"\xff\xd8\xff\xe0\x00\x10JFIF": "truncated",
}


@pytest.mark.parametrize("data", NO_IMAGES, ids=lambda data: repr(data[:24]))
def test_what_is_no_image_is_refused_by_kind(data):
    found = outcome(data)
    assert isinstance(found, ImageError)
    assert f"{found.kind}: {found.message}".startswith(NO_IMAGES[data])


@settings(derandomize=True, deadline=None, max_examples=300, database=None)
@given(st.binary(max_size=300), st.sampled_from([b"", *(data[:12] for data in FILES.values())]))
def test_random_bytes_are_an_image_or_an_error(tail, head):
    outcome(head + tail)


@settings(derandomize=True, deadline=None, max_examples=700, database=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(list(FILES)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.booleans(), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_a_damaged_image_is_an_image_or_an_error(name, changes):
    data = bytearray(FILES[name])
    for place, in_header, value in changes:
        data[int(place * (min(len(data), 150) if in_header else len(data)))] = value
    outcome(bytes(data), limits=ImageLimits(max_image_pixels=1_000_000))


def test_every_damaged_byte_of_a_png_is_noticed():
    whole = rgb(FILES["png"])
    for at in range(len(FILES["png"])):
        found = outcome(patched(FILES["png"], at, bytes([FILES["png"][at] ^ 8])))
        assert isinstance(found, ImageError) or np.array_equal(np.asarray(found.image), whole), f"byte {at}"


ZEROS = zlib.compress(bytes(200_000_000), 9)
JPEG_2000 = FILES["jpeg2000-codestream"]
BOMBS = {
    "png": png(30_000, 30_000, chunk(b"IDAT", ZEROS)),
    "png-text": png(8, 8, chunk(b"zTXt", b"a\0\0" + ZEROS), chunk(b"IDAT", zlib.compress(bytes(72)))),
    "png-profile": png(8, 8, chunk(b"iCCP", b"a\0\0" + ZEROS), chunk(b"IDAT", zlib.compress(bytes(72)))),
    "gif": patched(FILES["gif"], 6, struct.pack("<HH", 60_000, 60_000)),
    "bmp": patched(FILES["bmp"], 18, struct.pack("<ii", 50_000, 50_000)),
    "webp": patched(FILES["webp-lossless"], 21, struct.pack("<I", 0x0FFFFFFF)),
    "tiff": tiff(ZEROS, t256=30_000, t257=30_000, t259=8),
    "tiff-tile": tiff(ZEROS, t259=8, t322=20_000, t323=10_000),
    "ppm": b"P6 30000 30000 255 " + bytes(100),
    "jpeg": FILES["jpeg"].replace(struct.pack(">BHH", 8, 48, 64), struct.pack(">BHH", 8, 60_000, 60_000)),
    "jpeg2000": patched(JPEG_2000, 8, struct.pack(">2I", 60_000, 60_000)),
    "jpeg2000-tiles": patched(JPEG_2000, 8, struct.pack(">8I", 255, 255, 0, 0, 1, 1, 0, 0)),
    "avif": FILES["avif"].replace(b"ispe" + struct.pack(">3I", 0, 64, 48), b"ispe" + struct.pack(">3I", 0, 16_000, 16_000)),
    "ico": struct.pack("<3H4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, 900, 22)
    + png(11_000, 11_000, chunk(b"IDAT", zlib.compress(bytes(11_001 * 11_000), 9))),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused(name):
    assert kind_of(BOMBS[name]) == ("decode_error" if name in ("png-text", "png-profile") else "too_large")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_bombs_take_no_memory():
    script = """
import pickle, sys
from capray.images import ImageError, decode
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
bombs = pickle.load(sys.stdin.buffer)
before = peak()
for bomb in bombs:
    try:
        decode(bomb)
    except ImageError:
        pass
print(peak() - before)
"""
    bombs = pickle.dumps(list(BOMBS.values()))
    done = subprocess.run([sys.executable, "-c", script], input=bombs, capture_output=True, check=True)
    assert int(done.stdout) < 60_000


def test_a_jpeg_of_a_thousand_scans_is_refused():
    data = FILES["jpeg-progressive"]
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert kind_of(data[:-2] + 1000 * scan + data[-2:]) == "too_large"
    hidden = segment(0xE2, 300 * b"\xff\xda")
    assert np.array_equal(rgb(data[:2] + hidden + data[2:] + 300 * b"\xff\xda"), rgb(data))


def test_a_jpeg_of_a_thousand_exif_segments_is_refused():
    data = FILES["jpeg"]
    assert kind_of(data[:2] + 1000 * segment(0xE1, b"Exif\0\0more") + data[2:]) == "too_large"


class TestModes:
    def test_grey_of_16_bits(self):
        values = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
        expected = np.repeat((values >> 8)[..., None], 3, 2)
        image = Image.fromarray(values)
        for image_format in ("PNG", "TIFF", "JPEG2000", "PPM"):
            assert distance(rgb(image_bytes(image, image_format)), expected) < 1

    def test_colour_of_16_bits(self):
        row = b"\0" + b"\xff\xff\x80\x00\x10\x00" * 4
        data = png(4, 1, chunk(b"IDAT", zlib.compress(row)), bits=16, colour=2)
        assert distance(rgb(data), np.full((1, 4, 3), [255, 128, 16])) < 2

    def test_transparent_grey_of_16_bits_lies_over_white(self):
        row = b"\0" + struct.pack(">2H", 1000, 30_000)
        data = png(2, 1, chunk(b"tRNS", struct.pack(">H", 1000)), chunk(b"IDAT", zlib.compress(row)), bits=16)
        assert rgb(data)[0, :, 0].tolist() == [255, 30_000 >> 8]

    def test_tiff_of_12_bits(self):
        assert rgb(tiff(b"\xff\xf0\x00" * 8, t258=12))[0, :2, 0].tolist() == [255, 0]

    @pytest.mark.parametrize("bits", [1, 8, 16])
    def test_tiff_where_zero_is_white(self, bits):
        pixels = rgb(tiff(bytes(2 * bits), t258=bits, t262=0))
        assert pixels.shape == (2, 8, 3)
        assert (pixels == 255).all()

    @pytest.mark.parametrize("scale", [1, 255])
    def test_floats(self, scale):
        values = np.linspace(0, scale, 48 * 64, dtype=np.float32).reshape(48, 64)
        values[0, :2] = np.nan, np.inf
        pixels = rgb(image_bytes(Image.fromarray(values), "TIFF"))[..., 0]
        assert pixels[0, :2].tolist() == [0, 255]
        assert np.abs(pixels - values * 255 / scale).ravel()[2:].max() <= 1

    def test_black_and_white(self):
        image = PHOTO.convert("1")
        for image_format in ("PNG", "TIFF", "BMP", "PPM", "PCX"):
            assert np.array_equal(rgb(image_bytes(image, image_format)), np.asarray(image.convert("RGB")))
        assert np.array_equal(rgb(image_bytes(image, "TIFF", compression="group4")), np.asarray(image.convert("RGB")))

    @pytest.mark.parametrize(
        ("image_format", "mode"),
        [(name, mode) for name in ("PNG", "TIFF", "TGA", "WEBP") for mode in ("LA", "RGBA")] + [("ICO", "RGBA")],
    )
    def test_alpha_lies_over_white(self, image_format, mode):
        alpha = Image.linear_gradient("L").resize(PHOTO.size)
        image = PHOTO.convert(mode)
        image.putalpha(alpha)
        over_white = Image.composite(image.convert("RGB"), Image.new("RGB", PHOTO.size, "white"), alpha)
        options = {"lossless": True} if image_format == "WEBP" else {}
        options |= {"sizes": [PHOTO.size]} if image_format == "ICO" else {}
        assert distance(rgb(image_bytes(image, image_format, **options)), over_white) < 2

    @pytest.mark.parametrize(("image_format", "transparency"), [("PNG", 1), ("GIF", 1), ("PNG", b"\xff\x00")])
    def test_transparent_palette_entries_are_white(self, image_format, transparency):
        image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "L").convert("P")
        image.putpalette([10, 20, 30, 40, 50, 60])
        pixels = rgb(image_bytes(image, image_format, transparency=transparency))
        assert pixels[0].tolist() == [[10, 20, 30], [255, 255, 255]]

    def test_lab(self):
        spaces = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        found = outcome(image_bytes(ImageCms.profileToProfile(PHOTO, *spaces, outputMode="LAB"), "TIFF"))
        if isinstance(found, Decoded):
            assert distance(np.asarray(found.image), PHOTO) < 3
        else:
            assert found.kind == "unsupported_format"


class TestJpeg:
    def test_cmyk_without_adobe_marker(self):
        data = FILES["jpeg-cmyk"]
        at = data.index(b"\xff\xee")
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        assert b"Adobe" in data[at:end]
        assert distance(rgb(data[:at] + data[end:]), PHOTO) < 3

    def test_ycck(self):
        bands = [band.point(lambda value: 255 - value) for band in ImageOps.invert(PHOTO).convert("YCbCr").split()]
        stored = Image.merge("CMYK", [*bands, Image.new("L", PHOTO.size)])
        data = image_bytes(stored, "JPEG", quality=95, subsampling=0)
        assert distance(rgb(patched(data, data.index(b"Adobe") + 11, b"\x02")), PHOTO) < 3

    @pytest.mark.parametrize(
        ("mode", "options"),
        [("RGB", {}), ("L", {}), ("CMYK", {}), ("RGB", {"progressive": True}), ("RGB", {"restart_marker_rows": 2})],
    )
    @pytest.mark.parametrize("at_least", [None, 60])
    def test_an_end_marker_does_not_make_half_a_jpeg_whole(self, mode, options, at_least):
        data = image_bytes(PHOTO.convert(mode).resize((320, 240)), "JPEG", **options)
        start = data.index(b"\xff\xda") + 14
        end = data.index(b"\xff\xc4", start) if "progressive" in options else len(data)
        for tenths in range(1, 9):
            cut = data[: start + (end - start) * tenths // 10] + b"\xff\xd9"
            with pytest.raises(ImageError, match="truncated"):
                decode(cut, at_least=at_least)

    @pytest.mark.parametrize("colour", [(128, 128, 128), (127, 127, 127)])
    @pytest.mark.parametrize("progressive", [False, True])
    def test_a_grey_picture_is_whole(self, colour, progressive):
        image = Image.new("RGB", (40, 40), colour)
        pixels = rgb(image_bytes(image, "JPEG", progressive=progressive, restart_marker_blocks=2))
        assert np.array_equal(pixels, np.asarray(image))

    def test_zeros_in_place_of_the_rest_are_noticed(self):
        for data in (FILES["jpeg"], image_bytes(PHOTO.resize((320, 240)), "JPEG", quality=95)):
            for tenths in range(1, 10):
                at = len(data) * tenths // 10
                assert kind_of(data[:at] + bytes(len(data) - at)) in ("truncated", "not_an_image")
            assert np.array_equal(rgb(data + bytes(100)), rgb(data)), "padding behind the end"

    def test_without_its_end_marker(self):
        assert kind_of(FILES["jpeg"][:-2]) == "truncated"

    def test_zeros_in_place_of_the_rest_of_a_png(self):
        data = image_bytes(PHOTO, "PNG")
        for tenths in range(1, 10):
            at = len(data) * tenths // 10
            assert kind_of(data[:at] + bytes(len(data) - at)) == "truncated"

    def test_bytes_after_the_end(self):
        assert np.array_equal(rgb(FILES["jpeg"] + b"\r\n<html>" + bytes(100)), rgb(FILES["jpeg"]))

    def test_bytes_before_the_start(self):
        assert kind_of(b"\r\n" + FILES["jpeg"]) == "not_an_image"

    def test_an_embedded_thumbnail_is_not_the_picture(self):
        thumbnail = image_bytes(Image.new("RGB", (16, 16), "blue"), "JPEG")
        data = FILES["jpeg"]
        assert np.array_equal(rgb(data[:2] + segment(0xE1, b"Exif\0\0" + thumbnail) + data[2:]), rgb(data))

    @pytest.mark.parametrize("start_of_frame", [0xC3, 0xC5, 0xC7])
    def test_lossless_and_hierarchical(self, start_of_frame):
        assert kind_of(FILES["jpeg"].replace(b"\xff\xc0", bytes((0xFF, start_of_frame)), 1)) in KINDS

    def test_12_bits(self):
        data = FILES["jpeg"]
        at = data.index(b"\xff\xc0")
        assert kind_of(patched(data, at, b"\xff\xc1\x00\x11\x0c")) == "unsupported_format"

    def test_no_height(self):
        data = FILES["jpeg"]
        assert kind_of(patched(data, data.index(b"\xff\xc0") + 5, bytes(2))) in KINDS

    @pytest.mark.parametrize("profile", [b"", b"no profile", bytes(200)])
    def test_a_broken_profile_does_not_lose_the_picture(self, profile):
        data = FILES["jpeg"]
        broken = segment(0xE2, b"ICC_PROFILE\0\x01\x02" + profile)
        assert np.array_equal(rgb(data[:2] + broken + data[2:]), rgb(data))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


class TestOrientation:
    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize(
        ("image_format", "options"),
        [
            ("JPEG", {"quality": 95}),
            ("MPO", {"quality": 95}),
            ("PNG", {}),
            ("WEBP", {"lossless": True}),
            ("AVIF", {"quality": 95}),
            ("TIFF", {}),
            ("TIFF", {"compression": "tiff_lzw"}),
        ],
    )
    def test_pixels_and_size_are_upright(self, image_format, options, orientation):
        turn = TURNS[orientation - 1]
        upright = PHOTO if turn is None else PHOTO.transpose(turn)
        decoded = decode(image_bytes(PHOTO, image_format, exif=exif(orientation), **options))
        assert (decoded.width, decoded.height) == upright.size
        assert distance(np.asarray(decoded.image), upright) < 4

    @pytest.mark.parametrize("orientation", [1, 3, 6, 8])
    @pytest.mark.parametrize("progressive", [False, True])
    def test_a_reduced_jpeg_is_upright(self, orientation, progressive):
        large = PHOTO.resize((1280, 960))
        data = image_bytes(large, "JPEG", quality=95, exif=exif(orientation), progressive=progressive)
        turn = TURNS[orientation - 1]
        preprocessing = Preprocessing(size=32, resize="keep-aspect")
        pixels, width, height = load(data, preprocessing)
        upright = large if turn is None else large.transpose(turn)
        assert (width, height) == upright.size
        assert max(decode(data, at_least=64).image.size) < 200
        assert distance(pixels, fit(upright, preprocessing)) < 4

    @pytest.mark.parametrize("orientation", [0, 9, 65_535])
    def test_an_unknown_one_is_ignored(self, orientation):
        assert np.array_equal(rgb(image_bytes(PHOTO, exif=exif(orientation))), np.asarray(PHOTO))

    @pytest.mark.parametrize(
        "block",
        [
            b"Exif\0\0",
            b"Exif\0\0garbage",
            b"no block at all",
            b"Exif\0\0II*\0\xff\xff\xff\xff",
            b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03\0\0\0\x01\0",
            b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x05\0\0\0\x1a\0\0\0\0\0\0\0abcde",
            b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x05\0\x01\0\0\0\x1a\0\0\0\0\0\0\0" + bytes(8),
        ],
    )
    @pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
    def test_a_corrupt_block_does_not_lose_the_picture(self, image_format, block):
        assert np.array_equal(rgb(image_bytes(PHOTO, image_format, exif=block)), rgb(image_bytes(PHOTO, image_format)))


@pytest.mark.parametrize("resize", ["squash", "crop", "pad", "keep-aspect"])
@pytest.mark.parametrize("size", [(10_000, 1), (1, 10_000), (1, 1), (3, 2)])
@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_extreme_shapes_fit(image_format, size, resize):
    preprocessing = Preprocessing(size=32, resize=resize)
    data = image_bytes(Image.new("RGB", size, (200, 30, 30)), image_format)
    pixels, width, height = load(data, preprocessing)
    assert (width, height) == size
    if resize == "keep-aspect":
        assert min(pixels.shape[:2]) == 32 and max(pixels.shape[:2]) <= 128
    else:
        assert pixels.shape == (32, 32, 3)
    assert (np.abs(pixels.astype(int) - [200, 30, 30]).max(-1) < 6).any()


@pytest.mark.parametrize("image_format", ["BMP", "PPM", "TIFF"])
def test_a_hundred_megabytes_want_a_raised_limit(image_format):
    data = image_bytes(Image.new("RGB", (6000, 5600), (9, 99, 199)), image_format)
    assert len(data) > 100_000_000
    assert kind_of(data) == "too_large"
    pixels, width, height = load(data, Preprocessing(size=32), ImageLimits(max_image_bytes=len(data)))
    assert (width, height) == (6000, 5600)
    assert (pixels == [9, 99, 199]).all()


def test_decoding_in_threads_leaves_the_warnings_of_others_alone():
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, 50 * [FILES["avif"]]))
    assert warnings.filters == before
