"""CIDEr-D, over a corpus or against a fixed table of document frequencies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from capray.metrics.ngrams import ORDERS, NGram, Tokens, ngram_counts
from capray.metrics.statistics import Corpus, Statistics, mean_of

SIGMA = 6.0


class DocumentFrequencies(NamedTuple):
    """In the references of how many of ``num_images`` images an n-gram occurs."""

    num_images: int
    counts: Mapping[NGram, int]

    @classmethod
    def of(cls, references: Iterable[Sequence[Tokens]]) -> DocumentFrequencies:
        """The table of a split, from the tokenised references of its images."""
        num_images = 0
        counts: Counter[NGram] = Counter()
        for num_images, of_image in enumerate(references, start=1):  # noqa: B007 (counts)
            counts.update({ngram for words in of_image for ngram in ngram_counts(words)})
        return cls(num_images, counts)

    def idf(self, ngram: NGram) -> float:
        """The natural logarithm of images / images with ``ngram``; one that no image has counts as of one image."""
        return math.log(self.num_images / max(1, self.counts.get(ngram, 0)))


class Vector(NamedTuple):
    """A caption's n-grams weighted by tf-idf, the norm for each order, and its length as coco-caption measures it: in
    bigrams."""

    weights: dict[NGram, float]
    norms: list[float]
    num_bigrams: int


class CiderD:
    """Scores captions against references under fixed document frequencies, as a reward too.

    CIDEr-D (Vedantam et al. 2015, section 5; sigma 6) as coco-caption's ``Cider`` computes it, times 10. For reporting, the
    frequencies are those of the evaluated split's references; for a reward, those of the training split's. The
    ``vector`` of a reference can be kept.
    """

    def __init__(self, frequencies: DocumentFrequencies):
        self.idf = {ngram: frequencies.idf(ngram) for ngram in frequencies.counts}
        self.unseen_idf = frequencies.idf(())

    def vector(self, words: Tokens) -> Vector:
        weights, squares = {}, [0.0] * len(ORDERS)
        for ngram, count in ngram_counts(words).items():
            weights[ngram] = weight = count * self.idf.get(ngram, self.unseen_idf)
            squares[len(ngram) - 1] += weight * weight
        return Vector(weights, [math.sqrt(square) for square in squares], max(0, len(words) - 1))

    def score(self, words: Tokens, references: Sequence[Vector]) -> float:
        """CIDEr-D of the caption ``words``, 0 to 10."""
        caption = self.vector(words)
        return 10 * sum(_similarity(caption, reference) for reference in references) / len(references)


def _similarity(caption: Vector, reference: Vector) -> float:
    """The mean over orders of the clipped cosine, less the more the lengths differ."""
    products = [0.0] * len(ORDERS)
    for ngram in caption.weights.keys() & reference.weights.keys():
        other = reference.weights[ngram]
        products[len(ngram) - 1] += min(caption.weights[ngram], other) * other
    norms = [a * b for a, b in zip(caption.norms, reference.norms, strict=True)]
    cosines = [product / norm for product, norm in zip(products, norms, strict=True) if norm]
    difference = caption.num_bigrams - reference.num_bigrams
    return math.exp(-(difference**2) / (2 * SIGMA**2)) * sum(cosines) / len(ORDERS)


def cider_d(corpus: Corpus, frequencies: DocumentFrequencies | None = None) -> Statistics:
    """``cider_d``, the mean over images; ``frequencies`` are those of the corpus' own references when not given."""
    scorer = CiderD(frequencies or DocumentFrequencies.of(corpus.references))
    pairs = zip(corpus.references, corpus.hypotheses, strict=True)
    return mean_of("cider_d", [scorer.score(words, [scorer.vector(r) for r in references]) for references, words in pairs])
