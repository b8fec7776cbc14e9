"""PD-SSM (Terzic et al., arXiv 2509.22284): transitions that permute states, times a complex diagonal.

    h_t = P_t D_t h_{t-1} + W_v x_t      P_t: one 1 in each column, where the column of L_t is largest
    L_t = sum_k softmax(W_s x_t)_k L^k   D_t = diag(sigmoid(W_r x_t) exp(i theta_t))

L^k is a learnt dictionary of K matrices. The gradient of P is that of a softmax over each column of L. Blocks
of M complex states are dense blocks of 2 M rows to the scan. A block's state is bounded in its absolute sum,
as that of a column of P D is below 1. Where two entries of a column are nearly equal, rounding to bf16 may
select the other one.
"""

import math

import torch
from torch import Tensor, nn

from ..kernels.dispatch import own_dtypes
from .base import MixerCost, ResidualOutput, check_sizes
from .linear_recurrence import LinearRecurrence, precise

KEPT = 3.0  # logit of |D| at the start: 0.953


class PermutationDiagonal(LinearRecurrence):
    """Block-diagonal PD-SSM.

    hidden_size: D; num_blocks: N, None for D // (2 M); states: M complex states a block, up to 8 on a GPU's
    fast path; dictionary: K matrices a block.
    """

    def __init__(self, hidden_size: int, num_blocks: int | None = None, states: int = 5, dictionary: int = 8):
        super().__init__()
        check_sizes(num_blocks=num_blocks, states=states, dictionary=dictionary)
        self.states, self.dictionary, self.block_size = states, dictionary, 2 * states
        self.num_blocks = N = num_blocks or max(1, hidden_size // (2 * states))
        self.select_proj = nn.Linear(hidden_size, N * dictionary, bias=False)
        self.magnitude_proj = nn.Linear(hidden_size, N * states)
        self.phase_proj = nn.Linear(hidden_size, N * states)
        self.matrices = nn.Parameter(torch.empty(N * dictionary, states * states))  # L^k
        self.value_proj = nn.Linear(hidden_size, 2 * N * states, bias=False)
        self.out_proj = ResidualOutput(2 * N * states, hidden_size, bias=False)
        self.draw_parameters()

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        N, M = self.num_blocks, self.states
        P = self._selected(x)
        r = precise(self.magnitude_proj(x)).sigmoid().unflatten(-1, (N, 1, M))
        # From -pi to pi, so that the phases start at 0.
        theta = 2 * math.pi * (precise(self.phase_proj(x)).sigmoid() - 0.5).unflatten(-1, (N, 1, M))
        real, imaginary = P * (r * theta.cos()), P * (r * theta.sin())  # (B, T, N, M, M)
        A = torch.cat([torch.cat([real, -imaginary], -1), torch.cat([imaginary, real], -1)], dim=-2)
        gates = torch.cat([A, torch.ones_like(A[..., :1])], dim=-1)
        return gates, precise(self.value_proj(x)).unflatten(-1, (N, 2 * M))

    def _selected(self, x: Tensor) -> Tensor:
        """P (B, T, N, M, M): forward its ones, backward the softmax of its columns."""
        N, K, M = self.num_blocks, self.dictionary, self.states
        shares = precise(self.select_proj(x)).unflatten(-1, (N, K)).softmax(-1)
        with own_dtypes(x):
            matrices = self.matrices.to(shares.dtype).view(N, K, M * M)
            logits = torch.einsum("btnk,nkm->btnm", shares, matrices).unflatten(-1, (M, M))
        soft = logits.softmax(dim=-2)
        hard = torch.zeros_like(soft).scatter(-2, soft.argmax(dim=-2, keepdim=True), 1.0)
        return hard + (soft - soft.detach())

    def initial_values(self, std: float) -> dict[str, Tensor]:
        """The dictionary as published."""
        return {
            "matrices": torch.randn(self.matrices.shape) / self.states**0.5,
            "magnitude_proj.bias": torch.full((self.num_blocks * self.states,), KEPT),
        }

    def cost(self, context_length: int) -> MixerCost:
        """The scan of dense blocks, and the sums over the dictionary."""
        made = self.num_blocks * self.states**2 * (2 * self.dictionary + 6)
        return MixerCost(scan=super().cost(context_length).scan + made)
