"""Tables of speed: rows of docs/results as Markdown, with file, commit and command of each.

A ratio is tokens/s of bd-m4 over the peer's: above 1, bd-m4 is faster.
"""

import json
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from lrnn_lm.evaluate.show import markdown_table

from ..decode import DecodeSettings
from ..results import Row, read_results
from ..train import TrainSettings

RESULTS = Path(__file__).resolve().parents[2] / "docs/results"


def rows_of(name: str, **match: Any) -> list[Row]:
    """Rows of a file that were measured and have these values."""
    rows = read_results(RESULTS / name)[1]
    return [r for r in rows if "reason" not in r and all(r.get(k) == v for k, v in match.items())]


def row_of(name: str, **match: Any) -> Row:
    (row,) = rows_of(name, **match)
    return row


def read_whole(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def table(head: list[str], rows: list[list[str]]) -> str:
    return markdown_table(head, rows).removesuffix("\n")


def source(name: str) -> str:
    """The file, its commit, and the command that makes it again, from the settings that it names."""
    about = read_results(RESULTS / name)[0]
    kind = {"train": TrainSettings, "decode": DecodeSettings}.get(about.get("benchmark", ""))
    text = f"`results/{name}`, commit {about['commit']}"
    if kind is None:
        return text
    words = []
    for field in fields(kind):
        value = about["settings"].get(field.name, field.default)
        flag = "--" + field.name.replace("_", "-")
        if field.name == "budget_seconds" or (value == field.default and field.name != "contenders"):
            continue
        if field.name == "residual_in_fp32":
            words += ["--residual-in-bf16"] if value is False else []
        elif isinstance(value, bool):
            words += [flag if value else "--no-" + field.name.replace("_", "-")]
        else:
            words += [flag, shlex.quote(str(value))]
    return f"{text}: `lrnn bench {about['benchmark']} {' '.join(words)}`"


def processes(row: Row) -> int:
    return row.get("processes", 1)


def ratio(peer: Row, ours: Row) -> str:
    return f"{ours['tokens_per_second'] / peer['tokens_per_second']:.2f}"


# Kernels

GOALS = {**{("bd_lru", m): (0.80, 0.60) for m in (1, 2, 4)}, ("bd_lru", 8): (0.60, 0.45),
         ("bd_lru", 16): (0.60, 0.45), **{("h_lru", m): (0.80, 0.60) for m in (2, 4, 8, 16)}}  # fmt: skip


def name_of(shape: dict[str, Any]) -> str:
    kind = "BD M=" if shape["family"] == "bd_lru" else "H order "
    return f"{kind}{shape['M']}, N {shape['N']}"


def kernels() -> str:
    scans = [r for r in rows_of("kernels-h100.json") if "forward_share" in r]
    lines = []
    for full in (r for r in scans if r["B"] > 1):
        (one,) = [r for r in scans if r["B"] == 1 and r["shape"] == full["shape"]]
        goals = GOALS[full["shape"]["family"], full["shape"]["M"]]
        cells = [name_of(full["shape"]), f"{1e3 * full['forward']:.2f}", f"{1e3 * full['backward']:.2f}"]
        for row, goal in ((full, goals[0]), (one, goals[1])):
            shares = [row["forward_share"], row["backward_share"]]
            cells += [f"{share:.2f}{'' if share >= goal else ' missed'}" for share in shares] + [
                f"{goal:.2f}"
            ]
        lines.append(cells)
    head = ["", "forward ms", "backward ms", "forward / copy", "backward / copy", "goal",
            "B 1: forward / copy", "B 1: backward / copy", "goal"]  # fmt: skip
    first = read_whole("kernels-h100.json")["first_calls"].values()
    said = f"The first calls, compiled in parallel, took {min(first):.0f} to {max(first):.0f} s."
    return f"{source('kernels-h100.json')}. {said}\n\n{table(head, lines)}"


def layers() -> str:
    rows = [r for r in rows_of("kernels-h100.json") if r["what"].startswith("layer")]
    lines = [[name_of(r["shape"]), f"{1e3 * r['forward']:.2f}", f"{r['ratio']:.2f}"] for r in rows]
    return table(["", "ms", "time over the floor"], lines)


def kernel_peers() -> str:
    """Rows come in pairs, ours and torch's of the same mathematics; fla's are beside M = 1."""
    rows = [r for r in read_results(RESULTS / "kernels-peers-h100.json")[1] if r["B"] == 8]
    rows = [r for r in rows if not r["what"].startswith("layer")]
    lines: list[list[str]] = []
    ours: dict[str, Row] = {}
    for row in rows:
        if "shape" in row:
            last = name_of(row["shape"])
            ours[last] = row
            cells = [f"ours, {last}", f"{1e3 * row['forward']:.3f}", f"{1e3 * row['backward']:.3f}", ""]
        elif "note" in row:
            cells = [
                row["what"].split(",")[0],
                "",
                "",
                "refused: wrong gradients on Hopper, Triton 3.4 to 3.7.0",
            ]
        else:
            beside = next(iter(ours)) if row["what"].startswith("fla") else last
            own = ours[beside]
            times = (row["forward"] + row["backward"]) / (own["forward"] + own["backward"])
            plain = row["what"].startswith("torch") and "compiled" not in row["what"]
            cells = [f"{row['what']}{', not compiled' if plain else ''}", f"{1e3 * row['forward']:.2f}",
                     f"{1e3 * row['backward']:.2f}", f"{times:.1f} ({beside})"]  # fmt: skip
        lines.append(cells)
    head = ["", "forward ms", "backward ms", "time over ours, forward + backward"]
    return source("kernels-peers-h100.json") + ".\n\n" + table(head, lines)


def kernels_cpu() -> str:
    rows = rows_of("kernels-cpu.json")
    lines = [[r["what"], f"{r['tokens_per_second']:,.0f}", f"{r['ratio']:.2f}"] for r in rows]
    return table(["", "tokens/s", "times the reference loop"], lines)


# Training

TRAIN = ["", "layers", "B", "T", "ms a step", "spread", "processes", "tokens/s", "MFU", "peak GB"]


def train_cells(row: Row, name: str = "") -> list[str]:
    return [
        name or row["contender"], str(row["layers"]), str(row["B"]), f"{row['T']:,}",
        f"{1e3 * row['step_seconds']:.1f}", f"{row['spread']:.1%}", str(processes(row)),
        f"{row['tokens_per_second']:,.0f}", f"{row['mfu']:.3f}", f"{row['peak_memory_bytes'] / 1e9:.1f}",
    ]  # fmt: skip


def beside_ours(names: list[str], like: Callable[[Row], tuple]) -> list[list[str]]:
    """Rows of files, the peers' with the ratio to the bd-m4 of the same file that is alike."""
    lines = []
    for name in names:
        rows = rows_of(name)
        ours = {like(r): r for r in rows if r["contender"] == "bd-m4"}
        for row in sorted(rows, key=lambda r: like(r)):
            label = row["contender"] + ("" if row["residual_in_fp32"] else ", residual in bf16")
            over = "" if row["contender"] == "bd-m4" else ratio(row, ours[like(row)])
            lines.append([*train_cells(row, label), over])
    return lines


def train() -> str:
    files = ["train-h100.jsonl", "train-bf16-residual-h100.jsonl"]
    text = table([*TRAIN, "bd-m4's tokens/s over this"], beside_ours(files, lambda r: (r["T"],)))
    return "\n".join(f"- {source(name)}" for name in files) + "\n\n" + text


PEERS = [
    ("the paper's formulation", "train-paper-h100.jsonl", "not compiled, 4 steps"),
    (
        "Gated DeltaNet",
        "train-gated-deltanet-h100.jsonl",
        "its mixers are fla's, not compiled with the block",
    ),
]


def peers() -> str:
    ours = row_of("train-h100.jsonl", contender="bd-m4", T=2048)
    lines = []
    for name, file, handicap in PEERS:
        (row,) = rows_of(file)
        lines.append([*train_cells(row, name), ratio(row, ours), handicap])
    text = table([*TRAIN, "bd-m4's tokens/s over this", "what slows this"], lines)
    return "\n".join(f"- {source(file)}" for _, file, _ in PEERS) + "\n\n" + text


def mixers() -> str:
    lines = [train_cells(r) for r in rows_of("train-mixers-h100.jsonl")]
    return source("train-mixers-h100.jsonl") + "\n\n" + table(TRAIN, lines)


def tokens() -> str:
    lines = beside_ours(["train-tokens-h100.jsonl"], lambda r: (r["B"],))
    return source("train-tokens-h100.jsonl") + "\n\n" + table([*TRAIN, "bd-m4's tokens/s over this"], lines)


def sizes() -> str:
    """By parameters; 212M is the bf16 row of the other table."""
    names = ["sizes/50m-125m-760m.jsonl", "sizes/350m.jsonl", "sizes/1.3b.jsonl"]
    every = [r for name in ["train-bf16-residual-h100.jsonl", *names] for r in rows_of(name)]
    lines = []
    for row in sorted(every, key=lambda r: (r["flops_per_token"] // 1e9, r["size"], r["contender"])):
        (ours,) = [r for r in every if r["size"] == row["size"] and r["contender"] == "bd-m4"]
        over = "" if row is ours else ratio(row, ours)
        million = f"{row['parameters'] / 1e6:,.0f}M"
        lines.append([row["size"], million, *train_cells(row), over])
    head = ["size", "parameters", "contender", *TRAIN[1:], "bd-m4's tokens/s over this"]
    lines.sort(key=lambda cells: float(cells[1][:-1].replace(",", "")) // 50)
    return "\n".join(f"- {source(name)}" for name in names) + "\n\n" + table(head, lines)


def kinds() -> str:
    found = {
        "fp32": row_of("train-h100.jsonl", contender="bd-m4", T=2048)["profile"],
        "bf16": row_of("train-bf16-residual-h100.jsonl", contender="bd-m4")["profile"],
        "transformer, fp32": row_of("train-h100.jsonl", contender="transformer", T=2048)["profile"],
    }
    every = dict.fromkeys(kind for profile in found.values() for kind in profile["kinds"])
    lines = [
        [kind, *(f"{p['kinds'][kind]:.1f}" if kind in p["kinds"] else "" for p in found.values())]
        for kind in every
    ]
    lines.append(["device busy", *(f"{p['busy_ms']:.1f}" for p in found.values())])
    head = ["kind, ms of a step", "bd-m4", "bd-m4, residual in bf16", "transformer, 19 layers"]
    return table(head, lines)


# Decoding

DECODE = ["decode-h100.jsonl", "decode-batches-h100.jsonl", "decode-before-h100.jsonl",
          "decode-transformer-h100.jsonl"]  # fmt: skip


def decode() -> str:
    lines = []
    for name in DECODE:
        for row in rows_of(name):
            if name == "decode-before-h100.jsonl" and row["mode"] != "compiled":
                continue  # measured again since
            context = f"{row['context']:,}" + (" emulated" if row.get("emulated") else "")
            lines.append([
                row["contender"], str(row["layers"]), str(row["B"]), row["mode"], context,
                f"{1e3 * row['token_seconds']:.3f}", f"{row['spread']:.1%}", str(processes(row)),
                f"{row['tokens_per_second']:,.0f}", f"{row['share_of_limit']:.2f}",
            ])  # fmt: skip
    head = ["", "layers", "B", "mode", "context", "ms a token", "spread", "processes", "tokens/s",
            "speed over the limit"]  # fmt: skip
    lines.sort(key=lambda cells: (cells[0], int(cells[2]), cells[3]))
    return "\n".join(f"- {source(name)}" for name in DECODE) + "\n\n" + table(head, lines)


def readme() -> str:
    """The README's table: what bd-m4 does, with the note that each number needs."""
    scans = [r for r in rows_of("kernels-h100.json") if "forward_share" in r and r["B"] > 1]
    upto_8 = [r for r in scans if r["shape"]["family"] == "bd_lru" and r["shape"]["M"] <= 8]
    shares = [r[key] for r in upto_8 for key in ("forward_share", "backward_share")]
    at = {}
    for row in rows_of("train-h100.jsonl"):
        at[row["contender"], row["T"]] = row
    deep = [ratio(at["transformer", T], at["bd-m4", T]) for T in (2048, 8192, 32768)]
    others = [
        [f"training, against {name}", f"{ratio(rows_of(file)[0], at['bd-m4', 2048])} times as fast", handicap]
        for name, file, handicap in PEERS
    ]
    shape, m4 = (
        row_of("train-same-shape-h200.jsonl", contender=c) for c in ("transformer-same-shape", "bd-m4")
    )
    same_shape = (
        f"{shape['parameters'] / 1e6:.0f}M parameters; one H200, medians of {processes(shape)} processes"
    )
    one = row_of("decode-h100.jsonl", B=1, mode="fused", context=1024)
    peer = row_of("decode-transformer-h100.jsonl", context=1024)
    fair = [
        1e3 * row_of("decode-compiled-h200.jsonl", contender=c, B=1, mode=mode)["token_seconds"]
        for c, mode in (("transformer", "compiled"), ("bd-m4", "fused"))
    ]
    lines = [
        ["scan kernels, M = 1 to 8, full batch", f"{min(shares):.2f} to {max(shares):.2f} of copy speed", ""],
        ["training, rows of 2,048 tokens", f"MFU {at['bd-m4', 2048]['mfu']:.3f}", "residual stream in fp32"],
        ["training, against a Transformer of equal parameters, rows of 2,048 / 8,192 / 32,768 tokens",
         " / ".join(deep) + " times as fast", "it has 19 layers, BD-LRU 12"],
        ["training, against a Transformer of equal depth and width, rows of 2,048 tokens",
         f"{ratio(shape, m4)} times as fast", f"it has {same_shape}"],
        *others,
        ["decoding, batch 1, context of 1,024 tokens", f"{1e3 * one['token_seconds']:.3f} ms a token",
         f"Transformer of 19 layers: {1e3 * peer['token_seconds']:.2f} ms, not compiled; compiled, on an "
         f"H200, {fair[0]:.2f} ms for BD-LRU's {fair[1]:.3f}"],
    ]  # fmt: skip
    least = min(processes(row) for row in (*at.values(), one, peer))
    head = [f"BD-LRU M = 4, 212M parameters, one H100, {least} process a row", "", "note"]
    return table(head, lines)


TABLES: dict[str, Callable[[], str]] = {
    make.__name__: make
    for make in (
        kernels, layers, kernel_peers, kernels_cpu, train, peers, mixers, tokens, sizes, kinds, decode,
    )
}  # fmt: skip
