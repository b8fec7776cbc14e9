"""RG-LRU, the recurrence of Griffin (De et al., arXiv 2402.19427), in its block: convolution, and a gate.

    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t * u_t)      a_t = exp(-8 softplus(L) r_t)
    r_t, i_t = sigmoid(W_r u_t + b_r), sigmoid(W_i u_t + b_i)      y_t = W_o (h_t * gelu(W_g x_t))

u_t is a projection of x_t and, through a convolution, of the three before. The matrices of the gates are
full, as in the paper's formula; its released models have block-diagonal ones.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .base import MixerCost, Reach, ResidualOutput, SequenceContext, check_sizes
from .linear_recurrence import LinearRecurrence, input_scale, precise
from .short_conv import ShortConvolution

SHARPNESS = 8.0
DECAYS = (0.9, 0.999)  # of a_t at r_t = 1, at the start


class RealGatedLRU(LinearRecurrence):
    """Real-gated LRU. hidden_size: D; width: number of units W, None for D; short_conv: reach in tokens."""

    block_size = 1

    def __init__(self, hidden_size: int, width: int | None = None, short_conv: Reach = 4):
        super().__init__()
        check_sizes(width=width, short_conv=short_conv)
        W = self.num_blocks = width or hidden_size
        self.value_proj = nn.Linear(hidden_size, W, bias=False)
        self.conv = ShortConvolution(W, short_conv)
        self.gate_proj = nn.Linear(W, 2 * W)
        self.decay = nn.Parameter(torch.empty(W))  # L
        self.output_gate_proj = nn.Linear(hidden_size, W, bias=False)
        self.out_proj = ResidualOutput(W, hidden_size, bias=False)
        self.draw_parameters()

    def forward(
        self, x: Tensor, state: Tensor | None = None, context: SequenceContext | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> y (B, T, D); state (B, W + 3 W), the convolution's inputs after the recurrence's."""
        context = SequenceContext.of(x, context)
        state, past = self.conv.split(state, (self.num_blocks, 1))
        u, past = self.conv(self.value_proj(x), past, context.reset)
        h, state = self.scan(u, state, context)
        gate = functional.gelu(self.output_gate_proj(x), approximate="tanh")
        return self.out_proj(h.to(x.dtype) * gate), self.conv.join(state, past)

    def coefficients(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Of the convolution's outputs u (B, T, W)."""
        r, i = precise(self.gate_proj(u)).sigmoid().chunk(2, dim=-1)
        log_a = -SHARPNESS * functional.softplus(precise(self.decay)) * r
        a = torch.stack([log_a.exp(), input_scale(log_a)], dim=-1)  # (B, T, W, 2)
        return a.unsqueeze(3), (i * u).unsqueeze(-1)

    def transitions(self, x: Tensor) -> Tensor:
        u, _ = self.conv(self.value_proj(x), None, None)
        return super().transitions(u)

    def initial_values(self, std: float) -> dict[str, Tensor]:
        """Decays between DECAYS, whose squares are uniform, as published; a convolution that does nothing."""
        low, high = (decay**2 for decay in DECAYS)
        a = (low + (high - low) * torch.rand(self.num_blocks)).sqrt()
        decay = (-a.log() / SHARPNESS).expm1().log()  # softplus of it is -log(a) / 8
        return {"decay": decay, "conv.weight": torch.zeros_like(self.conv.weight, device="cpu")}

    def cost(self, context_length: int) -> MixerCost:
        return MixerCost(2 * self.conv.weight.numel(), super().cost(context_length).scan)

    def state_elements(self, context_length: int) -> int:
        return self.num_blocks + self.conv.elements
