"""How well a captioner predicts reference captions, as sums per image: perplexity and top-5 accuracies.

Axes: B images, K captions of an image, T steps, N scored tokens, V vocabulary, C candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from capray.model.captioner import Captioner
from capray.model.decoder import Memory
from capray.model.loss import Batch
from capray.vocabulary import END, PAD, START

NUM_CANDIDATES = 5


class AccuracySums(NamedTuple):
    """Sums over the scored tokens of each image's references, ``<end>`` included: their negative log-likelihood (natural),
    how many are among the five likeliest when the words before are given (teacher forcing), how many when the captioner
    goes on from its own words (free running), and how many there are."""

    nll_B: torch.Tensor
    teacher_forced_hits_B: torch.Tensor
    free_running_hits_B: torch.Tensor
    num_tokens_B: torch.Tensor


def accuracy_figures(sums: np.ndarray) -> dict[str, np.ndarray]:
    """``perplexity``, exp(nll / tokens), and the two top-5 accuracies (0 to 1) from AccuracySums summed over images, of
    shape (…, 4)."""
    nll, teacher_forced, free_running, num_tokens = np.moveaxis(sums, -1, 0)
    return {
        "perplexity": np.exp(np.minimum(nll / num_tokens, 700)),
        "teacher_forced_top5_accuracy": teacher_forced / num_tokens,
        "free_running_top5_accuracy": free_running / num_tokens,
    }


@torch.inference_mode()
def accuracy_sums(captioner: Captioner, memory: Memory, batch: Batch) -> AccuracySums:
    """The sums for each image of ``batch``. The captioner must be in evaluation mode.

    The free-running caption is greedy. Its t-th step is compared with the t-th token of each reference; a reference's
    tokens past the end of the caption are misses.
    """
    assert not captioner.training, "accuracy needs the captioner in evaluation mode"
    states_BKTH, _ = captioner(memory, batch.inputs_BKT, batch.lengths_BK)
    steps = torch.arange(batch.inputs_BKT.shape[-1], device=batch.lengths_BK.device)
    scored_BKT = steps < batch.lengths_BK[..., None]
    targets_N = batch.targets_BKT[scored_BKT]
    log_probs_NV = captioner.decoder.logits(states_BKTH[scored_BKT]).float().log_softmax(-1)
    nll_N = -log_probs_NV.gather(1, targets_N[:, None])[:, 0]
    image_N = scored_BKT.nonzero()[:, 0]

    def per_image(values_N: torch.Tensor) -> torch.Tensor:
        sums_B = torch.zeros(len(scored_BKT), dtype=torch.float64, device=values_N.device)
        return sums_B.index_add_(0, image_N, values_N.double())

    running_BTC = free_running_candidates(captioner, memory, len(steps), NUM_CANDIDATES)
    running_hits_BKT = (running_BTC[:, None] == batch.targets_BKT[..., None]).any(-1)
    return AccuracySums(
        per_image(nll_N),
        per_image(top_k_hits(log_probs_NV, targets_N, NUM_CANDIDATES)),
        per_image(running_hits_BKT[scored_BKT]),
        per_image(torch.ones_like(nll_N)),
    )


def top_k_hits(scores_NV: torch.Tensor, targets_N: torch.Tensor, k: int) -> torch.Tensor:
    """Whether each target is among the ``k`` highest scores, (N,) bool; scores may be logits or log-probabilities."""
    return (scores_NV.topk(min(k, scores_NV.shape[-1]), -1).indices == targets_N[:, None]).any(-1)


@torch.inference_mode()
def free_running_candidates(captioner: Captioner, memory: Memory, num_steps: int, k: int) -> torch.Tensor:
    """The ``k`` likeliest tokens (B, T, C) at each step of each image's greedy caption, nothing banned; ``<pad>`` after
    its ``<end>``."""
    decoder = captioner.decoder
    num_images = len(memory.grid_BPD)
    weights = decoder.weights()
    state = decoder.start(memory, 1)
    last_B1 = torch.full((num_images, 1), START, device=memory.grid_BPD.device)
    has_ended_B1 = torch.zeros_like(last_B1, dtype=torch.bool)
    candidates = []
    for _ in range(num_steps):
        state, _ = decoder.step(decoder.embedding(last_B1), state, memory, weights)
        scores_BV = decoder.logits(state.hidden_BKH)[:, 0].float()
        best_BC = scores_BV.topk(min(k, scores_BV.shape[-1]), -1).indices
        candidates.append(best_BC.masked_fill(has_ended_B1, PAD))
        last_B1 = best_BC[:, :1]
        has_ended_B1 = has_ended_B1 | (last_B1 == END)
    return torch.stack(candidates, 1)
