"""BD-LRU: a linear recurrence with block-diagonal, input-dependent transitions (design section 2).

    v_t = W_v x_t      z_t = W_z x_t + b_z      h_t = A_t h_{t-1} + a0_t * v_t      y_t = W_o vec(h_t)

Legend: B batch, T time, D model width, N blocks, M block size; z gate logits, v values, h state.
"""

from torch import Tensor, nn

from ..kernels import block_diagonal_scan, block_diagonal_scan_packed, check_gate, plane_width
from ..kernels.gates import normalise
from .base import (
    JointProjections,
    Mixer,
    MixerCost,
    ResidualOutput,
    SequenceContext,
    check_sizes,
    gate_bias,
    gate_matrix,
    packed_planes,
)


class BlockDiagonalLRU(JointProjections, Mixer):
    """Block-diagonal linear recurrent unit.

    Args:
        hidden_size: D.
        num_blocks: N; None for as many as make N M = D.
        block_size: M.
        gate: name of the gate function, see `kernels.gates`.
        gate_std: standard deviation of the gate logits at the start; None for that of any other matrix.
    """

    options = ("num_blocks", "block_size", "gate", "gate_std")
    fused_window = False

    def __init__(
        self,
        hidden_size: int,
        num_blocks: int | None = None,
        block_size: int = 4,
        gate: str = "softmax",
        gate_std: float | None = None,
    ):
        super().__init__()
        check_sizes(num_blocks=num_blocks, block_size=block_size)
        check_gate(gate)
        self.gate_std = gate_std
        self.num_blocks = num_blocks or max(1, hidden_size // block_size)
        self.block_size = block_size
        self.gate = gate
        self.backend = "auto"  # of the scan
        width = self.num_blocks * block_size
        self.gate_proj = nn.Linear(hidden_size, width * (block_size + 1))
        self.value_proj = nn.Linear(hidden_size, width, bias=False)
        self.out_proj = ResidualOutput(width, hidden_size, bias=False)

    def forward(self, x: Tensor, state: Tensor | None, context: SequenceContext) -> tuple[Tensor, Tensor]:
        """x (B, T, D), state (B, N, M) -> y (B, T, D), state (B, N, M) in fp32."""
        N, M = self.num_blocks, self.block_size
        if (planes := packed_planes(self, x, M, N * M, plane_width(N * M, M))) is not None:
            bias = gate_bias(self.gate_proj, N * M)
            h, state = block_diagonal_scan_packed(
                planes, N, M, state, context.reset, self.gate, self.backend, bias
            )
        else:
            gates, values = self.project(x)
            values = values.unflatten(-1, (N, M))
            h, state = block_diagonal_scan(
                self._planes(gates), values, state, context.reset, self.gate, self.backend
            )
        return self.out_proj(h.flatten(2)), state

    def joint_projections(self) -> list[nn.Linear]:
        return [self.gate_proj, self.value_proj]

    def _planes(self, gates: Tensor) -> Tensor:
        """Projected gate logits (B, T, (M+1) N M) as (B, T, N, M, M+1).

        Memory holds M + 1 planes, each laid out like the values: neighbouring lanes, a row each, read
        neighbouring addresses.
        """
        planes = gates.unflatten(-1, (self.block_size + 1, self.num_blocks, self.block_size))
        return planes.permute(0, 1, 3, 4, 2)

    def transitions(self, x: Tensor) -> Tensor:
        """A_t (B, T, N, M, M) in fp32."""
        return normalise(self._planes(self.gate_proj(x)).float(), self.gate)[..., : self.block_size]

    def initial_values(self, std: float) -> dict[str, Tensor]:
        """The gates' matrix, where `gate_std` asks for another spread than `std` gives."""
        return gate_matrix(self.gate_proj, self.gate_std)

    def cost(self, context_length: int) -> MixerCost:
        """A row is M + 1 multiply-adds; normalising its M + 1 gates is about 3 operations each."""
        rows, gates = self.num_blocks * self.block_size, self.block_size + 1
        return MixerCost(scan=rows * gates * (2 + 3))

    def state_elements(self, context_length: int) -> int:
        return self.num_blocks * self.block_size
