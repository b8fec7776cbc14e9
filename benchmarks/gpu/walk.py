"""The non-linear recurrences on a GPU: each kernel against the reference in fp64, then their times.

    python -m benchmarks.gpu.walk [out.json] [--items walk:4,newton:8,..] [--seconds 100]

Checked are both outputs and all gradients, twice with the same bits. Times are medians of 10, of the forward
and of the backward pass, at T 2,048, B 32, bf16: the walks of the GRU and the sLSTM against the scan of
BD-LRU with as many rows and equal M, the matrix-to-matrix RNN against the linear scan of as large a state.
Newton's iterations are timed against the walk (T 32,768, B 1). Goals: at most 3 times the scan's time for the
first two; Newton equal to the walk to 1e-5, and faster. The exit code is 1 where a case failed. To find a
wrong address:

    compute-sanitizer --tool memcheck python -m benchmarks.gpu.walk case walk walk 4 float32
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lrnn_lm.kernels import block_diagonal_scan, gru_scan, m2rnn_scan, matrix_scan, slstm_scan

from .cases import Item, run_items
from .matrix_scan import milliseconds

# In order of importance: the GRU's solver or slstm, and M, or m2rnn and K.
ITEMS = (
    ("walk", 4), ("newton", 4), ("newton", 8), ("m2rnn", 64), ("walk", 8), ("newton", 16), ("walk", 16),
    ("slstm", 4), ("slstm", 16), ("m2rnn", 24), ("m2rnn", 128), ("walk", 1), ("newton", 1), ("walk", 5),
    ("newton", 5), ("slstm", 1), ("slstm", 5), ("slstm", 8),
)  # fmt: skip
ROWS = {"walk": 1024, "newton": 512, "slstm": 1024}  # N M
USUAL = (32, 2048)
SHAPES = {"walk": USUAL, "newton": (1, 32_768), "slstm": USUAL, "m2rnn": USUAL}  # B, T of what is timed
CHECKED = {"walk": 77, "newton": 2111, "slstm": 77, "m2rnn": 150}  # T: groups and rests, or as many chunks
NAMES = ("h", "last", "inputs", "weight", "bias", "h0")
M2RNN_NAMES = ("y", "last", "queries", "keys", "values", "weight", "keep", "h0")
HEADS = {24: (3, 10), 64: (48, 16), 128: (6, 64)}  # H and V of the matrix-to-matrix RNN, by K
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}


def given(kind: str, B: int, T: int, M: int, dtype: torch.dtype, resets: float = 0.0) -> list[Tensor | None]:
    """Inputs of a GRU, with the matrices and update gates that the mixer starts with, or of an sLSTM."""
    generator, N = torch.Generator().manual_seed(T + M), ROWS[kind] // M
    G, *kept = (4, 3) if kind == "slstm" else (3,)
    weight = torch.linalg.qr(torch.randn(G * N, M, M, generator=generator))[0].view(G, N, M, M)
    bias = torch.zeros(4, N, M)
    bias[G // 2] = 1.0  # of the update gate, or of the forget gate
    h0 = torch.randn(B, *kept, N, M, generator=generator)
    inputs = torch.randn(B, T, G, N, M, generator=generator).to(dtype)
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
    if kind == "slstm":
        return partial(slstm_scan, backend=backend)
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


def inputs_of(shape: str, size: int, T: int, dtype: torch.dtype, resets: float = 0.0) -> list[Tensor | None]:
    """Of M or K `size`, with the rows of what is timed."""
    if shape == "m2rnn":
        return given_m2rnn(SHAPES[shape][0], T, size, dtype, resets)
    return given(shape, SHAPES[shape][0], T, size, dtype, resets)


def check(kind: str, shape: str, size: int, dtype: torch.dtype) -> bool:
    """Whether a kernel is right at the B and M, or K, of what is timed; in fp32 with document starts."""
    began = time.monotonic()
    inputs = inputs_of(shape, size, CHECKED[shape], dtype, 0.02 if dtype == torch.float32 else 0.0)
    scan = scan_of(kind, "triton")
    got = run(inputs, scan)
    torch.cuda.synchronize()
    seconds = time.monotonic() - began
    # on the CPU: thousands of small kernels would disturb what is timed meanwhile
    exact = [None if x is None else x.cpu() for x in inputs]
    exact = [x.double() if x is not None and x.is_floating_point() else x for x in exact]
    wanted = run(exact, scan_of("walk" if kind == "newton" else kind, "torch"))
    errors = {}
    for name, x, want in zip(M2RNN_NAMES if kind == "m2rnn" else NAMES, got, wanted, strict=True):
        error = float((x.cpu().double() - want).norm() / want.norm())
        errors[name] = error if x.isfinite().all() else float("inf")
    same = all(torch.equal(a, b) for a, b in zip(got, run(inputs, scan), strict=True))
    right = max(errors.values()) <= TOLERANCE[dtype] and same
    text = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    verdict = f"{'ok' if right else 'WRONG'}; {text}; same bits twice: {same}; first call {seconds:.0f} s"
    print(f"{kind} {shape} {size} {dtype}: {verdict}", flush=True)
    if dtype == torch.bfloat16:  # so that what is timed finds its kernels in Triton's cache
        run(inputs_of(shape, size, SHAPES[shape][1], dtype), scan)
        if shape in ("walk", "slstm"):
            scan_times(size)
    return right


def passes(scan: Any, tensors: list[Tensor]) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward pass of `scan()`, which depends on the tensors."""
    with torch.no_grad():
        forward = milliseconds(scan)
    y = scan()
    grad = torch.randn_like(y)
    return forward, milliseconds(lambda: torch.autograd.grad(y, tensors, grad, retain_graph=True))


def times(inputs: list[Tensor | None], kind: str) -> tuple[float, float]:
    *tensors, _ = inputs
    tensors = [x.requires_grad_() for x in tensors]
    return passes(lambda: scan_of(kind, "triton")(*tensors)[0], tensors)


def scan_times(M: int) -> tuple[float, float]:
    """Of BD-LRU's scan with the walk's rows."""
    (B, T), N = SHAPES["walk"], ROWS["walk"] // M
    planes = torch.randn(B, T, M + 1, N, M, device="cuda", dtype=torch.bfloat16)
    gates = planes.permute(0, 1, 3, 4, 2).requires_grad_()  # the mixer's order in memory
    values = torch.randn(B, T, N, M, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return passes(lambda: block_diagonal_scan(gates, values, backend="triton")[0], [gates, values])


def clock_walk(kind: str, M: int) -> dict[str, Any]:
    (B, T), N = SHAPES[kind], ROWS[kind] // M
    walk, scan = times(given(kind, B, T, M, torch.bfloat16), kind), scan_times(M)
    row = {"what": kind, "B": B, "T": T, "N": N, "M": M}
    row |= {"walk_ms": walk, "scan_ms": scan, "ratio": sum(walk) / sum(scan)}
    return row


def clock_newton(M: int) -> dict[str, Any]:
    (B, T), N = SHAPES["newton"], ROWS["newton"] // M
    inputs = given("newton", B, T, M, torch.bfloat16)
    with torch.no_grad():
        h, _, told = gru_scan(*inputs, "newton", "triton")
        difference = float((h - gru_scan(*inputs, "walk", "triton")[0]).abs().max())
    iterations, residual = told.tolist()
    walk, newton = times(inputs, "walk"), times(inputs, "newton")
    row = {"what": "newton", "B": B, "T": T, "N": N, "M": M, "iterations": iterations, "residual": residual}
    row |= {"difference": difference, "walk_ms": walk, "newton_ms": newton, "ratio": sum(newton) / sum(walk)}
    return row


def clock_m2rnn(K: int) -> dict[str, Any]:
    (B, T), (H, V) = SHAPES["m2rnn"], HEADS[K]
    inputs = given_m2rnn(B, T, K, torch.bfloat16)
    walk, (q, k, v, _, keep, h0, _) = times(inputs, "m2rnn"), inputs
    decay = keep[..., None, None].detach().expand(B, T, H, K, 1).contiguous().requires_grad_()
    scan = passes(lambda: matrix_scan(decay, k, v, q, h0, backend="triton")[0], [decay, k, v, q, h0])
    row = {"what": "m2rnn", "B": B, "T": T, "H": H, "K": K, "V": V}
    row |= {"walk_ms": walk, "scan_ms": scan, "ratio": sum(walk) / sum(scan)}
    return row


def item(kind: str, size: int) -> Item:
    """Newton is timed against the walk at its shape, which has to be right too."""
    cases = [(kind, kind, str(size), dtype) for dtype in ("bfloat16", "float32")]
    if kind == "newton":
        cases.append(("walk", "newton", str(size), "bfloat16"))
    clocks = {"newton": clock_newton, "m2rnn": clock_m2rnn}
    return Item(cases, partial(clocks.get(kind, partial(clock_walk, kind)), size))


def main() -> int:
    if sys.argv[1:2] == ["case"]:
        kind, shape, size, dtype = sys.argv[2:]
        return 0 if check(kind, shape, int(size), getattr(torch, dtype)) else 1
    items = {f"{kind}:{size}": item(kind, size) for kind, size in ITEMS}
    rows, right = run_items("benchmarks.gpu.walk", items, sys.argv[1:])
    met = all(row["ratio"] <= 3 for row in rows if row["what"] in ("walk", "slstm"))
    met &= all(row["ratio"] < 1 and row["difference"] <= 1e-5 for row in rows if row["what"] == "newton")
    if rows:
        print("goals met" if met else "goals missed")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
