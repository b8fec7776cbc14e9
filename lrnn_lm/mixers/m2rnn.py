"""M2RNN (Mishra et al., arXiv 2603.14360): a non-linear recurrence whose state is a matrix in each head.

    q_t, k_t, v_t = silu(conv(W_q x_t, W_k x_t, W_v x_t))
    f_t = exp(-a softplus(W_f x_t + b_f))      one of each a head
    S_t = f_t S_{t-1} + (1 - f_t) tanh(S_{t-1} W + k_t v_t^T)
    y_t = W_o norm((S_t^T q_t + d * v_t) * silu(W_g x_t))

|S_t| <= max(1, |S_0|), as a step averages S_{t-1} and a tanh. W starts as the identity, d as ones, a and b_f
as Mamba-2's: random rates.

Legend: B batch, T time, D model width, H heads, K width of a head's keys, V of its values.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels import m2rnn_scan
from .base import JointProjections, Mixer, MixerCost, Reach, ResidualOutput, SequenceContext, check_sizes
from .linear_recurrence import precise
from .short_conv import ShortConvolution

RATE, STEP = (1.0, 16.0), (1e-3, 0.1)  # of a and softplus(b_f) at the start: f from 0.2 to 0.999
NORM_EPS = 1e-6


class MatrixRNN(JointProjections, Mixer):
    """M2RNN.

    hidden_size: D; num_heads: H; head_dim: K; value_dim: V; head_conv: reach in tokens of the convolutions.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 8,
        head_dim: int = 64,
        value_dim: int = 16,
        head_conv: Reach = 4,
    ):
        super().__init__()
        check_sizes(num_heads=num_heads, head_dim=head_dim, value_dim=value_dim, head_conv=head_conv)
        H, K, V = self.head_shape = (num_heads, head_dim, value_dim)
        self.query_proj = nn.Linear(hidden_size, H * K, bias=False)
        self.key_proj = nn.Linear(hidden_size, H * K, bias=False)
        self.value_proj = nn.Linear(hidden_size, H * V, bias=False)
        self.forget_gate_proj = nn.Linear(hidden_size, H)
        self.output_gate_proj = nn.Linear(hidden_size, H * V, bias=False)
        self.conv = ShortConvolution(H * (2 * K + V), head_conv)
        self.recurrent_weight = nn.Parameter(torch.empty(H * V, V))
        self.log_rate = nn.Parameter(torch.empty(H))
        self.skip = nn.Parameter(torch.empty(H * V))
        self.norm_weight = nn.Parameter(torch.empty(H * V))
        self.out_proj = ResidualOutput(H * V, hidden_size, bias=False)
        self.draw_parameters()

    def joint_projections(self) -> list[nn.Linear]:
        return [
            self.query_proj, self.key_proj, self.value_proj, self.forget_gate_proj, self.output_gate_proj,
        ]  # fmt: skip

    def forward(
        self, x: Tensor, state: Tensor | None = None, context: SequenceContext | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> y (B, T, D); state (B, H K V + ..) in fp32, S and the convolution's inputs."""
        context = SequenceContext.of(x, context)
        H, K, V = self.head_shape
        S, past = self.conv.split(state, self.head_shape)
        *streams, forget, gate = self.project(x, context.joint)
        mixed, past = self.conv(torch.cat(streams, dim=-1), past, context.reset)
        q, k, v = (functional.silu(part) for part in mixed.split([H * K, H * K, H * V], dim=-1))
        keep = torch.exp(-precise(self.log_rate).exp() * functional.softplus(precise(forget)))
        y, S = m2rnn_scan(
            q.unflatten(-1, (H, K)), k.unflatten(-1, (H, K)), v.unflatten(-1, (H, V)),
            self.recurrent_weight.view(H, V, V), keep, S, context.reset,
        )  # fmt: skip
        y = precise((y.flatten(2) + self.skip * v) * functional.silu(gate))
        y = functional.rms_norm(y, (H * V,), eps=NORM_EPS) * self.norm_weight
        return self.out_proj(y.to(x.dtype)), self.conv.join(S, past)

    def initial_values(self, std: float) -> dict[str, Tensor]:
        H, _, V = self.head_shape
        step = torch.empty(H).uniform_(*map(math.log, STEP)).exp()
        return {
            "forget_gate_proj.bias": step.expm1().log(),  # softplus makes it `step` again
            "log_rate": torch.empty(H).uniform_(*RATE).log(),
            "conv.weight": torch.zeros(self.conv.weight.shape),
            "recurrent_weight": torch.eye(V).repeat(H, 1),
            "skip": torch.ones(H * V),
            "norm_weight": torch.ones(H * V),
        }

    def cost(self, context_length: int) -> MixerCost:
        """A number of the state is V multiply-adds, and about 15 operations: tanh, averaging, reading."""
        H, K, V = self.head_shape
        return MixerCost(products=2 * self.conv.weight.numel(), sequential=H * K * V * (2 * V + 15))

    def state_elements(self, context_length: int) -> int:
        H, K, V = self.head_shape
        return H * K * V + self.conv.elements
