"""LSTM: the nonlinear recurrent baseline, torch's own (cuDNN on a GPU).

Legend: B batch, T time, D model width, W state width.
"""

import torch
from torch import Tensor, nn

from .base import Mixer, MixerCost, ResidualOutput, SequenceContext, by_documents, check_sizes


class LSTM(Mixer):
    """One LSTM layer and an output projection.

    Args:
        hidden_size: D.
        width: W, the cell's width; None for D.
    """

    def __init__(self, hidden_size: int, width: int | None = None):
        super().__init__()
        check_sizes(width=width)
        self.width = width or hidden_size
        self.cell = nn.LSTM(hidden_size, self.width, batch_first=True)
        self.out_proj = ResidualOutput(self.width, hidden_size, bias=False)
        self.draw_parameters()

    def forward(
        self, x: Tensor, state: Tensor | None = None, context: SequenceContext | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D), state (B, 2, W) of hidden and cell state -> y (B, T, D), state (B, 2, W) in fp32."""
        context = SequenceContext.of(x, context)
        if state is None:
            state = x.new_zeros(x.shape[0], 2, self.width)
        if context.reset is None:
            h, state = self._run(x, state)
        else:
            h, state = by_documents(self._run, x, state, context.reset)
        return self.out_proj(h), state.to(torch.promote_types(state.dtype, torch.float32))

    def _run(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):  # oneDNN's LSTM often takes no bf16
            with torch.autocast("cpu", enabled=False):
                return self._run(x.to(self.cell.weight_ih_l0.dtype), state)
        h, last = self.cell(x, tuple(state.to(x.dtype).transpose(0, 1).unsqueeze(1).contiguous().unbind(0)))
        # Not squeeze(0): where torch 2.11 exports, it takes each for (1, 1, B, W).
        return h, torch.stack(last, dim=-2).reshape(state.shape)

    def initial_values(self, std: float) -> dict[str, Tensor]:
        """Orthogonal recurrence and a forget gate that starts open, as is the custom for LSTMs."""
        W = self.width
        return {
            "cell.weight_ih_l0": std * torch.randn(4 * W, self.cell.input_size),
            "cell.weight_hh_l0": torch.cat([nn.init.orthogonal_(torch.empty(W, W)) for _ in range(4)]),
            "cell.bias_ih_l0": torch.cat([torch.zeros(W), torch.ones(W), torch.zeros(2 * W)]),
            "cell.bias_hh_l0": torch.zeros(4 * W),
        }

    def cost(self, context_length: int) -> MixerCost:
        """Four gates: the product with the input runs for all steps at once. The product with the state and
        about 12 operations a unit wait for the step before."""
        W = self.width
        return MixerCost(products=2 * 4 * W * self.cell.input_size, sequential=2 * 4 * W * W + 12 * W)

    def state_elements(self, context_length: int) -> int:
        return 2 * self.width
