"""The decoder laid out for beam search over many images. Its own step does the work; here is computed once what does not
change between steps: words times input weights as a table, weights cast once, keys in the form that attention is fastest
with, and the grid before pooling.

Axes: B images, K beams, V vocabulary, D grid channels, h and w rows and columns of the native grid, Q its positions, P the
positions that attention sees (Q, or those of the pooled grid), G gates of the cell.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from capray.model.attention import SearchKeys
from capray.model.beam import GROUP
from capray.model.decoder import Decoder, Memory, State
from capray.model.gpu import LARGEST_BEAM, LARGEST_GRID, kernels_of

LARGEST_TABLE_BYTES = 512 * 2**20
"""Of the words' products with the input weights; with a larger vocabulary they are computed at each step."""


class SearchMemory(NamedTuple):
    """What the beams of each image attend over. ``spread_PQ`` turns the native grid into the pooled one; None where they
    are the same, or where each cell of the one is copied equally often into the other."""

    grid_BQD: torch.Tensor
    keys: SearchKeys
    spread_PQ: torch.Tensor | None = None

    def keep(self, images_B: torch.Tensor) -> SearchMemory:
        keys = self.keys._replace(keys_BPA=self.keys.keys_BPA[images_B])
        return self._replace(grid_BQD=self.grid_BQD[images_B], keys=keys)

    def mean_grid(self) -> torch.Tensor:
        """The mean over the positions that attention sees (B, D)."""
        if self.spread_PQ is None:
            return self.grid_BQD.mean(1)
        return (self.spread_PQ.float().mean(0) @ self.grid_BQD.float()).to(self.grid_BQD.dtype)

    def context(self, alpha_BKP: torch.Tensor) -> torch.Tensor:
        """The mean of the grid by the weights ``alpha_BKP`` (B, K, D)."""
        alpha_BKQ = alpha_BKP if self.spread_PQ is None else alpha_BKP @ self.spread_PQ
        return alpha_BKQ @ self.grid_BQD


class SearchState(NamedTuple):
    """What beam search carries: the decoder's state of every beam, and what it attends over."""

    state: State
    memory: SearchMemory

    def select(self, beams_BK: torch.Tensor) -> SearchState:
        """The states of the beams ``beams_BK`` (indices along K) of each image."""
        if kernels := kernels_of(beams_BK.device):
            return self._replace(state=State(*kernels.selected(*self.state, beams_BK)))
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
            return self.search_memory(Memory.cat([Memory(*(spread @ part for part in memory)) for spread, memory in pairs]))
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
        attention = self.decoder.attention
        keys = SearchKeys(keys_BPA, False) if attention is None else attention.search_keys(keys_BPA)
        return SearchMemory(grid_BPD, keys)

    def start(self, memory: SearchMemory) -> SearchState:
        """The state before the first word, with one beam per image."""
        return SearchState(self.decoder.start_from(memory.mean_grid(), 1), memory)

    def next_scores(self, last_BK: torch.Tensor, search: SearchState) -> tuple[torch.Tensor, SearchState]:
        """Unnormalised scores of the next word (B, K, V, filled up to whole groups) after ``last_BK``, and the new
        state."""
        state = State(*(part.flatten(0, 1) for part in search.state))
        num_images, num_beams = last_BK.shape
        kernels = kernels_of(last_BK.device) if self._suits_kernels(search.memory, num_beams) else None
        if kernels is not None:
            state = self._advanced_by(kernels, last_BK, state, search.memory)
        else:
            state = self._advanced(last_BK, state, search.memory)
        hidden_NH = state.hidden_BKH
        if self.decoder.words_bias_V is not None:
            hidden_NH = self.decoder.output(hidden_NH)
        scores_NV = functional.linear(hidden_NH, self.output_VX, self.output_bias_V)
        state = State(*(part.unflatten(0, (num_images, num_beams)) for part in state))
        return scores_NV.unflatten(0, (num_images, num_beams)), search._replace(state=state)

    def _suits_kernels(self, memory: SearchMemory, num_beams: int) -> bool:
        is_small = num_beams <= LARGEST_BEAM and memory.grid_BQD.shape[1] <= LARGEST_GRID
        return is_small and self.words_VG is not None and self.decoder.is_lstm and memory.spread_PQ is None

    def _advanced(self, last_BK: torch.Tensor, state: State, memory: SearchMemory) -> State:
        """The state (N, H) after the words ``last_BK``."""
        decoder, last_N = self.decoder, last_BK.flatten()
        if self.words_VG is None:
            words_NG = functional.linear(decoder.embedding(last_N), self.weights.words_GE, self.weights.bias_G)
        else:
            words_NG = functional.embedding(last_N, self.words_VG)

        def attend(query_NA: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            assert decoder.attention is not None
            scores_BKP = decoder.attention.search_scores(memory.keys, query_NA.unflatten(0, last_BK.shape))
            alpha_BKP = scores_BKP.float().softmax(-1).to(self.dtype)
            return memory.context(alpha_BKP).flatten(0, 1), alpha_BKP.flatten(0, 1)

        state, _, _ = decoder.advance(words_NG, self.weights.bias_O, state, self.weights, attend)
        return state

    def _advanced_by(self, kernels: Any, last_BK: torch.Tensor, state: State, memory: SearchMemory) -> State:
        """As ``_advanced``, with the kernels for a GPU."""
        decoder, attention, context_NG = self.decoder, self.decoder.attention, None
        parts = decoder.parts_of_state(state.hidden_BKH, self.weights.bias_O, self.weights)
        if attention is not None:
            query_NA = parts[-1] if attention.query is not None else state.hidden_BKH
            scores_BKP = attention.search_scores(memory.keys, query_NA.unflatten(0, last_BK.shape))
            gate_ND = parts[1] if decoder.gate is not None else None
            context_NG = kernels.gated_context(scores_BKP, memory.grid_BQD, gate_ND) @ self.weights.context_GD.T
        return State(*kernels.lstm(self.words_VG, last_BK.flatten(), parts[0], context_NG, state.cell_BKH))


def _aligned(weight_VX: torch.Tensor, bias_V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An output layer, filled up to whole groups of words with some that are never likely: GPUs multiply such matrices
    faster, too."""
    rest = -len(bias_V) % GROUP
    return functional.pad(weight_VX, (0, 0, 0, rest)), functional.pad(bias_V, (0, rest), value=float("-inf"))


def pooling(height: int, width: int, pool: int) -> torch.Tensor:
    """Adaptive average pooling of a grid to ``pool`` x ``pool`` as a matrix (P, Q)."""
    cells = torch.eye(height * width).unflatten(1, (height, width))
    return functional.adaptive_avg_pool2d(cells, pool).flatten(1).T.contiguous()
