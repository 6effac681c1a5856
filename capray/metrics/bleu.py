"""BLEU over a corpus: NLTK's n-gram counts, summed per image so that they can be resampled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from capray.metrics.statistics import Corpus, Statistics, Words

ORDERS = range(1, 5)


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
