"""The matrix-valued BD-LRU in Triton, from chunk to chunk: products of small matrices on tensor cores.

From what `matrix_kernels.py` computes of a chunk, its outputs and the state after it are

    y = reads S_0 + scores v        S_L = blockdiag(whole) S_0 + keys^T v

Where a write first erases (`matrix_erase_kernels.py`), v is what the values add to what S_0 holds already:

    v = values - erase S_0

A program carries columns of a head's state from chunk to chunk, in fp32 and in registers. A head with more
columns than it can hold has several programs (PARTS), as columns do not meet. The backward pass walks the
other way with dL/dS. Products have factors in the dtype of the values; only the state's own step has fp32
factors, as three products of tf32 each.

Legend: B batch, T time, H heads, K slots a head, M slots a block, V columns, L steps a chunk, C chunks; KP
is K and VP the columns of a program, each at least 16; P the dense matrix of `whole`. Columns of scores and
keys are in the order of `step_of_column`.
"""

import triton
import triton.language as tl

from ..triton_device import settle_cache_keys
from .matrix_kernels import step_of_column
from .triton_rows import as_int64, product


@triton.jit
def _matrix(at, rows, columns, S: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[rows, columns] of a ROWS x COLUMNS matrix, rows S apart; zeros beyond it."""
    # Tensor cores take at least 16 rows and columns, so small matrices are padded with zeros.
    inside = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(at + rows[:, None] * S + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store_matrix(at, x, rows, columns, S: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Stores x [rows, columns], but for its padding, in the dtype of the memory."""
    inside = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    at = at + rows[:, None] * S + columns[None, :]
    tl.store(at, x.to(at.dtype.element_ty), mask=inside)


@triton.jit
def _transposed(at, rows, columns, S: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[columns, rows]: the transpose of what `_matrix` loads."""
    inside = (columns < COLUMNS)[:, None] & (rows < ROWS)[None, :]
    return tl.load(at + rows[None, :] * S + columns[:, None], mask=inside, other=0.0)


@triton.jit
def _own_block(rows, other, M: tl.constexpr, K: tl.constexpr):
    """[rows, other]: whether both are slots of one block."""
    return (rows[:, None] // M == other[None, :] // M) & (rows < K)[:, None] & (other < K)[None, :]


@triton.jit
def _steps_of(at, base, steps, T, columns, S_T: tl.constexpr, S_V: tl.constexpr, V: tl.constexpr):
    """[steps, columns] of (T, V) at some of the steps from `base` on; zeros from T on."""
    inside = (base + steps < T)[:, None] & (columns < V)[None, :]
    return tl.load(at + steps[:, None] * S_T + columns[None, :] * S_V, mask=inside, other=0.0)


@triton.jit
def _remaining(v, erase, written, rows, S, K: tl.constexpr, L: tl.constexpr, FP32: tl.constexpr):
    """v - erase S [L, VP], in the order of the columns."""
    erased = _matrix(erase, written, rows, K, L, K)  # [L, KP]
    return (v.to(tl.float32) - product(erased, S.to(v.dtype), tl.zeros(v.shape, tl.float32), FP32)).to(
        v.dtype
    )


@triton.jit(do_not_specialize=["T", "n_chunks"])
def state_forward_kernel(
    scores, reads, keys, whole, values, erase, start, y, last, states, T, n_chunks, v_b,
    V_T: tl.constexpr, V_H: tl.constexpr, V_V: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    M: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, L: tl.constexpr, G: tl.constexpr,
    PARTS: tl.constexpr, HAS_START: tl.constexpr, ERASES: tl.constexpr, KEEP: tl.constexpr,
    FP32: tl.constexpr,
):  # fmt: skip
    """y and the last state, or with KEEP the states before each chunk, for the backward pass.

    scores, reads, keys, whole as `chunk_forward_kernel` writes them, values (B, T, H, V) of any strides,
    erase (B, C, H, L, K) by step, start (B, H, K, V) fp32; out, contiguous: y (B, T, H, V) and
    last (B, H, K, V) fp32, or states (B, C, H, K, V).
    """
    head = tl.program_id(0) // PARTS % H
    b = as_int64(tl.program_id(0) // (PARTS * H))
    part = tl.program_id(0) % PARTS
    rows, cols, steps = tl.arange(0, KP), part * VP + tl.arange(0, VP), tl.arange(0, L)
    written = step_of_column(steps, L, G)
    dtype = values.dtype.element_ty
    if HAS_START:
        S = _matrix(start + (b * H + head) * (K * V), rows, cols, V, K, V)
    else:
        S = tl.zeros([KP, VP], tl.float32)
    for chunk in range(n_chunks):  # S [KP, VP] stays in registers
        item = (b * n_chunks + chunk) * H + head
        v_at = values + b * v_b + as_int64(chunk * L) * V_T + head * V_H
        v = _steps_of(v_at, chunk * L, written, T, cols, V_T, V_V, V)  # [L, VP], in the order of the columns
        if ERASES:
            v = _remaining(v, erase + item * (L * K), written, rows, S, K, L, FP32)
        if KEEP:
            _store_matrix(states + item * (K * V), S, rows, cols, V, K, V)
        else:
            read = _matrix(reads + item * (L * K), steps, rows, K, L, K)  # [L, KP]
            score = _matrix(scores + item * (L * L), steps, steps, L, L, L)  # [L, L]
            out = product(read, S.to(dtype), tl.zeros([L, VP], tl.float32), FP32)
            out = product(score, v, out, FP32)
            y_at = y + ((b * T + as_int64(chunk * L)) * H + head) * V
            _store_matrix(y_at, out, steps, cols, H * V, tl.minimum(T - chunk * L, L), V)
        key = _transposed(keys + item * (L * K), steps, rows, K, L, K)  # [KP, L]
        if M == 1:  # a diagonal: no product needed
            S = S * tl.load(whole + item * K + rows, mask=rows < K, other=0.0)[:, None]
        else:
            at = whole + item * (K * M) + rows[:, None] * M + rows[None, :] % M
            # A dense [KP, KP] with zeros off the blocks: tensor cores take no product below 16 x 16.
            P = tl.load(at, mask=_own_block(rows, rows, M, K), other=0.0)
            S = product(P, S, tl.zeros_like(S), FP32)
        S = product(key, v, S, FP32)
    if not KEEP:
        _store_matrix(last + (b * H + head) * (K * V), S, rows, cols, V, K, V)


@triton.jit(do_not_specialize=["T", "n_chunks"])
def state_backward_kernel(
    scores, reads, keys, whole, values, erase, states, grad, grad_last, d_scores, d_reads, d_keys, d_whole,
    d_values, d_erase, d_start, T, n_chunks, v_b, g_b,
    V_T: tl.constexpr, V_H: tl.constexpr, V_V: tl.constexpr, G_T: tl.constexpr, G_H: tl.constexpr,
    G_V: tl.constexpr, H: tl.constexpr, K: tl.constexpr, M: tl.constexpr, V: tl.constexpr, KP: tl.constexpr,
    VP: tl.constexpr, L: tl.constexpr, G: tl.constexpr, PARTS: tl.constexpr, ERASES: tl.constexpr,
    FP32: tl.constexpr,
):  # fmt: skip
    """Gradients of what `state_forward_kernel` reads, each contiguous and shaped as the tensor itself.

    grad (B, T, H, V) of any strides (G_), grad_last (B, H, K, V) fp32, states as KEEP writes them; d_start =
    dL/dh0 in fp32. Those of scores, reads, keys, whole and erase have PARTS after H, to be summed.
    """
    head = tl.program_id(0) // PARTS % H
    b = as_int64(tl.program_id(0) // (PARTS * H))
    part = tl.program_id(0) % PARTS
    rows, cols, steps = tl.arange(0, KP), part * VP + tl.arange(0, VP), tl.arange(0, L)
    written = step_of_column(steps, L, G)
    dtype = values.dtype.element_ty
    dS = _matrix(grad_last + (b * H + head) * (K * V), rows, cols, V, K, V)
    for back in range(n_chunks):  # dS [KP, VP] stays in registers
        chunk = n_chunks - 1 - back
        item = (b * n_chunks + chunk) * H + head
        own = item * PARTS + part
        v_at = values + b * v_b + as_int64(chunk * L) * V_T + head * V_H
        g_at = grad + b * g_b + as_int64(chunk * L) * G_T + head * G_H
        v = _steps_of(v_at, chunk * L, written, T, cols, V_T, V_V, V)
        g = _steps_of(g_at, chunk * L, steps, T, cols, G_T, G_V, V)
        S = _matrix(states + item * (K * V), rows, cols, V, K, V)  # before the chunk
        owed = dS.to(dtype)  # after the chunk
        if ERASES:
            v = _remaining(v, erase + item * (L * K), written, rows, S, K, L, FP32)
        d_score = product(g, tl.trans(v), tl.zeros([L, L], tl.float32), FP32)
        d_score = tl.where(written[None, :] <= steps[:, None], d_score, 0.0)  # values reach no earlier output
        _store_matrix(d_scores + own * (L * L), d_score, steps, steps, L, L, L)
        d_read = product(g, tl.trans(S), tl.zeros([L, KP], tl.float32), FP32)
        _store_matrix(d_reads + own * (L * K), d_read, steps, rows, K, L, K)
        d_key = product(v, tl.trans(owed), tl.zeros([L, KP], tl.float32), FP32)
        _store_matrix(d_keys + own * (L * K), d_key, steps, rows, K, L, K)
        score = _transposed(scores + item * (L * L), steps, steps, L, L, L)
        dv = product(score, g, tl.zeros([L, VP], tl.float32), FP32)
        key = _matrix(keys + item * (L * K), steps, rows, K, L, K)
        dv = product(key, owed, dv, FP32)
        dv_at = d_values + ((b * T + as_int64(chunk * L)) * H + head) * V
        _store_matrix(dv_at, dv, written, cols, H * V, tl.minimum(T - chunk * L, L), V)
        if ERASES:
            removed = (-dv).to(dtype)
            d_erased = product(removed, tl.trans(S), tl.zeros([L, KP], tl.float32), FP32)
            _store_matrix(d_erase + own * (L * K), d_erased, written, rows, K, L, K)
        if M == 1:
            d_decay = tl.sum(dS * S.to(tl.float32), axis=1)  # [KP], the diagonal of dP
            tl.store(d_whole + own * K + rows, d_decay, mask=rows < K)
            dS = dS * tl.load(whole + item * K + rows, mask=rows < K, other=0.0)[:, None]
        else:
            # The dense [KP, KP] product, of which only the blocks are stored.
            dP = product(owed, tl.trans(S), tl.zeros([KP, KP], tl.float32), FP32)
            at = rows[:, None] * M + rows[None, :] % M
            tl.store(d_whole + own * (K * M) + at, dP, mask=_own_block(rows, rows, M, K))
            at = rows[None, :] * M + rows[:, None] % M  # of the transposed
            P = tl.load(whole + item * (K * M) + at, mask=_own_block(rows, rows, M, K), other=0.0)
            dS = product(P, dS, tl.zeros_like(dS), FP32)
        read = _transposed(reads + item * (L * K), steps, rows, K, L, K)
        dS = product(read, g, dS, FP32)
        if ERASES:
            dS = product(_transposed(erase + item * (L * K), written, rows, K, L, K), removed, dS, FP32)
    _store_matrix(d_start + (b * H + head) * (K * V), dS, rows, cols, V, K, V)


settle_cache_keys(globals())
