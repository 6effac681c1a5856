"""Words and their ids, and the one tokenisation that vocabulary, metrics and losses share."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from capray.errors import CheckpointError

PAD, START, END, UNK = range(4)
SPECIAL_TOKENS = ("<pad>", "<start>", "<end>", "<unk>")

# coco-caption, pycocoevalcap/tokenizer/ptbtokenizer.py, in lower case.
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-lrb-", "-rrb-", "-lcb-", "-rcb-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)


@functools.cache
def _tokenizer():
    from nltk.tokenize.destructive import NLTKWordTokenizer

    return NLTKWordTokenizer()


def tokenise(caption: str) -> list[str]:
    """The words of ``caption``: lower case, Penn Treebank tokens (NLTK), without coco-caption's punctuation."""
    return [token for token in _tokenizer().tokenize(caption.lower()) if token not in PUNCTUATION]


def without_end(tokens: Sequence[str]) -> list[str]:
    """A caption's tokens but for the ``<end>`` they may close with."""
    return list(tokens[:-1] if tokens[-1:] == [SPECIAL_TOKENS[END]] else tokens)


class Vocabulary:
    """Words and ids. Ids 0–3 are ``<pad> <start> <end> <unk>``; the words follow in the order given."""

    def __init__(self, words: Sequence[str]):
        self.words = list(words)
        self._tokens = [*SPECIAL_TOKENS, *self.words]
        self._ids = {token: i for i, token in enumerate(self._tokens)}
        if len(self._ids) != len(self._tokens):
            raise ValueError("a vocabulary's words must be distinct and none of the special tokens")

    @classmethod
    def build(cls, captions: Iterable[Sequence[str]], min_word_count: int = 1, max_words: int | None = None) -> Vocabulary:
        """The words of tokenised ``captions`` seen at least ``min_word_count`` times, most frequent first, and at most
        ``max_words`` of them."""
        counts = Counter(word for caption in captions for word in caption)
        kept = [word for word, count in counts.items() if count >= min_word_count]
        return cls(sorted(kept, key=lambda word: (-counts[word], word))[:max_words])

    def __len__(self) -> int:
        return len(self._tokens)

    def encode(self, words: Iterable[str]) -> list[int]:
        return [self._ids.get(word, UNK) for word in words]

    def decode(self, ids: Sequence[int]) -> list[str]:
        """The words of ``ids`` up to the first ``<end>``."""
        return self.tokens(ids[: ids.index(END)] if END in ids else ids)

    def texts(self, ids_NT: np.ndarray, counts_N: np.ndarray) -> list[str]:
        """The captions of N rows of T ids, of which each row's first ``counts_N`` count; ``<end>`` may only be the last of
        them. As ``decode`` of each, an eighth of the time, most of it without Python's lock."""
        import pyarrow as pa
        import pyarrow.compute as pc

        is_word_NT = (np.arange(ids_NT.shape[1]) < counts_N[:, None]) & (ids_NT != END)
        offsets = np.concatenate([[0], is_word_NT.sum(1).cumsum()]).astype(np.int32)
        words = self._arrow_tokens.take(pa.array(ids_NT[is_word_NT]))
        return pc.call_function("binary_join", [pa.ListArray.from_arrays(offsets, words), " "]).to_pylist()

    @functools.cached_property
    def _arrow_tokens(self):
        import pyarrow as pa

        return pa.array(self._tokens)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The tokens of ``ids``, special ones too."""
        return list(map(self._tokens.__getitem__, ids))

    def to_json(self) -> str:
        return json.dumps({"words": self.words}, ensure_ascii=False, indent=0)

    @classmethod
    def from_json(cls, text: str) -> Vocabulary:
        """Raises CheckpointError when ``text`` is not a vocabulary."""
        try:
            words = json.loads(text)["words"]
            if not all(isinstance(word, str) for word in words):
                raise TypeError("words must be strings")
            return cls(words)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"not a vocabulary: {error!r}") from error
