"""Block-diagonal GRU: checks, the walk over time, and Newton's iterations that take its place on long rows.

Newton's way (Danieli et al., "ParaRNN", arXiv 2510.21450): all states at once solve h_t = f(h_{t-1}, x_t).
With J_t = df/dh_{t-1} at the present states, the correction d of an iteration is a linear recurrence,

    d_t = J_t d_{t-1} + f(h_{t-1}, x_t) - h_t,    h <- h + d

which is a scan of BD-LRU without normalisation, cut into chunks of time where rows are few. The backward pass
is one reverse scan with J (implicit differentiation), then the gradient of each step by itself.

Legend: B batch, T time, N blocks, M block size; J transitions of the linearised steps, s = dL/dh.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dispatch import check_state, choose_operator, expect_floats, expect_shape, triton_obstacle
from ..reference import compute_dtype, gru_gates
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
    if inputs.ndim != 5 or inputs.shape[2] != 3:
        raise ValueError(f"inputs has shape {tuple(inputs.shape)}; expected (B, T, 3, N, M)")
    B, T, _, N, M = inputs.shape
    expect_shape("weight", weight, (3, N, M, M))
    expect_shape("bias", bias, (4, N, M))
    check_state(h0, reset, (B, N, M), (B, T))
    expect_floats(inputs=inputs, weight=weight, bias=bias)
    check_solver(solver)
    backend = choose_operator(backend, inputs, partial(_triton_obstacle, inputs, weight))
    dtype = compute_dtype(inputs, weight)
    if backend == "reference":
        h, last = reference.gru_scan(inputs, weight, bias, h0, reset)
        return h, last, torch.zeros(2, dtype=torch.float64)
    start = inputs.new_zeros(B, N, M, dtype=dtype) if h0 is None else h0.to(dtype).contiguous()
    arguments = inputs.contiguous(), weight.to(dtype).contiguous(), bias.to(dtype).contiguous(), start, reset
    newton = solver == "newton" and T > 1
    return _solve(*arguments, newton, backend == "triton")


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
    given = inputs, weight, bias, h0, reset
    if newton:
        return _newton(given, _kernels(triton))
    h, last = _kernels(triton).walk(*given)
    return h, last, torch.zeros(2, dtype=torch.float64, device="cpu")


@torch.library.custom_op("lrnn_lm::gru_scan_backward", mutates_args=())
def _solve_backward(
    grad: Tensor, grad_last: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor, h0: Tensor,
    reset: Tensor | None, h: Tensor, newton: bool, triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    given, kernels = (inputs, weight, bias, h0, reset), _kernels(triton)
    grad, grad_last, h = grad.contiguous(), grad_last.contiguous(), h.contiguous()
    if triton and not newton:  # the walk back, one kernel
        return kernels.walk_backward(*given, h, grad, grad_last)
    gates, _ = kernels.linearise(*given, h)
    s, d_h0 = kernels.reverse_scan(grad, grad_last, gates, h0, h, reset)
    return *kernels.steps_backward(*given, h, s), d_h0


def _kernels(triton: bool) -> Any:
    if not triton:
        return TorchGRU
    from .gru_triton import TritonGRU  # triton is imported only where it runs

    return TritonGRU


@_solve.register_fake
def _(inputs, weight, bias, h0, reset, newton, triton):
    B, T, _, N, M = inputs.shape
    return h0.new_empty(B, T, N, M), h0.new_empty(B, N, M), torch.empty(2, dtype=torch.float64, device="cpu")


@_solve_backward.register_fake
def _(grad, grad_last, inputs, weight, bias, h0, reset, h, newton, triton):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (inputs, weight, bias, h0)
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.newton, ctx.triton = inputs
    ctx.save_for_backward(*tensors, output[0])
    ctx.mark_non_differentiable(output[2])


def _run_backward(ctx, grad, grad_last, _):
    return *_solve_backward(grad, grad_last, *ctx.saved_tensors, ctx.newton, ctx.triton), None, None, None


_solve.register_autograd(_run_backward, setup_context=_setup_context)


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


def _states_before(h: Tensor, h0: Tensor, reset: Tensor | None) -> Tensor:
    """h_{t-1} (B, T, N, M), zero where a document starts."""
    before = torch.cat([h0.unsqueeze(1), h[:, :-1]], dim=1)
    return before if reset is None else before.masked_fill(reset[:, :, None, None], 0)
