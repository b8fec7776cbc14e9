"""Times the kernels of a fused decoding step at 212M, in microseconds: each kind in a chain of 48.

    python -m benchmarks.gpu.decoding_kernels docs/results/decoding-kernels-h100.json [--sequences 64,16]

A chain is one CUDA graph over so many sets of weights that none stays in the L2 cache, as in a step. For
comparison: cuBLAS's products of the same sizes, without norms, gates, states and residuals.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lrnn_lm.kernels.decode import fused_tiles

from ..measure import describe, write_json
from ..train import time_calls

Kernel = Callable[[int], Tensor]
D, N, M, INNER, KERNELS = 768, 302, 4, 2048, 48
CHAIN_BYTES = 150e6  # of weights: three times an H100's L2
EPS, DEVICE = 1e-6, "cuda"


def noise(*shape: int) -> Tensor:
    return (0.02 * torch.randn(*shape, device=DEVICE)).bfloat16()


def chain(kernel: Kernel) -> float:
    """Microseconds a kernel; `kernel` takes its number in the chain."""

    def run() -> None:
        for i in range(KERNELS):
            kernel(i)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
        time_calls(graph.replay, 3, torch.device(DEVICE))
        taken, _ = time_calls(graph.replay, 20, torch.device(DEVICE))
    return 1e6 * sorted(taken)[len(taken) // 2] / KERNELS


def _turn(weights: list[Tensor], i: int) -> Tensor:
    return weights[i % len(weights)]


def measure(B: int, weights: dict[str, list[Tensor]], bias: Tensor, norm: Tensor) -> list[dict[str, Any]]:
    """A row a kind of kernel: microseconds of ours and of cuBLAS's product alone."""
    mix, out, up, down = (partial(_turn, weights[kind]) for kind in ("mix", "out", "up", "down"))
    x, h, inner = noise(B, D), noise(B, N * M), noise(B, INNER)
    states = [torch.zeros(B, N, M, device=DEVICE) for _ in range(KERNELS)]
    workspace = fused_tiles.Workspace(torch.device(DEVICE))
    stream = fused_tiles.residual_step(h, out(0), fused_tiles.begin(x, norm), norm, workspace)
    kernels: dict[str, tuple[Kernel, Kernel]] = {
        "mix": (
            lambda i: fused_tiles.mix_step(stream, EPS, mix(i), bias, states[i], "softmax", False),
            lambda i: functional.linear(x, mix(i), bias),
        ),
        "out": (
            lambda i: fused_tiles.residual_step(h, out(i), stream, norm, workspace).x,
            lambda i: functional.linear(h, out(i)),
        ),
        "up": (
            lambda i: fused_tiles.normed_step(stream, EPS, up(i), gated=True),
            lambda i: functional.linear(x, up(i)),
        ),
        "down": (
            lambda i: fused_tiles.residual_step(inner, down(i), stream, norm, workspace).x,
            lambda i: functional.linear(inner, down(i)),
        ),
    }
    rows = []
    for kind, (ours, product) in kernels.items():
        rows.append({"B": B, "kernel": kind, "us": chain(ours), "product_us": chain(product)})
        print(rows[-1], flush=True)
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--sequences", default="64,16")
    given, measured = parser.parse_args(), []
    rows = N * M
    sizes = {"mix": (rows * (M + 2), D), "out": (D, rows), "up": (2 * INNER, D), "down": (D, INNER)}
    counts = {
        kind: max(1, round(CHAIN_BYTES / (2 * outputs * inputs))) for kind, (outputs, inputs) in sizes.items()
    }
    weights = {kind: [noise(*size) for _ in range(counts[kind])] for kind, size in sizes.items()}
    for B in map(int, given.sequences.split(",")):
        measured += measure(B, weights, noise(rows * (M + 2)), noise(D) + 1)
        write_json(given.output, {"about": describe(torch.device(DEVICE)), "rows": measured})


if __name__ == "__main__":
    main()
