"""The LRU (Orvieto et al., arXiv 2303.06349): constant complex decays, each a rotation of two rows.

    h_t = lambda h_{t-1} + gamma W_v x_t      lambda = exp(-exp(nu) + i theta)
    y_t = Re(C h_t) + d * x_t                 gamma = sqrt(1 - |lambda|^2)

A complex number is a block of M = 2: its multiplication by r e^(i theta) is r times a rotation by theta.
"""

import math

import torch
from torch import Tensor, nn

from .base import ResidualOutput, check_positive, check_sizes
from .linear_recurrence import LinearRecurrence, input_scale, precise


class ComplexLRU(LinearRecurrence):
    """Complex diagonal LRU.

    hidden_size: D; num_blocks: N complex numbers, None for D // 2; shortest, longest: half-lives in tokens,
    between which |lambda| starts; max_phase: of theta at the start.
    """

    block_size = 2

    def __init__(
        self,
        hidden_size: int,
        num_blocks: int | None = None,
        shortest: float = 4.0,
        longest: float = 512.0,
        max_phase: float = 6.283,
    ):
        super().__init__()
        check_sizes(num_blocks=num_blocks)
        check_positive(shortest=shortest, longest=longest)
        if shortest > longest:
            raise ValueError(f"half-lives from shortest={shortest} to longest={longest} are no range above 0")
        self.num_blocks = num_blocks or max(1, hidden_size // 2)
        self.half_lives, self.max_phase = (shortest, longest), max_phase
        self.nu = nn.Parameter(torch.empty(self.num_blocks))
        self.theta = nn.Parameter(torch.empty(self.num_blocks))
        self.value_proj = nn.Linear(hidden_size, 2 * self.num_blocks, bias=False)
        self.out_proj = ResidualOutput(2 * self.num_blocks, hidden_size, bias=False)
        self.skip = nn.Parameter(torch.empty(hidden_size))
        self.draw_parameters()

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rate = precise(self.nu).exp()  # -log |lambda|
        r, theta = (-rate).exp(), precise(self.theta)
        cos, sin, gamma = r * theta.cos(), r * theta.sin(), input_scale(-rate)
        rows = [torch.stack([cos, -sin, gamma], dim=-1), torch.stack([sin, cos, gamma], dim=-1)]
        gates = torch.stack(rows, dim=1)  # (N, 2, 3)
        values = self.value_proj(x).unflatten(-1, (self.num_blocks, 2))
        return gates.expand(*x.shape[:2], *gates.shape), precise(values)

    def read_out(self, h: Tensor, x: Tensor) -> Tensor:
        return super().read_out(h, x) + self.skip.to(x.dtype) * x

    def initial_values(self, std: float) -> dict[str, Tensor]:
        """As published: eigenvalues uniform on a ring of the complex plane, the skip normal."""
        low, high = (2 ** (-2 / life) for life in self.half_lives)  # |lambda|^2
        square = low + (high - low) * torch.rand(self.num_blocks)
        return {
            "nu": (-0.5 * square.log()).log(),
            "theta": self.max_phase * torch.rand(self.num_blocks),
            "skip": torch.randn(self.skip.numel()) / math.sqrt(self.skip.numel()),
        }
