"""What a beam step spends most of its time on, as kernels for NVIDIA GPUs, in Triton: additive attention's scores and the
likeliest words. Each does in one pass over its input what torch does in several. ``attention`` and ``beam`` have the same in
torch, for every device.

Axes: B images, K beams, P positions, A the attention's hidden layer, N rows, V vocabulary, C best words of a row, G groups
of GROUP neighbouring words.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from capray.model.gpu import GROUP

triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")

_TILE = 8192
"""Numbers of a tile of keys: what the registers of 128 threads hold."""


@triton.jit
def _additive_scores(
    keys,
    query,
    weight,
    scores,
    num_beams,
    num_positions,
    dim,
    SCALE: tl.constexpr,
    IS_RELU: tl.constexpr,
    POSITIONS: tl.constexpr,
    DIM: tl.constexpr,
):
    image = tl.program_id(0)
    p = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS)
    a = tl.arange(0, DIM)
    weight_A = tl.load(weight + a, mask=a < dim, other=0.0).to(tl.float32) * SCALE
    inside = (p[:, None] < num_positions) & (a[None, :] < dim)
    keys_PA = tl.load(keys + (image * num_positions + p)[:, None] * dim + a[None, :], mask=inside, other=0.0)
    keys_PA = keys_PA.to(tl.float32)
    for beam in range(num_beams):
        row = image * num_beams + beam
        query_A = tl.load(query + row * dim + a, mask=a < dim, other=0.0).to(tl.float32) * SCALE
        sum_PA = keys_PA + query_A[None, :]
        hidden_PA = tl.maximum(sum_PA, 0.0) if IS_RELU else tl.sigmoid(sum_PA)
        scores_P = tl.sum(hidden_PA * weight_A[None, :], axis=1)
        tl.store(scores + row * num_positions + p, scores_P, mask=p < num_positions)


@triton.jit
def _is_banned(token, BANNED: tl.constexpr):
    return (token < 32) & (((BANNED >> (token & 31)) & 1) == 1)


@triton.jit
def _norms_and_maxima(
    scores,
    norms,
    maxima,
    num_words,
    num_groups,
    BANNED: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row = tl.program_id(0)
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
    row = tl.program_id(0)
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


def additive_scores(
    keys_BPA: torch.Tensor, query_BKA: torch.Tensor, weight_A: torch.Tensor, scale: int, is_relu: bool
) -> torch.Tensor:
    """As ``AdditiveAttention.scores``, but for its bias: (B, K, P), float32."""
    (num_images, num_beams, dim), num_positions = query_BKA.shape, keys_BPA.shape[1]
    scores_BKP = torch.empty(num_images, num_beams, num_positions, device=query_BKA.device)
    width = triton.next_power_of_2(dim)
    height = max(1, min(_TILE // width, triton.next_power_of_2(num_positions)))
    _additive_scores[num_images, triton.cdiv(num_positions, height)](
        keys_BPA.contiguous(),
        query_BKA.contiguous(),
        weight_A,
        scores_BKP,
        num_beams,
        num_positions,
        dim,
        SCALE=scale,
        IS_RELU=is_relu,
        POSITIONS=height,
        DIM=width,
    )
    return scores_BKP


def best_words(
    scores_BKV: torch.Tensor, count: int, banned: Sequence[int], end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``Choice.best_tokens``: the log-probabilities and ids (B, K, C) of the ``count`` best words that are not ``banned``
    (all of them among the first 32)."""
    *shape, num_words = scores_BKV.shape
    scores_NV = scores_BKV.reshape(-1, num_words)
    num_rows, num_groups = len(scores_NV), triton.cdiv(num_words, GROUP)
    norms_N = torch.empty(num_rows, device=scores_NV.device)
    maxima_NG = torch.empty(num_rows, num_groups, device=scores_NV.device)
    log_probs_NC = torch.empty(num_rows, count, device=scores_NV.device)
    tokens_NC = torch.empty(num_rows, count, dtype=torch.long, device=scores_NV.device)
    bans = sum(1 << token for token in banned)
    _norms_and_maxima[(num_rows,)](
        scores_NV, norms_N, maxima_NG, num_words, num_groups, BANNED=bans, GROUP=GROUP, GROUPS=32
    )
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
