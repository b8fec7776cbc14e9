"""Mamba-2, the state-space baseline: transformers' own mixer behind our interface.

It runs in plain torch anywhere, and on the kernels of mamba_ssm and causal_conv1d where transformers finds
them. transformers continues a cache by any number of tokens. Documents are run as separate sequences.

Legend: B batch, T time, D model width, C channels of the convolution, k its kernel, H heads, P head width,
S state size.
"""

import torch
from torch import Tensor

from .base import (
    Mixer,
    MixerCost,
    ResidualOutput,
    SequenceContext,
    by_documents,
    check_sizes,
    document_bounds,
    is_exported,
)


class Mamba2(Mixer):
    """Mamba-2 (Dao and Gu, arXiv 2405.21060).

    Args:
        hidden_size: D.
        expand: inner width over D; expand D is split into heads.
        head_dim: P.
        state_size: S.
        n_groups: groups of heads that share the state's input and output maps.
        conv_kernel: k, the reach of the short convolution.
        chunk_size: steps that the scan takes at once; changes no result.
    """

    differentiable_state = False  # right with torch's scan; not tested with the kernels of mamba_ssm

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
        if (width // head_dim) % n_groups:
            raise ValueError(f"{width // head_dim} heads do not split into n_groups = {n_groups}")
        # Imported here, so that only models with this mixer wait for it.
        from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        self.config = Mamba2Config(
            hidden_size=hidden_size, num_hidden_layers=1, num_heads=width // head_dim, head_dim=head_dim,
            expand=expand, state_size=state_size, n_groups=n_groups, conv_kernel=conv_kernel,
            chunk_size=chunk_size,
        )  # fmt: skip
        self.inner = Mamba2Mixer(self.config, layer_idx=0)
        self.inner.out_proj = ResidualOutput(width, hidden_size, bias=False)
        self.conv_shape = (self.inner.conv_dim, conv_kernel)
        self.ssm_shape = (self.inner.num_heads, head_dim, state_size)
        self.draw_parameters()

    def forward(
        self, x: Tensor, state: Tensor | None = None, context: SequenceContext | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, D), state (B, C k + H P S) -> y (B, T, D), such a state in fp32, or None if not wanted."""
        context = context or SequenceContext()
        if context.reset is not None and is_exported():
            if state is None:
                state = x.new_zeros(x.shape[0], self.state_elements(1), dtype=torch.float32)
            return by_documents(lambda *now: self._run(*now, None, True), x, state, context.reset)
        if context.reset is None or not bool(context.reset.any()):
            return self._run(x, state, None, context.keep_state)
        return self._run_documents(x, state, context.reset)

    def _run(
        self, x: Tensor, state: Tensor | None, mask: Tensor | None, keep_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One pass through transformers' mixer, whose cache is filled from our state and read back."""
        from transformers.cache_utils import DynamicCache

        if state is None and not keep_state:
            return self.inner(x, attention_mask=mask), None
        cache = DynamicCache(config=self.config)
        if state is not None:
            conv, ssm = state.split([self._conv_elements, state.shape[1] - self._conv_elements], dim=1)
            cache.update_conv_state(conv.view(-1, *self.conv_shape).to(x.dtype), 0)
            cache.update_recurrent_state(ssm.view(-1, *self.ssm_shape), 0)
        y = self.inner(x, cache_params=cache, attention_mask=mask)
        layer = cache.layers[0]
        after = [layer.conv_states[0].flatten(1).float(), layer.recurrent_states[0].flatten(1).float()]
        return y, torch.cat(after, dim=1)

    def _run_documents(self, x: Tensor, state: Tensor | None, reset: Tensor) -> tuple[Tensor, Tensor]:
        """Documents as separate sequences, put back in place."""
        # Documents that begin here are padded on the left, where zeros leave a new state at zero. A row's
        # first segment, if it goes on from the given state, is padded on the right: its state after is used
        # only if it fills the row.
        B, T, D = x.shape
        goes_on = torch.zeros_like(reset)
        goes_on[:, 0] = ~reset[:, 0] if state is not None else False
        starts, ends = document_bounds(reset)  # (documents,)
        continued = goes_on.flatten()[starts]
        y = torch.empty_like(x).view(B * T, D)
        last = x.new_zeros(B, self.state_elements(T), dtype=torch.float32)
        for chosen in (continued, ~continued):
            if not bool(chosen.any()):
                continue
            begin, end = starts[chosen], ends[chosen]
            rows, fills = begin // T, end % T == 0
            index, inside = _segments(begin, end, left=chosen is not continued)
            given = state[rows] if chosen is continued and state is not None else None
            segment = x.reshape(B * T, D)[index] * inside.unsqueeze(-1)
            out, after = self._run(segment, given, inside, keep_state=True)
            y[index[inside]] = out[inside].to(y.dtype)
            last[rows[fills]] = after[fills]
        return y.view(B, T, D), last

    def initial_values(self, std: float) -> dict[str, Tensor]:
        """As in the authors' code: step sizes log-uniform in the config's range, A = 1 .. H."""
        H, config = self.inner.num_heads, self.config
        low, high = torch.tensor([config.time_step_min, config.time_step_max]).log()
        step = (low + (high - low) * torch.rand(H)).exp().clamp(min=config.time_step_floor)
        conv = self.inner.conv1d.weight
        bound = conv.shape[-1] ** -0.5
        return {
            "inner.A_log": torch.arange(1, H + 1).float().log(),
            "inner.D": torch.ones(H),
            "inner.dt_bias": step + torch.log(-torch.expm1(-step)),  # softplus of it is the step
            "inner.conv1d.weight": (2 * torch.rand(conv.shape) - 1) * bound,
            "inner.conv1d.bias": torch.zeros(conv.shape[0]),
            "inner.norm.weight": torch.ones(self.inner.intermediate_size),
        }

    def cost(self, context_length: int) -> MixerCost:
        """The convolution; and for each element of the state 3 operations to update it and 2 to read it."""
        H, P, S = self.ssm_shape
        channels, kernel = self.conv_shape
        return MixerCost(products=2 * kernel * channels, scan=5 * H * P * S + 2 * H * P)

    def state_elements(self, context_length: int) -> int:
        H, P, S = self.ssm_shape
        return self._conv_elements + H * P * S

    @property
    def _conv_elements(self) -> int:
        return self.conv_shape[0] * self.conv_shape[1]


def _segments(begin: Tensor, end: Tensor, left: bool) -> tuple[Tensor, Tensor]:
    """Flat indices (documents, longest) of the segments' tokens, padded on one side; which are inside."""
    longest = int((end - begin).max())
    steps = torch.arange(longest, device=begin.device)
    index = (end.unsqueeze(1) - longest if left else begin.unsqueeze(1)) + steps
    inside = (index >= begin.unsqueeze(1)) & (index < end.unsqueeze(1))
    return index.where(inside, begin.unsqueeze(1)), inside
