"""Block-diagonal GRU: a non-linear recurrence whose gates read the state, within blocks of M units.

    h_t = (1 - z_t) n_t + z_t h_{t-1}
    r_t, z_t = sigmoid(W x_t + U h_{t-1})      n_t = tanh(W_n x_t + r_t (U_n h_{t-1}))

U is block-diagonal, so the walk over time runs all blocks side by side; `solver: newton` solves for all steps
at once (`kernels/scan/gru.py`). |h_t| <= max(1, |h_0|), as a step averages h_{t-1} and a tanh.

Legend: B batch, T time, D model width, N blocks, M block size.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..kernels import gru_scan
from ..kernels.scan.gru import MOST_BLOCK, check_solver
from .base import BlockSize, Mixer, MixerCost, ResidualOutput, SequenceContext, check_sizes, is_exported


class BlockDiagonalCell(Mixer):
    """Parameters and forward pass of a cell whose recurrent matrices are block-diagonal.

    gates: how many maps read the input; as many read the state. Both cells have 4 biases.
    """

    kind: ClassVar[str]  # the mixer's type, for messages
    gates: ClassVar[int]

    def __init__(self, hidden_size: int, num_blocks: int | None, block_size: int):
        super().__init__()
        check_sizes(num_blocks=num_blocks, block_size=block_size)
        if block_size > MOST_BLOCK:
            raise ValueError(f"block_size of {self.kind} must be at most {MOST_BLOCK}, not {block_size}")
        self.num_blocks, self.block_size = num_blocks or max(1, hidden_size // block_size), block_size
        rows = self.num_blocks * block_size
        self.in_proj = nn.Linear(hidden_size, self.gates * rows, bias=False)
        self.recurrent_weight = nn.Parameter(torch.empty(self.gates * rows, block_size))
        self.bias = nn.Parameter(torch.empty(4 * rows))
        self.out_proj = ResidualOutput(rows, hidden_size, bias=False)
        self.draw_parameters()

    def walk(self, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        """h (B, T, N, M) and the state after, of the scan's arguments up to `reset`."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, state: Tensor | None = None, context: SequenceContext | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> y (B, T, D); state (B, N, M) of the GRU, (B, 3, N, M) of the sLSTM, in fp32."""
        G, N, M = self.gates, self.num_blocks, self.block_size
        h, state = self.walk(
            self.in_proj(x).unflatten(-1, (G, N, M)),
            self.recurrent_weight.view(G, N, M, M),
            self.bias.view(4, N, M),
            state,
            SequenceContext.of(x, context).reset,
        )
        return self.out_proj(h.flatten(2).to(x.dtype)), state

    def planes(self) -> dict[str, int]:
        return {"in_proj.weight": self.gates}


class BlockDiagonalGRU(BlockDiagonalCell):
    """GRU with block-diagonal recurrent matrices.

    hidden_size: D; num_blocks: N, None for D // M; block_size: M, at most 16; solver: walk or newton. Of
    newton, `solve` tells (iterations, residual) of the last forward pass.
    """

    kind, gates = "bd_gru", 3  # r, z, n

    def __init__(
        self,
        hidden_size: int,
        num_blocks: int | None = None,
        block_size: BlockSize = 4,
        solver: str = "walk",
    ):
        check_solver(solver)
        super().__init__(hidden_size, num_blocks, block_size)
        self.solver = solver
        self.solve: Tensor | None = None

    def walk(self, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        # A graph cannot depend on how many iterations it takes.
        h, state, solve = gru_scan(*given, "walk" if is_exported() else self.solver)
        if self.solver == "newton":
            self.solve = solve
        return h, state

    def initial_values(self, std: float) -> dict[str, Tensor]:
        """Orthogonal blocks, and update gates that start by keeping 0.73 of the state."""
        N, M = self.num_blocks, self.block_size
        blocks = torch.linalg.qr(torch.randn(3 * N, M, M))[0]
        bias = torch.zeros(4, N * M)
        bias[1] = 1.0
        return {"recurrent_weight": blocks.flatten(0, 1), "bias": bias.flatten()}

    def cost(self, context_length: int) -> MixerCost:
        """Three rows of M multiply-adds a unit, and about 25 operations of gates, one step after another."""
        rows = self.num_blocks * self.block_size
        return MixerCost(sequential=rows * (6 * self.block_size + 25))

    def state_elements(self, context_length: int) -> int:
        return self.num_blocks * self.block_size
