"""The n-grams of 1 to 4 words that BLEU and CIDEr-D count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import chain

ORDERS = range(1, 5)
Tokens = Sequence[Hashable]
"""A caption as words or as their ids."""
NGram = tuple[Hashable, ...]


def ngram_counts(words: Tokens) -> Counter[NGram]:
    """How often each n-gram of 1 to 4 words occurs."""
    shifted = [words[i:] for i in range(max(ORDERS))]
    return Counter(chain.from_iterable(zip(*shifted[:order], strict=False) for order in ORDERS))
