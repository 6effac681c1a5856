"""Random augmentation of training images, at the encoder's input size: mirroring, cropping, colour jitter. Knows nothing of
Ray; the caller seeds it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from capray.config import Augmentation
from capray.training.mirroring import is_mirrored, mirrored_words


def augment(
    pixels_HW3: np.ndarray, captions: Sequence[Sequence[str]], settings: Augmentation, seed: str
) -> tuple[np.ndarray, list[list[str]]]:
    """A training image (uint8) and its tokenised captions, changed by chance; the same ``seed``, the same change."""
    words = [list(caption) for caption in captions]
    if is_mirrored(words, settings, seed):
        pixels_HW3, words = pixels_HW3[:, ::-1], mirrored_words(words)
    pixels_HW3 = np.ascontiguousarray(pixels_HW3)
    if settings.min_crop_area < 1 or settings.color_jitter:
        pixels_HW3 = _cropped_and_coloured(pixels_HW3, settings, seed)
    return pixels_HW3, words


def _cropped_and_coloured(pixels_HW3: np.ndarray, settings: Augmentation, seed: str) -> np.ndarray:
    import torch  # It and torchvision take seconds to import, in each process that reads images.
    from torchvision.transforms import v2

    image = torch.from_numpy(pixels_HW3).permute(2, 0, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.Random(seed).getrandbits(63))
        if settings.min_crop_area < 1:
            size = [image.shape[1], image.shape[2]]
            image = v2.RandomResizedCrop(size, scale=(settings.min_crop_area, 1.0))(image)
        if jitter := settings.color_jitter:
            image = v2.ColorJitter(brightness=jitter, contrast=jitter, saturation=jitter)(image)
    return image.permute(1, 2, 0).contiguous().numpy()
