"""Beam search, batched over images and beams on the device. Knows nothing of LSTMs or images: only of a function
that gives the next token's log-probabilities.

Axes: B searches (images), K beams, V vocabulary, T tokens so far.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import torch

from capray.config import Decoding
from capray.vocabulary import END, PAD, START, UNK

NEVER = float("-inf")


class Selectable(Protocol):
    def select(self, beams_BK: torch.Tensor) -> Selectable: ...


S = TypeVar("S", bound=Selectable)
NextLogProbs = Callable[[torch.Tensor, S], tuple[torch.Tensor, S]]
"""(last tokens (B, K), state) -> (log-probabilities of the next token (B, K, V), new state)."""


class Beams(NamedTuple):
    """The ``n_best`` hypotheses of each search, best first, on the CPU.

    A hypothesis that never was (a search with fewer possible captions than asked for) has ``num_tokens`` 0 and
    ``log_prob`` -inf.
    """

    tokens_BNT: torch.Tensor
    num_tokens_BN: torch.Tensor
    log_prob_BN: torch.Tensor
    score_BN: torch.Tensor
    finished_BN: torch.Tensor


@torch.inference_mode()
def beam_search(next_log_probs: NextLogProbs, state: S, num_searches: int, decoding: Decoding, device=None) -> Beams:
    """The best token sequences of ``num_searches`` searches.

    ``log_prob`` sums the log-probabilities ``next_log_probs`` gives to the emitted tokens, ``<end>`` included; bans
    (``<pad>``, ``<start>``, by default ``<unk>``, repeated n-grams, ``<end>`` before ``min_length``) mask the choice and
    do not renormalise. Hypotheses are ranked by ``log_prob / num_tokens ** length_penalty``, ties by the lower token id,
    then the better parent. A finished hypothesis keeps its slot at its score. The search ends early only when no live
    beam can still enter the ``n_best``; one that never ends is returned unfinished. Where bans leave a beam no token at
    all, ``<end>`` is allowed.

    Args:
        next_log_probs: see NextLogProbs; called with K = 1 at first, then with K = ``beam_size``.
        state: what it carries, with one beam per search; ``select`` reorders it along the beams.
    """
    beam_size, n_best = decoding.beam_size, decoding.n_best or decoding.beam_size
    banned = [PAD, START] if decoding.allow_unk else [PAD, START, UNK]
    tokens_BKT = torch.full((num_searches, 1, 0), PAD, dtype=torch.long, device=device)
    log_prob_BK = torch.zeros(num_searches, 1, device=device)
    score_BK = torch.zeros(num_searches, 1, device=device)
    length_BK = torch.zeros(num_searches, 1, dtype=torch.long, device=device)
    finished_BK = torch.zeros(num_searches, 1, dtype=torch.bool, device=device)
    last_BK = torch.full((num_searches, 1), START, device=device)

    for t in range(decoding.max_length):
        step_BKV, state = next_log_probs(last_BK, state)
        step_BKV = step_BKV.float()
        vocabulary_size = step_BKV.shape[-1]
        total_BKV = log_prob_BK[..., None] + step_BKV
        candidate_BKV = total_BKV / (t + 1) ** decoding.length_penalty
        allowed_BKV = _allowed(tokens_BKT, step_BKV.shape, banned, decoding)
        candidate_BKV = candidate_BKV.masked_fill(~allowed_BKV, NEVER)
        # A finished hypothesis goes on as itself, in the place of its <end>.
        candidate_BKV = candidate_BKV.masked_fill(finished_BK[..., None], NEVER)
        candidate_BKV[..., END] = torch.where(finished_BK, score_BK, candidate_BKV[..., END])

        # Candidates laid out by token, then by parent, and sorted stably: a tie goes to the lower token id.
        flat = candidate_BKV.transpose(1, 2).flatten(1)
        score_BK, index_BK = _top(flat, beam_size)
        num_parents = step_BKV.shape[1]
        token_BK, parent_BK = index_BK // num_parents, index_BK % num_parents

        was_finished_BK = finished_BK.gather(1, parent_BK)
        dead_BK = score_BK == NEVER
        flat_total = total_BKV.flatten(1).gather(1, parent_BK * vocabulary_size + token_BK)
        log_prob_BK = torch.where(was_finished_BK, log_prob_BK.gather(1, parent_BK), flat_total)
        log_prob_BK = log_prob_BK.masked_fill(dead_BK, NEVER)
        length_BK = length_BK.gather(1, parent_BK) + (~was_finished_BK).long()
        length_BK = length_BK.masked_fill(dead_BK, 0)
        history_BKT = tokens_BKT.gather(1, parent_BK[..., None].expand(-1, -1, t))
        last_BK = torch.where(was_finished_BK | dead_BK, PAD, token_BK)
        tokens_BKT = torch.cat([history_BKT, last_BK[..., None]], -1)
        finished_BK = was_finished_BK | (token_BK == END) | dead_BK
        state = state.select(parent_BK)
        if _settled(score_BK, log_prob_BK, finished_BK, n_best, decoding).all():
            break

    return Beams(
        tokens_BKT[:, :n_best].cpu(),
        length_BK[:, :n_best].cpu(),
        log_prob_BK[:, :n_best].cpu(),
        score_BK[:, :n_best].cpu(),
        (finished_BK & (score_BK != NEVER))[:, :n_best].cpu(),
    )


def _top(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` best along the last axis, ties to the lower index, padded with -inf where there are fewer.

    ``topk`` breaks ties at will, so it only finds the threshold; the few that reach it are sorted stably.
    """
    available = min(count, scores.shape[-1])
    threshold = scores.topk(available, -1).values[..., -1:]
    above = scores > threshold
    ties = scores == threshold
    wanted_ties = available - above.sum(-1, keepdim=True)
    keep = above | (ties & (ties.cumsum(-1) <= wanted_ties))
    index = keep.nonzero()[:, -1].view(*scores.shape[:-1], available)
    values, order = scores.gather(-1, index).sort(dim=-1, descending=True, stable=True)
    index = index.gather(-1, order)
    if available < count:
        values = torch.nn.functional.pad(values, (0, count - available), value=NEVER)
        index = torch.nn.functional.pad(index, (0, count - available))
    return values, index


def _allowed(tokens_BKT: torch.Tensor, shape: torch.Size, banned: list[int], decoding: Decoding) -> torch.Tensor:
    """Which tokens (B, K, V) each beam may emit next."""
    allowed_BKV = torch.ones(shape, dtype=torch.bool, device=tokens_BKT.device)
    allowed_BKV[..., banned] = False
    length = tokens_BKT.shape[-1]
    if length < decoding.min_length:
        allowed_BKV[..., END] = False
    n = decoding.no_repeat_ngram
    if n and length >= n:
        windows_BKWn = tokens_BKT.unfold(-1, n, 1)
        tail_BKn = tokens_BKT[..., length - n + 1 :]
        repeats_BKW = (windows_BKWn[..., :-1] == tail_BKn[:, :, None]).all(-1)
        hits_BKV = torch.zeros(shape, dtype=torch.long, device=tokens_BKT.device)
        hits_BKV.scatter_add_(-1, windows_BKWn[..., -1], repeats_BKW.long())
        allowed_BKV &= hits_BKV == 0
    stuck_BK = ~allowed_BKV.any(-1)
    allowed_BKV[..., END] |= stuck_BK
    return allowed_BKV


def _settled(
    score_BK: torch.Tensor, log_prob_BK: torch.Tensor, finished_BK: torch.Tensor, n_best: int, decoding: Decoding
) -> torch.Tensor:
    """Whether the ``n_best`` of each search (B,) are finished and no live beam can reach them any more.

    A live beam's log_prob only falls and its length only grows, so log_prob / max_length ** length_penalty bounds
    every score it can still get.
    """
    bound_BK = log_prob_BK / decoding.max_length**decoding.length_penalty
    best_live_B = bound_BK.masked_fill(finished_BK, NEVER).amax(1)
    worst_kept_B = score_BK[:, :n_best].amin(1)
    overtakes_B = (best_live_B >= worst_kept_B) & (best_live_B > NEVER)
    return finished_BK[:, :n_best].all(1) & ~overtakes_B
