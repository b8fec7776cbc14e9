"""Structured linear CDE (SLiCE; Walker et al., arXiv 2505.17761): transitions that are linear in the input.

    h_t = (I + W(x_t)) h_{t-1} + W_v x_t      W(x) block-diagonal, each entry a linear function of x

Nothing bounds the state. `scaled` divides each row of I + W(x) by its absolute sum where that is above 1, and
then the bound of docs/design.md, section 2, holds for the homogeneous part.
"""

import torch
from torch import Tensor, nn

from .base import BlockSize, ResidualOutput, check_sizes
from .linear_recurrence import LinearRecurrence, precise


class SLiCE(LinearRecurrence):
    """Block-diagonal SLiCE.

    hidden_size: D; num_blocks: N, None for D // M; block_size: M; scaled: whether rows' sums are kept to 1.
    """

    def __init__(
        self,
        hidden_size: int,
        num_blocks: int | None = None,
        block_size: BlockSize = 4,
        scaled: bool = False,
    ):
        super().__init__()
        check_sizes(num_blocks=num_blocks, block_size=block_size)
        self.num_blocks, self.block_size = num_blocks or max(1, hidden_size // block_size), block_size
        self.scaled = scaled
        rows = self.num_blocks * block_size
        self.transition_proj = nn.Linear(hidden_size, rows * block_size)
        self.value_proj = nn.Linear(hidden_size, rows, bias=False)
        self.out_proj = ResidualOutput(rows, hidden_size, bias=False)
        self.draw_parameters()

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        N, M = self.num_blocks, self.block_size
        A = precise(self.transition_proj(x)).unflatten(-1, (N, M, M))
        A = A + torch.eye(M, dtype=A.dtype, device=A.device)
        if self.scaled:
            A = A / A.abs().sum(dim=-1, keepdim=True).clamp(min=1)
        gates = torch.cat([A, torch.ones_like(A[..., :1])], dim=-1)
        return gates, precise(self.value_proj(x)).unflatten(-1, (N, M))
