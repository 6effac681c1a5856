"""What an encoder does between its convolutions, channels last.

Axes: B images, C channels, H rows, W columns; h, w those of patches.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from capray.model.fusing import Patches

triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")

_TILE = 2048
"""Numbers that a program takes."""


@triton.jit
def _patches(
    pixels,
    mean,
    std,
    patches,
    num_patches,
    height,
    width,
    num_rows,
    num_columns,
    before,
    num_channels,
    STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCHES: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * PATCHES + tl.arange(0, PATCHES)
    c = tl.arange(0, CHANNELS)
    colour = c // (STRIDE * STRIDE)
    y = ((i // num_columns % num_rows - before) * STRIDE)[:, None] + (c // STRIDE % STRIDE)[None, :]
    x = ((i % num_columns - before) * STRIDE)[:, None] + (c % STRIDE)[None, :]
    inside = (i < num_patches)[:, None] & (colour < 3)[None, :] & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    place = (((i // (num_rows * num_columns))[:, None] * height + y) * width + x) * 3 + colour[None, :]
    value = tl.load(pixels + place, mask=inside, other=0).to(tl.float32)
    mean_C = tl.load(mean + colour, mask=colour < 3, other=0.0)
    std_C = tl.load(std + colour, mask=colour < 3, other=1.0)
    value = tl.where(inside, (value - mean_C[None, :]) / std_C[None, :], 0.0)
    inside = (i < num_patches)[:, None] & (c < num_channels)[None, :]
    tl.store(patches + i[:, None] * num_channels + c[None, :], value.to(patches.dtype.element_ty), mask=inside)


@triton.jit
def _biased(x, bias, added, low, high, count, num_channels, HAS_ADDED: tl.constexpr, TILE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = i < count
    value = tl.load(x + i, mask=inside).to(tl.float32) + tl.load(bias + i % num_channels, mask=inside).to(tl.float32)
    if HAS_ADDED:
        value += tl.load(added + i, mask=inside).to(tl.float32)
    value = tl.where(value < low, low, value)  # NaN stays.
    value = tl.where(value > high, high, value)
    tl.store(x + i, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _max_pooled(
    x,
    pooled,
    num_places,
    num_channels,
    height,
    width,
    num_rows,
    num_columns,
    padding,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PLACES: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    first_y = i // num_columns % num_rows * STRIDE - padding
    first_x = i % num_columns * STRIDE - padding
    image = i // (num_rows * num_columns)
    writes = (i < num_places)[:, None] & (c < num_channels)[None, :]
    best = tl.full((PLACES, CHANNELS), float("-inf"), tl.float32)
    for dy in tl.static_range(KERNEL):
        for dx in tl.static_range(KERNEL):
            y = first_y + dy
            x_ = first_x + dx
            inside = writes & ((y >= 0) & (y < height) & (x_ >= 0) & (x_ < width))[:, None]
            place = ((image * height + y) * width + x_)[:, None] * num_channels + c[None, :]
            value = tl.load(x + place, mask=inside, other=float("-inf")).to(tl.float32)
            best = tl.where((value > best) | (value != value), value, best)  # NaN stays.
    tl.store(pooled + i[:, None] * num_channels + c[None, :], best.to(pooled.dtype.element_ty), mask=writes)


def patches_of(
    pixels_BHW3: torch.Tensor, mean_3: torch.Tensor, std_3: torch.Tensor, dtype: torch.dtype, patches: Patches
) -> torch.Tensor:
    """As ``Patches.of`` of the normalised pixels, in ``dtype``: (B, C, h, w)."""
    num_images, height, width, _ = pixels_BHW3.shape
    num_rows, num_columns = patches.count(height), patches.count(width)
    shape = num_images, num_rows, num_columns, patches.num_channels
    patches_BhwC = torch.empty(shape, dtype=dtype, device=pixels_BHW3.device)
    num_patches, num_channels = num_images * num_rows * num_columns, triton.next_power_of_2(patches.num_channels)
    at_once = max(1, _TILE // num_channels)
    _patches[(triton.cdiv(num_patches, at_once),)](
        pixels_BHW3.contiguous(),
        mean_3,
        std_3,
        patches_BhwC,
        num_patches,
        height,
        width,
        num_rows,
        num_columns,
        patches.before,
        patches.num_channels,
        STRIDE=patches.stride,
        CHANNELS=num_channels,
        PATCHES=at_once,
    )
    return patches_BhwC.permute(0, 3, 1, 2)


def biased(
    x_BCHW: torch.Tensor, bias_C: torch.Tensor, added_BCHW: torch.Tensor | None, low: float, high: float
) -> torch.Tensor:
    """``x`` + ``bias`` + ``added``, cut off at ``low`` and ``high``; ``x`` is overwritten."""
    x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
    if added_BCHW is not None:
        added_BCHW = added_BCHW.contiguous(memory_format=torch.channels_last)
    _biased[(triton.cdiv(x_BCHW.numel(), _TILE),)](
        x_BCHW,
        bias_C,
        x_BCHW if added_BCHW is None else added_BCHW,
        low,
        high,
        x_BCHW.numel(),
        x_BCHW.shape[1],
        HAS_ADDED=added_BCHW is not None,
        TILE=_TILE,
    )
    return x_BCHW


def max_pooled(x_BCHW: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """As ``max_pool2d``."""
    num_images, num_channels, height, width = x_BCHW.shape
    num_rows, num_columns = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
    pooled_BhwC = x_BCHW.new_empty(num_images, num_rows, num_columns, num_channels)
    num_places, channels = num_images * num_rows * num_columns, min(64, triton.next_power_of_2(num_channels))
    at_once = _TILE // channels
    _max_pooled[triton.cdiv(num_places, at_once), triton.cdiv(num_channels, channels)](
        x_BCHW.contiguous(memory_format=torch.channels_last),
        pooled_BhwC,
        num_places,
        num_channels,
        height,
        width,
        num_rows,
        num_columns,
        padding,
        KERNEL=kernel,
        STRIDE=stride,
        CHANNELS=channels,
        PLACES=at_once,
    )
    return pooled_BhwC.permute(0, 3, 1, 2)
