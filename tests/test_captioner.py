"""The captioner: one step for all uses, one encoding per image, frozen means frozen."""

import numpy as np
import pytest
import torch

from capray.config import Architecture, Decoding
from capray.errors import CheckpointError, ConfigError
from capray.images import normalise
from capray.model.captioner import Captioner, autocast
from capray.model.encoder import Encoder
from capray.model.loss import collate
from capray.vocabulary import END, START, Vocabulary
from tests.conftest import TINY

VOCABULARY = Vocabulary([f"w{i}" for i in range(12)])
VARIANTS = {
    "additive": {},
    "relu": {"attention_activation": "relu", "gate": False},
    "general": {"attention": "multiplicative"},
    "concat": {"attention": "multiplicative", "multiplicative_score": "concat"},
    "dot": {"attention": "multiplicative", "multiplicative_score": "dot", "hidden_dim": 128},
    "none": {"attention": "none"},
    "gru": {"cell": "gru"},
    "linear-start": {"initial_state": "linear"},
    "none-gru": {"attention": "none", "cell": "gru"},
    "pooled": {"pool_grid": 7},
    "pooled-down": {"pool_grid": 2},
    "projected": {"grid_projection": 24},
    "projected-none": {"grid_projection": 24, "attention": "none"},
    "projected-pooled": {"grid_projection": 24, "pool_grid": 7},
    "tied": {"tie_embeddings": True},
}


def make(seed=0, **changes) -> Captioner:
    torch.manual_seed(seed)
    captioner = Captioner(Architecture(**{**TINY, **changes}), VOCABULARY).eval()
    with torch.no_grad():
        captioner.decoder.output.weight.mul_(10)
    return captioner


def images(count, side=32, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


@pytest.mark.parametrize("variant", VARIANTS)
def test_teacher_forced_and_step_by_step_logits_agree(variant):
    captioner = make(**VARIANTS[variant])
    captions = [[[4, 5, 6, 7], [8, 9]], [[10, 11, 4], [5]]]
    batch = collate(captions, max_words=10)
    with torch.no_grad():
        memory = captioner.encode(images(2))
        states, _ = captioner(memory, batch.inputs_BKT, batch.lengths_BK)
        forced = captioner.decoder.logits(states)
        state = captioner.decoder.start(memory, 2)
        for t in range(batch.inputs_BKT.shape[-1]):
            words = captioner.decoder.embedding(batch.inputs_BKT[..., t])
            state, _ = captioner.decoder.step(words, state, memory)
            live = batch.lengths_BK > t
            stepped = captioner.decoder.logits(state.hidden_BKH)
            torch.testing.assert_close(forced[:, :, t][live], stepped[live], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["additive", "none"])
def test_the_cell_stays_in_fp32_under_bf16(variant):
    captioner = make(**VARIANTS[variant])
    decoder = captioner.decoder
    batch = collate([[[4, 5, 6, 7]] * 2] * 2, max_words=10)
    with torch.no_grad(), autocast("cpu", "bf16"):
        memory = captioner.encode(images(2))
        state = decoder.start(memory, 2)
        for t in range(4):
            state, _ = decoder.step(decoder.embedding(batch.inputs_BKT[..., t]), state, memory)
            assert (state.hidden_BKH.dtype, state.cell_BKH.dtype) == (torch.bfloat16, torch.float32)
        states, _ = captioner(memory, batch.inputs_BKT, batch.lengths_BK)
    torch.testing.assert_close(states[:, :, 3], state.hidden_BKH, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("variant", ["additive", "relu", "gru", "none", "none-gru"])
def test_a_step_is_that_of_torchs_cell(variant):
    captioner = make(**VARIANTS[variant])
    decoder = captioner.decoder
    with torch.no_grad():
        memory = captioner.encode(images(2))
        state = decoder.start(memory, 1)
        hidden, cell = state.hidden_BKH[:, 0], state.cell_BKH[:, 0]
        inputs = words = decoder.embedding(torch.tensor([5, 9]))
        if decoder.attention is not None:
            energy = memory.grid_BPD @ decoder.attention.grid.weight.T + decoder.attention.grid.bias
            energy = energy + decoder.attention.query(hidden)[:, None]
            energy = torch.relu(energy) if variant == "relu" else torch.tanh(energy)
            alpha = decoder.attention.energy(energy).softmax(1)
            context = (alpha * memory.grid_BPD).sum(1)
            inputs = torch.cat([words, context if decoder.gate is None else decoder.gate(hidden).sigmoid() * context], 1)
        expected = decoder.cell(inputs, (hidden, cell) if decoder.is_lstm else hidden)
        found, _ = decoder.step(words[:, None], state, memory)
    expected = expected if decoder.is_lstm else (expected, expected)
    for part, other in zip(found, expected, strict=True):
        torch.testing.assert_close(part[:, 0], other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_teacher_forcing_gives_the_gradients_of_repeated_steps(variant):
    captions = [[[4, 5, 6, 7], [8, 9]], [[10, 11, 4], [5]], [[6]]]
    batch = collate(captions, max_words=10)
    gradients = []
    for forced in (True, False):
        captioner = make(**VARIANTS[variant]).train()
        memory = captioner.encode(images(3))
        if forced:
            states, alpha = captioner(memory, batch.inputs_BKT, batch.lengths_BK)
        else:
            state, steps = captioner.decoder.start(memory, 2), []
            for t in range(batch.inputs_BKT.shape[-1]):
                words = captioner.decoder.embedding(batch.inputs_BKT[..., t])
                state, alpha_BKP = captioner.decoder.step(words, state, memory)
                steps.append((state.hidden_BKH, alpha_BKP))
            states, alpha = (torch.stack(parts, 2) for parts in zip(*steps, strict=True))
        scored = torch.arange(states.shape[2]) < batch.lengths_BK[..., None]
        (captioner.decoder.logits(states[scored]).log_softmax(-1)[:, 5].sum() + (alpha[scored] ** 2).sum()).backward()
        gradients.append({name: p.grad for name, p in captioner.decoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-4, rtol=1e-3, msg=name)


def test_kept_grids_give_the_memory_of_their_images():
    captioner = make(pool_grid=3)
    with torch.no_grad():
        grids = captioner.encoder(normalise(images(3), captioner.architecture)).half().numpy()
        kept, fresh = captioner.encode_all(list(grids)), captioner.encode_all(list(images(3).numpy()))
    for part, other in zip(kept, fresh, strict=True):
        torch.testing.assert_close(part, other, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_image_alone_and_in_a_batch_gets_the_same_captions(variant):
    captioner = make(**VARIANTS[variant])
    pixels, decoding = images(5), Decoding(beam_size=3, max_length=8)
    together = captioner.caption(captioner.encode(pixels), decoding)
    for i in range(5):
        (alone,) = captioner.caption(captioner.encode(pixels[i : i + 1]), decoding)
        assert [h.caption for h in alone] == [h.caption for h in together[i]]
        assert [h.log_prob for h in alone] == pytest.approx([h.log_prob for h in together[i]], abs=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_prob_is_the_teacher_forced_one_of_the_caption(variant):
    captioner = make(**VARIANTS[variant])
    memory = captioner.encode(images(3))
    for i, hypotheses in enumerate(captioner.caption(memory, Decoding(beam_size=4, max_length=6))):
        for hypothesis in hypotheses:
            ids = VOCABULARY.encode(hypothesis.caption.split())
            targets = [*ids, END] if hypothesis.finished else ids
            inputs = torch.tensor([[[START, *targets[:-1]]]])
            with torch.no_grad():
                states, _ = captioner(memory.select(torch.tensor([i])), inputs, torch.tensor([[len(targets)]]))
                log_probs = captioner.decoder.logits(states)[0, 0].log_softmax(-1)
            expected = sum(log_probs[t, token].item() for t, token in enumerate(targets))
            assert hypothesis.num_tokens == len(targets)
            assert hypothesis.log_prob == pytest.approx(expected, abs=1e-4)
            assert hypothesis.score == pytest.approx(expected / len(targets) ** 0.9, abs=1e-4)


def test_beam_of_one_is_greedy():
    captioner = make()
    memory = captioner.encode(images(4))
    found = captioner.caption(memory, Decoding(beam_size=1, max_length=6, allow_unk=True))
    with torch.no_grad():
        for i in range(4):
            one = memory.select(torch.tensor([i]))
            state, token, tokens = captioner.decoder.start(one, 1), START, []
            while len(tokens) < 6 and token != END:
                words = captioner.decoder.embedding(torch.tensor([[token]]))
                state, _ = captioner.decoder.step(words, state, one)
                logits = captioner.decoder.logits(state.hidden_BKH)[0, 0]
                logits[:2] = float("-inf")
                token = int(logits.argmax())
                tokens.append(token)
            assert found[i][0].caption == " ".join(VOCABULARY.decode(tokens))


def test_pooling_after_projecting_equals_projecting_after_pooling():
    captioner = make(pool_grid=7)
    grid = torch.randn(2, captioner.encoder.dim, 4, 4)
    memory = captioner.memory_of_grid(grid)
    pooled = torch.nn.functional.adaptive_avg_pool2d(grid, 7).flatten(2).transpose(1, 2)
    torch.testing.assert_close(memory.grid_BPD, pooled)
    torch.testing.assert_close(memory.keys_BPA, captioner.decoder.attention.project(pooled), atol=1e-5, rtol=1e-4)


def test_images_of_different_sizes_are_captioned_together_as_alone():
    captioner = make(resize="keep-aspect", pool_grid=4)
    arrays = [images(1, seed=i)[0].numpy()[:, : 16 + 16 * (i % 2)] for i in range(4)]
    together = captioner.encode_all(arrays)
    for i, array in enumerate(arrays):
        alone = captioner.encode_all([array])
        torch.testing.assert_close(together.grid_BPD[i], alone.grid_BPD[0], atol=1e-5, rtol=1e-4)


def test_a_projected_grid_is_all_that_the_decoder_sees():
    captioner = make(grid_projection=24)
    assert captioner.encode(images(2)).grid_BPD.shape == (2, 16, 24)
    assert captioner.decoder.cell.weight_ih.shape[1] == TINY["embed_dim"] + 24


def test_tied_words_are_scored_by_their_embeddings():
    captioner = make(tie_embeddings=True)
    hidden = torch.randn(3, TINY["hidden_dim"])
    with torch.no_grad():
        captioner.decoder.words_bias_V.normal_()
        expected = captioner.decoder.output(hidden) @ captioner.decoder.embedding.weight.T
        torch.testing.assert_close(
            captioner.decoder.logits(hidden), expected + captioner.decoder.words_bias_V, atol=1e-5, rtol=1e-5
        )
    saved = sum(p.numel() for p in make().parameters()) - sum(p.numel() for p in captioner.parameters())
    width, words = TINY["embed_dim"], len(VOCABULARY)
    assert saved == TINY["hidden_dim"] * words - (TINY["hidden_dim"] * width + width)


def test_keep_aspect_without_pooling_is_refused():
    with pytest.raises(ValueError, match="pool_grid"):
        Architecture(**TINY, resize="keep-aspect")


def test_the_dot_score_with_unequal_widths_is_refused():
    with pytest.raises(ConfigError, match="--hidden-dim equal to the encoder's 128"):
        make(attention="multiplicative", multiplicative_score="dot")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
@pytest.mark.parametrize("fine_tune", [False, True])
def test_batchnorm_statistics_stay_fixed_and_frozen_blocks_get_no_gradient(name, fine_tune):
    first = {"resnet18": "layer4", "mobilenet_v2": "features.17"}[name] if fine_tune else None
    encoder = Encoder(name, fine_tune_from=first).train()
    before = {key: value.clone() for key, value in encoder.named_buffers()}
    grid = encoder(torch.randn(2, 3, 64, 64))
    if fine_tune:
        grid.sum().backward()
    assert grid.requires_grad == fine_tune
    for key, value in encoder.named_buffers():
        assert torch.equal(value, before[key]), key
    for key, parameter in encoder.named_parameters():
        tuned = fine_tune and key.startswith(f"backbone.{first}".replace("features.17", "features.17"))
        late = fine_tune and name == "mobilenet_v2" and key.startswith("backbone.features.18")
        assert (parameter.grad is not None) == (tuned or late), key


@pytest.mark.parametrize(("name", "message"), [("resnet5", "resnet"), ("vit_b_16", "no grid"), ("swin_t", "no grid")])
def test_encoders_without_a_grid_are_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        Encoder(name)


def test_an_unknown_block_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="layer3"):
        Encoder("resnet18", fine_tune_from="layer9")


class TestWeights:
    def test_a_file_of_weights_is_loaded_whatever_head_it_carries(self, tmp_path):
        import torchvision

        torch.manual_seed(3)
        network = torchvision.models.resnet18(weights=None)
        torch.save(network.state_dict(), tmp_path / "weights.pth")
        encoder = Encoder("resnet18", str(tmp_path / "weights.pth"))
        assert torch.equal(encoder.backbone.layer4[1].conv2.weight, network.layer4[1].conv2.weight)

    def test_weights_of_another_network_are_refused(self, tmp_path):
        torch.save({"layer": torch.zeros(2)}, tmp_path / "weights.pth")
        with pytest.raises(CheckpointError, match="do not fit the encoder"):
            Encoder("resnet18", str(tmp_path / "weights.pth"))

    def test_a_pickle_that_would_run_code_is_refused_and_not_run(self, tmp_path):
        torch.save({"weights": Trap(tmp_path / "ran")}, tmp_path / "weights.pth")
        with pytest.raises(CheckpointError, match="cannot read the weights"):
            Encoder("resnet18", str(tmp_path / "weights.pth"))
        assert not (tmp_path / "ran").exists()


class Trap:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")
