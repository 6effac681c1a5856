"""What captions are like, references left aside: how long, how varied, how new."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from capray.metrics.statistics import Statistics, Words, mean_of


def mean_length(captions: Sequence[Words]) -> Statistics:
    """``mean_length``: words per caption."""
    return mean_of("mean_length", [len(words) for words in captions])


def novel_captions(captions: Sequence[Words], training: Collection[Words]) -> Statistics:
    """``novel_captions``: the share of captions that, word by word, are not among those of the training split."""
    known = {tuple(words) for words in training}
    return mean_of("novel_captions", [tuple(words) not in known for words in captions])


def distinct_captions(captions: Sequence[Words]) -> float:
    """Different captions per caption, 0 to 1."""
    return len({tuple(words) for words in captions}) / len(captions)


def vocabulary_used(captions: Sequence[Words]) -> int:
    """The number of different words."""
    return len({word for words in captions for word in words})
