"""Causal softmax attention with rotary positions: the Transformer baseline, and the other half of hybrids.

Legend: B batch, T time, S keys (cached and new), D model width, H heads, G heads of keys and values, d head
width.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from ..kernels.dispatch import check_reset
from .base import (
    Mixer,
    MixerCost,
    Reach,
    ResidualOutput,
    Rotary,
    SequenceContext,
    check_positive,
    check_sizes,
)
from .spans import attend_by_blocks, blocks_of_spans, mask_of_spans, takes_blocks


class AttentionWeights(nn.Module):
    """softmax(q k^T / sqrt(d) + mask), as a module, so that hooks can record its result."""

    def forward(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        """q (B, H, T, d), k (B, H, S, d), mask (B, 1, T, S) to be added -> (B, H, T, S)."""
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + mask
        return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=-1).to(q.dtype)


class HeadNorm(nn.RMSNorm):
    """torch's, computed in fp32 at least. A module's call: offloaders, hooks and adapters act there."""

    def forward(self, x: Tensor) -> Tensor:
        """x (.., d) -> the same shape and dtype."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return nn.functional.rms_norm(x.to(dtype), (x.shape[-1],), self.weight.to(dtype), self.eps).to(
            x.dtype
        )


class Attention(Mixer):
    """Multi-head attention through SDPA, or through explicit weights where they are recorded.

    Args:
        hidden_size: D.
        num_heads: H; D / H must be even.
        num_kv_heads: G, which divides H: H / G heads share keys and values (grouped queries, arXiv
            2305.13245). The cache and its reading shrink by H / G. None for H.
        use_rope: whether to rotate queries and keys by their positions. A layer without positions still sees
            the order of tokens through the causal mask, and through the recurrent layers of a hybrid.
        rope_theta: base of the rotary frequencies.
        qk_norm: whether to divide each head's queries and keys by their root mean square before rotation,
            which bounds the scores at high learning rates (arXiv 2302.05442).
        window: W, the tokens that a query sees, itself included; at least 2. None for all of its document.
            The cache holds W - 1 of them.
    """

    layer_type = "full_attention"  # with a window "sliding_attention"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        use_rope: bool = True,
        rope_theta: float = 10_000.0,
        qk_norm: bool = False,
        window: Reach | None = None,
    ):
        super().__init__()
        check_sizes(num_heads=num_heads, num_kv_heads=num_kv_heads, window=window)
        check_positive(rope_theta=rope_theta)
        if window == 1:
            raise ValueError("window must be at least 2 tokens: in a window of 1 a token sees itself")
        if hidden_size % (2 * num_heads):
            raise ValueError(f"hidden_size {hidden_size} does not split into {num_heads} heads of even width")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        if num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {num_kv_heads} does not divide num_heads {num_heads}")
        self.head_dim = hidden_size // num_heads
        self.window = window
        if window is not None:
            self.layer_type = "sliding_attention"
        self.use_rope = use_rope
        self.rope_theta = rope_theta
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.out_proj = ResidualOutput(hidden_size, hidden_size, bias=False)
        self.q_norm = HeadNorm(self.head_dim, eps=1e-6) if qk_norm else None
        self.k_norm = HeadNorm(self.head_dim, eps=1e-6) if qk_norm else None
        self.weights = AttentionWeights()
        self.draw_parameters()

    def forward(
        self, x: Tensor, state: Any = None, context: SequenceContext | None = None
    ) -> tuple[Tensor, Any]:
        """x (B, T, D), state a cache layer or None -> y (B, T, D), the same cache layer, longer by T.

        A cache layer is transformers': for a new one `DynamicLayer()`, or with a window
        `DynamicSlidingWindowLayer(window)`. Without positions in the context the tokens come first, or right
        after those in the cache.
        """
        context = SequenceContext.of(x, context)
        B, T, D = x.shape
        if context.positions is None:  # without a context, or with a caller's own; a model has them
            context = self._context_after(x, state, context)
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, T, H, d), and keys and values (B, T, G, d)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.use_rope:
            rotary = context.rotary
            if rotary is None or (rotary.head_dim, rotary.theta) != (self.head_dim, self.rope_theta):
                rotary = self.rotary(context.positions)
            q, k = rotate(q, rotary.cos, rotary.sin), rotate(k, rotary.cos, rotary.sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or G, T, d)
        if state is not None:
            k, v = state.update(k, v)  # (B, G, S, d)
        mask = context.attention_mask if self.window is None else context.window_mask
        by_blocks = isinstance(mask, BlockMask)
        if context.window_order is not None and self.window is not None:
            where = context.window_order[:, None, :, None].expand_as(k)
            kept = k.gather(2, where), v.gather(2, where)
            state.keys, state.values = (each[:, :, 1 - state.sliding_window :] for each in kept)
            k, v = (k, v) if by_blocks else kept
        if by_blocks:
            y = attend_by_blocks(q, k, v, mask)
            return self.out_proj(y.transpose(1, 2).reshape(B, T, D)), state
        # Of SDPA's fast kernels only flash attention reads groups in place: half precision, no mask.
        grouped = self.num_kv_heads < self.num_heads
        in_place = grouped and mask is None and q.dtype in (torch.bfloat16, torch.float16)
        # One token's heads read their group in place with any kernel, as if they were queries of one head.
        alone = grouped and T == 1 and mask is not None and mask.shape[1] == 1
        if alone and not context.attention_weights:
            q = q.reshape(B, self.num_kv_heads, -1, self.head_dim)
        elif grouped and not in_place:
            k, v = (x.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for x in (k, v))
        if context.attention_weights:
            y = self.weights(q, k, mask) @ v
        else:
            causal = bool(mask is None and T > 1)  # in an exported graph a symbol, which SDPA refuses
            y = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=in_place
            )
        y = y.reshape(B, T, D) if alone else y.transpose(1, 2).reshape(B, T, D)
        return self.out_proj(y), state

    def rotary(self, positions: Tensor) -> Rotary:
        """The angles of these positions, which a model computes once for all layers with this base."""
        return Rotary(
            self.head_dim, self.rope_theta, *rotary_angles(positions, self.head_dim, self.rope_theta)
        )

    def cost(self, context_length: int) -> MixerCost:
        """Scores and weighted sums over the keys that a query sees, on average over the context."""
        T = context_length
        W = min(self.window or T, T)
        keys = W * (W + 1) // 2 + (T - W) * W  # of all T queries
        return MixerCost(attention=2 * 2 * self.num_heads * self.head_dim * keys // T)

    def state_elements(self, context_length: int) -> int:
        tokens = context_length if self.window is None else min(context_length, self.window - 1)
        return 2 * self.num_kv_heads * self.head_dim * tokens

    def _context_after(self, x: Tensor, state: Any, context: SequenceContext) -> SequenceContext:
        """The context of tokens x (B, T, D) that follow those in a cache layer, or begin a sequence; with the
        documents and masks of the given one. The cache layer keeps where its last document began."""
        T, past = x.shape[1], 0 if state is None else state.get_seq_length()
        positions = torch.arange(past, past + T, device=x.device).unsqueeze(0)
        begun = state.document_start.unsqueeze(1) if past and hasattr(state, "document_start") else None
        if context.reset is not None:
            check_reset(context.reset, (x.shape[0], T))
            newest = torch.where(context.reset, positions, 0).cummax(dim=1).values  # (B, T)
            begun = newest if begun is None else torch.maximum(newest, begun)
            if state is not None:
                state.document_start = begun[:, -1]
        alone = begun is None and past + T <= (self.window or past + T) and (not past or T == 1)
        if alone or context.attention_mask is not None or context.window_mask is not None:
            return replace(context, positions=positions)
        starts = torch.zeros_like(positions) if self.window is None else positions - self.window + 1
        starts = starts if begun is None else torch.maximum(starts, begun)
        if state is None and takes_blocks(x, self.head_dim):
            mask = blocks_of_spans(positions, starts, x.shape[0])
        else:
            length, offset = (T, 0) if state is None else state.get_mask_sizes(T)
            keys = torch.arange(offset, offset + length, device=x.device).unsqueeze(0)
            mask = mask_of_spans(keys, positions, starts)
        return replace(context, attention_mask=mask, window_mask=mask, positions=positions)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin in fp32, each (B or 1, T, 1, d), of position / theta^(2j/d) (Su et al., 2104.09864); of the
    first half of a row, sin is negative: see `rotate`."""
    index = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = (positions.unsqueeze(-1).float() * theta ** (-index / head_dim)).unsqueeze(2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_j, x_{j + d/2}) of (B, T, H, d) by their angles; the dtype stays that of x."""
    # Not two halves put together: for each number a compiler would compute both, which took 0.75 ms more in a
    # step of 75 (docs/performance.md). Wide, so that the two parts of the gradient are added in fp32.
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    swapped = wide.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return (wide * cos + swapped * sin).to(x.dtype)
