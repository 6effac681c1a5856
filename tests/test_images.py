"""From bytes to pixels, one case of each; ``test_image_zoo`` holds the many formats and broken files."""

import io
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image

from capray.config import ImageLimits, Preprocessing
from capray.images import FORMATS, ImageError, begins_like_image, decode, ends_like_image, fit, input_size, load, normalise
from tests.conftest import image_bytes

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def rgb(data, **limits):
    return np.asarray(decode(data, ImageLimits(**limits)).image)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LA", "RGBA", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(mode):
    grey = np.linspace(0, 255, 30 * 40, dtype=np.float32).reshape(30, 40)
    if mode == "I;16":
        image = Image.fromarray((grey * 257).astype(np.uint16))
    elif mode == "I":
        image = Image.fromarray((grey * 257).astype(np.int32))
    elif mode == "F":
        image = Image.fromarray(grey)
    elif mode == "P":
        image = Image.fromarray(grey.astype(np.uint8)).convert("P")
    else:
        image = Image.fromarray(grey.astype(np.uint8)).convert("RGB").convert(mode)
    pixels = rgb(image_bytes(image, "JPEG" if mode in ("CMYK", "YCbCr") else "TIFF", quality=95))
    assert pixels.shape == (30, 40, 3)
    if mode != "1":
        assert np.abs(pixels.astype(int).mean(-1) - grey).mean() < 4


def test_transparency_lies_over_white():
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    image.putpixel((0, 0), (200, 0, 0, 255))
    pixels = rgb(image_bytes(image))
    assert pixels[0, 0].tolist() == [200, 0, 0]
    assert pixels[3, 3].tolist() == [255, 255, 255]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert rgb(image_bytes(palette, transparency=1))[0, 0].tolist() == [255, 255, 255]


def kind_of(data, **limits):
    with pytest.raises(ImageError) as caught:
        decode(data, ImageLimits(**limits))
    return caught.value.kind


def test_what_is_empty_or_over_a_limit():
    jpeg = image_bytes(PHOTO, "JPEG")
    assert kind_of(b"") == "truncated"
    assert kind_of(jpeg, max_image_bytes=100) == "too_large"
    assert kind_of(jpeg, max_image_pixels=1199) == "too_large"


def test_a_large_jpeg_decoded_reduced_is_close_to_the_whole():
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).resize((1200, 800))
    preprocessing = Preprocessing(size=64)
    data = image_bytes(smooth, "JPEG", quality=95)
    reduced, width, height = load(data, preprocessing)
    whole = fit(decode(data).image, preprocessing)
    assert (width, height) == (1200, 800)
    assert np.abs(reduced.astype(int) - whole.astype(int)).mean() < 3


class TestFit:
    def test_squash(self):
        assert fit(PHOTO, Preprocessing(size=64)).shape == (64, 64, 3)

    def test_crop_takes_the_centre(self):
        wide = Image.new("RGB", (90, 30), (255, 0, 0))
        wide.paste((0, 255, 0), (30, 0, 60, 30))
        pixels = fit(wide, Preprocessing(size=32, resize="crop", interpolation="nearest"))
        assert (pixels == [0, 255, 0]).all()

    def test_pad_keeps_the_whole(self):
        wide = Image.new("RGB", (64, 32), (255, 0, 0))
        pixels = fit(wide, Preprocessing(size=64, resize="pad"))
        assert pixels.shape == (64, 64, 3)
        assert (pixels[16:48] == [255, 0, 0]).all()
        assert (pixels[:16] == [124, 116, 104]).all()

    def test_keep_aspect(self):
        preprocessing = Preprocessing(size=64, resize="keep-aspect")
        assert fit(PHOTO, preprocessing).shape == (64, 85, 3)
        assert input_size(10_000, 1, preprocessing) == (256, 64)


def test_normalise():
    pixels = torch.full((1, 2, 2, 3), 255, dtype=torch.uint8)
    preprocessing = Preprocessing(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    images = normalise(pixels, preprocessing)
    assert images.shape == (1, 3, 2, 2)
    torch.testing.assert_close(images[0, :, 0, 0], torch.tensor([1.0, 3.0, 0.5]))


@pytest.mark.parametrize("name", sorted({*FORMATS} - {"TGA"}))
def test_each_format_is_known_by_its_beginning(name):
    for mode in ("RGB", "L", "1", "P", "RGBA"):
        file = io.BytesIO()
        with suppress(OSError, ValueError):
            PHOTO.convert(mode).save(file, name)
            assert begins_like_image(file.getvalue()[:64]), mode


@pytest.mark.parametrize(
    "text", [b"", b"BMW parked", b"P5 Piccadilly", b"Pyramid", b"II.", b"\nA dog", b"RIFF0000WAVE", b"\x93NUMPY", b"GIF"]
)
def test_what_begins_with_the_letters_of_a_format_is_no_image(text):
    assert not begins_like_image(text)


@pytest.mark.parametrize(
    ("name", "is_like_one"),
    [("a.jpg", True), ("s3://b/A.AVIF", True), ("a.heic", True), ("jpg", False), ("out/png", False), ("a.jpg.txt", False)],
)
def test_a_name_that_ends_like_an_images(name, is_like_one):
    assert ends_like_image(name) == is_like_one
