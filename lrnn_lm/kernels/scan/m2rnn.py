"""Matrix-to-matrix RNN (M2RNN; Mishra et al., arXiv 2603.14360): checks, the custom op, and its plain torch.

    Z_t = tanh(S_{t-1} W + k_t v_t^T)    S_t = f_t S_{t-1} + (1 - f_t) Z_t    y_t = S_t^T q_t

With s = dL/dS_t, which takes q_t (dL/dy_t)^T, a step passes back

    dX = s (1 - f_t) (1 - Z_t^2)      dk = dX v      dv = dX^T k      dW = S_{t-1}^T dX
    df = sum s (S_{t-1} - Z_t)        dL/dS_{t-1} = f_t s + dX W^T

The walk in Triton is in `m2rnn_triton.py`.

Legend: B batch, T time, H heads, K keys' width (rows of a head's state S), V values' width (columns).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..derivatives import differentiable_once
from ..dispatch import check_state, choose_backend, expect_floats, expect_shape, own_dtypes, triton_obstacle
from ..reference import compute_dtype

TRITON_STATE, TRITON_COLUMNS = 8192, 64  # K V and V that a program's registers hold
CHUNK = 64  # steps between the states that the forward pass keeps for the backward pass


def m2rnn_scan(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    weight: Tensor,
    keep: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Scan of the matrix-to-matrix RNN.

    Args:
        queries, keys: (B, T, H, K).
        values: (B, T, H, V).
        weight: (H, V, V) W of each head.
        keep: (B, T, H) f, from 0 to 1; in fp32, as bf16 has no number between 0.996 and 1.
        h0: (B, H, K, V) state before the first step; zeros if None.
        reset: (B, T) bool, true where a document starts: the state before counts as zero.
        backend: auto, reference, torch or triton.
    Returns:
        y (B, T, H, V) in the dtype of `values`, and the last S (B, H, K, V) in fp32 (fp64 where an input is).
        Both are differentiable, once, with respect to all inputs but `reset`.
    Raises:
        ValueError: shapes that do not fit, an unknown backend, or one that cannot run here.
    """
    if queries.ndim != 4 or values.ndim != 4:
        raise ValueError(
            f"queries has shape {tuple(queries.shape)} and values {tuple(values.shape)}; "
            "expected (B, T, H, K) and (B, T, H, V)"
        )
    (B, T, H, K), V = queries.shape, values.shape[-1]
    expect_shape("keys", keys, (B, T, H, K))
    expect_shape("values", values, (B, T, H, V))
    expect_shape("weight", weight, (H, V, V))
    expect_shape("keep", keep, (B, T, H))
    check_state(h0, reset, (B, H, K, V), (B, T))
    inputs = queries, keys, values, weight, keep
    expect_floats(queries=queries, keys=keys, values=values, weight=weight, keep=keep)
    backend = choose_backend(backend, values, partial(_triton_obstacle, *inputs))
    with own_dtypes(values):
        if backend == "reference":
            return reference.m2rnn_scan(*inputs, h0, reset)
        dtype = compute_dtype(*inputs)
        start = values.new_zeros(B, H, K, V, dtype=dtype) if h0 is None else h0.to(dtype)
        exact = weight.to(dtype), keep.to(dtype), start
        tensors = [x.contiguous() for x in (queries, keys, values, *exact)]
        return _walk(*tensors, reset, backend == "triton")[:2]


def _triton_obstacle(*inputs: Tensor) -> str | None:
    K, V = inputs[0].shape[-1], inputs[2].shape[-1]
    padded = [max(16, 1 << (size - 1).bit_length()) for size in (K, V)]
    if (reason := triton_obstacle(*inputs)) is None and (
        V > TRITON_COLUMNS or padded[0] * padded[1] > TRITON_STATE
    ):
        reason = f"a head of {K} x {V} is above {TRITON_STATE} numbers or {TRITON_COLUMNS} columns"
    return reason


@torch.library.custom_op("lrnn_lm::m2rnn_scan", mutates_args=())
def _walk(
    queries: Tensor, keys: Tensor, values: Tensor, weight: Tensor, keep: Tensor, h0: Tensor,
    reset: Tensor | None, triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the last state, and of Triton the states before every chunk but the first."""
    states = _room(values, h0, triton)
    given = queries, keys, values, weight, keep, h0, reset
    return *_kernels(triton).walk(*given, states, CHUNK), states


@torch.library.custom_op("lrnn_lm::m2rnn_scan_backward", mutates_args=())
def _walk_backward(
    grad: Tensor, grad_last: Tensor, queries: Tensor, keys: Tensor, values: Tensor, weight: Tensor,
    keep: Tensor, h0: Tensor, reset: Tensor | None, states: Tensor, triton: bool,
) -> list[Tensor]:  # fmt: skip
    given = queries, keys, values, weight, keep, h0, reset
    grads = grad.contiguous(), grad_last.contiguous()
    return _kernels(triton).walk_backward(*given, states, CHUNK, *grads)


def _kernels(triton: bool) -> Any:
    if not triton:
        return TorchM2RNN
    from .m2rnn_triton import TritonM2RNN  # triton is imported only where it runs

    return TritonM2RNN


def _room(values: Tensor, h0: Tensor, triton: bool) -> Tensor:
    """For the states that `_walk` keeps, (B, H, chunks - 1, K, V)."""
    B, H, K, V = h0.shape
    return h0.new_empty(B, H, (values.shape[1] - 1) // CHUNK if triton else 0, K, V)


@_walk.register_fake
def _(queries, keys, values, weight, keep, h0, reset, triton):
    return torch.empty_like(values), torch.empty_like(h0), _room(values, h0, triton)


@_walk_backward.register_fake
def _(grad, grad_last, queries, keys, values, weight, keep, h0, reset, states, triton):
    return [torch.empty_like(x) for x in (queries, keys, values, weight, keep, h0)]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.triton = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])


def _run_backward(ctx, grad, grad_last, _):
    with own_dtypes(grad):
        return *_walk_backward(grad, grad_last, *ctx.saved_tensors, ctx.triton), None, None


_walk.register_autograd(_run_backward, setup_context=_setup_context)
differentiable_once(_walk_backward)


class TorchM2RNN:
    """Plain torch, any dtype and size; it keeps the states of all steps in its backward pass, none before."""

    @staticmethod
    def walk(queries, keys, values, weight, keep, h0, reset, *_):
        return reference.m2rnn_scan(queries, keys, values, weight, keep, h0, reset)

    @staticmethod
    def walk_backward(queries, keys, values, weight, keep, h0, reset, states, chunk, grad, grad_last):
        made = [torch.empty_like(x) for x in (queries, keys, values, keep)]
        d_weight, s, S, steps = torch.zeros_like(weight), grad_last.clone(), h0, []
        rows = [x.to(h0.dtype).unsqueeze(-1) for x in (queries, keys)]  # (B, T, H, K, 1)
        columns = [x.to(h0.dtype).unsqueeze(-2) for x in (values, grad)]  # (B, T, H, 1, V)
        for t in range(values.shape[1]):
            if reset is not None:
                S = S.masked_fill(reset[:, t, None, None, None], 0)
            Z = (S @ weight + rows[1][:, t] * columns[0][:, t]).tanh()
            steps.append((S, Z))
            S = Z + keep[:, t, :, None, None] * (S - Z)
        for t, (S, Z) in reversed([*enumerate(steps)]):
            (q, k), (v, g), f = (x[:, t] for x in rows), (x[:, t] for x in columns), keep[:, t, :, None, None]
            s = s + q * g
            dX = s * (1 - f) * (1 - Z * Z)
            S_t, d_keep = Z + f * (S - Z), (s * (S - Z)).sum((-2, -1))
            found = (S_t * g).sum(-1), (dX * v).sum(-1), (dX * k).sum(-2), d_keep
            for x, dx in zip(made, found, strict=True):
                x[:, t] = dx
            d_weight += (S.mT @ dX).sum(0)
            s = f * s + dX @ weight.mT
            if reset is not None:
                s = s.masked_fill(reset[:, t, None, None, None], 0)
        return [*made[:3], d_weight, made[3], s]
