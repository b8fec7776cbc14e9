"""The picture of a length probe: loss, accuracy, memory, states and eigenvalues, a panel each."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..reporting.plot import COLOURS, GREY, colour, picture, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_length(facts: dict[str, Any], path: Path) -> None:
    """Write the picture of what `probe_length` found."""
    with picture(path, 14, 7.6) as figure:
        axes = figure.subplots(2, 3)
        _by_position(axes[0][0], facts, "loss", "Loss by position", "nats a token")
        _by_position(axes[0][1], facts, "accuracy", "Accuracy by position", "share of targets")
        axes[0][1].set_ylim(-0.02, 1.04)
        _memory(axes[0][2], facts)
        _states(axes[1][0], facts)
        _eigenvalues(axes[1][1], facts)
        _row_sums(axes[1][2], facts)
        settings = facts["settings"]
        title = f"{Path(facts['checkpoint']['path']).name}: trained at {settings['trained']:,} tokens, "
        figure.suptitle(title + f"probed to {settings['length']:,}", fontweight="bold")


def _by_position(axes: "Axes", facts: dict[str, Any], key: str, title: str, label: str) -> None:
    bins = [bin for bin in facts["by_position"] if bin["targets"]]
    axes.plot([bin["to"] for bin in bins], [bin[key] for bin in bins], "o-", color=COLOURS[0], markersize=3.5)
    _trained(axes, facts)
    tidy(axes, title, "position (tokens)", label, octaves=True)


def _memory(axes: "Axes", facts: dict[str, Any]) -> None:
    points = [point for point in facts["memory"] if point["distance"]]
    distances = [point["distance"] for point in points]
    floor = 1e-5
    axes.plot(distances, [max(p["moved"], floor) for p in points], "o-", color=COLOURS[1], markersize=3.5)
    axes.set_yscale("log")
    axes.set_ylim(floor / 2, 1.5)
    _trained(axes, facts)
    title = f"Memory: a change reaches {facts['effective_memory']:,} tokens"
    tidy(axes, title, "tokens between the change and the output", "total variation", octaves=True)


def _states(axes: "Axes", facts: dict[str, Any]) -> None:
    layers = list(facts["states"][-1]["rms"])
    for i, layer in enumerate(layers):
        values = [point["rms"][layer] for point in facts["states"]]
        positions = [point["position"] for point in facts["states"]]
        axes.plot(positions, values, "-", color=colour(i), label=f"layer {layer}")
    if layers and len(layers) <= len(COLOURS):
        axes.legend(frameon=False, fontsize=8)
    axes.set_ylim(bottom=0)
    _trained(axes, facts)
    label = "root mean square" if layers else "no recurrent state"
    tidy(axes, "State by position", "position (tokens)", label, octaves=True)


def _eigenvalues(axes: "Axes", facts: dict[str, Any]) -> None:
    from matplotlib.patches import Circle

    axes.add_patch(Circle((0, 0), 1, fill=False, color=GREY, linewidth=1))
    layers = [layer for layer in facts["transitions"] if layer["finite"]]
    widest = max((abs(part) for layer in layers for point in layer["sample"] for part in point), default=1)
    for i, layer in enumerate(layers):
        real, imaginary = zip(*layer["sample"], strict=True)
        label = f"layer {layer['layer']}"
        axes.plot(real, imaginary, ".", color=colour(i), markersize=3, alpha=0.5, label=label)
    edge = 1.15 * max(1, widest)
    axes.set_xlim(-edge, edge)
    axes.set_ylim(-edge, edge)
    axes.set_aspect("equal")
    if 0 < len(layers) <= len(COLOURS):
        axes.legend(frameon=False, fontsize=8, loc="lower left")
    tidy(axes, "Eigenvalues of A_t, in the unit circle", "real", "imaginary")


def _row_sums(axes: "Axes", facts: dict[str, Any]) -> None:
    """For each layer a box from quartile to quartile, lines to the extremes, a dot at the median."""
    marks = (("row_sum", -0.15, COLOURS[2]), ("spectral_radius", 0.15, COLOURS[3]))
    layers = [layer for layer in facts["transitions"] if layer["finite"]]
    for key, offset, ink in marks:
        for layer in layers:
            x, found = layer["layer"] + offset, layer[key]
            label = key.replace("_", " ") if layer is layers[0] else None
            axes.vlines(x, found["min"], found["max"], color=ink, linewidth=1)
            axes.vlines(x, found["25%"], found["75%"], color=ink, linewidth=6, alpha=0.6, label=label)
            axes.plot(x, found["50%"], "o", color="white", markeredgecolor=ink, markersize=5)
    axes.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axes.set_ylim(-0.02, 1.1 * max([1, *(layer[key]["max"] for layer in layers for key, _, _ in marks)]))
    axes.set_xticks([layer["layer"] for layer in layers])
    if layers:
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    tidy(axes, "Row sums of |A_t| and spectral radius", "layer")


def _trained(axes: "Axes", facts: dict[str, Any]) -> None:
    axes.axvline(facts["settings"]["trained"], color=GREY, linestyle="--", linewidth=1.2)
