"""One token of every sequence through a layer in four Triton kernels: what is bound by reading weights.

    mix      norm, gates and values, one step of the recurrence, whose state is written in place
    linear   a product that adds to the residual stream, or that begins with a norm, or is a SwiGLU's two

A program owns some outputs of every sequence, so each weight is read once; products are of matrices, with
the sequences padded to 16 rows. The factor of a norm is applied after the product: it is one a sequence.

Legend: B sequences, BB B padded, D inputs, R outputs (rows of weights) a program, N blocks or channels, M
block size or order, MP = M rounded up to a power of two; z gate logits, v values, h state. Tiles are [BB, R].
"""

import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import on_device
from .triton_rows import coefficients

OUTPUTS = 16  # R
STAGE_BYTES, MOST_BYTES = 32 << 10, 160 << 10  # of shared memory: what is read at once, and ahead


@triton.jit
def _inputs(x, norm, b, k, B, D: tl.constexpr, NORM: tl.constexpr):
    """Inputs k of every sequence, weighed by the norm, [BB, INPUTS], and their squares' sums, [BB]."""
    tile = tl.load(x + b[:, None] * D + k[None, :], mask=(b < B)[:, None] & (k < D)[None, :], other=0.0)
    squares = tl.zeros([b.shape[0]], tl.float32)
    if NORM:
        wide = tile.to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
        tile = (wide * tl.load(norm + k, mask=k < D, other=0.0).to(tl.float32)[None, :]).to(tile.dtype)
    return tile, squares


@triton.jit
def _product(total, x, weight, rows, valid, k, D: tl.constexpr):
    """total [BB, R] and x times these rows of the weights."""
    at = weight + rows.to(tl.int64)[:, None] * D + k[None, :]
    w = tl.load(at, mask=valid[:, None] & (k < D)[None, :], other=0.0)
    return tl.dot(x, tl.trans(w), total)


@triton.jit
def _linear_kernel(
    x, norm, weight, residual, out, B, eps, D: tl.constexpr, OUT: tl.constexpr, NORM: tl.constexpr,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, BB: tl.constexpr, R: tl.constexpr, INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out (B, OUT) of x (B, D), weight (OUT, D), or (2 OUT, D) if GATED: silu of the first half times the
    second."""
    b, rows = tl.arange(0, BB), tl.program_id(0) * R + tl.arange(0, R)
    valid = rows < OUT
    total, up, squares = (
        tl.zeros([BB, R], tl.float32),
        tl.zeros([BB, R], tl.float32),
        tl.zeros([BB], tl.float32),
    )
    for start in tl.range(0, D, INPUTS, num_stages=STAGES):
        k = start + tl.arange(0, INPUTS)
        tile, more = _inputs(x, norm, b, k, B, D, NORM)
        squares += more
        total = _product(total, tile, weight, rows, valid, k, D)
        if GATED:
            up = _product(up, tile, weight, OUT + rows, valid, k, D)
    if NORM:
        factor = tl.rsqrt(squares / D + eps)[:, None]
        total, up = total * factor, up * factor
    if GATED:
        total = total / (1.0 + tl.exp(-total)) * up
    at, inside = b[:, None] * OUT + rows[None, :], (b < B)[:, None] & valid[None, :]
    if RESIDUAL:
        total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _mix_kernel(
    x, norm, weight, bias, state, out, B, eps, D: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    MP: tl.constexpr, WINDOW: tl.constexpr, GATE: tl.constexpr, BB: tl.constexpr, R: tl.constexpr,
    INPUTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h of one step of BD-LRU, out (B, N M), or of H-LRU (WINDOW), out (B, M N), newest first.

    weight, bias: planes of rows (n, i), or n: M + 1 of gates, the input gate's last, then the values'; state
    (B, N, M) fp32, read and written.
    """
    b, place = tl.arange(0, BB), tl.program_id(0) * R + tl.arange(0, R)
    if WINDOW:
        n, i, valid, ROWS = place, place * 0, place < N, N
    else:
        n, i, ROWS = place // MP, place % MP, N * M
        valid = (n < N) & (i < M)
    row = n if WINDOW else n * M + i
    planes = ()
    for _ in tl.static_range(M + 2):
        planes = planes + (tl.zeros([BB, R], tl.float32),)
    squares = tl.zeros([BB], tl.float32)
    for start in tl.range(0, D, INPUTS, num_stages=STAGES):
        k = start + tl.arange(0, INPUTS)
        tile, more = _inputs(x, norm, b, k, B, D, True)
        squares += more
        sums = ()
        for p in tl.static_range(M + 2):
            sums = sums + (_product(planes[p], tile, weight, p * ROWS + row, valid, k, D),)
        planes = sums
    factor = tl.rsqrt(squares / D + eps)[:, None]
    z = ()
    for p in tl.static_range(M + 2):  # rounded as a projection's output is
        offset = tl.load(bias + p * ROWS + row, mask=valid, other=0.0).to(tl.float32)
        raw = planes[p] * factor + offset[None, :]
        z = z + (raw.to(out.dtype.element_ty).to(tl.float32),)
    f, scale = coefficients(z[: M + 1], M + 1, 1, GATE, b, 1)
    inside = (b < B)[:, None] & valid[None, :]
    block = state + (b.to(tl.int64)[:, None] * N + n[None, :]) * M
    h, past = f[M] * z[M + 1], ()
    for j in tl.static_range(M):
        before = tl.load(block + j, mask=inside, other=0.0)
        h += f[j] * before
        past = past + (before,)
    h *= scale[0]
    tl.debug_barrier()  # every lane has read the state
    if WINDOW:
        tl.store(block, h, mask=inside)
        tl.store(out + b[:, None] * (M * N) + n[None, :], h.to(out.dtype.element_ty), mask=inside)
        for j in tl.static_range(M - 1):
            tl.store(block + j + 1, past[j], mask=inside)
            at = out + b[:, None] * (M * N) + ((j + 1) * N + n)[None, :]
            tl.store(at, past[j].to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(block + i[None, :], h, mask=inside)
        tl.store(out + b[:, None] * (N * M) + row[None, :], h.to(out.dtype.element_ty), mask=inside)


def _launch(kernel, count: int, planes: int, x: Tensor, *tensors, **options) -> None:
    """A program for every OUTPUTS of `count` outputs, each a sum over `planes` rows of weights.

    Programs are few, so that each must have much under way: nearly all that it reads.
    """
    B, D = x.shape
    width = max(16, triton.next_power_of_2(B))
    of_an_input = (width + planes * OUTPUTS) * x.element_size()
    inputs = next((n for n in (256, 128) if n * of_an_input <= STAGE_BYTES), 64)
    stages = max(2, min(8, triton.cdiv(D, inputs), MOST_BYTES // (inputs * of_an_input)))
    with on_device(x):
        kernel[(triton.cdiv(count, OUTPUTS),)](
            x, *tensors, B, D=D, BB=width, R=OUTPUTS, INPUTS=inputs, STAGES=stages,
            num_warps=4 if width <= 16 else 8, **options,
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
        _linear_kernel, count, 2 if gated else 1, x, norm, weight, residual, out, eps=eps, OUT=count,
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
    whole = 1 if window else triton.next_power_of_2(M)
    out = x.new_empty(x.shape[0], N * M)
    _launch(
        _mix_kernel, N * whole, M + 2, x, norm, weight, bias, state, out, eps=eps, N=N, M=M, MP=whole,
        WINDOW=window, GATE=gate,
    )  # fmt: skip
    return out
