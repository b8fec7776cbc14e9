"""The tables of docs/scaling.md: measured ones from scaling.json, calculated ones by scaling_model.py."""

import json
import textwrap

from lrnn_lm.evaluate.show import markdown_table
from lrnn_lm.recipe import load_recipe

from ..gpu import scaling as two_gpus
from .scaling_model import (
    DOCS,
    GPUS,
    NODE,
    PIECES,
    SIZES,
    Size,
    best,
    changed,
    checkpoint,
    costs,
    ddp,
    fits,
    fsdp2,
    hsdp,
    memory,
    parts,
    piece,
    ring_delay,
)


def _table(head: list[str], rows: list[list[str]], left: int | None = 2) -> str:
    return markdown_table(head, rows, left).removesuffix("\n")


def pieces_table() -> str:
    rows = [
        [f"`{name}`", entry["kind"], f"{entry['value']:.4g} {entry['unit']}", entry["source"]]
        for name, entry in PIECES.items()
    ]
    return _table(["piece", "kind", "value", "from"], rows, left=None)


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
        _, accumulation, compute = parts(size, 1024)
        return 1e3 * compute / 3 / accumulation / costs(size).blocks

    with changed("bus_network", piece("bus_network") / NODE):
        one_card = [ddp(size, 64).efficiency for size in (small, middle)]
    often = checkpoint(large, 1024, True).goodput
    with changed("checkpoint_every", 3600):
        hourly = often - checkpoint(large, 1024, True).goodput
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
        f"With one network card a node instead of eight, 64 GPUs reach {one_card[0]:.2f} (200M) and "
        f"{one_card[1]:.2f} (1.3B) with DDP.",
        f"On 1024 GPUs there is a failure every {piece('failure_hours') / 1024:.0f} hours. A checkpoint an "
        f"hour instead of one in ten minutes would cost the 7B model {hourly:.1%} more.",
    ]
    return "\n".join(textwrap.fill(f"- {text}", 120, subsequent_indent="  ") for text in said)


TABLES = {
    "measured": measured_table,
    "findings": findings,
    "pieces": pieces_table,
    "sizes": sizes_table,
    "efficiency": efficiency_table,
    "checkpoints": checkpoint_table,
    "data": data_table,
}
