"""Building blocks of the Triton scans: rows of gates and their gradient, register tiles, warp shuffles.

A row of gates is a Python tuple of K tensors, one row a lane. Tuples are unrolled at compile time, so a row
lives in registers and K need not be a power of two.

Legend: z gate logits, f = f(z), S the row's normaliser, p = f / S, x_k what gate k multiplies, h the row's
new state, s = dL/dh, K = M + 1 gates a row, P rows a lane, SHARE lanes a row. Unless a comment says
otherwise a tensor is a lane block [WIDTH], one value a lane, and a tuple is flat: [(gate STEPS + step) P +
row] or a part of that.
"""

import triton
import triton.language as tl

from ..triton_device import INTERPRETED, LOG2E, settle_cache_keys
from .triton_gates import EPS, FIXED, gate_value, logit_gradient, reciprocal

WARP = tl.constexpr(32)
WIDEN = tl.constexpr(INTERPRETED)  # the interpreter multiplies bf16 as the integers that hold it


@triton.jit
def as_int64(t):
    """t as int64, as offsets may pass 2^31 elements; a loop variable is a plain int in the interpreter."""
    return t + tl.full([], 0, tl.int64)


@triton.jit
def product(x, y, sums, FP32: tl.constexpr):
    """sums + x y in fp32; x [m, k], y [k, n], sums [m, n]."""
    if WIDEN:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, sums, input_precision=FP32)


@triton.jit
def _halves(x, LANES: tl.constexpr, R: tl.constexpr):
    """The two halves of [LANES, R] along R."""
    # tl.split takes the last axis apart, which must have size 2: hence [LANES, R/2, 2] first.
    return tl.split(tl.permute(tl.reshape(x, [LANES, 2, R // 2]), [0, 2, 1])) if R > 2 else tl.split(x)


@triton.jit
def split_columns(tile, LANES: tl.constexpr, R: tl.constexpr):
    """[LANES, R] as R blocks [LANES] in fp32; R is a power of two up to 64."""
    # Triton cannot index a tile in registers, so it is halved log2(R) times.
    parts = (tile if R > 1 else tl.reshape(tile, [LANES]),)
    for level in tl.static_range(6):  # 2^6 = 64 columns at most
        if (R >> level) > 1:
            halved = ()
            for j in tl.static_range(1 << level):
                first, second = _halves(parts[j], LANES, R >> level)  # [LANES, R >> (level + 1)] each
                halved = halved + (first, second)
            parts = halved
    wide_parts = ()
    for j in tl.static_range(R):
        wide_parts = wide_parts + (parts[j].to(tl.float32),)
    return wide_parts


@triton.jit
def join_columns(parts, DTYPE: tl.constexpr, LANES: tl.constexpr, R: tl.constexpr):
    """[LANES, R] of R blocks [LANES] (for R = 1 the block): the inverse of `split_columns`."""
    cast = ()
    for j in tl.static_range(R):
        cast = cast + (parts[j].to(DTYPE),)
    parts = cast
    for level in tl.static_range(6):
        if (R >> level) > 1:
            joined = ()
            for j in tl.static_range(R >> (level + 1)):
                pair = tl.join(parts[2 * j], parts[2 * j + 1])  # [LANES, 2] or [LANES, 1 << level, 2]
                if level > 0:
                    pair = tl.reshape(tl.permute(pair, [0, 2, 1]), [LANES, 2 << level])
                joined = joined + (pair,)
            parts = joined
    return parts[0]


@triton.jit
def unstack(tile, STEPS: tl.constexpr, LANES: tl.constexpr, P: tl.constexpr):
    """[STEPS, LANES * P] as STEPS * P blocks [LANES] in fp32, step-major: a lane's P rows at every step."""
    # The tile comes from shared memory, where the asynchronous copies of a group of steps put it.
    tile = tl.permute(tl.reshape(tile, [STEPS, LANES, P]), [1, 0, 2])  # [LANES, STEPS, P]
    return split_columns(tl.reshape(tile, [LANES, STEPS * P]), LANES, STEPS * P)


@triton.jit
def stack(parts, DTYPE: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, P: tl.constexpr):
    """The tile [STEPS, LANES * P] of STEPS * P blocks [LANES]: the inverse of `unstack`."""
    # One wide store a tile instead of STEPS * P narrow ones.
    tile = tl.reshape(join_columns(parts, DTYPE, LANES, STEPS * P), [LANES, STEPS, P])
    return tl.reshape(tl.permute(tile, [1, 0, 2]), [STEPS, LANES * P])


@triton.jit
def renewed(window, count: tl.constexpr, STEPS: tl.constexpr, P: tl.constexpr):
    """P windows of `count` values after a group of steps, with the values that only shifted made new."""
    # Triton's pipeliner prefetches only in loops whose carried values are all results of this iteration. x +
    # 0 counts as one. Remove it once the pipeliner takes loops that rename values.
    values = ()
    for p in tl.static_range(P):
        for k in tl.static_range(count):
            x = window[p * count + k]
            values = values + (x + 0.0 if k >= STEPS else x,)
    return values


@triton.jit
def row_of(place, SHARE: tl.constexpr):
    """(row, q) of each lane position: q is the lane's index among the SHARE lanes of its row."""
    # Sharing lanes lie WARP / SHARE apart, so that neighbouring lanes still read neighbouring rows: one wide
    # load instead of SHARE strided ones.
    SPAN: tl.constexpr = WARP // SHARE
    if SHARE == 1:
        return place, place * 0  # q = 0 in every lane
    else:
        return place // WARP * SPAN + place % SPAN, place % WARP // SPAN


@triton.jit
def place_of_rows(
    tiles, n_chunks, N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, SHARE: tl.constexpr,
    WIDTH: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The rows of this program: (b, chunk, n, i, q, spot = n M + i, valid), the last five [WIDTH * P].

    MP = M rounded up to a power of two; M = MP = 1 where a row is a channel.
    """
    # Programs of neighbouring rows come first, so that those of one chunk read neighbouring memory.
    pid = tl.program_id(0)
    row, q = row_of((pid % tiles) * (WIDTH * P) + tl.arange(0, WIDTH * P), SHARE)
    outer = pid // tiles
    b, chunk = as_int64(outer // n_chunks), outer % n_chunks
    n, i = row // MP, row % MP  # a block has MP lanes' rows, so that it never straddles two warps
    if MP == M:  # rows are contiguous and the compiler sees it: loads are 16 bytes wide
        spot, valid = row, row < N * M
    else:
        spot, valid = n * M + i, (n < N) & (i < M)
    return b, chunk, n, i, q, spot, valid


@triton.jit
def offsets_of(n, i, spot, S_N: tl.constexpr, S_I: tl.constexpr, M: tl.constexpr):
    """[WIDTH * P] offsets of rows in a tensor with strides S_N, S_I of blocks and rows."""
    # spot * S_I is the same number where rows are contiguous, but only that form shows it to the compiler.
    return spot * S_I if S_N == S_I * M else n * S_N + i * S_I


@triton.jit
def sum_of_lanes(x, lane, SPAN: tl.constexpr, COUNT: tl.constexpr):
    """The sum of x over COUNT lanes that lie SPAN apart, in each of them."""
    # A butterfly: both partners add the same two numbers, so all lanes end with the same bits.
    for level in tl.static_range(5):
        if (COUNT >> level) > 1:
            x += tl.gather(x, lane ^ (SPAN * (COUNT >> (level + 1))), 0)
    return x


@triton.jit
def sum_of_row(x, lane, SHARE: tl.constexpr):
    """The sum of x over the SHARE lanes of a row; x itself where SHARE is 1."""
    return sum_of_lanes(x, lane, WARP // SHARE, SHARE)


@triton.jit
def _largest_of_row(x, lane, SHARE: tl.constexpr):
    for level in tl.static_range(4):
        if (SHARE >> level) > 1:
            x = tl.maximum(x, tl.gather(x, lane ^ (WARP >> (level + 1)), 0))
    return x


@triton.jit
def coefficients(
    z, K: tl.constexpr, E: tl.constexpr, GATE: tl.constexpr, lane, SHARE: tl.constexpr
):  # fmt: skip
    """f, flat [gate E + row] like z, and 1 / S, [row], of E rows of K gates.

    With SHARE > 1 lanes a row, the first K - 1 gates are a lane's own and the last, the input gate, is held
    by all of them.
    """
    # The row's weighted sum is divided once, by the caller: cheaper than dividing K coefficients. The loops
    # over rows are the inner ones, so that E independent operations hide each other's latency.
    f, scales = (), ()
    SOFTMAX: tl.constexpr = GATE == "softmax" or GATE == FIXED
    if GATE == "none":
        f = z
        for e in tl.static_range(E):
            scales = scales + (tl.full(z[e].shape, 1.0, tl.float32),)
    else:
        if SOFTMAX:
            # Subtract the row's largest logit before exp: exp overflows fp32 at z = 89.
            top = z[:E]
            for k in tl.static_range(1, K - 1):
                larger = ()
                for e in tl.static_range(E):
                    larger = larger + (tl.maximum(top[e], z[k * E + e]),)
                top = larger
            shift = ()  # in units of log2, as exp2 is one instruction
            for e in tl.static_range(E):
                most = _largest_of_row(top[e], lane, SHARE)
                shift = shift + (tl.maximum(most, z[(K - 1) * E + e]) * LOG2E,)
            for k in tl.static_range(K):
                for e in tl.static_range(E):
                    f = f + (tl.exp2(z[k * E + e] * LOG2E - shift[e]),)
        else:
            for j in tl.static_range(K * E):
                f = f + (gate_value(z[j], GATE),)
        total = ()  # S, of this lane's gates
        for e in tl.static_range(E):
            total = total + (tl.abs(f[e]),)
        for k in tl.static_range(1, K - 1):
            more = ()
            for e in tl.static_range(E):
                more = more + (total[e] + tl.abs(f[k * E + e]),)
            total = more
        for e in tl.static_range(E):
            # The input gate is added after the sum over lanes: each of them holds it.
            whole = sum_of_row(total[e], lane, SHARE) + tl.abs(f[(K - 1) * E + e])
            scales = scales + (reciprocal(whole if SOFTMAX else whole + EPS),)
    return f, scales


@triton.jit
def tile_of(at, S_T: tl.constexpr, STEPS: tl.constexpr):
    """Pointers [STEPS, WIDTH * P]: STEPS steps, S_T apart, of the rows at `at` [WIDTH * P]."""
    return at[None, :] + tl.arange(0, STEPS)[:, None] * S_T


@triton.jit
def gate_rows(
    z_at, a_at, t, mask, lane,
    G_T: tl.constexpr, G_K: tl.constexpr, TAPS: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr,
    P: tl.constexpr, GATE: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """z and f of STEPS steps from t, both flat [(gate STEPS + step) P + row], and 1 / S, [step P + row]."""
    # One load [STEPS, WIDTH * P] a gate plane: the pipeliner makes it 16-byte copies to shared memory, issued
    # STAGES - 1 groups ahead.
    z = ()
    for k in tl.static_range(TAPS):
        z = z + unstack(tl.load(z_at + (t * G_T + k * G_K), mask=mask, other=0.0), STEPS, WIDTH, P)
    if GATE == FIXED:
        z = z + (tl.zeros_like(z[0]),) * (STEPS * P)
    else:
        z = z + unstack(tl.load(a_at + t * G_T, mask=mask, other=0.0), STEPS, WIDTH, P)
    f, scale = coefficients(z, TAPS + 1, STEPS * P, GATE, lane, SHARE)
    return z, f, scale


@triton.jit
def step_flags(flags_at, t, STEPS: tl.constexpr, WIDTH: tl.constexpr):
    """STEPS blocks [WIDTH]: the reset flags of the steps from t, the same in every lane."""
    flags = tl.load(flags_at + t + tl.arange(0, STEPS)[:, None])
    return unstack(tl.broadcast_to(flags, [STEPS, WIDTH]), STEPS, WIDTH, 1)


@triton.jit
def zero_at_reset(values, flag, count: tl.constexpr):
    """`count` lane blocks, zero where a document starts."""
    kept = ()  # a select, not a product with zero: the state before a document may be NaN or inf
    for j in tl.static_range(count):
        kept = kept + (tl.where(flag != 0, 0.0, values[j]),)
    return kept


@triton.jit
def input_terms(f, v, q, TAPS: tl.constexpr, E: tl.constexpr, SHARE: tl.constexpr):
    """f_0 v of E rows, what enters the state."""
    terms = ()  # where lanes share a row only the first has it, as their terms are added up afterwards
    for e in tl.static_range(E):
        term = f[TAPS * E + e] * v[e]
        terms = terms + (tl.where(q == 0, term, 0.0) if SHARE > 1 else term,)
    return terms


@triton.jit
def _sum_over_steps(sums, dz, k: tl.constexpr, STEPS: tl.constexpr, P: tl.constexpr):
    """(P,): sums[k P + p] plus dz over the STEPS steps of a group."""
    totals = ()
    for p in tl.static_range(P):
        total = sums[k * P + p]
        for s in tl.static_range(STEPS):
            total += dz[s * P + p]
        totals = totals + (total,)
    return totals


@triton.jit
def store_gradients(
    sums, z, f, x, v, scale, scaled, q, lane, dz_at, da_at, dv_at, stores, own,
    D_K: tl.constexpr, TAPS: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr,
    GATE: tl.constexpr, SHARE: tl.constexpr, HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """Stores dz and dv of a group of steps and returns `sums`, flat [gate P + row], with dz added.

    z, f and x (what the taps multiply) are flat [(gate STEPS + step) P + row]; v, scale = 1 / S and scaled =
    s / S are flat [step P + row]. `own`: the lane that writes what a row has once (dv and da). `sums` is the
    gradient of the gates' bias.
    """
    E: tl.constexpr = STEPS * P
    # h is computed again from x. The stored h is rounded to the values' dtype, and x - h of two roundings is
    # noise where a gate is closed or alone.
    dv, h = (), input_terms(f, v, q, TAPS, E, SHARE)
    for e in tl.static_range(E):
        dv = dv + (scaled[e] * f[TAPS * E + e],)
    tl.store(dv_at, stack(dv, dv_at.dtype.element_ty, STEPS, WIDTH, P), mask=own)  # [STEPS, WIDTH * P]
    for k in tl.static_range(TAPS):  # h = sum_k f_k x_k, not yet divided by S
        more = ()
        for e in tl.static_range(E):
            more = more + (h[e] + f[k * E + e] * x[k * E + e],)
        h = more
    state = ()
    for e in tl.static_range(E):
        state = state + (sum_of_row(h[e], lane, SHARE) * scale[e],)
    totals = ()
    for k in tl.static_range(TAPS):  # one gate plane at a time: dz of all K would not fit in registers
        dz = ()
        for e in tl.static_range(E):
            dz = dz + (logit_gradient(z[k * E + e], f[k * E + e], x[k * E + e], state[e], scaled[e], GATE),)
        if HAS_SUMS:
            totals = totals + _sum_over_steps(sums, dz, k, STEPS, P)
        tl.store(dz_at + k * D_K, stack(dz, da_at.dtype.element_ty, STEPS, WIDTH, P), mask=stores)
    if GATE != FIXED:
        da = ()
        for e in tl.static_range(E):
            da = da + (logit_gradient(z[TAPS * E + e], f[TAPS * E + e], v[e], state[e], scaled[e], GATE),)
        tl.store(da_at, stack(da, da_at.dtype.element_ty, STEPS, WIDTH, P), mask=own)
        if HAS_SUMS:
            totals = totals + _sum_over_steps(sums, da, TAPS, STEPS, P)
    return totals


@triton.jit
def store_sums(
    sums, z_at, a_at, stores, own, PLANE: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr,
    P: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Stores the sums of `store_gradients`: a lane's taps at z_at [1, rows], planes PLANE apart, and the
    input gate at a_at, once a row (`own`)."""
    GATES: tl.constexpr = TAPS if GATE == FIXED else TAPS + 1
    for k in tl.static_range(GATES):
        tile = stack(sums[k * P : (k + 1) * P], tl.float32, 1, WIDTH, P)
        if k < TAPS:
            tl.store(z_at + k * PLANE, tile, mask=stores)
        else:
            tl.store(a_at, tile, mask=own)


@triton.jit
def halve(q, lane, upper, HALF: tl.constexpr, AWAY: tl.constexpr):
    """One exchange of recursive halving: q, 2 HALF values, becomes HALF sums with the lane AWAY lanes off.

    upper: whether a lane keeps the second half; its partner keeps the first.
    """
    left = ()
    for j in tl.static_range(HALF):
        sent = tl.where(upper, q[j], q[j + HALF])
        kept = tl.where(upper, q[j + HALF], q[j])
        left = left + (kept + tl.gather(sent, lane ^ AWAY, 0),)
    return left


@triton.jit
def sum_over_rows(q, lane, TAPS: tl.constexpr, MP: tl.constexpr, P: tl.constexpr):
    """Lane k of each group of MP / P lanes receives the P sums over its lanes of q[k P .. k P + P - 1].

    Lanes that own no row must hold zeros. MP <= 16.
    """
    # Recursive halving sends TP - 1 values in log2(TP) shuffles; TAPS full sums would take TAPS log2(MP).
    # TAPS is padded to a power of two, TP; where TP < MP (P = 1), lanes k, k + TP, .. all receive sum k.
    TP: tl.constexpr = MP if TAPS * 2 > MP else (MP // 2 if TAPS * 4 > MP else MP // 4)
    q = q + (tl.zeros_like(q[0]),) * (TP - TAPS)
    for stage in tl.static_range(4):
        if (TP >> stage) > P:
            upper = (lane & ((TP >> (stage + 1)) // P)) != 0
            q = halve(q, lane, upper, TP >> (stage + 1), (TP >> (stage + 1)) // P)
    return (sum_of_lanes(q[0], lane, TP, MP // TP),) if TP < MP else q


settle_cache_keys(globals())
