"""Tokenisation and word ids."""

import numpy as np
import pytest

from capray.errors import CheckpointError
from capray.vocabulary import END, PAD, SPECIAL_TOKENS, UNK, Vocabulary, tokenise


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A dog runs, quickly!", ["a", "dog", "runs", "quickly"]),
        ("The man's hat .", ["the", "man", "'s", "hat"]),
        ('He says "hi" -- twice', ["he", "says", "hi", "twice"]),
        ("black-and-white", ["black-and-white"]),
        (" . ", []),
        ("", []),
    ],
)
def test_tokenise(caption, words):
    assert tokenise(caption) == words


def test_no_caption_holds_a_special_token():
    assert not set(SPECIAL_TOKENS) & set(tokenise("<end> <unk> <start> <pad>"))


def test_build_keeps_frequent_words_most_frequent_first():
    captions = [["a", "dog"], ["a", "cat"], ["a", "dog", "rare"]]
    assert Vocabulary.build(captions, min_word_count=2).words == ["a", "dog"]
    assert Vocabulary.build(captions, max_words=3).words == ["a", "dog", "cat"]


def test_encode_and_decode():
    vocabulary = Vocabulary(["a", "dog"])
    ids = vocabulary.encode(["a", "cat", "dog"])
    assert ids == [4, UNK, 5]
    assert vocabulary.decode([4, 5, END, 4]) == ["a", "dog"]
    assert Vocabulary.from_json(vocabulary.to_json()).words == vocabulary.words


def test_many_captions_at_once_are_as_each_by_itself():
    vocabulary = Vocabulary(["a", "dog", "é"])
    ids = np.array([[4, 5, END, PAD], [6, UNK, 4, 5], [END, PAD, PAD, PAD], [4, 5, 6, 5]])
    counts = np.array([3, 4, 1, 2])
    each = [" ".join(vocabulary.decode(row[:count])) for row, count in zip(ids.tolist(), counts, strict=True)]
    assert vocabulary.texts(ids, counts) == each == ["a dog", "é <unk> a dog", "", "a dog"]


@pytest.mark.parametrize("text", ["", "[]", '{"words": [1]}', '{"words": ["a", "a"]}', '{"words": ["<end>"]}'])
def test_what_is_no_vocabulary_is_refused(text):
    with pytest.raises(CheckpointError, match="not a vocabulary"):
        Vocabulary.from_json(text)
