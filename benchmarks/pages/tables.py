"""Makes the tables of measured numbers from the rows in docs/results; no number is written by hand.

python -m benchmarks.pages.tables            print the tables
python -m benchmarks.pages.tables --write    put them between the marks of the pages in PAGES, and draw the
                                             two pictures of whole models
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

from ..pictures import draw_decoding, draw_training
from ..results import Row, read_results
from . import scaling, speed

ROOT = Path(__file__).resolve().parents[2]
MAD = ("in_context_recall", "noisy_in_context_recall", "selective_copying", "compression", "memorisation")

MODELS = ("bd_lru-m1", "bd_lru-m2", "bd_lru-m4", "bd_lru-m5", "bd_lru-m8", "h_lru-m2", "h_lru-m4", "h_lru-m8",
          "lstm", "attention", "mamba2", "deltanet", "deltanet-negative", "gated_deltaproduct")  # fmt: skip


def study_rows(study: str) -> list[Row]:
    """Runs of a study, each (task, model, steps) in order of its seeds; `chosen` at the setting that is
    reported. In rows from before the search had seeds of its own, the first seed chose the rate, on the rows
    that are reported."""
    runs = [json.loads(line) for line in (speed.RESULTS / "synthetic-h100.jsonl").read_text().splitlines()]
    runs = [r | {"steps": sum(n for _, n in r["stages"])} for r in runs if r["study"] == study]
    found = []
    for key in dict.fromkeys((r["task"], r["model"], r["steps"]) for r in runs):
        same = [r for r in runs if (r["task"], r["model"], r["steps"]) == key and "error" not in r]
        if any("search" in r for r in same):
            found += [r | {"chosen": not r["search"]} for r in same]
            continue
        first = [r for r in same if r["seed"] == 0]
        best = max(first, key=lambda r: (round(r["accuracy"], 3), -r["loss"]))
        found += [r | {"chosen": r["lr"] == best["lr"]} for r in same]
    return sorted(found, key=lambda r: (MODELS.index(r["model"]), r["lr"], r["seed"]))


def spread(values: list[float], digits: int = 3) -> str:
    told = f"{fmean(values):.{digits}f}"
    return told if len(values) == 1 else f"{told} ± {stdev(values):.{digits}f}"


def states() -> str:
    runs, parts = study_rows("states"), []
    for task in ("s5", "s4", "s3"):
        lines = []
        for model in MODELS:
            same = [r for r in runs if (r["task"], r["model"]) == (task, model)]
            told, rest = ([r for r in same if r["chosen"] == chosen] for chosen in (True, False))
            if told:
                lengths = [spread([r["by_length"][n] for r in told]) for n in told[0]["by_length"]]
                others = ", ".join(f"{r['lr']:g}: {r.get('selection', r['accuracy']):.3f}" for r in rest)
                facts = [f"{told[0]['parameters']:,}", f"{told[0]['lr']:g}", str(len(told))]
                lines.append([model, *facts, *lengths, others])
        head = [
            task.upper(),
            "parameters",
            "lr",
            "seeds",
            "32",
            "64",
            "128",
            "256",
            "512",
            "not chosen, at 32",
        ]
        parts.append(speed.table(head, lines))
    return "\n\n".join(parts)


def mad() -> str:
    runs = [r for r in study_rows("mad") if r["chosen"]]
    lines = []
    for model in MODELS:
        each = [[r["accuracy"] for r in runs if (r["task"], r["model"]) == (task, model)] for task in MAD]
        parameters = [r["parameters"] for r in runs if (r["task"], r["model"]) == (MAD[0], model)]
        if any(each):
            whole = f"{fmean(map(fmean, each)):.3f}" if all(each) else ""
            told = [spread(values) if values else "" for values in each]
            lines.append([model, f"{parameters[0]:,}" if parameters else "", *told, whole])
    head = ["", "parameters", "recall", "noisy recall", "selective copying", "compression", "memorisation",
            "mean of these five"]  # fmt: skip
    return speed.table(head, lines)


def certificate() -> str:
    """A row for each step from training to proof; see studies/certificate.py."""
    lines = []
    for line in (speed.RESULTS / "certificate.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["wrong"]:
            verdict = f"wrong after {' '.join(map(str, row['wrong']['symbols']))}"
        elif row["length"] == 0:
            verdict = "not certified"
        else:
            reach = "at every length" if row["length"] is None else f"up to {row['length']:,} symbols"
            verdict = f"**certified {reach}**, by a lead of {row['margin']:.3g}"
        blocks = f"{row['follow']} of {row['blocks']}"
        steps = "" if row["step"] is None else f"{row['step']:,}"
        shares = [f"{share:.4f}" for share in row["accuracy"].values()]
        lines.append([row["task"].upper(), row["after"], steps, blocks, verdict, *shares])
    head = ["task", "after it was", "steps", "blocks that follow it, rounded", "verdict"]
    return speed.table([*head, "accuracy at 257 to 512 symbols", "at 8,193 to 16,384"], lines)


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"measured": speed.readme},
    "docs/performance.md": speed.TABLES,
    "docs/results/synthetic.md": {"states": states, "mad": mad},
    "docs/certificate.md": {"certificate": certificate},
    "docs/scaling.md": scaling.TABLES,
}  # fmt: skip


def filled(page: str, tables: dict[str, Callable[[], str]]) -> str:
    """The page with each table between its marks."""
    for name, make in tables.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        parts = re.split(f"{start}|{end}", page)
        if len(parts) != 3:
            raise ValueError(f"the page needs {start} and {end} once each")
        page = f"{parts[0]}{start}\n\n{make()}\n\n{end}{parts[2]}"
    return page


def draw() -> None:
    about, rows = read_results(speed.RESULTS / "train-h100.jsonl")
    draw_training(rows, speed.RESULTS / "train-h100.png", about)
    about, rows = read_results(speed.RESULTS / "decode-h100.jsonl")
    rows += speed.rows_of("decode-transformer-h100.jsonl")
    draw_decoding(rows, speed.RESULTS / "decode-h100.png", about)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--write", action="store_true", help="put the tables into the pages, draw the pictures"
    )
    write = parser.parse_args().write
    for name, tables in PAGES.items():
        path = ROOT / name
        if write:
            path.write_text(filled(path.read_text(encoding="utf-8"), tables), encoding="utf-8")
        else:
            print("\n\n".join(make() for make in tables.values()))
    if write:
        draw()


if __name__ == "__main__":
    main()
