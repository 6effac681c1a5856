"""Which training images are mirrored, and the words for what is left and right kept true. Knows nothing of pixels."""

from __future__ import annotations

import random
from collections.abc import Sequence

from capray.config import Augmentation

_LEFT_AND_RIGHT = [("left", "right"), ("lefts", "rights"), ("leftmost", "rightmost"), ("leftward", "rightward")]
_LEFT_AND_RIGHT += [(f"left-{end}", f"right-{end}") for end in ("hand", "handed", "hander", "side", "most", "facing")]
OPPOSITES = dict(_LEFT_AND_RIGHT) | {right: left for left, right in _LEFT_AND_RIGHT}
"""Words that a mirrored image turns into one another."""


def is_mirrored(captions: Sequence[Sequence[str]], settings: Augmentation, seed: str) -> bool:
    """Whether the image of these tokenised captions is mirrored; the same ``seed``, the same answer.

    One whose captions name left or right is mirrored only where ``flip_left_right_words`` lets their words be swapped.
    """
    names_sides = any(word in OPPOSITES for caption in captions for word in caption)
    may_flip = settings.flip_left_right_words == "swap-words" or not names_sides
    return may_flip and random.Random(f"{seed} mirrored").random() < settings.flip


def mirrored_words(captions: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[OPPOSITES.get(word, word) for word in caption] for caption in captions]
