"""The residual block: x + mixer(norm(x)), then x + SwiGLU(norm(x)).

Legend: B batch, T time, D model width.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from ..kernels import is_written_out
from ..kernels.dispatch import has_triton
from ..mixers import build_mixer
from ..mixers.base import (
    Joint,
    JointProjections,
    Mixer,
    ResidualOutput,
    SequenceContext,
    drawn_by_model,
    inner_starts,
    is_exported,
    plain_weight,
)
from .cache import check_state, keep_layer_state, layer_state
from .carried import Carried, mix_carried
from .config import LRNNConfig
from .initial_state import initial_states, mix

if TYPE_CHECKING:
    from ..kernels.decode.fused_tiles import Stream, Workspace


class RMSNorm(nn.RMSNorm):
    """torch's, computed in the dtype of its weight: it has no fused form for bf16 beside weights in fp32.

    The result is in the narrower of the two, as what comes after a norm computes in.
    """

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.to(self.weight.dtype))
        return y.to(x.dtype) if x.dtype.itemsize < y.dtype.itemsize else y


class SwiGLU(JointProjections, nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = ResidualOutput(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor, joint: Joint | None = None) -> Tensor:
        weights = self._side_by_side() if joint is None else None
        # In this order: to look for triton takes as long as a small kernel, and eager passes need not.
        kernels = weights is not None and x.is_cuda and x.dtype != torch.float64 and has_triton()
        if kernels and not is_written_out():
            from ..kernels.swiglu import swiglu  # triton is imported only where it runs

            return self.down_proj(swiglu(nn.functional.linear(x, weights)))
        gate, up = self.project(x, joint if weights is None else (weights, None))
        return self.down_proj(nn.functional.silu(gate) * up)

    def _side_by_side(self) -> Tensor | None:
        """Both weights as one, for one product, in compiled training: they are joined as they are cast."""
        if not (torch.compiler.is_compiling() and torch.is_grad_enabled()) or is_exported():
            return None
        weights = [plain_weight(each) if each.bias is None else None for each in self.joint_projections()]
        return None if any(weight is None for weight in weights) else torch.cat(weights)

    def joint_projections(self) -> list[nn.Linear]:
        return [self.gate_proj, self.up_proj]


class LRNNBlock(GradientCheckpointingLayer):
    """One layer: a sequence mixer and a SwiGLU, each behind an RMSNorm."""

    def __init__(self, config: LRNNConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.mixer_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        spec = config.layer_mixers[layer_idx]
        self.mixer_type = spec["type"]
        with drawn_by_model():
            self.mixer = build_mixer(spec, config.hidden_size)
        self.initial_state = None
        if config.learn_initial_state and self.mixer.layer_type == "linear_attention":
            # A vector, whatever the state's shape: weight decay and Muon leave vectors alone.
            self.initial_state = nn.Parameter(torch.zeros(self.mixer.state_elements(1)))
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    @property
    def own_mixer(self) -> Mixer:
        """The mixer without what is around it where PEFT adapts its parameters (`target_parameters`)."""
        mixer = self.mixer
        if isinstance(mixer, Mixer):  # first: asking a module for a name that it lacks takes 7 us
            return mixer
        return mixer.get_base_layer() if hasattr(mixer, "get_base_layer") else mixer

    def forward(
        self,
        hidden_states: Tensor,
        context: SequenceContext,
        token_mask: Tensor | None = None,
        order: Tensor | None = None,
        past_key_values: Cache | None = None,
        carried: Carried | None = None,
        cache_idx: int | None = None,
    ) -> Tensor | tuple[Tensor, Carried]:
        """hidden_states (B, T, D) -> (B, T, D).

        token_mask: (B, T, 1), false on padding. order: (B, T) the permutation that moves a row's padding to
        its front; None if it is there. cache_idx: the cache layer of this application, None for the layer's
        own. carried: in training by segments, what the segment before left in place of a cache; then returns
        (hidden_states, what this segment leaves).
        """
        x = self.mixer_norm(hidden_states)
        if token_mask is not None:
            x = x.masked_fill(~token_mask, 0)  # not a product: padding may hold anything, NaN too
        if carried is not None:
            y, carried = mix_carried(self.mixer, x, carried, context, self.initial_state)
            hidden_states = hidden_states + y.to(hidden_states.dtype)
            return hidden_states + self.mlp(self.mlp_norm(hidden_states)), carried
        cache_idx = self.layer_idx if cache_idx is None else cache_idx
        state = layer_state(past_key_values, cache_idx)
        own = self.own_mixer
        check_state(state, x.shape[0], own.state_elements(1))
        if token_mask is not None and own.layer_type == "linear_attention":
            y, state = _mix_around_padding(
                self.mixer, x, state, context, token_mask, order, self.initial_state
            )
        elif self.initial_state is None:  # without `mix`: a file fewer to open on the way to the scan
            y, state = self.mixer(x, state, context)
        else:
            y, state = mix(self.mixer, x, state, context, self.initial_state)
        keep_layer_state(past_key_values, cache_idx, state, x.shape[1], self.mixer_type)
        hidden_states = hidden_states + y.to(hidden_states.dtype)  # not all mixers know autocast
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))

    def step(
        self,
        hidden_states: Tensor,
        state: Any,
        context: SequenceContext,
        mixer_joint: Joint | None = None,
        mlp_joint: Joint | None = None,
    ) -> tuple[Tensor, Any]:
        """`forward` for one more token of every sequence after a state, and no more than that.

        hidden_states (B, 1, D), state (B, ..), or what attention takes for a cache layer -> (B, 1, D) and the
        state after. The joint weights are those of the two modules' projections, side by side.
        """
        context = replace(context, joint=mixer_joint)
        y, state = self.mixer(self.mixer_norm(hidden_states), state, context)
        hidden_states = hidden_states + y
        return hidden_states + self.mlp(self.mlp_norm(hidden_states), mlp_joint), state

    def fused_step(
        self, hidden_states: Tensor, state: Tensor, mixer_joint: Joint, mlp_joint: Joint
    ) -> Tensor:
        """`step` of a few sequences by four kernels, `state` in place.

        hidden_states (B, D) -> (B, D).
        """
        from ..kernels.decode.fused_step import linear_step, mix_step  # triton is imported only where it runs

        mixer, norm, mlp = self.mixer, self.mixer_norm, self.mlp
        h = mix_step(
            hidden_states, norm.weight, norm.eps, *mixer_joint, state, mixer.gate, mixer.fused_window
        )
        x = linear_step(h, mixer.out_proj.weight, residual=hidden_states)
        h = linear_step(x, mlp_joint[0], self.mlp_norm.weight, self.mlp_norm.eps, gated=True)
        return linear_step(h, mlp.down_proj.weight, residual=x)

    def fused_step_of_many(
        self,
        stream: "Stream",
        state: Tensor,
        mixer_joint: Joint,
        mlp_joint: Joint,
        next_norm: Tensor,
        workspace: "Workspace",
    ) -> "Stream":
        """The same for many sequences: from the stream before this block to that before the next, whose norm
        has weights `next_norm`."""
        from ..kernels.decode.fused_tiles import mix_step, normed_step, residual_step

        mixer, mlp = self.mixer, self.mlp
        h = mix_step(stream, self.mixer_norm.eps, *mixer_joint, state, mixer.gate, mixer.fused_window)
        stream = residual_step(h, mixer.out_proj.weight, stream, self.mlp_norm.weight, workspace)
        h = normed_step(stream, self.mlp_norm.eps, mlp_joint[0], gated=True)
        return residual_step(h, mlp.down_proj.weight, stream, next_norm, workspace)


def checkpoint_without_cache(
    checkpoint: Callable[..., Tensor],
    forward: Callable[..., Tensor],
    hidden_states: Tensor,
    context: SequenceContext,
    token_mask: Tensor | None = None,
    order: Tensor | None = None,
    past_key_values: Cache | None = None,
    carried: Carried | None = None,
    cache_idx: int | None = None,
) -> Tensor | tuple[Tensor, Carried]:
    """A block's `forward` through `checkpoint`, unless a cache is in use or no gradient is needed.

    A second pass in the backward pass would go on from the state after, and write it again.
    """
    if past_key_values is None and torch.is_grad_enabled():
        return checkpoint(forward, hidden_states, context, token_mask, order, None, carried)
    return forward(hidden_states, context, token_mask, order, past_key_values, carried, cache_idx)


def _mix_around_padding(
    mixer: Mixer,
    x: Tensor,
    state: Tensor | None,
    context: SequenceContext,
    token_mask: Tensor,
    order: Tensor | None,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """A recurrent mixer on rows with padding, which leaves outputs and states as they would be without.

    A row's padding is moved to its front. What a new sequence's state makes of it there is forgotten, as its
    first token starts a document. No input makes a mixer keep a state that it has: rows are cut where the
    padding of any ends, and a state changes from there on. Shapes as in `LRNNBlock.forward`, state (B, ..),
    initial as in `mix`.
    """
    if order is not None:
        where = order.unsqueeze(-1)
        x, token_mask = x.gather(1, where.expand_as(x)), token_mask.gather(1, where)
        if context.reset is not None:
            context = replace(context, reset=context.reset.gather(1, order))
    begun = token_mask.squeeze(-1)
    if state is None:
        y, after = mix(mixer, x, None, context, initial)
        if after is not None:
            old = torch.zeros_like(after) if initial is None else initial_states(after, initial)
            after = _where_rows(begun.any(dim=1), after, old)
    else:
        y, after = [], state
        T = x.shape[1]
        for begin, end in pairwise([0, *(() if T == 1 else inner_starts(begun & (begun.cumsum(1) == 1))), T]):
            reset = None if context.reset is None else context.reset[:, begin:end]
            part, moved = mix(mixer, x[:, begin:end], after, SequenceContext(reset=reset), initial)
            after = _where_rows(begun[:, begin], moved, after)
            y.append(part)
        y = torch.cat(y, dim=1)
    if order is not None:
        y = torch.empty_like(y).scatter(1, where.expand_as(y), y)
    return y, after


def _where_rows(rows: Tensor, value: Tensor, other: Tensor) -> Tensor:
    """`value` (B, ..) in these rows (B,) bool, `other` in the rest; in the dtype of `value`."""
    return torch.where(rows.view(-1, *[1] * (value.ndim - 1)), value, other.to(value.dtype))
