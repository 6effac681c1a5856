"""Self-critical sequence training: the captioner draws captions, and those that score above their image's others become
likelier.

Rennie, Marcheret, Mroueh, Ross, Goel (2017), *Self-Critical Sequence Training for Image Captioning*; the baseline of each
drawn caption is the mean reward of the others of its image (Luo 2020, arXiv 2003.09971). ``<end>`` counts as a word of
captions, references and document frequencies: without it fragments score well (Hu et al. 2023, arXiv 2305.12254).

Axes: B images, K drawn captions of an image, T steps, N running captions or scored tokens, H state, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch.nn import functional

from capray.config import TrainConfig
from capray.metrics import DocumentFrequencies, Reward
from capray.model.beam import NEVER
from capray.model.captioner import Captioner
from capray.model.decoder import Memory, State
from capray.model.loss import BANNED, Batch, doubly_stochastic
from capray.training.stages.base import Counts, Sums
from capray.vocabulary import END, PAD, START


class SelfCritical:
    """``num_samples`` captions of up to ``max_length`` tokens are drawn for each image, and scored by ``reward``."""

    figure = "reward"

    def __init__(self, reward: Reward, num_samples: int, max_length: int):
        self.reward = reward
        self.num_samples = num_samples
        self.max_length = max_length

    @classmethod
    def prepare(cls, config: TrainConfig, captions: Sequence[Sequence[Sequence[int]]]) -> Self:
        frequencies = DocumentFrequencies.of([(*words, END) for words in image if words] for image in captions)
        return cls(Reward(frequencies, config.bleu_reward_weight), config.samples_per_image, config.max_length)

    def count(self, batch: Batch) -> Counts:
        num_captions = self.num_samples * int(_has_captions(batch).sum())
        return Counts(num_captions, num_captions)

    def loss(self, captioner: Captioner, memory: Memory, batch: Batch, epoch: int) -> Sums:
        shape = len(batch.lengths_BK), self.num_samples, self.max_length
        mask_BKTH = captioner.decoder.dropout_mask(*shape)
        drawn = draw(captioner, memory, _has_captions(batch), shape, mask_BKTH)
        rewards_BK = self.rewards(drawn, batch)
        return policy_sums(captioner, memory, drawn, rewards_BK, mask_BKTH)

    def scheduled(self, epoch: int) -> dict[str, float]:
        return {}

    def rewards(self, drawn: Batch, batch: Batch) -> torch.Tensor:
        """The reward of each caption of ``drawn`` against the captions ``batch`` has of its image; 0 where it has none."""
        scores = [
            self.reward(captions, [words for words in references if words]) if any(references) else [0.0] * len(captions)
            for captions, references in zip(_targets(drawn), _targets(batch), strict=True)
        ]
        return torch.tensor(scores, device=drawn.lengths_BK.device)


def _has_captions(batch: Batch) -> torch.Tensor:
    return (batch.lengths_BK > 0).any(1)


def _targets(batch: Batch) -> list[list[tuple[int, ...]]]:
    """The captions of each image, ``<end>`` included where they end."""
    images = zip(batch.targets_BKT.tolist(), batch.lengths_BK.tolist(), strict=True)
    return [
        [tuple(tokens[:length]) for tokens, length in zip(captions, lengths, strict=True)] for captions, lengths in images
    ]


@torch.no_grad()
def draw(
    captioner: Captioner,
    memory: Memory,
    wanted_B: torch.Tensor,
    shape: tuple[int, int, int],
    dropout_mask_BKTH: torch.Tensor | None = None,
) -> Batch:
    """Captions drawn from what the captioner gives each word after those before, as a batch to learn from; ``<unk>`` is
    never drawn. Images that are not ``wanted_B`` get captions of length 0.

    Args:
        shape: images, captions of each, and most tokens.
        dropout_mask_BKTH: see ``Decoder.dropout_mask``.
    """
    decoder = captioner.decoder
    num_images, num_captions, max_length = shape
    weights = decoder.weights()
    banned = torch.tensor(BANNED, device=wanted_B.device)
    tokens_BKT = torch.full(shape, PAD, device=wanted_B.device)
    tokens = tokens_BKT.flatten(0, 1)
    (place_N,) = wanted_B.repeat_interleave(num_captions).nonzero(as_tuple=True)
    state = State(*(part.flatten(0, 1)[place_N] for part in decoder.start(memory, num_captions)))
    state = state._replace(hidden_BKH=state.hidden_BKH.to(weights.state_OH.dtype))
    last_N = torch.full_like(place_N, START)
    for t in range(max_length):
        if not len(place_N):
            break
        words_NG = functional.linear(decoder.embedding(last_N), weights.words_GE, weights.bias_G)
        attend = decoder.attend_at(memory, place_N // num_captions, place_N % num_captions, [num_images, num_captions])
        state, _, _ = decoder.advance(words_NG, weights.bias_O, state, weights, attend)
        mask_NH = None if dropout_mask_BKTH is None else dropout_mask_BKTH.flatten(0, 1)[place_N, t]
        scores_NV = decoder.logits(state.hidden_BKH, mask_NH).float().index_fill(1, banned, NEVER)
        last_N = scores_NV.softmax(1).multinomial(1)[:, 0]
        tokens[place_N, t] = last_N
        goes_on_N = last_N != END
        place_N, last_N = place_N[goes_on_N], last_N[goes_on_N]
        state = State(*(part[goes_on_N] for part in state))
    torch.clear_autocast_cache()  # It holds casts of the weights now that would pass no gradient on.
    lengths_BK = (tokens_BKT != PAD).sum(2)
    targets_BKT = tokens_BKT[..., : max(1, int(lengths_BK.max()))]
    return Batch(functional.pad(targets_BKT[..., :-1], (1, 0), value=START), targets_BKT, lengths_BK)


def policy_sums(
    captioner: Captioner,
    memory: Memory,
    drawn: Batch,
    rewards_BK: torch.Tensor,
    dropout_mask_BKTH: torch.Tensor | None = None,
) -> Sums:
    """The sums whose gradient is REINFORCE's for captions drawn under ``dropout_mask_BKTH``: each one's log-probability,
    times how far the mean reward of the others of its image is above its own."""
    num_captions = rewards_BK.shape[1]
    others_BK = (rewards_BK.sum(1, keepdim=True) - rewards_BK) / (num_captions - 1)
    disadvantage_BK = others_BK - rewards_BK
    states_BKTH, alpha_BKTP = captioner(memory, drawn.inputs_BKT, drawn.lengths_BK)
    scored_BKT = torch.arange(drawn.inputs_BKT.shape[-1], device=rewards_BK.device) < drawn.lengths_BK[..., None]
    mask_NH = None if dropout_mask_BKTH is None else dropout_mask_BKTH[:, :, : scored_BKT.shape[-1]][scored_BKT]
    scores_NV = captioner.decoder.logits(states_BKTH[scored_BKT], mask_NH).float()
    scores_NV = scores_NV.index_fill(1, torch.tensor(BANNED, device=scores_NV.device), NEVER)
    log_probs_N = -functional.cross_entropy(scores_NV, drawn.targets_BKT[scored_BKT], reduction="none")
    objective = (disadvantage_BK[..., None].expand(scored_BKT.shape)[scored_BKT] * log_probs_N).sum()
    return Sums(objective, rewards_BK.sum(), doubly_stochastic(alpha_BKTP, drawn.lengths_BK))
