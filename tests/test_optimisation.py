"""Steps, schedules and averages; a state saved and loaded goes on exactly."""

import io
import math

import pytest
import torch

from capray.config import Architecture, Optimisation, TrainConfig
from capray.model.captioner import Captioner
from capray.training.optimisation import Optimiser, steps_per_epoch
from capray.vocabulary import Vocabulary
from tests.conftest import TINY


def make(num_steps=20, **settings) -> tuple[Captioner, Optimiser]:
    torch.manual_seed(0)
    captioner = Captioner(Architecture(**TINY), Vocabulary(["a", "b"]), fine_tune_from="layer4")
    return captioner, Optimiser(captioner, Optimisation(**settings), num_steps)


def go(optimiser: Optimiser, epochs: range, seed: int = 0) -> None:
    """Two steps an epoch along gradients that depend on the epoch, and a metric that stops improving after epoch 1."""
    for epoch in epochs:
        for step in range(2):
            generator = torch.Generator().manual_seed(seed + 10 * epoch + step)
            for parameter in optimiser.parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimiser.step()
        optimiser.keep_weights()
        optimiser.end_epoch({"bleu_4": min(epoch, 1) / 10, "val_loss": 3.0})


def rates(optimiser: Optimiser, num_epochs: int) -> list[float]:
    found = []
    for epoch in range(num_epochs):
        found.append(optimiser.learning_rate)
        go(optimiser, range(epoch, epoch + 1))
    return found


VARIANTS = {
    "adam": {},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1, "schedule": "step", "schedule_epochs": 2},
    "rmsprop": {"optimizer": "rmsprop", "momentum": 0.5, "schedule": "plateau", "schedule_epochs": 2},
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "schedule": "cosine", "warmup_steps": 3, "clip": "value"},
    "average": {"ema_decay": 0.9, "clip": "none"},
    "epochs": {"average_epochs": 4},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_going_on_from_a_saved_state_is_as_never_stopping(variant):
    whole, optimiser = make(**VARIANTS[variant])
    go(optimiser, range(6))
    first, before = make(**VARIANTS[variant])
    go(before, range(3))
    saved = io.BytesIO()
    torch.save([first.state_dict(), before.state_dict()], saved)
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    second, after = make(**VARIANTS[variant])
    second.load_state_dict(weights)
    after.load_state_dict(state)
    go(after, range(3, 6))
    assert after.learning_rate == optimiser.learning_rate
    with optimiser.averaged(), after.averaged():
        for (name, expected), found in zip(whole.named_parameters(), second.parameters(), strict=True):
            assert torch.equal(expected, found), name


def test_each_optimizer_steps_otherwise():
    ends = []
    for name in ("adam", "adamw", "rmsprop", "sgd"):
        captioner, optimiser = make(optimizer=name, weight_decay=0.1)
        go(optimiser, range(1))
        ends.append(captioner.decoder.output.weight.sum().item())
    assert len(set(ends)) == 4


def test_the_encoder_has_its_own_rate_and_frozen_blocks_none():
    captioner, optimiser = make(learning_rate=1e-2, encoder_learning_rate=1e-3)
    decoder, encoder = optimiser.optimizer.param_groups
    assert (decoder["lr"], encoder["lr"]) == (1e-2, 1e-3)
    assert {id(p) for p in encoder["params"]} == {id(p) for p in captioner.encoder.backbone.layer4.parameters()}


def test_the_rate_is_cut_every_so_many_epochs():
    _, optimiser = make(learning_rate=1.0, schedule="step", schedule_epochs=3, schedule_factor=0.5)
    assert rates(optimiser, 7) == [1, 1, 1, 0.5, 0.5, 0.5, 0.25]


@pytest.mark.parametrize(("metric", "expected"), [("bleu_4", [1, 1, 1, 1, 0.5, 0.5, 0.25]), ("val_loss", None)])
def test_the_rate_is_cut_after_so_many_epochs_without_a_gain(metric, expected):
    """BLEU-4 last improves in epoch 1, the loss in epoch 0."""
    settings = {"schedule": "plateau", "schedule_epochs": 2, "schedule_factor": 0.5, "schedule_metric": metric}
    _, optimiser = make(learning_rate=1.0, **settings)
    assert rates(optimiser, 7) == (expected or [1, 1, 1, 0.5, 0.5, 0.25, 0.25])


def rates_of_steps(optimiser, count):
    """The learning rate before each of the next ``count`` steps, which are made."""
    found = []
    for _ in range(count):
        found.append(optimiser.learning_rate)
        optimiser.step()
    return found


def test_the_cosine_rises_in_a_line_falls_to_nothing_and_stays_there():
    _, optimiser = make(num_steps=10, learning_rate=1.0, schedule="cosine", warmup_steps=4)
    found = rates_of_steps(optimiser, 14)
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[7] == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert found[5:10] == sorted(found[5:10], reverse=True)
    assert found[10:] == pytest.approx([0] * 4, abs=1e-9)


def test_steps_that_are_made_again_have_their_rates_again():
    _, optimiser = make(num_steps=10, learning_rate=1.0, schedule="cosine", warmup_steps=4)
    before = rates_of_steps(optimiser, 6)
    optimiser.set_back(3)
    assert rates_of_steps(optimiser, 3) == before[3:]


def test_the_average_follows_the_weights_and_gives_way_to_them():
    captioner, optimiser = make(ema_decay=0.25)
    weight = captioner.decoder.output.weight
    expected = None
    for epoch in range(5):
        for parameter in optimiser.parameters:
            parameter.grad = torch.full_like(parameter, epoch + 1.0)
        optimiser.step()
        own = weight.detach().clone()
        decay = min(0.25, (1 + epoch) / (10 + epoch))
        expected = own if expected is None else decay * expected + (1 - decay) * own
    with optimiser.averaged():
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(weight, own) and not torch.equal(own, expected)


def test_the_mean_is_of_the_last_epochs():
    captioner, optimiser = make(average_epochs=2)
    weight, ends = captioner.decoder.output.weight, []
    for epoch in range(3):
        go(optimiser, range(epoch, epoch + 1))
        ends.append(weight.detach().clone())
    with optimiser.averaged():
        torch.testing.assert_close(weight.detach(), (ends[1] + ends[2]) / 2)
    assert torch.equal(weight, ends[2])


@pytest.mark.parametrize(
    ("settings", "num_captions", "expected"),
    [
        ({"batch_size": 32}, 5, math.ceil(100 / 6)),
        ({"batch_size": 32, "captions_per_image": "1"}, 1, math.ceil(100 / 32)),
        ({"batch_size": 32, "accumulate_batches": 2}, 1, 2),
        ({"batch_size": 2}, 5, 100),
        ({"batch_size": 32, "captions_per_image": "1", "epoch": "pairs"}, 5, math.ceil(500 / 32)),
        ({"batch_size": 33, "captions_per_image": "1", "accumulate_batches": 2}, 1, 2),
    ],
)
def test_steps_of_an_epoch(settings, num_captions, expected):
    config = TrainConfig(samples="s", output="o", **settings)
    assert steps_per_epoch(100, 100 * num_captions, config, num_workers=1) == expected
