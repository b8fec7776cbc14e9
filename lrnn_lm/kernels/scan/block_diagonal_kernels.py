"""BD-LRU in Triton: fused forward and analytic backward; neither A nor dA is ever in memory.

A program is one warp. A lane owns P rows of one block (for M = 1: of P blocks) of one sequence. Steps go in
groups. Tiles [STEPS, rows] of gates and values arrive in shared memory some groups ahead, by asynchronous
copies of 16 bytes. A lane takes its rows out, normalises them alone, then walks through the steps, where the
lanes of a block exchange its state by warp shuffles. ../README.md has the derivation, the bytes moved, and
when time is cut into chunks.

Any strides are read. Memory (B, T, M+1, N, M), M+1 planes each laid out like the values, is the fast order.

Legend: B batch, T time, N blocks, M block size, MP = M rounded up to a power of two, P rows a lane, q = a
lane's index among the SHARE lanes of its row, TAPS = M / SHARE, WIDTH lanes a program; z gate logits, v
values, h state, g = dL/dh from outside, s = the whole dL/dh, u = A^T s of the step after. Lane blocks are
[WIDTH], row blocks [WIDTH * P], tiles [STEPS, WIDTH * P]. A tuple is flat, a lane block each.
"""

import triton
import triton.language as tl

from ..triton_device import settle_cache_keys
from .triton_gates import FIXED
from .triton_rows import (
    WARP,
    as_int64,
    gate_rows,
    input_terms,
    offsets_of,
    place_of_rows,
    stack,
    step_flags,
    store_gradients,
    store_sums,
    sum_of_row,
    sum_over_rows,
    tile_of,
    unstack,
    zero_at_reset,
)


@triton.jit
def _tap_input(h, k: tl.constexpr, p: tl.constexpr, first, M: tl.constexpr, P: tl.constexpr):
    """What tap k of a lane's row p multiplies; h is the state, P lane blocks."""
    if M == 1:
        return h[p]
    elif M == P:  # the whole block is in one lane: no exchange
        return h[k]
    else:  # row k of the block is value k % P of its lane k // P: one warp shuffle
        return tl.gather(h[k % P], first + k // P, 0)


@triton.jit
def _forward_group(
    h, z_at, a_at, v_at, flags_at, h_at, t, padded, writes, q, lane,
    G_T: tl.constexpr, G_K: tl.constexpr, V_T: tl.constexpr, H_T: tl.constexpr, M: tl.constexpr,
    MP: tl.constexpr, SHARE: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr,
    GATE: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """Stores h of STEPS steps from t and returns the state after them, P lane blocks."""
    TAPS: tl.constexpr = M // SHARE
    # All gates of the group are normalised before the first step: only the state's own chain is sequential.
    _, f, scale = gate_rows(z_at, a_at, t, padded, lane, G_T, G_K, TAPS, STEPS, WIDTH, P, GATE, SHARE)
    v = unstack(tl.load(v_at + t * V_T, mask=padded, other=0.0), STEPS, WIDTH, P)
    if HAS_RESET:
        flags = step_flags(flags_at, t, STEPS, WIDTH)
    first = lane - lane % (MP // P if M > 1 else 1)  # the block's first lane
    if SHARE > 1:
        first += q * TAPS  # lane q of a row multiplies taps q TAPS and on
    terms = input_terms(f, v, q, TAPS, STEPS * P, SHARE)
    states = ()
    for s in tl.static_range(STEPS):
        if HAS_RESET:
            h = zero_at_reset(h, flags[s], P)
        after = ()
        for p in tl.static_range(P):
            even = terms[s * P + p]
            odd = tl.zeros_like(even)  # two running sums halve the chain of dependent additions
            for k in tl.static_range(TAPS):
                x = _tap_input(h, k, p, first, M, P)
                if k % 2 == 0:
                    even += f[(k * STEPS + s) * P + p] * x
                else:
                    odd += f[(k * STEPS + s) * P + p] * x
            after = after + (sum_of_row(even + odd, lane, SHARE) * scale[s * P + p],)
        h = after
        states = states + h  # stored once a group, as a tile
    tl.store(h_at + t * H_T, stack(states, h_at.dtype.element_ty, STEPS, WIDTH, P), mask=writes)
    return h


@triton.jit(do_not_specialize=["T", "chunk", "n_chunks", "g_b", "v_b"])
def forward_kernel(
    gates, values, start, flags, h_out, last, T, chunk, n_chunks, tiles, g_b, v_b,
    G_T: tl.constexpr, G_N: tl.constexpr, G_I: tl.constexpr, G_K: tl.constexpr,
    V_T: tl.constexpr, V_N: tl.constexpr, V_I: tl.constexpr, H_T: tl.constexpr, COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr, N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, SHARE: tl.constexpr,
    STEPS: tl.constexpr, STAGES: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, GATE: tl.constexpr,
    HAS_START: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """h of one chunk of time from the state before it.

    gates (B, T, N, M, K), values (B, T, N, M) of any strides; flags (B, T) int32, nonzero where a document
    starts; start (B, n_chunks, N, M) fp32; out: h_out (B, T, N, M), a step H_T apart and else contiguous,
    last (B, N, M) fp32, contiguous. If M = MP, columns up to COLUMNS are read and written.
    """
    NM: tl.constexpr = N * M
    b, c, n, i, q, spot, valid = place_of_rows(tiles, n_chunks, N, M, MP, SHARE, WIDTH, P)
    lane = tl.arange(0, WIDTH)
    t = c * chunk
    end = tl.minimum(t + chunk, T)
    # [WIDTH * P] pointers. Only the batch's offset is not a compile-time constant: without `multiple_of`
    # loads would be one element wide and not prefetched.
    a_at = gates + tl.multiple_of(b * g_b, ALIGN) + (offsets_of(n, i, spot, G_N, G_I, M) + M * G_K)
    z_at = a_at + (q * (M // SHARE) - M) * G_K  # this lane's taps
    v_at = values + tl.multiple_of(b * v_b, ALIGN) + offsets_of(n, i, spot, V_N, V_I, M)
    h_at = h_out + b * T * H_T + spot
    flags_at = flags + b * T if HAS_RESET else flags
    # Columns of padding are read and written too: a mask that ends inside a copy of 16 bytes makes all copies
    # narrower.
    padded = spot < COLUMNS if MP == M else valid
    padded, writes, valid = padded[None, :], (padded & (q == 0))[None, :], valid[None, :]
    if HAS_START:
        h = tl.load(start + (b * n_chunks + c) * NM + spot[None, :], mask=valid, other=0.0)
    else:
        h = tl.zeros([1, WIDTH * P], tl.float32)
    h = unstack(h, 1, WIDTH, P)  # P lane blocks
    full = (end - t) // STEPS * STEPS + t
    z_many, a_many, v_many = tile_of(z_at, G_T, STEPS), tile_of(a_at, G_T, STEPS), tile_of(v_at, V_T, STEPS)
    h_many = tile_of(h_at, H_T, STEPS)
    for t_group in tl.range(t, full, STEPS, num_stages=STAGES):
        h = _forward_group(
            h, z_many, a_many, v_many, flags_at, h_many, as_int64(t_group), padded, writes, q, lane,
            G_T, G_K, V_T, H_T, M, MP, SHARE, STEPS, WIDTH, P, GATE, HAS_RESET,
        )  # fmt: skip
    for t_one in range(full, end):  # the steps after the last whole group, one at a time
        h = _forward_group(
            h, z_at[None, :], a_at[None, :], v_at[None, :], flags_at, h_at[None, :], as_int64(t_one), padded,
            writes, q, lane, G_T, G_K, V_T, H_T, M, MP, SHARE, 1, WIDTH, P, GATE, HAS_RESET,
        )  # fmt: skip
    if end == T:
        tl.store(last + b * NM + spot[None, :], stack(h, tl.float32, 1, WIDTH, P), mask=valid & writes)


@triton.jit
def _transposed_product(
    scaled, f, s: tl.constexpr, lane, TAPS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
    STEPS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """u = A_t^T s_t of a lane's rows, (P,), from scaled = s / S at step s; if SHARE > 1, of lane k's tap."""
    owed = ()
    if M == 1:  # A is a number
        for p in tl.static_range(P):
            owed = owed + (scaled[p] * f[s * P + p],)
    else:
        for k in tl.static_range(TAPS):
            part = scaled[0] * f[(k * STEPS + s) * P]
            for p in tl.static_range(1, P):
                part += scaled[p] * f[(k * STEPS + s) * P + p]
            owed = owed + (part,)
        # u_j = sum_i A_ij s_i runs over the block's rows, which are in other lanes.
        owed = sum_over_rows(owed, lane, TAPS, MP, P)
    return owed


@triton.jit
def _backward_group(
    u, sums, z_at, a_at, v_at, o_at, h_at, flags_at, dz_at, da_at, dv_at, h_start, t, valid, padded, own, i,
    q, lane, G_T: tl.constexpr, G_K: tl.constexpr, V_T: tl.constexpr, O_T: tl.constexpr, H_T: tl.constexpr,
    D_T: tl.constexpr, D_K: tl.constexpr, E_T: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
    SHARE: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, GATE: tl.constexpr,
    HAS_RESET: tl.constexpr, HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """Stores dz and dv of STEPS steps from t, last to first; returns u before them, and the sums after.

    h_at points one step before the other pointers, at h_{t-1}.
    """
    TAPS: tl.constexpr = M // SHARE
    # [STEPS, WIDTH * P] tiles of gates, values, dL/dh and the state before each step.
    z, f, scale = gate_rows(z_at, a_at, t, padded, lane, G_T, G_K, TAPS, STEPS, WIDTH, P, GATE, SHARE)
    v = unstack(tl.load(v_at + t * V_T, mask=padded, other=0.0), STEPS, WIDTH, P)
    g = unstack(tl.load(o_at + t * O_T, mask=valid, other=0.0), STEPS, WIDTH, P)
    inside = t + tl.arange(0, STEPS)[:, None] > 0  # before step 0 lies h0, not h_out
    before = tl.load(h_at + t * H_T, mask=padded & inside, other=0.0).to(tl.float32)
    before = unstack(tl.where(inside, before, h_start), STEPS, WIDTH, P)
    if HAS_RESET:
        flags = step_flags(flags_at, t, STEPS, WIDTH)
    block = lane - lane % (MP // P if M > 1 else 1)  # the block's first lane
    SPAN: tl.constexpr = WARP // SHARE
    scaled = ()  # s / S of the steps that are done, the latest first
    for s in tl.static_range(STEPS - 1, -1, -1):
        now = ()
        for p in tl.static_range(P):
            total = g[s * P + p] + u[p]  # s_t
            if M < MP:  # lanes without a row must not add to the block's sums
                total = tl.where(tl.reshape(valid, [WIDTH]), total, 0.0)
            now = now + (total * scale[s * P + p],)
        scaled = now + scaled
        u = _transposed_product(now, f, s, lane, TAPS, M, MP, STEPS, P)
        if SHARE > 1:  # lane k of part q holds u of row q TAPS + k; every lane of row i needs that of row i
            row = tl.minimum(i, M - 1)  # lanes without a row read any
            u = (tl.gather(u[0], block + (row // TAPS - q) * SPAN + row % TAPS, 0),)
        if HAS_RESET:
            u = zero_at_reset(u, flags[s], P)
    if SHARE > 1:
        block += q * TAPS
    # The gates' gradient is local once s is known, so it is taken for the whole group at once.
    x = ()  # h_{t-1} of the block's rows, flat as f
    for k in tl.static_range(TAPS):
        for s in tl.static_range(STEPS):
            of = before[s * P : (s + 1) * P]
            if HAS_RESET:
                of = zero_at_reset(of, flags[s], P)
            for p in tl.static_range(P):
                x = x + (_tap_input(of, k, p, block, M, P),)
    sums = store_gradients(
        sums, z, f, x, v, scale, scaled, q, lane, dz_at + t * D_T, da_at + t * D_T, dv_at + t * E_T, padded,
        padded & own, D_K, TAPS, STEPS, WIDTH, P, GATE, SHARE, HAS_SUMS,
    )  # fmt: skip
    return u, sums


@triton.jit(do_not_specialize=["T", "chunk", "n_chunks", "g_b", "v_b", "o_b", "d_b"])
def backward_kernel(
    gates, values, h_in, grad, start, stop, flags, d_gates, d_values, d_start, sums_out, T, chunk, n_chunks,
    tiles, g_b, v_b, o_b, d_b,
    G_T: tl.constexpr, G_N: tl.constexpr, G_I: tl.constexpr, G_K: tl.constexpr,
    V_T: tl.constexpr, V_N: tl.constexpr, V_I: tl.constexpr,
    O_T: tl.constexpr, O_N: tl.constexpr, O_I: tl.constexpr,
    D_T: tl.constexpr, D_N: tl.constexpr, D_I: tl.constexpr, D_K: tl.constexpr, E_T: tl.constexpr,
    H_T: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    MP: tl.constexpr, SHARE: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, WIDTH: tl.constexpr,
    P: tl.constexpr, GATE: tl.constexpr, HAS_START: tl.constexpr, HAS_RESET: tl.constexpr,
    HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """dz, dv of one chunk of time, and u before it, from h and from u after it; all lanes walk back in time.

    gates, values, flags as in the forward pass, grad (B, T, N, M) of any strides (O_), h_in as h_out there,
    start (B, N, M) fp32 = h0, stop (B, n_chunks, N, M) fp32 = u after each chunk; out: d_gates (B, T, N, M,
    K) of any strides (D_), d_values (B, T, N, M), a step E_T apart and else contiguous, d_start (B, N, M)
    fp32 = dL/dh0. If M = MP, columns up to COLUMNS are written, zeros beyond N M. HAS_SUMS: sums_out (B,
    n_chunks, M+1, COLUMNS) fp32 is dz summed over a chunk's steps, the gradient of the gates' bias.
    """
    NM: tl.constexpr = N * M
    b, c, n, i, q, spot, valid = place_of_rows(tiles, n_chunks, N, M, MP, SHARE, WIDTH, P)
    lane = tl.arange(0, WIDTH)
    begin = c * chunk
    end = tl.minimum(begin + chunk, T)
    a_at = gates + tl.multiple_of(b * g_b, ALIGN) + (offsets_of(n, i, spot, G_N, G_I, M) + M * G_K)
    z_at = a_at + (q * (M // SHARE) - M) * G_K
    v_at = values + tl.multiple_of(b * v_b, ALIGN) + offsets_of(n, i, spot, V_N, V_I, M)
    o_at = grad + tl.multiple_of(b * o_b, ALIGN) + offsets_of(n, i, spot, O_N, O_I, M)
    da_at = d_gates + tl.multiple_of(b * d_b, ALIGN) + (offsets_of(n, i, spot, D_N, D_I, M) + M * D_K)
    dz_at = da_at + (q * (M // SHARE) - M) * D_K
    h_at, dv_at = h_in + b * T * H_T + spot, d_values + b * T * E_T + spot
    flags_at = flags + b * T if HAS_RESET else flags
    # grad is masked to real rows, so rows past the end have dL/dh = 0 and their gradients are written as
    # zeros: the gradient of a plane's padding must be zero.
    padded = (spot < COLUMNS if MP == M else valid)[None, :]
    own, valid = (q == 0)[None, :], valid[None, :]
    u = unstack(tl.load(stop + (b * n_chunks + c) * NM + spot[None, :], mask=valid, other=0.0), 1, WIDTH, P)
    if HAS_START:
        h_start = tl.load(start + b * NM + spot[None, :], mask=valid, other=0.0)
    else:
        h_start = tl.zeros([1, WIDTH * P], tl.float32)

    # Added up here, in registers: summing dz afterwards would read half of what this kernel moves once more.
    sums = ()
    if HAS_SUMS:
        GATES: tl.constexpr = M // SHARE if GATE == FIXED else M // SHARE + 1
        sums = (tl.zeros([WIDTH], tl.float32),) * (GATES * P)

    groups = (end - begin) // STEPS
    z_many, a_many, v_many = tile_of(z_at, G_T, STEPS), tile_of(a_at, G_T, STEPS), tile_of(v_at, V_T, STEPS)
    o_many, h_many = tile_of(o_at, O_T, STEPS), tile_of(h_at - H_T, H_T, STEPS)
    dz_many, da_many = tile_of(dz_at, D_T, STEPS), tile_of(da_at, D_T, STEPS)
    dv_many = tile_of(dv_at, E_T, STEPS)
    for group in tl.range(0, groups, num_stages=STAGES):
        u, sums = _backward_group(
            u, sums, z_many, a_many, v_many, o_many, h_many, flags_at, dz_many, da_many, dv_many, h_start,
            as_int64(end - (group + 1) * STEPS), valid, padded, own, i, q, lane,
            G_T, G_K, V_T, O_T, H_T, D_T, D_K, E_T, M, MP, SHARE, STEPS, WIDTH, P, GATE, HAS_RESET,
            HAS_SUMS,
        )  # fmt: skip
    # Groups are taken from the chunk's end, so single steps are left over at its beginning.
    for back in range((end - begin) % STEPS):
        u, sums = _backward_group(
            u, sums, z_at[None, :], a_at[None, :], v_at[None, :], o_at[None, :], h_at[None, :] - H_T,
            flags_at, dz_at[None, :], da_at[None, :], dv_at[None, :], h_start,
            as_int64(begin + (end - begin) % STEPS - 1 - back), valid, padded, own, i, q, lane,
            G_T, G_K, V_T, O_T, H_T, D_T, D_K, E_T, M, MP, SHARE, 1, WIDTH, P, GATE, HAS_RESET,
            HAS_SUMS,
        )  # fmt: skip
    if HAS_SUMS:
        sum_at = sums_out + ((b * n_chunks + c) * ((M + 1) * COLUMNS) + spot)[None, :]
        store_sums(
            sums, sum_at + q[None, :] * (M // SHARE * COLUMNS), sum_at + M * COLUMNS, padded, padded & own,
            COLUMNS, M // SHARE, WIDTH, P, GATE,
        )  # fmt: skip
    if begin == 0:
        tl.store(d_start + b * NM + spot[None, :], stack(u, tl.float32, 1, WIDTH, P), mask=valid & own)


settle_cache_keys(globals())
