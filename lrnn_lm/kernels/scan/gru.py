"""Block-diagonal GRU and sLSTM: checks, the walk over time, and Newton's iterations that may take its place.

Newton's way (Danieli et al., "ParaRNN", arXiv 2510.21450): all states at once solve h_t = f(h_{t-1}, x_t).
With J_t = df/dh_{t-1} at the present states, the correction d of an iteration is a linear recurrence,

    d_t = J_t d_{t-1} + f(h_{t-1}, x_t) - h_t,    h <- h + d

which is a scan of BD-LRU without normalisation, cut into chunks of time where rows are few. The backward pass
is one reverse scan with J (implicit differentiation), then the gradient of each step by itself. The sLSTM,
whose state is h, r and L (`reference.slstm_scan`), is only walked.

Legend: B batch, T time, N blocks, M block size; J transitions of the linearised steps, s = dL/dh.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import reference
from ..derivatives import differentiable_once
from ..dispatch import check_state, choose_backend, expect_floats, expect_shape, triton_obstacle
from ..reference import compute_dtype, gru_gates, slstm_logits
from ..torch_scan import _bd_scan, _bd_scan_backward

MOST_BLOCK = 16  # M: rows of three matrices live in a lane's registers
TOLERANCE = 1e-5  # of |f(h_{t-1}) - h_t| before Newton's last iteration, which squares the error once more
MOST_ITERATIONS = 50
SOLVERS = ("walk", "newton")


def gru_scan(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    solver: str = "walk",
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan of a block-diagonal GRU, `reference.gru_scan` has the equations.

    Args:
        inputs: (B, T, 3, N, M), the inputs' parts of reset gate, update gate and candidate.
        weight: (3, N, M, M) recurrent matrices of the same.
        bias: (4, N, M) of the same, and of the candidate's recurrent part.
        h0: (B, N, M) state before the first step; zeros if None.
        reset: (B, T) bool, true where a document starts: the state before counts as zero.
        solver: walk, one step after the other; newton, all steps at once: for long T and few rows.
        backend: auto, reference, torch or triton.
    Returns:
        h (B, T, N, M) and h_last (B, N, M) in fp32 (fp64 where an input is), differentiable, once, with
        respect to all inputs but `reset`; and (iterations, residual) of Newton, zeros of a walk. The residual
        is the largest |f(h_{t-1}, x_t) - h_t| before the last iteration.
    Raises:
        ValueError: shapes that do not fit, names that are not known, a backend that cannot run here, or
            Newton's iterations that do not converge.
    """
    check_solver(solver)
    return _scan(reference.gru_scan, (3,), inputs, weight, bias, h0, reset, solver == "newton", backend)


def slstm_scan(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Scan of a block-diagonal sLSTM, `reference.slstm_scan` has the equations.

    inputs (B, T, 4, N, M), weight (4, N, M, M) and bias (4, N, M): of the logits of z, i, f and o;
    h0 (B, 3, N, M): h, r and L before the first step. Otherwise as `gru_scan`. Returns h (B, T, N, M) and the
    last state.
    """
    return _scan(reference.slstm_scan, (4, 3), inputs, weight, bias, h0, reset, False, backend)[:2]


def _scan(
    plain: Callable[..., tuple[Tensor, ...]], planes: tuple[int, ...], inputs: Tensor, weight: Tensor,
    bias: Tensor, h0: Tensor | None, reset: Tensor | None, newton: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """h, the last state, and what `_solve` says. planes: of inputs, and of a state that has several."""
    G, *kept = planes
    if inputs.ndim != 5 or inputs.shape[2] != G:
        raise ValueError(f"inputs has shape {tuple(inputs.shape)}; expected (B, T, {G}, N, M)")
    B, T, _, N, M = inputs.shape
    expect_shape("weight", weight, (G, N, M, M))
    expect_shape("bias", bias, (4, N, M))
    check_state(h0, reset, (B, *kept, N, M), (B, T))
    expect_floats(inputs=inputs, weight=weight, bias=bias)
    backend = choose_backend(backend, inputs, partial(_triton_obstacle, inputs, weight))
    if backend == "reference":
        h, last, *more = plain(inputs, weight, bias, h0, reset)
        return h, last, *(more or [torch.zeros(2, dtype=torch.float64)])
    dtype = compute_dtype(inputs, weight)
    start = inputs.new_zeros(B, *kept, N, M, dtype=dtype) if h0 is None else h0.to(dtype).contiguous()
    arguments = inputs.contiguous(), weight.to(dtype).contiguous(), bias.to(dtype).contiguous(), start, reset
    return _solve(*arguments, newton and T > 1, backend == "triton")


def check_solver(solver: str) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; known: {', '.join(SOLVERS)}")


def _triton_obstacle(inputs: Tensor, weight: Tensor) -> str | None:
    reason = triton_obstacle(inputs, weight)
    if reason is None and inputs.shape[-1] > MOST_BLOCK:
        reason = f"block size {inputs.shape[-1]} is above {MOST_BLOCK}"
    return reason


# The custom op, which is what autograd and torch.compile see ------------------------------------------------


@torch.library.custom_op("lrnn_lm::gru_scan", mutates_args=())
def _solve(
    inputs: Tensor, weight: Tensor, bias: Tensor, h0: Tensor, reset: Tensor | None, newton: bool, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """h, the last state, and of the GRU (iterations, residual), of the sLSTM its cells (B, T, 2, N, M).

    Cells are for the backward pass alone. Were h a plane of the states, its gradient would be padded with
    zeros.
    """
    given = inputs, weight, bias, h0, reset
    if newton:
        return _newton(given, _kernels(inputs, triton))
    h, last, *cells = _kernels(inputs, triton).walk(*given)
    return h, last, *(cells or [torch.zeros(2, dtype=torch.float64, device="cpu")])


@torch.library.custom_op("lrnn_lm::gru_scan_backward", mutates_args=())
def _solve_backward(
    grad: Tensor, grad_last: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor, h0: Tensor,
    reset: Tensor | None, h: Tensor, more: Tensor, newton: bool, triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    given, kernels = (inputs, weight, bias, h0, reset), _kernels(inputs, triton)
    grad, grad_last, h = grad.contiguous(), grad_last.contiguous(), h.contiguous()
    if newton:
        made = _reversed_scan(kernels, given, h, grad, grad_last)
    else:
        made = kernels.walk_backward(*given, h, *([more] if _is_slstm(inputs) else []), grad, grad_last)
    return tuple(x.contiguous() for x in made)  # as the fake says; einsum has its own layout


def _reversed_scan(
    kernels: Any, given: tuple, h: Tensor, grad: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, h0, reset = given
    gates, _ = kernels.linearise(*given, h)
    s, d_h0 = kernels.reverse_scan(grad, grad_last, gates, h0, h, reset)
    return *kernels.steps_backward(*given, h, s), d_h0


def _kernels(inputs: Tensor, triton: bool) -> Any:
    if not triton:
        return TorchSLSTM if _is_slstm(inputs) else TorchGRU
    if _is_slstm(inputs):
        from .slstm_kernels import TritonSLSTM  # triton is imported only where it runs

        return TritonSLSTM
    from .gru_triton import TritonGRU

    return TritonGRU


def _is_slstm(inputs: Tensor) -> bool:
    return inputs.shape[2] == 4


@_solve.register_fake
def _(inputs, weight, bias, h0, reset, newton, triton):
    B, T, _, N, M = inputs.shape
    slstm = _is_slstm(inputs)
    more = h0.new_empty(B, T, 2, N, M) if slstm else torch.empty(2, dtype=torch.float64, device="cpu")
    return h0.new_empty(B, T, N, M), torch.empty_like(h0), more


@_solve_backward.register_fake
def _(grad, grad_last, inputs, weight, bias, h0, reset, h, more, newton, triton):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (inputs, weight, bias, h0)
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.newton, ctx.triton = inputs
    ctx.save_for_backward(*tensors, output[0], output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # else cells would get zeros, two planes of every step


def _run_backward(ctx, grad, grad_last, _):
    saved = ctx.saved_tensors  # read once: activation checkpointing gives them once
    h0, h = saved[3], saved[5]
    grad = torch.zeros_like(h) if grad is None else grad
    grad_last = torch.zeros_like(h0) if grad_last is None else grad_last
    return *_solve_backward(grad, grad_last, *saved, ctx.newton, ctx.triton), None, None, None


_solve.register_autograd(_run_backward, setup_context=_setup_context)
differentiable_once(_solve_backward)


def _newton(given: tuple, kernels: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The states at which every step is met, the last, and (iterations, residual)."""
    inputs, _, _, h0, reset = given
    B, T, _, N, M = inputs.shape
    h, nothing = h0.new_zeros(B, T, N, M), torch.zeros_like(h0)
    for iteration in range(1, MOST_ITERATIONS + 1):
        gates, error = kernels.linearise(*given, h)
        residual = float(error.abs().max())
        if not residual < float("inf"):  # NaN too: transitions that grow have overflown
            break
        h += kernels.scan(gates, error, nothing, reset)
        if residual <= TOLERANCE:
            told = torch.tensor([iteration, residual], dtype=torch.float64, device="cpu")
            return h, h[:, -1].clone(memory_format=torch.contiguous_format), told
    raise ValueError(
        f"Newton's iterations did not converge: a residual of {residual:.1e} after {iteration} of at most "
        f"{MOST_ITERATIONS} over rows of {T} steps; use the walk (solver: walk)"
    )


class TorchGRU:
    """Plain torch, any dtype and block size."""

    @staticmethod
    def walk(inputs, weight, bias, h0, reset):
        return reference.gru_scan(inputs, weight, bias, h0, reset)

    @staticmethod
    def walk_backward(*given):
        *given, h, grad, grad_last = given
        return _reversed_scan(TorchGRU, given, h, grad, grad_last)

    @staticmethod
    def linearise(inputs, weight, bias, h0, reset, h):
        p = _states_before(h, h0, reset)
        r, z, n, q = gru_gates(inputs.to(h.dtype), p, weight, bias)
        new = (1 - z) * (1 - n * n) * r
        of = torch.stack([new * q * (1 - r), (p - n) * z * (1 - z), new], dim=2)  # (B, T, 3, N, M)
        J = (of.unsqueeze(-1) * weight).sum(2) + torch.diag_embed(z)
        return torch.cat([J, torch.ones_like(z).unsqueeze(-1)], dim=-1), n + z * (p - n) - h

    @staticmethod
    def scan(gates, values, h0, reset):
        return _bd_scan(gates, values, h0, reset, "none")[0]

    @staticmethod
    def reverse_scan(grad, grad_last, gates, h0, h, reset):
        return _bd_scan_backward(grad, grad_last, gates, torch.ones_like(h), h0, h, reset, "none")[1:]

    @staticmethod
    def steps_backward(inputs, weight, bias, h0, reset, h, s):
        p = _states_before(h, h0, reset)
        r, z, n, q = gru_gates(inputs.to(h.dtype), p, weight, bias)
        dn = s * (1 - z) * (1 - n * n)
        d = torch.stack(
            [dn * q * r * (1 - r), s * (p - n) * z * (1 - z), dn, dn * r], dim=2
        )  # (B, T, 4, N, M)
        with torch.autocast(h.device.type, enabled=False):
            d_weight = torch.einsum("btgni,btnj->gnij", d[:, :, [0, 1, 3]], p)
        return d[:, :, :3].to(inputs.dtype).contiguous(), d_weight, d.sum((0, 1))


class TorchSLSTM:
    """The walk in plain torch, any dtype and block size."""

    @staticmethod
    def walk(inputs, weight, bias, h0, reset):
        return reference.slstm_scan(inputs, weight, bias, h0, reset)

    @staticmethod
    def walk_backward(inputs, weight, bias, h0, reset, h, cells, grad, grad_last):
        h, (r, L) = _states_before(h, h0[:, 0], reset), _states_before(cells, h0[:, 1:], reset).unbind(2)
        z, i, f, o = slstm_logits(inputs.to(h.dtype), h, weight, bias)
        a, z, o = (i - functional.logsigmoid(f) - L).sigmoid(), z.tanh(), o.sigmoid()
        d, s, lost = h.new_empty(inputs.shape), grad_last, 1 - f.sigmoid()
        for t in range(inputs.shape[1] - 1, -1, -1):
            s_h, s_r, s_L = s.unbind(1)
            s_h = s_h + grad[:, t]
            s_r = s_r + s_h * o[:, t]
            share = s_r * (z - r)[:, t] * a[:, t] * (1 - a[:, t])
            d_kept = s_L * (1 - a[:, t]) - share
            d[:, t, 0] = s_r * a[:, t] * (1 - z[:, t] ** 2)
            d[:, t, 1] = share + s_L * a[:, t]
            d[:, t, 2] = d_kept * lost[:, t]
            d[:, t, 3] = s_h * (r + a * (z - r))[:, t] * o[:, t] * (1 - o[:, t])
            back = (weight * d[:, t].unsqueeze(-1)).sum((1, -2))  # U^T d
            s = torch.stack([back, s_r * (1 - a[:, t]), d_kept], dim=1)
            if reset is not None:
                s = s.masked_fill(reset[:, t, None, None, None], 0)
        with torch.autocast(h.device.type, enabled=False):
            d_weight = torch.einsum("btgni,btnj->gnij", d, h)
        return d.to(inputs.dtype), d_weight, d.sum((0, 1)), s


def _states_before(h: Tensor, h0: Tensor, reset: Tensor | None) -> Tensor:
    """h_{t-1} (B, T, .., N, M), zero where a document starts."""
    before = torch.cat([h0.unsqueeze(1), h[:, :-1]], dim=1)
    return before if reset is None else before.masked_fill(reset[(..., *[None] * (h.ndim - 2))], 0)
