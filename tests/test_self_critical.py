"""Self-critical training: captions are drawn, scored and learnt from as the papers have it."""

import random
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capray.config import Architecture, ReportConfig, TrainConfig
from capray.datasets.samples import read_captions
from capray.errors import ConfigError
from capray.metrics import Corpus, DocumentFrequencies, Reward, cider_d
from capray.metrics.bleu import SentenceBleu
from capray.model.captioner import Captioner, autocast
from capray.model.checkpoint import load_captioner, save_captioner
from capray.model.loss import BANNED, Batch, collate
from capray.report.training_report import report_training
from capray.training.job import train
from capray.training.stages import SelfCritical, prepare_stage
from capray.training.stages.self_critical import draw, policy_sums
from capray.training.worker import empty_batch
from capray.vocabulary import END, PAD, START, UNK, Vocabulary, tokenise
from tests.conftest import TINY, in_process
from tests.test_loss import memory_of

CAPTIONS = [[[4, 5, 6, 7], [4, 8, 6, 7]], [[9, 10], [9, 11, 10]], [[4, 12, 13, 14, 15]]]
"""Word ids of three images' captions."""
CONFIG = TrainConfig(samples="s", output="o", stage="self_critical", init_from="c", max_length=8, samples_per_image=4)
BATCH = collate(CAPTIONS, 20)
EVERY_IMAGE = torch.ones(3, dtype=torch.bool)


@pytest.fixture
def captioner() -> Captioner:
    torch.manual_seed(0)
    captioner = Captioner(Architecture(**TINY | {"output_dropout": 0.5}), Vocabulary([f"w{i}" for i in range(14)]))
    with torch.no_grad():
        captioner.decoder.output.weight.mul_(10)
        captioner.decoder.output.bias[UNK] = 5.0
    return captioner.train()


def stage(**changes) -> SelfCritical:
    found = prepare_stage(CONFIG.model_copy(update=changes), CAPTIONS)
    assert isinstance(found, SelfCritical)
    return found


def captions_of(batch: Batch) -> list[list[int]]:
    rows = zip(batch.targets_BKT.flatten(0, 1).tolist(), batch.lengths_BK.flatten().tolist(), strict=True)
    return [tokens[:length] for tokens, length in rows]


class TestTheReward:
    def reward(self, bleu_weight=0.0) -> Reward:
        return Reward(DocumentFrequencies.of(self.images()), bleu_weight)

    def images(self) -> list[list[tuple[str, ...]]]:
        rng, words = (
            random.Random(0),
            ["a", "man", "in", "red", "shirt", "rides", "brown", "horse", "on", "the", "beach", "near", "two", "dogs"],
        )
        return [[(*rng.sample(words, 9), "<end>") for _ in range(5)] for _ in range(200)]

    @pytest.mark.parametrize("bleu_weight", [0.0, 1.0])
    def test_a_reference_outscores_itself_with_a_content_word_replaced_by_an_unseen_one(self, bleu_weight):
        reward, references = self.reward(bleu_weight), self.images()[0]
        for caption in references:
            for i in range(len(caption) - 1):
                whole, changed = reward([caption, (*caption[:i], "unseen", *caption[i + 1 :])], references)
                assert whole > changed

    @pytest.mark.parametrize("bleu_weight", [0.0, 1.0])
    def test_a_fragment_scores_lower_than_the_whole(self, bleu_weight):
        """Cut anywhere, whether it says that it ends there or not."""
        reward, references = self.reward(bleu_weight), self.images()[0]
        for caption in references:
            for length in range(1, len(caption)):
                whole, cut, ended = reward([caption, caption[:length], (*caption[: length - 1], "<end>")], references)
                assert whole > cut and (whole > ended or length == len(caption))

    def test_it_is_the_metric_of_the_captions_with_their_ends(self):
        images = self.images()
        captions = [image[0] for image in images[1:]]
        corpus = Corpus(images[:-1], captions)
        frequencies = DocumentFrequencies.of(images)
        scores = [Reward(frequencies, 0.0)([c], r)[0] for c, r in zip(captions, images, strict=False)]
        assert np.mean(scores) == pytest.approx(cider_d(corpus, frequencies).figures()["cider_d"])

    @pytest.mark.filterwarnings("ignore::UserWarning")
    @settings(deadline=None)
    @given(st.lists(st.lists(st.sampled_from("abcd"), min_size=1), min_size=2, max_size=4))
    def test_its_bleu_is_nltks(self, captions):
        from nltk.translate.bleu_score import sentence_bleu

        words, *references = captions
        assert SentenceBleu(references).score(words) == pytest.approx(sentence_bleu(references, words), abs=1e-9)

    def test_it_is_fast(self):
        """5 captions for each image; far above the 0.1 ms it takes by itself, for a machine that does other things too."""
        reward, images = self.reward(bleu_weight=1.0), self.images()
        started = time.process_time()
        for captions, references in zip(images[1:], images, strict=False):
            reward(captions, references)
        assert (time.process_time() - started) / (5 * len(images)) < 1e-3


class TestDrawing:
    def test_captions_hold_no_banned_token_and_nothing_after_their_end(self, captioner):
        drawn = draw(captioner, memory_of(captioner), EVERY_IMAGE, (3, 50, 8))
        found = captions_of(drawn)
        assert len(found) == 150
        for caption in found:
            assert not set(caption) & set(BANNED)
            assert END not in caption[:-1] and (caption[-1] == END or len(caption) == 8)
        assert {len(caption) for caption in found} > {1, 8}
        assert (drawn.inputs_BKT[..., 0] == START).all()
        assert torch.equal(drawn.inputs_BKT[..., 1:], drawn.targets_BKT[..., :-1])

    def test_words_come_as_often_as_they_are_likely(self, captioner):
        captioner.eval()
        memory = memory_of(captioner)
        drawn = draw(captioner, memory, EVERY_IMAGE, (3, 4000, 1))
        states, _ = captioner(memory, torch.full((3, 1, 1), START), torch.ones(3, 1, dtype=torch.long))
        scores = captioner.decoder.logits(states)[:, 0, 0]
        scores[:, BANNED] = float("-inf")
        for image, wanted in zip(drawn.targets_BKT[..., 0], scores.softmax(-1), strict=True):
            found = torch.bincount(image, minlength=len(wanted)) / 4000
            torch.testing.assert_close(found, wanted, atol=0.03, rtol=0)

    def test_images_without_captions_get_none(self, captioner):
        drawn = draw(captioner, memory_of(captioner), torch.tensor([True, False, True]), (3, 4, 8))
        assert drawn.lengths_BK[1].tolist() == [0] * 4 and (drawn.targets_BKT[1] == PAD).all()
        assert (drawn.lengths_BK[[0, 2]] > 0).all()


def gradients(captioner, sums) -> dict[str, torch.Tensor]:
    captioner.zero_grad()
    sums.objective.backward(retain_graph=True)
    return {name: p.grad.clone() for name, p in captioner.decoder.named_parameters() if p.grad is not None}


class TestThePolicyGradient:
    def test_is_each_captions_log_probability_times_its_advantage_over_the_others(self, captioner):
        """Of the same dropout, <unk> banned in the softmax too, written out step by step."""
        memory = memory_of(captioner)
        mask = captioner.decoder.dropout_mask(3, 4, 8)
        drawn = draw(captioner, memory, EVERY_IMAGE, (3, 4, 8), mask)
        rewards = torch.rand(3, 4)
        found = gradients(captioner, policy_sums(captioner, memory, drawn, rewards, mask))

        decoder, log_probs = captioner.decoder, torch.zeros(3, 4)
        state = decoder.start(memory, 4)
        for t in range(drawn.inputs_BKT.shape[-1]):
            state, _ = decoder.step(decoder.embedding(drawn.inputs_BKT[..., t]), state, memory)
            scores = decoder.logits(state.hidden_BKH, mask[:, :, t])
            scores = scores.index_fill(-1, torch.tensor(BANNED), float("-inf"))
            chosen = scores.log_softmax(-1).gather(-1, drawn.targets_BKT[..., t, None])[..., 0]
            log_probs = log_probs + torch.where(drawn.lengths_BK > t, chosen, 0.0)
        others = torch.stack([rewards[:, [j for j in range(4) if j != k]].mean(1) for k in range(4)], 1)
        captioner.zero_grad()
        (-(rewards - others) * log_probs).sum().backward()
        for name, parameter in captioner.decoder.named_parameters():
            if name in found:
                torch.testing.assert_close(found[name], parameter.grad, atol=1e-4, rtol=1e-3, msg=name)

    def test_equal_rewards_give_none(self, captioner):
        memory = memory_of(captioner)
        drawn = draw(captioner, memory, EVERY_IMAGE, (3, 4, 8))
        rewards = torch.tensor([[2.0], [0.0], [0.7]]).expand(3, 4)
        for name, gradient in gradients(captioner, policy_sums(captioner, memory, drawn, rewards)).items():
            assert gradient.abs().max() < 1e-5, name

    def test_images_sum_as_each_alone(self, captioner):
        captioner.eval()
        memory = memory_of(captioner)
        drawn = draw(captioner, memory, EVERY_IMAGE, (3, 4, 8))
        rewards = torch.rand(3, 4)
        whole = policy_sums(captioner, memory, drawn, rewards)
        for name in whole._fields:
            parts = [
                policy_sums(captioner, memory.select(i), Batch(*(part[i] for part in drawn)), rewards[i])
                for i in torch.arange(3)[:, None]
            ]
            expected = sum(getattr(part, name) for part in parts)
            torch.testing.assert_close(getattr(whole, name), expected, atol=1e-4, rtol=1e-4)


class TestTheStage:
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_every_weight_of_the_decoder_learns(self, captioner, precision):
        with autocast("cpu", precision):
            sums = stage().loss(captioner, memory_of(captioner), BATCH, 0)
        sums.objective.backward()
        for name, parameter in captioner.decoder.named_parameters():
            assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) or name == "attention.energy.bias", name

    def test_rewards_are_of_the_images_own_captions(self, captioner):
        found = stage().rewards(BATCH, BATCH)
        others = stage().rewards(BATCH, Batch(*(part.roll(1, 0) for part in BATCH)))
        assert (found[BATCH.lengths_BK > 0] > 2).all() and (others < 1).all()

    def test_a_batch_of_nothing_counts_and_moves_nothing(self, captioner):
        pixels, batch = empty_batch(captioner)
        assert stage().count(batch) == (0, 0)
        assert stage().count(BATCH) == (12, 12)
        sums = stage().loss(captioner, captioner.encode_all(pixels), batch, 0)
        assert all(float(part.detach()) == 0 for part in sums)
        assert all(gradient.abs().sum() == 0 for gradient in gradients(captioner, sums).values())

    def test_the_reward_rises(self, captioner):
        """Captions of three images, learnt from the reward alone."""
        captioner.decoder.dropout.p = 0.0
        with torch.no_grad():
            captioner.decoder.output.weight.mul_(0.1)
        optimizer = torch.optim.Adam(captioner.decoder.parameters(), 1e-2)
        learning, memory, rewards = stage(samples_per_image=20), memory_of(captioner), []
        for _ in range(100):
            sums = learning.loss(captioner, memory, BATCH, 0)
            optimizer.zero_grad()
            (sums.objective / 60).backward(retain_graph=True)
            optimizer.step()
            rewards.append(float(sums.figure) / 60)
        assert np.mean(rewards[-10:]) > 3 * np.mean(rewards[:10])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_from": None}, "needs init_from"),
        ({"captions_per_image": "1"}, "needs captions_per_image all"),
        ({"teacher_forcing_ratio": 0.5}, "leave them out"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.create({**CONFIG.model_dump(exclude_unset=True), **settings})


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("ray_cluster")
def test_a_captioner_is_trained_from_cached_features(samples, tmp_path):
    words = Vocabulary.build(tokenise(c) for image in read_captions(samples, "train").captions for c in image)
    torch.manual_seed(0)
    first = Captioner(Architecture(**TINY), words)
    save_captioner(first, str(tmp_path / "first"))
    settings = {"max_length": 12, "beam_size": 2, "batch_size": 40, "learning_rate": 1e-3, "select_by": "cider_d"}
    config = TrainConfig(
        samples=samples,
        output=str(tmp_path / "out"),
        init_from=str(tmp_path / "first"),
        stage="self_critical",
        bleu_reward_weight=0.5,
        epochs=2,
        cpus_per_worker=1,
        tracking_uri="none",
        **settings,
    )
    with in_process():
        metrics = train(config).metrics
    for epoch in metrics:
        assert 0 < epoch["train_reward"] < 10.5 and epoch["train_images"] == 48
        assert "train_loss" not in epoch and 0 <= epoch["cider_d"] <= 10
    trained, _ = load_captioner(str(tmp_path / "out" / "last"))
    changed = {name: not torch.equal(value, first.state_dict()[name]) for name, value in trained.state_dict().items()}
    assert changed["decoder.output.weight"] and not any(changed[name] for name in changed if name.startswith("encoder."))
    said = report_training(ReportConfig(training=config.output, html=str(tmp_path / "report.html")))
    assert said.endswith("2 epochs, 6 samples")
