"""The picture of a recall probe: loss by n-gram, distance, position and frequency, a curve a checkpoint."""

from pathlib import Path
from typing import Any

from ..reporting.plot import colour, picture, tidy


def draw_recall(found: list[dict[str, Any]], path: Path) -> None:
    """Write the picture of what `probe_recall` found."""
    with picture(path, 13, 7) as figure:
        axes = figure.subplots(2, 2)
        grams = list(found[0]["seen_ngram"])
        for i, facts in enumerate(found):
            values = [facts["seen_ngram"][gram]["loss"] for gram in grams]
            axes[0][0].plot(range(len(grams)), values, "o-", color=colour(i), label=facts["name"])
            for axis, key in ((axes[0][1], "distance"), (axes[1][0], "position"), (axes[1][1], "frequency")):
                parts = [part for part in facts[key] if part["tokens"]]
                starts = [max(1, part["from"]) for part in parts]
                axis.plot(starts, [part["loss"] for part in parts], "o-", color=colour(i))
        unit = "nats a token"
        axes[0][0].set_xticks(range(len(grams)), grams)
        tidy(axes[0][0], "Longest n-gram seen before in the row", "n (0: the token is new)", unit)
        for axis, title, label in (
            (axes[0][1], "Bigrams seen before, by distance", "tokens back, from"),
            (axes[1][0], "By position", "position in the row, from"),
            (axes[1][1], "By frequency of the target", "occurrences in the held-out rows, from"),
        ):
            tidy(axis, title, label, unit, octaves=True)
        axes[0][0].legend(frameon=False, fontsize=8)
