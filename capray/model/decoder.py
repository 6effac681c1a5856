"""The recurrent decoder. One ``step`` serves teacher forcing, free running and beam search.

Axes: B images, K captions or beams of an image, N those of them that still run, T steps, P positions, D grid channels,
E embedding, H state, G gates of the cell (3H or 4H), O all that a step computes from the state, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

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
    """The recurrent state; ``cell`` is the LSTM's memory, always in fp32, and unused by the GRU."""

    hidden_BKH: torch.Tensor
    cell_BKH: torch.Tensor


class Weights(NamedTuple):
    """The weights every step multiplies by, concatenated and cast once for many steps."""

    words_GE: torch.Tensor
    context_GD: torch.Tensor
    state_OH: torch.Tensor
    """The cell's gates, the gate on the context and attention's query, below each other."""
    bias_G: torch.Tensor
    bias_O: torch.Tensor


Attend = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Queries (N, A) to their contexts (N, D) and the attention (N, P)."""


class _Deferred(torch.autograd.Function):
    """Accumulates one gradient of ``weight_OI`` over all steps. Forward it is the identity on ``outputs_NO``, which each
    step has computed with the weight detached; backward it multiplies the gradients of all steps by their ``inputs`` in
    one product."""

    @staticmethod
    def forward(ctx, outputs_NO: torch.Tensor, weight_OI: torch.Tensor, inputs: list[torch.Tensor]) -> torch.Tensor:
        ctx.inputs = inputs
        return outputs_NO.view_as(outputs_NO)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor):
        (gradient_NO,) = gradients
        return gradient_NO, gradient_NO.T @ torch.cat(ctx.inputs), None


class Decoder(nn.Module):
    """An LSTM or GRU cell that attends over the grid at every step, or is given the image once, at the start.

    With attention, the state starts from two linear layers of the mean grid, tanh over them or not, and each step's
    input is the word and the gated context (Show, Attend and Tell, sections 3.1.2 and 4.2.1). Without, the projected mean
    grid is the first input and the words follow (Show and Tell, section 3.1).
    """

    def __init__(self, architecture: Architecture, grid_dim: int, vocabulary_size: int):
        super().__init__()
        embed_dim, hidden_dim = architecture.embed_dim, architecture.hidden_dim
        self.grid_projection = None
        if architecture.grid_projection is not None:
            self.grid_projection = nn.Linear(grid_dim, architecture.grid_projection)
            grid_dim = architecture.grid_projection
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
        self.output = nn.Linear(hidden_dim, embed_dim if architecture.tie_embeddings else vocabulary_size)
        self.words_bias_V = nn.Parameter(torch.zeros(vocabulary_size)) if architecture.tie_embeddings else None
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        if self.words_bias_V is None:
            nn.init.uniform_(self.output.weight, -0.1, 0.1)
            nn.init.zeros_(self.output.bias)

    def memory_of_grid(self, grid_BPD: torch.Tensor) -> Memory:
        """The memory of ``grid_BPD``, as the encoder gives it. All of it is linear, so that pooling may come after it."""
        if self.grid_projection is not None:
            grid_BPD = self.grid_projection(grid_BPD)
        keys_BPA = self.attention.project(grid_BPD) if self.attention is not None else grid_BPD[..., :0]
        return Memory(grid_BPD, keys_BPA)

    def start(self, memory: Memory, num_captions: int) -> State:
        """The state before the first word, for ``num_captions`` captions or beams of each image."""
        return self.start_from(memory.grid_BPD.mean(1), num_captions)

    def start_from(self, mean_BD: torch.Tensor, num_captions: int) -> State:
        """As ``start``, from the means of the grids."""
        if self.attention is None:
            first = self.cell(self.first_input(mean_BD))
            hidden_BH, cell_BH = first if self.is_lstm else (first, first)
        else:
            hidden_BH = self.initial_hidden(mean_BD)
            cell_BH = self.initial_cell(mean_BD) if self.initial_cell else hidden_BH
            if self.squashes_start:
                hidden_BH, cell_BH = hidden_BH.tanh(), cell_BH.tanh()
        return State(*(part[:, None].expand(-1, num_captions, -1) for part in (hidden_BH, cell_BH.float())))

    def weights(self) -> Weights:
        """The weights of ``step``, in the precision that autocast asks for."""
        layers = self._state_layers()
        words_GE, context_GD = self.cell.weight_ih.tensor_split([self.embedding.embedding_dim], 1)
        state_OH = torch.cat([self.cell.weight_hh, *(layer.weight for layer in layers)])
        bias_O = torch.cat([self.cell.bias_hh, *(layer.bias for layer in layers)])
        weights = Weights(words_GE, context_GD, state_OH, self.cell.bias_ih, bias_O)
        device = words_GE.device.type
        if torch.is_autocast_enabled(device):
            return Weights(*(part.to(torch.get_autocast_dtype(device)) for part in weights))
        return weights

    def step(
        self, words_BKE: torch.Tensor, state: State, memory: Memory, weights: Weights | None = None
    ) -> tuple[State, torch.Tensor]:
        """One word further: the new state, and the attention over the grid (B, K, P; P = 0 without attention).

        ``weights`` saves laying them together again at each of many steps.
        """
        weights = weights or self.weights()
        shape = words_BKE.shape[:2]
        words_NG = functional.linear(words_BKE.flatten(0, 1), weights.words_GE, weights.bias_G)
        state_N = State(*(part.flatten(0, 1) for part in state))
        state_N = state_N._replace(hidden_BKH=state_N.hidden_BKH.to(weights.state_OH.dtype))

        def attend(query_NA: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            assert self.attention is not None
            attended = self.attention(memory.keys_BPA, memory.grid_BPD, query_NA.unflatten(0, shape))
            return attended[0].flatten(0, 1), attended[1].flatten(0, 1)

        state_N, alpha_NP, _ = self.advance(words_NG, weights.bias_O, state_N, weights, attend)
        return State(*(part.unflatten(0, shape) for part in state_N)), alpha_NP.unflatten(0, shape)

    def advance(
        self, words_NG: torch.Tensor, bias_O: torch.Tensor, state: State, weights: Weights, attend: Attend
    ) -> tuple[State, torch.Tensor, torch.Tensor]:
        """The new state of N captions, their attention, and their gated contexts: the one step that teacher forcing, free
        running and beam search share.

        Args:
            words_NG: what the words bring to the cell's gates.
            bias_O: what is added to the state's product.
            attend: how they attend over their images' grids.
        """
        hidden_NH, cell_NH = state
        parts = self.parts_of_state(hidden_NH, bias_O, weights)
        if self.attention is None:
            alpha_NP = context_ND = hidden_NH[:, :0]
        else:
            context_ND, alpha_NP = attend(parts[-1] if self.attention.query is not None else hidden_NH)
            if self.gate is not None:
                context_ND = torch.sigmoid(parts[1]) * context_ND
            context_ND = context_ND.to(words_NG.dtype)
            words_NG = torch.addmm(words_NG, context_ND, weights.context_GD.T)
        return self._recur(words_NG, parts[0], hidden_NH, cell_NH), alpha_NP, context_ND

    def parts_of_state(self, hidden_NH: torch.Tensor, bias_O: torch.Tensor, weights: Weights) -> tuple[torch.Tensor, ...]:
        """What the state brings to the cell's gates and, where there are such, to the context's gate and to attention's
        query."""
        sizes = [len(self.cell.weight_hh), *(layer.out_features for layer in self._state_layers())]
        return torch.addmm(bias_O, hidden_NH, weights.state_OH.T).split(sizes, 1)

    def _state_layers(self) -> list[nn.Linear]:
        """The layers over the state besides the cell's, in the order of their weights in ``Weights.state_OH``."""
        layers = [self.gate, self.attention.query] if self.attention is not None else []
        return [layer for layer in layers if layer is not None]

    def _recur(
        self, inputs_NG: torch.Tensor, gates_NG: torch.Tensor, hidden_NH: torch.Tensor, cell_NH: torch.Tensor
    ) -> State:
        """torch's LSTMCell and GRUCell from the products of their input and of their state. What an LSTM adds up over many
        steps, its cell, would lose small changes to the rounding of bf16."""
        if self.is_lstm:
            keep_in, forget, candidate, out = (inputs_NG + gates_NG).chunk(4, 1)
            cell_NH = forget.sigmoid() * cell_NH + keep_in.sigmoid() * candidate.tanh()
            return State((out.sigmoid() * cell_NH.tanh()).to(hidden_NH.dtype), cell_NH)
        (reset_in, update_in, new_in), (reset, update, new) = inputs_NG.chunk(3, 1), gates_NG.chunk(3, 1)
        new = torch.tanh(new_in + torch.sigmoid(reset_in + reset) * new)
        hidden_NH = torch.lerp(new, hidden_NH, torch.sigmoid(update_in + update))
        return State(hidden_NH, hidden_NH)

    def dropout_mask(self, *shape: int) -> torch.Tensor | None:
        """What dropout makes of ones (…, H), for ``logits`` of several passes that must see the same; None where nothing is
        dropped."""
        if not self.training or not self.dropout.p:
            return None
        return self.dropout(torch.ones(*shape, self.cell.hidden_size, device=self.embedding.weight.device))

    def logits(self, hidden: torch.Tensor, dropout_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Unnormalised scores of the next word (…, V) for states (…, H); ``dropout_mask`` takes the place of dropout."""
        hidden = self.dropout(hidden) if dropout_mask is None else hidden * dropout_mask.to(hidden.dtype)
        if self.words_bias_V is not None:
            hidden = self.output(hidden)
        return functional.linear(hidden, *self.output_layer())

    def output_layer(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (V, X) and bias (V,) of the last layer before the words: X is the state's width, or with tied embeddings
        theirs."""
        if self.words_bias_V is None:
            return self.output.weight, self.output.bias
        return self.embedding.weight, self.words_bias_V

    def attend_at(self, memory: Memory, image_N: torch.Tensor, caption_N: torch.Tensor, shape: list[int]) -> Attend:
        """Attention for captions that stand at (``image_N``, ``caption_N``) among ``shape`` images and captions."""

        def attend(query_NA: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            assert self.attention is not None
            num_images, num_captions = shape
            place_N = image_N * num_captions + caption_N
            query_BKA = query_NA.new_zeros(num_images * num_captions, query_NA.shape[1]).index_copy(0, place_N, query_NA)
            attended = self.attention(memory.keys_BPA, memory.grid_BPD, query_BKA.unflatten(0, shape))
            return attended[0].flatten(0, 1)[place_N], attended[1].flatten(0, 1)[place_N]

        return attend

    def teacher_force(
        self, memory: Memory, inputs_BKT: torch.Tensor, lengths_BK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The states (B, K, T, H) and attention (B, K, T, P) when the words ``inputs_BKT`` are given; zero past a
        caption's length (``lengths_BK``; 0 for padding).

        A step computes only the captions that still run. Attention covers images and captions up to the last of those:
        images and their captions best come longest first.
        """
        num_images, num_captions, num_steps = inputs_BKT.shape
        lengths_N, order_N = lengths_BK.flatten().sort(descending=True, stable=True)
        steps_T = torch.arange(num_steps, device=lengths_BK.device)
        runs_TN = steps_T[:, None] < lengths_N
        images_TN, captions_TN = (part * runs_TN for part in (order_N // num_captions + 1, order_N % num_captions + 1))
        extents = torch.stack([runs_TN.sum(1), images_TN.amax(1), captions_TN.amax(1)], 1).tolist()

        weights = self.weights()
        words_NE = self.embedding(inputs_BKT.flatten(0, 1)[order_N].T[runs_TN])
        states, contexts = [], []
        words_NG = functional.linear(words_NE, weights.words_GE, weights.bias_G)
        words_NG = _Deferred.apply(words_NG, weights.context_GD, contexts)
        bias_NO = _Deferred.apply(weights.bias_O.expand(len(words_NG), -1), weights.state_OH, states)
        sizes = [num_running for num_running, _, _ in extents]
        weights = Weights(*(part.detach() for part in weights))
        state = State(*(part.flatten(0, 1)[order_N] for part in self.start(memory, num_captions)))
        state = state._replace(hidden_BKH=state.hidden_BKH.to(words_NG.dtype))
        hidden, alpha = [], []
        for words, bias, (num, *shape) in zip(words_NG.split(sizes), bias_NO.split(sizes), extents, strict=True):
            if shape[0] < len(memory.grid_BPD):
                memory = Memory(*(part[: shape[0]] for part in memory))
            state = State(*(part[:num] for part in state))
            states.append(state.hidden_BKH.detach())
            attend = self.attend_at(memory, order_N[:num] // num_captions, order_N[:num] % num_captions, shape)
            state, alpha_NP, context_ND = self.advance(words, bias, state, weights, attend)
            contexts.append(context_ND.detach())
            hidden.append(state.hidden_BKH)
            alpha.append(alpha_NP)
        where = (order_N * num_steps + steps_T[:, None])[runs_TN]
        size = (num_images, num_captions, num_steps)
        return tuple(
            part.new_zeros(lengths_BK.numel() * num_steps, part.shape[1]).index_copy(0, where, part).unflatten(0, size)
            for part in (torch.cat(hidden), torch.cat(alpha))
        )
