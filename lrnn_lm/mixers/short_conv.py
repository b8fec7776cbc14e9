"""A short causal convolution within documents, which lets a gate read the tokens before.

    y_t = x_t + sum_{j=0..W-1} w_j * x_{t-j}        w_j in R^D, a weight a channel and a lag

Legend: B batch, T time, D channels, W the kernel's reach in tokens (its own token included).
"""

import torch
from torch import Tensor, nn

from ..kernels.dispatch import check_reset


class ShortConvolution(nn.Module):
    """Depthwise causal convolution, added to its input; its weights start at zero, so a new one is the
    identity.

    W shifted products, which a compiler fuses into one kernel. A mask keeps documents apart.

    Args:
        channels: D.
        kernel_size: W, at least 2.
    """

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        if kernel_size < 2:
            raise ValueError(
                f"a short convolution must reach at least 2 tokens, or be none; not {kernel_size}"
            )
        self.kernel_size = kernel_size
        self.elements = (kernel_size - 1) * channels  # of the inputs that a state keeps
        self.weight = nn.Parameter(torch.zeros(kernel_size, channels))

    def taps(self, dtype: torch.dtype) -> list[Tensor]:
        """What inputs of each lag are multiplied by, W of (D,), the newest first."""
        weight = self.weight.to(dtype)
        return [1 + weight[0], *weight[1:]]

    def forward(self, x: Tensor, past: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, D), past (B, W-1, D) the inputs before (None: none), reset (B, T) bool or None.

        Returns:
            y (B, T, D) in the dtype of x, and the last W-1 inputs (B, W-1, D) of the document that goes on.
        """
        B, T, D = x.shape
        check_reset(reset, (B, T))
        lags = self.kernel_size - 1
        before = x.new_zeros(B, lags, D) if past is None else past.to(x.dtype)
        inputs = torch.cat([before, x], dim=1)  # (B, W-1+T, D)
        taps = self.taps(x.dtype)
        y = x * taps[0]
        if reset is None:
            for lag in range(1, lags + 1):
                y = y + taps[lag] * inputs[:, lags - lag : lags - lag + T]
            return y, inputs[:, T:]
        starts = torch.cat([reset.new_zeros(B, lags), reset], dim=1)  # none is known of before
        same = torch.ones_like(reset)  # (B, T): no document starts in (t - lag, t]
        for lag in range(1, lags + 1):
            same = same & ~starts[:, lags - lag + 1 : lags - lag + 1 + T]
            # A select, no product with 0: what is before a document may be NaN.
            y = y + torch.where(same.unsqueeze(-1), taps[lag] * inputs[:, lags - lag : lags - lag + T], 0)
        later = starts[:, T + 1 :].flip(1).cumsum(dim=1).flip(1)  # (B, W-2): starts after each kept input
        keep = torch.cat([later == 0, reset.new_ones(B, 1)], dim=1)
        return y, torch.where(keep.unsqueeze(-1), inputs[:, T:], 0)

    def split(self, state: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None]:
        """A recurrence's state (B, *shape) and past inputs (B, W-1, D), of what `join` made of them."""
        if state is None:
            return None, None
        recurrence, past = state.split([state.shape[1] - self.elements, self.elements], dim=1)
        return recurrence.unflatten(1, shape), past.unflatten(1, (self.kernel_size - 1, -1))

    def join(self, state: Tensor, past: Tensor) -> Tensor:
        """One state (B, ..) in the recurrence's dtype, fp32 or fp64, of its state and the past inputs."""
        return torch.cat([state.flatten(1), past.flatten(1).to(state.dtype)], dim=1)
