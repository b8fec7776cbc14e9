"""`lrnn bench kernels`: speed of every scan, against the machine's limits and its peers, in one run.

On a GPU: forward and backward of the Triton scans at the paper's sizes in bf16, over the speed of a device
copy that moves the same bytes (each input read once, each output written once); whole mixer layers over their
floor (GEMM FLOPs at matmul speed plus scan bytes at copy speed); and peers. On a CPU: the reference loop and
the torch backend.

Legend: B batch, T time, N blocks or channels, M block size or order, D model width.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrnn_lm.files import pick_device
from lrnn_lm.mixers import SequenceContext, build_mixer

from . import measure
from .kernel_peers import Peer, associative_peer, fla_obstacle, fla_peers
from .results import show, tabulate
from .shapes import CPU_SHAPES, PAPER_SHAPES, Shape

WIDTH = 768  # D of the paper's language models
LAYER_BATCH, LAYER_LENGTH = 8, 2048
PEERS = "peers"  # alone, in place of a size
PEER_BATCH, PEER_LENGTH = 8, 2048
TOGETHER = "fwd + bwd together"


@dataclass
class Row:
    """One measurement. Times in seconds, shares of the ceilings measured in the same run; None: not
    measured."""

    what: str
    B: int
    T: int
    forward: float | None = None
    backward: float | None = None
    forward_share: float | None = None
    backward_share: float | None = None
    floor: float | None = None
    tokens_per_second: float | None = None
    ratio: float | None = None
    note: str = ""
    shape: dict[str, Any] = field(default_factory=dict)


def compile_ahead(cases: Sequence[Callable[[], None]], workers: int) -> list[float]:
    """Seconds of the first call of each case, in processes of their own.

    They fill Triton's cache on disk side by side, so that measuring waits for no compiler; a case alone on a
    machine takes a half to a third of what it takes in this crowd.
    """
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_seconds_of, cases))


def _seconds_of(case: Callable[[], None]) -> float:
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    started = time.perf_counter()
    case()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def first_scan(shape: Shape, B: int, T: int) -> None:
    """A scan, forward and backward, as `bench_scan` launches it."""
    device = torch.device("cuda")
    planes = shape.planes(B, T, torch.bfloat16, device).requires_grad_()
    bias = torch.zeros(shape.M + 1, math.prod(shape.values_shape(1, 1)), device=device, requires_grad=True)
    h = shape.scan_planes(planes, bias)
    h.backward(torch.ones(h.shape, device=device, dtype=h.dtype))  # contiguous, as a projection's gradient is


def first_layer(shape: Shape) -> None:
    """A layer's step."""
    layer_step(shape, torch.device("cuda"))[0]()


def make_inputs(
    shape: Shape, B: int, T: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Random gates in planes (the kernels' fast layout), values, and dL/dh."""
    values_shape = shape.values_shape(B, T)
    planes = torch.randn(B, T, shape.M + 1, *values_shape[2:], device=device, dtype=dtype)
    gates = planes.movedim(2, -1)
    values, grad = (torch.randn(values_shape, device=device, dtype=dtype) for _ in range(2))
    return gates.requires_grad_(), values.requires_grad_(), grad


def time_pair(forward: Callable[[], Tensor], inputs: list[Tensor]) -> tuple[float, float]:
    """Seconds of a forward pass that records no graph, and of a backward pass alone, on a GPU."""

    def without_graph() -> Tensor:
        with torch.no_grad():
            return forward()

    forward_seconds = measure.gpu_seconds(without_graph)
    out = forward()
    grad = torch.randn_like(out)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, grad, retain_graph=True)

    return forward_seconds, measure.gpu_seconds(backward, graph=False)


def scan_backward(shape: Shape, planes: Tensor, h: Tensor, grad: Tensor) -> Callable[[], Any]:
    """The backward op by itself, with the bias's gradient, so that a CUDA graph can hold it and Python costs
    nothing."""
    last = torch.zeros(planes.shape[0], shape.N, shape.M, device=planes.device)
    rows, operator = shape.values_shape(1, 1)[2:], torch.ops.lrnn_lm.packed_triton_backward
    return lambda: operator(grad, last, planes, rows, None, h, None, "softmax", True)


def bench_scan(shape: Shape, B: int, T: int, limits: dict[str, float], device: torch.device) -> Row:
    """A Triton scan, forward and backward, in bf16, from planes as the mixers have them."""
    planes = shape.planes(B, T, torch.bfloat16, device)
    grad = torch.randn(shape.values_shape(B, T), device=device, dtype=torch.bfloat16)
    h = shape.scan_planes(planes)
    forward = measure.gpu_seconds(lambda: shape.scan_planes(planes))
    backward = measure.gpu_seconds(scan_backward(shape, planes, h, grad))
    least = [moved / limits["copy_bytes_per_second"] for moved in shape.moved_bytes(B, T, 2)]
    return Row(
        shape.label(), B, T, forward, backward, least[0] / forward, least[1] / backward,
        floor=sum(least), tokens_per_second=B * T / (forward + backward), shape=asdict(shape),
    )  # fmt: skip


def layer_step(shape: Shape, device: torch.device) -> tuple[Callable[[], Any], int]:
    """Forward and backward of a whole mixer with bf16 parameters, compiled as blocks are in training, and how
    many parameters its matrices have."""
    mixer = build_mixer(shape.mixer(), WIDTH).to(device, torch.bfloat16)
    torch.compiler.reset()  # one mixer after the other would count as one that is compiled again and again
    mixer.compile(dynamic=False)
    x = torch.randn(LAYER_BATCH, LAYER_LENGTH, WIDTH, device=device, dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn_like(x)
    wanted = [x, *mixer.parameters()]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(mixer(x, None, SequenceContext())[0], wanted, grad)

    return step, sum(p.numel() for p in mixer.parameters() if p.ndim == 2)


def bench_layer(shape: Shape, limits: dict[str, float], device: torch.device) -> Row:
    """A whole mixer, projections included, forward and backward, bf16 parameters; ratio = time / floor."""
    B, T = LAYER_BATCH, LAYER_LENGTH
    step, weights = layer_step(shape, device)
    taken = measure.gpu_seconds(step)
    floor = 6 * B * T * weights / limits["matmul_flops_per_second"]
    floor += sum(shape.moved_bytes(B, T, 2)) / limits["copy_bytes_per_second"]
    return Row(
        f"layer {shape.label()}", B, T, taken, floor=floor, ratio=taken / floor,
        tokens_per_second=B * T / taken, note=TOGETHER, shape=asdict(shape),
    )  # fmt: skip


def _peer_failures() -> tuple[type[Exception], ...]:
    """What a foreign kernel raises on a machine, version or shape that it does not support."""
    from triton.errors import TritonError

    return ImportError, RuntimeError, ValueError, TypeError, AssertionError, TritonError


def bench_peer(build: Callable[[], Peer], B: int, T: int) -> Row:
    """A peer, or why it did not run: a peer that fails must not end the run."""
    name = build.func.__name__ if isinstance(build, partial) else build.__name__
    try:
        peer = build()
        name = peer.name
        forward, backward = time_pair(peer.forward, peer.inputs)
    except _peer_failures() as error:
        said = str(error).strip().splitlines() or [""]
        return Row(name, B, T, note=f"{type(error).__name__}: {said[0][:100]}")
    return Row(name, B, T, forward, backward, tokens_per_second=B * T / (forward + backward))


def bench_cpu_scan(shape: Shape, B: int, T: int) -> list[Row]:
    """The reference loop and the torch backend on a CPU in fp32; ratio is against the reference.

    One thread: a step of a scan is too small to share, and a busy core would be what is measured.
    """
    device = torch.device("cpu")
    gates, values, grad = make_inputs(shape, B, T, torch.float32, device)

    def step(backend: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(shape.scan(gates, values, backend), [gates, values], grad)

    backends = ("reference", "torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = measure.cpu_seconds([partial(step, backend) for backend in backends])
    torch.set_num_threads(threads)
    return [
        Row(
            f"{shape.label()} {backend}",
            B,
            T,
            taken,
            tokens_per_second=B * T / taken,
            ratio=times[0] / taken,
            note=TOGETHER,
            shape=asdict(shape),
        )
        for backend, taken in zip(backends, times, strict=True)
    ]


def run(
    device: str = "auto",
    output: Path | None = None,
    tokens: int = 65_536,
    length: int = 2048,
    long_length: int = 32_768,
    peers: bool = True,
    layers: bool = True,
    only: str = "",
) -> dict[str, Any]:
    """Measure, print tables, and write JSON rows to `output` if given.

    Args:
        device: auto, cpu or cuda.
        tokens, length: B * T and T of the scans on a GPU.
        long_length: T of the scans at B 1.
        peers, layers: also measure these.
        only: of the sizes on a GPU, those whose label holds this, as in "H-LRU M=16"; "peers": peers alone.
    Returns:
        {"about", "ceilings", "rows"}: what is written.
    """
    where = pick_device(device)
    alone = only.casefold() == PEERS
    shapes = tuple(s for s in PAPER_SHAPES if only.casefold() in s.label().casefold())
    if not shapes and not alone:
        known = ", ".join(s.label() for s in PAPER_SHAPES)
        raise ValueError(f"--only {only!r} fits none of {known}, and is not {PEERS!r}")
    if alone and (not peers or where.type != "cuda"):
        raise ValueError(f"--only {PEERS} measures peers, which takes a GPU and no --no-peers")
    if not 1 <= length <= tokens:
        raise ValueError(f"--length {length} does not fit into --tokens {tokens}")
    if output is not None and output.is_dir():
        raise ValueError(f"{output}: a folder; --output takes a file for the rows")
    torch.manual_seed(0)
    result: dict[str, Any] = {"about": measure.describe(where), "ceilings": {}, "rows": []}
    rows: list[Row] = []
    if where.type == "cpu":
        result["about"]["threads"] = 1
        made: Iterable[Row] = (row for shape in CPU_SHAPES for row in bench_cpu_scan(shape, B=8, T=256))
    else:
        made = gpu_rows(result, where, shapes, tokens, length, long_length, peers, layers)
    started = time.perf_counter()
    for row in made:  # written as they come: a run that is cut keeps what it has
        print(f"{row.what}, B {row.B}, T {row.T}: after {time.perf_counter() - started:.1f} s", flush=True)
        rows.append(row)
        result["rows"].append({k: v for k, v in asdict(row).items() if v not in (None, "", {})})
        if output is not None:
            measure.write_json(output, result)
    _print(rows)
    if output is not None:
        print(f"written: {output}")
    return result


def gpu_rows(
    result: dict[str, Any],
    device: torch.device,
    shapes: tuple[Shape, ...],
    tokens: int,
    length: int,
    long_length: int,
    peers: bool,
    layers: bool,
) -> Iterator[Row]:
    """Scans at full batch and at B 1, layers, peers; the machine's limits go to `result`."""
    full = tokens // length
    batches = {1: long_length, full: 64}  # as short as launches stay the same
    cases = {f"{s.label()}, B {B}": partial(first_scan, s, B, T) for B, T in batches.items() for s in shapes}
    if layers:
        cases |= {f"layer {s.label()}": partial(first_layer, s) for s in shapes}
    if cases:
        started = time.perf_counter()
        first = compile_ahead(list(cases.values()), max(1, min(24, (os.cpu_count() or 2) - 2)))
        result["first_calls"] = dict(zip(cases, first, strict=True))
        slowest = max(cases, key=lambda name: result["first_calls"][name])
        print(
            f"first calls, side by side: {time.perf_counter() - started:.0f} s in all, longest {slowest} "
            f"{result['first_calls'][slowest]:.0f} s",
            flush=True,
        )
    limits = result["ceilings"] = measure.ceilings(device)
    print(
        f"{result['about']['device']}: copy {limits['copy_bytes_per_second'] / 1e12:.2f} TB/s, "
        f"bf16 matmul {limits['matmul_flops_per_second'] / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    yield from (bench_scan(shape, full, length, limits, device) for shape in shapes)
    yield from (bench_scan(shape, 1, long_length, limits, device) for shape in shapes)
    if layers:
        yield from (bench_layer(shape, limits, device) for shape in shapes)
    if peers:
        yield from peer_rows(limits, device)


def peer_rows(limits: dict[str, float], device: torch.device) -> Iterator[Row]:
    """Our scans at M 1 and 4, and beside them the same mathematics by matrices, and fla's kernels."""
    B, T = PEER_BATCH, PEER_LENGTH
    for shape in PAPER_SHAPES:
        if shape.M in (1, 4):
            yield bench_scan(shape, B, T, limits, device)
            gates, values, _ = make_inputs(shape, B, T, torch.bfloat16, device)
            compiled = shape.M == 1  # compiling a product of 4 x 4 matrices takes minutes
            yield bench_peer(partial(associative_peer, shape.family, gates, values, compiled), B, T)
    if reason := fla_obstacle():
        yield Row("fla", B, T, note=reason)
    else:
        yield from (bench_peer(build, B, T) for build in fla_peers(B, T, 2112, device))


def _print(rows: list[Row]) -> None:
    columns = ["", "B", "T", "fwd ms", "bwd ms", "fwd + bwd ms", "floor ms", "fwd/copy", "bwd/copy", "ratio",
               "tokens/s", "note"]  # fmt: skip
    cells = []
    for row in rows:
        together = row.note == TOGETHER
        alone, both = (None, row.forward) if together else (row.forward, None)
        times = [show(x, ".3f", 1e3) for x in (alone, row.backward, both, row.floor)]
        shares = [show(x, ".2f") for x in (row.forward_share, row.backward_share, row.ratio)]
        speed, note = show(row.tokens_per_second), "" if together else row.note
        cells.append([row.what, str(row.B), str(row.T), *times, *shares, speed, note])
    tabulate("kernels", columns, cells, None)
