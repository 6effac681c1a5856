"""Attention over the grid. The grid's projection is computed once per image, never per step, caption or beam.

Axes: B images, K captions or beams of an image, P positions of the grid, D its channels, H the decoder's state,
A the attention's hidden layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from capray.config import Architecture
from capray.errors import ConfigError
from capray.model.gpu import kernels_of

LARGEST_EXPONENT = 40.0
"""exp of twice this is a float32 still; beyond it attention goes back to the sigmoid. Clamping would change scores."""


class SearchKeys(NamedTuple):
    """Keys as beam search wants them: as they are, or exp(-keys)."""

    keys_BPA: torch.Tensor
    exponential: bool


class Attention(nn.Module):
    """Scores every position of the grid for a decoder state. ``project`` once per image, ``scores`` per step."""

    def __init__(self) -> None:
        super().__init__()
        self.query: nn.Linear | None = None
        """What turns the decoder's state into a query; None where the state itself is one."""

    def project(self, grid_BPD: torch.Tensor) -> torch.Tensor:
        """The keys: (B, P, …), linear in the grid, so that pooling may come after it."""
        raise NotImplementedError

    def scores(self, keys_BPA: torch.Tensor, query_BKA: torch.Tensor) -> torch.Tensor:
        """Unnormalised scores (B, K, P); only their differences between positions mean anything."""
        return query_BKA @ keys_BPA.transpose(1, 2)

    def search_keys(self, keys_BPA: torch.Tensor) -> SearchKeys:
        """``keys_BPA`` in the form in which ``search_scores`` is fastest; without gradients."""
        return SearchKeys(keys_BPA, False)

    def search_scores(self, keys: SearchKeys, query_BKA: torch.Tensor) -> torch.Tensor:
        """As ``scores``, from ``search_keys``; without gradients."""
        return self.scores(keys.keys_BPA, query_BKA)

    def forward(
        self, keys_BPA: torch.Tensor, grid_BPD: torch.Tensor, query_BKA: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The context (B, K, D) and the weights (B, K, P) that sum to 1 over positions."""
        alpha_BKP = self.scores(keys_BPA, query_BKA).float().softmax(-1)
        return alpha_BKP.to(grid_BPD.dtype) @ grid_BPD, alpha_BKP


class AdditiveAttention(Attention):
    """score(h, g) = v · act(W_h h + W_g g) (Bahdanau et al. 2015, appendix A.1.2; ReLU in Show, Attend and Tell's
    reimplementations). With tanh it is also Luong's concat (2015, section 3.1)."""

    def __init__(self, grid_dim: int, hidden_dim: int, attention_dim: int, activation: str = "tanh"):
        super().__init__()
        self.grid = nn.Linear(grid_dim, attention_dim)
        self.query = nn.Linear(hidden_dim, attention_dim)
        self.energy = nn.Linear(attention_dim, 1)
        # tanh(x) = 2 sigmoid(2x) - 1, whose -1 is the same for all positions; torch's sigmoid on a CPU is 3-7x faster.
        self.activation, self.scale = {"tanh": (torch.sigmoid_, 2), "relu": (torch.relu_, 1)}[activation]

    def project(self, grid_BPD: torch.Tensor) -> torch.Tensor:
        return self.scale * self.grid(grid_BPD)

    def scores(self, keys_BPA: torch.Tensor, query_BKA: torch.Tensor) -> torch.Tensor:
        hidden_BKPA = self.activation(keys_BPA[:, None] + self.scale * query_BKA[:, :, None])
        return functional.linear(hidden_BKPA, self.scale * self.energy.weight, self.energy.bias).squeeze(-1)

    def search_keys(self, keys_BPA: torch.Tensor) -> SearchKeys:
        """On a CPU the exponentials of the sigmoid 1 / (1 + e^-k e^-q) are taken once per image and once per query, not for
        every pair of them."""
        if self.scale == 1 or keys_BPA.is_cuda or not keys_BPA.numel() or keys_BPA.abs().amax() > LARGEST_EXPONENT:
            return SearchKeys(keys_BPA, False)
        return SearchKeys(torch.exp(-keys_BPA.float()).to(keys_BPA.dtype), True)

    def search_scores(self, keys: SearchKeys, query_BKA: torch.Tensor) -> torch.Tensor:
        if kernels := kernels_of(query_BKA.device):
            weight_A, is_relu = self.energy.weight[0], self.activation is torch.relu_
            return kernels.additive_scores(keys.keys_BPA, query_BKA, weight_A, self.scale, is_relu)
        if not keys.exponential:
            return self.scores(keys.keys_BPA, query_BKA)
        if self.scale * query_BKA.abs().amax() > LARGEST_EXPONENT:
            return self.scores(-keys.keys_BPA.float().log().to(query_BKA.dtype), query_BKA)
        query_BKA = torch.exp(-self.scale * query_BKA.float()).to(query_BKA.dtype)
        weight_A = self.scale * self.energy.weight[0]
        scores_BKP = query_BKA.new_empty(*query_BKA.shape[:2], keys.keys_BPA.shape[1])
        one, hidden_KPA = query_BKA.new_ones(()), keys.keys_BPA.new_empty(query_BKA.shape[1], *keys.keys_BPA.shape[1:])
        for keys_PA, query_KA, scores_KP in zip(keys.keys_BPA, query_BKA, scores_BKP, strict=True):
            torch.addcmul(one, keys_PA, query_KA[:, None], out=hidden_KPA)
            torch.matmul(hidden_KPA.reciprocal_(), weight_A, out=scores_KP)
        return scores_BKP


class GeneralAttention(Attention):
    """score(h, g) = h · W g (Luong et al. 2015, section 3.1)."""

    def __init__(self, grid_dim: int, hidden_dim: int):
        super().__init__()
        self.grid = nn.Linear(grid_dim, hidden_dim, bias=False)

    def project(self, grid_BPD: torch.Tensor) -> torch.Tensor:
        return self.grid(grid_BPD)


class DotAttention(Attention):
    """score(h, g) = h · g (Luong et al. 2015, section 3.1)."""

    def project(self, grid_BPD: torch.Tensor) -> torch.Tensor:
        return grid_BPD


def build_attention(architecture: Architecture, grid_dim: int) -> Attention | None:
    """The attention that ``architecture`` names; None for ``none``.

    Raises:
        ConfigError: the dot score with a grid and a state of different widths.
    """
    hidden_dim, attention_dim = architecture.hidden_dim, architecture.attention_dim
    if architecture.attention == "none":
        return None
    if architecture.attention == "additive":
        return AdditiveAttention(grid_dim, hidden_dim, attention_dim, architecture.attention_activation)
    if architecture.multiplicative_score == "concat":
        return AdditiveAttention(grid_dim, hidden_dim, attention_dim, "tanh")
    if architecture.multiplicative_score == "general":
        return GeneralAttention(grid_dim, hidden_dim)
    if grid_dim != hidden_dim:
        raise ConfigError(
            f"--multiplicative-score dot needs --hidden-dim equal to the encoder's {grid_dim} channels, not {hidden_dim}: "
            f"give --hidden-dim {grid_dim} or --multiplicative-score general"
        )
    return DotAttention()
