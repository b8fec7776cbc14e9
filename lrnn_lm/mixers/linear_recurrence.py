"""Linear recurrences of others on the scan of BD-LRU: a mixer says what A_t and the input are.

    h_t = A_t h_{t-1} + a0_t * v_t      y_t = W_o vec(h_t)

Legend: B batch, T time, D model width, N blocks, M block size.
"""

import torch
from torch import Tensor

from ..kernels import block_diagonal_scan
from ..kernels.gates import normalise
from .base import Mixer, MixerCost, SequenceContext


def precise(x: Tensor) -> Tensor:
    """In fp32, or fp64 if it is: a decay of 0.999 is 1 in bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def input_scale(log_decay: Tensor) -> Tensor:
    """sqrt(1 - a^2) of a decay a: with it, inputs of size 1 keep a state of size 1.

    Where a is 1 in this precision, the root's slope would be infinite, and gradients NaN: it is cut off.
    """
    return (-torch.expm1(2 * log_decay)).clamp(min=torch.finfo(log_decay.dtype).tiny).sqrt()


class LinearRecurrence(Mixer):
    """Base of the mixers whose `coefficients` are all there is to them.

    A subclass has `num_blocks`, `block_size` and a Linear `out_proj`.
    """

    gate = "none"  # function of the coefficients, see `kernels.gates`

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> [A_t, a0_t] (B, T, N, M, M+1) and v_t (B, T, N, M)."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, state: Tensor | None = None, context: SequenceContext | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> y (B, T, D); state (B, N, M) in fp32."""
        h, state = self.scan(x, state, SequenceContext.of(x, context))
        return self.read_out(h, x), state

    def scan(self, x: Tensor, state: Tensor | None, context: SequenceContext) -> tuple[Tensor, Tensor]:
        """States of all tokens (B, T, N M), and the last one (B, N, M)."""
        h, state = block_diagonal_scan(*self.coefficients(x), state, context.reset, self.gate)
        return h.flatten(2), state

    def read_out(self, h: Tensor, x: Tensor) -> Tensor:
        """States h (B, T, N M) and inputs -> y (B, T, D)."""
        return self.out_proj(h.to(x.dtype))

    def transitions(self, x: Tensor) -> Tensor:
        """A_t (B, T, N, M, M) in fp32."""
        return normalise(self.coefficients(x)[0].float(), self.gate)[..., :-1]

    def cost(self, context_length: int) -> MixerCost:
        """A row is M + 1 multiply-adds, and about 6 operations that make its coefficients."""
        rows = self.num_blocks * self.block_size
        return MixerCost(scan=2 * rows * (self.block_size + 1) + 6 * rows)

    def state_elements(self, context_length: int) -> int:
        return self.num_blocks * self.block_size
