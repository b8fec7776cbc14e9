"""Plots of the whole-model benchmarks: one line per contender, both axes logarithmic."""

from pathlib import Path
from typing import Any

from .results import Row


def draw_training(rows: list[Row], path: Path, about: dict[str, Any]) -> None:
    """Tokens a second, and peak memory where it was measured, against T. Rows with a reason are left out."""
    done = [row for row in rows if "reason" not in row]
    panels = [("tokens_per_second", "tokens/s", 1.0), ("peak_memory_bytes", "peak memory, GB", 1e9)]
    _draw(done, path, about, "T", "tokens a row", panels)


def draw_decoding(rows: list[Row], path: Path, about: dict[str, Any]) -> None:
    """Milliseconds a token against the context; hollow marks are emulated contexts."""
    done = [row for row in rows if "reason" not in row]
    _draw(done, path, about, "context", "tokens before", [("token_seconds", "ms a token", 1e-3)])


def _draw(
    rows: list[Row],
    path: Path,
    about: dict[str, Any],
    x: str,
    x_label: str,
    panels: list[tuple[str, str, float]],
) -> None:
    panels = [panel for panel in panels if any(panel[0] in row for row in rows)]
    if not panels:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False)
    for ax, (key, label, unit) in zip(axes[0], panels, strict=True):
        for name in dict.fromkeys(_line(row) for row in rows):
            line = sorted((r for r in rows if _line(r) == name and key in r), key=lambda row: row[x])
            if line:
                points = [(row[x], row[key] / unit) for row in line]
                (drawn,) = ax.plot(*zip(*points, strict=True), label=name)
                for point, row in zip(points, line, strict=True):
                    face = "white" if row.get("emulated") else drawn.get_color()
                    ax.plot(*point, marker="o", color=drawn.get_color(), markerfacecolor=face)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        ax.yaxis.set_major_formatter("{x:,g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel(x_label)
        ax.set_ylabel(label)
        ax.grid(alpha=0.3, which="both")
    axes[0][0].legend(fontsize=8)
    emulated = any(row.get("emulated") for row in rows)
    told = "; hollow: context emulated, 1,024 tokens read" if emulated else ""
    figure.suptitle(about["device"] + told, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"written: {path}")


def _line(row: Row) -> str:
    """What a line is of: the contender and its depth, and its size, batch or mode."""
    name = f"{row['contender']}, {row['layers']} layers"
    if "mode" in row:
        return f"{name}, {row['mode']}, batch {row['B']}"
    return f"{name}, {row['size']}, {row['B'] * row['T']:,} tokens"
