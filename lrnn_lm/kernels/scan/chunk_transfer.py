"""What a chunk of time does to the state (Triton), for scans whose batch is too small to fill a device.

A chunk is an affine map of the state before it, x -> P x + q, so chunks can be computed side by side and
joined afterwards. A lane owns one block (or one channel and some columns of P) of one chunk and keeps P in
registers; blocks above 8 have a warp each. Going back in time the same P appears transposed:

    forward    P = A_t .. A_begin,   q = h at the end of the chunk from a zero state
    backward   P^T,                  q = sum_t (A_t .. A_begin)^T g_t

Legend: B batch, T time, N blocks or channels, M block size or order, C chunks, K = M + 1, MP = M rounded up
to a power of two; z gate logits, g = dL/dh. Lane blocks are [WIDTH], one block or channel a lane; tiles are
[STEPS, WIDTH * MP].
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_device import (
    INTERPRETED,
    LANES,
    LOG2E,
    cdiv,
    multiprocessors,
    next_power_of_2,
    on_device,
    settle_cache_keys,
)
from .triton_gates import EPS, FIXED, gate_value
from .triton_launch import (
    PLANS,
    Layout,
    batch_alignment,
    groups_in_flight,
    in_order,
    reset_flags,
    stride_arguments,
)
from .triton_rows import (
    as_int64,
    gate_rows,
    offsets_of,
    place_of_rows,
    renewed,
    step_flags,
    tile_of,
    unstack,
    zero_at_reset,
)


@triton.jit
def _block_group(
    pq, z_at, a_at, x_at, flags_at, t, valid, lane,
    G_T: tl.constexpr, G_K: tl.constexpr, X_T: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
    STEPS: tl.constexpr, WIDTH: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr,
    HAS_RESET: tl.constexpr,
):  # fmt: skip
    """P, flat [i M + k], followed by q, [i], STEPS steps on: M M + M lane blocks."""
    # MP rows a lane: the whole block is in one lane, and nothing is exchanged.
    _, f, scale = gate_rows(z_at, a_at, t, valid, lane, G_T, G_K, M, STEPS, WIDTH, MP, GATE, 1)
    x = unstack(tl.load(x_at + t * X_T, mask=valid, other=0.0), STEPS, WIDTH, MP)
    if HAS_RESET:
        flags = step_flags(flags_at, t, STEPS, WIDTH)
    for s in tl.static_range(STEPS):
        if HAS_RESET:  # a start cuts the chunk's map; REVERSE keeps q, a sum over the steps before it too
            before = zero_at_reset(pq, flags[s], M * M if REVERSE else M * M + M)
            pq = before + pq[M * M :] if REVERSE else before
        new_p, new_q = (), ()
        for i in tl.static_range(M):  # P = A_t P, M^3 multiply-adds
            for k in tl.static_range(M):
                total = f[s * MP + i] * pq[k]
                for j in tl.static_range(1, M):
                    total += f[(j * STEPS + s) * MP + i] * pq[j * M + k]
                new_p = new_p + (total * scale[s * MP + i],)
        for i in tl.static_range(M):
            if REVERSE:  # q += P^T g_t
                total = pq[M * M + i]
                for j in tl.static_range(M):
                    total += new_p[j * M + i] * x[s * MP + j]
                new_q = new_q + (total,)
            else:  # q = A_t q + a0_t v_t
                total = f[(M * STEPS + s) * MP + i] * x[s * MP + i]
                for j in tl.static_range(M):
                    total += f[(j * STEPS + s) * MP + i] * pq[M * M + j]
                new_q = new_q + (total * scale[s * MP + i],)
        pq = new_p + new_q
    return pq


@triton.jit(do_not_specialize=["T", "chunk", "n_chunks", "g_b", "x_b"])
def block_transfer_kernel(
    gates, x_in, flags, out, T, chunk, n_chunks, tiles, g_b, x_b,
    G_T: tl.constexpr, G_N: tl.constexpr, G_I: tl.constexpr, G_K: tl.constexpr,
    X_T: tl.constexpr, X_N: tl.constexpr, X_I: tl.constexpr, ALIGN: tl.constexpr, N: tl.constexpr,
    M: tl.constexpr, MP: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, WIDTH: tl.constexpr,
    GATE: tl.constexpr, REVERSE: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """BD-LRU: P and q of one chunk. x_in (B, T, N, M) is v, or g if REVERSE; out (B, C, K, N, M) fp32.

    REVERSE writes the chunks last first and P transposed: what a scan over `out` in order needs.
    """
    b, c, n, i, _, spot, valid = place_of_rows(tiles, n_chunks, N, M, MP, 1, WIDTH, MP)
    lane, valid = tl.arange(0, WIDTH), valid[None, :]
    begin = c * chunk
    end = tl.minimum(begin + chunk, T)
    # [WIDTH * MP] pointers; the alignment of the batch's offset lets loads be wide and prefetched.
    z_at = gates + tl.multiple_of(b * g_b, ALIGN) + offsets_of(n, i, spot, G_N, G_I, M)
    a_at = z_at + M * G_K
    x_at = x_in + tl.multiple_of(b * x_b, ALIGN) + offsets_of(n, i, spot, X_N, X_I, M)
    flags_at = flags + b * T if HAS_RESET else flags
    pq = ()  # the identity, and q = 0
    for j in tl.static_range(M * M + M):
        pq = pq + (tl.full([WIDTH], 1.0 if j < M * M and j % (M + 1) == 0 else 0.0, tl.float32),)
    full = (end - begin) // STEPS * STEPS + begin
    z_many, a_many, x_many = tile_of(z_at, G_T, STEPS), tile_of(a_at, G_T, STEPS), tile_of(x_at, X_T, STEPS)
    for t in tl.range(begin, full, STEPS, num_stages=STAGES):  # loads of later groups are in flight
        pq = _block_group(
            pq, z_many, a_many, x_many, flags_at, as_int64(t), valid, lane,
            G_T, G_K, X_T, M, MP, STEPS, WIDTH, GATE, REVERSE, HAS_RESET,
        )  # fmt: skip
    for t in range(full, end):  # the steps after the last whole group, one at a time
        pq = _block_group(
            pq, z_at[None, :], a_at[None, :], x_at[None, :], flags_at, as_int64(t), valid, lane,
            G_T, G_K, X_T, M, MP, 1, WIDTH, GATE, REVERSE, HAS_RESET,
        )  # fmt: skip
    block = (tl.program_id(0) % tiles) * WIDTH + lane
    # Planes (K, N, M), as the scan over chunks reads them like any projection's gates.
    to = n_chunks - 1 - c if REVERSE else c
    out_at = out + ((b * n_chunks + to) * ((M + 1) * N * M) + block * M)
    for i in tl.static_range(M):
        tl.store(out_at + M * (N * M) + i, pq[M * M + i], mask=block < N)
        for k in tl.static_range(M):
            at = i * (N * M) + k if REVERSE else k * (N * M) + i
            tl.store(out_at + at, pq[i * M + k], mask=block < N)


@triton.jit
def _normalised(z, a, inside, GATE: tl.constexpr):
    """Gates z [MP, MP], a row each, and input gates a [MP], normalised; `inside` [MP, MP]: real entries."""
    if GATE == "none":
        f, f_in, total = z, a, tl.full(a.shape, 1.0, tl.float32)
    elif GATE == "softmax" or GATE == FIXED:
        # The largest logit is subtracted before exp, which overflows fp32 at 89.
        z = tl.where(inside, z, float("-inf"))
        top = tl.maximum(tl.max(z, axis=1), a)
        f, f_in = tl.exp2((z - top[:, None]) * LOG2E), tl.exp2((a - top) * LOG2E)
        total = tl.sum(f, axis=1) + f_in
    else:
        f, f_in = tl.where(inside, gate_value(z, GATE), 0.0), gate_value(a, GATE)
        total = tl.sum(tl.abs(f), axis=1) + tl.abs(f_in) + EPS
    return f / total[:, None], f_in / total


@triton.jit(do_not_specialize=["T", "chunk", "n_chunks", "g_b", "x_b"])
def wide_block_transfer_kernel(
    gates, x_in, flags, out, T, chunk, n_chunks, g_b, x_b,
    G_T: tl.constexpr, G_N: tl.constexpr, G_I: tl.constexpr, G_K: tl.constexpr,
    X_T: tl.constexpr, X_N: tl.constexpr, X_I: tl.constexpr, ALIGN: tl.constexpr, N: tl.constexpr,
    M: tl.constexpr, MP: tl.constexpr, STAGES: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr,
    HAS_RESET: tl.constexpr,
):  # fmt: skip
    """`block_transfer_kernel` for M above 8: a warp a block, P [MP, MP], one product of matrices a step."""
    # M^2 values of P above 64 do not fit in one lane's registers.
    pid = tl.program_id(0)
    n = pid % N
    b, c = as_int64(pid // N // n_chunks), pid // N % n_chunks
    begin = c * chunk
    end = tl.minimum(begin + chunk, T)
    i, k = tl.arange(0, MP), tl.arange(0, MP)  # tl.dot takes 16 x 16 at least: MP is 16 for M above 8
    row, inside = i < M, (i < M)[:, None] & (k < M)[None, :]
    a_at = gates + tl.multiple_of(b * g_b, ALIGN) + n * G_N + i * G_I + M * G_K
    z_at = a_at[:, None] + (k - M)[None, :] * G_K
    x_at = x_in + tl.multiple_of(b * x_b, ALIGN) + n * X_N + i * X_I
    p = tl.where(i[:, None] == k[None, :], 1.0, 0.0)  # [MP, MP]
    q = tl.zeros([MP], tl.float32)
    for step in tl.range(begin, end, num_stages=STAGES):
        t = as_int64(step)
        z = tl.load(z_at + t * G_T, mask=inside, other=0.0).to(tl.float32)
        if GATE == FIXED:
            a = tl.zeros([MP], tl.float32)
        else:
            a = tl.load(a_at + t * G_T, mask=row, other=0.0).to(tl.float32)
        x = tl.load(x_at + t * X_T, mask=row, other=0.0).to(tl.float32)
        f, f_in = _normalised(z, a, inside, GATE)  # [MP, MP], [MP]
        if HAS_RESET:  # a select, not a product with zero: the state of the document before may be NaN
            starts = tl.load(flags + b * T + t) != 0
            p = tl.where(starts, 0.0, p)
            q = q if REVERSE else tl.where(starts, 0.0, q)
        p = tl.dot(f, p, input_precision="ieee")  # fp32: tf32 would lose 13 bits at every step
        if REVERSE:
            q += tl.sum(p * x[:, None], axis=0)
        else:
            q = tl.sum(f * q[None, :], axis=1) + f_in * x
    to = n_chunks - 1 - c if REVERSE else c
    out_at = out + ((b * n_chunks + to) * ((M + 1) * N * M) + n * M)
    at = i[:, None] * (N * M) + k[None, :] if REVERSE else k[None, :] * (N * M) + i[:, None]
    tl.store(out_at + at, p, mask=inside)
    tl.store(out_at + M * (N * M) + i, q, mask=row)


@triton.jit
def _channel_group(
    windows, q, z_at, a_at, x_at, flags_at, t, valid, lane,
    G_T: tl.constexpr, G_K: tl.constexpr, X_T: tl.constexpr, M: tl.constexpr, STEPS: tl.constexpr,
    WIDTH: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr, HAS_RESET: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The windows, flat [column M + i], and q, STEPS steps on: lane blocks, one channel a lane."""
    _, f, scale = gate_rows(z_at, a_at, t, valid, lane, G_T, G_K, M, STEPS, WIDTH, 1, GATE, 1)
    x = unstack(tl.load(x_at + t * X_T, mask=valid, other=0.0), STEPS, WIDTH, 1)
    if HAS_RESET:
        flags = step_flags(flags_at, t, STEPS, WIDTH)
    for s in tl.static_range(STEPS):
        if HAS_RESET:  # a start drops every tap, so that nothing older comes back at a later step
            windows = zero_at_reset(windows, flags[s], COLUMNS * M)
            if not REVERSE:
                q = zero_at_reset(q, flags[s], M)
        new, new_q = (), ()
        for k in tl.static_range(COLUMNS):  # each column is a scan of its own, without input
            total = f[s] * windows[k * M]
            for i in tl.static_range(1, M):
                total += f[i * STEPS + s] * windows[k * M + i]
            total *= scale[s]
            new = new + (total,) + windows[k * M : (k + 1) * M - 1]  # shifts by renaming registers
            if REVERSE:
                new_q = new_q + (q[k] + total * x[s],)
        if not REVERSE:  # q is one more window, with the input
            total = f[M * STEPS + s] * x[s]
            for i in tl.static_range(M):
                total += f[i * STEPS + s] * q[i]
            new_q = (total * scale[s],) + q[: M - 1]
        windows, q = new, new_q
    windows = renewed(windows, M, STEPS, COLUMNS)
    if not REVERSE:
        q = renewed(q, M, STEPS, 1)
    return windows, q


@triton.jit(do_not_specialize=["T", "chunk", "n_chunks", "g_b", "x_b"])
def channel_transfer_kernel(
    gates, x_in, flags, out, T, chunk, n_chunks, tiles, g_b, x_b,
    G_T: tl.constexpr, G_N: tl.constexpr, G_K: tl.constexpr, X_T: tl.constexpr, X_N: tl.constexpr,
    ALIGN: tl.constexpr, N: tl.constexpr, M: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
    WIDTH: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr, HAS_RESET: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """H-LRU: COLUMNS columns of P, and q, of one chunk, by as many scans from unit windows.

    x_in (B, T, N) is v, or g if REVERSE; out (B, C, K, N, M) fp32 as in `block_transfer_kernel`. The state is
    the window of the last M values, newest first. q is one more scan forward, and sum_t g_t h_t of each
    column backward. Program axis 1 runs over groups of columns.
    """
    b, c, n, _, _, _, inside = place_of_rows(tiles, n_chunks, N, 1, 1, 1, WIDTH, 1)
    lane, group, valid = tl.arange(0, WIDTH), tl.program_id(1), inside[None, :]
    begin = c * chunk
    end = tl.minimum(begin + chunk, T)
    z_at = gates + tl.multiple_of(b * g_b, ALIGN) + n * G_N
    a_at = z_at + M * G_K
    x_at = x_in + tl.multiple_of(b * x_b, ALIGN) + n * X_N
    flags_at = flags + b * T if HAS_RESET else flags
    windows, q = (), ()  # windows[k * M + i]: column k's value i steps ago
    zero = tl.zeros([WIDTH], tl.float32)
    for k in tl.static_range(COLUMNS):
        for i in tl.static_range(M):
            windows = windows + (tl.where(group * COLUMNS + k == i, 1.0, zero),)
    for _ in tl.static_range(COLUMNS if REVERSE else M):
        q = q + (zero,)
    full = (end - begin) // STEPS * STEPS + begin
    z_many, a_many, x_many = tile_of(z_at, G_T, STEPS), tile_of(a_at, G_T, STEPS), tile_of(x_at, X_T, STEPS)
    for t in tl.range(begin, full, STEPS, num_stages=STAGES):
        windows, q = _channel_group(
            windows, q, z_many, a_many, x_many, flags_at, as_int64(t), valid, lane,
            G_T, G_K, X_T, M, STEPS, WIDTH, GATE, REVERSE, HAS_RESET, COLUMNS,
        )  # fmt: skip
    for t in range(full, end):  # the steps after the last whole group, one at a time
        windows, q = _channel_group(
            windows, q, z_at[None, :], a_at[None, :], x_at[None, :], flags_at, as_int64(t), valid, lane,
            G_T, G_K, X_T, M, 1, WIDTH, GATE, REVERSE, HAS_RESET, COLUMNS,
        )  # fmt: skip
    to = n_chunks - 1 - c if REVERSE else c
    out_at = out + ((b * n_chunks + to) * ((M + 1) * N * M) + n * M)
    for k in tl.static_range(COLUMNS):
        column = group * COLUMNS + k
        own = inside & (lane * 0 + column < M)  # [WIDTH]; the last group of columns may be short
        if REVERSE:
            tl.store(out_at + M * (N * M) + column, q[k], mask=own)
        for i in tl.static_range(M):
            at = i * (N * M) + column if REVERSE else column * (N * M) + i
            tl.store(out_at + at, windows[k * M + i], mask=own)
    if not REVERSE:  # every group of columns has computed the same q; the first one stores it
        for i in tl.static_range(M):
            tl.store(out_at + M * (N * M) + i, q[i], mask=inside & (lane * 0 + group == 0))


def _columns(M: int) -> tuple[int, int]:
    """(columns of P a lane, groups of columns) of an H-LRU."""
    # 64 values of windows a lane, so that they stay in registers beside q and the gates.
    columns = min(M, max(1, 64 // M))
    return columns, cdiv(M, columns)


def block_transfer_cost(M: int, gate: str) -> float:
    """A transfer's instructions over a scan's: about 1.2 at M = 4; above 8, products of matrices."""
    if gate == "none":  # never cut time: products of unnormalised A can overflow where the states do not
        return float("inf")
    return 1.2 if M <= 4 else 1.7 if M <= 8 else 8.0


def channel_transfer_cost(M: int, gate: str) -> float:
    """A transfer's instructions over a scan's: each group of columns normalises the gates again."""
    return float("inf") if gate == "none" else 1 + 1.5 * _columns(M)[1]


@lru_cache(maxsize=PLANS)
def plan_transfer(
    gates: Layout, x: Layout, n_chunks: int, **given: Any
) -> tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    """The kernel, its grid, the arguments behind the tensors, and options; `given`: by their names there."""
    (B, T, N), of_blocks = x.shape[:3], len(x.shape) == 4
    M, rows, groups = x.shape[3] if of_blocks else gates.shape[-1] - 1, 1, 1
    found = given | {
        "T": T, "n_chunks": n_chunks, "N": N, "M": M, "ALIGN": batch_alignment(gates, x),
        **stride_arguments(of_blocks, G=gates, X=x), "G_K": gates.strides[-1], "num_warps": 1,
        "enable_fp_fusion": True,
    }  # fmt: skip
    if of_blocks:
        rows = found["MP"] = next_power_of_2(M)
    else:
        found["COLUMNS"], groups = _columns(M)
    if rows > 8:
        found["STAGES"] = 4
        return wide_block_transfer_kernel, (N * B * n_chunks,), *in_order(wide_block_transfer_kernel, found)
    # The interpreter runs one program after another, so give it few and wide ones.
    width = next_power_of_2(max(LANES, N)) if INTERPRETED else LANES
    tiles = cdiv(N, width)
    steps = max(1, 8 // max(rows, cdiv(M, 4)))  # as many as keep the gates in registers
    warps = tiles * B * n_chunks * groups / multiprocessors(x.device)
    stages = groups_in_flight(warps * LANES * rows * steps * (M + 2) * x.itemsize, backward=False)
    found |= {"tiles": tiles, "STEPS": steps, "STAGES": stages, "WIDTH": width}
    kernel = block_transfer_kernel if of_blocks else channel_transfer_kernel
    return kernel, (tiles * B * n_chunks, groups), *in_order(kernel, found)


def transfer(
    gates: Tensor, x: Tensor, reset: Tensor | None, gate: str, chunk: int, n_chunks: int, reverse: bool
) -> Tensor:
    """[P | q] of every chunk, (B, C, N, M, M+1) fp32, a view of M+1 planes; `reverse`: [P^T | q], last chunk
    first. The state of an H-LRU is the window of its last M values."""
    kernel, grid, planned, options = plan_transfer(
        Layout.of(gates), Layout.of(x), n_chunks, chunk=chunk, GATE=gate, REVERSE=reverse,
        HAS_RESET=reset is not None,
    )  # fmt: skip
    B, N, M = x.shape[0], x.shape[2], x.shape[3] if x.ndim == 4 else gates.shape[-1] - 1
    out = x.new_empty(B, n_chunks, M + 1, N, M, dtype=torch.float32)
    with on_device(x):
        kernel[grid](gates, x, reset_flags(reset), out, *planned, **options)
    return out.permute(0, 1, 3, 4, 2)


settle_cache_keys(globals())
