"""The block-diagonal GRU in Triton: the walk over time, its analytic backward pass, and its linearisation.

    r = sigmoid(x_r + b_r + U_r h)   z = sigmoid(x_z + b_z + U_z h)   q = U_n h + b_q
    n = tanh(x_n + b_n + r q)        h' = n + z (h - n)

A program is one warp, a lane one row of one block of one sequence, which keeps its rows of U_r, U_z and U_n
in registers for the whole walk. A step waits for the one before: one exchange of the block's states by warp
shuffles, M multiply-adds for each matrix, a sigmoid and a tanh. Inputs arrive some groups of steps ahead, as
in `block_diagonal_kernels.py`. The forward pass stores h alone; the backward pass computes the gates again.

With s = dL/dh' a step passes back, of the logits of r, z, n and of q,

    dn = s (1 - z) (1 - n^2)   dz = s (h - n) z (1 - z)   dq = dn r   dr = dn q r (1 - r)
    dL/dh = s z + U_r^T dr + U_z^T dz + U_n^T dq = J^T s

Legend: B batch, T time, N blocks, M block size, MP = M rounded up to a power of two, WIDTH lanes a program; x
the inputs' parts, U recurrent matrices, h the state before a step. Lane blocks are [WIDTH], tiles [STEPS,
WIDTH].
"""

import triton
import triton.language as tl

from ..triton_device import settle_cache_keys
from .triton_gates import gate_value
from .triton_rows import as_int64, place_of_rows, stack, step_flags, tile_of, unstack


@triton.jit
def _place(tiles, n_chunks, N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, WIDTH: tl.constexpr):
    """`place_of_rows` with a row a lane, and the first lane of each one's block."""
    b, chunk, n, i, _, spot, valid = place_of_rows(tiles, n_chunks, N, M, MP, 1, WIDTH, 1)
    lane = tl.arange(0, WIDTH)
    return b, chunk, n, i, spot, valid, lane - lane % MP


@triton.jit
def _matrices(
    weight, n, i, valid, G: tl.constexpr, N: tl.constexpr, M: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Row i (or column i) of each of a block's G matrices: G M lane blocks."""
    found = ()
    for g in tl.static_range(G):
        for k in tl.static_range(M):
            at = k * M + i if COLUMNS else i * M + k
            found = found + (tl.load(weight + (g * N + n) * M * M + at, mask=valid, other=0.0),)
    return found


@triton.jit
def _biases(bias, spot, valid, NM: tl.constexpr):
    found = ()
    for g in tl.static_range(4):
        found = found + (tl.load(bias + g * NM + spot, mask=valid, other=0.0),)
    return found


@triton.jit
def _of_block(x, first, M: tl.constexpr):
    """x of every row of the block, in each of its lanes: M lane blocks."""
    found = ()
    for k in tl.static_range(M):
        found = found + (x if M == 1 else tl.gather(x, first + k, 0),)
    return found


@triton.jit
def _gates(x, r, z, n, u, bias, M: tl.constexpr):
    """r, z, n, q of a step from the block's states x, the inputs' parts, and rows u of the matrices."""
    r, z, n, q = r + bias[0], z + bias[1], n + bias[2], bias[3]
    for k in tl.static_range(M):
        r += u[k] * x[k]
        q += u[2 * M + k] * x[k]
    for k in tl.static_range(M):  # z is needed last
        z += u[M + k] * x[k]
    r, z = gate_value(r, "sigmoid"), gate_value(z, "sigmoid")
    return r, z, gate_value(n + r * q, "tanh"), q


@triton.jit
def _planes(x_at, t, mask, G: tl.constexpr, NM: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr):
    """G planes of STEPS steps from t of (T, G, N, M), STEPS lane blocks each."""
    found = ()
    for g in tl.static_range(G):
        tile = tl.load(x_at + t * (G * NM) + g * NM, mask=mask, other=0.0)
        found = found + (unstack(tile, STEPS, WIDTH, 1),)
    return found


@triton.jit
def _store_planes(
    at, planes, t, mask, G: tl.constexpr, NM: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr
):
    """Stores G planes of STEPS steps from t, STEPS lane blocks each."""
    for g in tl.static_range(G):
        tile = stack(planes[g], at.dtype.element_ty, STEPS, WIDTH, 1)
        tl.store(at + t * (G * NM) + g * NM, tile, mask=mask)


@triton.jit
def _states_before(
    h_at, h_start, flags_at, t, mask, S_T: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr,
    HAS_RESET: tl.constexpr,
):  # fmt: skip
    """h before each of STEPS steps from t, STEPS lane blocks, zero where a document starts.

    h_at points one step, S_T numbers, back, at h_{t-1}; before step 0 lies h_start [1, WIDTH].
    """
    inside = t + tl.arange(0, STEPS)[:, None] > 0
    before = tl.where(inside, tl.load(h_at + t * S_T, mask=mask & inside, other=0.0), h_start)
    if HAS_RESET:
        before = tl.where(tl.load(flags_at + t + tl.arange(0, STEPS)[:, None]) != 0, 0.0, before)
    return unstack(before, STEPS, WIDTH, 1)


@triton.jit
def _forward_group(
    h, x_at, h_at, flags_at, t, mask, first, u, bias, N: tl.constexpr, M: tl.constexpr, STEPS: tl.constexpr,
    WIDTH: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """Stores h of STEPS steps from t and returns the last."""
    r, z, n = _planes(x_at, t, mask, 3, N * M, STEPS, WIDTH)
    if HAS_RESET:
        flags = step_flags(flags_at, t, STEPS, WIDTH)
    states = ()
    for s in tl.static_range(STEPS):
        if HAS_RESET:
            h = tl.where(flags[s] != 0, 0.0, h)
        _, keep, new, _ = _gates(_of_block(h, first, M), r[s], z[s], n[s], u, bias, M)
        h = new + keep * (h - new)
        states = states + (h,)
    tl.store(h_at + t * (N * M), stack(states, tl.float32, STEPS, WIDTH, 1), mask=mask)
    return h


@triton.jit(do_not_specialize=["T", "tiles"])
def walk_kernel(
    inputs, weight, bias, start, flags, h_out, last, T, tiles, N: tl.constexpr, M: tl.constexpr,
    MP: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, WIDTH: tl.constexpr,
    HAS_RESET: tl.constexpr,
):  # fmt: skip
    """All states. inputs (B, T, 3, N, M); weight (3, N, M, M), bias (4, N, M), start and last (B, N, M),
    h_out (B, T, N, M) fp32; flags (B, T) int32. All contiguous."""
    NM: tl.constexpr = N * M
    b, _, n, i, spot, valid, first = _place(tiles, 1, N, M, MP, WIDTH)
    u, biases = _matrices(weight, n, i, valid, 3, N, M, False), _biases(bias, spot, valid, NM)
    x_at, h_at, flags_at = inputs + b * T * (3 * NM) + spot, h_out + b * T * NM + spot, flags + b * T
    mask = valid[None, :]
    h = tl.load(start + b * NM + spot, mask=valid, other=0.0)
    full = T // STEPS * STEPS
    x_many, h_many = tile_of(x_at, 3 * NM, STEPS), tile_of(h_at, NM, STEPS)
    for t_group in tl.range(0, full, STEPS, num_stages=STAGES):
        h = _forward_group(
            h, x_many, h_many, flags_at, as_int64(t_group), mask, first, u, biases, N, M, STEPS, WIDTH,
            HAS_RESET,
        )  # fmt: skip
    for t_one in range(full, T):
        h = _forward_group(
            h, x_at[None, :], h_at[None, :], flags_at, as_int64(t_one), mask, first, u, biases, N, M, 1,
            WIDTH, HAS_RESET,
        )  # fmt: skip
    tl.store(last + b * NM + spot, h, mask=valid)


@triton.jit
def _backward_group(
    owed, sums, x_at, h_at, g_at, d_at, h_start, flags_at, t, mask, first, u, ut, bias, N: tl.constexpr,
    M: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr, HAS_RESET: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Stores the inputs' gradient of STEPS steps from t; returns J^T s before them, and the sums after."""
    NM: tl.constexpr = N * M
    r_in, z_in, n_in = _planes(x_at, t, mask, 3, NM, STEPS, WIDTH)
    before = _states_before(h_at, h_start, flags_at, t, mask, NM, STEPS, WIDTH, HAS_RESET)
    g = unstack(tl.load(g_at + t * NM, mask=mask, other=0.0), STEPS, WIDTH, 1)
    if HAS_RESET:
        flags = step_flags(flags_at, t, STEPS, WIDTH)
    d_r, d_z, d_n = (), (), ()
    for s in tl.static_range(STEPS - 1, -1, -1):
        h, x = before[s], _of_block(before[s], first, M)
        r, z, n, q = _gates(x, r_in[s], z_in[s], n_in[s], u, bias, M)
        total = g[s] + owed if CHAIN else g[s]
        dn = total * (1.0 - z) * (1.0 - n * n)
        dz = total * (h - n) * z * (1.0 - z)
        dq = dn * r
        dr = dq * q * (1.0 - r)
        d, after = (dr, dz, dq), ()  # the matrices' gradient, rows of U_r, U_z, U_n, then the biases'
        for p in tl.static_range(3):
            for k in tl.static_range(M):
                after = after + (sums[p * M + k] + d[p] * x[k],)
        sums = after + (sums[3 * M] + dr, sums[3 * M + 1] + dz, sums[3 * M + 2] + dn, sums[3 * M + 3] + dq)
        if CHAIN:
            owed = total * z
            of_r, of_z, of_q = _of_block(dr, first, M), _of_block(dz, first, M), _of_block(dq, first, M)
            for k in tl.static_range(M):
                owed += ut[k] * of_r[k] + ut[M + k] * of_z[k] + ut[2 * M + k] * of_q[k]
            if HAS_RESET:
                owed = tl.where(flags[s] != 0, 0.0, owed)
        d_r, d_z, d_n = (dr,) + d_r, (dz,) + d_z, (dn,) + d_n
    _store_planes(d_at, (d_r, d_z, d_n), t, mask, 3, NM, STEPS, WIDTH)
    return owed, sums


@triton.jit(do_not_specialize=["T", "tiles", "chunk", "n_chunks"])
def walk_backward_kernel(
    inputs, weight, bias, start, flags, h_in, grad, stop, d_inputs, d_start, sums_out, T, tiles, chunk,
    n_chunks, N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
    WIDTH: tl.constexpr, HAS_RESET: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Gradients from h_in, the walk's states, all lanes walking back in time.

    As in `walk_kernel`, and grad (B, T, N, M), stop (B, N, M) fp32: dL/dh of all states and of the last; out:
    d_inputs (B, T, 3, N, M), d_start (B, N, M) fp32, sums_out (B n_chunks, 3 M + 4, N, M) fp32: rows of the
    matrices' gradient, plane g M + k for entry k of U_g, then the four biases'. Without CHAIN grad is s
    already: steps do not wait, time is cut into chunks, and stop and d_start are not used.
    """
    NM: tl.constexpr = N * M
    b, c, n, i, spot, valid, first = _place(tiles, n_chunks, N, M, MP, WIDTH)
    begin = c * chunk
    end = tl.minimum(begin + chunk, T)
    u, ut, biases = _matrices(weight, n, i, valid, 3, N, M, False), (), _biases(bias, spot, valid, NM)
    owed, mask = tl.zeros([WIDTH], tl.float32), valid[None, :]
    if CHAIN:
        ut = _matrices(weight, n, i, valid, 3, N, M, True)
        owed = tl.load(stop + b * NM + spot, mask=valid, other=0.0)
    x_at, d_at = inputs + b * T * (3 * NM) + spot, d_inputs + b * T * (3 * NM) + spot
    h_at, g_at, flags_at = h_in + b * T * NM + spot - NM, grad + b * T * NM + spot, flags + b * T
    h_start = tl.load(start + b * NM + spot, mask=valid, other=0.0)[None, :]
    sums = (tl.zeros([WIDTH], tl.float32),) * (3 * M + 4)
    groups = (end - begin) // STEPS
    x_many, d_many = tile_of(x_at, 3 * NM, STEPS), tile_of(d_at, 3 * NM, STEPS)
    h_many, g_many = tile_of(h_at, NM, STEPS), tile_of(g_at, NM, STEPS)
    for group in tl.range(0, groups, num_stages=STAGES):
        owed, sums = _backward_group(
            owed, sums, x_many, h_many, g_many, d_many, h_start, flags_at,
            as_int64(end - (group + 1) * STEPS), mask, first, u, ut, biases, N, M, STEPS, WIDTH, HAS_RESET,
            CHAIN,
        )  # fmt: skip
    for back in range((end - begin) % STEPS):
        owed, sums = _backward_group(
            owed, sums, x_at[None, :], h_at[None, :], g_at[None, :], d_at[None, :], h_start, flags_at,
            as_int64(begin + (end - begin) % STEPS - 1 - back), mask, first, u, ut, biases, N, M, 1, WIDTH,
            HAS_RESET, CHAIN,
        )  # fmt: skip
    for k in tl.static_range(3 * M + 4):
        tl.store(sums_out + ((b * n_chunks + c) * (3 * M + 4) + k) * NM + spot, sums[k], mask=valid)
    if CHAIN:
        tl.store(d_start + b * NM + spot, owed, mask=valid)


@triton.jit
def _linearise_group(
    x_at, h_at, a_at, e_at, h_start, flags_at, t, mask, i, first, u, bias, N: tl.constexpr, M: tl.constexpr,
    STEPS: tl.constexpr, WIDTH: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """Stores J, the input's weight 1, and f(h_{t-1}) - h_t of STEPS steps from t."""
    NM: tl.constexpr = N * M
    r_in, z_in, n_in = _planes(x_at, t, mask, 3, NM, STEPS, WIDTH)
    before = _states_before(h_at - NM, h_start, flags_at, t, mask, NM, STEPS, WIDTH, HAS_RESET)
    h = unstack(tl.load(h_at + t * NM, mask=mask, other=0.0), STEPS, WIDTH, 1)
    of_r, of_z, of_q, keep, error = (), (), (), (), ()  # what multiplies rows of U_r, U_z, U_n
    for s in tl.static_range(STEPS):
        r, z, n, q = _gates(_of_block(before[s], first, M), r_in[s], z_in[s], n_in[s], u, bias, M)
        new = (1.0 - z) * (1.0 - n * n) * r
        of_r, of_z = of_r + (new * q * (1.0 - r),), of_z + ((before[s] - n) * z * (1.0 - z),)
        of_q, keep = of_q + (new,), keep + (z,)
        error = error + (n + z * (before[s] - n) - h[s],)
    for k in tl.static_range(M):
        row = ()
        for s in tl.static_range(STEPS):
            entry = of_r[s] * u[k] + of_z[s] * u[M + k] + of_q[s] * u[2 * M + k]
            row = row + (entry + tl.where(i == k, keep[s], 0.0),)
        tl.store(a_at + t * ((M + 1) * NM) + k * NM, stack(row, tl.float32, STEPS, WIDTH, 1), mask=mask)
    one = tl.full([STEPS, WIDTH], 1.0, tl.float32)
    tl.store(a_at + t * ((M + 1) * NM) + M * NM, one, mask=mask)
    tl.store(e_at + t * NM, stack(error, tl.float32, STEPS, WIDTH, 1), mask=mask)


@triton.jit(do_not_specialize=["T", "tiles", "chunk", "n_chunks"])
def linearise_kernel(
    inputs, weight, bias, start, flags, h_in, planes, error, T, tiles, chunk, n_chunks, N: tl.constexpr,
    M: tl.constexpr, MP: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, WIDTH: tl.constexpr,
    HAS_RESET: tl.constexpr,
):  # fmt: skip
    """The steps f around any states h_in (B, T, N, M) fp32, side by side.

    Out, in fp32: planes (B, T, M+1, N, M), plane k = column k of J = df/dh_{t-1}, plane M = 1: gates of a
    scan without normalisation; error (B, T, N, M) = f(h_{t-1}) - h_t.
    """
    NM: tl.constexpr = N * M
    b, c, n, i, spot, valid, first = _place(tiles, n_chunks, N, M, MP, WIDTH)
    begin = c * chunk
    end = tl.minimum(begin + chunk, T)
    u, biases = _matrices(weight, n, i, valid, 3, N, M, False), _biases(bias, spot, valid, NM)
    x_at, a_at = inputs + b * T * (3 * NM) + spot, planes + b * T * ((M + 1) * NM) + spot
    h_at, e_at, flags_at = h_in + b * T * NM + spot, error + b * T * NM + spot, flags + b * T
    h_start, mask = tl.load(start + b * NM + spot, mask=valid, other=0.0)[None, :], valid[None, :]
    full = begin + (end - begin) // STEPS * STEPS
    x_many, h_many = tile_of(x_at, 3 * NM, STEPS), tile_of(h_at, NM, STEPS)
    a_many, e_many = tile_of(a_at, (M + 1) * NM, STEPS), tile_of(e_at, NM, STEPS)
    for t_group in tl.range(begin, full, STEPS, num_stages=STAGES):
        _linearise_group(
            x_many, h_many, a_many, e_many, h_start, flags_at, as_int64(t_group), mask, i, first, u, biases,
            N, M, STEPS, WIDTH, HAS_RESET,
        )  # fmt: skip
    for t_one in range(full, end):
        _linearise_group(
            x_at[None, :], h_at[None, :], a_at[None, :], e_at[None, :], h_start, flags_at, as_int64(t_one),
            mask, i, first, u, biases, N, M, 1, WIDTH, HAS_RESET,
        )  # fmt: skip


settle_cache_keys(globals())
