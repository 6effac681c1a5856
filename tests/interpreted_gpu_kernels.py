"""Triton's kernels give what torch gives. For Triton's interpreter, which runs them on the CPU (test_gpu_kernels.py)."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, max_pool2d

from capray.config import Decoding, Preprocessing
from capray.images import normalise, statistics_of
from capray.model import fusing
from capray.model import gpu_kernels as kernels
from capray.model.attention import AdditiveAttention
from capray.model.beam import NEVER, Choice, Live
from capray.model.decoder import State
from capray.model.fusing import Patches
from capray.model.prepared import PreparedDecoder
from capray.vocabulary import END
from tests.test_captioner import images, make


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
    wider_BKA = torch.cat([torch.zeros(2, 5, 3), query_BKA], 2)[..., 3:]
    found = kernels.additive_scores(keys_BPA, wider_BKA, weight_A, attention.scale, activation == "relu")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("num_positions", "dim"), [(7, 40), (100, 200)])
def test_the_context_is_torchs(num_positions, dim, gated):
    torch.manual_seed(0)
    scores_BKP, grid_BPD = 3 * torch.randn(2, 5, num_positions), torch.randn(2, num_positions, dim)
    gate_ND = torch.randn(10, dim + 3)[:, 3:] if gated else None
    expected = (scores_BKP.softmax(-1) @ grid_BPD).flatten(0, 1)
    found = kernels.gated_context(scores_BKP, grid_BPD, gate_ND)
    torch.testing.assert_close(found, expected if gate_ND is None else expected * gate_ND.sigmoid(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["additive", "multiplicative", "none"])
@pytest.mark.parametrize("gate", [True, False])
@torch.inference_mode()
def test_a_step_of_the_decoder_is_torchs(attention, gate):
    captioner = make(attention=attention, gate=gate, embed_dim=20, hidden_dim=24)
    decoder = PreparedDecoder(captioner.decoder)
    memory = decoder.memory_of_grids([torch.randn(3, captioner.encoder.dim, 2, 2)], None)
    state = State(torch.randn(9, 24), torch.randn(9, 24))
    last_BK = torch.randint(4, 9, (3, 3))
    for found, expected in zip(
        decoder._advanced_by(kernels, last_BK, state, memory), decoder._advanced(last_BK, state, memory), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("decoding", [{}, {"beam_size": 1}, {"beam_size": 3, "length_penalty": 0.0, "min_length": 4}])
def test_the_beams_of_each_step_are_torchs(decoding):
    torch.manual_seed(0)
    choice = Choice(Decoding(max_length=6, **decoding), None)
    beam_size, num_images, num_words = choice.decoding.beam_size, 4, 12
    expected = Live.start(num_images, 6, None)
    for t in range(6):
        scores_BKV = torch.randn(num_images, expected.last_BK.shape[1], num_words)
        scores_BKV[0] = scores_BKV[0].round()  # Ties.
        scores_BKV[1, :, END] = 3  # Captions end.
        scores_BKV[2, 0] = float("nan")
        if t > 2:
            scores_BKV[3] = float("nan")
        words = choice.best_tokens(scores_BKV.clone(), None, t >= choice.decoding.min_length)
        before, (expected, parents_BK) = expected, choice(expected, scores_BKV.clone(), t)
        power = (t + 1) ** choice.decoding.length_penalty
        parts, found_parents_BK = kernels.next_beams(before, *words, beam_size, t, power)
        found, lives = Live(*parts), expected.score_BK > NEVER
        for name, part, other in zip(Live._fields, found, expected, strict=True):
            if name == "tokens_BKT":
                part, other = part[lives], other[lives]
            torch.testing.assert_close(part, other, msg=lambda text, name=name, t=t: f"{name} of step {t}: {text}")
        assert torch.equal(found_parents_BK[lives], parents_BK[lives])
        states = torch.randn(2, num_images, before.last_BK.shape[1], 5)
        index_BKH = parents_BK[..., None].expand(-1, -1, states.shape[-1])
        for part, state in zip(kernels.selected(*states, parents_BK), states, strict=True):
            assert torch.equal(part, state.gather(1, index_BKH))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patches", [Patches(), Patches(2, 7, 3, 16), Patches(4, 4, 0, 48)])
def test_the_patches_of_pixels_are_torchs(patches, dtype):
    pixels_BHW3, preprocessing = images(2, side=30)[:, 1:], Preprocessing()
    found = kernels.patches_of(pixels_BHW3, *statistics_of(preprocessing, pixels_BHW3.device), dtype, patches)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, patches.of(normalise(pixels_BHW3, preprocessing)).to(dtype))


@pytest.mark.parametrize("is_added", [True, False])
@pytest.mark.parametrize("limits", [(-math.inf, math.inf), (0.0, 6.0)])
def test_a_bias_a_sum_and_limits_are_torchs(limits, is_added):
    x, added = (3 * torch.randn(2, 12, 11, 9).to(memory_format=torch.channels_last) for _ in range(2))
    bias_C = torch.randn(12)
    x[1, 3, 2, 2] = math.nan
    expected = (x + bias_C[:, None, None] + (added if is_added else 0)).clamp(*limits)
    found = kernels.biased(x, bias_C, added if is_added else None, *limits)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_a_bias_stays_in_fp32():
    x, bias_C = torch.full((1, 2, 3, 3), -1000.0, dtype=torch.bfloat16), torch.tensor([1001.25, 1002.5])
    found = kernels.biased(x.contiguous(memory_format=torch.channels_last), bias_C, None, -math.inf, math.inf)
    assert found.dtype == torch.bfloat16
    assert found[0, :, 0, 0].tolist() == [1.25, 2.5] and found[0, :, 2, 2].tolist() == [1.25, 2.5]


def test_a_convolution_that_is_stretched_over_what_it_is_added_to(monkeypatch):
    monkeypatch.setattr(fusing, "kernels_of", lambda device: kernels)
    convolution = fusing.FusedConvolution(nn.Conv2d(8, 8, 1), 0.0, math.inf)
    x, added = torch.randn(2, 8, 1, 1), torch.randn(2, 8, 5, 5)
    with torch.inference_mode():
        expected = (conv2d(x, convolution.weight, convolution.bias) + added).relu()
        torch.testing.assert_close(convolution(x, added), expected)
        torch.testing.assert_close(convolution(added), conv2d(added, convolution.weight, convolution.bias).relu())


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1)])
def test_max_pooling_is_torchs(kernel, stride, padding):
    x = torch.randn(2, 70, 11, 8).to(memory_format=torch.channels_last)
    x[1, 3, 2, 2] = math.nan
    found = kernels.max_pooled(x, kernel, stride, padding)
    torch.testing.assert_close(found, max_pool2d(x, kernel, stride, padding), equal_nan=True)
