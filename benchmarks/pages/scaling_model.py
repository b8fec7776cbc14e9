"""What a step and a checkpoint cost on many GPUs, calculated from measured pieces: for docs/scaling.md.

The pieces, each with its source, are in docs/results/scaling-pieces.json.

Legend: P parameters, E those of embedding and head, W GPUs, n blocks, a micro-batches of a step, F training
operations a token. All times in seconds.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from lrnn_lm.model.accounting import account, training_memory
from lrnn_lm.recipe import load_recipe
from lrnn_lm.train.build import model_config

DOCS = Path(__file__).resolve().parents[2] / "docs"
GPUS = (8, 64, 1024)
NODE = 8  # GPUs
ROW = 2048  # tokens
VOCABULARY = 50_280
BUCKET = 64 * 2**20  # bytes of gradients that DDP exchanges at once
DEVICE_BYTES = 80e9
PIECES = {
    key: entry
    for key, entry in json.loads((DOCS / "results/scaling-pieces.json").read_text()).items()
    if key != "note"
}


@dataclass(frozen=True)
class Size:
    """A BD-LRU M=4 with the paper's proportions. micro_rows: rows of 2048 tokens in a GPU's micro-batch."""

    name: str
    overrides: tuple[str, ...]
    compute: str
    micro_rows: int
    tokens_per_step: tuple[int, int, int]  # at each of GPUS


@dataclass(frozen=True)
class Costs:
    """P, E, F, n; activations: bytes of one micro-batch, its logits included."""

    parameters: int
    embeddings: int
    flops: int
    blocks: int
    activations: int


@cache
def costs(size: Size) -> Costs:
    recipe = load_recipe("recipes/paper/bd-lru-m4.yaml", list(size.overrides))
    config = model_config(recipe, VOCABULARY)
    counted = account(config, ROW)
    needed = training_memory(config, size.micro_rows, ROW, torch.bfloat16)
    return Costs(
        counted.total_parameters,
        counted.parameters["embedding"] + counted.parameters["head"],
        counted.flops_per_token_training,
        config.num_hidden_layers,
        needed.activations + needed.loss,
    )


def _wider(width: int, layers: int, mlp: int, blocks: int) -> tuple[str, ...]:
    return (
        f"model.hidden_size={width}",
        f"model.num_hidden_layers={layers}",
        f"model.intermediate_size={mlp}",
        f"model.mixer.num_blocks={blocks}",
        "model.parameters=null",
    )


SIZES = (
    Size("200M", (), "compute_200M", 16, (2**19, 2**19, 2**21)),
    Size("1.3B", _wider(2048, 14, 5461, 805), "compute_large", 8, (2**20, 2**20, 2**22)),
    Size("7B", _wider(4096, 21, 10_922, 1611), "compute_large", 2, (2**22, 2**22, 2**23)),
)


def piece(name: str) -> float:
    return PIECES[name]["value"]


@contextmanager
def changed(name: str, value: float) -> Iterator[None]:
    """Inside, a piece has another value."""
    before = PIECES[name]
    PIECES[name] = before | {"value": value}
    try:
        yield
    finally:
        PIECES[name] = before


def bus(gpus: int) -> float:
    """Bytes a second at which every GPU takes part in a collective."""
    return piece("bus_node") if gpus <= NODE else min(piece("bus_node"), piece("bus_network"))


def tree_delay(gpus: int) -> float:
    """Of one all-reduce: up and down a tree of nodes, and through each node."""
    nodes = math.ceil(gpus / NODE)
    return 2 * (math.ceil(math.log2(nodes)) * piece("hop_network") + (NODE - 1) * piece("hop_node"))


def ring_delay(gpus: int) -> float:
    """Of one all-gather or reduce-scatter: once around every GPU."""
    nodes = math.ceil(gpus / NODE)
    between = nodes if nodes > 1 else 0
    return between * piece("hop_network") + (gpus - 1 - between) * piece("hop_node")


@dataclass(frozen=True)
class Step:
    """compute: seconds of a step without any exchange. exposed: seconds more that nothing hides."""

    rows: float
    accumulation: int
    compute: float
    exposed: float

    @property
    def efficiency(self) -> float:
        """Of W times one GPU's rate at the same rows a GPU."""
        return self.compute / (self.compute + self.exposed)


def parts(size: Size, gpus: int) -> tuple[float, int, float]:
    """Rows a GPU, micro-batches, seconds of compute of a step."""
    tokens = size.tokens_per_step[GPUS.index(gpus)] / gpus
    rows = tokens / ROW
    return rows, math.ceil(rows / size.micro_rows), tokens * costs(size).flops / piece(size.compute)


def ddp(size: Size, gpus: int) -> Step:
    """Gradients summed once a step in fp32, bucket by bucket, while the last backward pass goes on.

    The first bucket is ready when its share of that pass is done, and the last one is hidden by nothing.
    """
    rows, accumulation, compute = parts(size, gpus)
    gradients = 4 * costs(size).parameters
    buckets = math.ceil(gradients / BUCKET)
    each = 2 * (gpus - 1) / gpus * gradients / buckets / bus(gpus) + tree_delay(gpus)
    window = 2 / 3 * compute / accumulation * (buckets - 1) / buckets
    return Step(rows, accumulation, compute, each + max(0.0, (buckets - 1) * each - window))


def fsdp2(size: Size, gpus: int, shards: int | None = None) -> Step:
    """Blocks gathered in bf16 for the forward and again for the backward pass of every micro-batch, each
    while the one before it computes; embedding and head once, hidden by nothing, as are a pass's first gather
    and the step's last scatter. Gradients are scattered in fp32, in the last micro-batch only.

    shards: GPUs that hold a copy (default: all). Copies then sum their shards of the gradients."""
    rows, accumulation, compute = parts(size, gpus)
    shards = shards or gpus
    cost, delay, copies = costs(size), ring_delay(shards), gpus // shards

    def exchange(bytes_whole: float) -> float:
        return (shards - 1) / shards * bytes_whole / bus(shards) + delay

    def sum_up(bytes_whole: float) -> float:
        if copies == 1:
            return exchange(bytes_whole)
        between = 2 * (copies - 1) / copies * bytes_whole / shards / bus(gpus)
        return exchange(bytes_whole) + between + 2 * math.ceil(math.log2(copies)) * piece("hop_network")

    block = (cost.parameters - cost.embeddings) / cost.blocks
    forward = compute / 3 / accumulation / cost.blocks  # a block's
    backward = 2 * forward

    def exposed(seconds: float, hidden_by: float) -> float:
        return seconds + (cost.blocks - 1) * max(0.0, seconds - hidden_by)

    gather, scatter = exchange(2 * block), sum_up(4 * block)
    front = exchange(2 * cost.embeddings) + exposed(gather, forward)
    most = front + exposed(gather, backward)
    last = front + exposed(gather + scatter, backward) + sum_up(4 * cost.embeddings)
    return Step(rows, accumulation, compute, (accumulation - 1) * most + last)


def hsdp(size: Size, gpus: int) -> Step:
    """FSDP2 within each node, a copy a node."""
    return fsdp2(size, gpus, NODE)


def memory(size: Size, gpus: int, shards: int) -> float:
    """Bytes of a GPU: weights, moments, gradients in fp32; a micro-batch's activations, none recomputed.

    Sharded, gradients are whole while micro-batches accumulate, and so are embedding and head (bf16)."""
    cost = costs(size)
    if shards == 1:
        return 16 * cost.parameters + cost.activations
    whole = 4 * cost.parameters if parts(size, gpus)[1] > 1 else 4 * cost.embeddings
    return 16 * cost.parameters / shards + whole + 2 * cost.embeddings + cost.activations


def fits(size: Size, gpus: int, shards: int) -> bool:
    return memory(size, gpus, shards) < 0.9 * DEVICE_BYTES


@dataclass(frozen=True)
class Checkpoint:
    """Of one save: bytes, seconds that training stands still, seconds in the background; goodput: the share
    of time that makes steps which are not done again, saves and failures counted."""

    bytes: float
    stall: float
    background: float
    goodput: float


def checkpoint(size: Size, gpus: int, sharded: bool) -> Checkpoint:
    total = piece("checkpoint_bytes") * costs(size).parameters
    writers = gpus if sharded else 1
    nodes = math.ceil(writers / NODE)
    stall = total / writers / piece("copy_to_host")
    write = total / min(nodes * piece("write_node"), piece("write_all"))
    background = write + total / writers / piece("hash")
    every, between = piece("checkpoint_every"), piece("failure_hours") * 3600 / gpus
    lost = stall / every + (max(every, background) / 2 + background + piece("restart")) / between
    return Checkpoint(total, stall, background, 1 - lost)


def best(size: Size, gpus: int) -> tuple[str, Step]:
    """The faster way that fits."""
    ways: dict[str, tuple[Callable[[Size, int], Step], int]] = {"DDP": (ddp, 1), "FSDP2": (fsdp2, gpus)}
    fitting = {name: step(size, gpus) for name, (step, shards) in ways.items() if fits(size, gpus, shards)}
    name = max(fitting, key=lambda name: fitting[name].efficiency)
    return name, fitting[name]
