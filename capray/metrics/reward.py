"""How good drawn captions of an image are, for training by reward."""

from __future__ import annotations

from collections.abc import Sequence

from capray.metrics.bleu import SentenceBleu
from capray.metrics.cider import CiderD, DocumentFrequencies
from capray.metrics.ngrams import Tokens


class Reward:
    """CIDEr-D (0 to 10) under fixed document ``frequencies``, and ``bleu_weight`` times the sentence's BLEU-4 (0 to 1)."""

    def __init__(self, frequencies: DocumentFrequencies, bleu_weight: float):
        self.cider_d = CiderD(frequencies)
        self.bleu_weight = bleu_weight

    def __call__(self, captions: Sequence[Tokens], references: Sequence[Tokens]) -> list[float]:
        """The rewards of ``captions`` of one image against its ``references``."""
        vectors = [self.cider_d.vector(words) for words in references]
        scores = [self.cider_d.score(words, vectors) for words in captions]
        if self.bleu_weight:
            bleu = SentenceBleu(references)
            scores = [score + self.bleu_weight * bleu.score(w) for score, w in zip(scores, captions, strict=True)]
        return scores
