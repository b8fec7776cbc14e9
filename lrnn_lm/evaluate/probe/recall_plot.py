"""The picture of a recall probe: loss by n-gram, distance, position and frequency, a curve a checkpoint."""

from pathlib import Path
from typing import Any

from ..reporting.plot import COLOURS, GREY, INK


def draw_recall(found: list[dict[str, Any]], path: Path) -> None:
    """Write the picture of what `probe_recall` found (PNG, SVG or PDF by the suffix)."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {"font.size": 10, "axes.edgecolor": GREY, "text.color": INK, "axes.labelcolor": INK}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(13, 7), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 2)
        grams = list(found[0]["seen_ngram"])
        for facts, colour in zip(found, (COLOURS * len(found))[: len(found)], strict=True):
            values = [facts["seen_ngram"][gram]["loss"] for gram in grams]
            axes[0][0].plot(range(len(grams)), values, "o-", color=colour, label=facts["name"])
            for axis, key in ((axes[0][1], "distance"), (axes[1][0], "position"), (axes[1][1], "frequency")):
                parts = [part for part in facts[key] if part["tokens"]]
                axis.plot([max(1, p["from"]) for p in parts], [p["loss"] for p in parts], "o-", color=colour)
        axes[0][0].set_xticks(range(len(grams)), grams)
        titles = (
            (axes[0][0], "Longest n-gram seen before in the row", "n (0: the token is new)"),
            (axes[0][1], "Bigrams seen before, by distance", "tokens back, from"),
            (axes[1][0], "By position", "position in the row, from"),
            (axes[1][1], "By frequency of the target", "occurrences in the held-out rows, from"),
        )
        for axis, title, label in titles:
            axis.set_title(title, loc="left")
            axis.set_xlabel(label)
            axis.set_ylabel("nats a token")
            axis.grid(alpha=0.25)
            if axis is not axes[0][0]:
                axis.set_xscale("log", base=2)
        axes[0][0].legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=140)
