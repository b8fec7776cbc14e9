"""What rows of `lrnn bench frontier` come to: a line a contender, the table, the picture with its fronts."""

import math
from pathlib import Path

from .results import Row, show, tabulate

HELD = 0.99  # accuracy of the second half of rows that counts as holding a length


def summarise(rows: list[Row], names: list[str], tasks: list[str]) -> list[Row]:
    """A row a contender: its speed, the length that it holds of each task at the rate that is best at the
    training length, and its loss."""
    found = []
    for name in names:
        own = [row for row in rows if row["contender"] == name and "reason" not in row]
        line: Row = {"contender": name}
        for row in own:
            line |= row if row["kind"] in ("speed", "loss") else {}
        for task in tasks:
            runs = [row for row in own if row.get("task") == task]
            if runs:
                line[task] = max(runs, key=lambda row: (row["selection"], -row["loss"]))["held"]
        found.append(line)
    return found


def front(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other is at least as good as in both numbers, and better in one."""

    def beaten(p: tuple[float, float]) -> bool:
        return any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points)

    return [i for i, p in enumerate(points) if not beaten(p)]


def table(summary: list[Row], tasks: list[str]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells."""
    columns = ["contender", "parameters", "train tokens/s", "decode ms", "state KB", *tasks, "loss"]
    cells = [
        [line["contender"], show(line.get("parameters")), show(line.get("tokens_per_second")),
         show(line.get("decode_ms"), ".2f"), show(line.get("state_bytes"), ",.1f", 1e-3),
         *(show(line.get(task)) for task in tasks), show(line.get("validation_loss"), ".4f")]
        for line in summary
    ]  # fmt: skip
    return columns, cells


def show_table(summary: list[Row], tasks: list[str], output: Path | None) -> None:
    tabulate(f"longest rows held at {HELD:g}", *table(summary, tasks), output)


def panels(summary: list[Row], tasks: list[str]) -> list[tuple[str, list[Row], list[int]]]:
    """What is set against speed, the lines that have both, and which of these are on the front."""
    found = []
    for key, sign in (*((task, 1) for task in tasks), ("validation_loss", -1)):
        lines = [line for line in summary if key in line and "tokens_per_second" in line]
        if lines:
            best = front([(line["tokens_per_second"], sign * line[key]) for line in lines])
            found.append((key, lines, sorted(best, key=lambda i: lines[i]["tokens_per_second"])))
    return found


def draw(summary: list[Row], tasks: list[str], path: Path, device: str) -> None:
    """A panel for each task and for the loss: against the speed of training, with the Pareto front."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    drawn = panels(summary, tasks)
    if not drawn:
        return
    rows = math.ceil(len(drawn) / 3)
    figure, axes = pyplot.subplots(rows, min(3, len(drawn)), figsize=(15, 4.5 * rows), squeeze=False)
    for ax in axes.flat[len(drawn) :]:
        ax.axis("off")
    for ax, (key, lines, best) in zip(axes.flat, drawn, strict=False):
        points = [(line["tokens_per_second"], line[key]) for line in lines]
        ax.plot(*zip(*(points[i] for i in best), strict=True), color="0.6", zorder=0)
        for i, line in enumerate(lines):
            ax.scatter(*points[i], color="C0" if i in best else "0.5", s=18)
            if line[key] > 0:  # those that hold no row lie on one line, and the table names them
                at = {"xytext": (3, 3), "textcoords": "offset points"}
                ax.annotate(line["contender"], points[i], fontsize=8, rotation=45, **at)
        ax.set_xscale("log")
        low, high = ax.get_xlim()
        ax.set_xlim(low, 1.5 * high)  # names stand to the right of their points
        if key in tasks:
            ax.set_yscale("symlog", base=2, linthresh=16)
            ax.set_ylim(-2, 3 * max(16, *(y for _, y in points)))
            ax.set_yticks([0, *(2**n for n in range(4, 15) if 2**n <= max(16, *(y for _, y in points)))])
            ax.yaxis.set_major_formatter("{x:,g}")
        ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_minor_formatter("")
        ax.xaxis.set_major_formatter("{x:,g}")
        ax.set_xlabel("training, tokens/s")
        ax.set_ylabel(f"{key}: longest rows held" if key in tasks else "loss on the corpus, nats")
        ax.grid(alpha=0.3)
    figure.suptitle(f"{device}; the line is the Pareto front", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"written: {path}")
