"""The backward pass of `matrix_kernels.py`: gradients of a chunk's transitions, writes, queries, erased keys.

The columns x before each step are computed again and kept in scratch memory, then the steps are walked from
the last to the first with s = dL/dx. Legend and layout of lanes are those of `matrix_kernels.py`.
"""

import triton
import triton.language as tl

from ..triton_device import settle_cache_keys
from .matrix_kernels import (
    advance,
    identity,
    load_tile,
    load_tiles,
    places,
    plane_tiles,
    reads_tiles,
    row_tiles,
    span,
    step_columns,
    store_tile,
    store_tiles,
    whole_span,
)
from .triton_rows import as_int64, halve, sum_of_lanes, zero_at_reset


@triton.jit
def _scattered(x, lane, g, M: tl.constexpr, FIRST: tl.constexpr, G: tl.constexpr):
    """Group g receives the sums over all groups of x[g M / G ..], M / G of them."""
    for level in tl.static_range(4):
        if (G >> level) > 1:
            upper = (g & (G >> (level + 1))) != 0
            x = halve(x, lane, upper, M >> (level + 1), FIRST * (G >> (level + 1)))
    return x


@triton.jit
def _gradients_at_the_end(
    d_whole, d_keys, item, n, g, real, K: tl.constexpr, M: tl.constexpr, R: tl.constexpr, NL: tl.constexpr,
    G: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """dL/dx after the last step, flat as x: the gradients of whole and of keys."""
    CP: tl.constexpr = M // G
    CU: tl.constexpr = L // G
    blocks = ()
    for r in tl.static_range(R):
        whole_at = d_whole + (item * K + (n + r * NL) * M) * M + g * CP
        blocks = blocks + load_tile(whole_span(whole_at, M, CP), real, M * CP, LANES, True)
    s = ()
    for c in tl.static_range(CP):  # memory has rows of columns, x has columns of rows
        s = s + blocks[c::CP]
    for u in tl.static_range(CU):
        for r in tl.static_range(R):
            at = d_keys + (item * L + g * CU + u) * K + (n + r * NL) * M
            s = s + load_tile(span(at, M, 1), real, M, LANES, True)
    return s


@triton.jit
def _mixed_weights(
    x, weights, lane, M: tl.constexpr, R: tl.constexpr, NL: tl.constexpr, G: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """R M lane blocks: a lane's rows of x weights, summed over the columns of all groups."""
    mixed = ()
    for r in tl.static_range(R):
        for j in tl.static_range(M):
            total = x[r * M + j] * weights[r]
            for c in tl.static_range(1, COLUMNS):
                total = tl.fma(x[c * R * M + r * M + j], weights[c * R + r], total)
            mixed = mixed + (sum_of_lanes(total, lane, NL, G),)
    return mixed


@triton.jit
def _by_column(
    s, x, mixed, dq, a_at, da_at, valid, lane, g, M: tl.constexpr, R: tl.constexpr, NL: tl.constexpr,
    G: tl.constexpr, COLUMNS: tl.constexpr, SETS: tl.constexpr, LANES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Stores dA = s x^T; returns A^T s, flat as x, and dq + A mixed of each set of queries, flat [row]."""
    # A is read column by column: whole, it would take all registers of a lane at M = 16.
    RM: tl.constexpr = R * M
    WIDE: tl.constexpr = 4 if M > 4 else M
    by_row = ()  # A^T s, flat [(row j R + block) COLUMNS + column]
    for j in tl.static_range(M):
        tiles = a_at[j * (RM // WIDE) : (j + 1) * (RM // WIDE)]
        a = load_tiles(tiles, valid, RM, WIDE, LANES, MASKED)  # column j of every block, [row]
        more = ()
        for q in tl.static_range(SETS):
            for e in tl.static_range(RM):
                more = more + (tl.fma(a[e], mixed[q * RM + e // M * M + j], dq[q * RM + e]),)
        for r in tl.static_range(R):
            rows = ()
            for i in tl.static_range(M):
                total = s[r * M + i] * x[r * M + j]
                for c in tl.static_range(1, COLUMNS):
                    total = tl.fma(s[c * RM + r * M + i], x[c * RM + r * M + j], total)
                rows = rows + (total,)
            # dA sums over the columns of all groups; group g stores rows g M / G .. of each block.
            store_tile(da_at[j * R + r], _scattered(rows, lane, g, M, NL, G), valid, M // G, LANES)
            for c in tl.static_range(COLUMNS):
                total = a[r * M] * s[c * RM + r * M]
                for i in tl.static_range(1, M):
                    total = tl.fma(a[r * M + i], s[c * RM + r * M + i], total)
                if MASKED:  # steps from T on hand s back unchanged
                    total = tl.where(valid, total, s[c * RM + r * M + j])
                by_row = by_row + (total,)
        dq = more
    before = ()  # the same numbers in the order of x
    for c in tl.static_range(COLUMNS):
        for r in tl.static_range(R):
            for j in tl.static_range(M):
                before = before + (by_row[(j * R + r) * COLUMNS + c],)
    return before, dq


@triton.jit
def _weights(
    reads_at, scores_at, real, R: tl.constexpr, CP: tl.constexpr, CU: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """dL/d(q_t^T x), flat [column R + block]: dL/dreads of P's columns, dL/dscores of u's for every block."""
    by_block = load_tiles(reads_at, real, R * CP, CP, LANES, True)
    weights = ()  # by column, as x is
    for c in tl.static_range(CP):
        weights = weights + by_block[c::CP]
    shared = load_tile(scores_at, real, CU, LANES, True)
    for u in tl.static_range(CU):  # a score is a sum over all blocks, so each gets its gradient
        weights = weights + (shared[u],) * R
    return weights


@triton.jit
def _column_of_step(values, step, g, COUNT: tl.constexpr, M: tl.constexpr, G: tl.constexpr, L: tl.constexpr):
    """COUNT lane blocks: the values of the column that begins at this step; zeros in groups without it."""
    chosen = ()
    for e in tl.static_range(COUNT):
        value = tl.zeros_like(values[0])
        for u in tl.static_range(L // G):
            value = tl.where(u * G + g == step, values[(M // G + u) * COUNT + e], value)
        chosen = chosen + (value,)
    return chosen


@triton.jit
def _add_products(s, q, weights, M: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr):
    """s + q weights, flat as x: what comes back from the outputs of a step."""
    RM: tl.constexpr = R * M
    total = ()
    for c in tl.static_range(COLUMNS):
        for r in tl.static_range(R):
            for i in tl.static_range(M):
                total = total + (tl.fma(q[r * M + i], weights[c * R + r], s[c * RM + r * M + i]),)
    return total


@triton.jit
def _by_query(
    x, k, weights, step, lane, g, M: tl.constexpr, R: tl.constexpr, NL: tl.constexpr, G: tl.constexpr,
    L: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`_mixed_weights`, and what of dq is from the column that begins at this step; R M lane blocks each."""
    # q_t also meets k_t itself, in the column that begins here: dq = k_t dL/dscore_tt + A x weights.
    diagonal = sum_of_lanes(_column_of_step(weights, step, g, R, M, G, L)[0], lane, NL, G)
    own = ()
    for e in tl.static_range(R * M):
        own = own + (k[e] * diagonal,)
    return _mixed_weights(x, weights, lane, M, R, NL, G, COLUMNS), own


@triton.jit
def _keep_columns(
    a_at, k_at, flags_at, x_at, g, real, steps, A_T: tl.constexpr, K_T: tl.constexpr, M: tl.constexpr,
    R: tl.constexpr, G: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr, MASKED: tl.constexpr,
    HAS_RESET: tl.constexpr,
):  # fmt: skip
    """Stores the columns x before each step of a chunk at x_at; where MASKED it has `steps` steps."""
    # Recomputing beats saving them in the forward pass: (M + L) K numbers a step would be more traffic than
    # all inputs together. The scratch is one chunk a program and stays in the L2 cache.
    RM: tl.constexpr = R * M
    WIDE: tl.constexpr = 4 if M > 4 else M
    COLUMNS: tl.constexpr = (M + L) // G
    x = identity(g, M, R, G)
    x = x + (tl.zeros_like(x[0]),) * (L // G * RM)
    for step in range(L):
        valid = real & (step < steps) if MASKED else real
        a = load_tiles(a_at, valid, RM * M, WIDE, LANES, MASKED)
        k = load_tiles(k_at, valid, RM, WIDE, LANES, MASKED)
        if HAS_RESET:
            x = zero_at_reset(x, tl.load(flags_at + step, mask=valid, other=0), COLUMNS * RM)
        store_tiles(x_at, x, real, COLUMNS * RM, WIDE, LANES)
        x = step_columns(x, a, k, step, g, valid, M, R, G, COLUMNS, L // G, MASKED)
        a_at, k_at = advance(a_at, RM * M // WIDE, A_T), advance(k_at, RM // WIDE, K_T)
        x_at = advance(x_at, COLUMNS * RM // WIDE, COLUMNS * RM * LANES)


@triton.jit
def _walk_back(
    s, a_at, k_at, q_at, e_at, flags_at, x_at, reads_at, scores_at, erased_reads_at, erased_scores_at, da_at,
    dk_at, dq_at, de_at, lane, g, real, steps,
    A_T: tl.constexpr, K_T: tl.constexpr, Q_T: tl.constexpr, E_T: tl.constexpr, H: tl.constexpr,
    K: tl.constexpr, M: tl.constexpr, R: tl.constexpr, NL: tl.constexpr, G: tl.constexpr, L: tl.constexpr,
    LANES: tl.constexpr, MASKED: tl.constexpr, HAS_RESET: tl.constexpr, ERASES: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of all steps of a chunk, last to first, from s = dL/dx after it.

    All tiles of pointers point to the chunk's last step.
    """
    RM: tl.constexpr = R * M
    WIDE: tl.constexpr = 4 if M > 4 else M
    COLUMNS: tl.constexpr = (M + L) // G
    for back in range(L):
        step = L - 1 - back
        valid = real & (step < steps) if MASKED else real
        k = load_tiles(k_at, valid, RM, WIDE, LANES, MASKED)  # [row]
        q = load_tiles(q_at, valid, RM, WIDE, LANES, MASKED)  # [row]
        x = load_tiles(x_at, real, COLUMNS * RM, WIDE, LANES, True)  # [column R M + row]
        weights = _weights(reads_at, scores_at, real, R, M // G, L // G, LANES)
        # s of this step: what comes back from later steps, and from its own outputs
        now = _add_products(s, q, weights, M, R, COLUMNS)
        mixed, dq = _by_query(x, k, weights, step, lane, g, M, R, NL, G, L, COLUMNS)
        if ERASES:
            e = load_tiles(e_at, valid, RM, WIDE, LANES, MASKED)  # [row]
            weights = _weights(erased_reads_at, erased_scores_at, real, R, M // G, L // G, LANES)
            now = _add_products(now, e, weights, M, R, COLUMNS)
            more_mixed, de = _by_query(x, k, weights, step, lane, g, M, R, NL, G, L, COLUMNS)
            mixed, dq = mixed + more_mixed, dq + de
        dk = _column_of_step(now, step, g, RM, M, G, L)
        store_tiles(dk_at, dk, valid & (step % G == g), RM, WIDE, LANES)  # by the group that has the column
        s, dq = _by_column(
            now, x, mixed, dq, a_at, da_at, valid, lane, g, M, R, NL, G, COLUMNS, 1 + ERASES, LANES, MASKED
        )  # fmt: skip
        store_tiles(dq_at, dq[:RM], valid & (g == 0), RM, WIDE, LANES)  # alike in all groups
        if ERASES:
            store_tiles(de_at, dq[RM:], valid & (g == 0), RM, WIDE, LANES)
            e_at, de_at = advance(e_at, RM // WIDE, -E_T), advance(de_at, RM // WIDE, -H * K)
            erased_reads_at, erased_scores_at = advance(erased_reads_at, R, -K), erased_scores_at - L
        if HAS_RESET:  # no gradient crosses the start of a document
            s = zero_at_reset(s, tl.load(flags_at + step, mask=valid, other=0), COLUMNS * RM)
        a_at, k_at = advance(a_at, RM * M // WIDE, -A_T), advance(k_at, RM // WIDE, -K_T)
        q_at = advance(q_at, RM // WIDE, -Q_T)
        x_at = advance(x_at, COLUMNS * RM // WIDE, -COLUMNS * RM * LANES)
        reads_at, scores_at = advance(reads_at, R, -K), scores_at - L
        da_at = advance(da_at, M * R, -M * H * K)
        dk_at, dq_at = advance(dk_at, RM // WIDE, -H * K), advance(dq_at, RM // WIDE, -H * K)


@triton.jit(do_not_specialize=["T", "n_chunks", "total", "work"])
def chunk_backward_kernel(
    transitions, writes, queries, erased, flags, d_scores, d_reads, d_keys, d_whole, d_erased_scores,
    d_erased_reads, d_transitions, d_writes, d_queries, d_erased, scratch, T, n_chunks, total, work, a_b, k_b,
    q_b, e_b,
    A_T: tl.constexpr, A_H: tl.constexpr, A_K: tl.constexpr, A_M: tl.constexpr,
    K_T: tl.constexpr, K_H: tl.constexpr, K_K: tl.constexpr,
    Q_T: tl.constexpr, Q_H: tl.constexpr, Q_K: tl.constexpr,
    E_T: tl.constexpr, E_H: tl.constexpr, E_K: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, M: tl.constexpr, R: tl.constexpr, NL: tl.constexpr, G: tl.constexpr,
    ITEMS: tl.constexpr, L: tl.constexpr, MASKED: tl.constexpr, HAS_RESET: tl.constexpr,
    ERASES: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs of `chunk_forward_kernel` from those of its outputs; columns are recomputed.

    Out: d_transitions (B, T, M, H, K), d_writes, d_queries and d_erased (B, T, H, K), contiguous. scratch
    (programs, L, columns R M LANES) holds a program's columns before each step.
    """
    LANES: tl.constexpr = ITEMS * G * NL
    RM: tl.constexpr = R * M
    CP: tl.constexpr = M // G
    WIDE: tl.constexpr = 4 if M > 4 else M
    COLUMNS: tl.constexpr = (M + L) // G
    SLOT: tl.constexpr = COLUMNS * RM * LANES  # numbers of scratch a step
    LAST: tl.constexpr = L - 1
    lane = tl.arange(0, LANES)
    # A program takes items one after another, so that scratch is as large as the device, not as the batch.
    for index in range(tl.program_id(0), work, tl.num_programs(0)):
        n, g, item, real, b, chunk, head = places(index, total, n_chunks, H, NL, G, ITEMS)
        t0 = as_int64(chunk * L)
        a_at = transitions + b * a_b + t0 * A_T + (head * A_H + n * (M * A_K))
        k_at = writes + b * k_b + t0 * K_T + (head * K_H + n * (M * K_K))
        q_at = queries + b * q_b + t0 * Q_T + (head * Q_H + n * (M * Q_K))
        flags_at = flags + b * T + t0 if HAS_RESET else flags
        # Lanes side by side in scratch, WIDE numbers each: loads and stores of 16 bytes.
        own = scratch + as_int64(tl.program_id(0)) * (L * SLOT) + lane * WIDE
        x_at, x_last = (), ()
        for j in tl.static_range(COLUMNS * RM // WIDE):
            x_at = x_at + (span(own + j * WIDE * LANES, WIDE, 1),)
            x_last = x_last + (span(own + (LAST * SLOT + j * WIDE * LANES), WIDE, 1),)
        _keep_columns(
            plane_tiles(a_at, M, R, A_K, A_M, NL * M * A_K), row_tiles(k_at, M, R, K_K, NL * M * K_K),
            flags_at, x_at, g, real, T - t0, A_T, K_T, M, R, G, L, LANES, MASKED, HAS_RESET,
        )  # fmt: skip
        tl.debug_barrier()  # scratch is read back, perhaps by another lane than the one that wrote it
        step = b * T + t0 + LAST
        da_at = ()
        for j in tl.static_range(M):
            for r in tl.static_range(R):
                at = d_transitions + (step * M + j) * (H * K) + (head * K + (n + r * NL) * M + g * CP)
                da_at = da_at + (span(at, CP, 1),)
        last_score = item * (L * L) + (LAST * L + g * (L // G))
        reads_at = reads_tiles(d_reads + LAST * K, item, n, g, K, M, R, NL, CP, L)
        scores_at = span(d_scores + last_score, L // G, 1)
        rows_at = step * (H * K) + (head * K + n * M)
        dq_at = row_tiles(d_queries + rows_at, M, R, 1, NL * M)
        if ERASES:
            e_at = erased + b * e_b + t0 * E_T + (head * E_H + n * (M * E_K))
            e_at = row_tiles(e_at + LAST * E_T, M, R, E_K, NL * M * E_K)
            erased_reads_at = reads_tiles(d_erased_reads + LAST * K, item, n, g, K, M, R, NL, CP, L)
            erased_scores_at = span(d_erased_scores + last_score, L // G, 1)
            de_at = row_tiles(d_erased + rows_at, M, R, 1, NL * M)
        else:  # not read
            e_at, erased_reads_at, erased_scores_at, de_at = dq_at, reads_at, scores_at, dq_at
        _walk_back(
            _gradients_at_the_end(d_whole, d_keys, item, n, g, real, K, M, R, NL, G, L, LANES),
            plane_tiles(a_at + LAST * A_T, M, R, A_K, A_M, NL * M * A_K),
            row_tiles(k_at + LAST * K_T, M, R, K_K, NL * M * K_K),
            row_tiles(q_at + LAST * Q_T, M, R, Q_K, NL * M * Q_K), e_at, flags_at, x_last, reads_at,
            scores_at, erased_reads_at, erased_scores_at, da_at,
            row_tiles(d_writes + rows_at, M, R, 1, NL * M), dq_at, de_at, lane, g, real, T - t0,
            A_T, K_T, Q_T, E_T, H, K, M, R, NL, G, L, LANES, MASKED, HAS_RESET, ERASES,
        )  # fmt: skip
        tl.debug_barrier()  # before the next item overwrites scratch


settle_cache_keys(globals())
