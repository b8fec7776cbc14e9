"""Block-diagonal sLSTM (xLSTM, arXiv 2405.04517): exponential input gates, recurrence in blocks of M units.

    c_t = f_t c_{t-1} + i_t z_t      n_t = f_t n_{t-1} + i_t      h_t = o_t c_t / n_t
    z_t = tanh(..)    i_t = exp(..)    f_t, o_t = sigmoid(..)      each of W x_t + b + U h_{t-1}

U is block-diagonal, so the walk over time runs all blocks side by side. |h_t| <= max(1, |c_0|), as c_t / n_t
averages z. A document starts with c = 0 and n = 1. The state is h, c / n and log n (`kernels/reference.py`).

Legend: B batch, T time, D model width, N blocks, M block size.
"""

import torch
from torch import Tensor, nn

from ..kernels import slstm_scan
from .base import BlockSize, Mixer, MixerCost, ResidualOutput, SequenceContext
from .bd_gru import check_blocks

FORGET_BIAS = (1.0, 6.0)  # of the first and the last block, at the start: f from 0.73 to 0.998


class BlockDiagonalSLSTM(Mixer):
    """sLSTM cells with block-diagonal recurrent matrices, and no more: no convolution, no norm of a head.

    hidden_size: D; num_blocks: N, None for D // M; block_size: M, at most 16.
    """

    def __init__(self, hidden_size: int, num_blocks: int | None = None, block_size: BlockSize = 4):
        super().__init__()
        check_blocks("bd_slstm", num_blocks, block_size)
        self.num_blocks, self.block_size = num_blocks or max(1, hidden_size // block_size), block_size
        rows = self.num_blocks * block_size
        self.in_proj = nn.Linear(hidden_size, 4 * rows, bias=False)  # of z, i, f, o
        self.recurrent_weight = nn.Parameter(torch.empty(4 * rows, block_size))
        self.bias = nn.Parameter(torch.empty(4 * rows))
        self.out_proj = ResidualOutput(rows, hidden_size, bias=False)
        self.draw_parameters()

    def forward(
        self, x: Tensor, state: Tensor | None = None, context: SequenceContext | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> y (B, T, D); state (B, 3, N, M) in fp32."""
        N, M = self.num_blocks, self.block_size
        h, state = slstm_scan(
            self.in_proj(x).unflatten(-1, (4, N, M)),
            self.recurrent_weight.view(4, N, M, M),
            self.bias.view(4, N, M),
            state,
            None if context is None else context.reset,
        )
        return self.out_proj(h.flatten(2).to(x.dtype)), state

    def initial_values(self, std: float) -> dict[str, Tensor]:
        """No recurrence, as in the authors' model, and forget gates of many half-lives."""
        N, M = self.num_blocks, self.block_size
        bias = torch.zeros(4, N, M)
        bias[2] = torch.linspace(*FORGET_BIAS, N).unsqueeze(1)
        return {"recurrent_weight": torch.zeros(4 * N * M, M), "bias": bias.flatten()}

    def planes(self) -> dict[str, int]:
        return {"in_proj.weight": 4}

    def cost(self, context_length: int) -> MixerCost:
        """Four rows of M multiply-adds a unit, and about 40 operations of gates, one step after another."""
        rows = self.num_blocks * self.block_size
        return MixerCost(sequential=rows * (8 * self.block_size + 40))

    def state_elements(self, context_length: int) -> int:
        return 3 * self.num_blocks * self.block_size
