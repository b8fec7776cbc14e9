"""The matrix-valued BD-LRU whose writes first erase, in Triton (gated DeltaNet's rule with our transitions).

    S_t = A_t S_{t-1} + k_t w_t^T       w_t = v_t - (A_t S_{t-1})^T e_t

With the columns of `matrix_kernels.py` within a chunk of L steps,

    w_t + sum_{s < t} N_{t,s} w_s = v_t - S_0^T r_t       N_{t,s} = e_t . u_{t,s}       r_t = P_t^T e_t

where N and r are the scores and reads of e, a second set of queries of the same columns. So (I + N) w =
v - r S_0: with X = (I + N)^-1, new values X v and what they erase, X r, are made for all chunks at once, and
the kernels from chunk to chunk subtract the second times S_0. The way of arXiv 2406.06484, section 3.

e.u are products of numbers of size 1, so fp32 serves for N and X; products with X are in the values' dtype.

Legend: B batch, T time, H heads, K slots a head, M slots a block, V columns, L steps a chunk, C chunks; KP is
K and VP the columns of a tile, each at least 16, PARTS tiles a head; an item is a chunk of a head, a program
each, numbered over (B, C, H).
"""

import triton
import triton.language as tl

from ..triton_device import settle_cache_keys
from .matrix_state_kernels import _matrix, _steps_of, _store_matrix
from .triton_rows import as_int64, product


@triton.jit
def _by_step(steps, L: tl.constexpr, G: tl.constexpr):
    """The column of scores of each step, the inverse of `step_of_column`."""
    return steps % G * (L // G) + steps // G


@triton.jit
def _inverse(scores, steps, L: tl.constexpr, G: tl.constexpr):
    """X = (I + N)^-1 [L, L] in fp32, by steps, of the scores of an item."""
    rows, columns = steps[:, None], steps[None, :]
    N = tl.load(scores + rows * L + _by_step(columns, L, G), mask=columns < rows, other=0.0)
    X = tl.where(rows == columns, 1.0, 0.0)
    for t in range(1, L):  # row after row: sums of powers of N would cancel
        of_row = tl.sum(tl.where(rows == t, N, 0.0), axis=0)
        X -= tl.where(rows == t, tl.sum(of_row[:, None] * X, axis=0)[None, :], 0.0)
    return X


@triton.jit(do_not_specialize=["T", "n_chunks"])
def erase_forward_kernel(
    scores, reads, values, added, erased, T, n_chunks, v_b,
    V_T: tl.constexpr, V_H: tl.constexpr, V_V: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, PARTS: tl.constexpr, L: tl.constexpr,
    G: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """X v and X r: scores and reads of the erased keys as `chunk_forward_kernel` writes them, in fp32, values
    (B, T, H, V) of any strides; out, contiguous: added (B, T, H, V) and erased (B, C, H, L, K) by step.
    """
    item, head = as_int64(tl.program_id(0)), tl.program_id(0) % H
    chunk, b = tl.program_id(0) // H % n_chunks, as_int64(tl.program_id(0) // H // n_chunks)
    rows, steps = tl.arange(0, KP), tl.arange(0, L)
    t0, count = as_int64(chunk * L), tl.minimum(T - chunk * L, L)
    X = _inverse(scores + item * (L * L), steps, L, G).to(values.dtype.element_ty)
    read = _matrix(reads + item * (L * K), steps, rows, K, L, K).to(X.dtype)
    out = product(X, read, tl.zeros([L, KP], tl.float32), FP32)
    _store_matrix(erased + item * (L * K), out, steps, rows, K, L, K)
    for part in tl.static_range(PARTS):
        cols = part * VP + tl.arange(0, VP)
        v = _steps_of(values + b * v_b + t0 * V_T + head * V_H, chunk * L, steps, T, cols, V_T, V_V, V)
        out = product(X, v, tl.zeros([L, VP], tl.float32), FP32)
        _store_matrix(added + ((b * T + t0) * H + head) * V, out, steps, cols, H * V, count, V)


@triton.jit(do_not_specialize=["T", "n_chunks"])
def erase_backward_kernel(
    scores, reads, values, d_added, d_erased, d_scores, d_reads, d_values, T, n_chunks, v_b,
    V_T: tl.constexpr, V_H: tl.constexpr, V_V: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, PARTS: tl.constexpr, L: tl.constexpr,
    G: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """Gradients of what `erase_forward_kernel` reads, each contiguous and shaped as the tensor itself."""
    item, head = as_int64(tl.program_id(0)), tl.program_id(0) % H
    chunk, b = tl.program_id(0) // H % n_chunks, as_int64(tl.program_id(0) // H // n_chunks)
    rows, steps = tl.arange(0, KP), tl.arange(0, L)
    t0, count = as_int64(chunk * L), tl.minimum(T - chunk * L, L)
    whole = _inverse(scores + item * (L * L), steps, L, G)
    X = whole.to(values.dtype.element_ty)
    read = _matrix(reads + item * (L * K), steps, rows, K, L, K).to(X.dtype)
    g = _matrix(d_erased + item * (L * K), steps, rows, K, L, K)
    d_read = product(tl.trans(X), g, tl.zeros([L, KP], tl.float32), FP32)
    _store_matrix(d_reads + item * (L * K), d_read, steps, rows, K, L, K)
    dX = product(g, tl.trans(read), tl.zeros([L, L], tl.float32), FP32)
    for part in tl.static_range(PARTS):
        cols = part * VP + tl.arange(0, VP)
        own = ((b * T + t0) * H + head) * V
        v = _steps_of(values + b * v_b + t0 * V_T + head * V_H, chunk * L, steps, T, cols, V_T, V_V, V)
        g = _steps_of(d_added + own, chunk * L, steps, T, cols, H * V, 1, V)
        dv = product(tl.trans(X), g, tl.zeros([L, VP], tl.float32), FP32)
        _store_matrix(d_values + own, dv, steps, cols, H * V, count, V)
        dX = product(g, tl.trans(v), dX, FP32)
    # d(I + N)^-1 = -X dN X
    dN = product(dX, tl.trans(whole), tl.zeros([L, L], tl.float32), FP32)
    dN = -product(tl.trans(whole), dN, tl.zeros([L, L], tl.float32), FP32)
    at = d_scores + item * (L * L) + steps[:, None] * L + _by_step(steps[None, :], L, G)
    tl.store(at, tl.where(steps[None, :] < steps[:, None], dN, 0.0))


settle_cache_keys(globals())
