"""What a chunk of time does to the state, for scans whose batch is too small to fill a device (Triton).

A chunk is an affine map of the state before it: x -> P x + q. One lane owns one block (or one channel and
some columns of P) of one chunk and keeps P in registers. Going back in time the same P appears transposed:

    forward    P = A_t .. A_begin,   q = h at the end of the chunk from a zero state
    backward   P^T,                  q = sum_t (A_t .. A_begin)^T g_t

Legend: B batch, T time, N blocks or channels, M block size or order, C chunks, K = M + 1; z gate logits, g =
dL/dh. Blocks are [BLOCK], one block or channel a lane.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import INTERPRETED, LANES, on_device
from .triton_rows import coefficients, load_rows, row, where_also, wide


@triton.jit
def _place(tiles, n_chunks, N: tl.constexpr, BLOCK: tl.constexpr):
    """Where this program's lanes are: (b, chunk, n, valid)."""
    pid = tl.program_id(0)
    n = (pid % tiles) * BLOCK + tl.arange(0, BLOCK)
    outer = pid // tiles
    return wide(outer // n_chunks), outer % n_chunks, tl.minimum(n, N - 1), n < N


@triton.jit
def _block_rows(z_at, i: tl.constexpr, G_I, K: tl.constexpr, G_K: tl.constexpr):
    return load_rows(z_at + i * G_I, 1, 1, K, G_K, None)


@triton.jit(do_not_specialize=["T", "chunk", "n_chunks", "g_b", "x_b", "r_b"])
def block_transfer_kernel(
    gates, x_in, reset, out, T, chunk, n_chunks, tiles, g_b, g_n, x_b, x_n, r_b,
    G_T: tl.constexpr, G_I: tl.constexpr, G_K: tl.constexpr, X_T: tl.constexpr, X_I: tl.constexpr,
    R_T: tl.constexpr, N: tl.constexpr, M: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr,
    HAS_RESET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BD-LRU: P and q of one chunk. x_in (B, T, N, M) is v, or g if REVERSE; out (B, C, K, N, M) fp32.

    REVERSE writes the chunks last first and P transposed: what a scan over `out` in order needs.
    """
    K: tl.constexpr = M + 1
    b, c, n, valid = _place(tiles, n_chunks, N, BLOCK)
    begin = c * chunk
    end = tl.minimum(begin + chunk, T)
    z_at = gates + (b * g_b + wide(n) * g_n)
    x_at = x_in + (b * x_b + wide(n) * x_n)
    p, q = (), ()
    for i in tl.static_range(M):
        q = q + (tl.zeros([BLOCK], tl.float32),)
        for k in tl.static_range(M):
            p = p + (tl.full([BLOCK], 1.0 if i == k else 0.0, tl.float32),)
    t64 = begin.to(tl.int64)
    z_next = ()
    for i in tl.static_range(M):
        z_next = z_next + _block_rows(z_at + t64 * G_T, i, G_I, K, G_K)
    x_next = load_rows(x_at + t64 * X_T, 1, 1, M, X_I, None)
    if HAS_RESET:
        r_next = tl.load(reset + b * r_b + t64 * R_T)
    for t in range(begin, end):
        z_now, x_now = z_next, x_next
        t64 = wide(tl.minimum(t + 1, end - 1))
        z_next = ()
        for i in tl.static_range(M):
            z_next = z_next + _block_rows(z_at + t64 * G_T, i, G_I, K, G_K)
        x_next = load_rows(x_at + t64 * X_T, 1, 1, M, X_I, None)
        if HAS_RESET:
            r_now = r_next
            r_next = tl.load(reset + b * r_b + t64 * R_T)
        x = row(x_now, 0, M)
        if HAS_RESET:
            started = r_now != 0
            kept, kept_q = (), ()
            for j in tl.static_range(M * M):
                kept = kept + (tl.where(started, 0.0, p[j]),)
            for j in tl.static_range(M):
                kept_q = kept_q + (q[j] if REVERSE else tl.where(started, 0.0, q[j]),)
            p, q = kept, kept_q
        new_p, new_q = (), ()
        for i in tl.static_range(M):
            f, scales = coefficients(row(z_now, i, K), K, 1, GATE, 0, 0)
            scale = scales[0]
            if not REVERSE:
                total = f[M] * x[i]
                for j in tl.static_range(M):
                    total += f[j] * q[j]
                new_q = new_q + (total * scale,)
            for k in tl.static_range(M):
                total = f[0] * p[k]
                for j in tl.static_range(1, M):
                    total += f[j] * p[j * M + k]
                new_p = new_p + (total * scale,)
        p = new_p
        if REVERSE:
            for k in tl.static_range(M):
                total = q[k]
                for i in tl.static_range(M):
                    total += p[i * M + k] * x[i]
                new_q = new_q + (total,)
        q = new_q
    to = n_chunks - 1 - c if REVERSE else c
    out_at = out + ((b * n_chunks + to) * (K * N * M) + n * M)
    for i in tl.static_range(M):
        tl.store(out_at + M * (N * M) + i, q[i], mask=valid)
        for k in tl.static_range(M):
            spot = i * (N * M) + k if REVERSE else k * (N * M) + i
            tl.store(out_at + spot, p[i * M + k], mask=valid)


@triton.jit(do_not_specialize=["T", "chunk", "n_chunks", "g_b", "x_b", "r_b"])
def channel_transfer_kernel(
    gates, x_in, reset, out, T, chunk, n_chunks, tiles, g_b, g_n, x_b, x_n, r_b,
    G_T: tl.constexpr, G_K: tl.constexpr, X_T: tl.constexpr, R_T: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr, HAS_RESET: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """H-LRU: COLUMNS columns of P, and q, of one chunk, by as many scans from unit windows; program axis 1 =
    columns.

    x_in (B, T, N) is v, or g if REVERSE; out (B, C, K, N, M) fp32 as in `block_transfer_kernel`. The state is
    the window of the last M values, newest first; q is one more scan forward, and sum_t g_t h_t of each
    column backward.
    """
    K: tl.constexpr = M + 1
    b, c, n, valid = _place(tiles, n_chunks, N, BLOCK)
    group = tl.program_id(1)
    begin = c * chunk
    end = tl.minimum(begin + chunk, T)
    z_at = gates + (b * g_b + wide(n) * g_n)
    x_at = x_in + (b * x_b + wide(n) * x_n)
    windows, q = (), ()  # windows[k * M + i]: column k's value i steps ago
    zero = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(COLUMNS):
        for i in tl.static_range(M):
            windows = windows + (tl.where(group * COLUMNS + k == i, 1.0, zero),)
    for _ in tl.static_range(COLUMNS if REVERSE else M):
        q = q + (zero,)
    t64 = begin.to(tl.int64)
    z_next = load_rows(z_at + t64 * G_T, 1, 1, K, G_K, None)
    x_next = tl.load(x_at + t64 * X_T)
    if HAS_RESET:
        r_next = tl.load(reset + b * r_b + t64 * R_T)
    for t in range(begin, end):
        z_now, x = z_next, x_next.to(tl.float32)
        t64 = wide(tl.minimum(t + 1, end - 1))
        z_next = load_rows(z_at + t64 * G_T, 1, 1, K, G_K, None)
        x_next = tl.load(x_at + t64 * X_T)
        if HAS_RESET:
            r_now = r_next
            r_next = tl.load(reset + b * r_b + t64 * R_T)
        f, scales = coefficients(row(z_now, 0, K), K, 1, GATE, 0, 0)
        scale = scales[0]
        if HAS_RESET:  # a start drops every tap: nothing of the older windows may come back later either
            started = r_now != 0
            kept, kept_q = (), ()
            for j in tl.static_range(COLUMNS * M):
                kept = kept + (tl.where(started, 0.0, windows[j]),)
            for j in tl.static_range(COLUMNS if REVERSE else M):
                kept_q = kept_q + (q[j] if REVERSE else tl.where(started, 0.0, q[j]),)
            windows, q = kept, kept_q
        new, new_q = (), ()
        for k in tl.static_range(COLUMNS):
            total = f[0] * windows[k * M]
            for i in tl.static_range(1, M):
                total += f[i] * windows[k * M + i]
            total *= scale
            new = new + (total,)
            for i in tl.static_range(M - 1):
                new = new + (windows[k * M + i],)
            if REVERSE:
                new_q = new_q + (q[k] + total * x,)
        windows = new
        if not REVERSE:
            total = f[M] * x
            for i in tl.static_range(M):
                total += f[i] * q[i]
            new_q = (total * scale,)
            for i in tl.static_range(M - 1):
                new_q = new_q + (q[i],)
        q = new_q
    to = n_chunks - 1 - c if REVERSE else c
    out_at = out + ((b * n_chunks + to) * (K * N * M) + n * M)
    for k in tl.static_range(COLUMNS):
        column = group * COLUMNS + k
        inside = where_also(valid, column < M)
        if REVERSE:
            tl.store(out_at + M * (N * M) + column, q[k], mask=inside)
        for i in tl.static_range(M):
            spot = i * (N * M) + column if REVERSE else column * (N * M) + i
            tl.store(out_at + spot, windows[k * M + i], mask=inside)
    if not REVERSE:
        for i in tl.static_range(M):
            tl.store(out_at + M * (N * M) + i, q[i], mask=where_also(valid, group == 0))


def _transfer(
    kernel, gates, x, reset, gate, chunk, n_chunks, reverse, columns_axis: int, **strides
) -> Tensor:
    """Launch one of the two; returns (B, C, N, M, M+1) fp32, a view of M+1 planes."""
    B, T, N = x.shape[:3]
    M = gates.shape[-1] - 1
    out = x.new_empty(B, n_chunks, M + 1, N, M, dtype=torch.float32)
    block = triton.next_power_of_2(max(LANES, N)) if INTERPRETED else LANES
    tiles = triton.cdiv(N, block)
    with on_device(x):
        kernel[(tiles * B * n_chunks, columns_axis)](
            gates, x, reset, out, T, chunk, n_chunks, tiles,
            gates.stride(0), gates.stride(2), x.stride(0), x.stride(2),
            reset.stride(0) if reset is not None else 0,
            G_T=gates.stride(1), G_K=gates.stride(-1), X_T=x.stride(1),
            R_T=reset.stride(1) if reset is not None else 0, N=N, M=M, GATE=gate, REVERSE=reverse,
            HAS_RESET=reset is not None, BLOCK=block, num_warps=1, enable_fp_fusion=True, **strides,
        )  # fmt: skip
    return out.permute(0, 1, 3, 4, 2)


def _columns(M: int) -> tuple[int, int]:
    """(columns of P a lane, groups of columns) of an H-LRU: a lane holds columns * M <= 64 values of
    windows."""
    columns = min(M, max(1, 64 // M))
    return columns, triton.cdiv(M, columns)


def block_transfer_cost(M: int, gate: str) -> float:
    """A transfer's instructions over a scan's: about 1.2 at M = 4; above 8, P does not fit a lane's
    registers."""
    if gate == "none" or M > 8:  # unnormalised products can overflow where the states do not
        return float("inf")
    return 1.2 if M <= 4 else 1.7


def channel_transfer_cost(M: int, gate: str) -> float:
    """A transfer's instructions over a scan's: each group of columns normalises the gates again."""
    return float("inf") if gate == "none" else 1 + 1.5 * _columns(M)[1]


def block_transfer(
    gates: Tensor, x: Tensor, reset: Tensor | None, gate: str, chunk: int, n_chunks: int, reverse: bool
) -> Tensor:
    """(B, C, N, M, M+1) fp32, [P | q] of every chunk of a BD-LRU; `reverse`: [P^T | q], last chunk first."""
    strides = {"G_I": gates.stride(3), "X_I": x.stride(3)}
    return _transfer(block_transfer_kernel, gates, x, reset, gate, chunk, n_chunks, reverse, 1, **strides)


def channel_transfer(
    gates: Tensor, x: Tensor, reset: Tensor | None, gate: str, chunk: int, n_chunks: int, reverse: bool
) -> Tensor:
    """The same for an H-LRU, whose state is the window of its last M values."""
    columns, groups = _columns(gates.shape[-1] - 1)
    return _transfer(
        channel_transfer_kernel, gates, x, reset, gate, chunk, n_chunks, reverse, groups, COLUMNS=columns
    )
