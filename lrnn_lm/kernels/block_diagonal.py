"""BD-LRU in Triton: fused forward and analytic backward, gate function inside, no A and no dA in memory.

One lane owns one row i of one block n of one sequence, one warp a program. A lane normalises its row by
itself; the block's state is exchanged between its M lanes by warp shuffles; steps are taken in order, and the
loads of the next STEPS steps are in flight while the present ones are computed. See README.md beside this for
the derivation, the bytes moved, and why time is not cut into chunks unless the batch is small.

Any strides are read; memory (B, T, M+1, N, M), i.e. M+1 planes each laid out like the values, is the fast
one.

Legend: B batch, T time, N blocks, M block size, MP = M rounded up to a power of two, q = a lane's place among
the LANES lanes of its row, TAPS = M / LANES, GROUP = MP * LANES lanes a block; z gate logits, v values, h
state, g = dL/dh from outside, s = dL/dh in all, u = A^T s of the step after. Blocks are [BLOCK].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunk_transfer import block_transfer
from .chunk_transfer import block_transfer_cost as transfer_cost
from .triton_launch import Launch, lanes_per_row, register, steps_in_flight, time_chunks
from .triton_rows import (
    coefficients,
    load_flags,
    load_rows,
    logit_gradient,
    row,
    sum_of_pair,
    sum_over_rows,
    where_also,
    wide,
)


@triton.jit
def _place(
    tiles,
    n_chunks,
    N: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where this program's lanes are: (b, chunk, n, i, q, lane, valid); lanes past the end repeat a last row.

    A group of GROUP lanes is a block: its MP rows, times the lanes a row, q.
    """
    pid = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    place = (pid % tiles) * BLOCK + lane
    n, i, q = place // GROUP, place % MP, place % GROUP // MP
    valid = (n < N) & (i < M)
    outer = pid // tiles
    return (
        wide(outer // n_chunks),
        outer % n_chunks,
        tl.minimum(n, N - 1),
        tl.minimum(i, M - 1),
        q,
        lane,
        valid,
    )


@triton.jit
def _advance(
    h, z, v, started, q, lane,
    TAPS: tl.constexpr, MP: tl.constexpr, GROUP: tl.constexpr, GATE: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """h_t from h_{t-1} of all lanes."""
    PARTNER: tl.constexpr = GROUP - MP
    f, scale = coefficients(z, TAPS + 1, GATE, lane, PARTNER)
    if HAS_RESET:
        h = tl.where(started != 0, 0.0, h)
    even = f[TAPS] * v
    if PARTNER > 0:
        even = tl.where(q == 0, even, 0.0)
    odd = tl.zeros_like(even)  # two sums: half the latency where M is large
    taps_at = lane - lane % GROUP + q * TAPS  # the lane of the row that this lane's first tap multiplies
    for k in tl.static_range(TAPS):
        x = h if GROUP == 1 else tl.gather(h, taps_at + k, 0)
        if k % 2 == 0:
            even += f[k] * x
        else:
            odd += f[k] * x
    return sum_of_pair(even + odd, lane, PARTNER) * scale


@triton.jit(do_not_specialize=["T", "chunk", "n_chunks", "g_b", "v_b", "r_b"])
def forward_kernel(
    gates, values, start, reset, h_out, last, T, chunk, n_chunks, tiles,
    g_b, g_n, g_i, v_b, v_n, v_i, r_b,
    G_T: tl.constexpr, G_K: tl.constexpr, V_T: tl.constexpr, R_T: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr,
    GATE: tl.constexpr, HAS_START: tl.constexpr, HAS_RESET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h of one chunk of time from the state before it.

    gates (B, T, N, M, K), values (B, T, N, M), reset (B, T) of any strides; start (B, n_chunks, N, M) fp32;
    out: h_out (B, T, N, M), last (B, N, M) fp32, both contiguous.
    """
    TAPS: tl.constexpr = M // LANES
    GROUP: tl.constexpr = MP * LANES
    b, c, n, i, q, lane, valid = _place(tiles, n_chunks, N, M, MP, GROUP, BLOCK)
    t = c * chunk
    end = tl.minimum(t + chunk, T)
    spot = n * M + i
    a_at = gates + (b * g_b + wide(n) * g_n + wide(i) * g_i + M * G_K)  # the input gate
    z_at = a_at + wide(q * TAPS - M) * G_K  # this lane's taps
    v_at = values + (b * v_b + wide(n) * v_n + wide(i) * v_i)
    h_at = h_out + b * T * (N * M) + spot
    h = tl.zeros([BLOCK], tl.float32)
    if HAS_START:
        h = tl.load(start + (b * n_chunks + c) * (N * M) + spot)

    full = (end - t) // STEPS * STEPS + t
    t64 = wide(t)
    some = where_also(valid, full > t)
    z_next = load_rows(z_at + t64 * G_T, STEPS, G_T, TAPS, G_K, some)
    a_next = load_rows(a_at + t64 * G_T, STEPS, G_T, 1, 1, some)
    v_next = load_rows(v_at + t64 * V_T, STEPS, V_T, 1, 1, some)
    if HAS_RESET:
        r_next = load_flags(reset + b * r_b + t64 * R_T, STEPS, R_T, full > t)
    for t_group in range(t, full, STEPS):
        z_now, a_now, v_now = z_next, a_next, v_next
        t64 = wide(tl.minimum(t_group + STEPS, full - STEPS))
        z_next = load_rows(z_at + t64 * G_T, STEPS, G_T, TAPS, G_K, None)
        a_next = load_rows(a_at + t64 * G_T, STEPS, G_T, 1, 1, None)
        v_next = load_rows(v_at + t64 * V_T, STEPS, V_T, 1, 1, None)
        if HAS_RESET:
            r_now = r_next
            r_next = load_flags(reset + b * r_b + t64 * R_T, STEPS, R_T, True)
        t64 = wide(t_group)
        for u in tl.static_range(STEPS):
            started = r_now[u] if HAS_RESET else 0
            z = row(z_now, u, TAPS) + row(a_now, u, 1)
            v = v_now[u].to(tl.float32)
            h = _advance(h, z, v, started, q, lane, TAPS, MP, GROUP, GATE, HAS_RESET)
            tl.store(h_at + t64 * (N * M) + u * (N * M), h.to(h_out.dtype.element_ty), mask=valid & (q == 0))
    for t_one in range(full, end):
        t64 = wide(t_one)
        z = load_rows(z_at + t64 * G_T, 1, G_T, TAPS, G_K, None)
        a = load_rows(a_at + t64 * G_T, 1, G_T, 1, 1, None)
        v = tl.load(v_at + t64 * V_T).to(tl.float32)
        started = tl.load(reset + b * r_b + t64 * R_T) if HAS_RESET else 0
        z = row(z, 0, TAPS) + row(a, 0, 1)
        h = _advance(h, z, v, started, q, lane, TAPS, MP, GROUP, GATE, HAS_RESET)
        tl.store(h_at + t64 * (N * M), h.to(h_out.dtype.element_ty), mask=valid & (q == 0))
    if end == T:
        tl.store(last + b * (N * M) + spot, h, mask=valid & (q == 0))


@triton.jit
def _retreat(
    u, z, v, g, h, before, started, dz_at, da_at, dv_at, i, q, lane, valid,
    D_K: tl.constexpr, TAPS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, GROUP: tl.constexpr,
    GATE: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """One step back: stores dz and dv of step t and returns u = A_t^T s_t."""
    f, scale = coefficients(z, TAPS + 1, GATE, lane, GROUP - MP)
    s = g + u
    if M < MP:
        s = tl.where(valid, s, 0.0)  # the padding lanes must not be summed over
    if HAS_RESET:
        before = tl.where(started != 0, 0.0, before)
    scaled = s * scale
    first = lane - lane % GROUP
    owed = ()
    for k in tl.static_range(TAPS):
        x = before if GROUP == 1 else tl.gather(before, first + q * TAPS + k, 0)
        owed = owed + (scaled * f[k],)
        dz = logit_gradient(z[k], f[k], x, h, scaled, GATE)
        tl.store(dz_at + k * D_K, dz.to(dz_at.dtype.element_ty), mask=valid)
    da = logit_gradient(z[TAPS], f[TAPS], v, h, scaled, GATE)
    tl.store(da_at, da.to(da_at.dtype.element_ty), mask=valid & (q == 0))
    tl.store(dv_at, (scaled * f[TAPS]).to(dv_at.dtype.element_ty), mask=valid & (q == 0))
    u = sum_over_rows(owed, lane, TAPS, MP)
    if TAPS < M:  # lane k of half q holds the sum of tap q TAPS + k; row i's is wanted in both halves
        u = tl.gather(u, first + i // TAPS * MP + i % TAPS, 0)
    if HAS_RESET:
        u = tl.where(started != 0, 0.0, u)
    return u


@triton.jit(do_not_specialize=["T", "chunk", "n_chunks", "g_b", "v_b", "r_b", "o_b", "d_b"])
def backward_kernel(
    gates, values, h_in, grad, start, stop, reset, d_gates, d_values, d_start, T, chunk, n_chunks, tiles,
    g_b, g_n, g_i, v_b, v_n, v_i, o_b, o_n, o_i, d_b, d_n, d_i, r_b,
    G_T: tl.constexpr, G_K: tl.constexpr, V_T: tl.constexpr, O_T: tl.constexpr,
    D_T: tl.constexpr, D_K: tl.constexpr, R_T: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr,
    GATE: tl.constexpr, HAS_START: tl.constexpr, HAS_RESET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dz, dv of one chunk of time, and u before it, from h and from u after it; all lanes walk back in time.

    gates, values, reset as in the forward pass, grad (B, T, N, M) of any strides (o_), h_in (B, T, N, M)
    contiguous, start (B, N, M) fp32 = h0, stop (B, n_chunks, N, M) fp32 = u after each chunk; out: d_gates
    (B, T, N, M, K) of any strides (d_), d_values (B, T, N, M) contiguous, d_start (B, N, M) fp32 = dL/dh0.
    """
    TAPS: tl.constexpr = M // LANES
    GROUP: tl.constexpr = MP * LANES
    NM: tl.constexpr = N * M
    b, c, n, i, q, lane, valid = _place(tiles, n_chunks, N, M, MP, GROUP, BLOCK)
    begin = c * chunk
    end = tl.minimum(begin + chunk, T)
    spot = n * M + i
    n64, i64 = wide(n), wide(i)
    a_at = gates + (b * g_b + n64 * g_n + i64 * g_i + M * G_K)
    z_at = a_at + wide(q * TAPS - M) * G_K
    v_at = values + (b * v_b + n64 * v_n + i64 * v_i)
    o_at = grad + (b * o_b + n64 * o_n + i64 * o_i)
    da_at = d_gates + (b * d_b + n64 * d_n + i64 * d_i + M * D_K)
    dz_at = da_at + wide(q * TAPS - M) * D_K
    h_at, dv_at = h_in + (b * T * NM + spot), d_values + (b * T * NM + spot)
    u = tl.load(stop + (b * n_chunks + c) * NM + spot)
    h = tl.load(h_at + wide(end - 1) * NM).to(tl.float32)
    h_start = tl.load(start + b * NM + spot) if HAS_START else tl.zeros([BLOCK], tl.float32)

    groups = (end - begin) // STEPS
    t64 = wide(end - STEPS)
    some = where_also(valid, groups > 0)
    z_next = load_rows(z_at + t64 * G_T, STEPS, G_T, TAPS, G_K, some)
    a_next = load_rows(a_at + t64 * G_T, STEPS, G_T, 1, 1, some)
    v_next = load_rows(v_at + t64 * V_T, STEPS, V_T, 1, 1, some)
    o_next = load_rows(o_at + t64 * O_T, STEPS, O_T, 1, 1, some)
    # h_{t-1} for each step; before t = 0 it is h0, patched in below
    h_next = load_rows(h_at + tl.maximum(t64 - 1, 0) * NM, 1, NM, 1, 1, some)
    h_next = h_next + load_rows(h_at + t64 * NM, STEPS - 1, NM, 1, 1, some)
    if HAS_RESET:
        r_next = load_flags(reset + b * r_b + t64 * R_T, STEPS, R_T, groups > 0)
    for group in range(groups):
        z_now, a_now, v_now, o_now, h_now = z_next, a_next, v_next, o_next, h_next
        t = end - (group + 1) * STEPS
        t64 = wide(tl.maximum(t - STEPS, end - groups * STEPS))
        z_next = load_rows(z_at + t64 * G_T, STEPS, G_T, TAPS, G_K, None)
        a_next = load_rows(a_at + t64 * G_T, STEPS, G_T, 1, 1, None)
        v_next = load_rows(v_at + t64 * V_T, STEPS, V_T, 1, 1, None)
        o_next = load_rows(o_at + t64 * O_T, STEPS, O_T, 1, 1, None)
        h_next = load_rows(h_at + tl.maximum(t64 - 1, 0) * NM, 1, NM, 1, 1, None)
        h_next = h_next + load_rows(h_at + t64 * NM, STEPS - 1, NM, 1, 1, None)
        if HAS_RESET:
            r_now = r_next
            r_next = load_flags(reset + b * r_b + t64 * R_T, STEPS, R_T, True)
        t64 = wide(t)
        for j in tl.static_range(STEPS - 1, -1, -1):
            before = h_now[j].to(tl.float32)
            if j == 0:
                before = tl.where(t == 0, h_start, before)
            started = r_now[j] if HAS_RESET else 0
            u = _retreat(
                u, row(z_now, j, TAPS) + row(a_now, j, 1), v_now[j].to(tl.float32), o_now[j].to(tl.float32),
                h, before, started, dz_at + t64 * D_T + j * D_T, da_at + t64 * D_T + j * D_T,
                dv_at + t64 * NM + j * NM, i, q, lane, valid, D_K, TAPS, M, MP, GROUP, GATE, HAS_RESET,
            )  # fmt: skip
            h = before
    for back in range((end - begin) % STEPS):
        t = begin + (end - begin) % STEPS - 1 - back
        t64 = wide(t)
        z = load_rows(z_at + t64 * G_T, 1, G_T, TAPS, G_K, None)
        a = load_rows(a_at + t64 * G_T, 1, G_T, 1, 1, None)
        v = tl.load(v_at + t64 * V_T).to(tl.float32)
        g = tl.load(o_at + t64 * O_T).to(tl.float32)
        before = tl.load(h_at + tl.maximum(t64 - 1, 0) * NM).to(tl.float32)
        before = tl.where(t == 0, h_start, before)
        started = tl.load(reset + b * r_b + t64 * R_T) if HAS_RESET else 0
        u = _retreat(
            u, row(z, 0, TAPS) + row(a, 0, 1), v, g, h, before, started,
            dz_at + t64 * D_T, da_at + t64 * D_T, dv_at + t64 * NM, i, q, lane, valid,
            D_K, TAPS, M, MP, GROUP, GATE, HAS_RESET,
        )  # fmt: skip
        h = before
    tl.store(d_start + b * NM + spot, u, mask=where_also(valid & (q == 0), begin == 0))


def _forward(
    gates: Tensor, values: Tensor, h0: Tensor | None, reset: Tensor | None, gate: str
) -> tuple[Tensor, Tensor]:
    B, T, N, M = values.shape
    h, last = values.new_empty(values.shape), values.new_empty(B, N, M, dtype=torch.float32)
    chunk, n_chunks = time_chunks(B * N, M, transfer_cost(M, gate), T, values.device)
    if n_chunks > 1:
        transfer = block_transfer(gates, values, reset, gate, chunk, n_chunks, reverse=False)
        h0 = chunk_starts(transfer, h0)
    _launch_forward(gates, values, h0, reset, gate, h, last, chunk, n_chunks)
    return h, last


def _launch_forward(gates, values, start, reset, gate, h, last, chunk, n_chunks) -> None:
    B, T, N, M = values.shape
    padded, lanes = triton.next_power_of_2(M), lanes_per_row(M)
    launch = Launch(values, N * padded * lanes, steps_in_flight(M // lanes, T, backward=False))
    with launch.device:
        forward_kernel[launch.grid(B * n_chunks)](
            gates, values, start, reset, h, last, T, chunk, n_chunks, launch.tiles,
            gates.stride(0), gates.stride(2), gates.stride(3),
            values.stride(0), values.stride(2), values.stride(3),
            reset.stride(0) if reset is not None else 0,
            G_T=gates.stride(1), G_K=gates.stride(4), V_T=values.stride(1),
            R_T=reset.stride(1) if reset is not None else 0,
            N=N, M=M, MP=padded, LANES=lanes, GATE=gate,
            HAS_START=start is not None, HAS_RESET=reset is not None, **launch.options,
        )  # fmt: skip


def chunk_starts(transfer: Tensor, initial: Tensor | None) -> Tensor:
    """The state before each chunk, (B, C, N, M) fp32: a scan over the chunks, by the same kernel,
    unnormalised.

    transfer (B, C, N, M, M+1) fp32: a chunk takes the state x to transfer[..., :M] x + transfer[..., M].
    """
    B, C, N, M, _ = transfer.shape
    after, last = transfer.new_empty(B, C, N, M), transfer.new_empty(B, N, M)
    ones = transfer.new_ones(()).expand(B, C, N, M)
    _launch_forward(transfer, ones, initial, None, "none", after, last, C, 1)
    first = transfer.new_zeros(B, 1, N, M) if initial is None else initial.unsqueeze(1)
    return torch.cat([first, after[:, :-1]], dim=1)


def _backward(
    grad: Tensor, grad_last: Tensor, gates: Tensor, values: Tensor, h0: Tensor | None, h: Tensor,
    reset: Tensor | None, gate: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, T, N, M = values.shape
    d_gates, d_values = torch.empty_like(gates), values.new_empty(values.shape)
    d_start = values.new_empty(B, N, M, dtype=torch.float32)
    stop = grad_last.contiguous()
    chunk, n_chunks = time_chunks(B * N, M, transfer_cost(M, gate), T, values.device)
    if n_chunks > 1:
        transfer = block_transfer(gates, grad, reset, gate, chunk, n_chunks, reverse=True)
        stop = chunk_starts(transfer, stop).flip(1).contiguous()
    padded, lanes = triton.next_power_of_2(M), lanes_per_row(M)
    launch = Launch(values, N * padded * lanes, steps_in_flight(M // lanes, T, backward=True))
    with launch.device:
        backward_kernel[launch.grid(B * n_chunks)](
            gates, values, h, grad, h0, stop, reset, d_gates, d_values, d_start,
            T, chunk, n_chunks, launch.tiles,
            gates.stride(0), gates.stride(2), gates.stride(3),
            values.stride(0), values.stride(2), values.stride(3),
            grad.stride(0), grad.stride(2), grad.stride(3),
            d_gates.stride(0), d_gates.stride(2), d_gates.stride(3),
            reset.stride(0) if reset is not None else 0,
            G_T=gates.stride(1), G_K=gates.stride(4), V_T=values.stride(1), O_T=grad.stride(1),
            D_T=d_gates.stride(1), D_K=d_gates.stride(4), R_T=reset.stride(1) if reset is not None else 0,
            N=N, M=M, MP=padded, LANES=lanes, GATE=gate,
            HAS_START=h0 is not None, HAS_RESET=reset is not None, **launch.options,
        )  # fmt: skip
    return d_gates, d_values, d_start


block_diagonal_scan = register("bd_scan_triton", _forward, _backward)
