"""H-LRU in Triton: fused forward and analytic backward, gate function inside, O(M) work a step, no M x M
matrix.

One lane owns one channel of one sequence and keeps the window of its last M values in registers (from order
12 on, two lanes with half of the taps each); one warp a program. Steps are taken in order, and the loads of
the next STEPS steps are in flight while the present ones are computed.

Any strides are read; memory (B, T, M+1, N), i.e. M+1 planes each laid out like the values, is the fast one.

Legend: B batch, T time, N channels, M order; z gate logits, a_1 .. a_M, a_0 their coefficients, v values, h
state, x_k = h_{t-k}; g = dL/dh from outside, s = dL/dh in all, r_k what steps after t owe to h_{t+1-k}; age =
steps since the document began; q = a lane's place among the LANES lanes of its channel, TAPS = M / LANES.
Blocks are [BLOCK].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_diagonal import chunk_starts
from .chunk_transfer import channel_transfer
from .chunk_transfer import channel_transfer_cost as transfer_cost
from .triton_launch import Launch, lanes_per_row, register, steps_in_flight, time_chunks
from .triton_rows import (
    coefficients,
    load_flags,
    load_rows,
    logit_gradient,
    row,
    sum_of_pair,
    where_also,
    wide,
)


@triton.jit
def _place(tiles, n_chunks, N: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """Where this program's lanes are: (b, chunk, n, q, lane, valid); lanes past the end repeat the last
    channel."""
    pid = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    place = (pid % tiles) * BLOCK + lane
    n, q = place // LANES, place % LANES
    outer = pid // tiles
    return (outer // n_chunks).to(tl.int64), outer % n_chunks, tl.minimum(n, N - 1), q, lane, n < N


@triton.jit
def _advance(
    past, z, v, started, q, lane,
    TAPS: tl.constexpr, LANES: tl.constexpr, GATE: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """h_t, and the window after the step (lane q holds its values q TAPS .. (q + 1) TAPS - 1)."""
    f, scale = coefficients(z, TAPS + 1, GATE, lane, LANES - 1)
    if HAS_RESET:
        kept = ()
        for k in tl.static_range(TAPS):
            kept = kept + (tl.where(started != 0, 0.0, past[k]),)
        past = kept
    total = f[TAPS] * v
    if LANES > 1:
        total = tl.where(q == 0, total, 0.0)
    for k in tl.static_range(TAPS):  # the newest value last: it is the one the chain waits for
        total += f[TAPS - 1 - k] * past[TAPS - 1 - k]
    h = sum_of_pair(total, lane, LANES - 1) * scale
    entering = h
    if LANES > 1:  # a lane's oldest value moves on to the next lane
        entering = tl.where(q == 0, h, tl.gather(past[TAPS - 1], tl.maximum(lane - 1, 0), 0))
    window = (entering,)
    for k in tl.static_range(TAPS - 1):
        window = window + (past[k],)
    return h, window


@triton.jit(do_not_specialize=["T", "chunk", "n_chunks", "g_b", "v_b", "r_b"])
def forward_kernel(
    gates, values, start, reset, h_out, last, T, chunk, n_chunks, tiles, g_b, g_n, v_b, v_n, r_b,
    G_T: tl.constexpr, G_K: tl.constexpr, V_T: tl.constexpr, R_T: tl.constexpr,
    N: tl.constexpr, TAPS: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr, GATE: tl.constexpr,
    HAS_START: tl.constexpr, HAS_RESET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h of one chunk of time from the window before it; M = TAPS * LANES.

    gates (B, T, N, M + 1), values (B, T, N), reset (B, T) of any strides; start (B, n_chunks, N, M) fp32;
    out: h_out (B, T, N), last (B, N, M) fp32, newest first, both contiguous.
    """
    M: tl.constexpr = TAPS * LANES
    b, c, n, q, lane, valid = _place(tiles, n_chunks, N, LANES, BLOCK)
    t = c * chunk
    end = tl.minimum(t + chunk, T)
    a_at = gates + (b * g_b + wide(n) * g_n + M * G_K)  # the input gate
    z_at = a_at + wide(q * TAPS - M) * G_K  # this lane's taps
    v_at = values + (b * v_b + wide(n) * v_n)
    h_at = h_out + (b * T * N + n)
    past = ()
    for k in tl.static_range(TAPS):
        if HAS_START:
            past = past + (tl.load(start + ((b * n_chunks + c) * N + n) * M + q * TAPS + k),)
        else:
            past = past + (tl.zeros([BLOCK], tl.float32),)

    full = (end - t) // STEPS * STEPS + t
    t64 = wide(t)
    some = where_also(valid, full > t)
    z_next = load_rows(z_at + t64 * G_T, STEPS, G_T, TAPS, G_K, some)
    a_next = load_rows(a_at + t64 * G_T, STEPS, G_T, 1, 1, some)
    v_next = load_rows(v_at + t64 * V_T, STEPS, V_T, 1, 1, some)
    if HAS_RESET:
        r_next = load_flags(reset + b * r_b + t64 * R_T, STEPS, R_T, full > t)
    for t_group in range(t, full, STEPS):
        z_now, a_now, v_now = z_next, a_next, v_next
        t64 = wide(tl.minimum(t_group + STEPS, full - STEPS))
        z_next = load_rows(z_at + t64 * G_T, STEPS, G_T, TAPS, G_K, None)
        a_next = load_rows(a_at + t64 * G_T, STEPS, G_T, 1, 1, None)
        v_next = load_rows(v_at + t64 * V_T, STEPS, V_T, 1, 1, None)
        if HAS_RESET:
            r_now = r_next
            r_next = load_flags(reset + b * r_b + t64 * R_T, STEPS, R_T, True)
        t64 = wide(t_group)
        for u in tl.static_range(STEPS):
            z = row(z_now, u, TAPS) + row(a_now, u, 1)
            started = r_now[u] if HAS_RESET else 0
            h, past = _advance(
                past, z, v_now[u].to(tl.float32), started, q, lane, TAPS, LANES, GATE, HAS_RESET
            )
            tl.store(h_at + t64 * N + u * N, h.to(h_out.dtype.element_ty), mask=valid & (q == 0))
    for t_one in range(full, end):
        t64 = wide(t_one)
        z = load_rows(z_at + t64 * G_T, 1, G_T, TAPS, G_K, None)
        a = load_rows(a_at + t64 * G_T, 1, G_T, 1, 1, None)
        v = tl.load(v_at + t64 * V_T).to(tl.float32)
        started = tl.load(reset + b * r_b + t64 * R_T) if HAS_RESET else 0
        h, past = _advance(
            past, row(z, 0, TAPS) + row(a, 0, 1), v, started, q, lane, TAPS, LANES, GATE, HAS_RESET
        )
        tl.store(h_at + t64 * N, h.to(h_out.dtype.element_ty), mask=valid & (q == 0))
    for k in tl.static_range(TAPS):
        tl.store(last + (b * N + n) * M + q * TAPS + k, past[k], mask=where_also(valid, end == T))


@triton.jit
def _retreat(
    r, window, z, v, g, age, dz_at, da_at, dv_at, q, lane, valid,
    D_K: tl.constexpr, TAPS: tl.constexpr, LANES: tl.constexpr, GATE: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """One step back: stores dz and dv of step t, returns r before it.

    window is (h_{t - q TAPS}, .., h_{t - (q + 1) TAPS}): the state at the lane's place, and what its taps
    multiply.
    """
    f, scale = coefficients(z, TAPS + 1, GATE, lane, LANES - 1)
    h, owed_now, owed_next = window[0], r[0], tl.zeros_like(g)
    if LANES > 1:
        h = tl.gather(window[0], lane - q, 0)
        owed_now = tl.gather(r[0], lane - q, 0)
        following = tl.gather(r[0], tl.minimum(lane + 1, lane - q + LANES - 1), 0)
        owed_next = tl.where(q == LANES - 1, 0.0, following)
    scaled = (g + owed_now) * scale
    before = ()
    for k in tl.static_range(TAPS):
        x = window[k + 1]
        owed = scaled * f[k] + (r[k + 1] if k + 1 < TAPS else owed_next)
        if HAS_RESET:
            x = tl.where(age > q * TAPS + k, x, 0.0)
            owed = tl.where(age == 0, 0.0, owed)
        before = before + (owed,)
        dz = logit_gradient(z[k], f[k], x, h, scaled, GATE)
        tl.store(dz_at + k * D_K, dz.to(dz_at.dtype.element_ty), mask=valid)
    da = logit_gradient(z[TAPS], f[TAPS], v, h, scaled, GATE)
    tl.store(da_at, da.to(da_at.dtype.element_ty), mask=valid & (q == 0))
    tl.store(dv_at, (scaled * f[TAPS]).to(dv_at.dtype.element_ty), mask=valid & (q == 0))
    return before


@triton.jit
def _shifted(window, oldest, TAPS: tl.constexpr):
    """The window one step earlier: the newest value dropped, `oldest` appended."""
    moved = ()
    for k in tl.static_range(TAPS):
        moved = moved + (window[k + 1],)
    return moved + (oldest,)


@triton.jit
def _earlier(h_at, start_at, t, lag, N: tl.constexpr, M: tl.constexpr, HAS_START: tl.constexpr, valid):
    """h_{t - lag} in fp32 for any t - lag >= -M: from memory, from h0 (h_{-1} its newest), zero without h0.

    h_at points to h_{-lag}, so that no lane needs a product of its own.
    """
    h = tl.load(h_at + wide(t) * N, mask=valid & (lag <= t), other=0).to(tl.float32)
    if HAS_START:
        early = (lag > t) & (lag <= t + M)
        h = tl.where(lag > t, tl.load(start_at + (lag - 1 - t), mask=valid & early, other=0), h)
    return h


@triton.jit(do_not_specialize=["T", "chunk", "n_chunks", "g_b", "v_b", "o_b", "d_b"])
def backward_kernel(
    gates, values, h_in, grad, start, stop, ages, d_gates, d_values, d_start, T, chunk, n_chunks, tiles,
    g_b, g_n, v_b, v_n, o_b, o_n, d_b, d_n,
    G_T: tl.constexpr, G_K: tl.constexpr, V_T: tl.constexpr, O_T: tl.constexpr,
    D_T: tl.constexpr, D_K: tl.constexpr, N: tl.constexpr, TAPS: tl.constexpr, LANES: tl.constexpr,
    STEPS: tl.constexpr, GATE: tl.constexpr, HAS_START: tl.constexpr, HAS_RESET: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dz, dv of one chunk of time, and r before it, from h and from r after it; all lanes walk back in time.

    gates, values as in the forward pass, grad (B, T, N) of any strides (o_), h_in (B, T, N) contiguous,
    ages (B, T) int32, start (B, N, M) fp32 = h0, stop (B, n_chunks, N, M) fp32 = r after each chunk;
    out: d_gates (B, T, N, M + 1) of any strides (d_), d_values (B, T, N) contiguous, d_start (B, N, M) fp32 =
    dL/dh0.
    """
    M: tl.constexpr = TAPS * LANES
    b, c, n, q, lane, valid = _place(tiles, n_chunks, N, LANES, BLOCK)
    begin = c * chunk
    end = tl.minimum(begin + chunk, T)
    n64, lag = wide(n), q * TAPS
    a_at = gates + (b * g_b + n64 * g_n + M * G_K)
    z_at = a_at + wide(lag - M) * G_K
    da_at = d_gates + (b * d_b + n64 * d_n + M * D_K)
    dz_at = da_at + wide(lag - M) * D_K
    v_at = values + (b * v_b + n64 * v_n)
    o_at = grad + (b * o_b + n64 * o_n)
    dv_at = d_values + (b * T * N + n)
    h_at = h_in + (b * T * N + n - lag * N)
    start_at = start + (b * N + n) * M if HAS_START else None
    r, window = (), ()
    for k in tl.static_range(TAPS):
        r = r + (tl.load(stop + ((b * n_chunks + c) * N + n) * M + lag + k),)
    for k in tl.static_range(TAPS + 1):
        window = window + (_earlier(h_at, start_at, end - 1 - k, lag, N, M, HAS_START, valid),)

    # Step t appends h_{t-1-TAPS-lag}. With h0, full groups stop where that lies before t = 0; single steps
    # finish.
    low = tl.minimum(tl.maximum(begin, M + 1), end) if HAS_START else begin
    groups = (end - low) // STEPS
    some = where_also(valid, groups > 0)
    t = end - STEPS
    t64 = wide(t)
    z_next = load_rows(z_at + t64 * G_T, STEPS, G_T, TAPS, G_K, some)
    a_next = load_rows(a_at + t64 * G_T, STEPS, G_T, 1, 1, some)
    v_next = load_rows(v_at + t64 * V_T, STEPS, V_T, 1, 1, some)
    o_next = load_rows(o_at + t64 * O_T, STEPS, O_T, 1, 1, some)
    h_next = ()
    for j in tl.static_range(STEPS):
        h_next = h_next + (_earlier(h_at, start_at, t + (j - 1 - TAPS), lag, N, M, False, valid),)
    if HAS_RESET:
        age_next = load_flags(ages + b * T + t64, STEPS, 1, groups > 0)
    for group in range(groups):
        z_now, a_now, v_now, o_now, h_now = z_next, a_next, v_next, o_next, h_next
        t = tl.maximum(end - (group + 2) * STEPS, end - groups * STEPS)
        t64 = wide(t)
        z_next = load_rows(z_at + t64 * G_T, STEPS, G_T, TAPS, G_K, None)
        a_next = load_rows(a_at + t64 * G_T, STEPS, G_T, 1, 1, None)
        v_next = load_rows(v_at + t64 * V_T, STEPS, V_T, 1, 1, None)
        o_next = load_rows(o_at + t64 * O_T, STEPS, O_T, 1, 1, None)
        h_next = ()
        for j in tl.static_range(STEPS):
            h_next = h_next + (_earlier(h_at, start_at, t + (j - 1 - TAPS), lag, N, M, False, valid),)
        if HAS_RESET:
            age_now = age_next
            age_next = load_flags(ages + b * T + t64, STEPS, 1, True)
        t64 = wide(end - (group + 1) * STEPS)
        for j in tl.static_range(STEPS - 1, -1, -1):
            age = age_now[j] if HAS_RESET else 0
            r = _retreat(
                r, window, row(z_now, j, TAPS) + row(a_now, j, 1), v_now[j].to(tl.float32),
                o_now[j].to(tl.float32), age, dz_at + t64 * D_T + j * D_T, da_at + t64 * D_T + j * D_T,
                dv_at + t64 * N + j * N, q, lane, valid, D_K, TAPS, LANES, GATE, HAS_RESET,
            )  # fmt: skip
            window = _shifted(window, h_now[j], TAPS)
    rest = end - begin - groups * STEPS
    for back in range(rest):
        t = begin + rest - 1 - back
        t64 = wide(t)
        z = load_rows(z_at + t64 * G_T, 1, G_T, TAPS, G_K, None)
        a = load_rows(a_at + t64 * G_T, 1, G_T, 1, 1, None)
        v = tl.load(v_at + t64 * V_T).to(tl.float32)
        g = tl.load(o_at + t64 * O_T).to(tl.float32)
        age = tl.load(ages + b * T + t64) if HAS_RESET else 0
        r = _retreat(
            r, window, row(z, 0, TAPS) + row(a, 0, 1), v, g, age,
            dz_at + t64 * D_T, da_at + t64 * D_T, dv_at + t64 * N, q, lane, valid,
            D_K, TAPS, LANES, GATE, HAS_RESET,
        )  # fmt: skip
        window = _shifted(window, _earlier(h_at, start_at, t - 1 - TAPS, lag, N, M, HAS_START, valid), TAPS)
    for k in tl.static_range(TAPS):
        tl.store(d_start + (b * N + n) * M + lag + k, r[k], mask=where_also(valid, begin == 0))


def _ages(reset: Tensor) -> Tensor:
    """(B, T) int32: steps since the document began; before the first start, older than any order."""
    steps = torch.arange(reset.shape[1], device=reset.device)
    start = torch.where(reset, steps, -(1 << 20)).cummax(dim=1).values
    return (steps - start).to(torch.int32)


def _forward(
    gates: Tensor, values: Tensor, h0: Tensor | None, reset: Tensor | None, gate: str
) -> tuple[Tensor, Tensor]:
    B, T, N = values.shape
    M = gates.shape[-1] - 1
    h, last = values.new_empty(values.shape), values.new_empty(B, N, M, dtype=torch.float32)
    chunk, n_chunks = time_chunks(B * N, 1, transfer_cost(M, gate), T, values.device)
    if n_chunks > 1:
        transfer = channel_transfer(gates, values, reset, gate, chunk, n_chunks, reverse=False)
        h0 = chunk_starts(transfer, h0)
    lanes = lanes_per_row(M)
    launch = Launch(values, N * lanes, steps_in_flight(M // lanes, T, backward=False))
    with launch.device:
        forward_kernel[launch.grid(B * n_chunks)](
            gates, values, h0, reset, h, last, T, chunk, n_chunks, launch.tiles,
            gates.stride(0), gates.stride(2), values.stride(0), values.stride(2),
            reset.stride(0) if reset is not None else 0,
            G_T=gates.stride(1), G_K=gates.stride(3), V_T=values.stride(1),
            R_T=reset.stride(1) if reset is not None else 0,
            N=N, TAPS=M // lanes, LANES=lanes, GATE=gate,
            HAS_START=h0 is not None, HAS_RESET=reset is not None, **launch.options,
        )  # fmt: skip
    return h, last


def _backward(
    grad: Tensor, grad_last: Tensor, gates: Tensor, values: Tensor, h0: Tensor | None, h: Tensor,
    reset: Tensor | None, gate: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, T, N = values.shape
    M = gates.shape[-1] - 1
    d_gates, d_values = torch.empty_like(gates), values.new_empty(values.shape)
    d_start = values.new_empty(B, N, M, dtype=torch.float32)
    stop = grad_last.contiguous()
    chunk, n_chunks = time_chunks(B * N, 1, transfer_cost(M, gate), T, values.device)
    if n_chunks > 1:
        transfer = channel_transfer(gates, grad, reset, gate, chunk, n_chunks, reverse=True)
        stop = chunk_starts(transfer, stop).flip(1).contiguous()
    lanes = lanes_per_row(M)
    launch = Launch(values, N * lanes, steps_in_flight(M // lanes, T, backward=True))
    with launch.device:
        backward_kernel[launch.grid(B * n_chunks)](
            gates, values, h, grad, h0, stop, None if reset is None else _ages(reset),
            d_gates, d_values, d_start, T, chunk, n_chunks, launch.tiles,
            gates.stride(0), gates.stride(2), values.stride(0), values.stride(2),
            grad.stride(0), grad.stride(2), d_gates.stride(0), d_gates.stride(2),
            G_T=gates.stride(1), G_K=gates.stride(3), V_T=values.stride(1), O_T=grad.stride(1),
            D_T=d_gates.stride(1), D_K=d_gates.stride(3),
            N=N, TAPS=M // lanes, LANES=lanes, GATE=gate,
            HAS_START=h0 is not None, HAS_RESET=reset is not None, **launch.options,
        )  # fmt: skip
    return d_gates, d_values, d_start


higher_order_scan = register("h_scan_triton", _forward, _backward)
