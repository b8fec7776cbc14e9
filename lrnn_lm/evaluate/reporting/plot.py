"""The style of all pictures, and that of a report: loss, bits per byte and tasks against tokens."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...requirements import check_extra
from .runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST = 12  # metrics of tasks in a picture
INK, GREY = "#222222", "#8a8f98"
COLOURS = ("#1f5fbf", "#d1602b", "#2a8a57", "#8a4fbf", "#b8860b", "#c2347c", "#3a8fb7", "#5d5d5d")


@contextmanager
def picture(path: Path, width: float, height: float, dpi: int = 140) -> Iterator["Figure"]:
    """A figure in the project's style, `width` x `height` inches; at the end it is written to `path`.

    The suffix says how: PNG, SVG or PDF. Makes the folder.
    """
    check_extra("train", "matplotlib")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    style = {"font.size": 10, "axes.edgecolor": GREY, "text.color": INK, "axes.labelcolor": INK}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)  # not pyplot, which would change a notebook's backend
        yield figure
        for text in figure.findobj(Text):  # a name with two $ is no formula; ticks are, but have no text yet
            text.set_parse_math("$" not in text.get_text())
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi)


def tidy(axes: "Axes", title: str, xlabel: str = "", ylabel: str = "", octaves: bool = False) -> None:
    """The title on the left, a light grid behind the curves, and no frame on top and right.

    octaves: x by powers of 2.
    """
    if octaves:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def name_curves(axes: "Axes", **style: Any) -> None:
    """The legend, with the names that start with an underscore, which matplotlib leaves out by itself."""
    named = [line for line in axes.lines if not line.get_label().startswith("_child")]
    if named:
        axes.legend(named, [line.get_label() for line in named], frameon=False, **style)


def colour(i: int) -> str:
    """The colour of curve i; after eight they repeat."""
    return COLOURS[i % len(COLOURS)]


def draw(runs: list[Run], path: Path) -> None:
    """Write one picture of one or several runs: loss, bits per byte, and the metrics of `eval.during`."""
    panels = [_draw_loss]
    if any(run.last("bits_per_byte") is not None for run in runs):
        panels.append(_draw_bits)
    keys = list(dict.fromkeys(key for run in runs for key in run.task_keys))
    panels += [partial(_draw_task, key=key) for key in keys[:_MOST]]
    columns, rows = min(2, len(panels)), math.ceil(len(panels) / 2)
    with picture(path, 11 if columns == 2 else 7, 4.2 * rows, dpi=160) as figure:
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for panel, place in zip(panels, axes, strict=False):
            panel(place, runs)
        for place in axes[len(panels) :]:
            place.set_visible(False)
        title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
        more = f", {_MOST} of {len(keys)} metrics of tasks" if len(keys) > _MOST else ""
        figure.suptitle(title + more, fontweight="bold")


def smooth(values: list[float], width: int) -> list[float]:
    """Centred running mean over `width` values, fewer at the ends; non-finite values are left out."""
    half, out = width // 2, []
    sums, counts = [0.0], [0]
    for value in values:
        finite = math.isfinite(value)
        sums.append(sums[-1] + (value if finite else 0.0))
        counts.append(counts[-1] + finite)
    for i in range(len(values)):
        low, high = max(0, i - half), min(len(values), i + half + 1)
        count = counts[high] - counts[low]
        out.append((sums[high] - sums[low]) / count if count else math.nan)
    return out


def _draw_loss(axes: "Axes", runs: list[Run]) -> None:
    alone = len(runs) == 1
    ends: list[float] = []
    for i, run in enumerate(runs):
        tokens = [line["tokens"] for line in run.training]
        losses = [line["loss"] for line in run.training]
        curve = smooth(losses, max(1, len(losses) // 50))
        if losses:
            label = "training" if alone else run.name
            axes.plot(tokens, losses, color=colour(i), alpha=0.2, linewidth=0.8, zorder=1)
            axes.plot(tokens, curve, color=colour(i), linewidth=1.8, label=label, zorder=3)
            ends += _after_warm_up(tokens, curve, run.tokens)
        held = [(line["tokens"], line["validation_loss"]) for line in run.validation]
        if held:
            label = "validation" if alone else (None if losses else run.name)
            ink = INK if alone else colour(i)
            axes.plot(*zip(*held, strict=True), "o", color=ink, markeredgecolor="white", markersize=5.5,
                      label=label, zorder=4)  # fmt: skip
            ends += _after_warm_up(*zip(*held, strict=True), run.tokens)
    if ends and max(ends) > min(ends):
        margin = 0.08 * (max(ends) - min(ends))
        axes.set_ylim(min(ends) - margin, max(ends) + margin)
    _finish(axes, "Loss" if alone else "Loss (line: training, points: validation)", "loss (nats per token)")


def _draw_bits(axes: "Axes", runs: list[Run]) -> None:
    for i, run in enumerate(runs):
        _draw_points(axes, run.validation, "bits_per_byte", i, "validation" if len(runs) == 1 else run.name)
    gzip = [
        score
        for run in runs
        for (task, metric), score in run.scores.items()
        if metric == "gzip_bits_per_byte" and task == "heldout_bits_per_byte"  # of no other text
    ]
    bars = {round(score.value, 3) for score in gzip if score.limit is None}
    for value in sorted(bars):
        axes.axhline(value, color=GREY, linestyle="--", linewidth=1.2, label=f"gzip -9: {value:.3f}")
    axes.margins(y=0.12)
    _finish(axes, "Bits per byte of held-out text", "bits per byte")


def _draw_task(axes: "Axes", runs: list[Run], key: str) -> None:
    for i, run in enumerate(runs):
        _draw_points(axes, run.tasks, key, i, run.name)
    task, metric = key.rsplit("/", 1)
    axes.margins(y=0.12)
    _finish(axes, f"{task} while training", metric.replace("_", " "))


def _draw_points(axes: "Axes", lines: list[dict[str, Any]], key: str, i: int, label: str) -> None:
    """Curve i: the values of a key of the lines of metrics.jsonl; its label ends with the last."""
    points = [(line["tokens"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
    if points:
        axes.plot(*zip(*points, strict=True), "o-", color=colour(i), markeredgecolor="white",
                  label=f"{label}: {points[-1][1]:.3f}")  # fmt: skip


def _after_warm_up(tokens: Any, losses: Any, total: int) -> list[float]:
    """The finite losses after 5% of the tokens. They set the axis: the steep start would flatten the rest."""
    return [loss for t, loss in zip(tokens, losses, strict=True) if t >= 0.05 * total and math.isfinite(loss)]


def _finish(axes: "Axes", title: str, ylabel: str) -> None:
    from matplotlib.ticker import EngFormatter

    tidy(axes, title, "training tokens", ylabel)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    name_curves(axes)
