"""Beam search, batched over images and beams on the device. Knows nothing of LSTMs or images: only of a function
that scores the next token.

Axes: B searches (images), K beams, V vocabulary, C best tokens of a beam, J candidates of a search (K x C), T tokens,
N rows of scores, G groups of W neighbouring tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple, Protocol, TypeVar

import torch

from capray.config import Decoding
from capray.model.gpu import GROUP, LARGEST_BEAM, kernels_of
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
    """The ``n_best`` hypotheses of each search, best first.

    A hypothesis that never was (a search with fewer possible captions than asked for) has ``num_tokens`` 0 and
    ``log_prob`` -inf.
    """

    tokens_BNT: torch.Tensor
    num_tokens_BN: torch.Tensor
    log_prob_BN: torch.Tensor
    score_BN: torch.Tensor
    finished_BN: torch.Tensor

    @staticmethod
    def empty(num_searches: int, n_best: int, max_length: int, device) -> Beams:
        shape = (num_searches, n_best)
        return Beams(
            torch.full((*shape, max_length), PAD, device=device),
            torch.zeros(shape, dtype=torch.long, device=device),
            torch.full(shape, NEVER, device=device),
            torch.full(shape, NEVER, device=device),
            torch.zeros(shape, dtype=torch.bool, device=device),
        )

    def put(self, search_B: torch.Tensor, beams: Beams) -> None:
        """Make ``beams`` the results of the searches ``search_B``."""
        for mine, part in zip(self, beams, strict=True):
            mine[search_B, : part.shape[1]] = part

    def cpu(self) -> Beams:
        """Copied from their device in one piece. (A float64 holds all of their numbers as they are.)"""
        tokens_BNT, *parts = self
        packed_BNX = torch.cat([tokens_BNT.double(), torch.stack([part.double() for part in parts], -1)], -1).cpu()
        pieces = [packed_BNX[..., : -len(parts)], *packed_BNX[..., -len(parts) :].unbind(-1)]
        return Beams(*(piece.to(part.dtype) for piece, part in zip(pieces, self, strict=True)))


@torch.inference_mode()
def beam_search(next_scores: NextScores, state: S, num_searches: int, decoding: Decoding, device=None) -> Beams:
    """The best token sequences of ``num_searches`` searches, on the CPU.

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
    choice = Choice(decoding, device)
    found = Beams.empty(num_searches, n_best, decoding.max_length, device)
    search_B = torch.arange(num_searches, device=device)
    beams = Live.start(num_searches, decoding.max_length, device)

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
                found.put(search_B[settled_B], beams.keep(settled_B).best(n_best))
                (kept_B,) = (~settled_B).nonzero(as_tuple=True)
                search_B, beams, parent_BK, state = (
                    search_B[kept_B],
                    beams.keep(kept_B),
                    parent_BK[kept_B],
                    state.keep(kept_B),
                )
        state = state.select(parent_BK)

    found.put(search_B, beams.best(n_best))
    return found.cpu()


class Live(NamedTuple):
    """The hypotheses of the searches that still run. ``num_tokens`` counts to the ``<end>``; ``tokens`` are padded."""

    tokens_BKT: torch.Tensor
    log_prob_BK: torch.Tensor
    score_BK: torch.Tensor
    num_tokens_BK: torch.Tensor
    finished_BK: torch.Tensor
    last_BK: torch.Tensor

    @staticmethod
    def start(num_searches: int, max_length: int, device) -> Live:
        return Live(
            torch.full((num_searches, 1, max_length), PAD, device=device),
            torch.zeros(num_searches, 1, device=device),
            torch.zeros(num_searches, 1, device=device),
            torch.zeros(num_searches, 1, dtype=torch.long, device=device),
            torch.zeros(num_searches, 1, dtype=torch.bool, device=device),
            torch.full((num_searches, 1), START, device=device),
        )

    def keep(self, searches_B: torch.Tensor) -> Live:
        return Live(*(part[searches_B] for part in self))

    def best(self, n_best: int) -> Beams:
        """The results of the searches, on their device."""
        finished_BK = self.finished_BK & (self.score_BK != NEVER)
        parts = self.tokens_BKT, self.num_tokens_BK, self.log_prob_BK, self.score_BK, finished_BK
        return Beams(*(part[:, :n_best] for part in parts))

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


class Choice:
    """Chooses the next beams: the best tokens of each beam first, then the best of those."""

    def __init__(self, decoding: Decoding, device):
        self.decoding = decoding
        self.banned_ids = [PAD, START] if decoding.allow_unk else [PAD, START, UNK]
        self.banned = torch.tensor(self.banned_ids, device=device)

    def __call__(self, beams: Live, scores_BKV: torch.Tensor, t: int) -> tuple[Live, torch.Tensor]:
        """The beams after step ``t`` (from 0), and which beam each comes from."""
        may_end = t >= self.decoding.min_length
        log_prob_BKC, token_BKC = self.best_tokens(scores_BKV, self._repeats(beams.tokens_BKT, t), may_end)
        power = (t + 1) ** self.decoding.length_penalty
        if kernels := self._kernels(scores_BKV):
            parts, parent_BK = kernels.next_beams(beams, log_prob_BKC, token_BKC, self.decoding.beam_size, t, power)
            return Live(*parts), parent_BK
        # A beam without finite probabilities (NaN) has no candidates.
        total_BKC = beams.log_prob_BK[..., None] + log_prob_BKC.nan_to_num(nan=NEVER, posinf=NEVER, neginf=NEVER)
        candidate_BKC = total_BKC / power
        if t:
            # A finished hypothesis goes on as itself, in the place of its <end>.
            finished_BK = beams.finished_BK
            candidate_BKC.masked_fill_(finished_BK[..., None], NEVER)
            candidate_BKC[..., 0] = torch.where(finished_BK, beams.score_BK, candidate_BKC[..., 0])
            total_BKC[..., 0] = torch.where(finished_BK, beams.log_prob_BK, total_BKC[..., 0])
            token_BKC[..., 0] = torch.where(finished_BK, END, token_BKC[..., 0])
        return self._merged(beams, candidate_BKC, total_BKC, token_BKC, t)

    def _kernels(self, scores_BKV: torch.Tensor) -> ModuleType | None:
        return kernels_of(scores_BKV.device) if self.decoding.beam_size <= LARGEST_BEAM else None

    def best_tokens(
        self, scores_BKV: torch.Tensor, repeats_BKR: torch.Tensor | None, may_end: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The log-probabilities and ids of the best tokens of each beam (B, K, C) that may follow; ``repeats_BKR`` may not,
        and <end> only where it ``may_end``, or nothing else is left."""
        count = min(self.decoding.beam_size, scores_BKV.shape[-1])
        if repeats_BKR is None and (kernels := self._kernels(scores_BKV)):
            return kernels.best_words(scores_BKV, count, [*self.banned_ids, *([] if may_end else [END])], END)
        log_prob_BKV = scores_BKV.log_softmax(-1, dtype=torch.float32)
        end_BK = log_prob_BKV[..., END].clone()
        log_prob_BKV.index_fill_(-1, self.banned, NEVER)
        if not may_end:
            log_prob_BKV[..., END] = NEVER
        if repeats_BKR is not None:
            log_prob_BKV.scatter_(-1, repeats_BKR, NEVER)
        log_prob_BKC, token_BKC = top(log_prob_BKV, count)
        stuck_BK = log_prob_BKC[..., 0] == NEVER
        log_prob_BKC[..., 0] = torch.where(stuck_BK, end_BK, log_prob_BKC[..., 0])
        token_BKC[..., 0] = torch.where(stuck_BK, END, token_BKC[..., 0])
        return log_prob_BKC, token_BKC

    def _repeats(self, tokens_BKT: torch.Tensor, t: int) -> torch.Tensor | None:
        """The tokens (B, K, R) that would repeat an n-gram of ``tokens_BKT`` at step ``t``; None before any could."""
        n = self.decoding.no_repeat_ngram
        if not n or t < n:
            return None
        windows_BKWn = tokens_BKT[..., :t].unfold(-1, n, 1)
        tail_BKn = tokens_BKT[..., t - n + 1 : t]
        repeats_BKW = (windows_BKWn[..., :-1] == tail_BKn[:, :, None]).all(-1)
        return windows_BKWn[..., -1].where(repeats_BKW, PAD)

    def _merged(
        self, beams: Live, candidate_BKC: torch.Tensor, total_BKC: torch.Tensor, token_BKC: torch.Tensor, t: int
    ) -> tuple[Live, torch.Tensor]:
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
        return Live(tokens_BKT, log_prob_BK, score_BK, num_tokens_BK, finished_BK, last_BK), parent_BK


def top(scores_BKV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` best along the last axis, best first, ties going to the lower index; and their indices.

    All lie within as many groups of neighbours: those with the highest maxima, ties going to the lower group. (For one that
    lies elsewhere, each of these groups has a better one.) So what costs most is one pass of maxima over all. ``topk`` takes
    several times as long and breaks ties at will.
    """
    if rest := -scores_BKV.shape[-1] % GROUP:
        scores_BKV = torch.nn.functional.pad(scores_BKV, (0, rest), value=NEVER)
    groups_BKGW = scores_BKV.unflatten(-1, (-1, GROUP))
    maxima_BKG = groups_BKGW.amax(-1)
    group_BKC = _first_best(maxima_BKG, min(count, maxima_BKG.shape[-1])).sort(-1).values
    scores_BKX = groups_BKGW.gather(-2, group_BKC[..., None].expand(*group_BKC.shape, GROUP)).flatten(-2)
    index_BKC = _first_best(scores_BKX, count)
    return scores_BKX.gather(-1, index_BKC), group_BKC.gather(-1, index_BKC // GROUP) * GROUP + index_BKC % GROUP


def _first_best(scores_BKX: torch.Tensor, count: int) -> torch.Tensor:
    """The indices of the ``count`` best along the last axis, best first, by a key without ties: the score in its upper half,
    in the lower what is higher the lower the index."""
    bits_BKX = (scores_BKX + 0.0).view(torch.int32)  # -0 becomes 0.
    ordered_BKX = bits_BKX ^ ((bits_BKX >> 31) & 0x7FFFFFFF)
    last = scores_BKX.shape[-1] - 1
    key_BKX = (ordered_BKX.long() << 32) + torch.arange(last, -1, -1, device=scores_BKX.device)
    return last - (key_BKX.topk(count, -1).values & 0xFFFFFFFF)
