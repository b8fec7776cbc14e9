"""One token of a few sequences through a layer in four Triton kernels, whose time is that of reading weights.

    mix      norm, gates and values, one step of the recurrence; the state is written in place
    linear   (3 times) a product: after a norm, added to the residual stream, or the two of a SwiGLU

A program owns R outputs, a warp some rows of weights, and takes one sequence after the other. It loads its
weights before it waits for the kernel ahead (programmatic dependent launch, from Hopper on), so that memory
stays busy while one kernel hands over to the next. What another kernel writes is read after the wait.

Legend: B sequences, D inputs, in pieces of INPUTS, R outputs (rows of weights) a program, HELD planes of
weights that wait in registers, N blocks or channels, M block size or order, MP = M rounded up to a power of
two; z gate logits, v values, h state. Results are [R], pieces of inputs or weights [R, INPUTS].
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..scan.triton_rows import coefficients
from ..triton_device import cdiv, multiprocessors, next_power_of_2, on_device, settle_cache_keys, starts_early

INPUTS = 256  # numbers of 2 bytes that a warp loads at once, 16 bytes a lane
PROGRAMS_PER_SM = 2  # from this many on the weights are shared out evenly over the multiprocessors
REGISTERS = 128  # of a lane's 255, for weights
SHORT = 12  # registers of a lane that a plane may take in a program of 16 warps, whose lanes have only 128


@triton.jit
def _columns(start: tl.constexpr, INPUTS: tl.constexpr, lane):
    """The columns of a piece, [R, INPUTS], the same for every output."""
    # Built like every other tile, so that Triton gives all of them one layout and moves no data between
    # lanes.
    return lane[:, None] * 0 + start + tl.arange(0, INPUTS)[None, :]


@triton.jit
def _pieces(at, valid, lane, D: tl.constexpr, INPUTS: tl.constexpr):
    """D numbers from each pointer of `at` [R] on, as a tuple of pieces [R, INPUTS]."""
    pieces = ()
    for start in tl.static_range(0, D, INPUTS):
        k = _columns(start, INPUTS, lane)
        pieces = pieces + (tl.load(at[:, None] + k, mask=valid[:, None] & (k < D), other=0.0),)
    return pieces


@triton.jit
def _inputs(x, scales, lane, eps, D: tl.constexpr, NORM: tl.constexpr, INPUTS: tl.constexpr):
    """A sequence's inputs times the norm's weights, in pieces, and 1 / RMS, [R]."""
    # 1 / RMS is known only after the whole row: it multiplies the products instead, one number a sequence.
    pieces, squares = (), tl.zeros([lane.shape[0], INPUTS], tl.float32)
    for start in tl.static_range(0, D, INPUTS):
        k = _columns(start, INPUTS, lane)
        piece = tl.load(x + k, mask=k < D, other=0.0)
        if NORM:
            wide = piece.to(tl.float32)
            squares += wide * wide
            wide *= scales[start // INPUTS].to(tl.float32)
            # Before 1 / RMS numbers may be too large for fp16, so those stay in fp32.
            piece = wide if piece.dtype == tl.float16 else wide.to(piece.dtype)
        pieces = pieces + (piece,)
    return pieces, tl.rsqrt(tl.sum(squares, axis=1) / D + eps) if NORM else 1.0


@triton.jit
def _product(x, w):
    """[R]: a sequence's inputs times rows of weights, summed in fp32."""
    # No tensor cores: they take 16 sequences at least, and reading weights takes longer than this.
    sums = x[0].to(tl.float32) * w[0].to(tl.float32)  # [R, INPUTS], added up over lanes once, at the end
    for j in tl.static_range(1, len(w)):
        sums += x[j].to(tl.float32) * w[j].to(tl.float32)
    return tl.sum(sums, axis=1)


@triton.jit
def _linear_kernel(
    x, norm, weight, residual, out, B, eps, D: tl.constexpr, OUT: tl.constexpr, NORM: tl.constexpr,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, R: tl.constexpr, INPUTS: tl.constexpr, HELD: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out (B, OUT) of x (B, D), weight (OUT, D); if GATED (2 OUT, D): silu of one half times the other."""
    # `lane` numbers outputs, [R].
    lane = tl.arange(0, R)
    row = tl.program_id(0) * R + lane
    valid = row < OUT
    at = weight + row.to(tl.int64) * D
    if EARLY:  # the next kernel may start now; it waits before it reads what this one writes
        gdc_launch_dependents()
    # Weights do not depend on the kernel ahead: load them into registers while it runs.
    if HELD > 0:
        w = _pieces(at, valid, lane, D, INPUTS)
    if GATED and HELD > 1:
        w_up = _pieces(at + OUT * D, valid, lane, D, INPUTS)
    scales = _pieces(norm + lane * 0, lane >= 0, lane, D, INPUTS) if NORM else ()
    if EARLY:
        gdc_wait()  # x and the residual are written by now
    for b in range(B):  # weights that are not held are read again for each sequence
        inputs, factor = _inputs(x + b * D, scales, lane, eps, D, NORM, INPUTS)
        total = _product(inputs, w if HELD > 0 else _pieces(at, valid, lane, D, INPUTS)) * factor
        if GATED:
            up = _product(inputs, w_up if HELD > 1 else _pieces(at + OUT * D, valid, lane, D, INPUTS))
            total = total / (1.0 + tl.exp(-total)) * (up * factor)
        if RESIDUAL:
            total += tl.load(residual + b * OUT + row, mask=valid, other=0.0).to(tl.float32)
        tl.store(out + b * OUT + row, total.to(out.dtype.element_ty), mask=valid)


@triton.jit
def new_state(z, before, M: tl.constexpr, GATE: tl.constexpr, lane):
    """h of a lane's row, [R], from z (its M + 1 logits and its value) and `before`, M numbers of state."""
    f, scale = coefficients(z[: M + 1], M + 1, 1, GATE, lane, 1)
    h = f[M] * z[M + 1]
    for j in tl.static_range(M):
        h += f[j] * before[j]
    return h * scale[0]


@triton.jit
def write_state(h, before, block, to, i, valid, N: tl.constexpr, M: tl.constexpr, WINDOW: tl.constexpr):
    """Stores h at place i of the state at `block` and in the output; a WINDOW's older values move on."""
    tl.debug_barrier()  # every lane must have read the state before any lane writes it
    tl.store(block + i, h, mask=valid)
    tl.store(to, h.to(to.dtype.element_ty), mask=valid)
    if WINDOW:
        for j in tl.static_range(M - 1):
            tl.store(block + j + 1, before[j], mask=valid)
            tl.store(to + (j + 1) * N, before[j].to(to.dtype.element_ty), mask=valid)


@triton.jit
def _mix_kernel(
    x, norm, weight, bias, state, out, B, eps, D: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    MP: tl.constexpr, WINDOW: tl.constexpr, GATE: tl.constexpr, R: tl.constexpr, INPUTS: tl.constexpr,
    HELD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """h of one step of BD-LRU, out (B, N M), or of H-LRU (WINDOW), out (B, M N), newest first.

    weight (rows (M + 2), D) and bias hold M + 1 planes of gates and one of values, rows = N M or N; state (B,
    N, M) fp32 is written in place.
    """
    # The rows of a block belong to one program: another one could not know when the state has been read.
    ROWS: tl.constexpr = N if WINDOW else N * M
    lane = tl.arange(0, R)
    place = tl.program_id(0) * R + lane
    if WINDOW:
        n, i, valid = place, place * 0, place < N
    else:
        n, i = place // MP, place % MP
        valid = (n < N) & (i < M)
    row = n if WINDOW else n * M + i  # [R]
    at = weight + row.to(tl.int64) * D
    if EARLY:
        gdc_launch_dependents()
    held, offsets = (), ()
    for p in tl.static_range(M + 2):
        if p < HELD:
            held = held + (_pieces(at + p * ROWS * D, valid, lane, D, INPUTS),)
        offsets = offsets + (tl.load(bias + p * ROWS + row, mask=valid, other=0.0).to(tl.float32),)
    scales = _pieces(norm + lane * 0, lane >= 0, lane, D, INPUTS)
    if EARLY:
        gdc_wait()
    for b in range(B):
        inputs, factor = _inputs(x + b * D, scales, lane, eps, D, True, INPUTS)
        z = ()
        for p in tl.static_range(M + 2):  # rounded to the dtype that the projection's output has elsewhere
            if p < HELD:
                raw = _product(inputs, held[p])
            else:
                raw = _product(inputs, _pieces(at + p * ROWS * D, valid, lane, D, INPUTS))
            z = z + ((raw * factor + offsets[p]).to(out.dtype.element_ty).to(tl.float32),)
        block, before = state + (b * N + n) * M, ()  # each lane reads its whole block
        for j in tl.static_range(M):
            before = before + (tl.load(block + j, mask=valid, other=0.0),)
        h = new_state(z, before, M, GATE, lane)
        write_state(h, before, block, out + b * (N * M) + row, i, valid, N, M, WINDOW)


settle_cache_keys(globals())


def plan(count: int, whole: int, planes: int, row_bytes: int, least: int) -> tuple[int, int, int]:
    """(outputs a program, its warps, planes of weights held) for at least `least` programs; see `_launch`.

    count: outputs in all, `whole` of them in a row to one program; planes: rows of weights of an output, each
    of row_bytes.
    """
    outputs, warps = 16, 4
    while outputs > max(4, whole) and cdiv(count, outputs) < least:
        outputs //= 2
    a_row = cdiv(row_bytes, 4 * 32)  # registers of a lane, if a warp holds the row
    # With 16 warps a lane has 128 registers, not 255, so they are for short rows only.
    most = 16 if a_row * outputs <= SHORT * 16 else 8
    while warps < min(outputs, most) and planes * a_row * outputs > REGISTERS * warps:
        warps *= 2
    # Rows so long that warps alone do not make room: fewer outputs.
    while a_row <= REGISTERS and outputs > max(4, whole) and a_row * outputs > REGISTERS * warps:
        outputs //= 2
        warps = min(warps, outputs)
    room = REGISTERS if warps < 16 else REGISTERS // 2
    return outputs, warps, min(planes, room * warps // (a_row * outputs))


def _launch(kernel, count: int, whole: int, planes: int, x: Tensor, *tensors, **options: Any) -> None:
    """Launch programs for `count` outputs, see `plan`."""
    B, D = x.shape
    inputs = min(INPUTS, next_power_of_2(D))
    outputs, warps, held = plan(
        count, whole, planes, cdiv(D, inputs) * inputs * x.element_size(),
        PROGRAMS_PER_SM * multiprocessors(x.device),
    )  # fmt: skip
    early = starts_early(x.device)
    if early:
        options["launch_pdl"] = True
    with on_device(x):
        kernel[(cdiv(count, outputs),)](
            x, *tensors, B, D=D, R=outputs, INPUTS=inputs, HELD=held, EARLY=early, num_warps=warps,
            enable_fp_fusion=True, **options,
        )  # fmt: skip


def linear_step(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """x (B, D) times weight (OUT, D), (B, OUT).

    Args:
        norm, eps: weights (D,) of an RMSNorm before it.
        residual: (B, OUT), added to the result.
        gated: weight is (2 OUT, D): silu of the first half's outputs times the second's.
    """
    count = weight.shape[0] // (2 if gated else 1)
    out = x.new_empty(x.shape[0], count)
    _launch(
        _linear_kernel, count, 1, 2 if gated else 1, x, norm, weight, residual, out, eps=eps, OUT=count,
        NORM=norm is not None, GATED=gated, RESIDUAL=residual is not None,
    )  # fmt: skip
    return out


def mix_step(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor, state: Tensor, gate: str, window: bool
) -> Tensor:
    """A step of BD-LRU, or of H-LRU (`window`), from the residual stream; writes `state` in place.

    Args:
        x: (B, D). norm, eps: of the RMSNorm before the projections.
        weight, bias: (rows (M + 2), D) and (rows (M + 2),), M + 1 planes of gates and the values', rows = N M
            of BD-LRU, N of H-LRU.
        state: (B, N, M) fp32.
    Returns:
        what the output projection takes, (B, N M): h of BD-LRU, the window of H-LRU, newest first, (M, N).
    """
    N, M = state.shape[1:]
    whole = 1 if window else next_power_of_2(M)
    out = x.new_empty(x.shape[0], N * M)
    _launch(
        _mix_kernel, N * whole, whole, M + 2, x, norm, weight, bias, state, out, eps=eps, N=N, M=M, MP=whole,
        WINDOW=window, GATE=gate,
    )  # fmt: skip
    return out
