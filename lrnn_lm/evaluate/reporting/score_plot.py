"""The picture of several checkpoints' scores, with their standard errors.

Accuracies by length (`acc_512` of the state and long tasks) are curves. Other scores of one unit share a
panel: a line a task, a dot a checkpoint. The panels stand below each other.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..harness import flatten
from .plot import colour, picture, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHARE = "accuracy"
MANY = 12  # more parts of a score than this (BLiMP's paradigms) are left to the JSON
Score = tuple[float, float | None]  # and its standard error
Panel = dict[str, list[Score | None]]  # a label's score of each checkpoint


def draw_scores(names: list[str], results: list[dict[str, Any]], path: Path) -> None:
    """Write the picture of what `evaluate` returned for each checkpoint."""
    from matplotlib.lines import Line2D

    curves, panels = arrange(results)
    heights = [2.7] * len(curves) + [0.8 + 0.34 * len(panel) for panel in panels.values()]
    with picture(path, 6.4, 0.6 + sum(heights)) as figure:
        axes = iter(figure.subplots(len(heights), squeeze=False, height_ratios=heights).flat)
        for task, curve in curves.items():
            _draw_curve(next(axes), task, curve)
        for metric, panel in panels.items():
            _draw_dots(next(axes), metric, panel)
        handles = [Line2D([], [], color=colour(i), marker="o", linestyle="") for i in range(len(names))]
        figure.legend(handles, names, loc="outside upper left", ncols=min(len(names), 4), frameon=False)


def arrange(
    results: list[dict[str, Any]],
) -> tuple[dict[str, dict[int, list[Score | None]]], dict[str, Panel]]:
    """Curves (task: length: scores) and panels (metric: task: scores), scores in the checkpoints' order."""
    columns = [{(task, metric): (value, error) for task, metric, value, error in flatten(found)}
               for found in results]  # fmt: skip
    keys = list(dict.fromkeys(key for column in columns for key in column))
    parts = [task for task, metric in keys if re.fullmatch(r"acc_(?!norm).*", metric)]
    curves: dict[str, dict[int, list[Score | None]]] = {}
    panels: dict[str, Panel] = {}
    for task, metric in keys:
        scores = [column.get((task, metric)) for column in columns]
        part = re.fullmatch(r"acc_(?!norm).*", metric)
        if length := re.fullmatch(r"acc_(\d+)", metric):
            curves.setdefault(task, {})[int(length[1])] = scores
        elif part and parts.count(task) > MANY:
            continue
        else:
            label = f"{task} {metric.removeprefix('acc_')}" if part else task
            unit = SHARE if metric.startswith(("acc", "exact_match")) else metric
            panel = panels.setdefault(unit, {})
            panel[f"{label} ({metric})" if label in panel else label] = scores
    curves = {task: dict(sorted(curve.items())) for task, curve in curves.items() if len(curve) > 1}
    return curves, panels


def _draw_curve(axes: "Axes", task: str, curve: dict[int, list[Score | None]]) -> None:
    count = len(next(iter(curve.values())))
    for i in range(count):
        under = min(count - 1 - i, 4)  # wider, so that equal curves show beneath each other
        points = [(length, *scores[i]) for length, scores in curve.items() if scores[i] is not None]
        if points:
            lengths, values, errors = zip(*points, strict=True)
            spread = [error or 0.0 for error in errors]
            axes.errorbar(lengths, values, spread, fmt="o-", color=colour(i), markersize=4 + 1.5 * under,
                          linewidth=1.4 + 1.8 * under, capsize=2)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(curve), [f"{length:,}" for length in curve])
    axes.minorticks_off()
    axes.set_ylim(-0.03, 1.05)
    tidy(axes, f"{task}: accuracy", "length")


def _draw_dots(axes: "Axes", metric: str, panel: Panel) -> None:
    count = len(next(iter(panel.values())))
    step = min(0.16, 0.6 / count)  # the dots of a line are a little apart
    for i in range(count):
        points = [(scores[i], line) for line, scores in enumerate(panel.values()) if scores[i] is not None]
        for (value, error), line in points:
            height = line + step * (i - (count - 1) / 2)
            axes.errorbar([value], [height], xerr=[error or 0.0], fmt="o", color=colour(i), markersize=5,
                          capsize=2)  # fmt: skip
    axes.set_yticks(range(len(panel)), list(panel))
    axes.set_ylim(len(panel) - 0.4, -0.6)  # the first line on top
    values = [score[0] for scores in panel.values() for score in scores if score is not None]
    if min(values) > 0 and max(values) > 30 * min(values) and metric != SHARE:
        axes.set_xscale("log")
    elif metric == SHARE:
        axes.set_xlim(-0.03, 1.03)
    else:
        axes.margins(x=0.15)
    tidy(axes, metric.replace("_", " "))
