"""The loss as sums over ragged captions."""

import numpy as np
import pytest
import torch

from capray.config import Architecture
from capray.model.captioner import Captioner
from capray.model.loss import collate, loss_sums
from capray.vocabulary import END, PAD, START, UNK, Vocabulary
from tests.conftest import TINY

RAGGED = [[[4, 5, 6], [7], [8, 9, 10, 11, 4]], [[5]], [[6, 7], [4, 4, 4]]]


@pytest.fixture
def captioner():
    torch.manual_seed(0)
    return Captioner(Architecture(**TINY), Vocabulary([f"w{i}" for i in range(10)])).eval()


def memory_of(captioner, count=3):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return captioner.encode(torch.from_numpy(pixels))


def test_collate_sorts_shifts_and_pads():
    batch = collate([[[7], [4, 5, 6]], [[8, 9]]], max_words=10)
    assert batch.inputs_BKT.tolist() == [
        [[START, 4, 5, 6], [START, 7, END, PAD]],
        [[START, 8, 9, END], [PAD, PAD, PAD, PAD]],
    ]
    assert batch.targets_BKT[0, 0].tolist() == [4, 5, 6, END]
    assert batch.targets_BKT[0, 1].tolist()[:2] == [7, END]
    assert batch.lengths_BK.tolist() == [[4, 2], [3, 0]]
    assert (batch.num_tokens, batch.num_captions) == (9, 3)


def test_a_cut_caption_is_not_scored_on_its_end():
    batch = collate([[[4, 5, 6, 7]]], max_words=2)
    assert batch.targets_BKT.tolist() == [[[4, 5]]]


def test_ragged_captions_sum_as_each_alone(captioner):
    memory = memory_of(captioner)
    together = loss_sums(captioner, memory, collate(RAGGED, 10), label_smoothing=0.1)
    alone = [
        loss_sums(captioner, memory.select(torch.tensor([i])), collate([[caption]], 10), label_smoothing=0.1)
        for i, image in enumerate(RAGGED)
        for caption in image
    ]
    for name in together._fields:
        expected = sum(getattr(part, name) for part in alone)
        torch.testing.assert_close(getattr(together, name), expected, atol=1e-4, rtol=1e-4)


def test_label_smoothing_spreads_over_the_emittable_tokens(captioner):
    memory, batch = memory_of(captioner, 1), collate([[[4, 5]]], 10)
    states, _ = captioner(memory, batch.inputs_BKT, batch.lengths_BK)
    log_probs = captioner.decoder.logits(states)[0, 0].log_softmax(-1)
    expected = 0.0
    for t, target in enumerate((4, 5, END)):
        weights = torch.full((len(captioner.vocabulary),), 0.2 / (len(captioner.vocabulary) - 3))
        weights[[PAD, START, UNK]] = 0.0
        weights[target] += 0.8
        expected -= (weights * log_probs[t]).sum()
    torch.testing.assert_close(loss_sums(captioner, memory, batch, 0.2).objective, expected)


def test_the_regulariser_is_the_doubly_stochastic_term(captioner):
    memory, batch = memory_of(captioner, 1), collate([[[4, 5]]], 10)
    _, alpha = captioner(memory, batch.inputs_BKT, batch.lengths_BK)
    expected = ((1 - alpha[0, 0, :3].sum(0)) ** 2).mean()
    torch.testing.assert_close(loss_sums(captioner, memory, batch).regulariser, expected)
    torch.testing.assert_close(alpha[0, 0].sum(-1), torch.ones(3))
