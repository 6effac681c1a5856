"""GloVe's text format, line by line."""

import gzip

import numpy as np
import pytest

from capray.errors import ConfigError, DataError, StorageError
from capray.model.word_vectors import read_word_vectors
from capray.vocabulary import Vocabulary

VOCABULARY = Vocabulary(["dog", "café", "cat", "unseen"])
TEXT = "the 1 2 3\ncat 0.5 -1e-1 0\ndog 1 1 1\n. . . 4 5 6\ncafé 7 8 9\ncat 9 9 9\n"


def test_the_vectors_of_the_vocabularys_words(tmp_path):
    file = tmp_path / "glove.txt"
    file.write_text(TEXT, "utf-8")
    found = read_word_vectors(str(file), VOCABULARY, 3)
    by_word = dict(zip(VOCABULARY.tokens(found.ids_N), found.vectors_NE.tolist(), strict=True))
    assert by_word == {"cat": pytest.approx([0.5, -0.1, 0]), "dog": [1, 1, 1], "café": [7, 8, 9]}


@pytest.mark.parametrize("header", ["", "5 3\n"])
def test_compressed_with_a_header_and_on_s3(tmp_path, s3, header):
    import s3fs

    s3fs.S3FileSystem().pipe_file(f"{s3}/glove.txt.gz", gzip.compress((header + TEXT).encode()))
    assert len(read_word_vectors(f"{s3}/glove.txt.gz", VOCABULARY, 3).ids_N) == 3


def test_another_width_names_the_one_to_set(tmp_path):
    file = tmp_path / "glove.txt"
    file.write_text(TEXT)
    with pytest.raises(ConfigError, match="3 numbers each and --embed-dim is 300: give --embed-dim 3"):
        read_word_vectors(str(file), VOCABULARY, 300)


@pytest.mark.parametrize("line", ["dog 1 2", "dog 1 2 x", "dog 1 nan 3"])
def test_a_damaged_line_is_named(tmp_path, line):
    file = tmp_path / "glove.txt"
    file.write_text(f"the 1 2 3\na 1 2 3\n{line}\n")
    with pytest.raises(DataError, match="line 3: 'dog' has not 3 finite numbers"):
        read_word_vectors(str(file), VOCABULARY, 3)


def test_a_file_without_any_of_the_words(tmp_path):
    file = tmp_path / "glove.txt"
    file.write_text("chien 1 2 3\n")
    with pytest.raises(DataError, match="none of the vocabulary's 4 words"):
        read_word_vectors(str(file), VOCABULARY, 3)


def test_a_missing_file(tmp_path):
    with pytest.raises(StorageError, match="not found"):
        read_word_vectors(str(tmp_path / "nothing.txt"), VOCABULARY, 3)


def test_memory_is_that_of_the_words_found(tmp_path):
    import tracemalloc

    file = tmp_path / "big.txt"
    numbers = " ".join(["0.123"] * 50)
    file.write_text("".join(f"w{i} {numbers}\n" for i in range(10_000)) + f"dog {numbers}\n")
    tracemalloc.start()
    found = read_word_vectors(str(file), VOCABULARY, 50)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.allclose(found.vectors_NE, 0.123)
    assert peak < file.stat().st_size / 4
