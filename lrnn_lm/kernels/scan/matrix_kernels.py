"""The matrix-valued BD-LRU in Triton, within chunks of L steps: what a chunk does to any state and values.

S is linear in the state before the chunk, S_0, and in its values v_1 .. v_L:

    S_t = P_t S_0 + sum_{s <= t} u_{t,s} v_s^T       P_t = A_t .. A_1      u_{t,s} = A_t .. A_{s+1} k_s
    y_t = S_0^T (P_t^T q_t) + sum_s (q_t . u_{t,s}) v_s

So a scan of M + L columns, P_t and u_{t,.}, replaces one of V columns, and the rest is products of small
matrices on tensor cores (`matrix_state_kernels.py`). The scan's columns give

    reads    P_t^T q_t       how a query sees S_0
    scores   q_t . u_{t,s}   the weight of each value in each output
    keys     u_{L,s}         the weight of each value in the state after the chunk
    whole    P_L

No inverse is taken, products of A stay bounded, and all chunks run side by side.

A lane owns R blocks of M rows, in M / G of the columns of P and L / G of those of u. The NL lanes of a head's
blocks are neighbours, G groups of them share the columns, and a program takes several small heads. Columns of
u are zero before their step, so they join the scan as they begin, in PHASES groups.

Where writes erase (`matrix_erase_kernels.py`), erased keys are a second set of queries of the same columns.

Legend: B batch, T time, H heads, K slots a head, M slots a block, L steps a chunk, C chunks; an item is a
chunk of a head, numbered over (B, C, H). Column l of u belongs to step `step_of_column(l)`. Lane blocks are
[LANES]; x, the columns of a lane, is flat [column R M + row].
"""

import triton
import triton.language as tl

from ..triton_device import settle_cache_keys
from .triton_rows import as_int64, join_columns, split_columns, sum_of_lanes, zero_at_reset


@triton.jit
def step_of_column(column, L: tl.constexpr, G: tl.constexpr):
    """The step whose write is column `column` of u."""
    # Groups take turns by step, so that all of them get new columns at the same rate.
    return column % (L // G) * G + column // (L // G)


@triton.jit
def places(
    index, total, n_chunks, H: tl.constexpr, NL: tl.constexpr, G: tl.constexpr, ITEMS: tl.constexpr
):  # fmt: skip
    """[LANES] each: first block, group, item, whether the item is real, b, chunk, head."""
    lane = tl.arange(0, ITEMS * G * NL)
    item = index * ITEMS + lane // (G * NL)
    real = item < total
    item = tl.minimum(item, total - 1)  # lanes past the last item recompute it, and store nothing
    b, chunk = as_int64(item // H // n_chunks), item // H % n_chunks
    return lane % NL, lane // NL % G, as_int64(item), real, b, chunk, item % H


@triton.jit
def load_tile(at, mask, COUNT: tl.constexpr, LANES: tl.constexpr, MASKED: tl.constexpr):
    """COUNT lane blocks in fp32 from pointers [LANES, COUNT]; zeros where masked."""
    # Whole chunks and items need no mask; without one the load has no predicate.
    return split_columns(tl.load(at, mask=mask[:, None], other=0.0) if MASKED else tl.load(at), LANES, COUNT)


@triton.jit
def store_tile(at, parts, mask, COUNT: tl.constexpr, LANES: tl.constexpr):
    """The inverse of `load_tile`, rounded to the dtype of the memory."""
    tile = join_columns(parts, at.dtype.element_ty, LANES, COUNT)
    tl.store(at, tl.reshape(tile, [LANES, COUNT]), mask=mask[:, None])


@triton.jit
def span(at, COUNT: tl.constexpr, S: tl.constexpr):
    """Pointers [LANES, COUNT] to COUNT numbers S apart from each of `at`."""
    return at[:, None] + tl.arange(0, COUNT)[None, :] * S


@triton.jit
def row_tiles(at, M: tl.constexpr, R: tl.constexpr, S: tl.constexpr, NEXT: tl.constexpr):
    """Pointers to the R M rows of a lane, in tiles [LANES, WIDE]; rows are S apart, blocks NEXT apart."""
    # Four numbers of fp32 are 16 bytes, the widest load of a lane.
    WIDE: tl.constexpr = 4 if M > 4 else M
    tiles = ()
    for r in tl.static_range(R):
        for part in tl.static_range(M // WIDE):
            tiles = tiles + (span(at + (r * NEXT + part * WIDE * S), WIDE, S),)
    return tiles


@triton.jit
def plane_tiles(
    at, M: tl.constexpr, R: tl.constexpr, A_K: tl.constexpr, A_M: tl.constexpr, NEXT: tl.constexpr
):  # fmt: skip
    """Pointers to A_t of a lane's blocks, column after column: R M M / WIDE tiles [LANES, WIDE]."""
    tiles = ()
    for j in tl.static_range(M):
        tiles = tiles + row_tiles(at + j * A_M, M, R, A_K, NEXT)
    return tiles


@triton.jit
def load_tiles(tiles, mask, COUNT: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr,
                MASKED: tl.constexpr):  # fmt: skip
    """COUNT lane blocks, in the order of the tiles."""
    blocks = ()
    for j in tl.static_range(COUNT // WIDE):
        blocks = blocks + load_tile(tiles[j], mask, WIDE, LANES, MASKED)
    return blocks


@triton.jit
def store_tiles(tiles, blocks, mask, COUNT: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr):
    for j in tl.static_range(COUNT // WIDE):
        store_tile(tiles[j], blocks[j * WIDE : (j + 1) * WIDE], mask, WIDE, LANES)


@triton.jit
def advance(tiles, COUNT: tl.constexpr, by: tl.constexpr):
    """COUNT tiles of pointers, `by` numbers on."""
    # Pointers are carried from step to step by the loop. Triton's coalescing pass follows all that depends on
    # a pointer computed in place; at M = 16 that took half an hour to compile.
    after = ()
    for j in tl.static_range(COUNT):
        after = after + (tiles[j] + by,)
    return after


@triton.jit
def identity(g, M: tl.constexpr, R: tl.constexpr, G: tl.constexpr):
    """The columns of P before the first step: the identity's."""
    x = ()
    for c in tl.static_range(M // G):
        for _ in tl.static_range(R):
            for i in tl.static_range(M):
                x = x + (tl.where(g * (M // G) + c == i, 1.0, 0.0),)
    return x


@triton.jit
def step_columns(
    x, a, k, step, g, valid, M: tl.constexpr, R: tl.constexpr, G: tl.constexpr, COLUMNS: tl.constexpr,
    NEW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A x + k e_t^T of COLUMNS columns, of which k can begin in the last NEW."""
    RM: tl.constexpr = R * M
    after = ()
    for c in tl.static_range(COLUMNS):
        begins = (c - M // G) * G + g == step  # [LANES]: whether this is the column of u of this step
        for r in tl.static_range(R):
            for i in tl.static_range(M):
                total = a[r * M + i] * x[c * RM + r * M]  # a is flat [column j R M + row]
                for j in tl.static_range(1, M):
                    total = tl.fma(a[j * RM + r * M + i], x[c * RM + r * M + j], total)
                if c >= COLUMNS - NEW:  # columns of earlier phases have begun already
                    total += tl.where(begins, k[r * M + i], 0.0)
                if MASKED:  # steps from T on leave the columns as they are
                    total = tl.where(valid, total, x[c * RM + r * M + i])
                after = after + (total,)
    return after


@triton.jit
def _reads(x, q, M: tl.constexpr, R: tl.constexpr, CP: tl.constexpr):
    """P_t^T q_t, R CP lane blocks: for each block of a lane, its CP columns."""
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
    """Stores q_t . u_{t,s} of the ACTIVE columns from FIRST on, and zeros for the rest of CU columns."""
    # Every lane has the sum of every column; lane n stores those of columns n, n + NL, ..: one wide store a
    # turn.
    for turn in tl.static_range((CU + NL - 1) // NL):
        own = tl.zeros_like(x[0])
        for u in tl.static_range(turn * NL, turn * NL + NL):
            if u < ACTIVE:
                total = q[0] * x[(FIRST + u) * RM]
                for e in tl.static_range(1, RM):
                    total = tl.fma(q[e], x[(FIRST + u) * RM + e], total)
                own = tl.where(n == u - turn * NL, sum_of_lanes(total, lane, 1, NL), own)
        tl.store(tiles[turn], own.to(tiles[turn].dtype.element_ty), mask=real & (turn * NL + n < CU))


@triton.jit
def reads_tiles(
    reads, item, n, g, K: tl.constexpr, M: tl.constexpr, R: tl.constexpr, NL: tl.constexpr, CP: tl.constexpr,
    L: tl.constexpr,
):  # fmt: skip
    """Pointers to the first step's reads in (B, C, H, L, K): R tiles [LANES, CP]."""
    tiles = ()
    for r in tl.static_range(R):
        tiles = tiles + (span(reads + item * (L * K) + ((n + r * NL) * M + g * CP), CP, 1),)
    return tiles


@triton.jit
def _scores_tiles(
    scores, item, n, g, NL: tl.constexpr, CU: tl.constexpr, TURNS: tl.constexpr, L: tl.constexpr
):
    """Pointers to the first step's scores: TURNS tiles [LANES]."""
    tiles = ()
    for turn in tl.static_range(TURNS):
        tiles = tiles + (scores + item * (L * L) + (g * CU + turn * NL + n),)
    return tiles


@triton.jit
def whole_span(at, M: tl.constexpr, CP: tl.constexpr):
    """Pointers [LANES, M CP] to M rows and CP columns of a block of P, whose rows are M numbers long."""
    e = tl.arange(0, M * CP)[None, :]
    return at[:, None] + (e // CP * M + e % CP)


@triton.jit(do_not_specialize=["T", "n_chunks", "total"])
def chunk_forward_kernel(
    transitions, writes, queries, erased, flags, scores, reads, keys, whole, erased_scores, erased_reads, T,
    n_chunks, total, a_b, k_b, q_b, e_b,
    A_T: tl.constexpr, A_H: tl.constexpr, A_K: tl.constexpr, A_M: tl.constexpr,
    K_T: tl.constexpr, K_H: tl.constexpr, K_K: tl.constexpr,
    Q_T: tl.constexpr, Q_H: tl.constexpr, Q_K: tl.constexpr,
    E_T: tl.constexpr, E_H: tl.constexpr, E_K: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, M: tl.constexpr, R: tl.constexpr, NL: tl.constexpr, G: tl.constexpr,
    ITEMS: tl.constexpr, L: tl.constexpr, MASKED: tl.constexpr, HAS_RESET: tl.constexpr,
    ERASES: tl.constexpr, PHASES: tl.constexpr,
):  # fmt: skip
    """Scans the columns of a chunk and stores what they give, see above.

    transitions (B, T, H, K, M), writes, queries and erased (B, T, H, K) of any strides, flags (B, T) int32,
    nonzero where a document starts; out, contiguous: scores (B, C, H, L, L) by step and column, reads
    (B, C, H, L, K) by step, keys (B, C, H, L, K) by column, whole (B, C, H, K, M) fp32, and with ERASES the
    scores and reads of `erased`.
    """
    LANES: tl.constexpr = ITEMS * G * NL
    RM: tl.constexpr = R * M
    WIDE: tl.constexpr = 4 if M > 4 else M
    CP: tl.constexpr = M // G  # columns of P a lane
    CU: tl.constexpr = L // G  # columns of u a lane
    NEW: tl.constexpr = CU // PHASES
    TURNS: tl.constexpr = (CU + NL - 1) // NL  # stores of scores a step
    n, g, item, real, b, chunk, head = places(tl.program_id(0), total, n_chunks, H, NL, G, ITEMS)
    lane = tl.arange(0, LANES)
    t0 = as_int64(chunk * L)
    steps = T - t0
    # Tiles of pointers to the first step; `advance` takes them on.
    a_at = plane_tiles(
        transitions + b * a_b + t0 * A_T + (head * A_H + n * (M * A_K)), M, R, A_K, A_M, NL * M * A_K
    )  # fmt: skip
    k_at = row_tiles(writes + b * k_b + t0 * K_T + (head * K_H + n * (M * K_K)), M, R, K_K, NL * M * K_K)
    q_at = row_tiles(queries + b * q_b + t0 * Q_T + (head * Q_H + n * (M * Q_K)), M, R, Q_K, NL * M * Q_K)
    flags_at = flags + b * T + t0 if HAS_RESET else flags
    reads_at = reads_tiles(reads, item, n, g, K, M, R, NL, CP, L)
    scores_at = _scores_tiles(scores, item, n, g, NL, CU, TURNS, L)
    if ERASES:
        e_at = erased + b * e_b + t0 * E_T + (head * E_H + n * (M * E_K))
        e_at = row_tiles(e_at, M, R, E_K, NL * M * E_K)
        erased_reads_at = reads_tiles(erased_reads, item, n, g, K, M, R, NL, CP, L)
        erased_scores_at = _scores_tiles(erased_scores, item, n, g, NL, CU, TURNS, L)
    x = identity(g, M, R, G)
    # PHASES copies of the loop: a column costs nothing before the phase in which it begins. In one loop half
    # of the work on u would be on zeros.
    for phase in tl.static_range(PHASES):
        x = x + (tl.zeros_like(x[0]),) * (NEW * RM)
        for step in range(phase * NEW * G, (phase + 1) * NEW * G):
            valid = real & (step < steps) if MASKED else real
            a = load_tiles(a_at, valid, RM * M, WIDE, LANES, MASKED)  # [column j R M + row]
            k = load_tiles(k_at, valid, RM, WIDE, LANES, MASKED)  # [row]
            q = load_tiles(q_at, valid, RM, WIDE, LANES, MASKED)  # [row]
            if HAS_RESET:  # nothing from before the document reaches what is after it
                flag = tl.load(flags_at + step, mask=valid, other=0)
                x = zero_at_reset(x, flag, (CP + (phase + 1) * NEW) * RM)
            x = step_columns(x, a, k, step, g, valid, M, R, G, CP + (phase + 1) * NEW, NEW, MASKED)
            store_tiles(reads_at, _reads(x, q, M, R, CP), real, R * CP, CP, LANES)
            _store_scores(x, q, scores_at, n, lane, real, RM, CP, (phase + 1) * NEW, CU, NL)
            if ERASES:
                e = load_tiles(e_at, valid, RM, WIDE, LANES, MASKED)  # [row]
                store_tiles(erased_reads_at, _reads(x, e, M, R, CP), real, R * CP, CP, LANES)
                _store_scores(x, e, erased_scores_at, n, lane, real, RM, CP, (phase + 1) * NEW, CU, NL)
                e_at = advance(e_at, RM // WIDE, E_T)
                erased_reads_at = advance(erased_reads_at, R, K)
                erased_scores_at = advance(erased_scores_at, TURNS, L)
            a_at, k_at = advance(a_at, RM * M // WIDE, A_T), advance(k_at, RM // WIDE, K_T)
            q_at, reads_at = advance(q_at, RM // WIDE, Q_T), advance(reads_at, R, K)
            scores_at = advance(scores_at, TURNS, L)
    # After the last step the columns themselves are what the state needs: keys and whole.
    for r in tl.static_range(R):
        keys_at = keys + (item * L + g * CU) * K + (n + r * NL) * M
        for u in tl.static_range(CU):
            rows = x[(CP + u) * RM + r * M : (CP + u) * RM + (r + 1) * M]
            store_tile(span(keys_at + u * K, M, 1), rows, real, M, LANES)
        block = ()  # M rows of CP columns
        for i in tl.static_range(M):
            block = block + x[r * M + i : CP * RM : RM]
        whole_at = whole + (item * K + (n + r * NL) * M) * M + g * CP
        store_tile(whole_span(whole_at, M, CP), block, real, M * CP, LANES)


settle_cache_keys(globals())
