"""What every metric shares: a tokenised corpus, numbers per image that sum up, and the bootstrap over images.

Axes: N images, R resamples, S statistics of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from capray.vocabulary import tokenise

Words = Sequence[str]
LEVEL = 0.95
"""Of the bootstrap's intervals."""


class Corpus(NamedTuple):
    """The words of one caption and of the references of each image."""

    references: list[list[list[str]]]
    hypotheses: list[list[str]]

    @classmethod
    def of(cls, references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Corpus:
        """The corpus of raw captions, tokenised by the one ``tokenise``, never passed through a vocabulary.

        Args:
            references: the reference captions of each image.
            hypotheses: the caption of each image.

        Raises:
            ValueError: no images, not as many captions as sets of references, or an image without a reference.
        """
        if len(references) != len(hypotheses):
            raise ValueError(f"{len(references)} sets of references for {len(hypotheses)} hypotheses")
        if not hypotheses:
            raise ValueError("a score of no captions is undefined")
        if not all(references):
            raise ValueError("an image without a reference caption cannot be scored")
        return cls([[tokenise(text) for text in texts] for texts in references], [tokenise(h) for h in hypotheses])


class Statistics(NamedTuple):
    """Numbers of each image, and the figures that sums of them over images, of shape (…, S), give."""

    per_image_NS: np.ndarray
    figures_of: Callable[[np.ndarray], dict[str, np.ndarray]]

    def figures(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.figures_of(self.per_image_NS.sum(0)).items()}


def mean_of(name: str, values_N: Sequence[float] | np.ndarray) -> Statistics:
    """The figure ``name``, the mean of a value that each image has."""
    values_N = np.asarray(values_N, dtype=np.float64)
    return Statistics(np.stack([values_N, np.ones_like(values_N)], 1), lambda sums: {name: sums[..., 0] / sums[..., 1]})


@dataclass(frozen=True)
class Figure:
    """A figure with its 95 % interval, which is absent where none was asked for or resampling would not give one."""

    value: float
    low: float | None = None
    high: float | None = None


def bootstrap(metrics: Sequence[Statistics], num_resamples: int, seed: int = 0) -> dict[str, Figure]:
    """The figures of ``metrics`` over the same N images, with percentile intervals of the bootstrap over images.

    Each of ``num_resamples`` draws N images with replacement (Efron and Tibshirani 1993, section 13.3; for corpus scores
    Koehn 2004), the same for all metrics. An image's statistics are held fixed, and with them CIDEr-D's document
    frequencies. No intervals with ``num_resamples`` 0.
    """
    resampled = _resampled(metrics, num_resamples, seed)
    return {name: _with_interval(value, resampled.get(name)) for name, value in _figures(metrics).items()}


def paired_bootstrap(
    metrics: Sequence[Statistics], baseline: Sequence[Statistics], num_resamples: int, seed: int = 0
) -> dict[str, Figure]:
    """What each figure of ``metrics`` has over that of ``baseline``, the same metrics of other captions of the same N images
    in the same order; with percentile intervals over resamples that draw the same images for both (Koehn 2004, section
    4)."""
    others = _figures(baseline)
    resampled, of_others_R = (_resampled(of, num_resamples, seed) for of in (metrics, baseline))
    return {
        name: _with_interval(value - others[name], resampled[name] - of_others_R[name] if name in resampled else None)
        for name, value in _figures(metrics).items()
    }


def _figures(metrics: Sequence[Statistics]) -> dict[str, float]:
    return {name: value for metric in metrics for name, value in metric.figures().items()}


def _resampled(metrics: Sequence[Statistics], num_resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Each figure in each resample (R,). Which images a resample has follows from their number and the seed."""
    if not num_resamples or not metrics:
        return {}
    per_image_NS = np.concatenate([metric.per_image_NS for metric in metrics], 1)
    rng = np.random.default_rng(seed)
    num_images = len(per_image_NS)
    chances = np.full(num_images, 1 / num_images)
    sums_RS = np.stack([rng.multinomial(num_images, chances) @ per_image_NS for _ in range(num_resamples)])
    ends = np.cumsum([metric.per_image_NS.shape[1] for metric in metrics])[:-1]
    parts = zip(metrics, np.split(sums_RS, ends, 1), strict=True)
    return {name: values_R for metric, of_metric_RS in parts for name, values_R in metric.figures_of(of_metric_RS).items()}


def _with_interval(value: float, values_R: np.ndarray | None) -> Figure:
    if values_R is None:
        return Figure(value)
    low, high = np.percentile(values_R, [100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2])
    return Figure(value, float(low), float(high))
