"""Is one CUDA graph of a whole training step faster? `bench train`'s step of bd-m4, eager and replayed.

    python -m benchmarks.gpu.graph_of_a_step docs/results/graph-of-a-step-h100.json     # a minute on one H100

Prints the median, the shortest and the longest of 20 steps of each, with the residual stream in fp32 and in
bf16, and writes all of them.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from .. import measure
from ..contenders import CONTENDERS, PAPER_SIZE, build_config, pick_size
from ..train import TrainingStep, TrainSettings, time_calls

B, T, STEPS = 16, 2048, 20


def main(output: Path) -> None:
    device, rows = torch.device("cuda"), []
    for residual_in_fp32 in (True, False):
        config = build_config(CONTENDERS["bd-m4"], pick_size(PAPER_SIZE, None, None), None, T)
        config.loss_chunk, config.residual_in_fp32 = 8192, residual_in_fp32
        step = TrainingStep(config, device, TrainSettings(), B, T)
        step.compile_blocks()
        for group in step.optimizer.param_groups:
            group["capturable"] = True
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
            eager, _ = time_calls(step, STEPS, device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                loss: Tensor = step()
            replayed, _ = time_calls(graph.replay, STEPS, device)
        for name, taken in (("eager", eager), ("graph", replayed)):
            ms = sorted(1e3 * seconds for seconds in taken)
            spread = f"{ms[len(ms) // 2]:.2f} ms, {ms[0]:.2f} to {ms[-1]:.2f}"
            print(f"residual stream in fp32 {residual_in_fp32}, {name}: {spread}")
            rows.append({"mode": name, "residual_in_fp32": residual_in_fp32, "step_ms": ms})
        print(f"  loss {float(loss):.4f}")
    measure.write_json(output, {"about": measure.describe(device), "rows": rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
