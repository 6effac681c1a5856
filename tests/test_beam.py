"""Beam search against brute force, and against a plain search of one image written here."""

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from capray.config import Decoding
from capray.model.beam import beam_search
from capray.vocabulary import END, PAD, START, UNK


class Chain(NamedTuple):
    """State of a toy model: a running hash of the tokens so far and the search's number, per beam."""

    history_BK: torch.Tensor
    search_BK: torch.Tensor

    def select(self, beams_BK):
        return Chain(*(part.gather(1, beams_BK) for part in self))

    def keep(self, searches_B):
        return Chain(*(part[searches_B] for part in self))


class ToyModel:
    """Log-probabilities that depend on the whole history, from a seeded table; the same alone and in a batch."""

    def __init__(self, seed: int, vocabulary_size: int, num_searches: int, states: int = 97, sharpness: float = 2.0):
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(num_searches, states, vocabulary_size, generator=generator) * sharpness
        self.table = table.log_softmax(-1)
        self.states = states

    def start(self, searches):
        search = torch.tensor(searches)[:, None]
        return Chain(torch.zeros_like(search), search)

    def __call__(self, last_BK, state):
        history = (state.history_BK * 31 + last_BK + 7) % self.states
        return self.table[state.search_BK, history], Chain(history, state.search_BK)

    def log_probs(self, search, tokens):
        """The next token's log-probabilities after ``tokens``."""
        history = 0
        for token in (START, *tokens):
            history = (history * 31 + token + 7) % self.states
        return self.table[search, history].tolist()


def banned(decoding):
    return {PAD, START} if decoding.allow_unk else {PAD, START, UNK}


def score(log_prob, num_tokens, decoding):
    return log_prob / num_tokens**decoding.length_penalty


def brute_force(model, search, decoding, vocabulary_size):
    """Every hypothesis there is, with its score, best first."""
    words = [w for w in range(vocabulary_size) if w not in banned(decoding) and w != END]
    found = []
    for length in range(decoding.max_length + 1):
        for tokens in itertools.product(words, repeat=length):
            finished = length < decoding.max_length
            sequence = (*tokens, END) if finished else tokens
            log_prob = sum(model.log_probs(search, sequence[:i])[token] for i, token in enumerate(sequence))
            found.append((score(log_prob, len(sequence), decoding), sequence, log_prob))
    return sorted(found, reverse=True)


def may_follow(tokens, token, decoding):
    if token in banned(decoding) or (token == END and len(tokens) < decoding.min_length):
        return False
    n = decoding.no_repeat_ngram
    if n and len(tokens) >= n:
        grams = {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}
        return (*tokens[len(tokens) - n + 1 :], token) not in grams
    return True


def plain_search(model, search, decoding, vocabulary_size):
    """Beam search as one would write it for one image: lists, and no early stop."""
    beams = [((), 0.0, 0.0, False)]
    for t in range(decoding.max_length):
        candidates = []
        for parent, (tokens, log_prob, old_score, finished) in enumerate(beams):
            if finished:
                candidates.append((-old_score, END, parent, tokens, log_prob, True))
                continue
            log_probs = model.log_probs(search, tokens)
            allowed = [w for w in range(vocabulary_size) if may_follow(tokens, w, decoding)] or [END]
            for token in allowed:
                total = log_prob + log_probs[token]
                candidates.append((-score(total, t + 1, decoding), token, parent, (*tokens, token), total, token == END))
        candidates.sort(key=lambda c: c[:3])
        beams = [(c[3], c[4], -c[0], c[5]) for c in candidates[: decoding.beam_size]]
        if all(beam[3] for beam in beams):
            break
    return beams


def hypotheses(beams, search):
    """The found hypotheses of one search as (tokens, log_prob, score, finished)."""
    return [
        (tuple(tokens[:n]), log_prob, found_score, finished)
        for tokens, n, log_prob, found_score, finished in zip(*(part[search].tolist() for part in beams), strict=True)
        if n
    ]


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_wide_beam_equals_brute_force(seed, length_penalty):
    vocabulary_size = 7
    model = ToyModel(seed, vocabulary_size, num_searches=2)
    decoding = Decoding(beam_size=100, max_length=3, length_penalty=length_penalty)
    beams = beam_search(model, model.start([0, 1]), 2, decoding)
    for search in range(2):
        expected = brute_force(model, search, decoding, vocabulary_size)
        found = hypotheses(beams, search)
        assert len(found) == len(expected) == 1 + 3 + 9 + 27
        for (tokens, log_prob, found_score, finished), (want_score, sequence, want_log_prob) in zip(
            found, expected, strict=True
        ):
            assert tokens == sequence
            assert log_prob == pytest.approx(want_log_prob, abs=1e-4)
            assert found_score == pytest.approx(want_score, abs=1e-4)
            assert finished == (sequence[-1] == END)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    beam_size=st.integers(1, 6),
    max_length=st.integers(1, 8),
    length_penalty=st.sampled_from([0.0, 0.5, 0.9, 1.5]),
    no_repeat_ngram=st.integers(0, 3),
    min_length=st.integers(0, 4),
    allow_unk=st.booleans(),
    vocabulary_size=st.integers(5, 12),
)
def test_narrow_beam_equals_plain_search(
    seed, beam_size, max_length, length_penalty, no_repeat_ngram, min_length, allow_unk, vocabulary_size
):
    decoding = Decoding(
        beam_size=beam_size,
        max_length=max_length,
        length_penalty=length_penalty,
        no_repeat_ngram=no_repeat_ngram,
        min_length=min(min_length, max_length - 1),
        allow_unk=allow_unk,
    )
    model = ToyModel(seed, vocabulary_size, num_searches=3)
    beams = beam_search(model, model.start([0, 1, 2]), 3, decoding)
    for search in range(3):
        expected = plain_search(model, search, decoding, vocabulary_size)
        found = hypotheses(beams, search)
        scores = [h[2] for h in expected]
        assume(all(better - worse > 1e-5 for better, worse in itertools.pairwise(scores)))  # Either of a tie may be first.
        assert [h[0] for h in found] == [h[0] for h in expected]
        assert [h[1] for h in found] == pytest.approx([h[1] for h in expected], abs=1e-4)
        assert [h[3] for h in found] == [h[3] for h in expected]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n_best=st.integers(1, 4), length_penalty=st.sampled_from([0.0, 0.9, 2.0]))
def test_early_stop_does_not_change_the_n_best(seed, n_best, length_penalty):
    decoding = Decoding(beam_size=4, n_best=n_best, max_length=12, length_penalty=length_penalty)
    model = ToyModel(seed, 8, num_searches=1, sharpness=3.0)
    found = hypotheses(beam_search(model, model.start([0]), 1, decoding), 0)
    expected = plain_search(model, 0, decoding, 8)[:n_best]
    # By score: captions that take the same steps in another order tie, but for the rounding of their sums.
    scores, best = ([h[1] / len(h[0]) ** length_penalty for h in some] for some in (found, expected))
    assert scores == pytest.approx(best, abs=1e-4)


def test_alone_and_in_a_batch_agree():
    model = ToyModel(5, 9, num_searches=8)
    decoding = Decoding(beam_size=3, max_length=6)
    together = beam_search(model, model.start(list(range(8))), 8, decoding)
    for search in range(8):
        alone = beam_search(model, model.start([search]), 1, decoding)
        assert hypotheses(alone, 0) == hypotheses(together, search)


def test_a_hypothesis_that_never_ends_is_returned_unfinished():
    model = ToyModel(1, 6, num_searches=1)
    model.table[..., END] = -50.0
    beams = beam_search(model, model.start([0]), 1, Decoding(beam_size=2, max_length=4))
    found = hypotheses(beams, 0)
    assert len(found) == 2
    assert all(len(tokens) == 4 and not finished for tokens, _, _, finished in found)


def test_ties_go_to_the_lower_token_id():
    model = ToyModel(1, 8, num_searches=1)
    model.table[:] = -2.0
    (best, *_) = hypotheses(beam_search(model, model.start([0]), 1, Decoding(beam_size=3, max_length=3)), 0)
    assert best[0] == (END,)
    longer = Decoding(beam_size=2, max_length=2, min_length=1)
    found = hypotheses(beam_search(model, model.start([0]), 1, longer), 0)
    assert [tokens for tokens, *_ in found] == [(4, END), (5, END)]


def test_nan_gives_no_hypothesis_and_spares_the_others():
    model = ToyModel(1, 8, num_searches=2)
    model.table[1] = float("-inf")
    beams = beam_search(model, model.start([0, 1]), 2, Decoding(beam_size=2, max_length=4))
    assert hypotheses(beams, 0)
    assert not hypotheses(beams, 1)
