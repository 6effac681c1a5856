"""Pretrained word vectors in GloVe's text format: a word and its numbers a line, separated by spaces.

Pennington, Socher, Manning (2014), *GloVe: Global Vectors for Word Representation*. The header that word2vec and fastText
put before the same lines is skipped.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from capray.errors import ConfigError, DataError
from capray.storage import locate, storage_errors
from capray.vocabulary import SPECIAL_TOKENS, Vocabulary


class WordVectors(NamedTuple):
    """``vectors_NE`` of the words with the ids ``ids_N``: those of a vocabulary that the file has."""

    ids_N: np.ndarray
    vectors_NE: np.ndarray


def read_word_vectors(uri: str, vocabulary: Vocabulary, embed_dim: int) -> WordVectors:
    """The vectors of ``vocabulary``'s words in the file ``uri`` (plain or .gz), read line by line.

    A word may hold spaces, as some of GloVe's do. Of a word that comes twice, the first counts.

    Raises:
        ConfigError: the vectors have not ``embed_dim`` numbers.
        DataError: a line is not what it should be, or the file has none of the words.
        StorageError: the file cannot be read.
    """
    wanted = {word.encode(): i for i, word in enumerate(vocabulary.words, start=len(SPECIAL_TOKENS))}
    found: dict[int, np.ndarray] = {}
    place = locate(uri)
    compression = "gzip" if uri.endswith(".gz") else None
    with storage_errors(f"reading the word vectors {uri}"), place.fs.open(place.path, compression=compression) as file:
        for number, line in enumerate(file, start=1):
            if number <= 2 and (width := len(line.split()) - 1) != embed_dim:
                if number == 1 and width == 1:
                    continue
                raise ConfigError(
                    f"the word vectors {uri!r} have {width} numbers each and --embed-dim is {embed_dim}: give "
                    f"--embed-dim {width}"
                )
            fields = line.rstrip().rsplit(b" ", embed_dim)
            i = wanted.get(fields[0])
            if i is None or i in found:
                continue
            try:
                vector = np.array([float(field) for field in fields[1:]], np.float32)
            except ValueError:
                vector = np.empty(0)
            if len(vector) != embed_dim or not np.isfinite(vector).all():
                raise DataError(f"{uri!r}, line {number}: {fields[0].decode()!r} has not {embed_dim} finite numbers")
            found[i] = vector
    if not found:
        raise DataError(f"the word vectors {uri!r} have none of the vocabulary's {len(wanted):,} words")
    return WordVectors(np.array(list(found)), np.stack(list(found.values())))
