"""The matrix-valued BD-LRU whose writes first erase, in Triton (gated DeltaNet's rule with our transitions).

    S_t = A_t S_{t-1} + k_t w_t^T       w_t = v_t - (A_t S_{t-1})^T e_t

With the columns of `matrix_kernels.py` within a chunk of L steps,

    w_t + sum_{s < t} N_{t,s} w_s = v_t - S_0^T r_t       N_{t,s} = e_t . u_{t,s}       r_t = P_t^T e_t

where N and r are the scores and reads of e, a second set of queries of the same columns. So (I + N) w =
v - r S_0: the inverse X of a triangular matrix a chunk, computed for all chunks at once, makes new values X v
and what they erase, X r, and the kernels from chunk to chunk subtract the second times S_0. The way of arXiv
2406.06484, section 3.

e.u are products of numbers of size 1, so fp32 serves for N; the products with X are in the values' dtype.

Legend: B batch, T time, H heads, K slots a head, M slots a block, V columns, L steps a chunk, C chunks.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ..derivatives import differentiable_once, save_inputs
from ..triton_device import on_device
from .matrix import CHUNK, _chunks, _outputs, _outputs_backward, _summaries, _summaries_backward, _within
from .triton_launch import reset_flags


@torch.library.custom_op("lrnn_lm::matrix_chunks_triton", mutates_args=())
def _within_chunks(
    transitions: Tensor, writes: Tensor, queries: Tensor, erase: Tensor, reset: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """scores, reads, keys in `dtype`, whole and the scores and reads of `erase` in fp32, of
    `chunk_forward_kernel`."""
    with on_device(writes):
        chunks = _chunks(transitions, 1, reset)
        return _summaries(chunks, _within(transitions, writes, queries, reset_flags(reset), erase), dtype)


@torch.library.custom_op("lrnn_lm::matrix_chunks_triton_backward", mutates_args=())
def _within_chunks_backward(
    d_scores: Tensor, d_reads: Tensor, d_keys: Tensor, d_whole: Tensor, d_erased_scores: Tensor,
    d_erased_reads: Tensor, transitions: Tensor, writes: Tensor, queries: Tensor, erase: Tensor,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_summaries = d_scores, d_reads, d_keys, d_whole, d_erased_scores, d_erased_reads
    d_summaries = tuple(x.contiguous() for x in d_summaries)
    with on_device(writes):
        inputs = _within(transitions, writes, queries, reset_flags(reset), erase)
        return _summaries_backward(_chunks(transitions, 1, reset), inputs, d_summaries)


@torch.library.custom_op("lrnn_lm::matrix_outputs_triton", mutates_args=())
def _from_chunk_to_chunk(
    scores: Tensor, reads: Tensor, keys: Tensor, whole: Tensor, values: Tensor, erase: Tensor,
    h0: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and the last state, of `state_forward_kernel`."""
    with on_device(values):
        return _outputs(_chunks_of(whole, values), (scores, reads, keys, whole), values, erase, h0)


@torch.library.custom_op("lrnn_lm::matrix_outputs_triton_backward", mutates_args=())
def _from_chunk_to_chunk_backward(
    grad: Tensor, grad_last: Tensor, scores: Tensor, reads: Tensor, keys: Tensor, whole: Tensor,
    values: Tensor, erase: Tensor, h0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    summaries = scores, reads, keys, whole
    with on_device(values):
        chunks = _chunks_of(whole, values)
        made, *more = _outputs_backward(chunks, summaries, values, erase, h0, grad, grad_last)
    return *made, *more


def _chunks_of(whole: Tensor, values: Tensor):
    """The chunks of a scan by its `whole` (B, C, H, K, M) and values (B, T, H, V)."""
    return _chunks(whole[:, :1].expand(-1, values.shape[1], -1, -1, -1), values.shape[-1], None)


@_within_chunks.register_fake
def _(transitions, writes, queries, erase, reset, dtype):
    B, T, H, K, M = transitions.shape
    C = -(-T // CHUNK)
    new = transitions.new_empty
    scores, reads, keys = (new(B, C, H, CHUNK, n, dtype=dtype) for n in (CHUNK, K, K))
    of_erased = (new(B, C, H, CHUNK, n, dtype=torch.float32) for n in (CHUNK, K))
    return scores, reads, keys, new(B, C, H, K, M, dtype=torch.float32), *of_erased


@_within_chunks_backward.register_fake
def _(
    d_scores, d_reads, d_keys, d_whole, d_erased_scores, d_erased_reads, transitions, writes, queries, erase,
    reset,
):  # fmt: skip
    B, T, H, K, M = transitions.shape
    d_a = transitions.new_empty(B, T, M, H, K).permute(0, 1, 3, 4, 2)
    return d_a, *(x.new_empty(x.shape) for x in (writes, queries, erase))


@_from_chunk_to_chunk.register_fake
def _(scores, reads, keys, whole, values, erase, h0):
    B, _, H, V = values.shape
    return values.new_empty(values.shape), whole.new_empty(B, H, whole.shape[3], V)


@_from_chunk_to_chunk_backward.register_fake
def _(grad, grad_last, scores, reads, keys, whole, values, erase, h0):
    made = [torch.empty_like(x) for x in (scores, reads, keys, whole)]
    return *made, values.new_empty(values.shape), torch.empty_like(erase), torch.empty_like(grad_last)


def _gradients_within(ctx, *grads):
    return *_within_chunks_backward(*grads, *ctx.saved_tensors), None, None


def _gradients_of_outputs(ctx, grad, grad_last):
    saved = ctx.saved_tensors  # read once: activation checkpointing gives them once
    *gradients, d_h0 = _from_chunk_to_chunk_backward(grad, grad_last.contiguous(), *saved)
    return *gradients, None if saved[-1] is None else d_h0


_within_chunks.register_autograd(_gradients_within, setup_context=save_inputs)
_from_chunk_to_chunk.register_autograd(_gradients_of_outputs, setup_context=save_inputs)
differentiable_once(_within_chunks_backward)
differentiable_once(_from_chunk_to_chunk_backward)


def _columns_of_steps(transitions: Tensor) -> Tensor:
    """(L,): the column of each step, the inverse of `matrix_kernels.step_of_column`."""
    G = _chunks(transitions, 1, None).options["G"]
    step = torch.arange(CHUNK, device=transitions.device)
    return step % G * (CHUNK // G) + step // G


def _by_chunk(x: Tensor) -> Tensor:
    """(B, T, H, V) as (B, C, H, L, V); zeros after T."""
    x = functional.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % CHUNK))
    return x.unflatten(1, (-1, CHUNK)).transpose(2, 3)


def matrix_erase_triton(
    transitions: Tensor, writes: Tensor, values: Tensor, queries: Tensor, erase: Tensor, h0: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`reference.matrix_scan` with `erase` on a GPU; h0 in fp32."""
    T, dtype = values.shape[1], values.dtype
    *summaries, scores, reads = _within_chunks(transitions, writes, queries, erase, reset, dtype)
    with torch.autocast(values.device.type, enabled=False):
        N = scores[..., _columns_of_steps(transitions)].tril(-1)  # (B, C, H, L, L) by steps t, s
        one = torch.eye(CHUNK, device=N.device)
        X = torch.linalg.solve_triangular(N + one, one.expand_as(N), upper=False, unitriangular=True)
        X = X.to(dtype)
        added = (X @ _by_chunk(values)).transpose(2, 3).flatten(1, 2)[:, :T]
        erased = X @ reads.to(dtype)
    h0 = None if h0 is None else h0.contiguous()  # the kernels read it without strides
    return _from_chunk_to_chunk(*summaries, added, erased.contiguous(), h0)
