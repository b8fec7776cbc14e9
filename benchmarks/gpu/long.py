"""Training by segments (`train.segment`): peak memory and tokens/s against the length of one row.

    python -m benchmarks.gpu.long [--output long.json]                      # about 6 minutes on one H100
    python -m benchmarks.gpu.long --device cpu --width 64 --layers 2 --vocab 512 --segment 256 \
        --lengths 512,2048,8192                                             # small

A step is that of `lrnn bench train`: forward and backward of one row, clipping, AdamW. The first case is a
row of one segment, trained as a whole; the others are rows of the given lengths by segments, with `--whole`
also as wholes. Each case runs in a process of its own and prints a JSON row. On a GPU memory is what torch
allocated at most, without the first two steps; on a CPU it is the process's largest resident size.

The exit code is 1 where the longest row needs more than 1.25 times the memory of the shortest by segments, or
trains at less than 0.6 of the tokens/s of the whole row.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrnn_lm.files import pick_device
from lrnn_lm.model.carried import CarriedStates
from lrnn_lm.train.segments import backward_by_segments, split

from .. import measure
from ..contenders import build_config, pick_contenders, pick_size
from ..train import TrainingStep, TrainSettings

MEMORY, SPEED = 1.25, 0.6


class SegmentedStep(TrainingStep):
    """The optimizer step of a row by segments, as the trainer takes it."""

    segment: int

    def __call__(self) -> Tensor:
        loss, _ = backward_by_segments(
            lambda part, carried: self.run(part["input_ids"], None, carried),
            lambda part, carried: self.run(part["input_ids"], part["shift_labels"], carried).loss,
            self.model.config,
            split(self.batch, self.segment),
            lambda last: nullcontext(),
        )
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def run(self, ids: Tensor, labels: Tensor | None, carried: CarriedStates) -> Any:
        with self.autocast():
            return self.model(
                input_ids=ids,
                shift_labels=labels,
                num_items_in_batch=self.targets,
                return_logits=False,
                use_cache=False,
                past_key_values=carried,
            )


def case(asked: argparse.Namespace, T: int, segment: int | None) -> dict[str, Any]:
    """The row of one length; `segment` None for the row as a whole."""
    device = pick_device(asked.device)
    size = pick_size(asked.size, asked.width, asked.layers)
    config = build_config(pick_contenders([asked.contender])[0], size, asked.vocab, T)
    settings = TrainSettings(checkpointing=asked.checkpointing)
    step = (TrainingStep if segment is None else SegmentedStep)(config, device, settings, 1, T)
    step.segment = segment
    if not asked.no_compile:
        step.compile_blocks()
    for _ in range(2):
        float(step())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = []
    for _ in range(asked.steps):
        began = time.perf_counter()
        loss = float(step())  # waits for the backward pass
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    seconds = min(taken)
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else _resident()
    return {
        "contender": asked.contender,
        "parameters": sum(p.numel() for p in step.model.parameters()),
        "T": T,
        "segment": segment,
        "step_seconds": seconds,
        "tokens_per_second": T / seconds,
        "peak_memory_bytes": peak,
        "loss": loss,
    }


def _resident() -> int:
    """The largest resident size so far, in bytes; Linux counts it in KiB."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def alone(T: int, segment: int | None) -> dict[str, Any]:
    """`case` in a process of its own, with this process's arguments."""
    own = [sys.executable, "-m", "benchmarks.gpu.long", *sys.argv[1:], "--case", str(T), str(segment or 0)]
    done = subprocess.run(own, stdout=subprocess.PIPE, text=True, check=True)
    line = done.stdout.strip().splitlines()[-1]
    print(line, flush=True)
    return json.loads(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="16384,262144,1048576")
    parser.add_argument("--segment", type=int, default=8192)
    parser.add_argument("--contender", default="bd-m4")
    parser.add_argument("--size", default="212M")
    for name in ("width", "layers", "vocab"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="auto")
    for name in ("checkpointing", "no-compile", "whole"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--case", type=int, nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case is not None:
        print(json.dumps(case(asked, asked.case[0], asked.case[1] or None)))
        return 0
    lengths = sorted(map(int, asked.lengths.split(",")))
    whole, *rows = [alone(asked.segment, None), *(alone(T, asked.segment) for T in lengths)]
    wholes = [alone(T, None) for T in lengths if asked.whole]
    memory = rows[-1]["peak_memory_bytes"] / rows[0]["peak_memory_bytes"]
    speed = rows[-1]["tokens_per_second"] / whole["tokens_per_second"]
    print(f"T {lengths[-1]}: {memory:.2f} of the memory of T {lengths[0]}; ", end="")
    print(f"{speed:.2f} of the tokens/s of T {asked.segment} as a whole")
    if asked.output is not None:
        about = measure.describe(pick_device(asked.device))
        measure.write_json(asked.output, {"about": about, "rows": [whole, *rows, *wholes]})
    return 0 if memory <= MEMORY and speed >= SPEED else 1


if __name__ == "__main__":
    sys.exit(main())
