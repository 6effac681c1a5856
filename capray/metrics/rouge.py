"""ROUGE-L as coco-caption has it."""

from __future__ import annotations

from collections.abc import Sequence

from capray.metrics.statistics import Corpus, Statistics, Words, mean_of

BETA = 1.2


def rouge_l(corpus: Corpus) -> Statistics:
    """``rouge_l``, the mean over images of ``rouge_l_of``."""
    scores = [rouge_l_of(refs, words) for refs, words in zip(corpus.references, corpus.hypotheses, strict=True)]
    return mean_of("rouge_l", scores)


def rouge_l_of(references: Sequence[Words], words: Words) -> float:
    """The F-measure (beta 1.2) of the best precision and the best recall of the longest common subsequence over the
    references (Lin 2004, section 3.2, and coco-caption's ``Rouge``), 0 to 1. As there, captions without words are equal."""
    words = words or [""]
    precision = recall = 0.0
    for reference in references:
        common = _common_subsequence(words, reference or [""])
        precision = max(precision, common / len(words))
        recall = max(recall, common / max(1, len(reference)))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common_subsequence(first: Words, second: Words) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        previous = row
        row = [0]
        for i, other in enumerate(second):
            row.append(previous[i] + 1 if word == other else max(previous[i + 1], row[i]))
    return row[-1]
