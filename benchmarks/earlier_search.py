"""Beam search as it was in version 0.1, the reference of `beam.py`: it masks and sorts all beams' whole vocabularies
together, and attends by the sigmoid over the pooled grid.

Axes: B images, K beams, V vocabulary, T tokens so far.
"""

from __future__ import annotations

import torch

from capray.config import Decoding
from capray.model.captioner import Captioner
from capray.model.decoder import Memory, State
from capray.vocabulary import END, PAD, START, UNK

NEVER = float("-inf")


@torch.inference_mode()
def earlier_search(captioner: Captioner, memory: Memory, decoding: Decoding) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens (B, K, T) and scores (B, K) of each image's beams, best first."""
    decoder, num_images = captioner.decoder, len(memory.grid_BPD)
    weights, state = decoder.weights(), decoder.start(memory, 1)
    tokens_BKT = torch.full((num_images, 1, 0), PAD)
    log_prob_BK = score_BK = torch.zeros(num_images, 1)
    finished_BK = torch.zeros(num_images, 1, dtype=torch.bool)
    last_BK = torch.full((num_images, 1), START)
    for t in range(decoding.max_length):
        state, _ = decoder.step(decoder.embedding(last_BK), state, memory, weights)
        step_BKV = decoder.logits(state.hidden_BKH).float().log_softmax(-1).nan_to_num(nan=NEVER)
        total_BKV = log_prob_BK[..., None] + step_BKV
        allowed_BKV = torch.ones(step_BKV.shape, dtype=torch.bool)
        allowed_BKV[..., [PAD, START, UNK]] = False
        allowed_BKV[..., END] |= ~allowed_BKV.any(-1)
        candidate_BKV = (total_BKV / (t + 1) ** decoding.length_penalty).masked_fill(~allowed_BKV, NEVER)
        candidate_BKV = candidate_BKV.masked_fill(finished_BK[..., None], NEVER)
        candidate_BKV[..., END] = torch.where(finished_BK, score_BK, candidate_BKV[..., END])
        score_BK, index_BK = _top(candidate_BKV.transpose(1, 2).flatten(1), decoding.beam_size)
        token_BK, parent_BK = index_BK // step_BKV.shape[1], index_BK % step_BKV.shape[1]
        was_finished_BK = finished_BK.gather(1, parent_BK)
        flat_total = total_BKV.flatten(1).gather(1, parent_BK * step_BKV.shape[-1] + token_BK)
        log_prob_BK = torch.where(was_finished_BK, log_prob_BK.gather(1, parent_BK), flat_total)
        last_BK = token_BK.masked_fill(was_finished_BK, PAD)
        history_BKT = tokens_BKT.gather(1, parent_BK[..., None].expand(-1, -1, t))
        tokens_BKT = torch.cat([history_BKT, last_BK[..., None]], -1)
        finished_BK = was_finished_BK | (token_BK == END)
        index_BKH = parent_BK[..., None].expand(-1, -1, state.hidden_BKH.shape[-1])
        state = State(*(part.gather(1, index_BKH) for part in state))
        bound_BK = log_prob_BK / decoding.max_length**decoding.length_penalty
        overtakes_B = bound_BK.masked_fill(finished_BK, NEVER).amax(1) >= score_BK.amin(1)
        if (finished_BK.all(1) & ~overtakes_B).all():
            break
    return tokens_BKT, score_BK


def _top(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    threshold = scores.topk(count, -1).values[..., -1:]
    above, ties = scores > threshold, scores == threshold
    keep = above | (ties & (ties.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
    index = keep.nonzero()[:, -1].view(*scores.shape[:-1], count)
    values, order = scores.gather(-1, index).sort(dim=-1, descending=True, stable=True)
    return values, index.gather(-1, order)
