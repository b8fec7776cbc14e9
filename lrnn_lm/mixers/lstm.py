"""LSTM: the nonlinear recurrent baseline, torch's own (cuDNN on a GPU).

Legend: B batch, T time, D model width, W state width.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .base import (
    Mixer,
    MixerCost,
    ResidualOutput,
    SequenceContext,
    by_tokens,
    check_sizes,
    document_bounds,
    is_exported,
)


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
        context = context or SequenceContext()
        if state is None:
            state = x.new_zeros(x.shape[0], 2, self.width)
        if context.reset is not None and is_exported():
            h, state = by_tokens(self._run, x, state, context.reset)
        elif context.reset is None or not bool(context.reset.any()):
            h, state = self._run(x, state)
        else:
            h, state = self._run_documents(x, state, context.reset)
        return self.out_proj(h), state.to(torch.promote_types(state.dtype, torch.float32))

    def _run(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h, last = self.cell(x, tuple(state.to(x.dtype).transpose(0, 1).unsqueeze(1).contiguous().unbind(0)))
        return h, torch.stack(last, dim=2).squeeze(0)

    def _run_documents(self, x: Tensor, state: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
        """Documents as separate sequences: cut at their starts, run as one packed batch, put back."""
        B, T, D = x.shape
        starts, ends = document_bounds(reset)  # (S,)
        lengths = ends - starts
        order = lengths.argsort(descending=True, stable=True)
        steps = torch.arange(int(lengths.max()), device=x.device)
        inside = steps < lengths[order].unsqueeze(1)  # (S, longest)
        index = (starts[order].unsqueeze(1) + steps).clamp_max(B * T - 1)
        packed = pack_padded_sequence(x.reshape(B * T, D)[index], lengths[order].cpu(), batch_first=True)
        # A segment at t = 0 that does not start a document goes on from the given state.
        rows = torch.div(starts, T, rounding_mode="floor")
        goes_on = (starts % T == 0) & ~reset.flatten()[starts]
        initial = state.to(x.dtype)[rows] * goes_on.view(-1, 1, 1).to(x.dtype)  # (S, 2, W)
        out, last = self._run_packed(packed, initial[order])
        h = x.new_zeros(B * T, self.width, dtype=out.dtype)
        h[index[inside]] = out[inside]
        final = torch.empty_like(last)
        final[order] = last
        return h.view(B, T, self.width), final[ends % T == 0]

    def _run_packed(self, packed: PackedSequence, initial: Tensor) -> tuple[Tensor, Tensor]:
        out, last = self.cell(packed, tuple(initial.transpose(0, 1).unsqueeze(1).contiguous().unbind(0)))
        return pad_packed_sequence(out, batch_first=True)[0], torch.stack(last, dim=2).squeeze(0)

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
