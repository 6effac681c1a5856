"""How good captions are: words in, numbers out. Knows nothing of models, tables, Ray or MLflow.

A metric turns a ``Corpus`` into ``Statistics``: numbers of each image whose sums over images give its figures, so that a
bootstrap over images needs no second scoring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from capray.metrics.bleu import bleu
from capray.metrics.cider import CiderD, DocumentFrequencies, cider_d
from capray.metrics.diversity import distinct_captions, mean_length, novel_captions, vocabulary_used
from capray.metrics.meteor import meteor, meteor_nltk
from capray.metrics.reward import Reward
from capray.metrics.rouge import rouge_l
from capray.metrics.statistics import Corpus, Figure, Statistics, bootstrap, mean_of, paired_bootstrap

REFERENCE_METRICS: dict[str, Callable[[Corpus], Statistics]] = {
    "bleu": bleu,
    "rouge_l": rouge_l,
    "cider_d": cider_d,
    "meteor": meteor,
    "meteor_nltk": meteor_nltk,
}
"""Metrics of captions against references, by the name that settings have for them."""


def corpus_figures(references: Sequence[Sequence[str]], hypotheses: Sequence[str], *names: str) -> dict[str, float]:
    """The figures of the named REFERENCE_METRICS over raw captions; see ``Corpus.of`` for the arguments and errors."""
    corpus = Corpus.of(references, hypotheses)
    return {figure: value for name in names for figure, value in REFERENCE_METRICS[name](corpus).figures().items()}


def corpus_bleu(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> dict[str, float]:
    """``{"bleu_1": …, "bleu_4": …}`` of raw captions; see ``bleu``, and ``Corpus.of`` for the arguments and errors."""
    return corpus_figures(references, hypotheses, "bleu")


__all__ = [
    "REFERENCE_METRICS",
    "CiderD",
    "Corpus",
    "DocumentFrequencies",
    "Figure",
    "Reward",
    "Statistics",
    "bleu",
    "bootstrap",
    "cider_d",
    "corpus_bleu",
    "corpus_figures",
    "distinct_captions",
    "mean_length",
    "mean_of",
    "meteor",
    "meteor_nltk",
    "novel_captions",
    "paired_bootstrap",
    "rouge_l",
    "vocabulary_used",
]
