"""The block-diagonal GRU on a GPU: walk and Newton against the reference in fp64, then their times.

    python -m benchmarks.gpu.walk [out.json] [--items walk:4,newton:8,..] [--seconds 100]

Checked are both outputs and all gradients, twice with the same bits. Times are medians of 10, of the forward
and of the backward pass: the walk against the scan of BD-LRU with as many rows and equal M (T 2,048, B 32,
bf16), and Newton's iterations against the walk (T 32,768, B 1). Goals: at most 3 times the scan's time;
Newton equal to the walk to 1e-5, and faster. The exit code is 1 where a case failed. To find a wrong address:

    compute-sanitizer --tool memcheck python -m benchmarks.gpu.walk case walk walk 4 float32
"""

import sys
import time
from typing import Any

import torch
from torch import Tensor

from lrnn_lm.kernels import block_diagonal_scan, gru_scan

from .cases import Item, run_items
from .matrix_scan import milliseconds

# In order of importance: solver and M.
ITEMS = (
    ("walk", 4), ("newton", 4), ("newton", 8), ("walk", 8), ("newton", 16), ("walk", 16), ("walk", 1),
    ("newton", 1), ("walk", 5), ("newton", 5),
)  # fmt: skip
ROWS = {"walk": 1024, "newton": 512}  # N M
SHAPES = {"walk": (32, 2048), "newton": (1, 32_768)}  # B, T of what is timed
CHECKED = {"walk": 77, "newton": 2111}  # T: groups of steps and rests, and as many chunks of time
NAMES = ("h", "last", "inputs", "weight", "bias", "h0")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}


def given(B: int, T: int, N: int, M: int, dtype: torch.dtype, resets: float = 0.0) -> list[Tensor | None]:
    """Inputs of gru_scan, with the matrices and update gates that the mixer starts with."""
    generator = torch.Generator().manual_seed(T + M)
    weight = torch.linalg.qr(torch.randn(3 * N, M, M, generator=generator))[0].view(3, N, M, M)
    bias = torch.zeros(4, N, M)
    bias[1] = 1.0
    h0 = torch.randn(B, N, M, generator=generator)
    inputs = torch.randn(B, T, 3, N, M, generator=generator).to(dtype)
    reset = torch.rand(B, T, generator=generator) < resets if resets else None
    return [None if x is None else x.cuda() for x in (inputs, weight, bias, h0, reset)]


def run(inputs: list[Tensor | None], solver: str, backend: str) -> list[Tensor]:
    """Outputs and gradients of a random weighing of them."""
    *tensors, reset = inputs
    tensors = [x.detach().requires_grad_() for x in tensors]
    outputs = gru_scan(*tensors, reset, solver, backend)[:2]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in outputs]
    loss = sum((x * w).sum() for x, w in zip(outputs, weights, strict=True))
    return [*(x.detach() for x in outputs), *torch.autograd.grad(loss, tensors)]


def check(solver: str, shape: str, M: int, dtype: torch.dtype) -> bool:
    """Whether a solver is right at the B and M of what is timed; in fp32 with document starts."""
    began = time.monotonic()
    B, N = SHAPES[shape][0], ROWS[shape] // M
    inputs = given(B, CHECKED[shape], N, M, dtype, resets=0.02 if dtype == torch.float32 else 0.0)
    got = run(inputs, solver, "triton")
    torch.cuda.synchronize()
    seconds = time.monotonic() - began
    # on the CPU: thousands of small kernels would disturb what is timed meanwhile
    exact = [x.cpu().double() if x is not None and x.is_floating_point() else x for x in inputs]
    exact[4] = None if inputs[4] is None else inputs[4].cpu()
    errors = {}
    for name, x, want in zip(NAMES, got, run(exact, "walk", "torch"), strict=True):
        error = float((x.cpu().double() - want).norm() / want.norm())
        errors[name] = error if x.isfinite().all() else float("inf")
    same = all(torch.equal(a, b) for a, b in zip(got, run(inputs, solver, "triton"), strict=True))
    right = max(errors.values()) <= TOLERANCE[dtype] and same
    text = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    verdict = f"{'ok' if right else 'WRONG'}; {text}; same bits twice: {same}; first call {seconds:.0f} s"
    print(f"{solver} B {B} M {M} {dtype}: {verdict}", flush=True)
    if dtype == torch.bfloat16:  # so that what is timed finds its kernels in Triton's cache
        run(given(*SHAPES[shape], N, M, dtype), solver, "triton")
        if shape == "walk":
            scan_times(M)
    return right


def passes(scan: Any, tensors: list[Tensor]) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward pass of `scan()`, which depends on the tensors."""
    with torch.no_grad():
        forward = milliseconds(scan)
    y = scan()
    grad = torch.randn_like(y)
    return forward, milliseconds(lambda: torch.autograd.grad(y, tensors, grad, retain_graph=True))


def gru_times(inputs: list[Tensor | None], solver: str) -> tuple[float, float]:
    tensors = [x.requires_grad_() for x in inputs[:4]]
    return passes(lambda: gru_scan(*tensors, None, solver, "triton")[0], tensors)


def scan_times(M: int) -> tuple[float, float]:
    """Of BD-LRU's scan with the walk's rows."""
    (B, T), N = SHAPES["walk"], ROWS["walk"] // M
    planes = torch.randn(B, T, M + 1, N, M, device="cuda", dtype=torch.bfloat16)
    gates = planes.permute(0, 1, 3, 4, 2).requires_grad_()  # the mixer's order in memory
    values = torch.randn(B, T, N, M, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return passes(lambda: block_diagonal_scan(gates, values, backend="triton")[0], [gates, values])


def clock_walk(M: int) -> dict[str, Any]:
    (B, T), N = SHAPES["walk"], ROWS["walk"] // M
    walk, scan = gru_times(given(B, T, N, M, torch.bfloat16), "walk"), scan_times(M)
    row = {"what": "walk", "B": B, "T": T, "N": N, "M": M}
    row |= {"walk_ms": walk, "scan_ms": scan, "ratio": sum(walk) / sum(scan)}
    return row


def clock_newton(M: int) -> dict[str, Any]:
    (B, T), N = SHAPES["newton"], ROWS["newton"] // M
    inputs = given(B, T, N, M, torch.bfloat16)
    with torch.no_grad():
        h, _, told = gru_scan(*inputs, "newton", "triton")
        difference = float((h - gru_scan(*inputs, "walk", "triton")[0]).abs().max())
    iterations, residual = told.tolist()
    walk, newton = gru_times(inputs, "walk"), gru_times(inputs, "newton")
    row = {"what": "newton", "B": B, "T": T, "N": N, "M": M, "iterations": iterations, "residual": residual}
    row |= {"difference": difference, "walk_ms": walk, "newton_ms": newton, "ratio": sum(newton) / sum(walk)}
    return row


def item(solver: str, M: int) -> Item:
    """Newton is timed against the walk at its shape, which has to be right too."""
    cases = [(solver, solver, str(M), dtype) for dtype in ("bfloat16", "float32")]
    if solver == "walk":
        return Item(cases, lambda: clock_walk(M))
    return Item([*cases, ("walk", "newton", str(M), "bfloat16")], lambda: clock_newton(M))


def main() -> int:
    if sys.argv[1:2] == ["case"]:
        solver, shape, M, dtype = sys.argv[2:]
        return 0 if check(solver, shape, int(M), getattr(torch, dtype)) else 1
    items = {f"{solver}:{M}": item(solver, M) for solver, M in ITEMS}
    rows, right = run_items("benchmarks.gpu.walk", items, sys.argv[1:])
    met = all(row["ratio"] <= 3 for row in rows if row["what"] == "walk")
    met &= all(row["ratio"] < 1 and row["difference"] <= 1e-5 for row in rows if row["what"] == "newton")
    print("goals met" if met else "goals missed")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
