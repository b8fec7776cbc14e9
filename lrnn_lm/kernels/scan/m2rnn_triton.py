"""The matrix-to-matrix RNN in Triton: the walk over time and its analytic backward pass; see `m2rnn.py`.

One program a head of a sequence carries the state in registers from step to step; S W is a product on tensor
cores, of fp32 factors as three products of tf32. The forward pass keeps the state before every chunk of
steps. The backward pass takes the chunks from the last to the first: it walks through a chunk once more,
writes its states to a scratch of its own, and walks back. The gradient of W is a sum a program, so that two
runs give the same bits.

Legend: B batch, T time, H heads, K rows and V columns of a state, KP and VP these as powers of two of at
least 16, L steps a chunk; S state, Z what tanh gives, s = dL/dS.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_device import multiprocessors, next_power_of_2, on_device, settle_cache_keys
from .matrix_state_kernels import _matrix, _store_matrix, _transposed
from .triton_gates import gate_value
from .triton_launch import reset_flags
from .triton_rows import as_int64, product

# Numbers of the state a warp, by whether it is the backward pass: 32 and 16 a lane, so that registers hold a
# step of 64 x 16.
STATE_A_WARP = {False: 1024, True: 512}
PROGRAMS_PER_SM = 4  # below which more warps share a state, down to 16 rows each


@triton.jit
def _loaded(at, index, SIZE: tl.constexpr):
    """A vector of SIZE numbers in fp32, zeros beyond."""
    return tl.load(at + index, mask=index < SIZE, other=0.0).to(tl.float32)


@triton.jit
def _entering(S, flag, HAS_RESET: tl.constexpr):
    """S as a step takes it: zero where a document starts."""
    return tl.where(tl.load(flag) != 0, 0.0, S) if HAS_RESET else S


@triton.jit
def _candidate(S, k, v, W, FP32: tl.constexpr):
    """Z = tanh(S W + k v^T)."""
    return gate_value(product(S, W, k[:, None] * v[None, :], FP32), "tanh")


@triton.jit(do_not_specialize=["T"])
def m2rnn_forward_kernel(
    queries, keys, values, weight, keep, start, flags, y, last, states, T, H: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, L: tl.constexpr, HAS_RESET: tl.constexpr,
    FP32: tl.constexpr,
):  # fmt: skip
    """y (B, T, H, V), the last state and those before chunks. queries, keys (B, T, H, K), values (B, T, H,
    V); weight (H, V, V), keep (B, T, H), start and last (B, H, K, V), states (B, H, chunks - 1, K, V) fp32;
    flags (B, T) int32. All contiguous."""
    head, b = tl.program_id(0) % H, as_int64(tl.program_id(0) // H)
    item, rows, cols = b * H + head, tl.arange(0, KP), tl.arange(0, VP)
    W = _matrix(weight + head * (V * V), cols, cols, V, V, V)
    S = _matrix(start + item * (K * V), rows, cols, V, K, V)
    states += item * ((T - 1) // L * (K * V))
    for t in range(T):  # S [KP, VP] stays in registers
        at = (b * T + t) * H + head
        if (t > 0) & (t % L == 0):
            _store_matrix(states + (t // L - 1) * (K * V), S, rows, cols, V, K, V)
        S = _entering(S, flags + b * T + t, HAS_RESET)
        Z = _candidate(S, _loaded(keys + at * K, rows, K), _loaded(values + at * V, cols, V), W, FP32)
        S = Z + tl.load(keep + at) * (S - Z)
        read = tl.sum(_loaded(queries + at * K, rows, K)[:, None] * S, axis=0)
        tl.store(y + at * V + cols, read.to(y.dtype.element_ty), mask=cols < V)
    _store_matrix(last + item * (K * V), S, rows, cols, V, K, V)


@triton.jit(do_not_specialize=["T"])
def m2rnn_backward_kernel(
    queries, keys, values, weight, keep, start, flags, states, grad, stop, scratch, d_queries, d_keys,
    d_values, d_keep, d_weight, d_start, T, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KP: tl.constexpr, VP: tl.constexpr, L: tl.constexpr, HAS_RESET: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """Gradients of the forward kernel's inputs, of the same shapes, and d_weight (B, H, V, V) fp32.

    As there, and grad (B, T, H, V), stop (B, H, K, V) fp32: dL/dy, dL/d of the last state; scratch (B, H,
    L, KP, VP) fp32.
    """
    head, b = tl.program_id(0) % H, as_int64(tl.program_id(0) // H)
    item, rows, cols = b * H + head, tl.arange(0, KP), tl.arange(0, VP)
    W = _matrix(weight + head * (V * V), cols, cols, V, V, V)
    WT = _transposed(weight + head * (V * V), cols, cols, V, V, V)
    s = _matrix(stop + item * (K * V), rows, cols, V, K, V)
    dW = tl.zeros([VP, VP], tl.float32)
    scratch += item * (L * KP * VP) + rows[:, None] * VP + cols[None, :]
    n_chunks = (T + L - 1) // L
    states += item * ((n_chunks - 1) * (K * V))
    for back in range(n_chunks):
        begin = (n_chunks - 1 - back) * L
        end = tl.minimum(begin + L, T)
        before = start + item * (K * V)
        if begin > 0:
            before = states + (begin // L - 1) * (K * V)
        S = _matrix(before, rows, cols, V, K, V)
        for t in range(begin, end):
            at = (b * T + t) * H + head
            S = _entering(S, flags + b * T + t, HAS_RESET)
            tl.store(scratch + (t - begin) * (KP * VP), S)
            Z = _candidate(S, _loaded(keys + at * K, rows, K), _loaded(values + at * V, cols, V), W, FP32)
            S = Z + tl.load(keep + at) * (S - Z)
        tl.debug_barrier()  # a thread reads what others wrote
        # One stage: registers that address the loads of later steps would make others spill.
        for i in tl.range(end - begin, num_stages=1):
            t = end - 1 - i
            at = (b * T + t) * H + head
            S = tl.load(scratch + (t - begin) * (KP * VP))
            k, v, f = _loaded(keys + at * K, rows, K), _loaded(values + at * V, cols, V), tl.load(keep + at)
            g = _loaded(grad + at * V, cols, V)[None, :]
            Z = _candidate(S, k, v, W, FP32)
            dq = tl.sum((Z + f * (S - Z)) * g, axis=1)
            s += _loaded(queries + at * K, rows, K)[:, None] * g
            tl.store(d_keep + at, tl.sum(tl.sum(s * (S - Z), axis=1), axis=0))
            dX = s * (1.0 - f) * (1.0 - Z * Z)
            dk, dv = tl.sum(dX * v[None, :], axis=1), tl.sum(dX * k[:, None], axis=0)
            tl.store(d_queries + at * K + rows, dq.to(d_queries.dtype.element_ty), mask=rows < K)
            tl.store(d_keys + at * K + rows, dk.to(d_keys.dtype.element_ty), mask=rows < K)
            tl.store(d_values + at * V + cols, dv.to(d_values.dtype.element_ty), mask=cols < V)
            s = _entering(product(dX, WT, f * s, FP32), flags + b * T + t, HAS_RESET)
            # Last, when little else is live: each warp holds all of its factors, 128 registers at 64 x 16.
            dW = product(tl.trans(S), dX, dW, FP32)
        tl.debug_barrier()  # before the next chunk's states are written over these
    _store_matrix(d_weight + item * (V * V), dW, cols, cols, V, V, V)
    _store_matrix(d_start + item * (K * V), s, rows, cols, V, K, V)


settle_cache_keys(globals())


def _padded(K: int, V: int) -> tuple[int, int]:
    return max(16, next_power_of_2(K)), max(16, next_power_of_2(V))


def _launch(
    kernel: Any, queries: Tensor, keys: Tensor, values: Tensor, weight: Tensor, keep: Tensor, h0: Tensor,
    reset: Tensor | None, states: Tensor, chunk: int, **tensors: Tensor,
) -> None:  # fmt: skip
    B, H, K, V = h0.shape
    KP, VP = _padded(K, V)
    warps = max(1, KP * VP // STATE_A_WARP["grad" in tensors])
    while warps < KP // 16 and B * H * warps < PROGRAMS_PER_SM * multiprocessors(h0.device):
        warps *= 2
    with on_device(h0):
        kernel[(B * H,)](
            queries, keys, values, weight, keep, h0, states=states, **tensors, T=values.shape[1], H=H, K=K,
            V=V, KP=KP, VP=VP, L=chunk, flags=values if reset is None else reset_flags(reset),
            HAS_RESET=reset is not None, FP32="ieee" if torch.version.hip else "tf32x3", num_warps=warps,
            enable_fp_fusion=True,
        )  # fmt: skip


class TritonM2RNN:
    """The functions that `m2rnn.py` needs; `TorchM2RNN` there has them in plain torch."""

    @staticmethod
    def walk(*given: Any) -> tuple[Tensor, Tensor]:
        y, last = torch.empty_like(given[2]), torch.empty_like(given[5])
        _launch(m2rnn_forward_kernel, *given, y=y, last=last)
        return y, last

    @staticmethod
    def walk_backward(*given: Any) -> list[Tensor]:
        *given, chunk, grad, grad_last = given
        d_q, d_k, d_v, _, d_keep, d_h0 = made = [torch.empty_like(x) for x in given[:6]]
        B, H, K, V = d_h0.shape
        sums, scratch = d_h0.new_empty(B, H, V, V), d_h0.new_empty(B, H, chunk, *_padded(K, V))
        _launch(
            m2rnn_backward_kernel, *given, chunk, grad=grad, stop=grad_last, scratch=scratch, d_queries=d_q,
            d_keys=d_k, d_values=d_v, d_keep=d_keep, d_weight=sums, d_start=d_h0,
        )  # fmt: skip
        made[3] = sums.sum(dim=0)
        return made
