"""BLEU over a corpus: NLTK's n-gram counts, summed per image so that they can be resampled."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from capray.metrics.ngrams import ORDERS, NGram, Tokens, ngram_counts
from capray.metrics.statistics import Corpus, Statistics, Words


def bleu(corpus: Corpus) -> Statistics:
    """``bleu_1`` … ``bleu_4`` on a scale of 0 to 1 (Papineni et al. 2002): closest reference length, uniform weights, no
    smoothing. The figures are those of NLTK's ``corpus_bleu``, but for an exact 0 where it gives less than 1e-70."""
    rows = [_counts(refs, words) for refs, words in zip(corpus.references, corpus.hypotheses, strict=True)]
    return Statistics(np.array(rows, dtype=np.float64), _figures)


def _counts(references: Sequence[Words], words: Words) -> list[int]:
    """Clipped matches and n-grams of each order, and the lengths of the caption and its closest reference."""
    from nltk.translate.bleu_score import closest_ref_length, modified_precision

    precisions = [modified_precision(references, words, order) for order in ORDERS]
    matches, totals = [p.numerator for p in precisions], [p.denominator for p in precisions]
    return [*matches, *totals, len(words), closest_ref_length(references, len(words))]


def _figures(sums: np.ndarray) -> dict[str, np.ndarray]:
    matches, totals, length, reference_length = sums[..., :4], sums[..., 4:8], sums[..., 8], sums[..., 9]
    with np.errstate(divide="ignore"):
        log_precision = np.log(matches / totals)
    log_brevity = np.minimum(0, 1 - reference_length / np.maximum(length, 1))
    log_mean = np.cumsum(log_precision, -1) / list(ORDERS)
    scores = np.exp(log_brevity[..., None] + log_mean)
    return {f"bleu_{order}": scores[..., order - 1] for order in ORDERS}


class SentenceBleu:
    """BLEU-4 of single captions against the ``references`` of one image: NLTK's ``sentence_bleu``, fast enough for a reward.

    It is 0 where no 4-gram matches. Smoothing would give most to the shortest captions, which have the fewest 4-grams.
    """

    def __init__(self, references: Sequence[Tokens]):
        self.most: dict[NGram, int] = {}
        for words in references:
            for ngram, count in ngram_counts(words).items():
                if count > self.most.get(ngram, 0):
                    self.most[ngram] = count
        self.lengths = [len(words) for words in references]

    def score(self, words: Tokens) -> float:
        """BLEU-4 of the caption ``words``, 0 to 1."""
        counts = ngram_counts(words)
        matches = [0] * len(ORDERS)
        for ngram in counts.keys() & self.most.keys():
            matches[len(ngram) - 1] += min(counts[ngram], self.most[ngram])
        if not all(matches):
            return 0.0
        precisions = [matched / (len(words) - order + 1) for order, matched in zip(ORDERS, matches, strict=True)]
        closest = min(self.lengths, key=lambda length: (abs(length - len(words)), length))
        brevity = min(1.0, math.exp(1 - closest / len(words)))
        return brevity * math.prod(precisions) ** (1 / len(ORDERS))
