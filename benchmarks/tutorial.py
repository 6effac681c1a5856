"""Captioning as the well-known tutorial of Show, Attend and Tell does it, the peer of `captioning.py`: one image at a
time; its pooled grid copied for each beam and projected for attention again at every step; finished beams leave.

It is given what helps it: gradients are off and its networks are in evaluation mode. Axes: K beams, P positions, V words.
"""

from __future__ import annotations

import torch
from torch import nn

from capray.vocabulary import END, START


class TutorialCaptioner(nn.Module):
    """Its encoder's ``backbone`` gives a native grid of ``grid_dim`` channels."""

    def __init__(self, backbone: nn.Module, grid_dim: int, vocabulary_size: int, pool: int = 14, width: int = 512):
        super().__init__()
        self.backbone, self.pool = backbone, nn.AdaptiveAvgPool2d(pool)
        self.grid_attention, self.state_attention = nn.Linear(grid_dim, width), nn.Linear(width, width)
        self.score = nn.Linear(width, 1)
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.cell = nn.LSTMCell(width + grid_dim, width)
        self.first_hidden, self.first_cell = nn.Linear(grid_dim, width), nn.Linear(grid_dim, width)
        self.gate = nn.Linear(width, grid_dim)
        self.words = nn.Linear(width, vocabulary_size)

    @torch.no_grad()
    def caption(self, image_13HW: torch.Tensor, beam_size: int, num_steps: int) -> list[int]:
        grid_1PD = self.pool(self.backbone(image_13HW)).permute(0, 2, 3, 1).flatten(1, 2)
        grid_KPD = grid_1PD.expand(beam_size, -1, -1)
        tokens_KT = torch.full((beam_size, 1), START)
        scores_K1 = torch.zeros(beam_size, 1)
        mean = grid_KPD.mean(1)
        hidden, cell = self.first_hidden(mean), self.first_cell(mean)
        complete: list[tuple[float, list[int]]] = []
        for t in range(num_steps):
            energy = torch.relu(self.grid_attention(grid_KPD) + self.state_attention(hidden)[:, None])
            alpha_KP = self.score(energy).squeeze(2).softmax(1)
            context = torch.sigmoid(self.gate(hidden)) * (grid_KPD * alpha_KP[:, :, None]).sum(1)
            words = self.embedding(tokens_KT[:, -1])
            hidden, cell = self.cell(torch.cat([words, context], 1), (hidden, cell))
            total_KV = scores_K1 + self.words(hidden).log_softmax(1)
            best, index = (total_KV[0] if t == 0 else total_KV.flatten()).topk(len(tokens_KT))
            parent, token = index // total_KV.shape[1], index % total_KV.shape[1]
            tokens_KT = torch.cat([tokens_KT[parent], token[:, None]], 1)
            is_live = token != END
            complete += zip(best[~is_live].tolist(), tokens_KT[~is_live].tolist(), strict=True)
            if not is_live.any():
                break
            tokens_KT, scores_K1 = tokens_KT[is_live], best[is_live][:, None]
            hidden, cell, grid_KPD = hidden[parent[is_live]], cell[parent[is_live]], grid_KPD[parent[is_live]]
        return max(complete)[1] if complete else tokens_KT[0].tolist()
