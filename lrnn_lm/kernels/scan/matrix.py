"""The matrix-valued BD-LRU in Triton, on the host: launches, outputs, and the custom op.

The kernels are in `matrix_kernels.py` and `matrix_backward_kernels.py` (within chunks), in
`matrix_erase_kernels.py` (what writes erase) and in `matrix_state_kernels.py` (from chunk to chunk).
Only the inputs are saved for the backward pass.

Legend: B batch, T time, H heads, K slots a head, M slots a block, V columns, L steps a chunk, C chunks.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..derivatives import differentiable_once, save_inputs
from ..triton_device import INTERPRETED, LANES, cdiv, multiprocessors, on_device
from .matrix_backward_kernels import chunk_backward_kernel
from .matrix_erase_kernels import erase_backward_kernel, erase_forward_kernel
from .matrix_kernels import chunk_forward_kernel
from .matrix_state_kernels import state_backward_kernel, state_forward_kernel
from .triton_launch import reset_flags

# Scores, reads, keys, whole; of erased keys scores, reads: see `matrix_kernels.py`.
Summaries = tuple[Tensor, ...]

CHUNK = 16  # L: the smallest product that tensor cores take
MOST_PHASES = 4  # copies of the loop over steps: more compute less with zeros, and take longer to compile
# A program holds a state in registers: at most 64 x 128 numbers, of which fp32 spills some, and blocks above
# one a little. Wider heads are several programs, of 16 columns or more.
PROGRAM_STATE = 8192
ERASE_WARPS = 1  # an item has products of 16 rows
PROGRAMS_PER_SM = 16  # of the backward pass within chunks; its scratch has room for so many


class _Chunks(NamedTuple):
    """The chunks of a scan, and how they are laid out on lanes; see `matrix_kernels.py`."""

    B: int
    T: int
    H: int
    K: int
    M: int
    V: int
    count: int
    options: dict[str, Any]  # of the kernels within chunks

    @property
    def total(self) -> int:
        """Items: a chunk of a head each."""
        return self.B * self.count * self.H

    @property
    def columns(self) -> int:
        """Of a program from chunk to chunk."""
        return min(self.V, most_columns(self.K))

    @property
    def parts(self) -> int:
        """Programs a head from chunk to chunk."""
        return self.V // self.columns

    @property
    def work(self) -> int:
        """Programs, of ITEMS items each."""
        return cdiv(self.total, self.options["ITEMS"])


def most_columns(K: int) -> int:
    """Columns that a program holds beside K slots."""
    return PROGRAM_STATE // max(K, 64)


def _chunks(transitions: Tensor, V: int, reset: Tensor | None) -> _Chunks:
    B, T, H, K, M = transitions.shape
    count = cdiv(T, CHUNK)
    lanes = min(K // M, LANES)  # share the blocks of a head
    groups = min(M, LANES // lanes, CHUNK)  # share the columns, so that a warp is full
    # The interpreter runs one program after another, so give it few and wide ones.
    items = max(1, (8 if INTERPRETED else 1) * LANES // (lanes * groups))
    options = {
        "H": H, "K": K, "M": M, "R": K // M // lanes, "NL": lanes, "G": groups, "ITEMS": items, "L": CHUNK,
        "MASKED": T % CHUNK != 0 or B * count * H % items != 0,
        "HAS_RESET": reset is not None, "num_warps": max(1, items * groups * lanes // LANES),
        "enable_fp_fusion": True,
    }  # fmt: skip
    return _Chunks(B, T, H, K, M, V, count, options)


def _strides(prefix: str, axes: str, x: Tensor) -> dict[str, int]:
    """Strides of all axes but the batch's, by their names in the kernels."""
    return {f"{prefix}_{axis}": stride for axis, stride in zip(axes, x.stride()[1:], strict=True)}


def _within(
    transitions: Tensor, writes: Tensor, queries: Tensor, flags: Tensor | None, erased: Tensor | None = None
) -> dict[str, Any]:
    """Arguments of both kernels within chunks."""
    e = queries if erased is None else erased
    return {
        "transitions": transitions, "writes": writes, "queries": queries, "erased": erased, "flags": flags,
        "a_b": transitions.stride(0), "k_b": writes.stride(0), "q_b": queries.stride(0), "e_b": e.stride(0),
        **_strides("A", "THKM", transitions), **_strides("K", "THK", writes), **_strides("Q", "THK", queries),
        **_strides("E", "THK", e), "ERASES": erased is not None,
    }  # fmt: skip


def _summaries(chunks: _Chunks, inputs: dict[str, Any], dtype: torch.dtype) -> Summaries:
    B, H, K, C = chunks.B, chunks.H, chunks.K, chunks.count
    new = inputs["transitions"].new_empty
    scores = new(B, C, H, CHUNK, CHUNK, dtype=dtype)
    reads, keys = (new(B, C, H, CHUNK, K, dtype=dtype) for _ in range(2))
    whole = new(B, C, H, K, chunks.M, dtype=torch.float32)
    of_erased = ()
    if inputs["ERASES"]:
        of_erased = tuple(new(B, C, H, CHUNK, n, dtype=torch.float32) for n in (CHUNK, K))
    erased_scores, erased_reads = of_erased or (None, None)
    chunk_forward_kernel[(chunks.work,)](
        scores=scores, reads=reads, keys=keys, whole=whole, erased_scores=erased_scores,
        erased_reads=erased_reads, T=chunks.T, n_chunks=C, total=chunks.total,
        PHASES=min(CHUNK // chunks.options["G"], MOST_PHASES), **inputs, **chunks.options,
    )  # fmt: skip
    return scores, reads, keys, whole, *of_erased


def _of_values(chunks: _Chunks, values: Tensor) -> dict[str, Any]:
    """Arguments of all kernels that read values."""
    return {
        "values": values, "v_b": values.stride(0), **_strides("V", "THV", values), "T": chunks.T,
        "n_chunks": chunks.count, "H": chunks.H, "K": chunks.K, "V": chunks.V, "KP": max(chunks.K, 16),
        "VP": max(chunks.columns, 16), "PARTS": chunks.parts, "L": CHUNK, "G": chunks.options["G"],
        "FP32": "ieee" if torch.version.hip else "tf32x3",
    }  # fmt: skip


def _of_state(chunks: _Chunks, values: Tensor, erase: Tensor | None) -> dict[str, Any]:
    """Arguments of both kernels from chunk to chunk."""
    erases = {"erase": erase, "ERASES": erase is not None}
    return {**_of_values(chunks, values), **erases, "M": chunks.M, "num_warps": 4}


def _erasures(chunks: _Chunks, of_erased: Summaries, values: Tensor) -> tuple[Tensor, Tensor | None]:
    """What values add, and what they erase of the state before the chunk: without erasure, themselves."""
    if not of_erased:
        return values, None
    added, erased = values.new_empty(values.shape), torch.empty_like(of_erased[1], dtype=values.dtype)
    erase_forward_kernel[(chunks.total,)](
        *of_erased, added=added, erased=erased, num_warps=ERASE_WARPS, **_of_values(chunks, values)
    )
    return added, erased


def _erasures_backward(
    chunks: _Chunks, of_erased: Summaries, values: Tensor, d_added: Tensor, d_erased: Tensor | None
) -> tuple[Tensor, Summaries]:
    """dL/d of the values, and of the scores and reads of erased keys."""
    if not of_erased:
        return d_added, ()
    d_values, d_of_erased = torch.empty_like(d_added), tuple(torch.empty_like(x) for x in of_erased)
    erase_backward_kernel[(chunks.total,)](
        *of_erased, d_added=d_added, d_erased=d_erased, d_scores=d_of_erased[0], d_reads=d_of_erased[1],
        d_values=d_values, num_warps=ERASE_WARPS, **_of_values(chunks, values),
    )  # fmt: skip
    return d_values, d_of_erased


def _outputs(
    chunks: _Chunks, summaries: Summaries, values: Tensor, erase: Tensor | None, h0: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and the last state, from chunk to chunk; summaries are the first four."""
    y = values.new_empty(values.shape)
    last = values.new_empty(chunks.B, chunks.H, chunks.K, chunks.V, dtype=torch.float32)
    state_forward_kernel[(chunks.B * chunks.H * chunks.parts,)](
        *summaries, start=h0, y=y, last=last, states=None, HAS_START=h0 is not None, KEEP=False,
        **_of_state(chunks, values, erase),
    )  # fmt: skip
    return y, last


def _outputs_backward(
    chunks: _Chunks, summaries: Summaries, values: Tensor, erase: Tensor | None, h0: Tensor | None,
    grad: Tensor, grad_last: Tensor,
) -> tuple[Summaries, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """dL/d of the summaries, values, erase, and h0 in fp32."""
    B, C, H, K, V = chunks.B, chunks.count, chunks.H, chunks.K, chunks.V
    of_state = _of_state(chunks, values, erase)
    states = values.new_empty(B, C, H, K, V)  # before each chunk: recomputed, as saving them costs memory
    state_forward_kernel[(B * H * chunks.parts,)](
        *summaries, start=h0, y=None, last=None, states=states, HAS_START=h0 is not None, KEEP=True,
        **of_state,
    )  # fmt: skip
    of_parts = [
        None if x is None else x.new_empty(*x.shape[:3], chunks.parts, *x.shape[3:])
        for x in (*summaries, erase)
    ]
    d_scores, d_reads, d_keys, d_whole, d_erase = of_parts
    d_values = values.new_empty(values.shape)
    d_h0 = values.new_empty(B, H, K, V, dtype=torch.float32)
    state_backward_kernel[(B * H * chunks.parts,)](
        *summaries, states=states, grad=grad, grad_last=grad_last.contiguous(), d_scores=d_scores,
        d_reads=d_reads, d_keys=d_keys, d_whole=d_whole, d_values=d_values, d_erase=d_erase, d_start=d_h0,
        g_b=grad.stride(0), **_strides("G", "THV", grad), **of_state,
    )  # fmt: skip
    *d_summaries, d_erase = (
        None if x is None else x.sum(3) if chunks.parts > 1 else x.squeeze(3) for x in of_parts
    )
    return tuple(d_summaries), d_values, d_erase, d_h0


def _summaries_backward(
    chunks: _Chunks, inputs: dict[str, Any], d_summaries: Summaries
) -> tuple[Tensor, ...]:
    """dL/d of transitions, as M planes (B, T, M, H, K) in memory, of writes, queries, and erased keys."""
    B, T, H, K, M = chunks.B, chunks.T, chunks.H, chunks.K, chunks.M
    d_scores, d_reads, d_keys, d_whole, *of_erased = d_summaries
    d_erased_scores, d_erased_reads = of_erased or (None, None)
    d_a = inputs["transitions"].new_empty(B, T, M, H, K).permute(0, 1, 3, 4, 2)
    names = ("writes", "queries", "erased") if of_erased else ("writes", "queries")
    d_k, d_q, *d_e = (inputs[name].new_empty(B, T, H, K) for name in names)
    programs = min(chunks.work, PROGRAMS_PER_SM * multiprocessors(d_a.device))
    options = chunks.options
    # Programs take items one after another, so scratch is as large as the device, not as the batch.
    columns = (M + CHUNK) // options["G"] * options["R"] * M  # numbers a lane
    lanes = options["ITEMS"] * options["G"] * options["NL"]
    chunk_backward_kernel[(programs,)](
        d_scores=d_scores, d_reads=d_reads, d_keys=d_keys, d_whole=d_whole,
        d_erased_scores=d_erased_scores, d_erased_reads=d_erased_reads,
        d_transitions=d_a, d_writes=d_k, d_queries=d_q, d_erased=d_e[0] if d_e else None,
        scratch=d_scores.new_empty(programs, CHUNK, columns * lanes), T=T, n_chunks=chunks.count,
        total=chunks.total, work=chunks.work, **inputs, **options,
    )  # fmt: skip
    return d_a, d_k, d_q, *d_e


@torch.library.custom_op("lrnn_lm::matrix_scan_triton", mutates_args=())
def _scan(
    transitions: Tensor, writes: Tensor, values: Tensor, queries: Tensor, h0: Tensor | None,
    reset: Tensor | None, erase: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    chunks = _chunks(transitions, values.shape[-1], reset)
    with on_device(values):
        inputs = _within(transitions, writes, queries, reset_flags(reset), erase)
        summaries = _summaries(chunks, inputs, values.dtype)
        return _outputs(chunks, summaries[:4], *_erasures(chunks, summaries[4:], values), h0)


@torch.library.custom_op("lrnn_lm::matrix_scan_triton_backward", mutates_args=())
def _scan_backward(
    grad: Tensor, grad_last: Tensor, transitions: Tensor, writes: Tensor, values: Tensor, queries: Tensor,
    h0: Tensor | None, reset: Tensor | None, erase: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """dL/d of transitions, writes, values, queries, of h0 in fp32, and of erase where there is one."""
    chunks = _chunks(transitions, values.shape[-1], reset)
    with on_device(values):
        inputs = _within(transitions, writes, queries, reset_flags(reset), erase)
        summaries = _summaries(chunks, inputs, values.dtype)
        given, of_erased = summaries[:4], summaries[4:]
        added = _erasures(chunks, of_erased, values)
        d_given, d_added, d_erased, d_h0 = _outputs_backward(chunks, given, *added, h0, grad, grad_last)
        d_v, d_of_erased = _erasures_backward(chunks, of_erased, values, d_added, d_erased)
        d_a, d_k, d_q, *d_e = _summaries_backward(chunks, inputs, (*d_given, *d_of_erased))
    return [d_a, d_k, d_v, d_q, d_h0, *d_e]


@_scan.register_fake
def _(transitions, writes, values, queries, h0, reset, erase):
    B, _, H, V = values.shape
    last = values.new_empty(B, H, queries.shape[-1], V, dtype=torch.float32)
    return values.new_empty(values.shape), last


@_scan_backward.register_fake
def _(grad, grad_last, transitions, writes, values, queries, h0, reset, erase):
    B, T, H, K, M = transitions.shape
    d_a = transitions.new_empty(B, T, M, H, K).permute(0, 1, 3, 4, 2)
    d_h0 = values.new_empty(B, H, K, values.shape[-1], dtype=torch.float32)
    d_e = [] if erase is None else [erase.new_empty(erase.shape)]
    return [d_a, *(x.new_empty(x.shape) for x in (writes, values, queries)), d_h0, *d_e]


def _run_backward(ctx, grad, grad_last):
    *inputs, h0, reset, erase = ctx.saved_tensors  # read once: activation checkpointing gives them once
    *gradients, d_h0, d_e = (*_scan_backward(grad, grad_last, *inputs, h0, reset, erase), None)[:6]
    return *gradients, None if h0 is None else d_h0, None, d_e


_scan.register_autograd(_run_backward, setup_context=save_inputs)
differentiable_once(_scan_backward)


def matrix_scan_triton(
    transitions: Tensor, writes: Tensor, values: Tensor, queries: Tensor, h0: Tensor | None,
    reset: Tensor | None, erase: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`reference.matrix_scan` on a GPU; h0 in fp32."""
    h0 = None if h0 is None else h0.contiguous()  # the kernels read it without strides
    return _scan(transitions, writes, values, queries, h0, reset, erase)
