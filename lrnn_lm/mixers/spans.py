"""What each query of attention sees: a span of tokens, from where its document or window begins to itself.

Tokens are counted within their row, padding aside. A span becomes a mask (B, 1, T, S), or the blocks of one:
flex_attention computes only the blocks that a query sees, in memory proportional to T.

Legend: B batch, or 1 where all rows are alike, T queries, S keys.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..kernels.dispatch import has_triton
from .base import is_exported

SPAN_BLOCK = 128  # tokens; what flex_attention's kernels are tuned for
# Below, a mask of a row takes up to 16 MiB, and the kernels of the mask are the ones that ran on a device.
LEAST_TOKENS = 4096
LEAST_WIDTH = 16  # of a head, in flex_attention's kernels


def takes_blocks(x: Tensor, head_dim: int) -> bool:
    """Whether attention over all of x (B, T, D) at once goes by blocks."""
    return (
        x.is_cuda
        and not is_exported()
        and x.shape[1] >= LEAST_TOKENS
        and head_dim >= LEAST_WIDTH
        and x.dtype != torch.float64
        and has_triton()
    )


def mask_of_spans(keys: Tensor, queries: Tensor, starts: Tensor) -> Tensor:
    """(B, 1, T, S) bool, true where a query sees a key.

    Args:
        keys: (B, S) number of each key in its row, negative on padding.
        queries: (B, T) the same of each query.
        starts: (B, T) number of the first token that each query sees.
    """
    keys, queries, starts = keys.unsqueeze(1), queries.unsqueeze(2), starts.unsqueeze(2)
    return ((keys >= starts) & (keys <= queries)).unsqueeze(1)


def blocks_of_spans(keys: Tensor, starts: Tensor, rows: int) -> BlockMask:
    """The same mask by blocks, for `rows` rows of T queries that are the keys: `keys` and `starts` (B, T).

    Neither goes down within a row, padding aside, so the bounds of a block tell which blocks it sees.
    """
    keys, starts = (x.int() for x in torch.broadcast_tensors(keys, starts))
    T = keys.shape[1]
    steps = torch.arange(-(-T // SPAN_BLOCK) * SPAN_BLOCK, device=keys.device).clamp_max(T - 1)
    key_blocks, start_blocks = (
        keys[:, steps].unflatten(1, (-1, SPAN_BLOCK)),
        starts[:, steps].unflatten(1, (-1, SPAN_BLOCK)),
    )
    count = torch.arange(key_blocks.shape[1], device=keys.device)
    before = count < count.unsqueeze(1)  # (query blocks, key blocks)
    some = key_blocks.amax(2).unsqueeze(1) >= start_blocks.amin(2).unsqueeze(2)
    whole = (key_blocks.amin(2).unsqueeze(1) >= start_blocks.amax(2).unsqueeze(2)) & before
    part = some & (count <= count.unsqueeze(1)) & ~whole

    keys, starts = keys.expand(rows, T), starts.expand(rows, T)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (keys[batch, key] >= starts[batch, query])

    return BlockMask.from_kv_blocks(
        *_listed(part), *_listed(whole), BLOCK_SIZE=SPAN_BLOCK, mask_mod=visible, seq_lengths=(T, T)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1, Q) how many of K blocks each of Q blocks sees, (B, 1, Q, K) which, those first.

    blocks: (B, Q, K) bool.
    """
    numbers = blocks.int().sum(2, dtype=torch.int32)
    order = blocks.int().argsort(dim=2, descending=True, stable=True).int()
    return numbers.unsqueeze(1), order.unsqueeze(1)


def attend_by_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over what `blocks` shows.

    q (B, H, T, d), k and v (B, G, T, d) -> (B, H, T, d).
    """
    # Not compiled, flex_attention computes all scores; on a CPU, where it is a reference, it may.
    attend = _compiled() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    return attend(q, k, v, block_mask=blocks, enable_gqa=k.shape[1] < q.shape[1])


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)
