"""One token of many sequences through a layer in four Triton kernels: products of tiles on the tensor cores.

    mix        gates and values, one step of the recurrence; the state is written in place
    normed     a product after a norm, or the two of a SwiGLU
    residual   a product that adds to the residual stream (twice a layer)

`fused_step.py` does the same for a few sequences. Here a program multiplies the weights of R outputs with 16
or 64 sequences. A norm needs the sum of squares of a whole row, which no program of the product before it
has. So `residual` stores the stream times the norm's weights, and its squares summed by tile; the kernel
after the norm multiplies its results by 1 / RMS. Inputs then go from memory to the tensor cores unchanged.
Where outputs are too few to fill the device, SPLIT programs share the inputs of an output; the last of them
to finish adds up the parts, in a fixed order.

Legend: B sequences, BP of them a program, D inputs, in pieces of BLOCK, R outputs a program, PLANES rows of
weights an output (2 of a SwiGLU, M + 2 of a row of gates), FIRST + REST their number as powers of two, N
blocks or channels, M block size or order, MP = M rounded up to a power of two.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..scan.triton_rows import product, unstack
from ..triton_device import cdiv, multiprocessors, next_power_of_2, on_device, settle_cache_keys, starts_early
from .fused_step import new_state, write_state

ROWS = (16, 64)  # sequences a program: the least and the most that a tensor core's instruction takes
WIDEST = 128  # outputs times planes of a program with 64 sequences; wider ones have 16
SHARED_MEMORY = 227 * 1024  # bytes a program, an H100's; used where there is no device to ask


@triton.jit
def _rows(
    first, count, plane, PLANES: tl.constexpr, R: tl.constexpr, PADDED: tl.constexpr, MP: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """([R PADDED] rows of weights, which of them exist): PADDED planes of each output, from `plane` on."""
    # tl.arange and tl.dot take powers of two only, so planes and blocks are padded, and padding is masked.
    e = tl.arange(0, R * PADDED)
    place, p = first + e // PADDED, plane + e % PADDED
    row = place // MP * M + place % MP
    return p * count + row, (p < PLANES) & (row < count) & (place % MP < M)


@triton.jit
def _products(
    x, weight, first, begin, B, count, PLANES: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, BP: tl.constexpr, BLOCK: tl.constexpr, LENGTH: tl.constexpr,
    STAGES: tl.constexpr, MP: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """x (B, D) times weights, over LENGTH inputs from `begin` on: [BP, R FIRST], and [BP, R REST] of the
    planes that are left; planes innermost."""
    # Two products because M + 2 is rarely a power of two: 6 planes as 4 + 2, not as 8.
    b = tl.program_id(1) * BP + tl.arange(0, BP)
    row, there = _rows(first, count, 0, PLANES, R, FIRST, MP, M)
    at = weight + row.to(tl.int64) * D
    sums = (tl.zeros([BP, R * FIRST], tl.float32),)
    if REST > 0:
        row, there_rest = _rows(first, count, FIRST, PLANES, R, REST, MP, M)
        at_rest = weight + row.to(tl.int64) * D
        sums = sums + (tl.zeros([BP, R * REST], tl.float32),)
    for start in tl.range(0, LENGTH, BLOCK, num_stages=STAGES):
        k = begin + start + tl.arange(0, BLOCK)
        # Where all pieces are whole the mask is constant, and the compiler drops it.
        inside = k >= 0 if D % BLOCK == 0 and D % LENGTH == 0 else k < D
        piece = tl.load(x + b[:, None] * D + k[None, :], mask=(b < B)[:, None] & inside[None, :], other=0.0)
        w = tl.load(at[:, None] + k[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        more = (product(piece, tl.trans(w), sums[0], "ieee"),)
        if REST > 0:
            w = tl.load(at_rest[:, None] + k[None, :], mask=there_rest[:, None] & inside[None, :], other=0.0)
            more = more + (product(piece, tl.trans(w), sums[1], "ieee"),)
        sums = more
    return sums


@triton.jit
def _planes(sums, FIRST: tl.constexpr, REST: tl.constexpr, LANES: tl.constexpr):
    """The results of `_products` as FIRST + REST blocks [LANES], one lane for a sequence and output."""
    planes = unstack(tl.reshape(sums[0], [1, LANES * FIRST]), 1, LANES, FIRST)
    if REST > 0:
        planes = planes + unstack(tl.reshape(sums[1], [1, LANES * REST]), 1, LANES, REST)
    return planes


@triton.jit
def _squares_of(squares, B, BP: tl.constexpr, TILES: tl.constexpr, PADDED: tl.constexpr):
    """The squares of a program's sequences by tile, [BP, PADDED]."""
    # Loaded before the products and used after them, so that nobody waits for memory in between.
    b, tile = tl.program_id(1) * BP + tl.arange(0, BP), tl.arange(0, PADDED)
    there = (b < B)[:, None] & (tile < TILES)[None, :]
    return tl.load(squares + b[:, None] * TILES + tile[None, :], mask=there, other=0.0)


@triton.jit
def _residual_kernel(
    x, weight, residual, norm, out, scaled, squares, parts, arrivals, B, D: tl.constexpr, OUT: tl.constexpr,
    TILES: tl.constexpr, R: tl.constexpr, BP: tl.constexpr, BLOCK: tl.constexpr, LENGTH: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out = residual + x W^T, scaled = out times the next norm's weights, squares (B, TILES) of out.

    parts (tiles, SPLIT, BP, R) fp32 and arrivals (tiles,), zero before and after, are for SPLIT > 1.
    """
    tile, share = tl.program_id(0), tl.program_id(2)
    row = tile * R + tl.arange(0, R)
    b = tl.program_id(1) * BP + tl.arange(0, BP)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    sums = _products(
        x, weight, tile * R, share * LENGTH, B, OUT, 1, 1, 0, D, R, BP, BLOCK, LENGTH, STAGES, 1, 1
    )  # fmt: skip
    total, last = sums[0], True  # [BP, R]
    if SPLIT > 1:
        place = tl.program_id(1) * TILES + tile
        part = parts + place * (SPLIT * BP * R) + tl.arange(0, BP)[:, None] * R + tl.arange(0, R)[None, :]
        tl.store(part + share * (BP * R), total)
        tl.debug_barrier()  # all lanes must have stored their part before it is announced
        last = tl.atomic_add(arrivals + place, 1, sem="acq_rel") == SPLIT - 1
    if last:
        if SPLIT > 1:
            # In order of the parts, not of arrival: two runs give the same bits.
            total = tl.zeros([BP, R], tl.float32)
            for s in tl.static_range(SPLIT):
                total += tl.load(part + s * (BP * R), cache_modifier=".cg")  # past L1, which may be stale
            tl.store(arrivals + place, 0)  # for the next kernel
        mask = (b < B)[:, None] & (row < OUT)[None, :]
        to = b[:, None] * OUT + row[None, :]
        total += tl.load(residual + to, mask=mask, other=0.0).to(tl.float32)
        rounded = total.to(out.dtype.element_ty)
        tl.store(out + to, rounded, mask=mask)
        # Squares of the rounded numbers: those are what the next layer reads, and what a plain norm squares.
        wide = tl.where(mask, rounded.to(tl.float32), 0.0)
        weights = tl.load(norm + row, mask=row < OUT, other=0.0).to(tl.float32)
        tl.store(scaled + to, (wide * weights[None, :]).to(rounded.dtype), mask=mask)
        tl.store(squares + b * TILES + tile, tl.sum(wide * wide, axis=1), mask=b < B)


@triton.jit
def _normed_kernel(
    x, squares, weight, out, B, eps, D: tl.constexpr, OUT: tl.constexpr, TILES: tl.constexpr,
    PADDED: tl.constexpr, GATED: tl.constexpr, R: tl.constexpr, BP: tl.constexpr, BLOCK: tl.constexpr,
    LENGTH: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out (B, OUT) of x (B, D), weight (OUT, D); if GATED (2 OUT, D): silu of one half times the other."""
    PLANES: tl.constexpr = 2 if GATED else 1
    first = tl.program_id(0) * R
    lane = tl.arange(0, BP * R)
    b, row = tl.program_id(1) * BP + lane // R, first + lane % R
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    of_tiles = _squares_of(squares, B, BP, TILES, PADDED)
    sums = _products(
        x, weight, first, 0, B, OUT, PLANES, PLANES, 0, D, R, BP, BLOCK, LENGTH, STAGES, 1, 1
    )  # fmt: skip
    factor = tl.rsqrt(tl.sum(of_tiles, axis=1) / D + eps)  # [BP], 1 / RMS
    sums = _planes((sums[0] * factor[:, None],), PLANES, 0, BP * R)
    total = sums[0]
    if GATED:
        total = total / (1.0 + tl.exp(-total)) * sums[1]
    tl.store(out + b * OUT + row, total.to(out.dtype.element_ty), mask=(b < B) & (row < OUT))


@triton.jit
def _mix_kernel(
    x, squares, weight, bias, state, out, B, eps, D: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    MP: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, TILES: tl.constexpr, PADDED: tl.constexpr,
    WINDOW: tl.constexpr, GATE: tl.constexpr, R: tl.constexpr, BP: tl.constexpr, BLOCK: tl.constexpr,
    LENGTH: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """h of one step of BD-LRU, out (B, N M), or of H-LRU (WINDOW), out (B, M N), newest first.

    weight (rows (M + 2), D) and bias hold M + 1 planes of gates and one of values, rows = N M or N; state (B,
    N, M) fp32 is written in place.
    """
    # The rows of a block belong to one program: another one could not know when the state has been read.
    COUNT: tl.constexpr = N if WINDOW else N * M  # rows
    TAPS: tl.constexpr = 1 if WINDOW else M  # rows of a block
    GROUP: tl.constexpr = 1 if WINDOW else MP  # and with padding
    first = tl.program_id(0) * R
    lane = tl.arange(0, BP * R)
    b, place = tl.program_id(1) * BP + lane // R, first + lane % R
    n, i = place // GROUP, place % GROUP
    valid = (n < N) & (i < TAPS) & (b < B)
    # The state of every lane's block, [1, BP R MP], in one load and before the wait; `mix_step` says what
    # that asks of the caller.
    e = tl.arange(0, BP * R * MP)
    j, of = e % MP, e // MP
    of_b, of_n = tl.program_id(1) * BP + of // R, (first + of % R) // GROUP
    there = (j < M) & (of_n < N) & (of_b < B)
    states = tl.load((state + (of_b * N + of_n) * M + j)[None, :], mask=there[None, :], other=0.0)
    row, there = _rows(first, COUNT, 0, M + 2, R, FIRST, GROUP, TAPS)
    offsets = tl.load(bias + row, mask=there, other=0.0)
    if REST > 0:
        row, there = _rows(first, COUNT, FIRST, M + 2, R, REST, GROUP, TAPS)
        offsets_rest = tl.load(bias + row, mask=there, other=0.0)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    of_tiles = _squares_of(squares, B, BP, TILES, PADDED)
    sums = _products(
        x, weight, first, 0, B, COUNT, M + 2, FIRST, REST, D, R, BP, BLOCK, LENGTH, STAGES, GROUP, TAPS
    )  # fmt: skip
    factor = tl.rsqrt(tl.sum(of_tiles, axis=1) / D + eps)[:, None]
    logits = (sums[0] * factor + offsets.to(tl.float32)[None, :],)
    if REST > 0:
        logits = logits + (sums[1] * factor + offsets_rest.to(tl.float32)[None, :],)
    raw, z = _planes(logits, FIRST, REST, BP * R), ()
    for p in tl.static_range(M + 2):  # rounded to the dtype that the projection's output has elsewhere
        z = z + (raw[p].to(out.dtype.element_ty).to(tl.float32),)
    before = unstack(states, 1, BP * R, MP)
    h = new_state(z, before, M, GATE, lane)
    to = out + b * (N * M) + n * TAPS + i
    write_state(h, before, state + (b * N + n) * M, to, i, valid, N, M, WINDOW)


settle_cache_keys(globals())


class Stream(NamedTuple):
    """The residual stream before a norm."""

    x: Tensor  # (B, D)
    scaled: Tensor  # (B, D), x times the norm's weights
    squares: Tensor  # (B, tiles) fp32, squares of x summed by tile


class Workspace:
    """Scratch memory of programs that share outputs; for one step at a time, whose kernels run one by one."""

    def __init__(self, device: torch.device) -> None:
        self.arrivals = torch.zeros(1, dtype=torch.int32, device=device)
        self.parts = torch.empty(1, dtype=torch.float32, device=device)

    def sized(self, tiles: int, elements: int) -> tuple[Tensor, Tensor]:
        """parts and arrivals for `tiles` tiles of `elements` numbers each."""
        if tiles > self.arrivals.numel():
            self.arrivals = self.arrivals.new_zeros(tiles)
        if tiles * elements > self.parts.numel():
            self.parts = self.parts.new_empty(tiles * elements)
        return self.parts, self.arrivals


class Plan(NamedTuple):
    """How a kernel is launched; see the legend."""

    outputs: int  # R
    rows: int  # BP
    block: int  # inputs a piece
    split: int  # programs that share outputs
    stages: int  # pieces in flight, and the one at work
    warps: int  # a program


# The fastest of a sweep at 212M (D 768) on an H100, for 16 and for 64 sequences alike; 0 is filled in by
# `plan`.
MIX = Plan(0, 0, 128, 1, 4, 8)  # outputs: as many as make WIDEST
GATED = Plan(16, 0, 128, 1, 6, 4)
HEAD = Plan(128, 0, 64, 1, 4, 4)
RESIDUAL = Plan(32, 0, 128, 0, 5, 4)


def plan(like: Plan, B: int, D: int, count: int, planes: int, itemsize: int, device: torch.device) -> Plan:
    """`like` with rows, split and stages filled in, for B sequences and `count` outputs of `planes` planes.

    A split of 0 becomes as many as fill the device; stages are at most those whose pieces fit in shared
    memory.
    """
    least, most = ROWS
    rows = least if least >= B or like.outputs * planes > WIDEST else most
    split, pieces = like.split, cdiv(D, like.block)
    if not split:
        tiles = cdiv(count, like.outputs) * cdiv(B, rows)
        split = min(max(1, multiprocessors(device) // tiles), pieces)
        split = cdiv(pieces, cdiv(pieces, split))  # none is without inputs
    piece_bytes = (rows + like.outputs * planes) * like.block * itemsize
    stages = max(1, min(like.stages, shared_memory(device) // piece_bytes))
    return like._replace(rows=rows, split=split, stages=stages)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    if device.type != "cuda":
        return SHARED_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _launch(kernel, how: Plan, count: int, x: Tensor, *tensors, **options: Any) -> None:
    B, D = x.shape
    pieces = cdiv(cdiv(D, how.block), how.split)
    # Programs that start early are placed where there is room, not evenly. That pays only where each has much
    # to do, with 64 sequences.
    early = how.rows == ROWS[1] and starts_early(x.device)
    if early:
        options["launch_pdl"] = True
    with on_device(x):
        kernel[(cdiv(count, how.outputs), cdiv(B, how.rows), how.split)](
            x, *tensors, B, D=D, R=how.outputs, BP=how.rows, BLOCK=how.block, LENGTH=pieces * how.block,
            STAGES=how.stages, EARLY=early, num_warps=how.warps, enable_fp_fusion=True, **options,
        )  # fmt: skip


def begin(x: Tensor, norm: Tensor) -> Stream:
    """A stream x (B, D) before a norm with weights (D,)."""
    return Stream(x, x * norm, x.float().square().sum(dim=1, keepdim=True))


def residual_step(x: Tensor, weight: Tensor, stream: Stream, norm: Tensor, workspace: Workspace) -> Stream:
    """The stream with x (B, D) times weight (OUT, D) added, before a norm with weights (OUT,)."""
    (B, D), OUT = x.shape, weight.shape[0]
    how = plan(RESIDUAL, B, D, OUT, 1, x.element_size(), x.device)
    tiles = cdiv(OUT, how.outputs)
    after = Stream(torch.empty_like(stream.x), torch.empty_like(stream.x), stream.squares.new_empty(B, tiles))
    shared = workspace.sized(tiles * cdiv(B, how.rows), how.split * how.rows * how.outputs)
    _launch(
        _residual_kernel, how, OUT, x, weight, stream.x, norm, *after, *shared, OUT=OUT, TILES=tiles,
        SPLIT=how.split,
    )  # fmt: skip
    return after


def normed_step(stream: Stream, eps: float, weight: Tensor, gated: bool = False) -> Tensor:
    """The stream's norm times weight (OUT, D), (B, OUT).

    gated: weight is (2 OUT, D): silu of the first half's outputs times the second's.
    """
    x, planes = stream.scaled, 2 if gated else 1
    count, tiles = weight.shape[0] // planes, stream.squares.shape[1]
    how = plan(GATED if gated else HEAD, *x.shape, count, planes, x.element_size(), x.device)
    out = x.new_empty(x.shape[0], count)
    _launch(
        _normed_kernel, how, count, x, stream.squares, weight, out, eps=eps, OUT=count, TILES=tiles,
        PADDED=next_power_of_2(tiles), GATED=gated,
    )  # fmt: skip
    return out


def mix_step(
    stream: Stream, eps: float, weight: Tensor, bias: Tensor, state: Tensor, gate: str, window: bool
) -> Tensor:
    """A step of BD-LRU, or of H-LRU (`window`); writes `state` in place.

    Arguments and result as of `fused_step.mix_step`. On Hopper the state is read before the kernels ahead
    have ended, so between two steps on one state there must be a kernel of another kind (one that was not
    launched early), as the embedding's is.
    """
    x, (N, M), tiles = stream.scaled, state.shape[1:], stream.squares.shape[1]
    padded = next_power_of_2(M)
    whole = 1 if window else padded
    first = 1 << ((M + 2).bit_length() - 1)
    rest = next_power_of_2(M + 2 - first) if first < M + 2 else 0
    outputs = max(whole, WIDEST // next_power_of_2(M + 2))
    how = plan(MIX._replace(outputs=outputs), *x.shape, N * whole, first + rest, x.element_size(), x.device)
    out = x.new_empty(x.shape[0], N * M)
    _launch(
        _mix_kernel, how, N * whole, x, stream.squares, weight, bias, state, out, eps=eps, N=N, M=M,
        MP=padded, FIRST=first, REST=rest, TILES=tiles, PADDED=next_power_of_2(tiles), WINDOW=window,
        GATE=gate,
    )  # fmt: skip
    return out
