"""Figures equal to those of the libraries they stand in for, and intervals that mean something.

The oracle of CIDEr-D, ROUGE-L and METEOR 1.5 is coco-caption's own code, in the extra `meteor` (uv sync --extra meteor).
"""

import math
import shutil
import sys
import warnings
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capray.errors import CaprayError, ConfigError
from capray.metrics import (
    CiderD,
    Corpus,
    DocumentFrequencies,
    bleu,
    bootstrap,
    cider_d,
    corpus_bleu,
    corpus_figures,
    distinct_captions,
    mean_length,
    mean_of,
    meteor,
    meteor_nltk,
    novel_captions,
    rouge_l,
    vocabulary_used,
)

WORDS = st.lists(st.sampled_from(["a", "dog", "man", "runs", "on", "grass", "'s", "naïve"]), max_size=9)
CORPORA = st.lists(st.tuples(st.lists(WORDS, min_size=1, max_size=4), WORDS), min_size=1, max_size=8).map(
    lambda images: Corpus([references for references, _ in images], [words for _, words in images])
)
CORPORA_WITH_WORDS = CORPORA.filter(lambda corpus: any(words for texts in corpus.references for words in texts))
"""What coco-caption's CIDEr can score."""


@pytest.fixture(scope="module")
def human(flickr8k) -> Corpus:
    """Caption 0 of each Flickr8k image of the test split against its other four."""
    captions = defaultdict(list)
    for line in (flickr8k / "Flickr8k.token.txt").read_text().splitlines():
        key, caption = line.split("\t")
        captions[key.split("#")[0]].append(caption)
    names = (flickr8k / "Flickr_8k.testImages.txt").read_text().split()
    return Corpus.of([captions[name][1:] for name in names], [captions[name][0] for name in names])


def oracle(name: str):
    """coco-caption's scorer ``name``."""
    module = pytest.importorskip(f"pycocoevalcap.{name.lower()}.{name.lower()}", reason="needs the extra `meteor`")
    return getattr(module, name)()


def as_coco(corpus: Corpus):
    references = {i: [" ".join(words) for words in texts] for i, texts in enumerate(corpus.references)}
    return references, {i: [" ".join(words)] for i, words in enumerate(corpus.hypotheses)}


def per_image(statistics) -> np.ndarray:
    """The values that a mean is taken of."""
    return statistics.per_image_NS[:, 0]


class TestBleu:
    def test_human_captions_of_flickr8k_score_as_published(self, human):
        """Tokeniser and metric together."""
        assert [round(100 * value, 1) for value in bleu(human).figures().values()] == [63.6, 44.6, 30.5, 20.9]

    @settings(deadline=None, max_examples=50)
    @given(CORPORA)
    def test_equals_nltk(self, corpus):
        from nltk.translate.bleu_score import corpus_bleu as nltk_bleu

        weights = [(1.0,), (1 / 2,) * 2, (1 / 3,) * 3, (1 / 4,) * 4]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # n-gram orders without a match
            expected = nltk_bleu(corpus.references, corpus.hypotheses, weights)
        assert list(bleu(corpus).figures().values()) == pytest.approx(expected, rel=1e-12, abs=1e-12)

    def test_a_perfect_caption_scores_one(self):
        found = corpus_bleu([["A dog runs in the park.", "Nothing alike"]], ["a dog runs in the park"])
        assert found == pytest.approx({f"bleu_{n}": 1.0 for n in range(1, 5)})

    def test_no_match_scores_zero_without_smoothing(self):
        found = corpus_bleu([["one two three four five"]], ["one two six seven eight"])
        assert found["bleu_1"] == pytest.approx(0.4)
        assert found["bleu_3"] == found["bleu_4"] == 0.0


class TestCorpus:
    def test_the_figures_of_raw_captions(self):
        found = corpus_figures([["A dog ."], ["Two men !"]], ["a dog", "two dogs"], "bleu", "rouge_l", "cider_d")
        assert list(found) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d"]
        assert found["bleu_1"] == 0.75

    def test_words_of_no_vocabulary_count(self):
        """A reference's rare word stays itself: it is no <unk> that another rare word would match."""
        assert corpus_bleu([["a zyzzyva"]], ["a quokka"])["bleu_1"] == 0.5

    @pytest.mark.parametrize(
        ("references", "hypotheses", "message"),
        [
            ([["a"]], ["a", "b"], "1 sets of references for 2"),
            ([], [], "undefined"),
            ([["a"], []], ["a", "b"], "without a reference"),
        ],
    )
    def test_what_cannot_be_scored(self, references, hypotheses, message):
        with pytest.raises(ValueError, match=message):
            Corpus.of(references, hypotheses)


class TestRougeL:
    def test_the_best_precision_and_recall_over_references(self):
        """By hand: precision 2/3 of the first, recall 1 of the second, weighed with beta 1.2."""
        corpus = Corpus([[["a", "dog", "runs", "far"], ["runs"]]], [["dog", "runs", "home"]])
        precision, recall = 2 / 3, 1.0
        expected = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
        assert rouge_l(corpus).figures() == pytest.approx({"rouge_l": expected})

    @settings(deadline=None)
    @given(CORPORA)
    def test_equals_coco_caption(self, corpus):
        expected, each = oracle("Rouge").compute_score(*as_coco(corpus))
        assert rouge_l(corpus).figures()["rouge_l"] == pytest.approx(expected, abs=1e-12)
        assert per_image(rouge_l(corpus)) == pytest.approx(each, abs=1e-12)

    def test_human_captions_of_flickr8k(self, human):
        found = rouge_l(human).figures()["rouge_l"]
        assert round(found, 4) == 0.4875
        assert found == pytest.approx(oracle("Rouge").compute_score(*as_coco(human))[0], abs=1e-12)


class TestCiderD:
    @settings(deadline=None)
    @given(CORPORA_WITH_WORDS)
    def test_equals_coco_caption(self, corpus):
        expected, each = oracle("Cider").compute_score(*as_coco(corpus))
        assert cider_d(corpus).figures()["cider_d"] == pytest.approx(expected, abs=1e-9)
        assert per_image(cider_d(corpus)) == pytest.approx(each, abs=1e-9)

    @settings(deadline=None)
    @given(CORPORA_WITH_WORDS, CORPORA)
    def test_a_fixed_table_is_that_of_the_images_it_was_made_of(self, scored, others):
        """coco-caption over both corpora has the frequencies of both; its scores of the first are those under that table."""
        both = Corpus(scored.references + others.references, scored.hypotheses + others.hypotheses)
        _, each = oracle("Cider").compute_score(*as_coco(both))
        found = cider_d(scored, DocumentFrequencies.of(both.references))
        assert per_image(found) == pytest.approx(each[: len(scored.hypotheses)], abs=1e-9)

    def test_human_captions_of_flickr8k(self, human):
        found = cider_d(human).figures()["cider_d"]
        assert round(found, 4) == 0.7886
        assert found == pytest.approx(oracle("Cider").compute_score(*as_coco(human))[0], abs=1e-6)

    def test_as_a_reward(self):
        """References are turned to vectors once; the same words as the only reference score 10, no common word 0."""
        references = [[["a", "dog", "runs", "far"]], [["two", "men", "sit", "down"]], [["a", "cat"]]]
        scorer = CiderD(DocumentFrequencies.of(references))
        vectors = [scorer.vector(words) for words in references[0]]
        assert scorer.score(["a", "dog", "runs", "far"], vectors) == pytest.approx(10)
        assert scorer.score(["two", "men"], vectors) == 0
        assert 0 < scorer.score(["a", "dog", "sits"], vectors) < 10

    def test_a_word_of_all_images_weighs_nothing(self):
        frequencies = DocumentFrequencies.of([[["a", "dog"], ["a", "hound"]], [["a", "cat"]]])
        assert frequencies.idf(("a",)) == 0
        assert frequencies.idf(("dog",)) == frequencies.idf(("never", "seen")) == pytest.approx(math.log(2))


class TestMeteor:
    @pytest.mark.slow
    @pytest.mark.timeout(600)  # The Java program unpacks 60 MB of paraphrases.
    def test_equals_coco_caption(self):
        """Its figures (pycocoevalcap 1.2), by the same program, are written down: a second start takes ten seconds."""
        pytest.importorskip("pycocoevalcap", reason="needs the extra `meteor`")
        if shutil.which("java") is None:
            pytest.skip("needs Java")
        raw = [
            (["A dog runs fast .", "A hound is running ."], "the dogs are running"),
            (["Two men sit on a bench ."], "two men sit on a bench"),
            (["A child in the snow .", "A kid plays ."], ""),
            (["A man rides a horse and a naïve dog"], "a woman ||| rides her naïve bicycle"),
            (["Children playing quickly with a ball"], "quickly a ball with kids that play"),
        ]
        corpus = Corpus.of([references for references, _ in raw], [caption for _, caption in raw])
        found = meteor(corpus)
        each = [0.40172517378149275, 1.0, 0.0, 0.15342465753424656, 0.2451151905148036]
        assert found.figures()["meteor"] == pytest.approx(0.27170069437799405, abs=1e-9)
        assert found.figures_of(found.per_image_NS)["meteor"] == pytest.approx(each, abs=1e-9)

    def test_without_java(self, monkeypatch):
        pytest.importorskip("pycocoevalcap", reason="needs the extra `meteor`")
        monkeypatch.setenv("PATH", "")
        with pytest.raises(ConfigError, match="needs Java"):
            meteor(Corpus([[["a"]]], [["a"]]))

    def test_without_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
        with pytest.raises(ConfigError, match=r"needs the extra `meteor` \(pip install 'capray\[meteor\]'"):
            meteor(Corpus([[["a"]]], [["a"]]))

    def test_a_java_that_fails(self, monkeypatch, tmp_path):
        pytest.importorskip("pycocoevalcap", reason="needs the extra `meteor`")
        java = tmp_path / "java"
        java.write_text("#!/bin/sh\necho 'no memory' >&2\nexit 3\n")
        java.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(CaprayError, match=r"exit code 3, 0 of 1 captions scored\): no memory"):
            meteor(Corpus([[["a"]]], [["a"]]))


@pytest.fixture
def wordnet(monkeypatch, tmp_path):
    """NLTK's WordNet as on a fresh machine, which finds its data in ``tmp_path`` alone."""
    import nltk
    from nltk.corpus.reader import CorpusReader, WordNetCorpusReader
    from nltk.corpus.util import LazyCorpusLoader

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    omw = LazyCorpusLoader("omw-1.4", CorpusReader, r".*/wn-data-.*\.tab")
    monkeypatch.setattr(nltk.corpus, "wordnet", LazyCorpusLoader("wordnet", WordNetCorpusReader, omw))
    return tmp_path / "corpora" / "wordnet"


class TestMeteorNltk:
    def test_without_wordnet(self, wordnet):
        with pytest.raises(ConfigError, match=r"python -m nltk\.downloader wordnet"):
            meteor_nltk(Corpus([[["a"]]], [["a"]]))

    def test_synonyms_match(self, wordnet):
        """A WordNet of one synset {dog, hound}, in the format of its database files."""
        wordnet.mkdir(parents=True)
        for kind in ("adj", "adv", "noun", "verb"):
            for name in (f"index.{kind}", f"data.{kind}", f"{kind}.exc"):
                (wordnet / name).write_text("")
        for name in ("cntlist.rev", "index.sense"):
            (wordnet / name).write_text("")
        (wordnet / "lexnames").write_text("00\tnoun.animal\t1\n")
        (wordnet / "data.noun").write_text("00000000 00 n 02 dog 0 hound 0 000 | a domestic animal\n")
        (wordnet / "index.noun").write_text("dog n 1 0 1 0 00000000\nhound n 1 0 1 0 00000000\n")
        corpus = Corpus([[["a", "dog", "runs"]], [["a", "dog", "runs"]]], [["a", "hound", "runs"], ["a", "cat", "runs"]])
        synonym, other = per_image(meteor_nltk(corpus))
        assert synonym == pytest.approx(1 - 0.5 * (1 / 3) ** 3)  # All three words match, in one chunk.
        assert other < synonym


class TestDiversity:
    CAPTIONS = (["a", "dog"], ["a", "dog"], ["a", "big", "dog"], [])

    def test_by_hand(self):
        assert mean_length(self.CAPTIONS).figures() == {"mean_length": 7 / 4}
        assert distinct_captions(self.CAPTIONS) == 3 / 4
        assert vocabulary_used(self.CAPTIONS) == 3
        assert novel_captions(self.CAPTIONS, [["a", "dog"], ["dog", "a", "big"]]).figures() == {"novel_captions": 0.5}


class TestBootstrap:
    def test_the_interval_of_a_mean_is_that_of_statistics(self):
        """Over many images the percentile interval of a mean comes near the normal one."""
        values = np.random.default_rng(1).normal(3, 2, 4000)
        figure = bootstrap([mean_of("x", values)], 2000)["x"]
        margin = 1.96 * values.std() / math.sqrt(len(values))
        assert figure.value == pytest.approx(values.mean())
        assert (figure.low, figure.high) == pytest.approx((values.mean() - margin, values.mean() + margin), abs=margin / 10)

    def test_each_resample_is_the_metric_over_the_images_drawn(self):
        """BLEU of resampled sums is BLEU of the resampled corpus."""
        corpus = Corpus.of([["a dog runs"], ["two men sit down"], ["a cat"]], ["a dog ran", "two men sit", "a small cat"])
        drawn = [0, 2, 2]
        again = Corpus([corpus.references[i] for i in drawn], [corpus.hypotheses[i] for i in drawn])
        statistics = bleu(corpus)
        found = statistics.figures_of(statistics.per_image_NS[drawn].sum(0))
        assert {name: float(value) for name, value in found.items()} == pytest.approx(bleu(again).figures())

    def test_seeded_and_paired(self):
        metrics = [mean_of("x", [1, 2, 5, 9]), mean_of("twice", [2, 4, 10, 18])]
        first, again, other = bootstrap(metrics, 50, 0), bootstrap(metrics, 50, 0), bootstrap(metrics, 50, 1)
        assert first == again != other
        assert (first["twice"].low, first["twice"].high) == (2 * first["x"].low, 2 * first["x"].high)

    def test_none_asked_for(self):
        figure = bootstrap([mean_of("x", [1, 2])], 0)["x"]
        assert (figure.value, figure.low, figure.high) == (1.5, None, None)
