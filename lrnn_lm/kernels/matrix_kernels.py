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

Pointers of what is loaded and stored step by step go from step to step with the loop: of every pointer that
is computed in place, Triton's coalescing pass looks at all that depends on it, which at M = 16 took half an
hour.

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
def _tile(at, mask, COUNT: tl.constexpr, LANES: tl.constexpr, MASKED: tl.constexpr):
    """COUNT blocks from pointers [LANES, COUNT]; zeros where masked."""
    return columns_of(tl.load(at, mask=mask[:, None], other=0.0) if MASKED else tl.load(at), LANES, COUNT)


@triton.jit
def _store_tile(at, parts, mask, COUNT: tl.constexpr, LANES: tl.constexpr):
    tile = of_columns(parts, at.dtype.element_ty, LANES, COUNT)
    tl.store(at, tl.reshape(tile, [LANES, COUNT]), mask=mask[:, None])


@triton.jit
def _span(at, COUNT: tl.constexpr, S: tl.constexpr):
    """Pointers [LANES, COUNT] to COUNT numbers S apart from each of `at`."""
    return at[:, None] + tl.arange(0, COUNT)[None, :] * S


@triton.jit
def _row_tiles(at, M: tl.constexpr, R: tl.constexpr, S: tl.constexpr, NEXT: tl.constexpr):
    """Pointers to the R M rows of a lane's blocks, tiles of up to four; S apart, blocks NEXT apart."""
    WIDE: tl.constexpr = 4 if M > 4 else M
    tiles = ()
    for r in tl.static_range(R):
        for part in tl.static_range(M // WIDE):
            tiles = tiles + (_span(at + (r * NEXT + part * WIDE * S), WIDE, S),)
    return tiles


@triton.jit
def _plane_tiles(
    at, M: tl.constexpr, R: tl.constexpr, A_K: tl.constexpr, A_M: tl.constexpr, NEXT: tl.constexpr
):  # fmt: skip
    """Pointers to A_t of a lane's blocks, column after column."""
    tiles = ()
    for j in tl.static_range(M):
        tiles = tiles + _row_tiles(at + j * A_M, M, R, A_K, NEXT)
    return tiles


@triton.jit
def _load_tiles(tiles, mask, COUNT: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr,
                MASKED: tl.constexpr):  # fmt: skip
    """COUNT numbers a lane: blocks, in the order of the tiles."""
    blocks = ()
    for j in tl.static_range(COUNT // WIDE):
        blocks = blocks + _tile(tiles[j], mask, WIDE, LANES, MASKED)
    return blocks


@triton.jit
def _store_tiles(tiles, blocks, mask, COUNT: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr):
    for j in tl.static_range(COUNT // WIDE):
        some = ()
        for e in tl.static_range(WIDE):
            some = some + (blocks[j * WIDE + e],)
        _store_tile(tiles[j], some, mask, WIDE, LANES)


@triton.jit
def _moved(tiles, COUNT: tl.constexpr, by: tl.constexpr):
    """COUNT tiles of pointers, `by` numbers on."""
    after = ()
    for j in tl.static_range(COUNT):
        after = after + (tiles[j] + by,)
    return after


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
def _reads(x, q, M: tl.constexpr, R: tl.constexpr, CP: tl.constexpr):
    """P_t^T q_t: of each of a lane's blocks, the CP columns that it has."""
    sums = ()
    for r in tl.static_range(R):
        for c in tl.static_range(CP):
            total = q[r * M] * x[c * R * M + r * M]
            for i in tl.static_range(1, M):
                total = tl.fma(q[r * M + i], x[c * R * M + r * M + i], total)
            sums = sums + (total,)
    return sums


@triton.jit
def _store_scores(
    x, q, tiles, n, lane, real, RM: tl.constexpr, FIRST: tl.constexpr, ACTIVE: tl.constexpr,
    CU: tl.constexpr, NL: tl.constexpr,
):  # fmt: skip
    """q_t . u_{t,s} of the ACTIVE columns from FIRST on, zeros of the others of CU."""
    for turn in tl.static_range((CU + NL - 1) // NL):
        own = tl.zeros_like(x[0])
        for u in tl.static_range(turn * NL, turn * NL + NL):
            if u < ACTIVE:
                total = q[0] * x[(FIRST + u) * RM]
                for e in tl.static_range(1, RM):
                    total = tl.fma(q[e], x[(FIRST + u) * RM + e], total)
                own = tl.where(n == u - turn * NL, _sum_over(total, lane, 1, NL), own)
        tl.store(tiles[turn], own.to(tiles[turn].dtype.element_ty), mask=real & (turn * NL + n < CU))


@triton.jit
def _whole_span(at, M: tl.constexpr, CP: tl.constexpr):
    """Pointers [LANES, M CP] to a block's M rows of CP columns of P; rows are M apart."""
    e = tl.arange(0, M * CP)[None, :]
    return at[:, None] + (e // CP * M + e % CP)


@triton.jit(do_not_specialize=["T", "n_chunks", "total"])
def chunk_forward_kernel(
    transitions, writes, queries, flags, scores, reads, keys, whole, T, n_chunks, total, a_b, k_b, q_b,
    A_T: tl.constexpr, A_H: tl.constexpr, A_K: tl.constexpr, A_M: tl.constexpr,
    K_T: tl.constexpr, K_H: tl.constexpr, K_K: tl.constexpr,
    Q_T: tl.constexpr, Q_H: tl.constexpr, Q_K: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, M: tl.constexpr, R: tl.constexpr, NL: tl.constexpr, G: tl.constexpr,
    ITEMS: tl.constexpr, L: tl.constexpr, MASKED: tl.constexpr, HAS_RESET: tl.constexpr,
    PHASES: tl.constexpr,
):  # fmt: skip
    """transitions (B, T, H, K, M), writes and queries (B, T, H, K) of any strides, flags (B, T) int32,
    nonzero where a document starts; out, contiguous: scores (B, C, H, L, L) by step and column, reads
    (B, C, H, L, K) by step, keys (B, C, H, L, K) by column, whole (B, C, H, K, M) fp32."""
    LANES: tl.constexpr = ITEMS * G * NL
    RM: tl.constexpr = R * M
    WIDE: tl.constexpr = 4 if M > 4 else M
    CP: tl.constexpr = M // G
    CU: tl.constexpr = L // G
    NEW: tl.constexpr = CU // PHASES
    TURNS: tl.constexpr = (CU + NL - 1) // NL
    n, g, item, real, b, chunk, head = _places(tl.program_id(0), total, n_chunks, H, NL, G, ITEMS)
    lane = tl.arange(0, LANES)
    t0 = wide(chunk * L)
    steps = T - t0
    a_at = _plane_tiles(
        transitions + b * a_b + t0 * A_T + (head * A_H + n * (M * A_K)), M, R, A_K, A_M, NL * M * A_K
    )  # fmt: skip
    k_at = _row_tiles(writes + b * k_b + t0 * K_T + (head * K_H + n * (M * K_K)), M, R, K_K, NL * M * K_K)
    q_at = _row_tiles(queries + b * q_b + t0 * Q_T + (head * Q_H + n * (M * Q_K)), M, R, Q_K, NL * M * Q_K)
    flags_at = flags + b * T + t0 if HAS_RESET else flags
    reads_at = ()
    for r in tl.static_range(R):
        reads_at = reads_at + (_span(reads + item * (L * K) + ((n + r * NL) * M + g * CP), CP, 1),)
    scores_at = ()
    for turn in tl.static_range(TURNS):
        scores_at = scores_at + (scores + item * (L * L) + (g * CU + turn * NL + n),)
    x = _identity(g, M, R, G)
    for phase in tl.static_range(PHASES):
        x = _with_zeros(x, NEW * RM)
        for step in range(phase * NEW * G, (phase + 1) * NEW * G):
            valid = real & (step < steps) if MASKED else real
            a = _load_tiles(a_at, valid, RM * M, WIDE, LANES, MASKED)
            k = _load_tiles(k_at, valid, RM, WIDE, LANES, MASKED)
            q = _load_tiles(q_at, valid, RM, WIDE, LANES, MASKED)
            if HAS_RESET:
                flag = tl.load(flags_at + step, mask=valid, other=0)
                x = cleared(x, flag, (CP + (phase + 1) * NEW) * RM)
            x = _advanced(x, a, k, step, g, valid, M, R, G, CP + (phase + 1) * NEW, NEW, MASKED)
            _store_tiles(reads_at, _reads(x, q, M, R, CP), real, R * CP, CP, LANES)
            _store_scores(x, q, scores_at, n, lane, real, RM, CP, (phase + 1) * NEW, CU, NL)
            a_at, k_at = _moved(a_at, RM * M // WIDE, A_T), _moved(k_at, RM // WIDE, K_T)
            q_at, reads_at = _moved(q_at, RM // WIDE, Q_T), _moved(reads_at, R, K)
            scores_at = _moved(scores_at, TURNS, L)
    for r in tl.static_range(R):
        keys_at = keys + (item * L + g * CU) * K + (n + r * NL) * M
        for u in tl.static_range(CU):
            rows = ()
            for i in tl.static_range(M):
                rows = rows + (x[(CP + u) * RM + r * M + i],)
            _store_tile(_span(keys_at + u * K, M, 1), rows, real, M, LANES)
        block = ()
        for i in tl.static_range(M):
            for c in tl.static_range(CP):
                block = block + (x[c * RM + r * M + i],)
        whole_at = whole + (item * K + (n + r * NL) * M) * M + g * CP
        _store_tile(_whole_span(whole_at, M, CP), block, real, M * CP, LANES)


@triton.jit
def _gradients_at_the_end(
    d_whole, d_keys, item, n, g, real, K: tl.constexpr, M: tl.constexpr, R: tl.constexpr, NL: tl.constexpr,
    G: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """dL/dx after the last step."""
    CP: tl.constexpr = M // G
    CU: tl.constexpr = L // G
    blocks = ()
    for r in tl.static_range(R):
        whole_at = d_whole + (item * K + (n + r * NL) * M) * M + g * CP
        blocks = blocks + _tile(_whole_span(whole_at, M, CP), real, M * CP, LANES, True)
    s = ()
    for c in tl.static_range(CP):
        for e in tl.static_range(R * M):
            s = s + (blocks[e * CP + c],)
    for u in tl.static_range(CU):
        for r in tl.static_range(R):
            at = d_keys + (item * L + g * CU + u) * K + (n + r * NL) * M
            s = s + _tile(_span(at, M, 1), real, M, LANES, True)
    return s


@triton.jit
def _mixed_weights(
    x, weights, lane, M: tl.constexpr, R: tl.constexpr, NL: tl.constexpr, G: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of a lane's rows, in all groups: the weights' sum of the columns before the step."""
    mixed = ()
    for r in tl.static_range(R):
        for j in tl.static_range(M):
            total = x[r * M + j] * weights[r]
            for c in tl.static_range(1, COLUMNS):
                total = tl.fma(x[c * R * M + r * M + j], weights[c * R + r], total)
            mixed = mixed + (_sum_over(total, lane, NL, G),)
    return mixed


@triton.jit
def _by_column(
    s, x, mixed, dq, a_at, da_at, valid, lane, g, M: tl.constexpr, R: tl.constexpr, NL: tl.constexpr,
    G: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Stores dA = s x^T, of whose sums over all columns group g has the rows g M / G .. of each block;
    returns A^T s and dq + A mixed.

    A is read column by column: whole it would take all registers of a lane at M = 16.
    """
    RM: tl.constexpr = R * M
    WIDE: tl.constexpr = 4 if M > 4 else M
    by_row = ()  # of A^T s, flat [(row j R + block) COLUMNS + column]
    for j in tl.static_range(M):
        tiles = ()
        for e in tl.static_range(RM // WIDE):
            tiles = tiles + (a_at[j * (RM // WIDE) + e],)
        a = _load_tiles(tiles, valid, RM, WIDE, LANES, MASKED)
        more = ()
        for r in tl.static_range(R):
            rows = ()
            for i in tl.static_range(M):
                more = more + (tl.fma(a[r * M + i], mixed[r * M + j], dq[r * M + i]),)
                total = s[r * M + i] * x[r * M + j]
                for c in tl.static_range(1, COLUMNS):
                    total = tl.fma(s[c * RM + r * M + i], x[c * RM + r * M + j], total)
                rows = rows + (total,)
            _store_tile(da_at[j * R + r], _scattered(rows, lane, g, M, NL, G), valid, M // G, LANES)
            for c in tl.static_range(COLUMNS):
                total = a[r * M] * s[c * RM + r * M]
                for i in tl.static_range(1, M):
                    total = tl.fma(a[r * M + i], s[c * RM + r * M + i], total)
                if MASKED:
                    total = tl.where(valid, total, s[c * RM + r * M + j])
                by_row = by_row + (total,)
        dq = more
    before = ()
    for c in tl.static_range(COLUMNS):
        for r in tl.static_range(R):
            for j in tl.static_range(M):
                before = before + (by_row[(j * R + r) * COLUMNS + c],)
    return before, dq


@triton.jit
def _weights(
    reads_at, scores_at, real, R: tl.constexpr, CP: tl.constexpr, CU: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """What a step's outputs owe to q_t^T x, flat [column R + block]: dL/dreads, and dL/dscores for every
    block."""
    by_block = _load_tiles(reads_at, real, R * CP, CP, LANES, True)
    weights = ()
    for c in tl.static_range(CP):
        for r in tl.static_range(R):
            weights = weights + (by_block[r * CP + c],)
    shared = _tile(scores_at, real, CU, LANES, True)
    for u in tl.static_range(CU):
        for _ in tl.static_range(R):
            weights = weights + (shared[u],)
    return weights


@triton.jit
def _begun(values, step, g, COUNT: tl.constexpr, M: tl.constexpr, G: tl.constexpr, L: tl.constexpr):
    """Of COUNT values for each column, those of the column that begins at this step, zeros in other
    groups."""
    chosen = ()
    for e in tl.static_range(COUNT):
        value = tl.zeros_like(values[0])
        for u in tl.static_range(L // G):
            value = tl.where(u * G + g == step, values[(M // G + u) * COUNT + e], value)
        chosen = chosen + (value,)
    return chosen


@triton.jit
def _keep_columns(
    a_at, k_at, flags_at, x_at, g, real, steps, A_T: tl.constexpr, K_T: tl.constexpr, M: tl.constexpr,
    R: tl.constexpr, G: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr, MASKED: tl.constexpr,
    HAS_RESET: tl.constexpr,
):  # fmt: skip
    """Stores the columns before each step of a chunk, which has `steps` of them where MASKED."""
    RM: tl.constexpr = R * M
    WIDE: tl.constexpr = 4 if M > 4 else M
    COLUMNS: tl.constexpr = (M + L) // G
    x = _with_zeros(_identity(g, M, R, G), L // G * RM)
    for step in range(L):
        valid = real & (step < steps) if MASKED else real
        a = _load_tiles(a_at, valid, RM * M, WIDE, LANES, MASKED)
        k = _load_tiles(k_at, valid, RM, WIDE, LANES, MASKED)
        if HAS_RESET:
            x = cleared(x, tl.load(flags_at + step, mask=valid, other=0), COLUMNS * RM)
        _store_tiles(x_at, x, real, COLUMNS * RM, WIDE, LANES)
        x = _advanced(x, a, k, step, g, valid, M, R, G, COLUMNS, L // G, MASKED)
        a_at, k_at = _moved(a_at, RM * M // WIDE, A_T), _moved(k_at, RM // WIDE, K_T)
        x_at = _moved(x_at, COLUMNS * RM // WIDE, COLUMNS * RM * LANES)


@triton.jit
def _walk_back(
    s, a_at, k_at, q_at, flags_at, x_at, reads_at, scores_at, da_at, dk_at, dq_at, lane, g, real, steps,
    A_T: tl.constexpr, K_T: tl.constexpr, Q_T: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    M: tl.constexpr, R: tl.constexpr, NL: tl.constexpr, G: tl.constexpr, L: tl.constexpr,
    LANES: tl.constexpr, MASKED: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of all steps of a chunk, last to first, from dL/dx after it; tiles of pointers are
    to the last step."""
    RM: tl.constexpr = R * M
    WIDE: tl.constexpr = 4 if M > 4 else M
    COLUMNS: tl.constexpr = (M + L) // G
    for back in range(L):
        step = L - 1 - back
        valid = real & (step < steps) if MASKED else real
        k = _load_tiles(k_at, valid, RM, WIDE, LANES, MASKED)
        q = _load_tiles(q_at, valid, RM, WIDE, LANES, MASKED)
        x = _load_tiles(x_at, real, COLUMNS * RM, WIDE, LANES, True)
        weights = _weights(reads_at, scores_at, real, R, M // G, L // G, LANES)
        now = ()
        for c in tl.static_range(COLUMNS):
            for r in tl.static_range(R):
                for i in tl.static_range(M):
                    now = now + (tl.fma(q[r * M + i], weights[c * R + r], s[c * RM + r * M + i]),)
        dk = _begun(now, step, g, RM, M, G, L)
        _store_tiles(dk_at, dk, valid & (step % G == g), RM, WIDE, LANES)
        diagonal = _sum_over(_begun(weights, step, g, R, M, G, L)[0], lane, NL, G)
        dq = ()
        for e in tl.static_range(RM):
            dq = dq + (k[e] * diagonal,)
        mixed = _mixed_weights(x, weights, lane, M, R, NL, G, COLUMNS)
        s, dq = _by_column(
            now, x, mixed, dq, a_at, da_at, valid, lane, g, M, R, NL, G, COLUMNS, LANES, MASKED
        )  # fmt: skip
        _store_tiles(dq_at, dq, valid & (g == 0), RM, WIDE, LANES)
        if HAS_RESET:
            s = cleared(s, tl.load(flags_at + step, mask=valid, other=0), COLUMNS * RM)
        a_at, k_at = _moved(a_at, RM * M // WIDE, -A_T), _moved(k_at, RM // WIDE, -K_T)
        q_at, x_at = _moved(q_at, RM // WIDE, -Q_T), _moved(x_at, COLUMNS * RM // WIDE, -COLUMNS * RM * LANES)
        reads_at, scores_at = _moved(reads_at, R, -K), scores_at - L
        da_at = _moved(da_at, M * R, -M * H * K)
        dk_at, dq_at = _moved(dk_at, RM // WIDE, -H * K), _moved(dq_at, RM // WIDE, -H * K)


@triton.jit(do_not_specialize=["T", "n_chunks", "total", "work"])
def chunk_backward_kernel(
    transitions, writes, queries, flags, d_scores, d_reads, d_keys, d_whole, d_transitions, d_writes,
    d_queries, scratch, T, n_chunks, total, work, a_b, k_b, q_b,
    A_T: tl.constexpr, A_H: tl.constexpr, A_K: tl.constexpr, A_M: tl.constexpr,
    K_T: tl.constexpr, K_H: tl.constexpr, K_K: tl.constexpr,
    Q_T: tl.constexpr, Q_H: tl.constexpr, Q_K: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, M: tl.constexpr, R: tl.constexpr, NL: tl.constexpr, G: tl.constexpr,
    ITEMS: tl.constexpr, L: tl.constexpr, MASKED: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """Gradients of `chunk_forward_kernel`'s inputs from those of its outputs; states are computed again.

    Out: d_transitions (B, T, M, H, K), d_writes and d_queries (B, T, H, K), contiguous. A program goes
    through items one after another, with `scratch` (programs, L, columns R M LANES) for the columns before
    each step.
    """
    LANES: tl.constexpr = ITEMS * G * NL
    RM: tl.constexpr = R * M
    CP: tl.constexpr = M // G
    WIDE: tl.constexpr = 4 if M > 4 else M
    COLUMNS: tl.constexpr = (M + L) // G
    SLOT: tl.constexpr = COLUMNS * RM * LANES
    LAST: tl.constexpr = L - 1
    lane = tl.arange(0, LANES)
    for index in range(tl.program_id(0), work, tl.num_programs(0)):
        n, g, item, real, b, chunk, head = _places(index, total, n_chunks, H, NL, G, ITEMS)
        t0 = wide(chunk * L)
        a_at = transitions + b * a_b + t0 * A_T + (head * A_H + n * (M * A_K))
        k_at = writes + b * k_b + t0 * K_T + (head * K_H + n * (M * K_K))
        q_at = queries + b * q_b + t0 * Q_T + (head * Q_H + n * (M * Q_K))
        flags_at = flags + b * T + t0 if HAS_RESET else flags
        own = scratch + wide(tl.program_id(0)) * (L * SLOT) + lane * WIDE
        x_at, x_last = (), ()
        for j in tl.static_range(COLUMNS * RM // WIDE):
            x_at = x_at + (_span(own + j * WIDE * LANES, WIDE, 1),)
            x_last = x_last + (_span(own + (LAST * SLOT + j * WIDE * LANES), WIDE, 1),)
        _keep_columns(
            _plane_tiles(a_at, M, R, A_K, A_M, NL * M * A_K), _row_tiles(k_at, M, R, K_K, NL * M * K_K),
            flags_at, x_at, g, real, T - t0, A_T, K_T, M, R, G, L, LANES, MASKED, HAS_RESET,
        )  # fmt: skip
        tl.debug_barrier()  # what was stored is loaded, perhaps by another lane
        step = b * T + t0 + LAST
        reads_at, da_at = (), ()
        for r in tl.static_range(R):
            at = d_reads + (item * L + LAST) * K + ((n + r * NL) * M + g * CP)
            reads_at = reads_at + (_span(at, CP, 1),)
        for j in tl.static_range(M):
            for r in tl.static_range(R):
                at = d_transitions + (step * M + j) * (H * K) + (head * K + (n + r * NL) * M + g * CP)
                da_at = da_at + (_span(at, CP, 1),)
        scores_at = _span(d_scores + item * (L * L) + (LAST * L + g * (L // G)), L // G, 1)
        rows_at = step * (H * K) + (head * K + n * M)
        _walk_back(
            _gradients_at_the_end(d_whole, d_keys, item, n, g, real, K, M, R, NL, G, L, LANES),
            _plane_tiles(a_at + LAST * A_T, M, R, A_K, A_M, NL * M * A_K),
            _row_tiles(k_at + LAST * K_T, M, R, K_K, NL * M * K_K),
            _row_tiles(q_at + LAST * Q_T, M, R, Q_K, NL * M * Q_K), flags_at, x_last, reads_at, scores_at,
            da_at, _row_tiles(d_writes + rows_at, M, R, 1, NL * M),
            _row_tiles(d_queries + rows_at, M, R, 1, NL * M), lane, g, real, T - t0,
            A_T, K_T, Q_T, H, K, M, R, NL, G, L, LANES, MASKED, HAS_RESET,
        )  # fmt: skip
        tl.debug_barrier()


settle_cache_keys(globals())
