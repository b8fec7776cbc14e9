"""BD-LRU in Triton: fused forward and analytic backward, gate function inside, no A and no dA in memory.

One lane owns P rows of one block (or of P blocks, for M = 1) of one sequence, one warp a program. Steps go in
groups: tiles [STEPS, rows] of gates and values arrive in shared memory some groups ahead, by asynchronous
copies of 16 bytes; a lane takes its rows out, normalises them without speaking to anyone, and walks through
the steps, where the block's state is exchanged by warp shuffles. See README.md beside this for the
derivation, the bytes moved, and when time is cut into chunks.

Any strides are read; memory (B, T, M+1, N, M), i.e. M+1 planes each laid out like the values, is the fast
one.

Legend: B batch, T time, N blocks, M block size, MP = M rounded up to a power of two, P rows a lane, q = a
lane's place among the SHARE lanes of its row, TAPS = M / SHARE, WIDTH lanes a program, GROUP = MP * SHARE
positions a block; z gate logits, v values, h state, g = dL/dh from outside, s = dL/dh in all, u = A^T s of
the step after. Lane blocks are [WIDTH], row blocks [WIDTH * P], tiles [STEPS, WIDTH * P]; what is kept a
step, a row or a gate is a flat tuple of lane blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunk_transfer import block_transfer
from .chunk_transfer import block_transfer_cost as transfer_cost
from .triton_launch import Launch, lanes_per_row, time_chunks
from .triton_ops import register, register_packed, rows_like
from .triton_rows import (
    gate_rows,
    stack,
    step_flags,
    store_gradients,
    sum_of_pair,
    sum_over_rows,
    tile_of,
    unstack,
    wide,
)


@triton.jit
def _place(
    tiles, n_chunks, N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, SHARE: tl.constexpr,
    WIDTH: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Where this program's rows are: (b, chunk, place, n, i, q, spot, valid), the last six [WIDTH * P].

    spot = n M + i. Rows past the end are not valid; their indices stay inside the tensors.
    """
    pid = tl.program_id(0)
    place = (pid % tiles) * (WIDTH * P) + tl.arange(0, WIDTH * P)
    outer = pid // tiles
    b, chunk = wide(outer // n_chunks), outer % n_chunks
    if MP * SHARE == M:  # rows lie one after the other: their loads are wide
        n, i, q, spot, valid = place // M, place % M, place * 0, place, place < N * M
    else:
        n, i, q = place // (MP * SHARE), place % MP, place % (MP * SHARE) // MP
        spot, valid = n * M + i, (n < N) & (i < M)
    return b, chunk, place, n, i, q, spot, valid


@triton.jit
def _offsets(n, i, spot, S_N: tl.constexpr, S_I: tl.constexpr, M: tl.constexpr):
    """Of rows in a tensor with these strides; in the unbroken order that the compiler can see to be so."""
    return spot * S_I if S_N == S_I * M else n * S_N + i * S_I


@triton.jit
def _cleared(x, flag, P: tl.constexpr):
    """P lane blocks, zero where a document starts."""
    kept = ()
    for p in tl.static_range(P):
        kept = kept + (tl.where(flag != 0, 0.0, x[p]),)
    return kept


@triton.jit
def _of_block(h, k: tl.constexpr, p: tl.constexpr, first, M: tl.constexpr, P: tl.constexpr):
    """What tap k of a lane's row p multiplies; h is the state, P lane blocks."""
    if M == 1:
        return h[p]
    elif M == P:
        return h[k]
    else:
        return tl.gather(h[k % P], first + k // P, 0)


@triton.jit
def _forward_group(
    h, z_at, a_at, v_at, flags_at, h_at, t, valid, writes, q, lane,
    G_T: tl.constexpr, G_K: tl.constexpr, V_T: tl.constexpr, H_T: tl.constexpr, M: tl.constexpr,
    MP: tl.constexpr, SHARE: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr,
    GATE: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """Stores h of STEPS steps from t and returns the state after them."""
    TAPS: tl.constexpr = M // SHARE
    PARTNER: tl.constexpr = MP * SHARE - MP
    _, f, scale = gate_rows(z_at, a_at, t, valid, lane, G_T, G_K, TAPS, STEPS, WIDTH, P, GATE, PARTNER)
    v = unstack(tl.load(v_at + t * V_T, mask=valid, other=0.0), STEPS, WIDTH, P)
    if HAS_RESET:
        flags = step_flags(flags_at, t, STEPS, WIDTH)
    first = lane - lane % (MP * SHARE // P if M > 1 else 1)  # of the block's lanes
    if SHARE > 1:
        first += q * TAPS
    entering = ()
    for e in tl.static_range(STEPS * P):
        a0v = f[TAPS * STEPS * P + e] * v[e]
        entering = entering + (tl.where(q == 0, a0v, 0.0) if SHARE > 1 else a0v,)
    states = ()
    for s in tl.static_range(STEPS):
        if HAS_RESET:
            h = _cleared(h, flags[s], P)
        after = ()
        for p in tl.static_range(P):
            even = entering[s * P + p]
            odd = tl.zeros_like(even)  # two sums: half the latency where M is large
            for k in tl.static_range(TAPS):
                x = _of_block(h, k, p, first, M, P)
                if k % 2 == 0:
                    even += f[(k * STEPS + s) * P + p] * x
                else:
                    odd += f[(k * STEPS + s) * P + p] * x
            after = after + (sum_of_pair(even + odd, lane, PARTNER) * scale[s * P + p],)
        h = after
        states = states + h
    tl.store(h_at + t * H_T, stack(states, h_at.dtype.element_ty, STEPS, WIDTH, P), mask=writes)
    return h


@triton.jit(do_not_specialize=["T", "chunk", "n_chunks", "g_b", "v_b"])
def forward_kernel(
    gates, values, start, flags, h_out, last, T, chunk, n_chunks, tiles, g_b, v_b,
    G_T: tl.constexpr, G_N: tl.constexpr, G_I: tl.constexpr, G_K: tl.constexpr,
    V_T: tl.constexpr, V_N: tl.constexpr, V_I: tl.constexpr, H_T: tl.constexpr, ALIGN: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, SHARE: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, GATE: tl.constexpr,
    HAS_START: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """h of one chunk of time from the state before it.

    gates (B, T, N, M, K), values (B, T, N, M) of any strides; flags (B, T) int32, nonzero where a document
    starts; start (B, n_chunks, N, M) fp32; out: h_out (B, T, N, M), a step H_T apart and else contiguous,
    last (B, N, M) fp32, contiguous.
    """
    NM: tl.constexpr = N * M
    b, c, _, n, i, q, spot, valid = _place(tiles, n_chunks, N, M, MP, SHARE, WIDTH, P)
    lane = tl.arange(0, WIDTH)
    t = c * chunk
    end = tl.minimum(t + chunk, T)
    a_at = gates + tl.multiple_of(b * g_b, ALIGN) + (_offsets(n, i, spot, G_N, G_I, M) + M * G_K)
    z_at = a_at + (q * (M // SHARE) - M) * G_K  # this lane's taps
    v_at = values + tl.multiple_of(b * v_b, ALIGN) + _offsets(n, i, spot, V_N, V_I, M)
    h_at = h_out + b * T * H_T + spot
    flags_at = flags + b * T if HAS_RESET else flags
    valid, writes = valid[None, :], (valid & (q == 0))[None, :]
    if HAS_START:
        h = tl.load(start + (b * n_chunks + c) * NM + spot[None, :], mask=valid, other=0.0)
    else:
        h = tl.zeros([1, WIDTH * P], tl.float32)
    h = unstack(h, 1, WIDTH, P)
    full = (end - t) // STEPS * STEPS + t
    z_many, a_many, v_many = tile_of(z_at, G_T, STEPS), tile_of(a_at, G_T, STEPS), tile_of(v_at, V_T, STEPS)
    h_many = tile_of(h_at, H_T, STEPS)
    f_many = flags_at + tl.arange(0, STEPS)[:, None] if HAS_RESET else flags
    for t_group in tl.range(t, full, STEPS, num_stages=STAGES):
        h = _forward_group(
            h, z_many, a_many, v_many, f_many, h_many, wide(t_group), valid, writes, q, lane,
            G_T, G_K, V_T, H_T, M, MP, SHARE, STEPS, WIDTH, P, GATE, HAS_RESET,
        )  # fmt: skip
    f_one = flags_at + tl.arange(0, 1)[:, None] if HAS_RESET else flags
    for t_one in range(full, end):
        h = _forward_group(
            h, z_at[None, :], a_at[None, :], v_at[None, :], f_one, h_at[None, :], wide(t_one), valid, writes,
            q, lane, G_T, G_K, V_T, H_T, M, MP, SHARE, 1, WIDTH, P, GATE, HAS_RESET,
        )  # fmt: skip
    if end == T:
        tl.store(last + b * NM + spot[None, :], stack(h, tl.float32, 1, WIDTH, P), mask=writes)


@triton.jit
def _handed_back(
    scaled, f, s: tl.constexpr, lane, TAPS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
    STEPS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """u = A_t^T s_t of a lane's rows, (P,), from their s / S at step s; where rows are shared, of lane k's tap."""
    owed = ()
    if M == 1:
        for p in tl.static_range(P):
            owed = owed + (scaled[p] * f[s * P + p],)
    else:
        for k in tl.static_range(TAPS):
            part = scaled[0] * f[(k * STEPS + s) * P]
            for p in tl.static_range(1, P):
                part += scaled[p] * f[(k * STEPS + s) * P + p]
            owed = owed + (part,)
        owed = sum_over_rows(owed, lane, TAPS, MP, P)
    return owed


@triton.jit
def _backward_group(
    u, z_at, a_at, v_at, o_at, h_at, flags_at, dz_at, da_at, dv_at, h_start, t, valid, stores, own, i, q,
    lane, G_T: tl.constexpr, G_K: tl.constexpr, V_T: tl.constexpr, O_T: tl.constexpr, H_T: tl.constexpr,
    D_T: tl.constexpr, D_K: tl.constexpr, E_T: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
    SHARE: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, GATE: tl.constexpr,
    HAS_RESET: tl.constexpr,
):  # fmt: skip
    """Stores dz and dv of STEPS steps from t, last to first; returns u before them.

    h_at points to the step before the one that the other pointers point to.
    """
    TAPS: tl.constexpr = M // SHARE
    PARTNER: tl.constexpr = MP * SHARE - MP
    z, f, scale = gate_rows(z_at, a_at, t, valid, lane, G_T, G_K, TAPS, STEPS, WIDTH, P, GATE, PARTNER)
    v = unstack(tl.load(v_at + t * V_T, mask=valid, other=0.0), STEPS, WIDTH, P)
    g = unstack(tl.load(o_at + t * O_T, mask=valid, other=0.0), STEPS, WIDTH, P)
    inside = t + tl.arange(0, STEPS)[:, None] > 0
    before = tl.load(h_at + t * H_T, mask=valid & inside, other=0.0).to(tl.float32)
    before = unstack(tl.where(inside, before, h_start), STEPS, WIDTH, P)
    if HAS_RESET:
        flags = step_flags(flags_at, t, STEPS, WIDTH)
    block = lane - lane % (MP * SHARE // P if M > 1 else 1)  # the first lane of the block's
    row = tl.minimum(i, M - 1)  # of lanes without a row, any
    scaled = ()  # s / S of the steps that are done, the latest first
    for s in tl.static_range(STEPS - 1, -1, -1):
        now = ()
        for p in tl.static_range(P):
            total = g[s * P + p] + u[p]
            if M < MP:
                total = tl.where(tl.reshape(valid, [WIDTH]), total, 0.0)
            now = now + (total * scale[s * P + p],)
        scaled = now + scaled
        u = _handed_back(now, f, s, lane, TAPS, M, MP, STEPS, P)
        if SHARE > 1:  # lane k of half q holds the sum of tap q TAPS + k; row i's is wanted in both halves
            u = (tl.gather(u[0], block + row // TAPS * MP + row % TAPS, 0),)
        if HAS_RESET:
            u = _cleared(u, flags[s], P)
    if SHARE > 1:
        block += q * TAPS
    x = ()  # flat as f
    for k in tl.static_range(TAPS):
        for s in tl.static_range(STEPS):
            of = ()
            for p in tl.static_range(P):
                of = of + (before[s * P + p],)
            if HAS_RESET:
                of = _cleared(of, flags[s], P)
            for p in tl.static_range(P):
                x = x + (_of_block(of, k, p, block, M, P),)
    store_gradients(
        z, f, x, v, scale, scaled, q, lane, dz_at + t * D_T, da_at + t * D_T, dv_at + t * E_T, stores,
        stores & own, D_K, TAPS, STEPS, WIDTH, P, GATE, PARTNER,
    )  # fmt: skip
    return u


@triton.jit(do_not_specialize=["T", "chunk", "n_chunks", "g_b", "v_b", "o_b", "d_b"])
def backward_kernel(
    gates, values, h_in, grad, start, stop, flags, d_gates, d_values, d_start, T, chunk, n_chunks, tiles,
    g_b, v_b, o_b, d_b,
    G_T: tl.constexpr, G_N: tl.constexpr, G_I: tl.constexpr, G_K: tl.constexpr,
    V_T: tl.constexpr, V_N: tl.constexpr, V_I: tl.constexpr,
    O_T: tl.constexpr, O_N: tl.constexpr, O_I: tl.constexpr,
    D_T: tl.constexpr, D_N: tl.constexpr, D_I: tl.constexpr, D_K: tl.constexpr, E_T: tl.constexpr,
    H_T: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    MP: tl.constexpr, SHARE: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, WIDTH: tl.constexpr,
    P: tl.constexpr, GATE: tl.constexpr, HAS_START: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """dz, dv of one chunk of time, and u before it, from h and from u after it; all lanes walk back in time.

    gates, values, flags as in the forward pass, grad (B, T, N, M) of any strides (O_), h_in (B, T, N, M) as
    h_out there, start (B, N, M) fp32 = h0, stop (B, n_chunks, N, M) fp32 = u after each chunk; out: d_gates
    (B, T, N, M, K) of any strides (D_), d_values (B, T, N, M), a step E_T apart and else contiguous, d_start
    (B, N, M) fp32 = dL/dh0. Where rows are whole, columns up to COLUMNS are written, zeros beyond N M.
    """
    NM: tl.constexpr = N * M
    b, c, place, n, i, q, spot, valid = _place(tiles, n_chunks, N, M, MP, SHARE, WIDTH, P)
    lane = tl.arange(0, WIDTH)
    begin = c * chunk
    end = tl.minimum(begin + chunk, T)
    a_at = gates + tl.multiple_of(b * g_b, ALIGN) + (_offsets(n, i, spot, G_N, G_I, M) + M * G_K)
    z_at = a_at + (q * (M // SHARE) - M) * G_K
    v_at = values + tl.multiple_of(b * v_b, ALIGN) + _offsets(n, i, spot, V_N, V_I, M)
    o_at = grad + tl.multiple_of(b * o_b, ALIGN) + _offsets(n, i, spot, O_N, O_I, M)
    da_at = d_gates + tl.multiple_of(b * d_b, ALIGN) + (_offsets(n, i, spot, D_N, D_I, M) + M * D_K)
    dz_at = da_at + (q * (M // SHARE) - M) * D_K
    h_at, dv_at = h_in + b * T * H_T + spot, d_values + b * T * E_T + spot
    flags_at = flags + b * T if HAS_RESET else flags
    # Rows past the end read zeros, which makes their gradients zero: what planes are padded with.
    stores = (place < COLUMNS if MP * SHARE == M else valid)[None, :]
    own, valid = (q == 0)[None, :], valid[None, :]
    u = unstack(tl.load(stop + (b * n_chunks + c) * NM + spot[None, :], mask=valid, other=0.0), 1, WIDTH, P)
    if HAS_START:
        h_start = tl.load(start + b * NM + spot[None, :], mask=valid, other=0.0)
    else:
        h_start = tl.zeros([1, WIDTH * P], tl.float32)

    groups = (end - begin) // STEPS
    z_many, a_many, v_many = tile_of(z_at, G_T, STEPS), tile_of(a_at, G_T, STEPS), tile_of(v_at, V_T, STEPS)
    o_many, h_many, dz_many = (
        tile_of(o_at, O_T, STEPS),
        tile_of(h_at - H_T, H_T, STEPS),
        tile_of(dz_at, D_T, STEPS),
    )
    da_many, dv_many = tile_of(da_at, D_T, STEPS), tile_of(dv_at, E_T, STEPS)
    f_many = flags_at + tl.arange(0, STEPS)[:, None] if HAS_RESET else flags
    for group in tl.range(0, groups, num_stages=STAGES):
        u = _backward_group(
            u, z_many, a_many, v_many, o_many, h_many, f_many, dz_many, da_many, dv_many, h_start,
            wide(end - (group + 1) * STEPS), valid, stores, own, i, q, lane,
            G_T, G_K, V_T, O_T, H_T, D_T, D_K, E_T, M, MP, SHARE, STEPS, WIDTH, P, GATE, HAS_RESET,
        )  # fmt: skip
    f_one = flags_at + tl.arange(0, 1)[:, None] if HAS_RESET else flags
    for back in range((end - begin) % STEPS):
        u = _backward_group(
            u, z_at[None, :], a_at[None, :], v_at[None, :], o_at[None, :], h_at[None, :] - H_T, f_one,
            dz_at[None, :], da_at[None, :], dv_at[None, :], h_start,
            wide(begin + (end - begin) % STEPS - 1 - back), valid, stores, own, i, q, lane,
            G_T, G_K, V_T, O_T, H_T, D_T, D_K, E_T, M, MP, SHARE, 1, WIDTH, P, GATE, HAS_RESET,
        )  # fmt: skip
    if begin == 0:
        tl.store(d_start + b * NM + spot[None, :], stack(u, tl.float32, 1, WIDTH, P), mask=valid & own)


def _forward(
    gates: Tensor,
    values: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    gate: str,
    columns: int | None = None,
) -> tuple[Tensor, Tensor]:
    B, T, N, M = values.shape
    h, last = rows_like(values, columns), values.new_empty(B, N, M, dtype=torch.float32)
    chunk, n_chunks = time_chunks(B * N, M, transfer_cost(M, gate), T, values.device)
    if n_chunks > 1:
        transfer = block_transfer(gates, values, reset, gate, chunk, n_chunks, reverse=False)
        h0 = chunk_starts(transfer, h0)
    _launch_forward(gates, values, h0, reset, gate, h, last, chunk, n_chunks)
    return h, last


def strides(prefix: str, x: Tensor) -> dict[str, int]:
    """Of time, blocks and rows, by their names in the kernels; a lone row keeps the order unbroken."""
    row = x.stride(3) if x.shape[3] > 1 else x.stride(2)
    return {f"{prefix}_T": x.stride(1), f"{prefix}_N": x.stride(2), f"{prefix}_I": row}


def _launch_forward(gates, values, start, reset, gate, h, last, chunk, n_chunks) -> None:
    B, T, N, M = values.shape
    launch = Launch(N * M, M, M, T, B * n_chunks, (gates, values))
    with launch.device:
        forward_kernel[launch.grid](
            gates, values, start, None if reset is None else reset.to(torch.int32), h, last,
            T, chunk, n_chunks, launch.tiles, gates.stride(0), values.stride(0),
            G_K=gates.stride(4), **strides("G", gates), **strides("V", values), H_T=h.stride(1),
            N=N, M=M, MP=triton.next_power_of_2(M), GATE=gate,
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
    reset: Tensor | None, gate: str, d_gates: Tensor, d_values: Tensor, columns: int | None = None,
) -> Tensor:  # fmt: skip
    B, T, N, M = values.shape
    padded = triton.next_power_of_2(M)
    d_start = values.new_empty(B, N, M, dtype=torch.float32)
    stop = grad_last.contiguous()
    chunk, n_chunks = time_chunks(B * N, M, transfer_cost(M, gate), T, values.device)
    if n_chunks > 1:
        transfer = block_transfer(gates, grad, reset, gate, chunk, n_chunks, reverse=True)
        stop = chunk_starts(transfer, stop).flip(1).contiguous()
    launch = Launch(columns or N * M, M, M, T, B * n_chunks, (gates, values, grad, d_gates), backward=True)
    with launch.device:
        backward_kernel[launch.grid](
            gates, values, h, grad, h0, stop, None if reset is None else reset.to(torch.int32),
            d_gates, d_values, d_start, T, chunk, n_chunks, launch.tiles,
            gates.stride(0), values.stride(0), grad.stride(0), d_gates.stride(0),
            G_K=gates.stride(4), D_K=d_gates.stride(4), **strides("G", gates), **strides("V", values),
            **strides("O", grad), **strides("D", d_gates), H_T=h.stride(1), E_T=d_values.stride(1),
            COLUMNS=columns or N * M, N=N, M=M, MP=padded, GATE=gate,
            HAS_START=h0 is not None, HAS_RESET=reset is not None, **launch.options,
        )  # fmt: skip
    return d_start


def _split(planes: Tensor, N: int, M: int) -> tuple[Tensor, Tensor]:
    """Gates (B, T, N, M, M+1) and values (B, T, N, M) of planes (B, T, M+2, columns)."""
    rows = planes[..., : N * M].unflatten(-1, (N, M))
    return rows[:, :, : M + 1].permute(0, 1, 3, 4, 2), rows[:, :, M + 1]


def _fills(M: int) -> bool:
    """Whether rows lie one after the other, so that the kernel sees the columns beyond them."""
    return triton.next_power_of_2(M) * lanes_per_row(M) == M


block_diagonal_scan = register("bd_scan_triton", _forward, _backward)
packed_block_diagonal_scan = register_packed(
    "bd_packed_triton",
    _split,
    _forward,
    _backward,
    fills=lambda M: triton.next_power_of_2(M) * lanes_per_row(M) == M,
)
