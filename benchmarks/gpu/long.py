"""Training by segments (`train.segment`): peak memory and tokens/s against the length of one row.

    python -m benchmarks.gpu.long [--output long.json]                      # about 6 minutes on one H100
    python -m benchmarks.gpu.long --device cpu --width 64 --layers 2 --vocab 512 --segment 256 \
        --lengths 512,2048,8192                                             # small
    torchrun --nproc-per-node 4 -m benchmarks.gpu.long --shared             # or 2: a row among GPUs
    torchrun --nproc-per-node 2 -m benchmarks.gpu.long --shared --device cpu --width 64 --layers 2 \
        --vocab 512 --segment 256 --lengths 1024,4096 --no-compile          # small

A step is that of `lrnn bench train`: forward and backward of one row, clipping, AdamW. The first case is a
row of one segment, trained as a whole; the others are rows of the given lengths by segments, with `--whole`
also as wholes. Each case runs in a process of its own and prints a JSON row. On a GPU memory is what torch
allocated at most, without the first two steps; on a CPU it is the process's largest resident size.

The exit code is 1 where the longest row needs more than 1.25 times the memory of the shortest by segments, or
trains at less than 0.6 of the tokens/s of the whole row.

With `--shared` k GPUs share a row (`train.sequence_parallel`) of 262,144 or 1,048,576 tokens; beside it each
trains on a row of T / k tokens by itself. `--segment 0` recomputes nothing, for 65,536 tokens a GPU. The exit
code is 1 where k reach less than 0.90 of k times one. With segments it first compares the gradients.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from lrnn_lm.files import pick_device
from lrnn_lm.model.carried import CarriedStates
from lrnn_lm.train.segments import allow_graphs, split
from lrnn_lm.train.sequence import SequenceParallel

from .. import measure
from ..contenders import build_config, pick_contenders, pick_size
from ..train import TrainingStep, TrainSettings

MEMORY, SPEED, SHARED = 1.25, 0.6, 0.9


class SegmentedStep(TrainingStep):
    """The optimizer step of a row by segments, as the trainer takes it."""

    sequence: SequenceParallel

    def __call__(self) -> Tensor:
        loss = self.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def backward(self) -> Tensor:
        loss, _ = self.sequence.backward(
            lambda part, carried: self.run(part["input_ids"], None, carried),
            lambda part, carried: self.run(part["input_ids"], part["shift_labels"], carried).loss,
            split(self.batch, self.sequence.piece),
            lambda last: nullcontext(),
        )
        if self.sequence.size > 1:
            for summed in (loss, *(parameter.grad for parameter in self.model.parameters())):
                dist.all_reduce(summed)
        return loss

    def share(self, row: dict[str, Tensor], T: int, segment: int | None, size: int = 1) -> None:
        """Take the first T tokens of `row`, with all ranks or alone."""
        config, device = self.model.config, row["input_ids"].device
        place = (dist.get_rank(), size) if size > 1 else (0, 1)
        self.sequence = SequenceParallel(config, size, T, segment, *place, device, timedelta(minutes=2))
        own = self.sequence.own({key: tokens[:, :T].cpu() for key, tokens in row.items()})
        self.batch = {key: tokens.to(device) for key, tokens in own.items()}
        self.targets = float(T)

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
    step = built(asked, TrainingStep if segment is None else SegmentedStep, device, T)
    if segment is not None:
        step.share(step.batch, T, segment)
    return {"T": T, "segment": segment, **timed(asked, step, T)}


def built(asked: argparse.Namespace, kind: type[TrainingStep], device: torch.device, T: int) -> TrainingStep:
    size = pick_size(asked.size, asked.width, asked.layers)
    config = build_config(pick_contenders(asked.contender)[0], size, asked.vocab, T)
    step = kind(config, device, TrainSettings(checkpointing=asked.checkpointing), 1, T)
    if not asked.no_compile:
        allow_graphs(config)
        step.compile_blocks()
    return step


def timed(asked: argparse.Namespace, step: TrainingStep, T: int) -> dict[str, Any]:
    """What a step of T tokens takes, after two that compile and fill the caches."""
    device = next(step.model.parameters()).device
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


def shared(asked: argparse.Namespace) -> int:
    """In each rank of torchrun: rows that all of them share, and rows of one of them."""
    rank, ranks, segment = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), asked.segment or None
    device = pick_device(asked.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    lengths = sorted(map(int, asked.lengths.split(",")))
    step = built(asked, SegmentedStep, device, lengths[-1])
    row, rows, shares = step.batch, [], []
    error = None if segment is None else disagreement(step, row, 2 * ranks * segment, segment, ranks)
    for T in lengths:
        for size in (1, ranks):
            length = T // ranks * size
            step.share(row, length, segment, size)
            rows.append({"T": length, "gpus": size, "segment": segment, **timed(asked, step, length)})
            if rank == 0:
                print(json.dumps(rows[-1]), flush=True)
        shares.append(rows[-1]["tokens_per_second"] / rows[-2]["tokens_per_second"] / ranks)
    if rank == 0:
        if error is not None:
            print(f"gradient of a shared row: differs by {error:.1e} of its norm from that of one GPU")
        for T, share in zip(lengths, shares, strict=True):
            print(f"T {T}: {ranks} at {share:.3f} of {ranks} times one with {T // ranks} tokens")
        if asked.output is not None:
            about = measure.describe(device)
            measure.write_json(asked.output, {"about": about, "gradient_error": error, "rows": rows})
    dist.destroy_process_group()
    return 0 if rank or min(shares) >= SHARED else 1


def disagreement(step: SegmentedStep, row: dict[str, Tensor], T: int, segment: int, ranks: int) -> float:
    """Of the gradients of T tokens, shared and alone: the norm of the difference over the norm."""
    found = []
    for size in (1, ranks):
        step.share(row, T, segment, size)
        step.backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in step.model.parameters()]))
        step.optimizer.zero_grad(set_to_none=True)
    return float((found[1] - found[0]).norm() / found[0].norm())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", help="default: 16384,262144,1048576; with --shared the last two")
    parser.add_argument("--segment", type=int, default=8192)
    parser.add_argument("--contender", default="bd-m4")
    parser.add_argument("--size", default="212M")
    for name in ("width", "layers", "vocab"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="auto")
    for name in ("checkpointing", "no-compile", "whole", "shared"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--case", type=int, nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.lengths = asked.lengths or "16384,262144,1048576"[6 * asked.shared :]
    if asked.shared:
        return shared(asked)
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
