"""The recurrent decoder. One ``step`` serves teacher forcing, free running and beam search.

Axes: B images, K captions or beams of an image, T steps, P positions, D grid channels, E embedding, H state,
V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from capray.config import Architecture
from capray.model.attention import build_attention


class Memory(NamedTuple):
    """What the decoder attends over, computed once per image and shared by its captions and beams."""

    grid_BPD: torch.Tensor
    keys_BPA: torch.Tensor

    @staticmethod
    def cat(memories: list[Memory]) -> Memory:
        return Memory(*(torch.cat(parts) for parts in zip(*memories, strict=True)))

    def select(self, images_B: torch.Tensor) -> Memory:
        """The memories of the images at these indices, in their order."""
        return Memory(*(part[images_B] for part in self))


class State(NamedTuple):
    """The recurrent state; ``cell`` is the LSTM's memory and unused by the GRU."""

    hidden_BKH: torch.Tensor
    cell_BKH: torch.Tensor

    def select(self, beams_BK: torch.Tensor) -> State:
        """The states of the beams ``beams_BK`` (indices along K) of each image."""
        index_BKH = beams_BK[..., None].expand(-1, -1, self.hidden_BKH.shape[-1])
        return State(*(part.gather(1, index_BKH) for part in self))


class Decoder(nn.Module):
    """An LSTM or GRU cell that attends over the grid at every step, or is told of the image once, at the start.

    With attention, the state starts from two linear layers of the mean grid, tanh over them or not, and each step's
    input is the word and the gated context (Show, Attend and Tell, sections 3.1.2 and 4.2.1). Without, the projected mean
    grid is the first input and the words follow (Show and Tell, section 3.1).
    """

    def __init__(self, architecture: Architecture, grid_dim: int, vocabulary_size: int):
        super().__init__()
        embed_dim, hidden_dim = architecture.embed_dim, architecture.hidden_dim
        self.attention = build_attention(architecture, grid_dim)
        self.embedding = nn.Embedding(vocabulary_size, embed_dim)
        if self.attention is None:
            self.first_input = nn.Linear(grid_dim, embed_dim)
            input_dim = embed_dim
        else:
            self.squashes_start = architecture.initial_state == "tanh"
            self.initial_hidden = nn.Linear(grid_dim, hidden_dim)
            self.initial_cell = nn.Linear(grid_dim, hidden_dim) if architecture.cell == "lstm" else None
            self.gate = nn.Linear(hidden_dim, grid_dim) if architecture.gate else None
            input_dim = embed_dim + grid_dim
        self.is_lstm = architecture.cell == "lstm"
        self.cell = (nn.LSTMCell if self.is_lstm else nn.GRUCell)(input_dim, hidden_dim)
        self.dropout = nn.Dropout(architecture.output_dropout)
        self.output = nn.Linear(hidden_dim, vocabulary_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.output.weight, -0.1, 0.1)
        nn.init.zeros_(self.output.bias)

    def remember(self, grid_BPD: torch.Tensor, keys_BPA: torch.Tensor | None = None) -> Memory:
        """The memory of ``grid_BPD``, with its keys where they were projected before pooling."""
        if keys_BPA is None:
            keys_BPA = self.attention.project(grid_BPD) if self.attention is not None else grid_BPD[..., :0]
        return Memory(grid_BPD, keys_BPA)

    def start(self, memory: Memory, num_captions: int) -> State:
        """The state before the first word, for ``num_captions`` captions or beams of each image."""
        mean_BD = memory.grid_BPD.mean(1)
        if self.attention is None:
            hidden_dim = self.cell.hidden_size
            zeros_B1H = mean_BD.new_zeros(len(mean_BD), 1, hidden_dim)
            state = self._recur(self.first_input(mean_BD)[:, None], State(zeros_B1H, zeros_B1H))
        else:
            hidden_B1H = self.initial_hidden(mean_BD)[:, None]
            cell_B1H = self.initial_cell(mean_BD)[:, None] if self.initial_cell else hidden_B1H
            state = State(hidden_B1H, cell_B1H)
            if self.squashes_start:
                state = State(*(part.tanh() for part in state))
        return State(*(part.expand(-1, num_captions, -1) for part in state))

    def _recur(self, inputs_BKI: torch.Tensor, state: State) -> State:
        shape = inputs_BKI.shape[:2]
        hidden_NH, cell_NH = (part.flatten(0, 1) for part in state)
        if self.is_lstm:
            hidden_NH, cell_NH = self.cell(inputs_BKI.flatten(0, 1), (hidden_NH, cell_NH))
        else:
            hidden_NH = cell_NH = self.cell(inputs_BKI.flatten(0, 1), hidden_NH)
        return State(hidden_NH.unflatten(0, shape), cell_NH.unflatten(0, shape))

    def step(self, words_BKE: torch.Tensor, state: State, memory: Memory) -> tuple[State, torch.Tensor]:
        """One word further: the new state, and the attention over the grid (B, K, P; P = 0 without attention)."""
        if self.attention is None:
            return self._recur(words_BKE, state), words_BKE.new_zeros(*words_BKE.shape[:2], 0)
        context_BKD, alpha_BKP = self.attention(memory.keys_BPA, memory.grid_BPD, state.hidden_BKH)
        if self.gate is not None:
            context_BKD = torch.sigmoid(self.gate(state.hidden_BKH)) * context_BKD
        return self._recur(torch.cat([words_BKE, context_BKD], -1), state), alpha_BKP

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Unnormalised scores of the next word (…, V) for states (…, H)."""
        return self.output(self.dropout(hidden))

    def teacher_force(
        self, memory: Memory, inputs_BKT: torch.Tensor, lengths_BK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The states (B, K, T, H) and attention (B, K, T, P) when the words ``inputs_BKT`` are given.

        The captions of an image should come longest first: a step then leaves out those that every image has ended.
        States and attention past a caption's length (``lengths_BK``; 0 for padding) are undefined where that caption
        still ran beside a longer one, and zero where it did not; the caller masks by length.
        """
        words_BKTE = self.embedding(inputs_BKT)
        num_captions, num_steps = inputs_BKT.shape[1:]
        state = self.start(memory, num_captions)
        live_T = (lengths_BK[..., None] > torch.arange(num_steps, device=lengths_BK.device)).any(0).sum(0).tolist()
        hidden, alpha = [], []
        for t in range(num_steps):
            state = State(*(part[:, : live_T[t]] for part in state))
            state, alpha_BKP = self.step(words_BKTE[:, : live_T[t], t], state, memory)
            padding = (0, 0, 0, num_captions - live_T[t])
            hidden.append(nn.functional.pad(state.hidden_BKH, padding))
            alpha.append(nn.functional.pad(alpha_BKP, padding))
        return torch.stack(hidden, 2), torch.stack(alpha, 2)
