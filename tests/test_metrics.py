"""BLEU over a corpus."""

from collections import defaultdict

import pytest

from capray.metrics import corpus_bleu


def test_human_captions_of_flickr8k_score_as_published(flickr8k):
    """Caption 0 of each test image against its other four: tokeniser and metric together."""
    captions = defaultdict(list)
    for line in (flickr8k / "Flickr8k.token.txt").read_text().splitlines():
        key, caption = line.split("\t")
        captions[key.split("#")[0]].append(caption)
    names = (flickr8k / "Flickr_8k.testImages.txt").read_text().split()
    bleu = corpus_bleu([captions[name][1:] for name in names], [captions[name][0] for name in names])
    assert [round(100 * value, 1) for value in bleu.values()] == [63.6, 44.6, 30.5, 20.9]


def test_a_perfect_caption_scores_one():
    bleu = corpus_bleu([["A dog runs in the park.", "Nothing alike"]], ["a dog runs in the park"])
    assert bleu == pytest.approx({f"bleu_{n}": 1.0 for n in range(1, 5)})


def test_no_match_scores_zero_without_smoothing():
    bleu = corpus_bleu([["one two three four five"]], ["one two six seven eight"])
    assert bleu["bleu_1"] == pytest.approx(0.4)
    assert bleu["bleu_3"] == bleu["bleu_4"] == 0.0


def test_an_empty_caption_is_scored():
    assert corpus_bleu([["a dog"], ["a cat"]], ["", "a cat"])["bleu_1"] < 1


def test_uneven_input_is_a_mistake():
    with pytest.raises(ValueError, match="1 sets of references for 2"):
        corpus_bleu([["a"]], ["a", "b"])
    with pytest.raises(ValueError, match="undefined"):
        corpus_bleu([], [])
