"""Block-diagonal sLSTM (xLSTM, arXiv 2405.04517): exponential input gates, recurrence in blocks of M units.

    c_t = f_t c_{t-1} + i_t z_t      n_t = f_t n_{t-1} + i_t      h_t = o_t c_t / n_t
    z_t = tanh(..)    i_t = exp(..)    f_t, o_t = sigmoid(..)      each of W x_t + b + U h_{t-1}

U is block-diagonal, so the walk over time runs all blocks side by side. |h_t| <= max(1, |c_0|), as c_t / n_t
averages z. A document starts with c = 0 and n = 1. The state is h, c / n and log n (`kernels/reference.py`).

Legend: B batch, T time, D model width, N blocks, M block size.
"""

import torch
from torch import Tensor

from ..kernels import slstm_scan
from .base import BlockSize, MixerCost
from .bd_gru import BlockDiagonalCell

FORGET_BIAS = (1.0, 6.0)  # of the first and the last block, at the start: f from 0.73 to 0.998


class BlockDiagonalSLSTM(BlockDiagonalCell):
    """sLSTM cells with block-diagonal recurrent matrices, and no more: no convolution, no norm of a head.

    hidden_size: D; num_blocks: N, None for D // M; block_size: M, at most 16.
    """

    kind, gates = "bd_slstm", 4  # z, i, f, o

    def __init__(self, hidden_size: int, num_blocks: int | None = None, block_size: BlockSize = 4):
        super().__init__(hidden_size, num_blocks, block_size)

    def walk(self, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        return slstm_scan(*given)

    def initial_values(self, std: float) -> dict[str, Tensor]:
        """No recurrence, as in the authors' model, and forget gates of many half-lives."""
        N, M = self.num_blocks, self.block_size
        bias = torch.zeros(4, N, M)
        bias[2] = torch.linspace(*FORGET_BIAS, N).unsqueeze(1)
        return {"recurrent_weight": torch.zeros(4 * N * M, M), "bias": bias.flatten()}

    def cost(self, context_length: int) -> MixerCost:
        """Four rows of M multiply-adds a unit, and about 40 operations of gates, one step after another."""
        rows = self.num_blocks * self.block_size
        return MixerCost(sequential=rows * (8 * self.block_size + 40))

    def state_elements(self, context_length: int) -> int:
        return 3 * self.num_blocks * self.block_size
