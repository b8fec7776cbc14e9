"""Makes the tables of docs/scaling.md: measured ones from scaling.json, calculated ones from
scaling-pieces.json.

    python -m benchmarks.pages.scaling            print the tables
    python -m benchmarks.pages.scaling --write    put them into docs/scaling.md, between the marks

Legend: P parameters, E those of embedding and head, W GPUs, n blocks, a micro-batches of a step, F training
operations a token. All times in seconds.
"""

import argparse
import json
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from lrnn_lm.model.accounting import account, training_memory
from lrnn_lm.recipe import load_recipe
from lrnn_lm.train.build import model_config

from ..gpu import scaling as two_gpus

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


def _parts(size: Size, gpus: int) -> tuple[float, int, float]:
    """Rows a GPU, micro-batches, seconds of compute of a step."""
    tokens = size.tokens_per_step[GPUS.index(gpus)] / gpus
    rows = tokens / ROW
    return rows, math.ceil(rows / size.micro_rows), tokens * costs(size).flops / piece(size.compute)


def ddp(size: Size, gpus: int) -> Step:
    """Gradients summed once a step in fp32, bucket by bucket, while the last backward pass goes on.

    The first bucket is ready when its share of that pass is done, and the last one is hidden by nothing.
    """
    rows, accumulation, compute = _parts(size, gpus)
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
    rows, accumulation, compute = _parts(size, gpus)
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
    whole = 4 * cost.parameters if _parts(size, gpus)[1] > 1 else 4 * cost.embeddings
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


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def pieces_table() -> str:
    rows = [
        [f"`{name}`", entry["kind"], f"{entry['value']:.4g} {entry['unit']}", entry["source"]]
        for name, entry in PIECES.items()
    ]
    return _table(["piece", "kind", "value", "from"], rows).replace("---: | ---: |", "--- | --- |")


def efficiency_table() -> str:
    rows = []
    for size in SIZES:
        for gpus in GPUS:
            cells = []
            for step, shards in ((ddp, 1), (fsdp2, gpus), (hsdp, NODE)):
                if step is hsdp and gpus == NODE:
                    cells += ["", "as FSDP2"]
                elif fits(size, gpus, shards):
                    made = step(size, gpus)
                    cells += [f"{made.exposed * 1e3:.1f}", f"{made.efficiency:.3f}"]
                else:
                    cells += ["", f"does not fit ({memory(size, gpus, shards) / 1e9:.0f} GB)"]
            rows.append(
                [size.name, str(gpus), f"{size.tokens_per_step[GPUS.index(gpus)]:,}", f"{made.rows:g}",
                 str(made.accumulation), f"{made.compute * 1e3:.0f}", *cells]
            )  # fmt: skip
    head = ["model", "GPUs", "tokens a step", "rows a GPU", "micro-batches", "compute, ms",
            "DDP: exposed, ms", "DDP: efficiency", "FSDP2: exposed, ms", "FSDP2: efficiency",
            "HSDP: exposed, ms", "HSDP: efficiency"]  # fmt: skip
    return _table(head, rows)


def checkpoint_table() -> str:
    rows = []
    for size in SIZES:
        for gpus in GPUS:
            name, _ = best(size, gpus)
            cells = []
            for sharded in (False, True):
                save = checkpoint(size, gpus, sharded)
                fit = fits(size, gpus, gpus if sharded else 1)
                cells += [f"{save.stall:.3f}", f"{save.background:.0f}"] if fit else ["", ""]
            save = checkpoint(size, gpus, name == "FSDP2")
            rate = save.bytes / piece("checkpoint_every")
            rows.append([size.name, str(gpus), f"{save.bytes / 1e9:.1f}", *cells, f"{rate / 1e6:.0f}", name,
                         f"{save.goodput:.3f}"])  # fmt: skip
    head = ["model", "GPUs", "GB", "DDP: stall, s", "DDP: background, s", "FSDP2: stall, s",
            "FSDP2: background, s", "mean MB/s", "faster of both", "its goodput"]  # fmt: skip
    return _table(head, rows)


def data_table() -> str:
    rows = []
    for size in SIZES:
        for gpus in GPUS:
            step = best(size, gpus)[1]
            tokens = size.tokens_per_step[GPUS.index(gpus)] / (step.compute + step.exposed)
            read = tokens * piece("token_bytes")
            share = tokens / gpus / piece("loader")
            rows.append([size.name, str(gpus), f"{tokens / 1e6:.2f}", f"{read / 1e6:.1f}",
                         f"{read * 86_400 / 1e9:.0f}", f"{share:.1%}"])  # fmt: skip
    head = ["model", "GPUs", "M tokens/s", "read, MB/s", "GB a day", "a loader's time"]
    return _table(head, rows)


def sizes_table() -> str:
    rows = []
    for size in SIZES:
        recipe = load_recipe("recipes/paper/bd-lru-m4.yaml", list(size.overrides))
        cost = costs(size)
        rows.append([size.name, f"{cost.blocks} x {recipe.model.hidden_size}",
                     str(recipe.model.intermediate_size), str(recipe.model.mixer.num_blocks),
                     f"{cost.parameters:,}", f"{cost.flops / 1e9:.2f}", str(size.micro_rows),
                     f"{cost.activations / 1e9:.1f}"])  # fmt: skip
    head = ["model", "layers x width", "SwiGLU", "blocks of M=4", "P", "F, GFLOP", "rows a micro-batch",
            "its activations, GB"]  # fmt: skip
    return _table(head, rows)


def measured_table() -> str:
    """What two GPUs did, from docs/results/scaling.json."""
    return two_gpus.table(json.loads((DOCS / "results/scaling.json").read_text()))


def findings() -> str:
    """What the efficiency table says, in numbers of the same formulas."""
    small, middle, large = SIZES
    upto = [(size, gpus) for size in SIZES for gpus in GPUS[:2]]
    least_ddp = min(ddp(*at).efficiency for at in upto if fits(*at, 1))
    least_fsdp2 = min(fsdp2(*at).efficiency for at in upto if fits(*at, at[1]))

    def forward(size: Size) -> float:
        """ms of a block's forward pass at 1024 GPUs."""
        _, accumulation, compute = _parts(size, 1024)
        return 1e3 * compute / 3 / accumulation / costs(size).blocks

    one = ddp(small, 1024)
    step, gather = 1e3 * (one.compute + one.exposed), 1e3 * ring_delay(1024)
    said = [
        f"Up to 64 GPUs DDP keeps {least_ddp:.3f} or more where it fits, FSDP2 {least_fsdp2:.3f} or more.",
        f"FSDP2 over 1024 GPUs in one ring is bound by latency, not by bytes: a gather takes {gather:.1f} "
        f"ms, a block's forward pass {forward(small):.2f} ms (200M), {forward(middle):.2f} ms (1.3B) or "
        f"{forward(large):.1f} ms (7B). Shards within a node (HSDP) remove this latency: "
        f"{hsdp(small, 1024).efficiency:.3f}, {hsdp(middle, 1024).efficiency:.3f} and "
        f"{hsdp(large, 1024).efficiency:.3f} instead of {fsdp2(small, 1024).efficiency:.3f}, "
        f"{fsdp2(middle, 1024).efficiency:.3f} and {fsdp2(large, 1024).efficiency:.3f}.",
        f"A 200M model on 1024 GPUs has {one.rows:g} row a GPU and {step:.1f} ms a step with DDP. What is "
        "not included (kernel launches, the optimizer's own pass, the slowest rank) would be a large part of "
        "that.",
        f"With one network card a node instead of eight, 64 GPUs reach {_one_card(small):.2f} (200M) and "
        f"{_one_card(middle):.2f} (1.3B) with DDP.",
        f"On 1024 GPUs there is a failure every {piece('failure_hours') / 1024:.0f} hours. A checkpoint an "
        f"hour instead of one in ten minutes would cost the 7B model {_hourly(large):.1%} more.",
    ]
    return "\n".join(textwrap.fill(f"- {text}", 120, subsequent_indent="  ") for text in said)


def _one_card(size: Size) -> float:
    """DDP's efficiency on 64 GPUs where `bus_network` is an eighth."""
    entry = PIECES["bus_network"]
    PIECES["bus_network"] = entry | {"value": entry["value"] / NODE}
    try:
        return ddp(size, 64).efficiency
    finally:
        PIECES["bus_network"] = entry


def _hourly(size: Size) -> float:
    """Goodput lost on 1024 GPUs, sharded, by a checkpoint an hour."""
    entry, often = PIECES["checkpoint_every"], checkpoint(size, 1024, True).goodput
    PIECES["checkpoint_every"] = entry | {"value": 3600}
    try:
        return often - checkpoint(size, 1024, True).goodput
    finally:
        PIECES["checkpoint_every"] = entry


TABLES = {
    "measured": measured_table,
    "findings": findings,
    "pieces": pieces_table,
    "sizes": sizes_table,
    "efficiency": efficiency_table,
    "checkpoints": checkpoint_table,
    "data": data_table,
}


def filled(page: str) -> str:
    """The page with each table between its marks."""
    for name, table in TABLES.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = page.split(start)
        page = f"{before}{start}\n{table()}\n{end}{rest.split(end)[1]}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    if parser.parse_args().write:
        page = DOCS / "scaling.md"
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(table() for table in TABLES.values()))


if __name__ == "__main__":
    main()
