"""The matrix scan on a GPU: Triton against the reference in fp64, then its time.

    python -m benchmarks.gpu.matrix_scan [out.json] [--items erase:4,plain:1,..] [--seconds 100]

Times are medians of 10, of the forward and of the backward pass, with fp32 gates and bf16 values as the mixer
has them. The exit code is 1 where a case failed. To find the address of a fault:

    compute-sanitizer --tool memcheck python -m benchmarks.gpu.matrix_scan case 4 float32 77
    compute-sanitizer --tool racecheck python -m benchmarks.gpu.matrix_scan case 4 float32 77
"""

import statistics
import sys
import time

import torch

from lrnn_lm.kernels.scan.matrix_scan import matrix_scan

from .cases import Item, run_items

ERASING = (4, 1)  # M with writes that erase
TIMED, OTHERS = (4, 1, 16), (8, 2)
LONG = 1024  # T of what is timed; 77 has a rest, and document starts at odd places
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
    print(f"{case}: {verdict}; {text}; same bits twice: {same}; first call {seconds:.0f} s", flush=True)
    if T == LONG:  # so that what is timed finds its kernels in Triton's cache
        clock(M, erases)
    return right


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
    B, T, H, K, V = 64, LONG, 8, 64, 64
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
    return {
        "B": B, "T": T, "H": H, "K": K, "V": V, "M": M, "erase": erases, "forward_ms": forward,
        "backward_ms": backward,
    }  # fmt: skip


def item(M: int, erases: bool, timed: bool) -> Item:
    short = [(str(M), dtype, "77", *["erasing"] * erases) for dtype in ("bfloat16", "float32")]
    if not timed:
        return Item(short, None)
    return Item([(str(M), "bfloat16", str(LONG), *["erasing"] * erases), *short], lambda: clock(M, erases))


def main() -> int:
    if sys.argv[1:2] == ["case"]:
        M, dtype, T, *erases = sys.argv[2:]
        return 0 if check(int(M), getattr(torch, dtype), int(T), bool(erases)) else 1
    items = {f"erase:{M}": item(M, True, True) for M in ERASING}
    items |= {f"plain:{M}": item(M, False, M in TIMED) for M in (*TIMED, *OTHERS)}
    _, right = run_items("benchmarks.gpu.matrix_scan", items, sys.argv[1:])
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
