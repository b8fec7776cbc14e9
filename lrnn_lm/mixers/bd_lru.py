"""BD-LRU: a linear recurrence with block-diagonal, input-dependent transitions (docs/design.md, section 2).

    v_t = W_v x_t      z_t = W_z x_t + b_z      h_t = A_t h_{t-1} + a0_t * v_t      y_t = W_o vec(h_t)

Legend: B batch, T time, D model width, N blocks, M block size; z gate logits, v values, h state. The state
has N M rows, each with K gates: M for its block's entries of the state, and the input gate. A plane is one of
the K gates of all rows: the projection writes (B, T, K, N M), and the kernels read it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels import block_diagonal_scan, plane_width, scan_packed
from ..kernels.gates import normalise
from .base import (
    BlockSize,
    GateName,
    HalfLives,
    JointProjections,
    Mixer,
    MixerCost,
    Reach,
    ResidualOutput,
    SequenceContext,
    check_sizes,
    gate_bias,
    packed_planes,
)
from .initial_gates import check_gates, gate_bias_of_half_lives, gate_matrix
from .short_conv import ShortConvolution


class BlockDiagonalLRU(JointProjections, Mixer):
    """Block-diagonal linear recurrent unit: in each block, h_t = A_t h_{t-1} + a_t * v_t.

    v_t and the logits of [A_t, a_t] are projections of x_t. The gate function normalises each row of
    [A_t, a_t], so the state stays bounded (`none` does not).

    Args:
        hidden_size: D.
        num_blocks: N; None for D // M.
        block_size: M.
        gate: name of the gate function, see `kernels.gates`.
        gate_std: initial standard deviation of the gate logits; None: W_z starts like any other matrix.
        half_life: [shortest, longest] initial half-life of the state's rows, in tokens, see `initial_gates`;
            None for equal gates.
        short_conv: reach in tokens of a short convolution of the input; None for none.
        output_gate: whether to multiply states by silu(W_g x) before the output projection; None for no.
        norm_groups: number of groups of neighbouring rows whose states are divided by their root mean square
            before the output projection; None for no norm.
        input_logit: whether the input gate has logits of its own; None for yes. Without, they are 0, and a
            softmax gives the same functions of x with M planes of weights in place of M + 1, because only
            differences of logits matter to it.
    Raises:
        ValueError: a size below 1, a size that does not divide as needed, an unknown gate, initial gates that
            the gate function cannot give, or `input_logit: false` with a gate other than softmax.

    Source: Dubinin, Orvieto, Effenberger, arXiv 2602.12021; docs/design.md, section 2.

    Example:
        >>> import torch
        >>> from lrnn_lm import BlockDiagonalLRU
        >>> layer = BlockDiagonalLRU(hidden_size=64, block_size=4)
        >>> y, state = layer(torch.randn(2, 10, 64))  # (B, T, D)
        >>> tuple(y.shape), tuple(state.shape)  # (B, T, D), (B, N, M)
        ((2, 10, 64), (2, 16, 4))
        >>> y, state = layer(torch.randn(2, 1, 64), state)  # one more token
    """

    fused_window = False

    def __init__(
        self,
        hidden_size: int,
        num_blocks: int | None = None,
        block_size: BlockSize = 4,
        gate: GateName = "softmax",
        gate_std: float | None = None,
        half_life: HalfLives | None = None,
        short_conv: Reach | None = None,
        output_gate: bool | None = None,
        norm_groups: int | None = None,
        input_logit: bool | None = None,
    ):
        super().__init__()
        check_sizes(
            num_blocks=num_blocks, block_size=block_size, short_conv=short_conv, norm_groups=norm_groups
        )
        self.input_logit = input_logit is not False
        check_gates(gate, gate_std, half_life, self.input_logit)
        self.hidden_size = hidden_size
        self.gate_std, self.half_life = gate_std, half_life
        self.num_blocks = num_blocks or max(1, hidden_size // block_size)
        self.block_size = block_size
        self.gate = gate
        self.backend = "auto"  # of the scan
        self.diagonal_only = False  # for a probe: read A_t without its off-diagonal entries
        width = self.num_blocks * block_size
        self.gate_proj = nn.Linear(hidden_size, width * (block_size + self.input_logit))
        self.value_proj = nn.Linear(hidden_size, width, bias=False)
        self.out_proj = ResidualOutput(width, hidden_size, bias=False)
        self.conv = ShortConvolution(hidden_size, short_conv) if short_conv else None
        self.output_gate_proj = nn.Linear(hidden_size, width, bias=False) if output_gate else None
        self.norm_groups = norm_groups
        if norm_groups is not None:
            if width % norm_groups:
                raise ValueError(f"the state's {width} rows do not split into norm_groups={norm_groups}")
            self.norm_weight = nn.Parameter(torch.ones(width))
        if short_conv or output_gate or norm_groups or not self.input_logit:
            self.fused_window = None  # the fused decoding step computes the plain layer only
        self.draw_parameters()

    def forward(
        self, x: Tensor, state: Tensor | None = None, context: SequenceContext | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> y (B, T, D) and the state (B, N, M) in fp32.

        With a convolution of reach W the state is (B, N M + (W-1) D): the recurrence's, then its last inputs.
        """
        context = SequenceContext.of(x, context)
        if self.conv is None:
            h, state = self._scan(x, state, context)
            return self._read_out(h, x), state
        state, past = self.conv.split(state, (self.num_blocks, self.block_size))
        x, past = self.conv(x, past, context.reset)
        h, state = self._scan(x, state, context)
        return self._read_out(h, x), self.conv.join(state, past)

    def _read_out(self, h: Tensor, x: Tensor) -> Tensor:
        """Norm, output gate and projection of states h (B, T, N, M) -> (B, T, D)."""
        h = h.flatten(2)
        if self.norm_groups is not None:
            grouped = h.unflatten(-1, (self.norm_groups, -1))
            h = functional.rms_norm(grouped, grouped.shape[-1:], eps=1e-6).flatten(2)
            h = h * self.norm_weight.to(h.dtype)
        if self.output_gate_proj is not None:
            h = h * functional.silu(self.output_gate_proj(x))
        return self.out_proj(h)

    def _scan(self, x: Tensor, state: Tensor | None, context: SequenceContext) -> tuple[Tensor, Tensor]:
        """x (B, T, D), state (B, N, M) -> states of all tokens (B, T, N, M) and the last one in fp32."""
        N, M = self.num_blocks, self.block_size
        if self.diagonal_only:
            gates, values = self.project(x, context.joint)
            kept = torch.eye(M, M + 1, device=x.device)  # (M, M+1): the diagonal, and the input gates
            kept[:, M] = 1.0
            coefficients = normalise(self.logits(gates).float(), self.gate) * kept
            h, state = block_diagonal_scan(
                coefficients, values.unflatten(-1, (N, M)).float(), state, context.reset, "none", self.backend
            )
            return h.to(values.dtype), state
        if (planes := packed_planes(self, x, M, N * M, plane_width(N * M, M))) is not None:
            bias = gate_bias(self.gate_proj, N * M)
            return scan_packed(planes, (N, M), state, context.reset, self.gate, bias)
        gates, values = self.project(x, context.joint)
        values = values.unflatten(-1, (N, M))
        return block_diagonal_scan(self._planes(gates), values, state, context.reset, self.gate, self.backend)

    def joint_projections(self) -> list[nn.Linear]:
        return [self.gate_proj, self.value_proj]

    def _planes(self, gates: Tensor) -> Tensor:
        """Projected gate logits (B, T, K N M) as (B, T, N, M, K), K = M + 1, or M without `input_logit`."""
        # Each plane is laid out like the values, so that neighbouring lanes of the kernel, a row each, read
        # neighbouring addresses.
        planes = gates.unflatten(-1, (-1, self.num_blocks, self.block_size))
        return planes.permute(0, 1, 3, 4, 2)

    def logits(self, gates: Tensor) -> Tensor:
        """Projected gate logits as (B, T, N, M, M+1), the input gate's included."""
        planes = self._planes(gates)
        return planes if self.input_logit else functional.pad(planes, (0, 1))

    def planes(self) -> dict[str, int]:
        return {"gate_proj.weight": self.block_size + self.input_logit}

    def transitions(self, x: Tensor) -> Tensor:
        """A_t (B, T, N, M, M) in fp32."""
        if self.conv is not None:
            x, _ = self.conv(x, None, None)
        return normalise(self.logits(self.gate_proj(x)).float(), self.gate)[..., : self.block_size]

    def initial_values(self, std: float) -> dict[str, Tensor]:
        """The matrix and bias of the gates by `gate_std` and `half_life`; convolution and norm."""
        values = gate_matrix(self.gate_proj, self.gate_std)
        if self.half_life is not None:
            bias = gate_bias_of_half_lives(self.num_blocks * self.block_size, self.block_size, self.half_life)
            bias = bias if self.input_logit else bias[:, :-1] - bias[:, -1:]
            values["gate_proj.bias"] = bias.T.flatten()  # planes, as `_planes` reads them
        if self.conv is not None:
            values["conv.weight"] = torch.zeros_like(self.conv.weight, device="cpu")
        if self.norm_groups is not None:
            values["norm_weight"] = torch.ones(self.num_blocks * self.block_size)
        return values

    def cost(self, context_length: int) -> MixerCost:
        """A row is M + 1 multiply-adds; normalising its M + 1 gates is about 3 operations each."""
        rows, gates = self.num_blocks * self.block_size, self.block_size + 1
        taps = 0 if self.conv is None else self.conv.weight.numel()
        return MixerCost(products=2 * taps, scan=rows * gates * (2 + 3))

    def state_elements(self, context_length: int) -> int:
        kept = 0 if self.conv is None else self.conv.elements
        return self.num_blocks * self.block_size + kept
