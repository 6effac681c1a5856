"""Beam search, batched over images and beams on the device. Knows nothing of LSTMs or images: only of a function
that scores the next token.

Axes: B searches (images), K beams, V vocabulary, C best tokens of a beam, J candidates of a search (K x C), T tokens,
N rows of scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import torch

from capray.config import Decoding
from capray.vocabulary import END, PAD, START, UNK

NEVER = float("-inf")


class Searchable(Protocol):
    def select(self, beams_BK: torch.Tensor) -> Searchable: ...

    def keep(self, searches_B: torch.Tensor) -> Searchable: ...


S = TypeVar("S", bound=Searchable)
NextScores = Callable[[torch.Tensor, S], tuple[torch.Tensor, S]]
"""(last tokens (B, K), state) -> (unnormalised scores of the next token (B, K, V), which may be overwritten, new state)."""
GPU_STEPS = 4
"""Steps on a GPU between two looks at whether all searches are over: each look waits for the device."""


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
def beam_search(next_scores: NextScores, state: S, num_searches: int, decoding: Decoding, device=None) -> Beams:
    """The best token sequences of ``num_searches`` searches.

    ``log_prob`` sums the log-probabilities (the softmax of ``next_scores`` over the whole vocabulary) of the emitted tokens,
    ``<end>`` included; bans (``<pad>``, ``<start>``, by default ``<unk>``, repeated n-grams, ``<end>`` before
    ``min_length``) mask the choice and do not renormalise. Hypotheses are ranked by ``log_prob / num_tokens **
    length_penalty``, ties by the lower token id, then the better parent. A finished hypothesis keeps its slot at its
    score. A search ends early only when no live beam can still enter the ``n_best``; one that never ends is returned
    unfinished. Where bans leave a beam no token at all, ``<end>`` is allowed. On a CPU, searches that have ended leave the
    batch.

    Args:
        next_scores: see NextScores; called with K = 1 at first, then with K = ``beam_size``.
        state: what it carries, with one beam per search; ``select`` reorders it along the beams, ``keep`` leaves out
            searches.
    """
    n_best = decoding.n_best or decoding.beam_size
    on_cpu = torch.device(device or "cpu").type == "cpu"
    choice = _Choice(decoding, device)
    found = _Found.empty(num_searches, n_best, decoding.max_length, device)
    search_B = torch.arange(num_searches, device=device)
    beams = _Live.start(num_searches, decoding.max_length, device)

    for t in range(decoding.max_length):
        scores_BKV, state = next_scores(beams.last_BK, state)
        beams, parent_BK = choice(beams, scores_BKV, t)
        if t + 1 == decoding.max_length:
            break
        if on_cpu or t % GPU_STEPS == GPU_STEPS - 1:
            settled_B = beams.settled(n_best, decoding)
            num_settled = int(settled_B.sum())
            if num_settled == len(search_B):
                break
            if on_cpu and 8 * num_settled >= len(search_B):
                # On a GPU a batch that shrinks would cost more than it saves: its steps are launches, not arithmetic.
                found.take(search_B[settled_B], beams.keep(settled_B))
                (kept_B,) = (~settled_B).nonzero(as_tuple=True)
                search_B, beams, parent_BK, state = (
                    search_B[kept_B],
                    beams.keep(kept_B),
                    parent_BK[kept_B],
                    state.keep(kept_B),
                )
        state = state.select(parent_BK)

    found.take(search_B, beams)
    return found.beams()


class _Live(NamedTuple):
    """The hypotheses of the searches that still run. ``num_tokens`` counts to the ``<end>``; ``tokens`` are padded."""

    tokens_BKT: torch.Tensor
    log_prob_BK: torch.Tensor
    score_BK: torch.Tensor
    num_tokens_BK: torch.Tensor
    finished_BK: torch.Tensor
    last_BK: torch.Tensor

    @staticmethod
    def start(num_searches: int, max_length: int, device) -> _Live:
        return _Live(
            torch.full((num_searches, 1, max_length), PAD, device=device),
            torch.zeros(num_searches, 1, device=device),
            torch.zeros(num_searches, 1, device=device),
            torch.zeros(num_searches, 1, dtype=torch.long, device=device),
            torch.zeros(num_searches, 1, dtype=torch.bool, device=device),
            torch.full((num_searches, 1), START, device=device),
        )

    def keep(self, searches_B: torch.Tensor) -> _Live:
        return _Live(*(part[searches_B] for part in self))

    def settled(self, n_best: int, decoding: Decoding) -> torch.Tensor:
        """Whether the ``n_best`` of each search (B,) are finished and no live beam can reach them any more.

        A live beam's log_prob only falls and its length only grows, so log_prob / max_length ** length_penalty bounds
        every score it can still get.
        """
        bound_BK = self.log_prob_BK / decoding.max_length**decoding.length_penalty
        best_live_B = bound_BK.masked_fill(self.finished_BK, NEVER).amax(1)
        worst_kept_B = self.score_BK[:, :n_best].amin(1)
        overtakes_B = (best_live_B >= worst_kept_B) & (best_live_B > NEVER)
        return self.finished_BK[:, :n_best].all(1) & ~overtakes_B


class _Found(NamedTuple):
    """The results, filled as searches end."""

    tokens_BNT: torch.Tensor
    num_tokens_BN: torch.Tensor
    log_prob_BN: torch.Tensor
    score_BN: torch.Tensor
    finished_BN: torch.Tensor

    @staticmethod
    def empty(num_searches: int, n_best: int, max_length: int, device) -> _Found:
        shape = (num_searches, n_best)
        return _Found(
            torch.full((*shape, max_length), PAD, device=device),
            torch.zeros(shape, dtype=torch.long, device=device),
            torch.full(shape, NEVER, device=device),
            torch.full(shape, NEVER, device=device),
            torch.zeros(shape, dtype=torch.bool, device=device),
        )

    def take(self, search_B: torch.Tensor, beams: _Live) -> None:
        """Keep the best of ``beams`` as the results of the searches ``search_B``."""
        parts = (
            beams.tokens_BKT,
            beams.num_tokens_BK,
            beams.log_prob_BK,
            beams.score_BK,
            beams.finished_BK & (beams.score_BK != NEVER),
        )
        for mine, part in zip(self, parts, strict=True):
            mine[search_B] = part[:, : mine.shape[1]]

    def beams(self) -> Beams:
        return Beams(*(part.cpu() for part in self))


class _Choice:
    """Chooses the next beams: the best tokens of each beam first, then the best of those."""

    def __init__(self, decoding: Decoding, device):
        self.decoding = decoding
        banned = [PAD, START] if decoding.allow_unk else [PAD, START, UNK]
        self.banned = torch.tensor(banned, device=device)

    def __call__(self, beams: _Live, scores_BKV: torch.Tensor, t: int) -> tuple[_Live, torch.Tensor]:
        """The beams after step ``t`` (from 0), and which beam each comes from."""
        scores_BKV = scores_BKV.float()
        norm_BK = scores_BKV.logsumexp(-1)
        end_BK = scores_BKV[..., END].clone()
        may_be_stuck = self._ban(scores_BKV, beams.tokens_BKT, t)
        value_BKC, token_BKC = _top(scores_BKV, min(self.decoding.beam_size, scores_BKV.shape[-1]))
        if may_be_stuck:
            stuck_BK = (value_BKC == NEVER).all(-1)
            value_BKC[..., 0] = torch.where(stuck_BK, end_BK, value_BKC[..., 0])
            token_BKC[..., 0] = torch.where(stuck_BK, END, token_BKC[..., 0])

        # A beam without finite probabilities (NaN) has no candidates.
        total_BKC = beams.log_prob_BK[..., None] + (value_BKC - norm_BK[..., None])
        total_BKC = total_BKC.nan_to_num(nan=NEVER, posinf=NEVER, neginf=NEVER)
        candidate_BKC = total_BKC / (t + 1) ** self.decoding.length_penalty
        if t:
            # A finished hypothesis goes on as itself, in the place of its <end>.
            finished_BK = beams.finished_BK
            candidate_BKC.masked_fill_(finished_BK[..., None], NEVER)
            candidate_BKC[..., 0] = torch.where(finished_BK, beams.score_BK, candidate_BKC[..., 0])
            total_BKC[..., 0] = torch.where(finished_BK, beams.log_prob_BK, total_BKC[..., 0])
            token_BKC[..., 0] = torch.where(finished_BK, END, token_BKC[..., 0])
        return self._merged(beams, candidate_BKC, total_BKC, token_BKC, t)

    def _ban(self, scores_BKV: torch.Tensor, tokens_BKT: torch.Tensor, t: int) -> bool:
        """Take the tokens that may not follow out of ``scores_BKV``; whether a beam may have none left."""
        scores_BKV.index_fill_(-1, self.banned, NEVER)
        too_short = t < self.decoding.min_length
        if too_short:
            scores_BKV[..., END] = NEVER
        n = self.decoding.no_repeat_ngram
        if n and t >= n:
            windows_BKWn = tokens_BKT[..., :t].unfold(-1, n, 1)
            tail_BKn = tokens_BKT[..., t - n + 1 : t]
            repeats_BKW = (windows_BKWn[..., :-1] == tail_BKn[:, :, None]).all(-1)
            scores_BKV.scatter_(-1, windows_BKWn[..., -1].where(repeats_BKW, PAD), NEVER)
        return too_short or bool(n and t >= n) or scores_BKV.shape[-1] <= len(self.banned)

    def _merged(
        self, beams: _Live, candidate_BKC: torch.Tensor, total_BKC: torch.Tensor, token_BKC: torch.Tensor, t: int
    ) -> tuple[_Live, torch.Tensor]:
        """The best of all beams' candidates. They are sorted by token, then stably by score: a tie goes to the lower token
        id, then to the better parent."""
        beam_size, num_each = self.decoding.beam_size, candidate_BKC.shape[-1]
        token_BJ, by_token_BJ = token_BKC.flatten(1).sort(stable=True)
        score_BJ, by_score_BJ = candidate_BKC.flatten(1).gather(1, by_token_BJ).sort(descending=True, stable=True)
        score_BK, by_score_BK = score_BJ[:, :beam_size], by_score_BJ[:, :beam_size]
        if missing := beam_size - score_BK.shape[1]:
            score_BK = torch.nn.functional.pad(score_BK, (0, missing), value=NEVER)
            by_score_BK = torch.nn.functional.pad(by_score_BK, (0, missing))
        token_BK, index_BK = token_BJ.gather(1, by_score_BK), by_token_BJ.gather(1, by_score_BK)
        parent_BK = index_BK.div(num_each, rounding_mode="floor")

        dead_BK = score_BK == NEVER
        log_prob_BK = total_BKC.flatten(1).gather(1, index_BK).masked_fill(dead_BK, NEVER)
        was_finished_BK = beams.finished_BK.gather(1, parent_BK)
        num_tokens_BK = beams.num_tokens_BK.gather(1, parent_BK).where(was_finished_BK, t + 1).masked_fill(dead_BK, 0)
        last_BK = token_BK.masked_fill(was_finished_BK | dead_BK, PAD)
        tokens_BKT = beams.tokens_BKT.gather(1, parent_BK[..., None].expand(-1, -1, beams.tokens_BKT.shape[-1]))
        tokens_BKT[..., t] = last_BK
        finished_BK = was_finished_BK | (token_BK == END) | dead_BK
        return _Live(tokens_BKT, log_prob_BK, score_BK, num_tokens_BK, finished_BK, last_BK), parent_BK


def _top(scores_BKV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` best along the last axis in any order, ties at the border going to the lower index.

    ``topk`` breaks ties at will. On a CPU the rows that have one at the border are chosen again; on a GPU looking for them
    would wait for the device, so all are chosen by a key without ties.
    """
    if scores_BKV.is_cuda:
        return _top_by_key(scores_BKV, count)
    if count == scores_BKV.shape[-1]:
        return scores_BKV.clone(), torch.arange(count).expand_as(scores_BKV).clone()
    value_BKC, index_BKC = scores_BKV.topk(count + 1, -1)
    tie_BK = (value_BKC[..., -1] == value_BKC[..., -2]) & (value_BKC[..., -1] > NEVER)
    value_BKC, index_BKC = value_BKC[..., :-1], index_BKC[..., :-1]
    if tie_BK.any():
        value_BKC[tie_BK], index_BKC[tie_BK] = _top_by_key(scores_BKV[tie_BK], count)
    return value_BKC, index_BKC


def _top_by_key(scores_NV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``_top``, by a key without ties: the score in its upper half, in the lower what is higher the lower the index."""
    bits_NV = (scores_NV + 0.0).view(torch.int32)  # -0 becomes 0.
    ordered_NV = bits_NV ^ ((bits_NV >> 31) & 0x7FFFFFFF)
    last = scores_NV.shape[-1] - 1
    key_NV = (ordered_NV.long() << 32) + torch.arange(last, -1, -1, device=scores_NV.device)
    index_NC = last - (key_NV.topk(count, -1).values & 0xFFFFFFFF)
    return scores_NV.gather(-1, index_NC), index_NC
