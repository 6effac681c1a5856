"""How good captions are: strings in, numbers out. References are raw captions, never passed through a vocabulary."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from capray.vocabulary import tokenise


def corpus_bleu(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> dict[str, float]:
    """BLEU-1 … BLEU-4 of ``hypotheses`` against their ``references`` over the whole corpus.

    NLTK's ``corpus_bleu`` (Papineni et al. 2002): closest reference length, uniform weights, no smoothing.

    Args:
        references: the reference captions of each image, raw.
        hypotheses: the caption of each image.

    Returns:
        ``{"bleu_1": …, "bleu_4": …}`` on a scale of 0 to 1.
    """
    from nltk.translate.bleu_score import corpus_bleu as nltk_corpus_bleu

    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} sets of references for {len(hypotheses)} hypotheses")
    if not hypotheses:
        raise ValueError("BLEU of no captions is undefined")
    weights = [tuple(1 / n if i < n else 0.0 for i in range(4)) for n in range(1, 5)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # NLTK warns of n-gram orders without a match: they score 0.
        scores = nltk_corpus_bleu(
            [[tokenise(reference) for reference in refs] for refs in references],
            [tokenise(hypothesis) for hypothesis in hypotheses],
            weights=weights,
        )
    return {f"bleu_{n}": score if score > 1e-100 else 0.0 for n, score in enumerate(scores, start=1)}
