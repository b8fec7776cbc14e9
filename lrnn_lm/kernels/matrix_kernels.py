"""The matrix-valued BD-LRU in Triton, within chunks of L steps: what a chunk does, before any value is seen.

S is linear in the state before the chunk, S_0, and in its values v_1 .. v_L:

    S_t = P_t S_0 + sum_{s <= t} u_{t,s} v_s^T       P_t = A_t .. A_1      u_{t,s} = A_t .. A_{s+1} k_s
    y_t = S_0^T (P_t^T q_t) + sum_s (q_t . u_{t,s}) v_s

So one scan of M + L columns, P_t and u_{t,.}, takes the place of one of V columns; the rest is products of
small matrices, for tensor cores (`matrix_state_kernels.py`). These columns give the queries' view of S_0
(`reads`, P_t^T q_t), what each value weighs in each output (`scores`, q_t . u_{t,s}), what it weighs in the
state after the chunk (`keys`, u_{L,s}), and P_L (`whole`). No inverse is taken, and products of A stay
bounded. Chunks do not wait for one another.

A lane owns R blocks (of M rows) in M / G of the columns of P and L / G of those of u. The NL lanes of a
head's blocks lie side by side, G groups of them share the columns, and where a head is small a program takes
several. Columns of u are zero before their step, so they join as they begin, in PHASES groups.

Legend: B batch, T time, H heads, K slots a head, M slots a block, L steps a chunk, C chunks; an item is a
chunk of a head, of (B, C, H). Column l of u and of all that is stored by it is that of step
`step_of_column(l)`. Lane blocks are [LANES]; x, the columns of a lane, is flat [column R M + row].
"""

import triton
import triton.language as tl

from .triton_launch import settle_cache_keys
from .triton_rows import cleared, columns_of, of_columns, wide


@triton.jit
def step_of_column(column, L: tl.constexpr, G: tl.constexpr):
    """The step in the chunk whose write a column is."""
    return column % (L // G) * G + column // (L // G)


@triton.jit
def _places(
    index, total, n_chunks, H: tl.constexpr, NL: tl.constexpr, G: tl.constexpr, ITEMS: tl.constexpr
):  # fmt: skip
    """Of every lane: first block, group, item, whether there is such an item, b, chunk, head."""
    lane = tl.arange(0, ITEMS * G * NL)
    item = index * ITEMS + lane // (G * NL)
    real = item < total
    item = tl.minimum(item, total - 1)
    b, chunk = wide(item // H // n_chunks), item // H % n_chunks
    return lane % NL, lane // NL % G, wide(item), real, b, chunk, item % H


@triton.jit
def _tile(at, mask, COUNT: tl.constexpr, S: tl.constexpr, LANES: tl.constexpr, MASKED: tl.constexpr):
    """COUNT numbers S apart from each of `at` [LANES], as blocks; zeros where masked."""
    many = at[:, None] + tl.arange(0, COUNT)[None, :] * S
    tile = tl.load(many, mask=mask[:, None], other=0.0) if MASKED else tl.load(many)
    return columns_of(tile, LANES, COUNT)


@triton.jit
def _store_tile(at, parts, mask, COUNT: tl.constexpr, S: tl.constexpr, LANES: tl.constexpr):
    tile = tl.reshape(of_columns(parts, at.dtype.element_ty, LANES, COUNT), [LANES, COUNT])
    tl.store(at[:, None] + tl.arange(0, COUNT)[None, :] * S, tile, mask=mask[:, None])


@triton.jit
def _rows(
    at, mask, M: tl.constexpr, R: tl.constexpr, S: tl.constexpr, NEXT: tl.constexpr, LANES: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """The R M rows of a lane's blocks, S apart within a block; blocks are NEXT apart."""
    WIDE: tl.constexpr = 4 if M > 4 else M
    rows = ()
    for r in tl.static_range(R):
        for part in tl.static_range(M // WIDE):
            rows = rows + _tile(at + (r * NEXT + part * WIDE * S), mask, WIDE, S, LANES, MASKED)
    return rows


@triton.jit
def _store_rows(
    at, rows, mask, M: tl.constexpr, R: tl.constexpr, S: tl.constexpr, NEXT: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = 4 if M > 4 else M
    for r in tl.static_range(R):
        for part in tl.static_range(M // WIDE):
            some = ()
            for e in tl.static_range(WIDE):
                some = some + (rows[r * M + part * WIDE + e],)
            _store_tile(at + (r * NEXT + part * WIDE * S), some, mask, WIDE, S, LANES)


@triton.jit
def _transition(
    at, mask, M: tl.constexpr, R: tl.constexpr, A_K: tl.constexpr, A_M: tl.constexpr, NEXT: tl.constexpr,
    LANES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A_t of a lane's blocks, flat [column R M + row]."""
    a = ()
    for j in tl.static_range(M):
        a = a + _rows(at + j * A_M, mask, M, R, A_K, NEXT, LANES, MASKED)
    return a


@triton.jit
def _sum_over(x, lane, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """The sum of x over COUNT lanes that lie FIRST apart: the same bits in each."""
    for level in tl.static_range(5):
        if (COUNT >> level) > 1:
            x += tl.gather(x, lane ^ (FIRST * (COUNT >> (level + 1))), 0)
    return x


@triton.jit
def _scattered(x, lane, g, M: tl.constexpr, FIRST: tl.constexpr, G: tl.constexpr):
    """Group g receives the sums over the groups of x[g M / G ..], M / G of them: every exchange halves what
    is left."""
    for level in tl.static_range(4):
        if (G >> level) > 1:
            upper = (g & (G >> (level + 1))) != 0
            left = ()
            for j in tl.static_range(M >> (level + 1)):
                sent = tl.where(upper, x[j], x[j + (M >> (level + 1))])
                kept = tl.where(upper, x[j + (M >> (level + 1))], x[j])
                left = left + (kept + tl.gather(sent, lane ^ (FIRST * (G >> (level + 1))), 0),)
            x = left
    return x


@triton.jit
def _identity(g, M: tl.constexpr, R: tl.constexpr, G: tl.constexpr):
    """P before the first step."""
    x = ()
    for c in tl.static_range(M // G):
        for _ in tl.static_range(R):
            for i in tl.static_range(M):
                x = x + (tl.where(g * (M // G) + c == i, 1.0, 0.0),)
    return x


@triton.jit
def _with_zeros(x, COUNT: tl.constexpr):
    for _ in tl.static_range(COUNT):
        x = x + (tl.zeros_like(x[0]),)
    return x


@triton.jit
def _first(x, COUNT: tl.constexpr):
    kept = ()
    for j in tl.static_range(COUNT):
        kept = kept + (x[j],)
    return kept


@triton.jit
def _advanced(
    x, a, k, step, g, valid, M: tl.constexpr, R: tl.constexpr, G: tl.constexpr, COLUMNS: tl.constexpr,
    NEW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A x + k e_t^T of COLUMNS columns, of which k can begin in the last NEW."""
    RM: tl.constexpr = R * M
    after = ()
    for c in tl.static_range(COLUMNS):
        begins = (c - M // G) * G + g == step
        for r in tl.static_range(R):
            for i in tl.static_range(M):
                total = a[r * M + i] * x[c * RM + r * M]
                for j in tl.static_range(1, M):
                    total = tl.fma(a[j * RM + r * M + i], x[c * RM + r * M + j], total)
                if c >= COLUMNS - NEW:
                    total += tl.where(begins, k[r * M + i], 0.0)
                if MASKED:
                    total = tl.where(valid, total, x[c * RM + r * M + i])
                after = after + (total,)
    return after


@triton.jit
def _store_reads(
    x, q, reads_at, real, M: tl.constexpr, R: tl.constexpr, CP: tl.constexpr, NEXT: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """P_t^T q_t: of each of a lane's blocks, the CP columns that it has."""
    for r in tl.static_range(R):
        sums = ()
        for c in tl.static_range(CP):
            total = q[r * M] * x[c * R * M + r * M]
            for i in tl.static_range(1, M):
                total = tl.fma(q[r * M + i], x[c * R * M + r * M + i], total)
            sums = sums + (total,)
        _store_tile(reads_at + r * NEXT, sums, real, CP, 1, LANES)


@triton.jit
def _store_scores(
    x, q, at, n, lane, real, RM: tl.constexpr, FIRST: tl.constexpr, ACTIVE: tl.constexpr, CU: tl.constexpr,
    NL: tl.constexpr,
):  # fmt: skip
    """q_t . u_{t,s} of the ACTIVE columns from FIRST on, zeros of the others of CU; `at`: a lane's first."""
    for turn in tl.static_range((CU + NL - 1) // NL):
        own = tl.zeros_like(x[0])
        for u in tl.static_range(turn * NL, turn * NL + NL):
            if u < ACTIVE:
                total = q[0] * x[(FIRST + u) * RM]
                for e in tl.static_range(1, RM):
                    total = tl.fma(q[e], x[(FIRST + u) * RM + e], total)
                own = tl.where(n == u - turn * NL, _sum_over(total, lane, 1, NL), own)
        column = turn * NL + n
        tl.store(at + column, own.to(at.dtype.element_ty), mask=real & (column < CU))


@triton.jit(do_not_specialize=["T", "n_chunks", "total"])
def chunk_forward_kernel(
    transitions, writes, queries, flags, scores, reads, keys, whole, T, n_chunks, total, a_b, k_b, q_b,
    A_T: tl.constexpr, A_H: tl.constexpr, A_K: tl.constexpr, A_M: tl.constexpr,
    K_T: tl.constexpr, K_H: tl.constexpr, K_K: tl.constexpr,
    Q_T: tl.constexpr, Q_H: tl.constexpr, Q_K: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, M: tl.constexpr, R: tl.constexpr, NL: tl.constexpr, G: tl.constexpr,
    ITEMS: tl.constexpr, L: tl.constexpr, PHASES: tl.constexpr, MASKED: tl.constexpr,
    HAS_RESET: tl.constexpr,
):  # fmt: skip
    """transitions (B, T, H, K, M), writes and queries (B, T, H, K) of any strides, flags (B, T) int32,
    nonzero where a document starts; out, contiguous: scores (B, C, H, L, L) by step and column, reads
    (B, C, H, L, K) by step, keys (B, C, H, L, K) by column, whole (B, C, H, K, M) fp32."""
    LANES: tl.constexpr = ITEMS * G * NL
    CP: tl.constexpr = M // G
    CU: tl.constexpr = L // G
    NEW: tl.constexpr = CU // PHASES
    n, g, item, real, b, chunk, head = _places(tl.program_id(0), total, n_chunks, H, NL, G, ITEMS)
    lane = tl.arange(0, LANES)
    t0 = wide(chunk * L)
    a_at = transitions + b * a_b + t0 * A_T + (head * A_H + n * (M * A_K))
    k_at = writes + b * k_b + t0 * K_T + (head * K_H + n * (M * K_K))
    q_at = queries + b * q_b + t0 * Q_T + (head * Q_H + n * (M * Q_K))
    flags_at = flags + b * T + t0 if HAS_RESET else flags
    scores_at = scores + item * (L * L) + g * CU
    reads_at = reads + item * (L * K) + (n * M + g * CP)
    x = _identity(g, M, R, G)
    for phase in tl.static_range(PHASES):
        x = _with_zeros(x, NEW * R * M)
        for step in range(phase * NEW * G, (phase + 1) * NEW * G):
            valid = real & (t0 + step < T) if MASKED else real
            a = _transition(a_at + step * A_T, valid, M, R, A_K, A_M, NL * M * A_K, LANES, MASKED)
            k = _rows(k_at + step * K_T, valid, M, R, K_K, NL * M * K_K, LANES, MASKED)
            q = _rows(q_at + step * Q_T, valid, M, R, Q_K, NL * M * Q_K, LANES, MASKED)
            if HAS_RESET:
                flag = tl.load(flags_at + step, mask=valid, other=0)
                x = cleared(x, flag, (CP + (phase + 1) * NEW) * R * M)
            x = _advanced(x, a, k, step, g, valid, M, R, G, CP + (phase + 1) * NEW, NEW, MASKED)
            _store_reads(x, q, reads_at + step * K, real, M, R, CP, NL * M, LANES)
            _store_scores(
                x, q, scores_at + step * L, n, lane, real, R * M, CP, (phase + 1) * NEW, CU, NL
            )  # fmt: skip
    keys_at = keys + (item * L + g * CU) * K + n * M
    for u in tl.static_range(CU):
        column = ()
        for e in tl.static_range(R * M):
            column = column + (x[(CP + u) * R * M + e],)
        _store_rows(keys_at + u * K, column, real, M, R, 1, NL * M, LANES)
    whole_at = whole + (item * K + n * M) * M + g * CP
    for r in tl.static_range(R):
        for i in tl.static_range(M):
            row = ()
            for c in tl.static_range(CP):
                row = row + (x[c * R * M + r * M + i],)
            _store_tile(whole_at + (r * NL * M + i) * M, row, real, CP, 1, LANES)


@triton.jit
def _keep_states(x, at, COUNT: tl.constexpr, LANES: tl.constexpr, FOUR: tl.constexpr):
    """Stores COUNT blocks, FOUR of a lane side by side; `at`: a lane's first."""
    for part in tl.static_range(COUNT // FOUR):
        some = ()
        for e in tl.static_range(FOUR):
            some = some + (x[part * FOUR + e],)
        here = at[:, None] + (part * FOUR * LANES + tl.arange(0, FOUR)[None, :])
        tl.store(here, tl.reshape(of_columns(some, at.dtype.element_ty, LANES, FOUR), [LANES, FOUR]))


@triton.jit
def _kept_states(at, COUNT: tl.constexpr, LANES: tl.constexpr, FOUR: tl.constexpr):
    x = ()
    for part in tl.static_range(COUNT // FOUR):
        x = x + _tile(at + part * FOUR * LANES, at, FOUR, 1, LANES, False)
    return x


@triton.jit
def _gradients_at_the_end(
    d_whole, d_keys, item, n, g, real, K: tl.constexpr, M: tl.constexpr, R: tl.constexpr, NL: tl.constexpr,
    G: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """dL/dx after the last step."""
    CP: tl.constexpr = M // G
    CU: tl.constexpr = L // G
    whole_at = d_whole + (item * K + n * M) * M + g * CP
    by_row = ()
    for r in tl.static_range(R):
        for i in tl.static_range(M):
            by_row = by_row + _tile(whole_at + (r * NL * M + i) * M, real, CP, 1, LANES, True)
    s = ()
    for c in tl.static_range(CP):
        for e in tl.static_range(R * M):
            s = s + (by_row[e * CP + c],)
    keys_at = d_keys + (item * L + g * CU) * K + n * M
    for u in tl.static_range(CU):
        s = s + _rows(keys_at + u * K, real, M, R, 1, NL * M, LANES, True)
    return s


@triton.jit
def _gradient_of_transition(
    s, x, d_at, valid, lane, g, M: tl.constexpr, R: tl.constexpr, NL: tl.constexpr, G: tl.constexpr,
    COLUMNS: tl.constexpr, D_M: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Stores dA = s x^T over all columns: group g has the sums of the rows g M / G .. of each block."""
    RM: tl.constexpr = R * M
    for j in tl.static_range(M):
        for r in tl.static_range(R):
            rows = ()
            for i in tl.static_range(M):
                total = s[r * M + i] * x[r * M + j]
                for c in tl.static_range(1, COLUMNS):
                    total = tl.fma(s[c * RM + r * M + i], x[c * RM + r * M + j], total)
                rows = rows + (total,)
            rows = _scattered(rows, lane, g, M, NL, G)
            _store_tile(d_at + (j * D_M + r * NL * M), rows, valid, M // G, 1, LANES)


@triton.jit
def _gradient_of_query(
    x, a, k, weights, diagonal, lane, M: tl.constexpr, R: tl.constexpr, NL: tl.constexpr, G: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """dq of a lane's rows, in all groups: the weights' sum of the columns after the step, A x + k e_t^T."""
    RM: tl.constexpr = R * M
    mixed = ()
    for r in tl.static_range(R):
        for j in tl.static_range(M):
            total = x[r * M + j] * weights[r]
            for c in tl.static_range(1, COLUMNS):
                total = tl.fma(x[c * RM + r * M + j], weights[c * R + r], total)
            mixed = mixed + (_sum_over(total, lane, NL, G),)
    rows = ()
    for r in tl.static_range(R):
        for i in tl.static_range(M):
            total = k[r * M + i] * diagonal
            for j in tl.static_range(M):
                total = tl.fma(a[j * RM + r * M + i], mixed[r * M + j], total)
            rows = rows + (total,)
    return rows


@triton.jit
def _handed_back(
    s, a, valid, M: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """A^T s."""
    RM: tl.constexpr = R * M
    before = ()
    for c in tl.static_range(COLUMNS):
        for r in tl.static_range(R):
            for j in tl.static_range(M):
                total = a[j * RM + r * M] * s[c * RM + r * M]
                for i in tl.static_range(1, M):
                    total = tl.fma(a[j * RM + r * M + i], s[c * RM + r * M + i], total)
                if MASKED:
                    total = tl.where(valid, total, s[c * RM + r * M + j])
                before = before + (total,)
    return before


@triton.jit
def _weights(
    d_reads_at, d_scores_at, real, M: tl.constexpr, R: tl.constexpr, NL: tl.constexpr, CP: tl.constexpr,
    CU: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """What a step's outputs owe to q_t^T x, flat [column R + block]: dL/dreads, and dL/dscores for every
    block."""
    by_block = ()
    for r in tl.static_range(R):
        by_block = by_block + _tile(d_reads_at + r * NL * M, real, CP, 1, LANES, True)
    weights = ()
    for c in tl.static_range(CP):
        for r in tl.static_range(R):
            weights = weights + (by_block[r * CP + c],)
    shared = _tile(d_scores_at, real, CU, 1, LANES, True)
    for u in tl.static_range(CU):
        for _ in tl.static_range(R):
            weights = weights + (shared[u],)
    return weights


@triton.jit
def _gradient_of_write(s, step, g, M: tl.constexpr, R: tl.constexpr, G: tl.constexpr, COLUMNS: tl.constexpr,
                       NEW: tl.constexpr):  # fmt: skip
    """dk of a lane's rows, and whether it has the column that begins at this step."""
    RM: tl.constexpr = R * M
    has = g < 0
    rows = _first(s, RM)
    for c in tl.static_range(COLUMNS - NEW, COLUMNS):
        begins = (c - M // G) * G + g == step
        has = has | begins
        chosen = ()
        for e in tl.static_range(RM):
            chosen = chosen + (tl.where(begins, s[c * RM + e], rows[e]),)
        rows = chosen
    return rows, has


@triton.jit
def _step_back(
    s, x, a, k, q, weights, diagonal, step, lane, g, valid, da_at, dk_at, dq_at, M: tl.constexpr,
    R: tl.constexpr, NL: tl.constexpr, G: tl.constexpr, COLUMNS: tl.constexpr, NEW: tl.constexpr,
    D_M: tl.constexpr, LANES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of a step; dL/dx before it from that after it, without a reset's mask."""
    RM: tl.constexpr = R * M
    dq = _gradient_of_query(x, a, k, weights, diagonal, lane, M, R, NL, G, COLUMNS)
    _store_rows(dq_at, dq, valid & (g == 0), M, R, 1, NL * M, LANES)
    now = ()
    for c in tl.static_range(COLUMNS):
        for r in tl.static_range(R):
            for i in tl.static_range(M):
                now = now + (tl.fma(q[r * M + i], weights[c * R + r], s[c * RM + r * M + i]),)
    dk, has = _gradient_of_write(now, step, g, M, R, G, COLUMNS, NEW)
    _store_rows(dk_at, dk, valid & has, M, R, 1, NL * M, LANES)
    _gradient_of_transition(now, x, da_at, valid, lane, g, M, R, NL, G, COLUMNS, D_M, LANES)
    return _handed_back(now, a, valid, M, R, COLUMNS, MASKED)


@triton.jit
def _keep_columns(
    a_at, k_at, flags_at, own, g, real, steps, A_T: tl.constexpr, A_K: tl.constexpr, A_M: tl.constexpr,
    K_T: tl.constexpr, K_K: tl.constexpr, M: tl.constexpr, R: tl.constexpr, NL: tl.constexpr,
    G: tl.constexpr, L: tl.constexpr, PHASES: tl.constexpr, SLOT: tl.constexpr, LANES: tl.constexpr,
    MASKED: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """Stores the columns before each step of a chunk, which has `steps` of them where MASKED."""
    RM: tl.constexpr = R * M
    NEW: tl.constexpr = L // G // PHASES
    FOUR: tl.constexpr = 4 if RM % 4 == 0 else 1
    x = _identity(g, M, R, G)
    for phase in tl.static_range(PHASES):
        x = _with_zeros(x, NEW * RM)
        for step in range(phase * NEW * G, (phase + 1) * NEW * G):
            valid = real & (step < steps) if MASKED else real
            a = _transition(a_at + step * A_T, valid, M, R, A_K, A_M, NL * M * A_K, LANES, MASKED)
            k = _rows(k_at + step * K_T, valid, M, R, K_K, NL * M * K_K, LANES, MASKED)
            if HAS_RESET:
                flag = tl.load(flags_at + step, mask=valid, other=0)
                x = cleared(x, flag, (M // G + (phase + 1) * NEW) * RM)
            _keep_states(x, own + step * SLOT, (M // G + (phase + 1) * NEW) * RM, LANES, FOUR)
            x = _advanced(x, a, k, step, g, valid, M, R, G, M // G + (phase + 1) * NEW, NEW, MASKED)


@triton.jit
def _walk_back(
    s, a_at, k_at, q_at, flags_at, own, d_reads_at, d_scores_at, da_at, dk_at, dq_at, lane, g, real, steps,
    A_T: tl.constexpr, A_K: tl.constexpr, A_M: tl.constexpr, K_T: tl.constexpr, K_K: tl.constexpr,
    Q_T: tl.constexpr, Q_K: tl.constexpr, H: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
    R: tl.constexpr, NL: tl.constexpr, G: tl.constexpr, L: tl.constexpr, PHASES: tl.constexpr,
    SLOT: tl.constexpr, LANES: tl.constexpr, MASKED: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of all steps of a chunk, last to first, from dL/dx after it."""
    RM: tl.constexpr = R * M
    CU: tl.constexpr = L // G
    NEW: tl.constexpr = CU // PHASES
    SPAN: tl.constexpr = NEW * G
    FOUR: tl.constexpr = 4 if RM % 4 == 0 else 1
    for phase in tl.static_range(PHASES - 1, -1, -1):
        s = _first(s, (M // G + (phase + 1) * NEW) * RM)  # a column's gradient ends where it begins
        for back in range(SPAN):
            step = (phase + 1) * SPAN - 1 - back
            valid = real & (step < steps) if MASKED else real
            a = _transition(a_at + step * A_T, valid, M, R, A_K, A_M, NL * M * A_K, LANES, MASKED)
            k = _rows(k_at + step * K_T, valid, M, R, K_K, NL * M * K_K, LANES, MASKED)
            q = _rows(q_at + step * Q_T, valid, M, R, Q_K, NL * M * Q_K, LANES, MASKED)
            x = _kept_states(own + step * SLOT, (M // G + (phase + 1) * NEW) * RM, LANES, FOUR)
            weights = _weights(
                d_reads_at + step * K, d_scores_at + (step * L + g * CU), real, M, R, NL, M // G, CU, LANES
            )  # fmt: skip
            column = step * L + (step % G * CU + step // G)
            diagonal = tl.load(d_scores_at + column, mask=real, other=0.0).to(tl.float32)
            s = _step_back(
                s, x, a, k, q, weights, diagonal, step, lane, g, valid, da_at + step * (M * H * K),
                dk_at + step * (H * K), dq_at + step * (H * K), M, R, NL, G, M // G + (phase + 1) * NEW, NEW,
                H * K, LANES, MASKED,
            )  # fmt: skip
            if HAS_RESET:
                flag = tl.load(flags_at + step, mask=valid, other=0)
                s = cleared(s, flag, (M // G + (phase + 1) * NEW) * RM)


@triton.jit(do_not_specialize=["T", "n_chunks", "total", "work"])
def chunk_backward_kernel(
    transitions, writes, queries, flags, d_scores, d_reads, d_keys, d_whole, d_transitions, d_writes,
    d_queries, scratch, T, n_chunks, total, work, a_b, k_b, q_b,
    A_T: tl.constexpr, A_H: tl.constexpr, A_K: tl.constexpr, A_M: tl.constexpr,
    K_T: tl.constexpr, K_H: tl.constexpr, K_K: tl.constexpr,
    Q_T: tl.constexpr, Q_H: tl.constexpr, Q_K: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, M: tl.constexpr, R: tl.constexpr, NL: tl.constexpr, G: tl.constexpr,
    ITEMS: tl.constexpr, L: tl.constexpr, PHASES: tl.constexpr, MASKED: tl.constexpr,
    HAS_RESET: tl.constexpr,
):  # fmt: skip
    """Gradients of `chunk_forward_kernel`'s inputs from those of its outputs; states are computed again.

    Out: d_transitions (B, T, M, H, K), d_writes and d_queries (B, T, H, K), contiguous. A program goes
    through items one after another, with `scratch` (programs, L, columns R M LANES) for the columns before each step.
    """
    LANES: tl.constexpr = ITEMS * G * NL
    CP: tl.constexpr = M // G
    CU: tl.constexpr = L // G
    RM: tl.constexpr = R * M
    SLOT: tl.constexpr = (CP + CU) * RM * LANES
    lane = tl.arange(0, LANES)
    own = scratch + wide(tl.program_id(0)) * (L * SLOT) + lane * (4 if RM % 4 == 0 else 1)
    for index in range(tl.program_id(0), work, tl.num_programs(0)):
        n, g, item, real, b, chunk, head = _places(index, total, n_chunks, H, NL, G, ITEMS)
        t0 = wide(chunk * L)
        a_at = transitions + b * a_b + t0 * A_T + (head * A_H + n * (M * A_K))
        k_at = writes + b * k_b + t0 * K_T + (head * K_H + n * (M * K_K))
        q_at = queries + b * q_b + t0 * Q_T + (head * Q_H + n * (M * Q_K))
        flags_at = flags + b * T + t0 if HAS_RESET else flags
        steps = tl.minimum(T - t0, L) if MASKED else t0
        _keep_columns(
            a_at, k_at, flags_at, own, g, real, steps, A_T, A_K, A_M, K_T, K_K, M, R, NL, G, L, PHASES, SLOT,
            LANES, MASKED, HAS_RESET,
        )  # fmt: skip
        tl.debug_barrier()  # what was stored is loaded, perhaps by another lane
        s = _gradients_at_the_end(d_whole, d_keys, item, n, g, real, K, M, R, NL, G, L, LANES)
        _walk_back(
            s, a_at, k_at, q_at, flags_at, own, d_reads + item * (L * K) + (n * M + g * CP),
            d_scores + item * (L * L),
            d_transitions + (b * T + t0) * (M * H * K) + (head * K + n * M + g * CP),
            d_writes + (b * T + t0) * (H * K) + (head * K + n * M),
            d_queries + (b * T + t0) * (H * K) + (head * K + n * M), lane, g, real, steps,
            A_T, A_K, A_M, K_T, K_K, Q_T, Q_K, H, K, M, R, NL, G, L, PHASES, SLOT, LANES, MASKED, HAS_RESET,
        )  # fmt: skip
        tl.debug_barrier()


settle_cache_keys(globals())
