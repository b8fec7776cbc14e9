"""H-LRU in Triton: fused forward and analytic backward, O(M) work a step and no M x M matrix.

A program is one warp. A lane owns P channels of one sequence and keeps the window of each channel's last M
values in registers. Where orders are large or channels few, two or four lanes share a channel, each with a
part of the taps. Steps are taken in order, in groups whose loads are in flight while earlier groups are
computed. ../README.md has the derivation.

Any strides are read. Memory (B, T, M+1, N), M+1 planes each laid out like the values, is the fast order.

Legend: B batch, T time, N channels, M order; z gate logits, a_1 .. a_M, a_0 their coefficients, v values, h
state, x_k = h_{t-k}; g = dL/dh from outside, s = the whole dL/dh, r_k the part of dL/dh_{t+1-k} that comes
from steps after t; age = steps since the document began; q = a lane's index among the SHARE lanes of its
channel, TAPS = M / SHARE. Lane blocks are [WIDTH], tiles [STEPS, WIDTH * P]; a tuple is flat, a lane block
each.
"""

import triton
import triton.language as tl

from ..triton_device import settle_cache_keys
from .triton_rows import (
    WARP,
    as_int64,
    gate_rows,
    input_terms,
    place_of_rows,
    renewed,
    stack,
    step_flags,
    store_gradients,
    store_sums,
    sum_of_row,
    tile_of,
    unstack,
    zero_at_reset,
)


@triton.jit
def _from_lane(x, lane, AHEAD: tl.constexpr):
    """x of the lane AHEAD lanes on, around the end of the warp."""
    return tl.gather(x, lane // WARP * WARP + (lane + AHEAD) % WARP, 0)


@triton.jit
def _forward_group(
    past, z_at, a_at, v_at, flags_at, h_at, t, padded, writes, q, lane,
    G_T: tl.constexpr, G_K: tl.constexpr, V_T: tl.constexpr, H_T: tl.constexpr, TAPS: tl.constexpr,
    SHARE: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, GATE: tl.constexpr,
    HAS_RESET: tl.constexpr,
):  # fmt: skip
    """Stores h of STEPS steps from t; returns the windows after them, flat [row TAPS + tap].

    Lane q of a channel holds values q TAPS .. (q + 1) TAPS - 1 of its window, newest first.
    """
    SPAN: tl.constexpr = WARP // SHARE
    # All gates of the group are normalised before the first step: only the window's own chain is sequential.
    _, f, scale = gate_rows(z_at, a_at, t, padded, lane, G_T, G_K, TAPS, STEPS, WIDTH, P, GATE, SHARE)
    v = unstack(tl.load(v_at + t * V_T, mask=padded, other=0.0), STEPS, WIDTH, P)
    if HAS_RESET:
        flags = step_flags(flags_at, t, STEPS, WIDTH)
    terms = input_terms(f, v, q, TAPS, STEPS * P, SHARE)
    states = ()
    for s in tl.static_range(STEPS):
        shifted = ()
        for p in tl.static_range(P):
            if HAS_RESET:
                kept = zero_at_reset(past[p * TAPS : (p + 1) * TAPS], flags[s], TAPS)
            else:
                kept = past[p * TAPS : (p + 1) * TAPS]
            even = terms[s * P + p]
            odd = tl.zeros_like(even)  # two running sums halve the chain of dependent additions
            for k in tl.static_range(TAPS - 1, -1, -1):  # the newest value last, as it is ready last
                if k % 2 == 0:
                    even += f[(k * STEPS + s) * P + p] * kept[k]
                else:
                    odd += f[(k * STEPS + s) * P + p] * kept[k]
            h = sum_of_row(even + odd, lane, SHARE) * scale[s * P + p]
            states = states + (h,)
            # The window shifts by renaming registers: unrolled, it costs no instruction.
            if SHARE > 1:  # except that a lane's oldest value moves on to the next lane
                older = _from_lane(kept[TAPS - 1], lane, WARP - SPAN)
                shifted = shifted + (tl.where(q == 0, h, older),)
            else:
                shifted = shifted + (h,)
            shifted = shifted + kept[: TAPS - 1]
        past = shifted
    tl.store(h_at + t * H_T, stack(states, h_at.dtype.element_ty, STEPS, WIDTH, P), mask=writes)
    return renewed(past, TAPS, STEPS, P)


@triton.jit
def _window_at(at, TAPS: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, valid):
    """P windows, flat [row TAPS + tap], from memory, newest first."""
    columns = ()
    for k in tl.static_range(TAPS):  # [1, WIDTH * P] each
        columns = columns + unstack(tl.load(at[None, :] + k, mask=valid, other=0.0), 1, WIDTH, P)
    windows = ()
    for p in tl.static_range(P):
        windows = windows + columns[p::P]
    return windows


@triton.jit
def _store_windows(at, windows, TAPS: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, mask):
    """The inverse of `_window_at`, in fp32."""
    for k in tl.static_range(TAPS):
        tl.store(at[None, :] + k, stack(windows[k::TAPS], tl.float32, 1, WIDTH, P), mask=mask)


@triton.jit(do_not_specialize=["T", "chunk", "n_chunks", "g_b", "v_b"])
def forward_kernel(
    gates, values, start, flags, h_out, last, T, chunk, n_chunks, tiles, g_b, v_b,
    G_T: tl.constexpr, G_N: tl.constexpr, G_K: tl.constexpr, V_T: tl.constexpr, V_N: tl.constexpr,
    H_T: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr, N: tl.constexpr, TAPS: tl.constexpr,
    SHARE: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr,
    GATE: tl.constexpr, HAS_START: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """h of one chunk of time from the window before it; M = TAPS * SHARE.

    gates (B, T, N, M + 1), values (B, T, N) of any strides; flags (B, T) int32, nonzero where a document
    starts; start (B, n_chunks, N, M) fp32; out: h_out (B, T, N), a step H_T apart, last (B, N, M) fp32,
    newest first, contiguous. Columns up to COLUMNS are read and written.
    """
    M: tl.constexpr = TAPS * SHARE
    b, c, n, _, q, _, valid = place_of_rows(tiles, n_chunks, N, 1, 1, SHARE, WIDTH, P)
    lane = tl.arange(0, WIDTH)
    t = c * chunk
    end = tl.minimum(t + chunk, T)
    # [WIDTH * P] pointers. Only the batch's offset is not a compile-time constant: without `multiple_of`
    # loads would be one element wide and not prefetched.
    a_at = gates + tl.multiple_of(b * g_b, ALIGN) + (n * G_N + M * G_K)  # the input gate
    z_at = a_at + (q * TAPS - M) * G_K  # this lane's taps
    v_at = values + tl.multiple_of(b * v_b, ALIGN) + n * V_N
    h_at = h_out + b * T * H_T + n
    flags_at = flags + b * T if HAS_RESET else flags
    # Padding is read and written too: a mask that ends inside a copy of 16 bytes would make all of them
    # copies of 4, half the speed at order 16.
    padded = n < COLUMNS
    padded, writes, valid = padded[None, :], (padded & (q == 0))[None, :], valid[None, :]
    if HAS_START:
        past = _window_at(start + (b * n_chunks + c) * (N * M) + n * M + q * TAPS, TAPS, WIDTH, P, valid)
    else:
        past = (tl.zeros([WIDTH], tl.float32),) * (TAPS * P)

    full = (end - t) // STEPS * STEPS + t
    z_many, a_many, v_many = tile_of(z_at, G_T, STEPS), tile_of(a_at, G_T, STEPS), tile_of(v_at, V_T, STEPS)
    h_many = tile_of(h_at, H_T, STEPS)
    for t_group in tl.range(t, full, STEPS, num_stages=STAGES):
        past = _forward_group(
            past, z_many, a_many, v_many, flags_at, h_many, as_int64(t_group), padded, writes, q, lane,
            G_T, G_K, V_T, H_T, TAPS, SHARE, STEPS, WIDTH, P, GATE, HAS_RESET,
        )  # fmt: skip
    for t_one in range(full, end):  # the steps after the last whole group, one at a time
        past = _forward_group(
            past, z_at[None, :], a_at[None, :], v_at[None, :], flags_at, h_at[None, :], as_int64(t_one),
            padded, writes, q, lane, G_T, G_K, V_T, H_T, TAPS, SHARE, 1, WIDTH, P, GATE, HAS_RESET,
        )  # fmt: skip
    if end == T:
        _store_windows(last + b * (N * M) + n * M + q * TAPS, past, TAPS, WIDTH, P, valid)


@triton.jit
def _history(
    tile, window, j: tl.constexpr, p: tl.constexpr, TAPS: tl.constexpr, STEPS: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """h_{t + j - 1 - TAPS - lag}, with t the group's first step and lag = q TAPS."""
    # The tile has the older ones; the newer ones are in the window, carried over from the group after it.
    return tile[j * P + p] if j < STEPS else window[p * TAPS + TAPS + STEPS - 1 - j]


@triton.jit
def _backward_group(
    r, window, sums, z_at, a_at, v_at, o_at, h_at, ages_at, dz_at, da_at, dv_at, start_at, t, valid, padded,
    own, q, lane,
    G_T: tl.constexpr, G_K: tl.constexpr, V_T: tl.constexpr, O_T: tl.constexpr, H_T: tl.constexpr,
    D_T: tl.constexpr, D_K: tl.constexpr, E_T: tl.constexpr, TAPS: tl.constexpr, SHARE: tl.constexpr,
    STEPS: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, GATE: tl.constexpr, HAS_START: tl.constexpr,
    HAS_RESET: tl.constexpr, HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """Stores dz and dv of STEPS steps from t, last to first; returns r and the window before them, and the
    sums after.

    r is flat [row TAPS + tap]. window, in the same order, is what the taps of the last step t' multiply:
    h_{t' - 1 - q TAPS} and older. h_at points to h_{-1 - (q + 1) TAPS}. HAS_START: what lies before time 0 is
    in h0.
    """
    SPAN: tl.constexpr = WARP // SHARE
    # [STEPS, WIDTH * P] tiles of gates, values and dL/dh.
    z, f, scale = gate_rows(z_at, a_at, t, padded, lane, G_T, G_K, TAPS, STEPS, WIDTH, P, GATE, SHARE)
    v = unstack(tl.load(v_at + t * V_T, mask=padded, other=0.0), STEPS, WIDTH, P)
    g = unstack(tl.load(o_at + t * O_T, mask=valid, other=0.0), STEPS, WIDTH, P)
    # One tile of h serves all taps, TAPS + 1 steps behind; a load for each tap would read h TAPS times.
    lag = q[None, :] * TAPS + (TAPS + 1)
    inside = t + tl.arange(0, STEPS)[:, None] >= lag
    tile = tl.load(h_at + t * H_T, mask=padded & inside, other=0.0).to(tl.float32)
    if HAS_START:  # steps -M .. -1 are h0, newest first
        early = (lag > t) & (lag <= t + TAPS * SHARE)
        tile = tl.where(inside, tile, tl.load(start_at + (lag - 1 - t), mask=valid & early, other=0.0))
    tile = unstack(tile, STEPS, WIDTH, P)
    if HAS_RESET:
        ages = step_flags(ages_at, t, STEPS, WIDTH)
    scaled = ()  # s / S of the steps that are done, the latest first
    for s in tl.static_range(STEPS - 1, -1, -1):
        owed, done = (), ()
        for p in tl.static_range(P):
            now, following = r[p * TAPS], tl.zeros([WIDTH], tl.float32)
            if SHARE > 1:  # a lane's r continues in the next lane, and h_t's own r is in the first
                following = tl.where(q == SHARE - 1, 0.0, _from_lane(now, lane, SPAN))
                now = tl.gather(now, lane // WARP * WARP + lane % SPAN, 0)
            done = done + ((g[s * P + p] + now) * scale[s * P + p],)
            for k in tl.static_range(TAPS):
                part = done[p] * f[(k * STEPS + s) * P + p]
                part += r[p * TAPS + k + 1] if k + 1 < TAPS else following  # r shifts by renaming too
                owed = owed + (tl.where(ages[s] == 0, 0.0, part) if HAS_RESET else part,)
        r, scaled = owed, done + scaled
    # The gates' gradient is local once s is known, so it is taken for the whole group at once.
    xs = ()  # h_{t-k}, flat as f
    for k in tl.static_range(TAPS):
        for s in tl.static_range(STEPS):
            for p in tl.static_range(P):
                x = _history(tile, window, s + TAPS - k, p, TAPS, STEPS, P)
                if HAS_RESET:  # tap k reads nothing from before the document
                    x = tl.where(ages[s] > (q * TAPS + k if SHARE > 1 else k), x, 0.0)
                xs = xs + (x,)
    sums = store_gradients(
        sums, z, f, xs, v, scale, scaled, q, lane, dz_at + t * D_T, da_at + t * D_T, dv_at + t * E_T, padded,
        padded & own, D_K, TAPS, STEPS, WIDTH, P, GATE, SHARE, HAS_SUMS,
    )  # fmt: skip
    earlier = ()  # the window of the group before
    for p in tl.static_range(P):
        for k in tl.static_range(TAPS):
            earlier = earlier + (_history(tile, window, TAPS - 1 - k, p, TAPS, STEPS, P),)
    return r, renewed(earlier, TAPS, 0 if TAPS > STEPS else TAPS, P), sums


@triton.jit(do_not_specialize=["T", "chunk", "n_chunks", "g_b", "v_b", "o_b", "d_b"])
def backward_kernel(
    gates, values, h_in, grad, start, stop, ages, d_gates, d_values, d_start, sums_out, T, chunk, n_chunks,
    tiles, g_b, v_b, o_b, d_b,
    G_T: tl.constexpr, G_N: tl.constexpr, G_K: tl.constexpr, V_T: tl.constexpr, V_N: tl.constexpr,
    O_T: tl.constexpr, O_N: tl.constexpr, D_T: tl.constexpr, D_N: tl.constexpr, D_K: tl.constexpr,
    E_T: tl.constexpr, H_T: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr, N: tl.constexpr,
    TAPS: tl.constexpr, SHARE: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, WIDTH: tl.constexpr,
    P: tl.constexpr, GATE: tl.constexpr, HAS_START: tl.constexpr, HAS_RESET: tl.constexpr,
    HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """dz, dv of one chunk of time, and r before it, from h and from r after it; all lanes walk back in time.

    gates, values as in the forward pass, grad (B, T, N) of any strides (O_), h_in as h_out there, ages (B, T)
    int32, start (B, N, M) fp32 = h0, stop (B, n_chunks, N, M) fp32 = r after each chunk; out: d_gates (B, T,
    N, M + 1) of any strides (D_), d_values (B, T, N), a step E_T apart, d_start (B, N, M) fp32 = dL/dh0.
    Columns up to COLUMNS are written, zeros beyond N. HAS_SUMS: sums_out (B, n_chunks, M + 1, COLUMNS) fp32
    is dz summed over a chunk's steps, the gradient of the gates' bias.
    """
    M: tl.constexpr = TAPS * SHARE
    b, c, n, _, q, _, valid = place_of_rows(tiles, n_chunks, N, 1, 1, SHARE, WIDTH, P)
    lane = tl.arange(0, WIDTH)
    begin = c * chunk
    end = tl.minimum(begin + chunk, T)
    lag = q * TAPS
    a_at = gates + tl.multiple_of(b * g_b, ALIGN) + (n * G_N + M * G_K)
    z_at = a_at + (lag - M) * G_K
    v_at = values + tl.multiple_of(b * v_b, ALIGN) + n * V_N
    o_at = grad + tl.multiple_of(b * o_b, ALIGN) + n * O_N
    da_at = d_gates + tl.multiple_of(b * d_b, ALIGN) + (n * D_N + M * D_K)
    dz_at = da_at + (lag - M) * D_K
    dv_at = d_values + b * T * E_T + n
    h_at = h_in + b * T * H_T + (n - (lag + TAPS + 1) * H_T)
    start_at = (start + b * (N * M) + n * M)[None, :] if HAS_START else start
    ages_at = ages + b * T if HAS_RESET else ages
    # grad is masked to real channels, so channels past the end have dL/dh = 0 and their gradients are written
    # as zeros: the gradient of a plane's padding must be zero.
    padded, own, valid = (n < COLUMNS)[None, :], (q == 0)[None, :], valid[None, :]
    r = _window_at(stop + (b * n_chunks + c) * (N * M) + n * M + lag, TAPS, WIDTH, P, valid)
    columns = ()
    for k in tl.static_range(TAPS):  # h_{end - 2 - lag - k}, [1, WIDTH * P]
        t = as_int64(end - 1 + (TAPS - k))
        ago = lag[None, :] + (TAPS + 1) - t
        h = tl.load(h_at[None, :] + t * H_T, mask=valid & (ago <= 0), other=0.0).to(tl.float32)
        if HAS_START:
            h0 = tl.load(start_at + (ago - 1), mask=valid & (ago > 0) & (ago <= M), other=0.0)
            h = tl.where(ago <= 0, h, h0)
        columns = columns + unstack(h, 1, WIDTH, P)
    window = ()
    for p in tl.static_range(P):
        window = window + columns[p::P]

    # Added up here, in registers: summing dz afterwards would read half of what this kernel moves once more.
    sums = ()
    if HAS_SUMS:
        sums = (tl.zeros([WIDTH], tl.float32),) * ((TAPS + 1) * P)

    # With h0, whole groups stop where a step would read before t = 0, so that their code need not select
    # between h and h0 (HAS_START is False there); single steps finish.
    low = tl.minimum(tl.maximum(begin, M + 1), end) if HAS_START else begin
    groups = (end - low) // STEPS
    z_many, a_many, v_many = tile_of(z_at, G_T, STEPS), tile_of(a_at, G_T, STEPS), tile_of(v_at, V_T, STEPS)
    o_many, h_many, dz_many = tile_of(o_at, O_T, STEPS), tile_of(h_at, H_T, STEPS), tile_of(dz_at, D_T, STEPS)
    da_many, dv_many = tile_of(da_at, D_T, STEPS), tile_of(dv_at, E_T, STEPS)
    for group in tl.range(0, groups, num_stages=STAGES):
        r, window, sums = _backward_group(
            r, window, sums, z_many, a_many, v_many, o_many, h_many, ages_at, dz_many, da_many, dv_many,
            start_at, as_int64(end - (group + 1) * STEPS), valid, padded, own, q, lane,
            G_T, G_K, V_T, O_T, H_T, D_T, D_K, E_T, TAPS, SHARE, STEPS, WIDTH, P, GATE, False, HAS_RESET,
            HAS_SUMS,
        )  # fmt: skip
    rest = end - begin - groups * STEPS
    for back in range(rest):
        r, window, sums = _backward_group(
            r, window, sums, z_at[None, :], a_at[None, :], v_at[None, :], o_at[None, :], h_at[None, :],
            ages_at, dz_at[None, :], da_at[None, :], dv_at[None, :], start_at,
            as_int64(begin + rest - 1 - back), valid, padded, own, q, lane,
            G_T, G_K, V_T, O_T, H_T, D_T, D_K, E_T, TAPS, SHARE, 1, WIDTH, P, GATE, HAS_START, HAS_RESET,
            HAS_SUMS,
        )  # fmt: skip
    if HAS_SUMS:
        sum_at = sums_out + ((b * n_chunks + c) * ((M + 1) * COLUMNS) + n)[None, :]
        store_sums(
            sums, sum_at + lag[None, :] * COLUMNS, sum_at + M * COLUMNS, padded, padded & own, COLUMNS, TAPS,
            WIDTH, P, GATE,
        )  # fmt: skip
    if begin == 0:
        _store_windows(d_start + b * (N * M) + n * M + lag, r, TAPS, WIDTH, P, valid)


settle_cache_keys(globals())
