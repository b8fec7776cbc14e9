"""Mamba-2 (Dao and Gu, arXiv 2405.21060) on our matrix scan.

    z_t, u_t, dt_t = W_i x_t      [v_t, B_t, C_t] = silu(conv(u)_t)      d_t = softplus(dt_t + b)
    S_t = exp(-e^a d_t) S_{t-1} + B_t (d_t v_t)^T      y_t = S_t^T C_t + D v_t      in each head
    out_t = W_o (norm(y_t * silu(z_t)))

Heads of a group share B and C. The layer is transformers' (`transformers.models.mamba2`), and its parameters
have the same names under `inner`. transformers clamps d_t to limits that leave it as it is by default.

Legend: B batch, T time, D model width, C channels of the convolution, W its reach, H heads, G groups of
heads, K the state's size, V a head's width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels import matrix_scan
from .base import Mixer, MixerCost, ResidualOutput, SequenceContext, check_sizes
from .linear_recurrence import precise
from .short_conv import ShortConvolution

NORM_EPS = 1e-5
STEPS = (1e-3, 0.1)  # the least and the largest d_t at the start


class MambaConvolution(ShortConvolution):
    """A short convolution whose weight (C, 1, W), newest tap last, is all there is; a bias, then SiLU."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(channels, kernel_size)
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size))
        self.bias = nn.Parameter(torch.empty(channels))

    def taps(self, dtype: torch.dtype) -> list[Tensor]:
        return list(self.weight.to(dtype)[:, 0].flip(1).unbind(1))

    def forward(self, x: Tensor, past: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        y, past = super().forward(x, past, reset)
        return functional.silu(y + self.bias.to(y.dtype)), past


class GroupedNorm(nn.RMSNorm):
    """RMS norm (.., width) in fp32, over each of G equal parts."""

    def __init__(self, width: int, groups: int):
        super().__init__(width, eps=NORM_EPS)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (self.groups, -1))
        return functional.rms_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2) * self.weight


class MambaLayer(nn.Module):
    """All of the mixer's parameters and its forward pass.

    A module is called where its parameters are read: code that offloads weights brings them for the call.
    """

    def __init__(self, hidden_size: int, head_shape: tuple[int, int, int], groups: int, kernel_size: int):
        super().__init__()
        self.head_shape, self.groups = head_shape, groups
        H, K, V = head_shape
        # Widths of z, v, B, C and dt in the projection; v, B and C are convolved.
        self.widths = [H * V, H * V, groups * K, groups * K, H]
        self.in_proj = nn.Linear(hidden_size, sum(self.widths), bias=False)
        self.conv1d = MambaConvolution(sum(self.widths[1:4]), kernel_size)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(H)) for _ in range(3))
        self.norm = GroupedNorm(H * V, groups)
        self.out_proj = ResidualOutput(H * V, hidden_size, bias=False)

    def forward(self, x: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        (H, K, V), G = self.head_shape, self.groups
        state, past = self.conv1d.split(state, self.head_shape)
        z, mixed, dt = self.in_proj(x).split([H * V, sum(self.widths[1:4]), H], dim=-1)
        mixed, past = self.conv1d(mixed, past, reset)
        v, *shared = mixed.split(self.widths[1:4], dim=-1)
        v = v.unflatten(-1, (H, V))
        # With one group a view, whose heads all read the same numbers.
        shared = [s.unflatten(-1, (G, 1, K)).expand(-1, -1, -1, H // G, -1).flatten(2, 3) for s in shared]
        d = functional.softplus(precise(dt) + precise(self.dt_bias))  # (B, T, H)
        decay = torch.exp(-precise(self.A_log).exp() * d)[..., None, None].expand(*d.shape, K, 1)
        written = (d.unsqueeze(-1) * v).to(v.dtype)
        y, state = matrix_scan(decay, shared[0], written, shared[1], state, reset)
        y = y + precise(self.D).unsqueeze(-1) * v
        y = self.norm(precise(y.flatten(2)) * functional.silu(precise(z)))
        return self.out_proj(y.to(v.dtype)), self.conv1d.join(state, past)


class Mamba2(Mixer):
    """Mamba-2.

    Args:
        hidden_size: D.
        expand: inner width over D; expand D is split into heads.
        head_dim: V.
        state_size: K.
        n_groups: G.
        conv_kernel: W, at least 2.
        chunk_size: of no effect, as our scan has its own; older recipes set it.
    """

    def __init__(
        self,
        hidden_size: int,
        expand: int = 2,
        head_dim: int = 64,
        state_size: int = 128,
        n_groups: int = 1,
        conv_kernel: int = 4,
        chunk_size: int = 256,
    ):
        super().__init__()
        check_sizes(expand=expand, head_dim=head_dim, state_size=state_size, n_groups=n_groups)
        check_sizes(conv_kernel=conv_kernel, chunk_size=chunk_size)
        width = expand * hidden_size
        if width % head_dim:
            raise ValueError(f"expand * hidden_size = {width} does not split into heads of width {head_dim}")
        H = width // head_dim
        if H % n_groups:
            raise ValueError(f"{H} heads do not split into n_groups = {n_groups}")
        self.inner = MambaLayer(hidden_size, (H, state_size, head_dim), n_groups, conv_kernel)
        self.head_shape = self.inner.head_shape
        self.draw_parameters()

    def forward(
        self, x: Tensor, state: Tensor | None = None, context: SequenceContext | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> y (B, T, D); state (B, H K V + (W-1) C) in fp32, the convolution's inputs last."""
        return self.inner(x, state, SequenceContext.of(x, context).reset)

    def planes(self) -> dict[str, list[int]]:
        return {"inner.in_proj.weight": self.inner.widths}

    def initial_values(self, std: float) -> dict[str, Tensor]:
        """As in the authors' code: d_t log-uniform in STEPS where W_i x_t is 0, e^a = 1 .. H."""
        H, conv = self.head_shape[0], self.inner.conv1d
        low, high = torch.tensor(STEPS).log()
        step = (low + (high - low) * torch.rand(H)).exp()
        return {
            "inner.A_log": torch.arange(1, H + 1).float().log(),
            "inner.D": torch.ones(H),
            "inner.dt_bias": step + torch.log(-torch.expm1(-step)),  # softplus of it is the step
            "inner.conv1d.weight": (2 * torch.rand(conv.weight.shape) - 1) * conv.kernel_size**-0.5,
            "inner.conv1d.bias": torch.zeros(conv.bias.shape),
        }

    def cost(self, context_length: int) -> MixerCost:
        """The convolution; and for each element of the state 3 operations to update it and 2 to read it."""
        H, K, V = self.head_shape
        return MixerCost(products=2 * self.inner.conv1d.weight.numel(), scan=5 * H * K * V + 2 * H * V)

    def state_elements(self, context_length: int) -> int:
        H, K, V = self.head_shape
        return H * K * V + self.inner.conv1d.elements
