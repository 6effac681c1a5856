"""The mean of two captioners."""

import re

import pytest
import torch

from capray.cli import run
from capray.config import Architecture
from capray.model.captioner import Captioner
from capray.model.checkpoint import load_captioner, save_captioner
from capray.vocabulary import Vocabulary
from tests.test_captioner import TINY

WORDS = ("a", "dog", "runs")


def saved(folder, seed: int, words=WORDS, **changes) -> str:
    torch.manual_seed(seed)
    save_captioner(Captioner(Architecture(**TINY | {"encoder": "mobilenet_v2"} | changes), Vocabulary(words)), str(folder))
    return str(folder)


def test_the_weights_lie_between(tmp_path, capsys):
    one, other, mean = saved(tmp_path / "one", 0), saved(tmp_path / "other", 1), str(tmp_path / "mean")
    assert run(["average", one, other, mean, "--share", "0.25"]) == 0
    assert f"wrote {mean} (model_id " in capsys.readouterr().out
    states = [load_captioner(folder)[0].state_dict() for folder in (one, other, mean)]
    for name, value in states[2].items():
        expected = 0.75 * states[0][name] + 0.25 * states[1][name]
        torch.testing.assert_close(value, expected.to(value.dtype), msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dim": 24}, r"differ in hidden_dim \d+ and 24"),
        ({"words": ("a", "cat", "runs")}, "differ in the words they know"),
    ],
)
def test_those_that_have_no_mean(tmp_path, capsys, changes, message):
    pair = saved(tmp_path / "one", 0), saved(tmp_path / "other", 1, **changes)
    assert run(["average", *pair, str(tmp_path / "mean")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "mean").exists()


def test_an_output_that_is_not_empty(tmp_path, capsys):
    one, other = saved(tmp_path / "one", 0), saved(tmp_path / "other", 1)
    assert run(["average", one, other, one]) == 2
    assert "not empty" in capsys.readouterr().err
