"""The scans as callers use them: checks the arguments, chooses a backend, says why one cannot run.

A new backend is one line in BACKENDS.
"""

import importlib.util
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from . import reference, torch_scan
from .derivatives import check_transforms, is_written_out
from .gates import check_gate

Scan = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, str], tuple[Tensor, Tensor]]


TRITON_MOST = 16  # largest block size or order: a row of gates lives in a lane's registers


@torch.compiler.assume_constant_result  # looking for a module would break the graph
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_obstacle(*inputs: Tensor) -> str | None:
    """Why no Triton scan can run on these tensors; None: one can."""
    if not has_triton():
        return "triton is not installed"
    if not inputs[-1].is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {inputs[-1].device.type}, and triton compiles for GPUs"
    if reference.compute_dtype(*inputs) == torch.float64:
        return "its state is fp32, too coarse for fp64 inputs"
    return None


def _scan_obstacle(M: int, *inputs: Tensor) -> str | None:
    reason = triton_obstacle(*inputs)
    if reason is None and M > TRITON_MOST:
        reason = f"block size or order {M} is above {TRITON_MOST}"
    return reason


def _triton_scan(*inputs) -> tuple[Tensor, Tensor]:
    from .scan.triton_scans import triton_scan  # triton is imported only where it runs

    return triton_scan(*inputs)


BACKENDS: dict[str, tuple[Scan, Scan]] = {  # of BD-LRU and of H-LRU
    "reference": (reference.block_diagonal_scan, reference.higher_order_scan),
    "torch": (torch_scan.scan, torch_scan.scan),
    "triton": (_triton_scan, _triton_scan),
}


def block_diagonal_scan(
    gates: Tensor,
    values: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    gate: str = "softmax",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Scan of BD-LRU: `h_t = A_t h_{t-1} + a0_t * v_t`, `[A_t[i], a0_t[i]] = normalise(z_t[i])` per block.

    Args:
        gates: (B, T, N, M, M+1) logits z, the input gate last; any strides. Of a softmax also (B, T, N, M,
            M), without the input gate's logit, which is then 0: only differences of logits matter to a
            softmax, so that any row of M + 1 logits has such a form.
        values: (B, T, N, M) v; any strides.
        h0: (B, N, M) state before the first step; zeros if None.
        reset: (B, T) bool, true where a document starts: the incoming state counts as zero there.
        gate: softmax, sigmoid, relu, silu, tanh, identity or none; see `gates.py`.
        backend: auto, or a name in BACKENDS.
    Returns:
        h (B, T, N, M) in the dtype of `values`, and h_last (B, N, M) in fp32 (fp64 for fp64 inputs). Both are
        differentiable with respect to gates, values and h0.
    Raises:
        ValueError: shapes that do not fit, an unknown gate or backend, or a backend that cannot run here.

    Source: Dubinin, Orvieto, Effenberger, arXiv 2602.12021; resets and gradients: docs/design.md, section 2.

    Example:
        >>> import torch
        >>> from lrnn_lm import block_diagonal_scan
        >>> gates, values = torch.randn(2, 10, 16, 4, 5), torch.randn(2, 10, 16, 4)
        >>> h, h_last = block_diagonal_scan(gates, values)
        >>> tuple(h.shape), bool(torch.equal(h[:, -1], h_last))
        ((2, 10, 16, 4), True)
        >>> bool(h.abs().max() <= values.abs().max())  # never above the largest value
        True
    """
    B, T, N, M = _shape("values", values, 4)
    check_gate(gate)
    check_state(h0, reset, (B, N, M), (B, T))
    fixed = gate == "softmax" and gates.shape[-1] == M
    expect_shape("gates", gates, (B, T, N, M, M if fixed else M + 1))
    chosen = _choose(backend, M, gates, values)
    if fixed and chosen != "triton":  # whose kernels read no logits of the input gate
        planes = torch.nn.functional.pad(gates.permute(0, 1, 4, 2, 3), (0, 0, 0, 0, 0, 1))
        gates = planes.permute(0, 1, 3, 4, 2)  # laid out as a mixer's, plane after plane
    return BACKENDS[chosen][0](gates, values, h0, reset, gate)


def higher_order_scan(
    gates: Tensor,
    values: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    gate: str = "softmax",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Scan of H-LRU: `h_t = sum_{i=1..M} a_{i,t} h_{t-i} + a_{0,t} v_t` per channel.

    Args:
        gates: (B, T, N, M+1) logits of a_1 .. a_M, then a_0; any strides.
        values: (B, T, N) v; any strides.
        h0: (B, N, M) the M states before the first step, newest first; zeros if None.
        reset: (B, T) bool, true where a document starts: no tap reaches before it.
        gate, backend: as in `block_diagonal_scan`.
    Returns:
        h (B, T, N) in the dtype of `values`, and h_last (B, N, M), newest first, in fp32 (fp64 for fp64
        inputs). Both are differentiable with respect to gates, values and h0.
    Raises:
        ValueError: as in `block_diagonal_scan`.

    Source: as of `block_diagonal_scan`.

    Example:
        >>> import torch
        >>> from lrnn_lm import higher_order_scan
        >>> gates, values = torch.randn(2, 10, 16, 4), torch.randn(2, 10, 16)
        >>> h, h_last = higher_order_scan(gates, values)
        >>> tuple(h.shape), tuple(h_last.shape)  # the order M is 3
        ((2, 10, 16), (2, 16, 3))
    """
    B, T, N = _shape("values", values, 3)
    M = _shape("gates", gates, 4)[-1] - 1
    expect_shape("gates", gates, (B, T, N, M + 1))
    if M < 1:
        raise ValueError("gates need at least two entries a row: one tap and the input gate")
    check_gate(gate)
    check_state(h0, reset, (B, N, M), (B, T))
    return BACKENDS[_choose(backend, M, gates, values)][1](gates, values, h0, reset, gate)


def scan_packed(
    planes: Tensor,
    rows: tuple[int, ...],
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    gate: str = "softmax",
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Either scan, by Triton, of gates and values that one projection has written side by side.

    Args:
        planes: (B, T, M+2, columns), columns >= N M (BD-LRU) or N (H-LRU), see `plane_width`. Plane k holds
            gate k of every row, row (n, i) at n M + i, the last plane the values. Columns beyond the rows
            must be finite and change nothing. Of a BD-LRU also (B, T, M+1, columns) without the input gate's
            plane, whose logits are then 0.
        rows: shape of a step's values: (N, M) of BD-LRU, (N,) of H-LRU.
        h0, reset, gate: as in `block_diagonal_scan`.
        bias: (gates, N M or N), already added to the gates' planes, outside of autograd. It is given only for
            its gradient, which the scan computes on the way.
    Returns:
        h (B, T, *rows), a view of (B, T, columns), and h_last (B, N, M). The gradient of the planes is one
        tensor, zero beyond the rows.
    """
    B, T, count, columns = _shape("planes", planes, 4)
    M, used = rows[1] if len(rows) == 2 else count - 2, math.prod(rows)
    fixed = len(rows) == 2 and gate == "softmax" and count == M + 1
    if M < 1 or (count != M + 2 and not fixed) or columns < used:
        raise ValueError(
            f"planes has shape {tuple(planes.shape)}; expected (B, T, {max(M, 1) + 2}, at least {used})"
        )
    if bias is not None:
        expect_shape("bias", bias, (count - 1, used))
    check_gate(gate)
    check_state(h0, reset, (B, rows[0], M), (B, T))
    expect_floats(planes=planes)
    choose_backend("triton", planes, partial(_scan_obstacle, M, planes))
    from .scan.triton_scans import triton_scan_packed

    return triton_scan_packed(planes, rows, h0, reset, gate, bias)


def plane_width(rows: int, block_size: int = 1) -> int:
    """Columns to give a plane of `rows` rows (N M, or N)."""
    # Whole lines of 128 bytes, 64 numbers of two bytes: with rows of 2,416 bytes memory was read 1.3 to 1.5
    # times. Not where that adds more than a fifteenth, nor where the kernels do not read rows as one run.
    padded = -(-rows // 64) * 64
    return padded if block_size in (1, 2, 4, 8) and 15 * (padded - rows) <= rows else rows


def runs_fused(x: Tensor, M: int) -> bool:
    """Whether `auto` would choose the fused kernels for tensors like x and rows of M + 1 gates."""
    return x.is_cuda and not is_written_out() and _scan_obstacle(M, x) is None


def _choose(backend: str, M: int, gates: Tensor, values: Tensor) -> str:
    expect_floats(gates=gates, values=values)
    return choose_backend(backend, values, partial(_scan_obstacle, M, gates, values))


def choose_backend(backend: str, x: Tensor, obstacle: Callable[[], str | None]) -> str:
    """The backend by name; for `auto` the fastest that can run.

    x: one of the scan's inputs; obstacle: why Triton cannot run on them; None: it can.
    """
    if backend == "auto" and is_written_out():
        return "reference"  # the others have few derivatives, and no counterpart in ONNX
    if backend == "auto":
        backend = "triton" if x.is_cuda and obstacle() is None else "torch"
    elif backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: auto, {', '.join(BACKENDS)}")
    elif backend != "reference":
        check_transforms(backend)
        if backend == "triton" and (reason := obstacle()):
            raise ValueError(f"backend 'triton' cannot run here: {reason}")
    if backend == "triton" and x.numel() == 0:  # no rows to launch a kernel for
        return "torch"
    return backend


def _shape(name: str, x: Tensor, dims: int) -> tuple[int, ...]:
    if x.ndim != dims:
        raise ValueError(f"{name} has {x.ndim} axes {tuple(x.shape)}; expected {dims}")
    return tuple(x.shape)


def expect_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError, naming the tensor, if it has another shape."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {shape}")


def expect_floats(**tensors: Tensor) -> None:
    """Raise ValueError, naming it, for a tensor that does not hold floating-point numbers."""
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise ValueError(f"{name} has dtype {x.dtype}; expected floating-point numbers")


def check_state(
    h0: Tensor | None, reset: Tensor | None, state: tuple[int, ...], time: tuple[int, int]
) -> None:
    """Raise ValueError unless h0 has shape `state`, reset is a bool mask of shape `time`, (B, T), T > 0."""
    if time[1] < 1:
        raise ValueError("a scan needs at least one step")
    if h0 is not None:
        expect_shape("h0", h0, state)
    check_reset(reset, time)


def check_reset(reset: Tensor | None, time: tuple[int, int]) -> None:
    """Raise ValueError unless reset is a bool mask of shape `time`, (B, T)."""
    if reset is not None:
        expect_shape("reset", reset, time)
        if reset.dtype != torch.bool:
            raise ValueError(f"reset is a bool mask, not {reset.dtype}")


def own_dtypes(x: Tensor) -> AbstractContextManager[None]:
    """Where autocast does not round the factors of products: a state is a product of products."""
    rounds = not x.is_meta and torch.is_autocast_enabled(x.device.type)  # else exported graphs have a node
    return torch.autocast(x.device.type, enabled=False) if rounds else nullcontext()
