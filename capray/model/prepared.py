"""The decoder laid out for beam search over many images. Its own step does the work; here it is given what can be had
once: words times input weights as a table, weights cast once, keys in the form that attention is fastest with, and the
grid before pooling.

Axes: B images, K beams, V vocabulary, D grid channels, h and w rows and columns of the native grid, Q its positions,
P the positions that attention sees (Q, or those of the pooled grid), G gates of the cell.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from capray.model.attention import SearchKeys
from capray.model.beam import GROUP
from capray.model.decoder import Decoder, Memory, State

LARGEST_TABLE_BYTES = 512 * 2**20
"""Of the words' products with the input weights; with a larger vocabulary they are computed at each step."""


class SearchMemory(NamedTuple):
    """What the beams of each image attend over. ``spread_PQ`` turns the native grid into the pooled one; None where they
    are the same, or where each cell of the one is copied equally often into the other. Behind its ``num_cells`` the grid may
    be filled up with zeros (see ``cells_alignment``)."""

    grid_BQD: torch.Tensor
    keys: SearchKeys
    num_cells: int
    spread_PQ: torch.Tensor | None = None

    def keep(self, images_B: torch.Tensor) -> SearchMemory:
        keys = self.keys._replace(keys_BPA=self.keys.keys_BPA[images_B])
        return self._replace(grid_BQD=self.grid_BQD[images_B], keys=keys)

    def mean_grid(self) -> torch.Tensor:
        """The mean over the positions that attention sees (B, D)."""
        cells_BQD = self.grid_BQD[:, : self.num_cells]
        if self.spread_PQ is None:
            return cells_BQD.mean(1)
        return (self.spread_PQ.float().mean(0) @ cells_BQD.float()).to(cells_BQD.dtype)

    def context(self, alpha_BKP: torch.Tensor) -> torch.Tensor:
        """The mean of the grid by the weights ``alpha_BKP`` (B, K, D)."""
        alpha_BKQ = alpha_BKP if self.spread_PQ is None else alpha_BKP @ self.spread_PQ
        rest = self.grid_BQD.shape[1] - self.num_cells
        return (functional.pad(alpha_BKQ, (0, rest)) if rest else alpha_BKQ) @ self.grid_BQD


def cells_alignment(device: torch.device) -> int:
    """To a multiple of how many positions a grid is filled up: a GPU's matrix units do not take the 49 of 7x7."""
    return 8 if device.type == "cuda" else 1


class SearchState(NamedTuple):
    """What beam search carries: the decoder's state of every beam, and what it attends over."""

    state: State
    memory: SearchMemory

    def select(self, beams_BK: torch.Tensor) -> SearchState:
        """The states of the beams ``beams_BK`` (indices along K) of each image."""
        num_images, num_beams = self.state.hidden_BKH.shape[:2]
        first_B1 = torch.arange(0, num_images * num_beams, num_beams, device=beams_BK.device)[:, None]
        index_BK = beams_BK + first_B1
        return self._replace(state=State(*(part.flatten(0, 1)[index_BK] for part in self.state)))

    def keep(self, searches_B: torch.Tensor) -> SearchState:
        """The states of the images at these indices."""
        return SearchState(State(*(part[searches_B] for part in self.state)), self.memory.keep(searches_B))


class PreparedDecoder:
    """``decoder`` for inference, in ``dtype``; later changes of its weights do not reach it."""

    @torch.no_grad()
    def __init__(self, decoder: Decoder, dtype: torch.dtype = torch.float32):
        words_GE, bias_G = decoder.weights().words_GE, decoder.cell.bias_ih
        num_words, _ = decoder.embedding.weight.shape
        self.words_VG: torch.Tensor | None = None
        if num_words * len(bias_G) * dtype.itemsize <= LARGEST_TABLE_BYTES:
            self.words_VG = functional.linear(decoder.embedding.weight, words_GE, bias_G).to(dtype)
        if dtype != torch.float32:
            decoder = copy.deepcopy(decoder).to(dtype)
        self.decoder = decoder
        self.dtype = dtype
        self.weights = decoder.weights()
        self.output_VX, self.output_bias_V = _aligned(*decoder.output_layer())
        self._spreads: dict[tuple[int, int, int], torch.Tensor] = {}

    @torch.inference_mode()
    def memory_of_grids(self, grids_BDhw: Sequence[torch.Tensor], pool: int | None) -> SearchMemory:
        """The memory of batches of native grids, one after the other; ``pool`` is the side that they are pooled to."""
        memories = [self.decoder.memory_of_grid(grid.to(self.dtype).flatten(2).transpose(1, 2)) for grid in grids_BDhw]
        sizes = {tuple(grid.shape[2:]) for grid in grids_BDhw}
        if len(sizes) > 1:
            assert pool is not None, "grids of several sizes need pooling"
            spreads = [self._pooling(*grid.shape[2:], pool) for grid in grids_BDhw]
            pairs = zip(spreads, memories, strict=True)
            return self.search_memory(
                Memory.cat([Memory(*(spread @ part for part in memory)) for spread, memory in pairs])
            )
        ((height, width),) = sizes
        memory = memories[0] if len(memories) == 1 else Memory.cat(memories)
        if pool is None or (pool % height == 0 and pool % width == 0):
            return self.search_memory(memory)
        spread = self._pooling(height, width, pool)
        if len(spread) < height * width:
            return self.search_memory(Memory(*(spread @ part for part in memory)))
        return self.search_memory(Memory(memory.grid_BPD, spread @ memory.keys_BPA))._replace(spread_PQ=spread)

    def _pooling(self, height: int, width: int, pool: int) -> torch.Tensor:
        """As ``pooling``, computed once for each size."""
        sizes = height, width, pool
        if sizes not in self._spreads:
            self._spreads[sizes] = pooling(*sizes).to(self.output_VX.device, self.dtype)
        return self._spreads[sizes]

    @torch.inference_mode()
    def search_memory(self, memory: Memory) -> SearchMemory:
        """``memory``, as the decoder makes it, for beam search."""
        grid_BPD, keys_BPA = (part.to(self.dtype) for part in memory)
        attention, num_cells = self.decoder.attention, grid_BPD.shape[1]
        keys = SearchKeys(keys_BPA, False) if attention is None else attention.search_keys(keys_BPA)
        if rest := -num_cells % cells_alignment(grid_BPD.device):
            grid_BPD = functional.pad(grid_BPD, (0, 0, 0, rest))
        return SearchMemory(grid_BPD, keys, num_cells)

    def start(self, memory: SearchMemory) -> SearchState:
        """The state before the first word, with one beam per image."""
        return SearchState(self.decoder.start_from(memory.mean_grid(), 1), memory)

    def next_scores(self, last_BK: torch.Tensor, search: SearchState) -> tuple[torch.Tensor, SearchState]:
        """Unnormalised scores of the next word (B, K, V, filled up to whole groups) after ``last_BK``, and the new
        state."""
        decoder, memory, shape = self.decoder, search.memory, last_BK.shape
        last_N = last_BK.flatten()
        if self.words_VG is None:
            words_NG = functional.linear(decoder.embedding(last_N), self.weights.words_GE, self.weights.bias_G)
        else:
            words_NG = functional.embedding(last_N, self.words_VG)

        def attend(query_NA: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            assert decoder.attention is not None
            scores_BKP = decoder.attention.search_scores(memory.keys, query_NA.unflatten(0, shape))
            alpha_BKP = scores_BKP.float().softmax(-1).to(self.dtype)
            return memory.context(alpha_BKP).flatten(0, 1), alpha_BKP.flatten(0, 1)

        state = State(*(part.flatten(0, 1) for part in search.state))
        (hidden_NH, cell_NH), _, _ = decoder.advance(words_NG, self.weights.bias_O, state, self.weights, attend)
        state = State(hidden_NH.unflatten(0, shape), cell_NH.unflatten(0, shape))
        if decoder.words_bias_V is not None:
            hidden_NH = decoder.output(hidden_NH)
        scores_NV = functional.linear(hidden_NH, self.output_VX, self.output_bias_V)
        return scores_NV.unflatten(0, shape), search._replace(state=state)


def _aligned(weight_VX: torch.Tensor, bias_V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An output layer, filled up to whole groups of words with some that are never likely: GPUs multiply such matrices
    faster, too."""
    rest = -len(bias_V) % GROUP
    return functional.pad(weight_VX, (0, 0, 0, rest)), functional.pad(bias_V, (0, rest), value=float("-inf"))


def pooling(height: int, width: int, pool: int) -> torch.Tensor:
    """Adaptive average pooling of a grid to ``pool`` x ``pool`` as a matrix (P, Q)."""
    cells = torch.eye(height * width).unflatten(1, (height, width))
    return nn.functional.adaptive_avg_pool2d(cells, pool).flatten(1).T.contiguous()
