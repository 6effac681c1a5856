"""The decoder's step: additive attention's scores, the gated context, and the LSTM's cell.

Axes: B images, K beams, P positions, A the attention's hidden layer, D channels of the grid, N rows (B x K), H the state's
width, G the cell's four gates (4 x H), V vocabulary.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")

_TILE = 1024
"""Numbers of a tile of keys: what the registers of one warp hold."""
_ROWS = 16
"""Of the matrix units' smallest product: so many beams at most."""


@triton.jit
def _tanh_in_bfloat16(x):
    """Two at a time, to the precision of bfloat16."""
    return tl.inline_asm_elementwise("tanh.approx.bf16x2 $0, $1;", "=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def _additive_scores(
    keys,
    query,
    weight,
    scores,
    num_beams,
    num_positions,
    dim,
    query_stride,
    SCALE: tl.constexpr,
    IS_RELU: tl.constexpr,
    IS_APPROXIMATE: tl.constexpr,
    POSITIONS: tl.constexpr,
    DIM: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS)
    a = tl.arange(0, DIM)
    weight_A = tl.load(weight + a, mask=a < dim, other=0.0).to(tl.float32)
    inside = (p[:, None] < num_positions) & (a[None, :] < dim)
    keys_PA = tl.load(keys + (image * num_positions + p)[:, None] * dim + a[None, :], mask=inside, other=0.0)
    if IS_APPROXIMATE:  # sigmoid(x) = (tanh(x / 2) + 1) / 2, and what is the same for all positions does not matter.
        keys_PA = keys_PA * 0.5
    else:
        keys_PA = keys_PA.to(tl.float32)
        weight_A = weight_A * SCALE
    for beam in range(num_beams):
        row = image * num_beams + beam
        query_A = tl.load(query + row * query_stride + a, mask=a < dim, other=0.0)
        if IS_APPROXIMATE:
            hidden_PA = _tanh_in_bfloat16((keys_PA + query_A[None, :]).to(tl.bfloat16)).to(tl.float32)
        else:
            sum_PA = keys_PA + query_A.to(tl.float32)[None, :] * SCALE
            hidden_PA = tl.maximum(sum_PA, 0.0) if IS_RELU else tl.sigmoid(sum_PA)
        scores_P = tl.sum(hidden_PA * weight_A[None, :], axis=1)
        tl.store(scores + row * num_positions + p, scores_P, mask=p < num_positions)


@triton.jit
def _gated_context(
    scores,
    grid,
    gate,
    context,
    num_beams,
    num_positions,
    dim,
    gate_stride,
    HAS_GATE: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHUNKS: tl.constexpr,
    DIM: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * DIM + tl.arange(0, DIM)
    k = tl.arange(0, ROWS)
    row = image * num_beams + k
    highest_K = tl.full((ROWS,), float("-inf"), tl.float32)
    total_K = tl.zeros((ROWS,), tl.float32)
    context_KD = tl.zeros((ROWS, DIM), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        p = chunk * POSITIONS + tl.arange(0, POSITIONS)
        inside = (p[:, None] < num_positions) & (d[None, :] < dim)
        grid_PD = tl.load(grid + (image * num_positions + p)[:, None] * dim + d[None, :], mask=inside, other=0.0)
        inside = (k[:, None] < num_beams) & (p[None, :] < num_positions)
        score_KP = tl.load(scores + row[:, None] * num_positions + p[None, :], mask=inside, other=0.0).to(tl.float32)
        score_KP = tl.where(p[None, :] < num_positions, score_KP, float("-inf"))
        higher_K = tl.maximum(highest_K, tl.max(score_KP, axis=1))
        weight_KP = tl.exp(score_KP - higher_K[:, None])
        shrink_K = tl.exp(highest_K - higher_K)
        total_K = total_K * shrink_K + tl.sum(weight_KP, axis=1)
        context_KD = context_KD * shrink_K[:, None]
        context_KD = tl.dot(weight_KP.to(grid_PD.dtype), grid_PD, context_KD, input_precision="ieee")
        highest_K = higher_K
    context_KD = context_KD / total_K[:, None]
    inside = (k[:, None] < num_beams) & (d[None, :] < dim)
    if HAS_GATE:
        gate_KD = tl.load(gate + row[:, None] * gate_stride + d[None, :], mask=inside, other=0.0)
        context_KD = context_KD * tl.sigmoid(gate_KD.to(tl.float32))
    tl.store(context + row[:, None] * dim + d[None, :], context_KD.to(context.dtype.element_ty), mask=inside)


@triton.jit
def _lstm(
    words,
    last,
    state,
    context,
    cell,
    new_hidden,
    new_cell,
    dim,
    state_stride,
    HAS_CONTEXT: tl.constexpr,
    DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * DIM + tl.arange(0, DIM)
    inside = h < dim
    word = words + tl.load(last + row) * 4 * dim + h
    state = state + row * state_stride + h
    context = context + row * 4 * dim + h
    keep_in = tl.load(word, mask=inside).to(tl.float32) + tl.load(state, mask=inside).to(tl.float32)
    forget = tl.load(word + dim, mask=inside).to(tl.float32) + tl.load(state + dim, mask=inside).to(tl.float32)
    candidate = tl.load(word + 2 * dim, mask=inside).to(tl.float32) + tl.load(state + 2 * dim, mask=inside).to(tl.float32)
    out = tl.load(word + 3 * dim, mask=inside).to(tl.float32) + tl.load(state + 3 * dim, mask=inside).to(tl.float32)
    if HAS_CONTEXT:
        keep_in += tl.load(context, mask=inside).to(tl.float32)
        forget += tl.load(context + dim, mask=inside).to(tl.float32)
        candidate += tl.load(context + 2 * dim, mask=inside).to(tl.float32)
        out += tl.load(context + 3 * dim, mask=inside).to(tl.float32)
    cell_H = tl.load(cell + row * dim + h, mask=inside)
    candidate = 2 * tl.sigmoid(2 * candidate) - 1
    cell_H = tl.sigmoid(forget) * cell_H + tl.sigmoid(keep_in) * candidate
    hidden_H = tl.sigmoid(out) * (2 * tl.sigmoid(2 * cell_H) - 1)
    tl.store(new_hidden + row * dim + h, hidden_H.to(new_hidden.dtype.element_ty), mask=inside)
    tl.store(new_cell + row * dim + h, cell_H, mask=inside)


def _can_approximate(device: torch.device) -> bool:
    """Whether the device has the tanh that takes two bfloat16 at a time: from Hopper on. (Triton's interpreter runs on the
    CPU.)"""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def additive_scores(
    keys_BPA: torch.Tensor, query_BKA: torch.Tensor, weight_A: torch.Tensor, scale: int, is_relu: bool
) -> torch.Tensor:
    """As ``AdditiveAttention.scores``, but for what is the same at all positions: (B, K, P), float32."""
    (num_images, num_beams, dim), num_positions = query_BKA.shape, keys_BPA.shape[1]
    scores_BKP = torch.empty(num_images, num_beams, num_positions, device=query_BKA.device)
    width = triton.next_power_of_2(dim)
    height = max(1, min(_TILE // width, triton.next_power_of_2(num_positions)))
    query_NA = _rows(query_BKA)
    _additive_scores[num_images, triton.cdiv(num_positions, height)](
        keys_BPA.contiguous(),
        query_NA,
        weight_A,
        scores_BKP,
        num_beams,
        num_positions,
        dim,
        query_NA.stride(0),
        SCALE=scale,
        IS_RELU=is_relu,
        IS_APPROXIMATE=not is_relu and query_NA.dtype == torch.bfloat16 and _can_approximate(query_NA.device),
        POSITIONS=height,
        DIM=width,
        num_warps=max(1, width // 1024),
    )
    return scores_BKP


def gated_context(scores_BKP: torch.Tensor, grid_BPD: torch.Tensor, gate_ND: torch.Tensor | None) -> torch.Tensor:
    """The mean of the grid by the softmax of the scores, times the gate's sigmoid: (N, D), as the grid is."""
    (num_images, num_positions, dim), num_beams = grid_BPD.shape, scores_BKP.shape[1]
    context_ND = grid_BPD.new_empty(num_images * num_beams, dim)
    width = min(64, max(16, triton.next_power_of_2(dim)))
    height = min(64, max(16, triton.next_power_of_2(num_positions)))
    gate_ND = None if gate_ND is None else _rows(gate_ND)
    _gated_context[num_images, triton.cdiv(dim, width)](
        scores_BKP.contiguous(),
        grid_BPD.contiguous(),
        context_ND if gate_ND is None else gate_ND,
        context_ND,
        num_beams,
        num_positions,
        dim,
        0 if gate_ND is None else gate_ND.stride(0),
        HAS_GATE=gate_ND is not None,
        ROWS=_ROWS,
        POSITIONS=height,
        CHUNKS=triton.cdiv(num_positions, height),
        DIM=width,
        num_warps=1,
    )
    return context_ND


def lstm(
    words_VG: torch.Tensor,
    last_N: torch.Tensor,
    state_NG: torch.Tensor,
    context_NG: torch.Tensor | None,
    cell_NH: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The new state and cell (N, H) from what the words, the state and the context bring to the gates."""
    num_rows, dim = cell_NH.shape
    hidden_NH, new_cell_NH = words_VG.new_empty(num_rows, dim), cell_NH.new_empty(num_rows, dim)
    width = min(512, triton.next_power_of_2(dim))
    state_NG = _rows(state_NG)
    _lstm[num_rows, triton.cdiv(dim, width)](
        words_VG,
        last_N.contiguous(),
        state_NG,
        state_NG if context_NG is None else context_NG.contiguous(),
        cell_NH.contiguous(),
        hidden_NH,
        new_cell_NH,
        dim,
        state_NG.stride(0),
        HAS_CONTEXT=context_NG is not None,
        DIM=width,
    )
    return hidden_NH, new_cell_NH


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as rows (N, X) whose numbers lie side by side, copied only where they do not: often it is a part of wider
    rows."""
    rows = tensor.flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()
