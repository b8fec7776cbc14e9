"""minGRU (Feng et al., arXiv 2410.01201): a GRU whose gate does not read the state.

    h_t = (1 - z_t) h_{t-1} + z_t W_h x_t      z_t = sigmoid(W_z x_t + b)

It is BD-LRU with M = 1: a softmax of the logits (0, z) is (1 - sigmoid(z), sigmoid(z)). BD-LRU itself has a
second matrix of logits, of which only the difference counts. minLSTM is BD-LRU with M = 1 and the gate
`sigmoid`: f / (f + i) and i / (f + i).
"""

import torch
from torch import Tensor, nn

from .base import ResidualOutput, check_sizes
from .linear_recurrence import LinearRecurrence


class MinGRU(LinearRecurrence):
    """minGRU. hidden_size: D; width: number of units, None for D."""

    gate = "softmax"
    block_size = 1

    def __init__(self, hidden_size: int, width: int | None = None):
        super().__init__()
        check_sizes(width=width)
        self.num_blocks = width or hidden_size
        self.gate_proj = nn.Linear(hidden_size, self.num_blocks)
        self.value_proj = nn.Linear(hidden_size, self.num_blocks, bias=False)
        self.out_proj = ResidualOutput(self.num_blocks, hidden_size, bias=False)
        self.draw_parameters()

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.gate_proj(x)  # (B, T, N)
        return torch.stack([torch.zeros_like(z), z], dim=-1).unsqueeze(3), self.value_proj(x).unsqueeze(-1)
