"""Chance changes training images, and their words stay true."""

import subprocess
import sys

import numpy as np
import pytest

from capray.config import Augmentation
from capray.training.augmentation import augment

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
SIDED = [["a", "dog", "left", "of", "a", "cat"], ["the", "right-hand", "cat"]]
PLAIN = [["a", "dog"]]


def test_nothing_is_changed_unless_asked():
    assert not Augmentation().augments
    pixels, words = augment(PIXELS, SIDED, Augmentation(), "0")
    assert np.array_equal(pixels, PIXELS) and words == SIDED


def test_mirroring_needs_no_torch():
    """Each process that reads images would take seconds to load it."""
    program = (
        "import sys, numpy\n"
        "from capray.config import Augmentation\n"
        "from capray.training.augmentation import augment\n"
        "augment(numpy.zeros((2, 2, 3), numpy.uint8), [['a']], Augmentation(flip=1), '0')\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_mirroring():
    pixels, words = augment(PIXELS, PLAIN, Augmentation(flip=1), "0")
    assert np.array_equal(pixels, PIXELS[:, ::-1]) and words == PLAIN


def test_images_whose_captions_name_sides_are_kept():
    pixels, words = augment(PIXELS, SIDED, Augmentation(flip=1), "0")
    assert np.array_equal(pixels, PIXELS) and words == SIDED


def test_or_their_words_are_swapped_with_the_image():
    settings = Augmentation(flip=1, flip_left_right_words="swap-words")
    pixels, words = augment(PIXELS, SIDED, settings, "0")
    assert np.array_equal(pixels, PIXELS[:, ::-1])
    assert words == [["a", "dog", "right", "of", "a", "cat"], ["the", "left-hand", "cat"]]


def test_some_images_are_mirrored_and_some_not():
    mirrored = [not np.array_equal(augment(PIXELS, PLAIN, Augmentation(flip=0.3), str(i))[0], PIXELS) for i in range(200)]
    assert 0.2 < np.mean(mirrored) < 0.4


@pytest.mark.parametrize("settings", [{"min_crop_area": 0.3}, {"color_jitter": 0.4}], ids=str)
def test_the_seed_decides_and_the_shape_stays(settings):
    first, again, other = (augment(PIXELS, PLAIN, Augmentation(**settings), seed)[0] for seed in ("1", "1", "2"))
    assert first.shape == PIXELS.shape and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other) and not np.array_equal(first, PIXELS)


def test_a_crop_keeps_at_least_its_share():
    """Of an image whose value is its column, a crop of the share s spans at least s of the columns, to rounding."""
    columns = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 64, 3))
    for seed in range(50):
        cropped = augment(columns, PLAIN, Augmentation(min_crop_area=0.5), str(seed))[0]
        assert int(cropped.max()) - int(cropped.min()) >= 0.5 * 252 - 8
