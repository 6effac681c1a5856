"""Random augmentation of training images, at the encoder's input size: mirroring, cropping, colour jitter. Knows nothing of
Ray; the caller seeds it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch

from capray.config import Augmentation
from capray.training.mirroring import is_mirrored, mirrored_words


def augment(
    pixels_HW3: np.ndarray, captions: Sequence[Sequence[str]], settings: Augmentation, seed: str
) -> tuple[np.ndarray, list[list[str]]]:
    """A training image (uint8) and its tokenised captions, changed by chance; the same ``seed``, the same change."""
    words = [list(caption) for caption in captions]
    image = torch.from_numpy(np.ascontiguousarray(pixels_HW3)).permute(2, 0, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.Random(seed).getrandbits(63))
        if is_mirrored(words, settings, seed):
            image, words = image.flip(-1), mirrored_words(words)
        if settings.min_crop_area < 1:
            from torchvision.transforms import v2  # Takes as long to import as torch does.

            size = [image.shape[1], image.shape[2]]
            image = v2.RandomResizedCrop(size, scale=(settings.min_crop_area, 1.0))(image)
        if settings.color_jitter:
            from torchvision.transforms import v2

            jitter = settings.color_jitter
            image = v2.ColorJitter(brightness=jitter, contrast=jitter, saturation=jitter)(image)
    return image.permute(1, 2, 0).contiguous().numpy(), words
