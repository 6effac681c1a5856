"""Chance for training images, at the encoder's input size: mirrored, cropped and coloured otherwise, and the words for
what is left and right kept true. Knows nothing of Ray; the caller seeds it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from capray.config import Augmentation

_LEFT_AND_RIGHT = [("left", "right"), ("lefts", "rights"), ("leftmost", "rightmost"), ("leftward", "rightward")]
_LEFT_AND_RIGHT += [(f"left-{end}", f"right-{end}") for end in ("hand", "handed", "hander", "side", "most", "facing")]
OPPOSITES = dict(_LEFT_AND_RIGHT) | {right: left for left, right in _LEFT_AND_RIGHT}
"""Words that a mirrored image turns into one another."""


def augment(
    pixels_HW3: np.ndarray, captions: Sequence[Sequence[str]], settings: Augmentation, seed: str
) -> tuple[np.ndarray, list[list[str]]]:
    """A training image (uint8) and its tokenised captions, changed by chance; the same ``seed``, the same change.

    An image whose captions name left or right is mirrored only where ``flip_left_right_words`` lets their words be swapped.
    """
    words = [list(caption) for caption in captions]
    rng = random.Random(seed)
    image = torch.from_numpy(np.ascontiguousarray(pixels_HW3)).permute(2, 0, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.getrandbits(63))
        names_sides = any(word in OPPOSITES for caption in words for word in caption)
        may_flip = settings.flip_left_right_words == "swap-words" or not names_sides
        if rng.random() < settings.flip and may_flip:
            image = functional.horizontal_flip(image)
            words = [[OPPOSITES.get(word, word) for word in caption] for caption in words]
        if settings.min_crop_area < 1:
            size = [image.shape[1], image.shape[2]]
            image = v2.RandomResizedCrop(size, scale=(settings.min_crop_area, 1.0))(image)
        if settings.color_jitter:
            jitter = settings.color_jitter
            image = v2.ColorJitter(brightness=jitter, contrast=jitter, saturation=jitter)(image)
    return image.permute(1, 2, 0).contiguous().numpy(), words
