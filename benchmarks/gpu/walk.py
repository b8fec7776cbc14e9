"""The non-linear recurrences on a GPU: each kernel against the reference in fp64, then their times.

    python -m benchmarks.gpu.walk [out.json]        # about a minute on one H100, most of it compiling
    python -m benchmarks.gpu.walk m2rnn [out.json]  # of these only the matrix-to-matrix RNN

Checked are both outputs and all gradients, twice with the same bits. Times are medians of 10, of the forward
and of the backward pass: the walk against the scan of BD-LRU with as many rows and equal M (T 2,048, B 32,
bf16), Newton's iterations against the walk (T 32,768, B 1), and the matrix-to-matrix RNN against the linear
scan of as large a state (HGRN2's; T 2,048, B 32). Goals: at most 3 times the scan's time for the GRU; Newton
equal to the walk to 1e-5, and faster. Every size is compiled and checked in a process of its own, all
at once; one that fails says so, and the exit code is 1. Times are taken after that. To find a wrong address:

    compute-sanitizer --tool memcheck python -m benchmarks.gpu.walk case walk 4 float32
"""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrnn_lm.kernels import block_diagonal_scan, gru_scan, m2rnn_scan, matrix_scan

from .. import measure
from .matrix_scan import milliseconds

SIZES, TIMED = (1, 4, 5, 8, 16), (1, 4, 8, 16)
ROWS = {"walk": 1024, "newton": 512}  # N M
SHAPES = {"walk": (32, 2048), "newton": (1, 32_768), "m2rnn": (32, 2048)}  # B, T of what is timed
CHECKED = {"walk": 77, "newton": 2111, "m2rnn": 150}  # T: groups of steps and rests, and as many chunks
NAMES = ("h", "last", "inputs", "weight", "bias", "h0")
M2RNN_NAMES = ("y", "last", "queries", "keys", "values", "weight", "keep", "h0")
HEADS = {24: (3, 10), 64: (48, 16), 128: (6, 64)}  # H and V of the matrix-to-matrix RNN, by K
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


def given_m2rnn(B: int, T: int, K: int, dtype: torch.dtype, resets: float = 0.0) -> list[Tensor | None]:
    """Inputs of m2rnn_scan, with matrices near the identity and f from 0.2 to 0.999, as the mixer starts."""
    (H, V), generator = HEADS[K], torch.Generator().manual_seed(T + K)
    q, k, v = (torch.randn(B, T, H, size, generator=generator).to(dtype) for size in (K, K, V))
    weight = torch.eye(V) + 0.3 * torch.randn(H, V, V, generator=generator) / V**0.5
    keep = torch.exp(-torch.logspace(-3, 0.2, H) * torch.rand(B, T, H, generator=generator))
    h0 = torch.randn(B, H, K, V, generator=generator)
    reset = torch.rand(B, T, generator=generator) < resets if resets else None
    return [None if x is None else x.cuda() for x in (q, k, v, weight, keep, h0, reset)]


def scan_of(kind: str, backend: str) -> Callable[..., tuple[Tensor, ...]]:
    if kind == "m2rnn":
        return partial(m2rnn_scan, backend=backend)
    return partial(gru_scan, solver=kind, backend=backend)


def run(inputs: list[Tensor | None], scan: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
    """Outputs and gradients of a random weighing of them."""
    *tensors, reset = inputs
    tensors = [x.detach().requires_grad_() for x in tensors]
    outputs = scan(*tensors, reset)[:2]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in outputs]
    loss = sum((x * w).sum() for x, w in zip(outputs, weights, strict=True))
    return [*(x.detach() for x in outputs), *torch.autograd.grad(loss, tensors)]


def check(kind: str, size: int, dtype: torch.dtype) -> bool:
    """Whether a kernel is right at one size, M or K; in fp32 with document starts, in bf16 as timed."""
    B, resets = SHAPES[kind][0], 0.02 if dtype == torch.float32 else 0.0

    def inputs_of(B: int, T: int, resets: float = 0.0) -> list[Tensor | None]:
        if kind == "m2rnn":
            return given_m2rnn(B, T, size, dtype, resets)
        return given(B, T, ROWS[kind] // size, size, dtype, resets)

    inputs, scan = inputs_of(B, CHECKED[kind], resets), scan_of(kind, "triton")
    got = run(inputs, scan)
    exact = [x.double() if x is not None and x.is_floating_point() else x for x in inputs]
    wanted = run(exact, scan_of("m2rnn" if kind == "m2rnn" else "walk", "torch"))
    errors = {}
    for name, x, want in zip(M2RNN_NAMES if kind == "m2rnn" else NAMES, got, wanted, strict=True):
        error = float((x.double() - want).norm() / want.norm())
        errors[name] = error if x.isfinite().all() else float("inf")
    same = all(torch.equal(a, b) for a, b in zip(got, run(inputs, scan), strict=True))
    right = max(errors.values()) <= TOLERANCE[dtype] and same
    text = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    print(f"{kind} {size} {dtype}: {'ok' if right else 'WRONG'}; {text}; same bits twice: {same}")
    if dtype == torch.bfloat16 and size in (*TIMED, 64):  # what is timed finds its kernels in Triton's cache
        run(inputs_of(*SHAPES[kind]), scan)
    return right


def run_alone(case: tuple[str, int, str]) -> bool:
    """Whether a case succeeds in a process of its own; what that said is printed."""
    words = [*map(str, case)]
    command = [sys.executable, "-m", "benchmarks.gpu.walk", "case", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    failed = f"{' '.join(words)}: FAILED with exit code {done.returncode}\n{done.stderr[-3000:]}"
    print(failed if done.returncode and "WRONG" not in done.stdout else done.stdout.strip(), flush=True)
    return done.returncode == 0


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


def clock_walk(M: int) -> dict[str, Any]:
    (B, T), N = SHAPES["walk"], ROWS["walk"] // M
    walk = gru_times(given(B, T, N, M, torch.bfloat16), "walk")
    planes = torch.randn(B, T, M + 1, N, M, device="cuda", dtype=torch.bfloat16)
    gates = planes.permute(0, 1, 3, 4, 2).requires_grad_()  # the mixer's order in memory
    values = torch.randn(B, T, N, M, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    scan = passes(lambda: block_diagonal_scan(gates, values, backend="triton")[0], [gates, values])
    row = {"what": "walk", "B": B, "T": T, "N": N, "M": M}
    row |= {"walk_ms": walk, "scan_ms": scan, "ratio": sum(walk) / sum(scan)}
    print(row, flush=True)
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
    print(row, flush=True)
    return row


def clock_m2rnn(K: int) -> dict[str, Any]:
    (B, T), (H, V) = SHAPES["m2rnn"], HEADS[K]
    *tensors, _ = given_m2rnn(B, T, K, torch.bfloat16)
    tensors = [x.requires_grad_() for x in tensors]
    q, k, v, _, keep, h0 = tensors
    walk = passes(lambda: m2rnn_scan(*tensors, backend="triton")[0], tensors)
    decay = keep[..., None, None].detach().expand(B, T, H, K, 1).contiguous().requires_grad_()
    scan = passes(lambda: matrix_scan(decay, k, v, q, h0, backend="triton")[0], [decay, k, v, q, h0])
    row = {"what": "m2rnn", "B": B, "T": T, "H": H, "K": K, "V": V}
    row |= {"walk_ms": walk, "scan_ms": scan, "ratio": sum(walk) / sum(scan)}
    print(row, flush=True)
    return row


def main() -> int:
    words = sys.argv[1:]
    if words[:1] == ["case"]:
        kind, size, dtype = words[1:]
        return 0 if check(kind, int(size), getattr(torch, dtype)) else 1
    only = words[:1] == ["m2rnn"]
    sizes = [(kind, M) for M in reversed(SIZES) for kind in ROWS if not only] + [("m2rnn", K) for K in HEADS]
    cases = [(*size, dtype) for size in sizes for dtype in ("float32", "bfloat16")]
    with ThreadPoolExecutor(len(cases)) as pool:
        right = list(pool.map(run_alone, cases))
    if not all(right):
        return 1
    rows = [] if only else [clock_walk(M) for M in TIMED] + [clock_newton(M) for M in TIMED]
    rows.append(clock_m2rnn(64))
    if output := words[only:]:
        measure.write_json(Path(output[0]), {"about": measure.describe(torch.device("cuda")), "rows": rows})
    met = all(row["ratio"] <= 3 for row in rows if row["what"] == "walk")
    met &= all(row["ratio"] < 1 and row["difference"] <= 1e-5 for row in rows if row["what"] == "newton")
    print("goals met" if met else "goals missed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
