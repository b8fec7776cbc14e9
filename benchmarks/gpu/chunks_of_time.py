"""Shares of copy speed of the Triton scans over numbers of chunks of time, where batches are small: what the
rule `triton_launch.time_chunks` was read from.

    python -m benchmarks.gpu.chunks_of_time docs/results/kernels-chunks-h100.json  # a minute on one H100

bf16, 32,768 tokens in few rows, planes as the mixers have them; one chunk reads the gates once, several read
them twice.
"""

import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from lrnn_lm.kernels.scan import triton_launch, triton_scans

from .. import measure
from ..shapes import PAPER_SHAPES, Shape
from .launch_plans import scan_call

TOKENS, BATCHES = 32768, (4, 1)
SHAPES = [s for s in PAPER_SHAPES if s.M in (1, 4, 8) or s.family == "h_lru"]
MOST_LANES = 600  # an SM, of all chunks together


def counts(shape: Shape, batch: int) -> Iterator[int]:
    """Numbers of chunks; the rule's own is 0."""
    lanes = shape.N * batch * (shape.M if shape.family == "bd_lru" else 1) / 132
    yield 0
    for count in (1, 4, 16, 64):
        if 30 <= lanes * count <= MOST_LANES:
            yield count


def call(shape: Shape, batch: int, length: int, backward: bool, count: int):
    """A scan in that many chunks."""

    def cut(groups: int, rows: int, cost: float, T: int, device: torch.device) -> tuple[int, int]:
        return (-(-T // count), count) if count else triton_launch.time_chunks(groups, rows, cost, T, device)

    triton_scans.time_chunks = cut
    return scan_call(shape, batch, length, backward)


@torch.no_grad()
def first_call(shape: Shape, batch: int, backward: bool, count: int) -> None:
    call(shape, batch, TOKENS // batch, backward, count)()
    torch.cuda.synchronize()


@torch.no_grad()
def main(output: Path) -> None:
    cases = [
        (shape, batch, backward, count)
        for shape in SHAPES
        for batch in BATCHES
        for backward in (False, True)
        for count in counts(shape, batch)
    ]
    workers = max(1, (os.cpu_count() or 1) - 2)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(first_call, *zip(*sorted(cases, key=lambda c: -c[0].M), strict=True)))
    device = torch.device("cuda")
    copy = measure.ceilings(device)["copy_bytes_per_second"]
    rows = []
    for shape, batch, backward, count in cases:
        length = TOKENS // batch
        taken = measure.gpu_seconds(call(shape, batch, length, backward, count), repeats=8)
        share = shape.moved_bytes(batch, length, 2)[backward] / taken / copy
        row = {"shape": shape.label(), "B": batch, "T": length, "dir": "fb"[backward], "chunks": count}
        rows.append({**row, "ms": 1e3 * taken, "share_of_copy": share})
        text = f"{shape.label()} B {batch} {'fb'[backward]} chunks {count or 'by rule'}: {share:.3f}"
        print(text, flush=True)
        measure.write_json(output, {"about": measure.describe(device), "copy": copy, "rows": rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
