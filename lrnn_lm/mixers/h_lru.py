"""H-LRU: a linear recurrence that reads its last M states (docs/design.md, section 2).

    v_t = W_v x_t      z_t = W_z x_t + b_z      h_t = sum_i a_{i,t} h_{t-i} + a_{0,t} v_t
    y_t = W_o vec(h_t, h_{t-1}, .., h_{t-M+1})

The output is a causal filter of M taps over h, computed as one product with windows of h.

Legend: B batch, T time, D model width, N channels, M order; z gate logits, v values, h state.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..kernels import higher_order_scan, is_written_out, plane_width, scan_packed
from ..kernels.gates import normalise
from .base import (
    BlockSize,
    GateName,
    JointProjections,
    Mixer,
    MixerCost,
    ResidualOutput,
    SequenceContext,
    check_sizes,
    gate_bias,
    packed_planes,
    plain_weight,
)
from .initial_gates import check_gates, gate_matrix


class HigherOrderLRU(JointProjections, Mixer):
    """Higher-order linear recurrent unit: in each channel, h_t = a_1 h_{t-1} + .. + a_M h_{t-M} + a_0 v_t.

    v_t and the logits of the gates a_0 .. a_M are projections of x_t.

    Args:
        hidden_size: D.
        num_blocks: N channels; None for D.
        order: M, how many past states a step reads.
        gate: name of the gate function, see `kernels.gates`.
        gate_std: initial standard deviation of the gate logits; None: W_z starts like any other matrix.
    Raises:
        ValueError: a size below 1, an unknown gate, a gate_std that is not above 0.

    Source: Dubinin, Orvieto, Effenberger, arXiv 2602.12021; docs/design.md, section 2.

    Example:
        >>> import torch
        >>> from lrnn_lm import HigherOrderLRU
        >>> layer = HigherOrderLRU(hidden_size=64, order=3)
        >>> y, state = layer(torch.randn(2, 10, 64))  # (B, T, D)
        >>> tuple(y.shape), tuple(state.shape)  # (B, T, D), (B, N, M), the newest first
        ((2, 10, 64), (2, 64, 3))
    """

    fused_window = True

    def __init__(
        self,
        hidden_size: int,
        num_blocks: int | None = None,
        order: BlockSize = 4,
        gate: GateName = "softmax",
        gate_std: float | None = None,
    ):
        super().__init__()
        check_sizes(num_blocks=num_blocks, order=order)
        check_gates(gate, gate_std)
        self.gate_std = gate_std
        self.num_blocks = num_blocks or hidden_size
        self.order = order
        self.gate = gate
        self.backend = "auto"  # of the scan
        self.gate_proj = nn.Linear(hidden_size, self.num_blocks * (order + 1))
        self.value_proj = nn.Linear(hidden_size, self.num_blocks, bias=False)
        self.out_proj = ResidualOutput(self.num_blocks * order, hidden_size, bias=False)
        self.draw_parameters()

    def forward(
        self, x: Tensor, state: Tensor | None = None, context: SequenceContext | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D), state (B, N, M), newest first -> y (B, T, D), state (B, N, M) in fp32."""
        context = SequenceContext.of(x, context)
        N, M = self.num_blocks, self.order
        if (planes := packed_planes(self, x, M, N, plane_width(N))) is not None:
            bias = gate_bias(self.gate_proj, N)
            h, new_state = scan_packed(planes, (N,), state, context.reset, self.gate, bias)
        else:
            gates, values = self.project(x, context.joint)
            h, new_state = higher_order_scan(
                self._planes(gates), values, state, context.reset, self.gate, self.backend
            )
        return self._filter(h, state, context.reset), new_state

    def joint_projections(self) -> list[nn.Linear]:
        return [self.gate_proj, self.value_proj]

    def _planes(self, gates: Tensor) -> Tensor:
        """Projected gate logits (B, T, (M+1) N) as (B, T, N, M+1)."""
        # n is fastest in memory, so that neighbouring lanes of the kernel read neighbouring addresses.
        return gates.unflatten(-1, (self.order + 1, self.num_blocks)).transpose(2, 3)

    def _filter(self, h: Tensor, state: Tensor | None, reset: Tensor | None) -> Tensor:
        """W_o vec(h_t, .., h_{t-M+1}), (B, T, D); taps that reach before a document's start read zeros."""
        # One product with windows (B, T, M N). M products with shifted views of h need no windows, but add to
        # the output M times: at order 16 a layer took twice as long.
        B, _, N = h.shape
        M = self.order
        past = h.new_zeros(B, M - 1, N) if state is None else state[..., :-1].transpose(1, 2).flip(1)
        padded = torch.cat([past.to(h.dtype), h], dim=1)  # (B, M-1+T, N), oldest first
        alive = None if reset is None else _alive_taps(reset, M)
        weight = plain_weight(self.out_proj)
        if weight is None or not torch.is_grad_enabled() or is_written_out():
            return self.out_proj(_windows(padded, alive, M))
        return _WindowProduct.apply(padded, weight.to(h.dtype), alive, M)

    def planes(self) -> dict[str, int]:
        return {"gate_proj.weight": self.order + 1}

    def transitions(self, x: Tensor) -> Tensor:
        """A_t (B, T, N, M, M) in fp32: companion matrices, the coefficients on top of a shifted identity."""
        M = self.order
        p = normalise(self._planes(self.gate_proj(x)).float(), self.gate)  # (B, T, N, M+1)
        top = p[..., :M].unsqueeze(3)  # (B, T, N, 1, M)
        shift = torch.eye(M, device=x.device)[: M - 1].expand(*top.shape[:3], M - 1, M)
        return torch.cat([top, shift], dim=3)

    def initial_values(self, std: float) -> dict[str, Tensor]:
        """The matrix of the gates by `gate_std`."""
        return gate_matrix(self.gate_proj, self.gate_std)

    def cost(self, context_length: int) -> MixerCost:
        """A step is M + 1 multiply-adds a channel; normalising its M + 1 gates is about 3 operations each."""
        return MixerCost(scan=self.num_blocks * (self.order + 1) * (2 + 3))

    def state_elements(self, context_length: int) -> int:
        return self.num_blocks * self.order


def _alive_taps(reset: Tensor, order: int) -> Tensor:
    """(B, T, M, 1) bool: whether no document started in the last `lag` steps, for lags 0 .. M-1."""
    T = reset.shape[1]
    alive, living = [torch.ones_like(reset)], torch.ones_like(reset)
    for lag in range(1, order):
        living = living & ~nn.functional.pad(reset, (lag - 1, 0))[:, :T]
        alive.append(living)
    return torch.stack(alive, dim=2).unsqueeze(-1)


def _windows(padded: Tensor, alive: Tensor | None, order: int) -> Tensor:
    """vec(h_t, .., h_{t-M+1}) of padded (B, M-1+T, N), whose taps are zero where not alive: (B, T, M N)."""
    T = padded.shape[1] - order + 1
    taps = torch.stack([padded[:, order - 1 - lag : order - 1 - lag + T] for lag in range(order)], dim=2)
    return (taps if alive is None else torch.where(alive, taps, 0)).flatten(2)


class _WindowProduct(torch.autograd.Function):
    """The product of windows with a weight (D, M N); the backward pass makes the windows again."""

    @staticmethod
    def forward(ctx, padded: Tensor, weight: Tensor, alive: Tensor | None, order: int) -> Tensor:
        ctx.save_for_backward(padded, weight, alive)
        ctx.order = order
        return linear(_windows(padded, alive, order), weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        padded, weight, alive = ctx.saved_tensors
        M, T = ctx.order, grad.shape[1]
        d_weight = grad.flatten(0, 1).t() @ _windows(padded, alive, M).flatten(0, 1)
        d_taps = (grad @ weight).unflatten(-1, (M, -1))  # (B, T, M, N)
        if alive is not None:
            d_taps = torch.where(alive, d_taps, 0)
        d_padded = padded.new_zeros(padded.shape, dtype=torch.promote_types(padded.dtype, torch.float32))
        for lag in range(M):
            d_padded[:, M - 1 - lag : M - 1 - lag + T] += d_taps[:, :, lag]
        return d_padded.to(padded.dtype), d_weight, None, None
