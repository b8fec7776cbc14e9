"""Plot of the state tasks: accuracy by length, one panel per task, one line per model."""

import statistics
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .replicas import Job
from .tables import groups

# The palette of lrnn_lm.evaluate.reporting.plot, whose imports (pydantic) a bare GPU machine may lack.
INK, GREY = "#222222", "#8a8f98"
COLOURS = ("#1f5fbf", "#d1602b", "#2a8a57", "#8a4fbf", "#b8860b", "#c2347c", "#3a8fb7", "#5d5d5d")
MARKS = "os^Dv"  # models of more than the palette's colours


def draw_states(jobs: list[Job], found: dict[str, dict[str, Any]], path: Path) -> bool:
    """Draw the reported runs: mean and range over seeds; whether there are any."""
    chosen = {key: runs for key, runs in groups(jobs, found).items() if "by_length" in runs[0]}
    tasks = sorted({task for task, _ in chosen})
    if not tasks:
        return False
    models = list(dict.fromkeys(model for _, model in chosen))
    style = {"font.size": 10, "axes.edgecolor": GREY, "text.color": INK, "axes.labelcolor": INK}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5 * len(tasks) + 1.8, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        row = figure.subplots(1, len(tasks), squeeze=False)[0]
        for axes, task in zip(row, tasks, strict=True):
            for i, model in enumerate(models):
                if (task, model) in chosen:
                    _draw_model(axes, i, model, chosen[task, model])
            _finish(axes, task, chosen[task, next(m for t, m in chosen if t == task)][0])
        lines: dict[str, Any] = {}  # of every panel: not every model ran on every task
        for axes in row:
            lines |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        known = [model for model in models if model in lines]
        figure.legend([lines[m] for m in known], known, loc="outside right upper", frameon=False)
        figure.savefig(path, dpi=110)
    return True


def _draw_model(axes: Axes, i: int, model: str, runs: list[dict[str, Any]]) -> None:
    lengths = [int(length) for length in runs[0]["by_length"]]
    values = [[run["by_length"][str(length)] for run in runs] for length in lengths]
    colour, mark = COLOURS[i % len(COLOURS)], MARKS[i // len(COLOURS) % len(MARKS)]
    mean = [statistics.fmean(at) for at in values]
    line = "-" if i < len(COLOURS) else "--"
    axes.plot(lengths, mean, f"{mark}{line}", color=colour, markersize=4, linewidth=1.4, label=model)
    axes.fill_between(lengths, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.12)


def _finish(axes: Axes, task: str, run: dict[str, Any]) -> None:
    lengths = [int(length) for length in run["by_length"]]
    trained = max(length for length, _ in run["stages"])
    axes.axvline(trained, color=GREY, linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(-0.03, 1.04)
    axes.set_xlabel(f"length (trained at {trained})")
    axes.set_ylabel("accuracy over all tokens")
    axes.set_title(task, fontsize=10, loc="left")
    axes.grid(color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
