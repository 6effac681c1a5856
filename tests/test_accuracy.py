"""Perplexity and top-5 accuracies, as sums for each image."""

import numpy as np
import pytest
import torch

from capray.config import Decoding
from capray.model.accuracy import accuracy_figures, accuracy_sums, free_running_candidates, top_k_hits
from capray.model.loss import collate, loss_sums
from capray.vocabulary import END, PAD
from tests.test_loss import RAGGED, captioner, memory_of  # noqa: F401 (a fixture)


@pytest.fixture
def talkative(captioner):  # noqa: F811
    """A captioner whose captions vary from image to image, and end."""
    with torch.no_grad():
        for weight, factor in (("output", 20), ("embedding", 30), ("initial_hidden", 20)):
            getattr(captioner.decoder, weight).weight.mul_(factor)
        captioner.decoder.output.bias[END] = 1.0
    return captioner.requires_grad_(False)


def test_the_likelihood_is_that_of_the_loss(talkative):
    memory, batch = memory_of(talkative), collate(RAGGED, 10)
    sums = accuracy_sums(talkative, memory, batch)
    assert float(sums.nll_B.sum()) == pytest.approx(float(loss_sums(talkative, memory, batch).nll), rel=1e-5)
    assert sums.num_tokens_B.tolist() == [12, 2, 7]


def test_an_image_alone_and_among_others(talkative):
    memory = memory_of(talkative)
    together = accuracy_sums(talkative, memory, collate(RAGGED, 10))
    for i, captions in enumerate(RAGGED):
        alone = accuracy_sums(talkative, memory.select(torch.tensor([i])), collate([captions], 10))
        for name in alone._fields:
            assert getattr(alone, name).item() == pytest.approx(getattr(together, name)[i].item(), rel=1e-4)


def test_free_running_goes_the_way_of_greedy_search(talkative):
    memory = memory_of(talkative, 4)
    candidates = free_running_candidates(talkative, memory, 12, 5)
    greedy = talkative.caption(memory, Decoding(beam_size=1, max_length=12, allow_unk=True))
    lengths = set()
    for first, (hypothesis,) in zip(candidates[..., 0].tolist(), greedy, strict=True):
        assert tuple(first[: hypothesis.num_tokens]) == hypothesis.token_ids
        assert set(first[hypothesis.num_tokens :]) <= {PAD}
        lengths.add(hypothesis.num_tokens)
    assert len(lengths) > 1, "captions that end at different steps are wanted here"


def test_its_own_caption_is_predicted_and_what_follows_its_end_is_not(talkative):
    memory = memory_of(talkative, 4)
    captions = talkative.caption(memory, Decoding(beam_size=1, max_length=12, allow_unk=True))
    for i, (hypothesis,) in enumerate(captions):
        assert hypothesis.finished
        words = list(hypothesis.token_ids[:-1])
        image = memory.select(torch.tensor([i]))
        own = accuracy_sums(talkative, image, collate([[words]], 20))
        assert float(own.free_running_hits_B) == float(own.teacher_forced_hits_B) == len(words) + 1
        longer = accuracy_sums(talkative, image, collate([[[*words, 4, 5, 6]]], 20))
        assert len(words) <= float(longer.free_running_hits_B) <= len(words) + 1
        assert float(longer.num_tokens_B) == len(words) + 4


def test_top_k_hits():
    scores = torch.tensor([[0.1, 0.9, 0.5], [3.0, 2.0, 1.0]])
    assert top_k_hits(scores, torch.tensor([2, 2]), 2).tolist() == [True, False]
    assert top_k_hits(scores, torch.tensor([2, 2]), 5).tolist() == [True, True]


def test_figures_of_sums():
    figures = accuracy_figures(np.array([[2 * np.log(3), 1, 0, 2], [0.0, 4, 2, 4]]))
    assert figures["perplexity"].tolist() == pytest.approx([3, 1])
    assert figures["teacher_forced_top5_accuracy"].tolist() == [0.5, 1]
    assert figures["free_running_top5_accuracy"].tolist() == [0, 0.5]
