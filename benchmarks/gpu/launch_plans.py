"""Shares of copy speed of the Triton scans over launch plans, from which `triton_launch.plan` was read.

    python -m benchmarks.gpu.launch_plans docs/results/kernels-plans-h100.json  # about 2 minutes on one H100

A plan is (lanes a row, rows a lane, steps a group, groups in flight and at work). The rule's own and plans
beside it are compiled side by side, then timed in bf16 at T 2048, planes as the mixers have them.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from lrnn_lm.kernels.scan import triton_launch, triton_scans
from lrnn_lm.kernels.scan.triton_launch import LANES, WARPS_FOR_SHARING, Plan, plan
from lrnn_lm.kernels.scan.triton_scans import rows_like

from .. import measure
from ..kernels import scan_backward
from ..shapes import PAPER_SHAPES, Shape

BATCHES, LENGTH = (32, 8, 4), 2048


def plans(shape: Shape, batch: int, backward: bool) -> Iterator[Plan]:
    """The rule's, and those with fewer and more lanes a row, and with two rows a lane."""
    block = shape.M if shape.family == "bd_lru" else 1
    warps = shape.N * block * batch / LANES / triton_launch.multiprocessors(torch.device("cuda"))
    found = []
    for few in (WARPS_FOR_SHARING, 0.0, *(warps * least * 1.01 for least in (1, 2))):
        triton_launch.WARPS_FOR_SHARING = few
        chosen = plan(shape.M, block, warps, LENGTH, 2, backward)
        found.append(chosen)
        if chosen.share == 1 and shape.M <= 8:
            found.append(chosen._replace(own=3 - chosen.own))
    triton_launch.WARPS_FOR_SHARING = WARPS_FOR_SHARING
    return iter(dict.fromkeys(found))


def scan_call(shape: Shape, batch: int, length: int, backward: bool):
    """A call without arguments: one pass over random planes (and states, which change nothing about time)."""
    device = torch.device("cuda")
    planes = shape.planes(batch, length, torch.bfloat16, device)
    if not backward:
        return lambda: shape.scan_planes(planes)
    sizes = shape.values_shape(batch, length)
    h = rows_like(planes.new_empty(sizes), planes.shape[-1]).normal_()
    return scan_backward(shape, planes, h, torch.randn(sizes, device=device, dtype=torch.bfloat16))


def call(shape: Shape, batch: int, length: int, backward: bool, chosen: Plan):
    """The same, with that plan from now on."""
    triton_launch.plan = lambda *_: chosen
    triton_scans.plan_launch.cache_clear()
    return scan_call(shape, batch, length, backward)


@torch.no_grad()
def first_call(shape: Shape, batch: int, backward: bool, chosen: Plan) -> float:
    started = time.perf_counter()
    call(shape, batch, 16, backward, chosen)()
    torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.no_grad()
def main(output: Path) -> None:
    cases = [
        (shape, batch, backward, chosen)
        for shape in PAPER_SHAPES
        for batch in BATCHES
        for backward in (False, True)
        for chosen in plans(shape, batch, backward)
    ]
    longest_first = sorted(cases, key=lambda case: -case[0].M * case[3].own * case[3].steps)
    with ProcessPoolExecutor(
        max(1, (os.cpu_count() or 1) - 2), mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        seconds = dict(
            zip(longest_first, pool.map(first_call, *zip(*longest_first, strict=True)), strict=True)
        )
    print(f"{len(cases)} plans, compiled {max(seconds.values()):.0f} s at most", flush=True)
    device = torch.device("cuda")
    copy = measure.ceilings(device)["copy_bytes_per_second"]
    rows = []
    for case in cases:
        shape, batch, backward, chosen = case
        taken = measure.gpu_seconds(call(shape, batch, LENGTH, backward, chosen), repeats=8)
        share = shape.moved_bytes(batch, LENGTH, 2)[backward] / taken / copy
        row = {"shape": shape.label(), "B": batch, "dir": "fb"[backward], **chosen._asdict()}
        rows.append({**row, "ms": 1e3 * taken, "share_of_copy": share, "compile_s": seconds[case]})
        text = f"{shape.label()} B {batch} {'fb'[backward]} {tuple(chosen)}: {share:.3f}"
        print(text, flush=True)
        measure.write_json(output, {"about": measure.describe(device), "copy": copy, "rows": rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
