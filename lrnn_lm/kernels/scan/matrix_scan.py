"""BD-LRU whose state is a matrix: in each head `S_t = blockdiag(A_t) S_{t-1} + k_t v_t^T`, `y_t = S_t^T q_t`.

Checks, the choice of a backend, and the plain-torch scan (any block size, fp64); the Triton scan is in
`matrix.py`. Gates come normalised: the absolute values of a row of A_t and of its write weight sum to at most
1, so no number of S exceeds the largest of v.

Legend: B batch, T time, H heads, K slots (rows of a head's state), M slots a block, N = K / M blocks a head,
V columns of the state; A transitions, k writes, v values, q queries, S state, s = dL/dS.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from .. import reference
from ..derivatives import differentiable_once, save_inputs
from ..dispatch import (
    check_state,
    choose_backend,
    expect_floats,
    expect_shape,
    own_dtypes,
    triton_obstacle,
)
from ..reference import compute_dtype
from ..torch_scan import starts_by_step

SLAB_BYTES = 1 << 26  # of states that the torch scan holds at once: 64 MiB
TRITON_BLOCKS = (1, 2, 4, 8, 16)
# Blocks need the dense transition of a head, which does not fit beside 128 slots in 227 KB, a Hopper SM's
# shared memory.
TRITON_SLOTS, TRITON_DIAGONAL_SLOTS = 64, 128


def matrix_scan(
    transitions: Tensor,
    writes: Tensor,
    values: Tensor,
    queries: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    backend: str = "auto",
    erase: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan of the matrix-valued BD-LRU, `S_t = blockdiag(A_t) S_{t-1} + k_t v_t^T`, `y_t = S_t^T q_t`.

    Args:
        transitions: (B, T, H, K, M), row r = n M + i of a head is row i of block n of A_t; any strides. Decay
            rates near 1 need fp32: bf16 has no number between 0.996 and 1.
        writes: (B, T, H, K) k; any strides.
        values: (B, T, H, V) v; any strides.
        queries: (B, T, H, K) q; any strides.
        h0: (B, H, K, V) state before the first step; zeros if None.
        reset, backend: as in `block_diagonal_scan`.
        erase: (B, T, H, K) e; a write then replaces what the state holds at e, `k_t w_t^T` with
            `w_t = v_t - (blockdiag(A_t) S_{t-1})^T e_t` (the delta rule, arXiv 2412.06464; with M = 1 that
            of arXiv 2510.26692). The states stay bounded where k_t = beta_t e_t with |e_t| <= 1 and
            0 <= beta_t <= 1.
    Returns:
        y (B, T, H, V) in the dtype of `values`, and S_T (B, H, K, V) in fp32 (fp64 where an input is). Both
        are differentiable, once, with respect to all inputs but `reset`.
    Raises:
        ValueError: shapes that do not fit, an unknown backend, or a backend that cannot run here.
    """
    _check(transitions, writes, values, queries, h0, reset)
    inputs = (transitions, writes, values, queries)
    if erase is not None:
        expect_shape("erase", erase, queries.shape)
        expect_floats(erase=erase)
    backend = choose_backend(backend, values, partial(_triton_obstacle, *inputs))
    if backend == "reference" or transitions.shape[1] == 1:  # one step of decoding: chunks would gain nothing
        with own_dtypes(values):
            return reference.matrix_scan(*inputs, h0, reset, erase)
    dtype = compute_dtype(*inputs)
    h0 = None if h0 is None else h0.to(dtype)
    if backend == "triton":
        return _triton_scan(*inputs, h0, reset, erase)
    if h0 is None:
        B, _, H, K = queries.shape
        h0 = values.new_zeros(B, H, K, values.shape[-1], dtype=dtype)
    with own_dtypes(values):
        return _scan(*inputs, h0, reset, erase)


def _triton_scan(
    transitions: Tensor, writes: Tensor, values: Tensor, queries: Tensor, h0: Tensor | None,
    reset: Tensor | None, erase: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from .matrix import matrix_scan_triton  # triton is imported only where it runs

    K, M, V = *transitions.shape[-2:], values.shape[-1]
    slots, columns = _padded(K, M, V)
    if (slots, columns) != (K, V):  # with slots and columns that stay zero
        more = (0, slots - K)
        transitions = functional.pad(transitions, (0, 0, *more))
        writes, queries = functional.pad(writes, more), functional.pad(queries, more)
        values = functional.pad(values, (0, columns - V))
        h0 = None if h0 is None else functional.pad(h0, (0, columns - V, *more))
        erase = None if erase is None else functional.pad(erase, more)
    y, last = matrix_scan_triton(transitions, writes, values, queries, h0, reset, erase)
    return y[..., :V], last[:, :, :K, :V]


def _padded(K: int, M: int, V: int) -> tuple[int, int]:
    """Slots and columns of the kernels: a power of two of blocks; of columns too, or whole programs."""
    from .matrix import most_columns  # triton is imported only where it runs

    slots = M << (K // M - 1).bit_length()
    program = min(most_columns(slots), 1 << (V - 1).bit_length())
    return slots, -(-V // program) * program


def _check(
    transitions: Tensor, writes: Tensor, values: Tensor, queries: Tensor, h0: Tensor | None,
    reset: Tensor | None,
) -> None:  # fmt: skip
    if transitions.ndim != 5 or values.ndim != 4:
        raise ValueError(
            f"transitions has shape {tuple(transitions.shape)} and values {tuple(values.shape)}; "
            "expected (B, T, H, K, M) and (B, T, H, V)"
        )
    B, T, H, K, M = transitions.shape
    V = values.shape[-1]
    if M < 1 or K % M:
        raise ValueError(f"{K} slots do not split into blocks of {M}")
    expect_shape("writes", writes, (B, T, H, K))
    expect_shape("values", values, (B, T, H, V))
    expect_shape("queries", queries, (B, T, H, K))
    check_state(h0, reset, (B, H, K, V), (B, T))
    expect_floats(transitions=transitions, writes=writes, values=values, queries=queries)


def _triton_obstacle(transitions: Tensor, writes: Tensor, values: Tensor, queries: Tensor) -> str | None:
    K, M = transitions.shape[-2:]
    if reason := triton_obstacle(transitions, writes, values, queries):
        return reason
    if M not in TRITON_BLOCKS:
        return f"block size {M} is not one of {', '.join(map(str, TRITON_BLOCKS))}"
    slots = TRITON_DIAGONAL_SLOTS if M == 1 else TRITON_SLOTS
    if slots < K:
        return f"a head of {K} slots is above {slots}"
    return None


# The plain-torch scan. Working tensors put time first; a step is (B, H, N, M, ..) -------------------------


def _slabs(T: int, state: Tensor) -> list[slice]:
    # The backward pass keeps the state of every step of a slab, K V numbers a head each.
    steps = max(1, min(T, SLAB_BYTES // max(1, state.numel() * state.element_size())))
    return [slice(start, min(start + steps, T)) for start in range(0, T, steps)]


def _slab(x: Tensor, part: slice, dtype: torch.dtype, M: int) -> Tensor:
    """Steps `part` of (B, T, H, K, ..) as (t, B, H, N, M, ..) in `dtype`."""
    return x[:, part].transpose(0, 1).to(dtype).unflatten(3, (-1, M))


def _row(x: Tensor, part: slice, dtype: torch.dtype) -> Tensor:
    """Steps `part` of (B, T, H, V) as (t, B, H, 1, 1, V) in `dtype`."""
    return x[:, part].transpose(0, 1).to(dtype)[:, :, :, None, None]


def _begun(S: Tensor, starts: dict[int, Tensor], t: int) -> Tensor:
    """S (B, H, N, M, V) as step t reads it: zeros where a document starts, not a product: S may be NaN."""
    return S.masked_fill(starts[t], 0) if t in starts else S


def _slabs_of(
    part: slice, dtype: torch.dtype, M: int, transitions: Tensor, writes: Tensor, values: Tensor,
    erase: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    A, k = (_slab(x, part, dtype, M) for x in (transitions, writes))
    return A, k, _row(values, part, dtype), None if erase is None else _slab(erase, part, dtype, M)


def _product(A: Tensor, S: Tensor) -> Tensor:
    """A S in each block. With M = 1 a batched product would be one call of a library for every slot."""
    return A * S if A.shape[-1] == 1 else A @ S


def _outer(s: Tensor, S: Tensor) -> Tensor:
    """s S^T in each block: sums over the V columns."""
    return (s * S).sum(-1, keepdim=True) if s.shape[-2] == 1 else s @ S.mT


def _step(S: Tensor, A: Tensor, k: Tensor, v: Tensor, e: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """One step from S (B, H, N, M, V): A S, what is written of v after the erasure, and S after it."""
    mixed = _product(A, S)
    if e is not None:
        v = v - (e.unsqueeze(-1) * mixed).sum((2, 3), keepdim=True)
    return mixed, v, torch.addcmul(mixed, k.unsqueeze(-1), v)


def _states(
    S: Tensor, A: Tensor, k: Tensor, v: Tensor, e: Tensor | None, starts: dict[int, Tensor], part: slice
) -> tuple[Tensor, Tensor]:
    """S (B, H, N, M, V) before every step of a slab, (t, B, H, N, M, V), and after the last."""
    before = S.new_empty(A.shape[0], *S.shape)
    for i in range(A.shape[0]):
        before[i] = _begun(S, starts, part.start + i)
        S = _step(before[i], A[i], k[i], v[i], None if e is None else e[i])[-1]
    return before, S


@torch.library.custom_op("lrnn_lm::matrix_scan_torch", mutates_args=())
def _scan(
    transitions: Tensor, writes: Tensor, values: Tensor, queries: Tensor, h0: Tensor, reset: Tensor | None,
    erase: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    T, M, dtype = transitions.shape[1], transitions.shape[-1], h0.dtype
    starts = starts_by_step(reset, 5)
    y = values.new_empty(values.shape)
    S = h0.unflatten(2, (-1, M)).clone()
    for part in _slabs(T, h0):
        A, k, v, e = _slabs_of(part, dtype, M, transitions, writes, values, erase)
        q = _slab(queries, part, dtype, M)
        for i in range(len(A)):
            S = _step(_begun(S, starts, part.start + i), A[i], k[i], v[i], None if e is None else e[i])[-1]
            y[:, part.start + i] = (q[i].unsqueeze(-1) * S).sum((2, 3)).to(y.dtype)
    return y, S.flatten(2, 3).contiguous()


@torch.library.custom_op("lrnn_lm::matrix_scan_torch_backward", mutates_args=())
def _scan_backward(
    grad: Tensor, grad_last: Tensor, transitions: Tensor, writes: Tensor, values: Tensor, queries: Tensor,
    h0: Tensor, reset: Tensor | None, erase: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    T, M, dtype = transitions.shape[1], transitions.shape[-1], h0.dtype
    starts = starts_by_step(reset, 5)
    d_a, d_k, d_v, d_q = made = [x.new_empty(x.shape) for x in (transitions, writes, values, queries)]
    d_e = None if erase is None else erase.new_empty(erase.shape)
    # Forward once more, keeping the state at the start of each slab; then the slabs from the last to the
    # first.
    slabs, S, kept = _slabs(T, h0), h0.unflatten(2, (-1, M)), []
    for part in slabs:
        kept.append(S)
        S = _states(S, *_slabs_of(part, dtype, M, transitions, writes, values, erase), starts, part)[1]
    s = grad_last.unflatten(2, (-1, M)).clone()  # dL/dS
    for part, start in zip(reversed(slabs), reversed(kept), strict=True):
        A, k, v, e = _slabs_of(part, dtype, M, transitions, writes, values, erase)
        q, g = _slab(queries, part, dtype, M), _row(grad, part, dtype)
        before, _ = _states(start, A, k, v, e, starts, part)
        for i in range(len(A) - 1, -1, -1):
            t = part.start + i
            mixed, written, after = _step(before[i], A[i], k[i], v[i], None if e is None else e[i])
            s = torch.addcmul(s, q[i].unsqueeze(-1), g[i])
            d_q[:, t] = (after * g[i]).sum(-1).flatten(2).to(d_q.dtype)
            d_k[:, t] = (s * written).sum(-1).flatten(2).to(d_k.dtype)
            d_written = (s * k[i].unsqueeze(-1)).sum((2, 3), keepdim=True)
            d_v[:, t] = d_written[:, :, 0, 0].to(d_v.dtype)
            if e is not None:
                d_e[:, t] = -(mixed * d_written).sum(-1).flatten(2).to(d_e.dtype)
                s = torch.addcmul(s, e[i].unsqueeze(-1), d_written, value=-1)
            d_a[:, t] = _outer(s, before[i]).flatten(2, 3).to(d_a.dtype)
            s = _begun(_product(A[i].mT, s), starts, t)
    return [*made, s.flatten(2, 3).contiguous(), *([] if d_e is None else [d_e])]


@_scan.register_fake
def _(transitions, writes, values, queries, h0, reset, erase):
    return values.new_empty(values.shape), h0.new_empty(h0.shape)


@_scan_backward.register_fake
def _(grad, grad_last, transitions, writes, values, queries, h0, reset, erase):
    given = (transitions, writes, values, queries, h0, erase)
    return [x.new_empty(x.shape) for x in given if x is not None]


def _run_backward(ctx, grad, grad_last):
    with own_dtypes(grad):
        *gradients, d_h0, d_erase = (*_scan_backward(grad, grad_last, *ctx.saved_tensors), None)[:6]
    return *gradients, d_h0, None, d_erase


_scan.register_autograd(_run_backward, setup_context=save_inputs)
differentiable_once(_scan_backward)
