"""Fixed-Point RNN (Movahedi et al., arXiv 2503.10799): a dense recurrence as a diagonal one's fixed point.

    h^l_t = a_t h^l_{t-1} + (1 - a_t) (Q_t (v_t - h^{l-1}_t) + h^{l-1}_t)      h^0 = 0, l = 1 .. L
    Q_t = I - 2 s_t u_t u_t^T     s_t = sigmoid(..)     u_t = norm(silu(W_u x_t + U h^{l-1}_{t-1}))

Each iteration is a scan with M = 1, a = sigmoid(W_a x). At the fixed point Q_t mixes all units at every step,
and as it reads the state before, the recurrence is non-linear. The paper iterates until it converges, with
gradients of the last iteration; here all L iterations are computed and differentiated, and each has its own
state, so a token at a time gives the same numbers.

Legend: B batch, T time, D model width, W units, L iterations.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels import block_diagonal_scan
from ..kernels.dispatch import check_reset
from .base import Mixer, MixerCost, ResidualOutput, SequenceContext, check_sizes
from .linear_recurrence import precise


class FixedPoint(Mixer):
    """Fixed-Point RNN with one Householder factor. hidden_size: D; width: W, None for D; iterations: L."""

    def __init__(self, hidden_size: int, width: int | None = None, iterations: int = 4):
        super().__init__()
        check_sizes(width=width, iterations=iterations)
        self.width, self.iterations = width or hidden_size, iterations
        self.value_proj = nn.Linear(hidden_size, self.width, bias=False)
        self.input_gate_proj = nn.Linear(hidden_size, self.width, bias=False)
        self.decay_proj = nn.Linear(hidden_size, self.width)
        self.mix_proj = nn.Linear(hidden_size, self.width + 1)  # u, and the logit of s
        self.feedback_proj = nn.Linear(self.width, self.width + 1, bias=False)
        self.output_gate_proj = nn.Linear(hidden_size, self.width, bias=False)
        self.out_proj = ResidualOutput(self.width, hidden_size, bias=False)
        self.draw_parameters()

    def forward(
        self, x: Tensor, state: Tensor | None = None, context: SequenceContext | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D), state (B, L, W) of the iterations -> y (B, T, D), state (B, L, W) in fp32."""
        reset = SequenceContext.of(x, context).reset
        check_reset(reset, tuple(x.shape[:2]))
        v = precise(self.value_proj(x) * functional.silu(self.input_gate_proj(x)))
        a = precise(self.decay_proj(x)).sigmoid()
        gates = torch.stack([a, 1 - a], dim=-1).unsqueeze(-2)  # (B, T, W, 1, 2)
        mix, h = self.mix_proj(x), torch.zeros_like(v)
        if state is None:
            state = v.new_zeros(x.shape[0], self.iterations, self.width)
        first, after = torch.zeros_like(state[:, 0]), []  # h^{l-1} before the first token
        for before in state.to(v.dtype).unbind(1):
            shifted = torch.cat([first.to(v.dtype).unsqueeze(1), h[:, :-1]], dim=1)
            if reset is not None:
                shifted = shifted.masked_fill(reset.unsqueeze(-1), 0)
            logits = precise(mix + self.feedback_proj(shifted.to(mix.dtype)))  # (B, T, W + 1)
            u, s = functional.normalize(functional.silu(logits[..., :-1]), dim=-1), logits[..., -1:].sigmoid()
            mixed = v - 2 * s * u * (u * (v - h)).sum(dim=-1, keepdim=True)  # Q (v - h) + h
            h, last = block_diagonal_scan(
                gates, mixed.unsqueeze(-1), before.unsqueeze(-1), reset, "none"
            )  # (B, T, W, 1), (B, W, 1)
            h, first = h.squeeze(-1), before
            after.append(last.squeeze(-1))
        y = self.out_proj(h.to(x.dtype) * functional.silu(self.output_gate_proj(x)))
        return y, torch.stack(after, dim=1)

    def cost(self, context_length: int) -> MixerCost:
        """Of an iteration: the feedback's product (one is counted with its Linear), a scan, the mixing."""
        W, L = self.width, self.iterations
        return MixerCost(products=2 * (L - 1) * W * (W + 1), scan=L * 20 * W)

    def state_elements(self, context_length: int) -> int:
        return self.iterations * self.width
