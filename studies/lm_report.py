"""Writes the tables of the language-model study into docs/results/lm.md and draws the plot.

    python -m studies.lm_report docs/results/lm.jsonl docs/results/lm.md

Rows of another plan make the tables of results and rates, in a new page or between such marks. Most runs
shared a device. So seconds are tokens divided by the speed of the model alone (`lm-speed.jsonl`).
They leave out what comes before the first step: compiling, and choosing kernels.
"""

import argparse
import sys
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import fmean as mean
from statistics import stdev

from lrnn_lm.files import words_of

from . import jsonl
from .jsonl import Row

# Contenders, and what the plot calls them. README's table has those of SHIPPED and HEADLINE, a column each.
FINAL = {
    "hybrid-final-tied": "hybrid of BD-LRU M = 2",
    "mamba2-hybrid-final-tied": "hybrid of Mamba-2",
    "gdn-hybrid-final-tied": "hybrid of Gated DeltaNet",
    "transformer-final-tied": "Transformer",
    "mixed-large-tied": "recurrence alone",
}
SHIPPED = FINAL | {"gdn-final-tied": "Gated DeltaNet", "mamba2-final-tied": "Mamba-2"}
HEADLINE = {
    "hybrid-m2-qk-spare": "hybrid of BD-LRU M = 2",
    "mamba2-hybrid-qk": "hybrid of Mamba-2",
    "gdn-hybrid-qk": "hybrid of Gated DeltaNet",
    "transformer-qk": "Transformer",
    "mixed-final-all": "recurrence alone",
    "gdn": "Gated DeltaNet",
    "mamba2": "Mamba-2",
    "bd-m2": "BD-LRU M = 2",
}
LARGE = {
    "hybrid-large-tied": "hybrid of BD-LRU M = 2",
    "transformer-large-tied": "Transformer",
    "mixed-larger-tied": "recurrence alone",
}
TOKENS, SECONDS = "training tokens, millions", "seconds of training on one H200"
PANELS = (  # of the plot: size, title, contenders, what the curves go against
    ("68m", "68M parameters, as shipped", FINAL | {"hybrid-final-m1": "hybrid of BD-LRU M = 1"}, TOKENS),
    ("68m", "68M parameters, as shipped", FINAL, SECONDS),
    ("212m", "212M, as shipped, two passes over the text", LARGE, TOKENS),
)
MARK = 1.1  # bits per byte that each of FINAL reaches before its end
# Settings of a contender's own. All runs of 212M before them took 131,072 tokens a step.
TUNED = ("optim.groups", "optim.weight_decay", "optim.warmup", "train.tokens_per_step=32768")
MARKS = ("<!-- tables: made by studies/lm_report.py -->", "<!-- end of tables -->")


def read_rows(path: Path) -> list[Row]:
    """Rows of runs that ended."""
    return [row for row in jsonl.read_rows(path) if "bits_per_byte" in row]


def optimizer(row: Row) -> str:
    """The optimizer's name, and whether its contender has settings of its own."""
    name = "Muon" if "optim.name=muon" in row["overrides"] else "AdamW"
    own = any(override.startswith(TUNED) for override in row["overrides"])
    return f"{name} with other settings" if own else name


def setting(row: Row) -> tuple[str, int, str]:
    """What runs are compared within: size, tokens, optimizer."""
    return row["size"], row["tokens"], optimizer(row)


def best_rates(rows: list[Row]) -> dict[str, list[Row]]:
    """Of each contender, all seeds at the rate with the most; of several, the best by its first."""
    # A rate tried with one seed beside three may be lower by less than seeds differ: `rates_table` shows it.
    by_name: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_name[row["contender"]].append(row)
    chosen = {}
    for name, own in by_name.items():
        seeds = Counter(row["lr"] for row in own)
        first = min(row["seed"] for row in own)
        firsts = [row for row in own if row["seed"] == first]
        lr = min(firsts, key=lambda row: (-seeds[row["lr"]], row["bits_per_byte"]))["lr"]
        chosen[name] = [row for row in own if row["lr"] == lr]
    return chosen


def rates_table(rows: list[Row]) -> str:
    """Contenders that were tried at several rates: bits per byte at each."""
    lines = []
    for key in dict.fromkeys(setting(row) for row in rows):
        own = [row for row in rows if setting(row) == key and row["seed"] == 0]
        rates = sorted({row["lr"] for row in own})
        tried = Counter(name for name, _ in dict.fromkeys((row["contender"], row["lr"]) for row in own))
        names = [name for name, times in tried.items() if times > 1]
        if not names:
            continue
        lines += [
            f"{key[0]}, {key[1] / 1e6:.0f}M tokens, {key[2]}:", "",
            "| contender | " + " | ".join(f"{lr:g}" for lr in rates) + " |", "|---|" + "---|" * len(rates),
        ]  # fmt: skip
        for name in names:
            tried_at = {row["lr"]: row["bits_per_byte"] for row in own if row["contender"] == name}
            lowest = f"{min(tried_at.values()):.4f}"
            cells = {lr: f"{bits:.4f}" for lr, bits in tried_at.items()}
            cells = {lr: f"**{cell}**" if cell == lowest else cell for lr, cell in cells.items()}
            lines.append(f"| {name} | " + " | ".join(cells.get(lr, "") for lr in rates) + " |")
        lines.append("")
    return "\n".join(lines)


def results_table(rows: list[Row]) -> str:
    """Every contender at its best rate, lowest first, a table a setting; ± is the deviation over seeds."""
    head = ("contender", "bits per byte", "seeds", "rate", "parameters", "SwiGLU", "commit")
    lines = []
    for key in sorted(dict.fromkeys(setting(row) for row in rows), reverse=True):
        chosen = best_rates([row for row in rows if setting(row) == key])
        lines += [f"{key[0]}, {key[1] / 1e6:.0f}M tokens, {key[2]}:", ""]
        lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for name, bits in sorted(((n, by_seed(own)) for n, own in chosen.items()), key=lambda x: mean(x[1])):
            own = chosen[name]
            spread = f" ± {stdev(bits):.4f}" if len(bits) > 1 else ""
            commits = ", ".join(dict.fromkeys(row["commit"] for row in own))
            cells = (
                name, f"{mean(bits):.4f}{spread}", len(bits), f"{own[0]['lr']:g}",
                f"{own[0]['parameters']:,}", own[0]["model"]["intermediate_size"], commits,
            )  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    return "\n".join(lines)


def read_speeds(path: Path) -> dict[str, int]:
    """Tokens a second of each contender, alone on a device."""
    return {row["contender"]: row["tokens_per_second_shared"] for row in read_rows(path)}


def seconds_table(rows: list[Row], speeds: dict[str, int]) -> str:
    """What is shipped and its rivals, fastest first: at the end, when the fastest ends, and until MARK."""
    chosen = best_rates([row for row in rows if row["size"] == "68m" and row["contender"] in FINAL])
    names = sorted(FINAL, key=lambda name: -speeds[name])
    tokens = chosen[names[0]][0]["tokens"]
    end = tokens / speeds[names[0]]
    head = ("model", "tokens/s", "seconds", "bits per byte", f"after {end:.0f} seconds", f"seconds to {MARK}")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name in names:
        taken, bits = curve(chosen[name][0], speeds[name])
        after = f"{bits_at(end, taken, bits):.3f}"
        until = f"{seconds_to(MARK, taken, bits):.0f}"
        cells = FINAL[name], f"{speeds[name]:,}", f"{taken[-1]:.0f}", f"{bits[-1]:.3f}", after, until
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def share(row: Row, point: list[float]) -> float:
    """Share of a run's steps that a validation [step, bits per byte] comes after."""
    return point[0] / row["curve"][-1][0]


def curve(row: Row, speed: float) -> tuple[list[float], list[float]]:
    """A run's validations: seconds at a speed in tokens/s, and bits per byte."""
    taken = [share(row, point) * row["tokens"] / speed for point in row["curve"]]
    return taken, [bits for _, bits in row["curve"]]


def bits_at(end: float, taken: list[float], bits: list[float]) -> float:
    """Bits per byte at a time, on a line between the two validations around it."""
    for (a, x), (b, y) in pairwise(zip(taken, bits, strict=True)):
        if a <= end <= b:
            return x + (y - x) * (end - a) / (b - a)
    raise ValueError(f"there is no validation on both sides of {end:.0f} seconds")


def seconds_to(mark: float, taken: list[float], bits: list[float]) -> float:
    """Seconds until a run has so many bits per byte, on a line between the two validations around them."""
    for (a, x), (b, y) in pairwise(zip(taken, bits, strict=True)):
        if x >= mark >= y:
            return a + (b - a) * (x - mark) / (x - y)
    raise ValueError(f"no two validations have {mark} bits per byte between them")


def by_seed(rows: list[Row]) -> list[float]:
    """Bits per byte of each seed; a run that was repeated counts once, by its mean."""
    seeds = dict.fromkeys(row["seed"] for row in rows)
    return [mean(row["bits_per_byte"] for row in rows if row["seed"] == seed) for seed in seeds]


def draw(rows: list[Row], speeds: dict[str, int], path: Path) -> None:
    """Held-out bits per byte under Muon against tokens or seconds, of each contender's first seed: PANELS."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if optimizer(row) != "AdamW"]
    panels = [
        panel for panel in PANELS
        if any(row["size"] == panel[0] and row["contender"] in panel[2] for row in rows)
        and (panel[3] != SECONDS or speeds)
    ]  # fmt: skip
    if not panels:
        return
    labels = dict.fromkeys(label for _, _, names, _ in PANELS for label in names.values())
    colours = {label: f"C{i}" for i, label in enumerate(labels)}
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=(6.5 * len(panels), 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (size, title, names, against) in zip(axes, panels, strict=True):
            chosen = best_rates([row for row in rows if row["size"] == size and row["contender"] in names])
            # Curves begin together: some runs were validated earlier, far above where the others begin.
            start = max(share(row, row["curve"][0]) for row, *_ in chosen.values())
            for name in sorted(chosen, key=lambda name: chosen[name][0]["bits_per_byte"]):
                row = chosen[name][0]
                row = row | {"curve": [point for point in row["curve"] if share(row, point) >= start]}
                taken, bits = curve(row, speeds[name] if against == SECONDS else 1e6)
                label = f"{names[name]} {bits[-1]:.3f}"
                axis.plot(taken, bits, "o-", color=colours[names[name]], markersize=3, label=label)
            axis.set_title(title, loc="left")
            axis.set_xlabel(against)
            axis.set_ylabel("held-out bits per byte")
            axis.grid(alpha=0.25)
            axis.legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=140)


def make(rows_path: Path, page: Path) -> None:
    """Write the tables into the page and the picture beside it."""
    rows = read_rows(rows_path)
    if not rows:
        raise ValueError(f"{rows_path}: holds no row of a run that ended")
    text = page.read_text(encoding="utf-8") if page.exists() else "".join(f"{mark}\n" for mark in MARKS)
    before, begun, rest = text.partition(MARKS[0])
    _, ended, after = rest.partition(MARKS[1])
    if not (begun and ended):
        raise ValueError(f"{page}: has no lines {MARKS[0]} and {MARKS[1]}, between which the tables go")
    speeds_path = rows_path.with_name("lm-speed.jsonl")
    speeds = read_speeds(speeds_path) if speeds_path.exists() else {}
    parts = {"Results": results_table(rows), "Rates": rates_table(rows)}
    if speeds:
        parts = {"Seconds": seconds_table(rows, speeds), **parts}
    tables = "".join(f"\n### {name}\n\n{table}" for name, table in parts.items() if table)
    page.write_text(before + MARKS[0] + tables + MARKS[1] + after, encoding="utf-8")
    draw(rows, speeds, page.with_suffix(".png"))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("page", type=Path)
    options = parser.parse_args()
    try:
        make(options.rows, options.page)
    except (ValueError, OSError) as error:
        told = words_of(error)
    except KeyError as error:
        told = f"{options.rows}: there is no {error} in it"
    else:
        return
    print(f"studies.lm_report: {told}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
