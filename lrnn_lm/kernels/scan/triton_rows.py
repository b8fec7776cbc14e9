"""What both Triton kernels are made of: rows of gates, their derivative, and exchanges between the lanes of a
warp.

A row is a Python tuple of K tensors, one lane a row: unrolled at compile time, so it lives in registers and K
need not be a power of two. This is the Triton side of the one gate table, `gates.py`; the tests hold the two
against each other for every gate function.

Legend: z gate logits, f = f(z), S the row's normaliser, p = f / S, x_k what gate k multiplies, h the row's
new state, s = dL/dh, K = M + 1 gates a row. Blocks are [BLOCK], one row a lane.
"""

import triton
import triton.language as tl

from ..gates import EPS as _EPS
from ..triton_device import LOG2E, settle_cache_keys

EPS = tl.constexpr(_EPS)
WARP = tl.constexpr(32)


@triton.jit
def wide(t):
    """t as int64; a loop variable is a plain int in the interpreter."""
    return t + tl.full([], 0, tl.int64)


@triton.jit
def _halves(x, LANES: tl.constexpr, R: tl.constexpr):
    """[LANES, R] as its first and its second half along R."""
    return tl.split(tl.permute(tl.reshape(x, [LANES, 2, R // 2]), [0, 2, 1])) if R > 2 else tl.split(x)


@triton.jit
def columns_of(tile, LANES: tl.constexpr, R: tl.constexpr):
    """[LANES, R] as R blocks [LANES] in fp32."""
    parts = (tile if R > 1 else tl.reshape(tile, [LANES]),)
    for level in tl.static_range(6):
        if (R >> level) > 1:
            halved = ()
            for j in tl.static_range(1 << level):
                first, second = _halves(parts[j], LANES, R >> level)
                halved = halved + (first, second)
            parts = halved
    wide_parts = ()
    for j in tl.static_range(R):
        wide_parts = wide_parts + (parts[j].to(tl.float32),)
    return wide_parts


@triton.jit
def of_columns(parts, DTYPE: tl.constexpr, LANES: tl.constexpr, R: tl.constexpr):
    """[LANES, R] of R blocks [LANES] (for R = 1 the block): the inverse of `columns_of`."""
    cast = ()
    for j in tl.static_range(R):
        cast = cast + (parts[j].to(DTYPE),)
    parts = cast
    for level in tl.static_range(6):
        if (R >> level) > 1:
            joined = ()
            for j in tl.static_range(R >> (level + 1)):
                pair = tl.join(parts[2 * j], parts[2 * j + 1])
                if level > 0:
                    pair = tl.reshape(tl.permute(pair, [0, 2, 1]), [LANES, 2 << level])
                joined = joined + (pair,)
            parts = joined
    return parts[0]


@triton.jit
def unstack(tile, STEPS: tl.constexpr, LANES: tl.constexpr, P: tl.constexpr):
    """[STEPS, LANES * P] as STEPS * P blocks [LANES] in fp32, step-major: a lane's P rows at every step."""
    tile = tl.permute(tl.reshape(tile, [STEPS, LANES, P]), [1, 0, 2])
    return columns_of(tl.reshape(tile, [LANES, STEPS * P]), LANES, STEPS * P)


@triton.jit
def stack(parts, DTYPE: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, P: tl.constexpr):
    """The tile [STEPS, LANES * P] of STEPS * P blocks [LANES]: the inverse of `unstack`."""
    tile = tl.reshape(of_columns(parts, DTYPE, LANES, STEPS * P), [LANES, STEPS, P])
    return tl.reshape(tl.permute(tile, [1, 0, 2]), [STEPS, LANES * P])


@triton.jit
def renewed(window, count: tl.constexpr, STEPS: tl.constexpr, P: tl.constexpr):
    """P windows of `count` values after a group of steps; what only moved becomes a value of its own.

    The compiler fetches loads ahead only in loops whose values are all new: x + 0 is one.
    """
    values = ()
    for p in tl.static_range(P):
        for k in tl.static_range(count):
            x = window[p * count + k]
            values = values + (x + 0.0 if k >= STEPS else x,)
    return values


@triton.jit
def reciprocal(x):
    """1 / x for x > 0 in two instructions, to 3e-7: the division operator guards cases that cannot occur
    here."""
    r = tl.rsqrt(x)
    return r * r


@triton.jit
def _sigmoid(z):
    return reciprocal(1.0 + tl.exp2(z * -LOG2E))


@triton.jit
def _tanh(z):
    e = tl.exp2(tl.abs(z) * (-2 * LOG2E))
    far = (1.0 - e) * reciprocal(1.0 + e)
    far = tl.where(z < 0, -far, far)
    q = z * z  # near zero 1 - e loses digits: the Taylor series, whose next term is 1e-9 z at |z| = 1/4
    near = z * (1.0 + q * (-1.0 / 3 + q * (2.0 / 15 + q * (-17.0 / 315 + q * (62.0 / 2835)))))
    return tl.where(tl.abs(z) < 0.25, near, far)


@triton.jit
def gate_value(z, GATE: tl.constexpr):
    if GATE == "sigmoid":
        return _sigmoid(z)
    elif GATE == "relu":
        return tl.maximum(z, 0.0)
    elif GATE == "silu":
        return z * _sigmoid(z)
    elif GATE == "tanh":
        return _tanh(z)
    else:
        tl.static_assert(GATE == "identity" or GATE == "none")
        return z


@triton.jit
def row_of(place, SHARE: tl.constexpr):
    """The row of a position, and a lane's place q among those that share it, WARP / SHARE lanes apart: so
    neighbours read neighbouring rows."""
    SPAN: tl.constexpr = WARP // SHARE
    if SHARE == 1:
        return place, place * 0
    else:
        return place // WARP * SPAN + place % SPAN, place % WARP // SPAN


@triton.jit
def _sum_of_lanes(x, lane, SPAN: tl.constexpr, COUNT: tl.constexpr):
    """The sum of x over COUNT lanes, SPAN apart: the same bits in each."""
    for level in tl.static_range(4):
        if (COUNT >> level) > 1:
            x += tl.gather(x, lane ^ (SPAN * (COUNT >> (level + 1))), 0)
    return x


@triton.jit
def sum_of_row(x, lane, SHARE: tl.constexpr):
    """x, or where SHARE lanes share a row, the sum of theirs."""
    return _sum_of_lanes(x, lane, WARP // SHARE, SHARE)


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

    Dividing a row's sum once is cheaper than dividing K coefficients. Rows take turns at every operation, so
    that none waits for the one before. SHARE > 1: so many lanes share rows; the first K - 1
    entries are a lane's own, the last one is everyone's.
    """
    f, scales = (), ()
    if GATE == "none":
        f = z
        for e in tl.static_range(E):
            scales = scales + (tl.full(z[e].shape, 1.0, tl.float32),)
    else:
        if GATE == "softmax":
            top = ()
            for e in tl.static_range(E):
                top = top + (z[e],)
            for k in tl.static_range(1, K - 1):
                larger = ()
                for e in tl.static_range(E):
                    larger = larger + (tl.maximum(top[e], z[k * E + e]),)
                top = larger
            shift = ()
            for e in tl.static_range(E):
                most = _largest_of_row(top[e], lane, SHARE)
                shift = shift + (tl.maximum(most, z[(K - 1) * E + e]) * LOG2E,)
            for k in tl.static_range(K):
                for e in tl.static_range(E):
                    f = f + (tl.exp2(z[k * E + e] * LOG2E - shift[e]),)
        else:
            for j in tl.static_range(K * E):
                f = f + (gate_value(z[j], GATE),)
        total = ()
        for e in tl.static_range(E):
            total = total + (tl.abs(f[e]),)
        for k in tl.static_range(1, K - 1):
            more = ()
            for e in tl.static_range(E):
                more = more + (total[e] + tl.abs(f[k * E + e]),)
            total = more
        for e in tl.static_range(E):
            whole = sum_of_row(total[e], lane, SHARE) + tl.abs(f[(K - 1) * E + e])
            scales = scales + (reciprocal(whole if GATE == "softmax" else whole + EPS),)
    return f, scales


@triton.jit
def tile_of(at, S_T: tl.constexpr, STEPS: tl.constexpr):
    """Pointers [STEPS, WIDTH * P] to as many steps of the rows that `at` points to."""
    return at[None, :] + tl.arange(0, STEPS)[:, None] * S_T


@triton.jit
def gate_rows(
    z_at, a_at, t, mask, lane,
    G_T: tl.constexpr, G_K: tl.constexpr, TAPS: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr,
    P: tl.constexpr, GATE: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """z and f of STEPS steps from t, both flat [(gate STEPS + step) P + row], and 1 / S, [step P + row]."""
    z = ()
    for k in tl.static_range(TAPS):
        z = z + unstack(tl.load(z_at + (t * G_T + k * G_K), mask=mask, other=0.0), STEPS, WIDTH, P)
    z = z + unstack(tl.load(a_at + t * G_T, mask=mask, other=0.0), STEPS, WIDTH, P)
    f, scale = coefficients(z, TAPS + 1, STEPS * P, GATE, lane, SHARE)
    return z, f, scale


@triton.jit
def step_flags(flags_at, t, STEPS: tl.constexpr, WIDTH: tl.constexpr):
    """The flags of STEPS steps from t, the same in every lane."""
    flags = tl.load(flags_at + t + tl.arange(0, STEPS)[:, None])
    return unstack(tl.broadcast_to(flags, [STEPS, WIDTH]), STEPS, WIDTH, 1)


@triton.jit
def cleared(values, flag, count: tl.constexpr):
    """`count` lane blocks, zero where a document starts."""
    kept = ()
    for j in tl.static_range(count):
        kept = kept + (tl.where(flag != 0, 0.0, values[j]),)
    return kept


@triton.jit
def entering(f, v, q, TAPS: tl.constexpr, E: tl.constexpr, SHARE: tl.constexpr):
    """f_0 v of E rows; where lanes share a row, all but the first have zero, for the row's sum."""
    terms = ()
    for e in tl.static_range(E):
        term = f[TAPS * E + e] * v[e]
        terms = terms + (tl.where(q == 0, term, 0.0) if SHARE > 1 else term,)
    return terms


@triton.jit
def logit_gradient(z, f, x, h, scaled, GATE: tl.constexpr):
    """dL/dz_k = s / S * f'(z_k) * (x_k - sign(f_k) h); softmax: f' = f, sign = 1; none: s x_k. `scaled` is s
    / S."""
    if GATE == "softmax":
        return scaled * f * (x - h)
    elif GATE == "none":
        return scaled * x
    elif GATE == "sigmoid":
        return scaled * f * (1.0 - f) * (x - h)
    elif GATE == "relu":
        return tl.where(z > 0, scaled * (x - h), 0.0)
    else:
        signed = tl.where(f > 0, h, tl.where(f < 0, -h, 0.0))
        if GATE == "silu":
            g = _sigmoid(z)
            return scaled * g * (1.0 + z * (1.0 - g)) * (x - signed)
        elif GATE == "tanh":
            return scaled * (1.0 - f * f) * (x - signed)
        else:
            return scaled * (x - signed)


@triton.jit
def _over_steps(sums, dz, k: tl.constexpr, STEPS: tl.constexpr, P: tl.constexpr):
    """sums[k P + p] and dz of all steps, (P,)."""
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
    """Stores dz and dv of a group of steps; what a row has once, where `own`. Returns `sums`, flat [gate P +
    row], with dz added: the gradient of what was added to the logits of all steps.

    z, f and x, what the taps multiply, are flat [(gate STEPS + step) P + row]; v, scale and scaled, s / S,
    flat [step P + row]. h is computed again from x: the stored one is rounded, and a difference x - h of two
    roundings is noise where a gate is closed or alone.
    """
    E: tl.constexpr = STEPS * P
    dv, h = (), entering(f, v, q, TAPS, E, SHARE)
    for e in tl.static_range(E):
        dv = dv + (scaled[e] * f[TAPS * E + e],)
    tl.store(dv_at, stack(dv, dv_at.dtype.element_ty, STEPS, WIDTH, P), mask=own)
    for k in tl.static_range(TAPS):
        more = ()
        for e in tl.static_range(E):
            more = more + (h[e] + f[k * E + e] * x[k * E + e],)
        h = more
    state = ()
    for e in tl.static_range(E):
        state = state + (sum_of_row(h[e], lane, SHARE) * scale[e],)
    totals = ()
    for k in tl.static_range(TAPS):
        dz = ()
        for e in tl.static_range(E):
            dz = dz + (logit_gradient(z[k * E + e], f[k * E + e], x[k * E + e], state[e], scaled[e], GATE),)
        if HAS_SUMS:
            totals = totals + _over_steps(sums, dz, k, STEPS, P)
        tl.store(dz_at + k * D_K, stack(dz, da_at.dtype.element_ty, STEPS, WIDTH, P), mask=stores)
    da = ()
    for e in tl.static_range(E):
        da = da + (logit_gradient(z[TAPS * E + e], f[TAPS * E + e], v[e], state[e], scaled[e], GATE),)
    tl.store(da_at, stack(da, da_at.dtype.element_ty, STEPS, WIDTH, P), mask=own)
    if HAS_SUMS:
        totals = totals + _over_steps(sums, da, TAPS, STEPS, P)
    return totals


@triton.jit
def store_sums(
    sums, z_at, a_at, stores, own, PLANE: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Stores `store_gradients`' sums of a lane's taps from z_at [1, rows] on, PLANE apart, and of the input
    gate, which a row has once, where `own`."""
    for k in tl.static_range(TAPS + 1):
        of = ()
        for p in tl.static_range(P):
            of = of + (sums[k * P + p],)
        tile = stack(of, tl.float32, 1, WIDTH, P)
        if k < TAPS:
            tl.store(z_at + k * PLANE, tile, mask=stores)
        else:
            tl.store(a_at, tile, mask=own)


@triton.jit
def _halve(q, lane, HALF: tl.constexpr, P: tl.constexpr):
    """A lane keeps the half of q that its bit HALF / P names, adds its partner's, and hands over the other
    half."""
    upper = (lane & (HALF // P)) != 0
    left = ()
    for j in tl.static_range(HALF):
        sent = tl.where(upper, q[j], q[j + HALF])
        kept = tl.where(upper, q[j + HALF], q[j])
        left = left + (kept + tl.gather(sent, lane ^ (HALF // P), 0),)
    return left


@triton.jit
def sum_over_rows(q, lane, TAPS: tl.constexpr, MP: tl.constexpr, P: tl.constexpr):
    """Lane k of each group of MP / P lanes receives the P sums over its lanes of q[k P .. k P + P - 1].

    Recursive halving: every exchange halves what is left to send. TAPS values are padded to a power of two,
    TP; where that is less than MP (P = 1), lanes k, k + TP, .. all receive sum k. Lanes that own no row must
    hold zeros. MP <= 16.
    """
    TP: tl.constexpr = MP if TAPS * 2 > MP else (MP // 2 if TAPS * 4 > MP else MP // 4)
    for _ in tl.static_range(TAPS, TP):
        q = q + (tl.zeros_like(q[0]),)
    for stage in tl.static_range(4):
        if (TP >> stage) > P:
            q = _halve(q, lane, TP >> (stage + 1), P)
    return (_sum_of_lanes(q[0], lane, TP, MP // TP),) if TP < MP else q


settle_cache_keys(globals())
