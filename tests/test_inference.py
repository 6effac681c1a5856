"""The captioner laid out for inference gives the captions of the captioner itself."""

import time

import numpy as np
import pytest
import torch

from capray.config import Decoding
from capray.inference import Inference, _Graphs
from capray.model.attention import LARGEST_EXPONENT
from capray.model.beam import beam_search
from capray.model.captioner import NO_CAPTION
from capray.model.loss import collate
from tests.test_captioner import VARIANTS, images, make

DECODING = Decoding(beam_size=3, max_length=8)


def agree(found, expected):
    assert [[h.caption for h in image] for image in found] == [[h.caption for h in image] for image in expected]
    for image, other in zip(found, expected, strict=True):
        assert [h.log_prob for h in image] == pytest.approx([h.log_prob for h in other], abs=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_captions_are_those_of_the_captioner(variant):
    captioner = make(**VARIANTS[variant])
    pixels = images(5)
    outcomes = Inference(captioner)(list(pixels.numpy()), DECODING)
    agree([outcome.hypotheses for outcome in outcomes], captioner.caption(captioner.encode(pixels), DECODING))


@pytest.mark.parametrize("pool", [8, 7, 2])
def test_the_native_grid_gives_the_captions_of_the_pooled_one(pool):
    captioner = make(pool_grid=pool)
    pixels = images(4)
    inference = Inference(captioner)
    outcomes = inference(list(pixels.numpy()), DECODING, attention=True)
    memory = captioner.encode(pixels)
    expected = captioner.caption(memory, DECODING)
    agree([outcome.hypotheses for outcome in outcomes], expected)
    weights = captioner.attend(memory, [image[0].token_ids for image in expected])
    for outcome, alpha_TP in zip(outcomes, weights, strict=True):
        torch.testing.assert_close(torch.tensor(outcome.attention), alpha_TP, atol=1e-4, rtol=1e-4)


def test_images_of_different_sizes_together():
    captioner = make(resize="keep-aspect", pool_grid=4)
    arrays = [images(1, seed=i)[0].numpy()[:, : 16 + 16 * (i % 2)] for i in range(4)]
    inference = Inference(captioner)
    together = inference(arrays, DECODING, attention=True)
    for array, outcome in zip(arrays, together, strict=True):
        (alone,) = inference([array], DECODING)
        agree([outcome.hypotheses], [alone.hypotheses])
    for part, other in zip(inference.memory(arrays), captioner.encode_all(arrays), strict=True):
        torch.testing.assert_close(part, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("where", ["grid", "query"])
def test_attention_beyond_the_exponentials_is_the_sigmoids(where):
    captioner = make()
    with torch.no_grad():
        getattr(captioner.decoder.attention, where).weight.mul_(200)
    memory = captioner.encode(images(3))
    query_BKA = captioner.decoder.attention.query(torch.randn(3, 2, 32).tanh())
    attention = captioner.decoder.attention
    keys = attention.search_keys(memory.keys_BPA)
    assert keys.exponential == (where == "query")
    assert max(float(memory.keys_BPA.abs().max()), 2 * float(query_BKA.abs().max())) > LARGEST_EXPONENT
    with torch.no_grad():
        expected = attention.scores(memory.keys_BPA, query_BKA)
        torch.testing.assert_close(attention.search_scores(keys, query_BKA), expected, atol=1e-4, rtol=1e-4)


def test_a_batch_without_memory_is_halved(monkeypatch):
    inference = Inference(make())
    arrays = list(images(5).numpy())
    expected = inference(arrays, DECODING)
    together, sizes = inference._together, []

    def scarce(images, decoding, attention):
        sizes.append(len(images))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("no memory")
        return together(images, decoding, attention)

    monkeypatch.setattr(inference, "_together", scarce)
    agree([o.hypotheses for o in inference(arrays, DECODING)], [o.hypotheses for o in expected])
    assert sizes == [5, 3, 2, 1, 2]


def test_one_image_that_fails_spares_the_others(monkeypatch):
    inference = Inference(make())
    arrays = list(images(3).numpy())
    arrays[1] = np.zeros_like(arrays[1])
    together = inference._together

    def choosy(images, decoding, attention):
        if any((image == 0).all() for image in images):
            raise RuntimeError("black")
        return together(images, decoding, attention)

    monkeypatch.setattr(inference, "_together", choosy)
    assert [outcome.error for outcome in inference(arrays, DECODING)] == [None, "RuntimeError: black", None]


def test_no_finite_probability_is_told():
    captioner = make()
    with torch.no_grad():
        captioner.decoder.output.bias.fill_(float("nan"))
    (outcome,) = Inference(captioner)(list(images(1).numpy()), DECODING)
    assert outcome.error == NO_CAPTION


def test_bf16_captions_and_leaves_the_captioner_as_it_was():
    captioner = make()
    before = {name: value.clone() for name, value in captioner.state_dict().items()}
    outcomes = Inference(captioner, "bf16")(list(images(3).numpy()), DECODING, attention=True)
    assert all(outcome.hypotheses for outcome in outcomes)
    assert all(torch.equal(value, before[name]) for name, value in captioner.state_dict().items())


def test_explained_is_the_best_caption_with_its_probabilities():
    captioner = make()
    array = images(1)[0].numpy()
    found = Inference(captioner).explained(array, DECODING)
    assert float(found.log_probs_T.sum()) == pytest.approx(found.hypothesis.log_prob, abs=1e-4)
    assert found.attention_TP.shape == (found.hypothesis.num_tokens, 16)


def test_the_memory_is_the_captioners():
    captioner = make(encoder="resnet18", size=64)
    pixels = images(3, side=64)
    batch = collate([[[4, 5]], [[6]], [[7, 8]]], max_words=10)
    memory = Inference(captioner).memory(list(pixels.numpy()))
    with torch.no_grad():
        found, _ = captioner(memory, batch.inputs_BKT, batch.lengths_BK)
        expected, _ = captioner(captioner.encode(pixels), batch.inputs_BKT, batch.lengths_BK)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


class Recorded:
    """In the place of CUDA graphs, on a CPU: the same results, and how many batches were under way at once."""

    under_way = most = 0

    def __init__(self, encoder, decoder, architecture, batches):
        self.parts, self.batches = (encoder, decoder, architecture), batches

    def __call__(self, images):
        encoder, decoder, architecture = self.parts
        Recorded.under_way += 1
        Recorded.most = max(Recorded.most, Recorded.under_way)
        time.sleep(0.1)
        grid = encoder(torch.from_numpy(np.stack(images)), architecture)
        start = decoder.start(decoder.memory_of_grids([grid], architecture.pool_grid))
        beams = beam_search(decoder.next_scores, start, len(images), self.batches.decoding)
        Recorded.under_way -= 1
        return beams


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr("capray.inference.GraphedSearch", Recorded)
    monkeypatch.setattr(Recorded, "most", 0)
    inference = Inference(make(), batch_size=4)
    inference._graphs = _Graphs(inference)
    return inference


def test_batches_whose_graphs_are_recorded_are_captioned_beside_each_other(recorded):
    arrays = list(images(30).numpy())
    found = recorded(arrays, DECODING)
    assert Recorded.most > 1
    agree([o.hypotheses for o in found], [o.hypotheses for o in Inference(make())(arrays, DECODING)])
    Recorded.most = 0
    recorded(arrays[:4], DECODING)
    assert Recorded.most == 1
    recorded(arrays[:16], DECODING, attention=True)
    assert Recorded.most == 1


def test_graphs_give_way_to_batches_that_need_their_memory(recorded, monkeypatch):
    arrays = list(images(16).numpy())
    expected = recorded(arrays, DECODING)
    assert recorded._graphs.keep_memory
    search = recorded._search

    def short(batch, decoding):
        if recorded._graphs.keep_memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return search(batch, decoding)

    monkeypatch.setattr(recorded, "_search", short)
    with pytest.warns(UserWarning, match="other batches need their memory"):
        (alone,) = recorded(arrays[:1], DECODING, attention=True)
    assert alone.error is None and alone.hypotheses[0].caption == expected[0].hypotheses[0].caption
    assert all(outcome.error is None for outcome in recorded(arrays, DECODING))
    assert not recorded._graphs.keep_memory
