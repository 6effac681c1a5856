"""Beam search: the likeliest words of each beam, the next beams of each image, and their states.

Axes: B images, K beams, N rows (B x K), V vocabulary, C best words of a row, G groups of GROUP neighbouring words, J
candidates of an image (K x C), T tokens, H the state's width.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from capray.model.gpu import GROUP
from capray.vocabulary import END, PAD

triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")


@triton.jit
def _is_banned(token, BANNED: tl.constexpr):
    return (token < 32) & (((BANNED >> (token & 31)) & 1) == 1)


@triton.jit
def _norms_and_maxima(
    scores, norms, maxima, num_words, num_groups, BANNED: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, GROUPS)
    inner = tl.arange(0, GROUP)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for first in range(0, num_groups, GROUPS):
        token = (first + groups)[:, None] * GROUP + inner[None, :]
        score = tl.load(scores + row * num_words + token, mask=token < num_words, other=float("-inf"))
        score = score.to(tl.float32)
        allowed = tl.where(_is_banned(token, BANNED), float("-inf"), score)
        best = tl.max(allowed, axis=1)
        tl.store(maxima + row * num_groups + first + groups, best, mask=first + groups < num_groups)
        higher = tl.maximum(highest, tl.max(tl.max(score, axis=1), axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.sum(tl.exp(score - higher), axis=1), axis=0)
        highest = higher
    tl.store(norms + row, highest + tl.log(total))


@triton.jit
def _best_of_groups(
    scores,
    norms,
    maxima,
    log_probs,
    tokens,
    num_words,
    num_groups,
    BANNED: tl.constexpr,
    END: tl.constexpr,
    COUNT: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    slot = tl.arange(0, SLOTS)
    norm = tl.load(norms + row)
    maximum = tl.load(maxima + row * num_groups + group, mask=group < num_groups, other=float("-inf"))
    chosen = tl.full((SLOTS,), GROUPS, tl.int32)
    left = group < num_groups
    for i in tl.static_range(COUNT):
        best = tl.max(tl.where(left, maximum, float("-inf")), axis=0)
        at = tl.min(tl.where(left & (maximum == best), group, GROUPS), axis=0)
        chosen = tl.where(slot == i, at, chosen)
        left = left & (group != at)
    token = chosen[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    score = tl.load(scores + row * num_words + token, mask=token < num_words, other=float("-inf")).to(tl.float32)
    score = tl.where(_is_banned(token, BANNED), float("-inf"), score)
    open_ = token < num_words
    for i in tl.static_range(COUNT):
        best = tl.max(tl.max(tl.where(open_, score, float("-inf")), axis=1), axis=0)
        at = tl.min(tl.min(tl.where(open_ & (score == best), token, num_words), axis=1), axis=0)
        open_ = open_ & (token != at)
        if i == 0:  # Where nothing else may follow, <end> does.
            stuck = best == float("-inf")
            best = tl.where(stuck, tl.load(scores + row * num_words + END).to(tl.float32), best)
            at = tl.where(stuck, END, at)
        tl.store(log_probs + row * COUNT + i, best - norm)
        tl.store(tokens + row * COUNT + i, at.to(tl.int64))


@triton.jit(do_not_specialize=["step", "length_power"])
def _next_beams(
    tokens,
    log_probs,
    scores,
    lengths,
    finished,
    word_log_probs,
    words,
    new_tokens,
    new_log_probs,
    new_scores,
    new_lengths,
    new_finished,
    new_last,
    parents,
    step,
    length_power,
    num_beams,
    num_each,
    max_length,
    PAD: tl.constexpr,
    END: tl.constexpr,
    BEAM_SIZE: tl.constexpr,
    CANDIDATES: tl.constexpr,
    STEPS: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, CANDIDATES)
    t = tl.arange(0, STEPS)
    beam = j // num_each
    inside = j < num_beams * num_each
    first = inside & (j % num_each == 0)
    row = image * num_beams + beam
    word = tl.load(words + image * num_beams * num_each + j, mask=inside, other=0)
    log_prob = tl.load(word_log_probs + image * num_beams * num_each + j, mask=inside, other=float("-inf"))
    # A beam without finite probabilities (NaN) has no candidates.
    log_prob = tl.where((log_prob == log_prob) & (log_prob < float("inf")), log_prob, float("-inf"))
    before = tl.load(log_probs + row, mask=inside, other=float("-inf"))
    was_finished = tl.load(finished + row, mask=inside, other=0) != 0
    total = before + log_prob
    # A finished hypothesis goes on as itself, in the place of its <end>.
    kept = tl.load(scores + row, mask=inside & was_finished & first, other=float("-inf"))
    score = tl.where(was_finished, kept, total / length_power)
    total = tl.where(was_finished & first, before, total)
    word = tl.where(was_finished & first, END, word)
    left = inside
    for i in tl.static_range(BEAM_SIZE):
        best = tl.max(tl.where(left, score, float("-inf")), axis=0)
        ties = left & (score == best)
        lowest = tl.min(tl.where(ties, word, 1 << 62), axis=0)
        at = tl.min(tl.where(ties & (word == lowest), j, CANDIDATES), axis=0)
        is_it = j == at
        left = left & (at != j)
        is_dead = best == float("-inf")
        parent = tl.where(at < CANDIDATES, at // num_each, 0)
        ended = tl.max(tl.where(is_it & was_finished, 1, 0), axis=0) == 1
        length = tl.where(ended, tl.load(lengths + image * num_beams + parent), step + 1)
        last = tl.where(ended | is_dead, PAD, lowest)
        new_row = image * BEAM_SIZE + i
        log_prob_now = tl.sum(tl.where(is_it, total, 0.0), axis=0)
        tl.store(new_log_probs + new_row, tl.where(is_dead, float("-inf"), log_prob_now))
        tl.store(new_scores + new_row, best)
        tl.store(new_lengths + new_row, tl.where(is_dead, 0, length))
        tl.store(new_finished + new_row, ended | is_dead | (lowest == END))
        tl.store(new_last + new_row, last)
        tl.store(parents + new_row, parent.to(tl.int64))
        tokens_T = tl.load(tokens + (image * num_beams + parent) * max_length + t, mask=t < max_length, other=PAD)
        tl.store(new_tokens + new_row * max_length + t, tl.where(t == step, last, tokens_T), mask=t < max_length)


@triton.jit
def _selected(hidden, cell, parents, new_hidden, new_cell, dim, num_beams, beam_size, DIM: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * DIM + tl.arange(0, DIM)
    source = row // beam_size * num_beams + tl.load(parents + row)
    tl.store(new_hidden + row * dim + h, tl.load(hidden + source * dim + h, mask=h < dim), mask=h < dim)
    tl.store(new_cell + row * dim + h, tl.load(cell + source * dim + h, mask=h < dim), mask=h < dim)


def best_words(scores_BKV: torch.Tensor, count: int, banned: Sequence[int], end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``Choice.best_tokens``: the log-probabilities and ids (B, K, C) of the ``count`` best words that are not ``banned``
    (all of them among the first 32)."""
    *shape, num_words = scores_BKV.shape
    scores_NV = scores_BKV.reshape(-1, num_words).contiguous()
    num_rows, num_groups = len(scores_NV), triton.cdiv(num_words, GROUP)
    norms_N = torch.empty(num_rows, device=scores_NV.device)
    maxima_NG = torch.empty(num_rows, num_groups, device=scores_NV.device)
    log_probs_NC = torch.empty(num_rows, count, device=scores_NV.device)
    tokens_NC = torch.empty(num_rows, count, dtype=torch.long, device=scores_NV.device)
    bans = sum(1 << token for token in banned)
    _norms_and_maxima[(num_rows,)](scores_NV, norms_N, maxima_NG, num_words, num_groups, BANNED=bans, GROUP=GROUP, GROUPS=32)
    _best_of_groups[(num_rows,)](
        scores_NV,
        norms_N,
        maxima_NG,
        log_probs_NC,
        tokens_NC,
        num_words,
        num_groups,
        BANNED=bans,
        END=end,
        COUNT=count,
        SLOTS=triton.next_power_of_2(count),
        GROUP=GROUP,
        GROUPS=triton.next_power_of_2(num_groups),
        num_warps=2,
    )
    return log_probs_NC.unflatten(0, shape), tokens_NC.unflatten(0, shape)


def next_beams(
    beams: Sequence[torch.Tensor],
    log_probs_BKC: torch.Tensor,
    words_BKC: torch.Tensor,
    beam_size: int,
    step: int,
    power: float,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """As ``Choice.__call__``, from the best words of each beam: the tensors of the next ``Live``, and which beam each comes
    from. ``power`` is what a score of this step is divided by."""
    tokens_BKT, *parts = beams
    (num_images, num_beams, num_each), max_length = words_BKC.shape, tokens_BKT.shape[-1]
    new = [part.new_empty(num_images, beam_size, *part.shape[2:]) for part in beams]
    parents_BK = words_BKC.new_empty(num_images, beam_size)
    _next_beams[(num_images,)](
        tokens_BKT.contiguous(),
        *(part.contiguous() for part in parts[:-1]),
        log_probs_BKC.contiguous(),
        words_BKC.contiguous(),
        *new,
        parents_BK,
        step,
        power,
        num_beams,
        num_each,
        max_length,
        PAD=PAD,
        END=END,
        BEAM_SIZE=beam_size,
        CANDIDATES=triton.next_power_of_2(num_beams * num_each),
        STEPS=triton.next_power_of_2(max_length),
        num_warps=1,
    )
    return new, parents_BK


def selected(
    hidden_BKH: torch.Tensor, cell_BKH: torch.Tensor, parents_BK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``SearchState.select``: the states of the beams ``parents_BK`` of each image."""
    (num_images, num_beams, dim), beam_size = hidden_BKH.shape, parents_BK.shape[1]
    new_hidden_BKH = hidden_BKH.new_empty(num_images, beam_size, dim)
    new_cell_BKH = cell_BKH.new_empty(num_images, beam_size, dim)
    width = min(512, triton.next_power_of_2(dim))
    _selected[num_images * beam_size, triton.cdiv(dim, width)](
        hidden_BKH.contiguous(),
        cell_BKH.contiguous(),
        parents_BK.contiguous(),
        new_hidden_BKH,
        new_cell_BKH,
        dim,
        num_beams,
        beam_size,
        DIM=width,
    )
    return new_hidden_BKH, new_cell_BKH
