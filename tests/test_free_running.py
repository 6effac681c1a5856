"""The decoder is given the reference's words or its own, and learns from both."""

import math

import pytest
import torch

from capray.config import Architecture, ScheduledSampling
from capray.model.captioner import Captioner, autocast
from capray.model.loss import collate, loss_sums
from capray.training.stages.free_running import FreeRunning, feed_own_words, teacher_forcing_ratio
from capray.vocabulary import START, Vocabulary
from tests.conftest import TINY
from tests.test_loss import memory_of

BATCH = collate([[[4, 5, 6, 7, 8], [9, 10]], [[11, 4, 5]]], 20)


@pytest.fixture
def captioner() -> Captioner:
    torch.manual_seed(0)
    captioner = Captioner(Architecture(**TINY), Vocabulary([f"w{i}" for i in range(12)])).eval()
    with torch.no_grad():
        captioner.decoder.output.weight.mul_(10)
    return captioner


def test_a_ratio_of_one_gives_the_references(captioner):
    assert feed_own_words(captioner, memory_of(captioner, 2), BATCH, 1.0) is BATCH


def test_a_ratio_of_none_gives_the_likeliest_word_after_the_own_words_before(captioner):
    memory = memory_of(captioner, 2)
    fed = feed_own_words(captioner, memory, BATCH, 0.0)
    assert (fed.inputs_BKT[..., 0] == BATCH.inputs_BKT[..., 0]).all()
    assert torch.equal(fed.targets_BKT, BATCH.targets_BKT) and torch.equal(fed.lengths_BK, BATCH.lengths_BK)
    with torch.no_grad():
        states, _ = captioner(memory, fed.inputs_BKT, fed.lengths_BK)
        own = captioner.decoder.logits(states).argmax(-1)
    for image, caption in ((0, 0), (0, 1), (1, 0)):
        length = int(BATCH.lengths_BK[image, caption])
        assert torch.equal(fed.inputs_BKT[image, caption, 1:length], own[image, caption, : length - 1])
    assert not torch.equal(fed.inputs_BKT, BATCH.inputs_BKT)
    assert fed.inputs_BKT[0, 0, 0] == START


def test_a_ratio_between_keeps_that_share_of_the_references_words(captioner):
    many = collate([[[4, 5, 6, 7, 8] * 8] * 10] * 2, 50)
    torch.manual_seed(1)
    fed = feed_own_words(captioner, memory_of(captioner, 2), many, 0.7)
    free = feed_own_words(captioner, memory_of(captioner, 2), many, 0.0)
    changed = (fed.inputs_BKT != many.inputs_BKT)[..., 1:].float().mean()
    assert 0.1 < changed < 0.35 < (free.inputs_BKT != many.inputs_BKT)[..., 1:].float().mean()


def test_the_fed_words_are_the_likeliest_in_the_pass_that_learns_whatever_dropout_leaves(captioner):
    captioner.decoder.dropout.p = 0.5
    captioner.train()
    memory = memory_of(captioner, 2)
    mask = captioner.decoder.dropout_mask(*BATCH.inputs_BKT.shape)
    fed = feed_own_words(captioner, memory, BATCH, 0.0, mask)
    with torch.no_grad():
        states, _ = captioner(memory, fed.inputs_BKT, fed.lengths_BK)
        own, other = (captioner.decoder.logits(states, m).argmax(-1) for m in (mask, None))
    given = torch.arange(BATCH.inputs_BKT.shape[-1] - 1) < BATCH.lengths_BK[..., None] - 1
    assert torch.equal(fed.inputs_BKT[..., 1:][given], own[..., :-1][given])
    assert not torch.equal(own, other)


def test_the_stage_learns_under_the_dropout_it_chose_words_under(captioner):
    captioner.decoder.dropout.p = 0.5
    captioner.train()
    memory = memory_of(captioner, 2)
    torch.manual_seed(1)
    found = FreeRunning(ScheduledSampling(teacher_forcing_ratio=0), 0.0).loss(captioner, memory, BATCH, 0)
    torch.manual_seed(1)
    mask = captioner.decoder.dropout_mask(*BATCH.inputs_BKT.shape)
    fed = feed_own_words(captioner, memory, BATCH, 0.0, mask)
    assert torch.equal(found.figure, loss_sums(captioner, memory, fed, 0.0, mask).nll)
    assert not torch.equal(found.figure, loss_sums(captioner, memory, fed).nll)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_weight_of_the_decoder_learns_from_free_running(captioner, precision):
    captioner.train()
    with autocast("cpu", precision):
        memory = memory_of(captioner, 2)
        loss = loss_sums(captioner, memory, feed_own_words(captioner, memory, BATCH, 0.0)).objective
    loss.backward()
    for name, parameter in captioner.decoder.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) or name == "attention.energy.bias", name


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"teacher_forcing_ratio": 0.5}, [0.5, 0.5, 0.5]),
        ({"teacher_forcing_schedule": "linear", "teacher_forcing_decay": 0.3}, [1.0, 0.7, 0.4]),
        (
            {"teacher_forcing_schedule": "linear", "teacher_forcing_decay": 0.3, "min_teacher_forcing_ratio": 0.6},
            [1.0, 0.7, 0.6],
        ),
        ({"teacher_forcing_schedule": "exponential", "teacher_forcing_decay": 0.9}, [1.0, 0.9, 0.81]),
        (
            {"teacher_forcing_schedule": "inverse-sigmoid", "teacher_forcing_decay": 4.0},
            [4 / (4 + math.exp(e / 4)) for e in range(3)],
        ),
    ],
)
def test_courses_of_the_ratio(settings, expected):
    config = ScheduledSampling(**settings)
    assert [teacher_forcing_ratio(config, epoch) for epoch in range(3)] == pytest.approx(expected)
    assert config.min_teacher_forcing_ratio <= teacher_forcing_ratio(config, 100_000) <= expected[0]
