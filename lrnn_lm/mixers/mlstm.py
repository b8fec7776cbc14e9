"""mLSTM, the matrix memory of xLSTM (arXiv 2405.04517; xLSTM 7B: arXiv 2503.13427), on our matrix scan.

    q_t = W_q x_t / sqrt(K)    k_t = W_k x_t    v_t = W_v x_t    cap(z) = 15 tanh(z / 15)
    i_t = exp(cap(W_i x_t + b_i))    f_t = sigmoid(cap(W_f x_t + b_f))      one of each a head
    C_t = f_t C_{t-1} + i_t k_t v_t^T      n_t = f_t n_{t-1} + i_t k_t
    h_t = C_t^T q_t / max(|n_t q_t|, 1)
    y_t = W_o (layer_norm(h_t) * sigmoid(W_g x_t)), the norm a head's

The paper divides C and n by the largest input gate so far, which changes no h. The cap bounds i_t by e^15,
which fp32 and bf16 hold as it is.

Legend: B batch, T time, D model width, H heads, K width of a head's keys, V of its values.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels import matrix_scan
from .base import Mixer, MixerCost, ResidualOutput, SequenceContext, check_sizes
from .linear_recurrence import precise

GATE_CAP = 15.0
FORGET_BIAS = (3.0, 6.0)  # of the first and the last head, at the start
INPUT_BIAS = -10.0
NORM_EPS = 1e-6


class MatrixLSTM(Mixer):
    """mLSTM.

    Args:
        hidden_size: D.
        num_heads: H.
        head_dim: K.
        value_dim: V; None for 2 K.
    """

    def __init__(
        self, hidden_size: int, num_heads: int = 8, head_dim: int = 32, value_dim: int | None = None
    ):
        super().__init__()
        check_sizes(num_heads=num_heads, head_dim=head_dim, value_dim=value_dim)
        H, K, V = self.head_shape = (num_heads, head_dim, value_dim or 2 * head_dim)
        self.query_proj = nn.Linear(hidden_size, H * K, bias=False)
        self.key_proj = nn.Linear(hidden_size, H * K, bias=False)
        self.value_proj = nn.Linear(hidden_size, H * V, bias=False)
        self.input_gate_proj = nn.Linear(hidden_size, H)
        self.forget_gate_proj = nn.Linear(hidden_size, H)
        self.output_gate_proj = nn.Linear(hidden_size, H * V, bias=False)
        self.norm_weight = nn.Parameter(torch.ones(H * V))
        self.out_proj = ResidualOutput(H * V, hidden_size, bias=False)
        self.draw_parameters()

    def forward(
        self, x: Tensor, state: Tensor | None = None, context: SequenceContext | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> y (B, T, D); state (B, H, K, V + 1) in fp32, n after the columns of C."""
        reset = SequenceContext.of(x, context).reset
        H, K, V = self.head_shape
        q = self.query_proj(x).unflatten(-1, (H, K)) * K**-0.5
        v = self.value_proj(x).unflatten(-1, (H, V))
        i, f = (_capped(gate(x)) for gate in (self.input_gate_proj, self.forget_gate_proj))  # (B, T, H)
        decay = f.sigmoid()[..., None, None].expand(*q.shape, 1)
        written = i.exp().unsqueeze(-1) * precise(self.key_proj(x)).unflatten(-1, (H, K))
        C, n = (None, None) if state is None else state.split([V, 1], dim=-1)
        h, C = matrix_scan(decay, written, v, q, C, reset)
        # n is C of a value of 1: a column of its own, as the kernels take a power of two of them.
        overlap, n = matrix_scan(decay, written, torch.ones_like(written[..., :1]), q, n, reset)
        h = precise(h) / overlap.abs().clamp(min=1)
        h = functional.layer_norm(h, (V,), eps=NORM_EPS).flatten(2) * self.norm_weight
        y = self.out_proj(h.to(x.dtype) * self.output_gate_proj(x).sigmoid())
        return y, torch.cat([C, n], dim=-1)

    def initial_values(self, std: float) -> dict[str, Tensor]:
        """As in the authors' model: gates that do not depend on the input, nearly closed to it."""
        H = self.head_shape[0]
        gates = torch.zeros(self.input_gate_proj.weight.shape)
        return {
            "input_gate_proj.weight": gates,
            "input_gate_proj.bias": torch.full((H,), INPUT_BIAS),
            "forget_gate_proj.weight": gates,
            "forget_gate_proj.bias": torch.linspace(*FORGET_BIAS, H),
            "norm_weight": torch.ones(self.norm_weight.shape),
        }

    def cost(self, context_length: int) -> MixerCost:
        """A number of C and n is decayed, written (2) and read (2)."""
        return MixerCost(scan=5 * self.state_elements(context_length))

    def state_elements(self, context_length: int) -> int:
        H, K, V = self.head_shape
        return H * K * (V + 1)


def _capped(logits: Tensor) -> Tensor:
    return GATE_CAP * torch.tanh(precise(logits) / GATE_CAP)
