"""Shares of copy speed of the Triton scans over launch plans, from which `triton_launch.plan` was read.

    python tests/gpu/launch_plans.py docs/results/kernels-plans-h100.json      # about 3 minutes on one H100

A plan is (rows a lane, steps a group, groups in flight and at work). The rule's own and its neighbours are
compiled side by side, then timed in bf16 at B 32 and B 8, T 2048, planes as the mixers have them.
"""

import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from lrnn_lm.bench import measure
from lrnn_lm.bench.kernels import PAPER_SHAPES, Shape, scan_backward
from lrnn_lm.kernels import triton_launch
from lrnn_lm.kernels.triton_launch import LANES, lanes_per_row, plan

BATCHES, LENGTH = (32, 8), 2048
Plan = tuple[int, int, int]


def plans(shape: Shape) -> Iterator[tuple[bool, Plan]]:
    """(backward, plan): the rule's at each batch size, and plans beside it."""
    share = lanes_per_row(shape.M)
    taps, rows = shape.M // share, shape.N * share * (shape.M if shape.family == "bd_lru" else 1)
    found = set()
    for batch in BATCHES:
        for backward in (False, True):
            warps = rows * batch / LANES / triton_launch.multiprocessors(torch.device("cuda"))
            own, steps, stages = plan(taps, warps, share == 1, LENGTH, 2, backward)
            for near in (
                (own, steps, stages),
                (own, steps, max(2, stages - 1)),
                (own, steps, stages + 1),
                (own, 12 - steps if taps * own > 4 else steps, stages),
                (3 - own if share == 1 else own, steps, stages),
            ):
                if taps * near[0] * near[1] <= 64:
                    found.add((backward, near))
    return iter(sorted(found))


def call(shape: Shape, batch: int, length: int, backward: bool, chosen: Plan):
    triton_launch.plan = lambda *_: chosen
    device = torch.device("cuda")
    planes = shape.planes(batch, length, torch.bfloat16, device)
    h = shape.scan_planes(planes) if backward else None
    grad = torch.randn(shape.values_shape(batch, length), device=device, dtype=torch.bfloat16)
    return scan_backward(shape, planes, h, grad) if backward else lambda: shape.scan_planes(planes)


@torch.no_grad()
def first_call(shape: Shape, backward: bool, chosen: Plan) -> float:
    started = time.perf_counter()
    call(shape, 32, 16, backward, chosen)()
    torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.no_grad()
def main(output: Path) -> None:
    cases = [(shape, *case) for shape in PAPER_SHAPES for case in plans(shape)]
    with ProcessPoolExecutor(15, mp_context=multiprocessing.get_context("spawn")) as pool:
        compiled = list(pool.map(first_call, *zip(*cases, strict=True)))
    device = torch.device("cuda")
    copy = measure.ceilings(device)["copy_bytes_per_second"]
    rows = []
    for batch in BATCHES:
        for (shape, backward, chosen), seconds in zip(cases, compiled, strict=True):
            taken = measure.gpu_seconds(call(shape, batch, LENGTH, backward, chosen), repeats=8)
            share = shape.moved_bytes(batch, LENGTH, 2)[backward] / taken / copy
            row = dict(zip(("P", "steps", "stages"), chosen, strict=True))
            row |= {"shape": shape.label(), "B": batch, "dir": "fb"[backward], "ms": 1e3 * taken}
            rows.append({**row, "share": share, "compile_s": seconds})
            print(rows[-1], flush=True)
    measure.write_json(output, {"about": measure.describe(device), "copy": copy, "rows": rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
