"""Triton's kernels give what torch gives. For Triton's interpreter, which runs them on the CPU (test_gpu_kernels.py)."""

import pytest
import torch

from capray.config import Decoding
from capray.model import gpu_kernels as kernels
from capray.model.attention import AdditiveAttention
from capray.model.beam import NEVER, Choice
from capray.vocabulary import END


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_words", [64, 130, 4100])
@pytest.mark.parametrize("may_end", [True, False])
def test_the_best_words_are_torchs(num_words, dtype, may_end):
    torch.manual_seed(num_words)
    scores_BKV = torch.randn(2, 3, num_words).to(dtype)
    scores_BKV[0, 0] = scores_BKV[0, 0].round()  # Ties, which go to the lower id.
    scores_BKV[0, 1, 1:] = NEVER  # Nothing is left but <end>.
    scores_BKV[1, 2, 5] = float("nan")  # No candidate is left.
    for beam_size in (1, 3, 5):
        choice = Choice(Decoding(beam_size=beam_size), None)
        expected, ids = choice.best_tokens(scores_BKV.clone(), None, may_end)
        banned = [*choice.banned_ids, *([] if may_end else [END])]
        found, found_ids = kernels.best_words(scores_BKV, beam_size, banned, END)
        found, expected = (part.nan_to_num(nan=NEVER, neginf=NEVER) for part in (found, expected))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        possible = expected > NEVER
        assert torch.equal(found_ids[possible], ids[possible])


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize(("num_positions", "dim"), [(7, 40), (49, 512)])
def test_the_scores_of_attention_are_torchs(activation, num_positions, dim):
    torch.manual_seed(0)
    attention = AdditiveAttention(24, 16, dim, activation).requires_grad_(False)
    keys_BPA, query_BKA = attention.project(torch.randn(2, num_positions, 24)), torch.randn(2, 5, dim)
    expected = attention.scores(keys_BPA, query_BKA) - attention.energy.bias
    weight_A = attention.energy.weight[0]
    found = kernels.additive_scores(keys_BPA, query_BKA, weight_A, attention.scale, activation == "relu")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
