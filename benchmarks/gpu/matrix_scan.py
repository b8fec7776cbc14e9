"""The matrix scan on a GPU: Triton against the reference in fp64, then its time.

    python -m benchmarks.gpu.matrix_scan [out.json]        # about a minute on one H100, most of it compiling

Times are medians of 10, of the forward and of the backward pass, with fp32 gates and bf16 values as the mixer
has them. Every case runs in a process of its own, so that a fault names its case and spares the others: one
that fails runs once more with CUDA_LAUNCH_BLOCKING=1, which names the kernel. To find the address:

    compute-sanitizer --tool memcheck python -m benchmarks.gpu.matrix_scan case 4 float32 77
    compute-sanitizer --tool racecheck python -m benchmarks.gpu.matrix_scan case 4 float32 77
"""

import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lrnn_lm.kernels.scan.matrix_scan import matrix_scan

from .. import measure

SIZES = (1, 2, 4, 8, 16)
TIMED = (1, 4, 16)
ERASING = (1, 4)  # also with writes that erase
NAMES = ("y", "last", "transitions", "writes", "values", "queries", "h0", "erase")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2}


def inputs(B: int, T: int, H: int, K: int, V: int, M: int, dtype: torch.dtype, device: str = "cuda") -> list:
    """Normalised gates as planes (B, T, M+1, H, K) in fp32 and bf16 values alike on every device."""
    generator = torch.Generator().manual_seed(T + K + M)
    z = torch.randn(B, T, M + 1, H, K, generator=generator)
    z[:, :, 0] += 3 * torch.rand(H, K, generator=generator)
    gates = z.softmax(2).to(device)
    values, queries, h0 = (
        torch.randn(*shape, generator=generator).to(device)
        for shape in ((B, T, H, V), (B, T, H, K), (B, H, K, V))
    )
    reset = (torch.rand(B, T, generator=generator) < 0.02).to(device)
    transitions, writes = gates[:, :, :M].permute(0, 1, 3, 4, 2), gates[:, :, M]
    return [transitions, writes, values.to(dtype), queries.to(dtype), h0, reset]


def erasing(given: list) -> list:
    """The same, with keys of length 1 as what is erased, and writes of a part of them."""
    transitions, writes, values, queries, h0, reset = given
    keys = torch.nn.functional.normalize(queries.roll(1, 1).to(transitions.dtype), dim=-1)
    return [transitions, keys * writes[..., :1].sqrt(), values, queries, h0, keys, reset]


def run(given: list, backend: str) -> list[torch.Tensor]:
    *tensors, reset = (x.detach().requires_grad_() if x.is_floating_point() else x for x in given)
    outputs = matrix_scan(*tensors[:5], reset, backend, *tensors[5:])
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in outputs]
    loss = sum((x * w).sum() for x, w in zip(outputs, weights, strict=True))
    return [*(x.detach() for x in outputs), *torch.autograd.grad(loss, tensors)]


def check(M: int, dtype: torch.dtype, T: int, erases: bool) -> bool:
    """Whether a case is right, twice with the same bits; a synchronisation after each pass."""
    started = time.perf_counter()
    given = inputs(2, T, 2 if T % 16 else 8, 64, 64, M, dtype)
    given = erasing(given) if erases else given
    got = run(given, "triton")
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    exact = [x.double() if x.is_floating_point() else x for x in given]
    errors = {}
    for name, x, want in zip(NAMES, got, run(exact, "torch"), strict=False):
        error = float((x.double() - want).norm() / want.norm())
        errors[name] = error if x.isfinite().all() else float("inf")
    same = all(torch.equal(a, b) for a, b in zip(got, run(given, "triton"), strict=True))
    text = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    right = max(errors.values()) <= TOLERANCE[dtype] and same
    verdict = "ok" if right else "WRONG"
    case = f"M {M} {dtype} T {T}{' erasing' * erases}"
    print(f"{case}: {verdict}; {text}; same bits twice: {same}; first call {seconds:.0f} s")
    return right


def run_alone(case: tuple[int, torch.dtype, int, bool]) -> bool:
    """Whether a case succeeds in a process of its own; what that said is printed."""
    M, dtype, T, erases = case
    case = ["case", str(M), str(dtype).removeprefix("torch."), str(T), *["erasing"] * erases]
    command = [sys.executable, "-m", "benchmarks.gpu.matrix_scan", *case]
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout.strip() or f"M {M} {dtype} T {T}: FAILED with exit code {done.returncode}"
    if done.returncode and "WRONG" not in said:
        again = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "CUDA_LAUNCH_BLOCKING": "1"}
        )
        verdict = "fails again" if again.returncode else "succeeds"
        said += f"; with CUDA_LAUNCH_BLOCKING=1 it {verdict}\n{(again.stderr or done.stderr)[-3000:]}"
    print(said, flush=True)
    return done.returncode == 0


def milliseconds(call) -> float:
    times = []
    for _ in range(12):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times[2:])


def clock(M: int, erases: bool) -> dict[str, float]:
    B, T, H, K, V = 64, 1024, 8, 64, 64
    given = inputs(4, T, H, K, V, M, torch.bfloat16)
    given = [x.repeat(16, *[1] * (x.ndim - 1)) for x in (erasing(given) if erases else given)]
    *tensors, _ = (x.requires_grad_() if x.is_floating_point() else x for x in given)
    planes = given[0].detach().permute(0, 1, 4, 2, 3).contiguous()
    tensors[0] = planes.permute(0, 1, 3, 4, 2).requires_grad_()
    del tensors[4]  # h0
    grad = torch.randn_like(tensors[2])

    def scan() -> torch.Tensor:
        return matrix_scan(*tensors[:4], backend="triton", erase=tensors[4] if erases else None)[0]

    with torch.no_grad():
        forward = milliseconds(scan)
    y = scan()
    backward = milliseconds(lambda: torch.autograd.grad(y, tensors, grad, retain_graph=True))
    row = {
        "B": B, "T": T, "H": H, "K": K, "V": V, "M": M, "erase": erases, "forward_ms": forward,
        "backward_ms": backward,
    }  # fmt: skip
    print(row, flush=True)
    return row


def main() -> int:
    if sys.argv[1:2] == ["case"]:
        M, dtype, T, *erases = sys.argv[2:]
        return 0 if check(int(M), getattr(torch, dtype), int(T), bool(erases)) else 1
    cases = [(M, dtype, 77, False) for M in reversed(SIZES) for dtype in (torch.float32, torch.bfloat16)]
    cases += [(M, dtype, 77, True) for M in ERASING for dtype in (torch.float32, torch.bfloat16)]
    cases += [(M, torch.bfloat16, 1024, False) for M in TIMED]
    with ThreadPoolExecutor(len(cases)) as pool:
        right = list(pool.map(run_alone, cases))
    if not all(right):
        return 1
    rows = [clock(M, False) for M in TIMED] + [clock(M, True) for M in ERASING]
    if len(sys.argv) > 1:
        measure.write_json(Path(sys.argv[1]), {"about": measure.describe(torch.device("cuda")), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
