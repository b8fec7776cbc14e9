"""Does `optim.base_width` carry the best learning rate from one width to the others?

`python -m studies.width --output docs/results/width.jsonl`, on a CPU: widths 64 to 512 at each rate, with the
option and without it. A row is a run: its loss is the mean over the last steps. The best rate is the minimum
of a parabola through the best of those tried and its neighbours, over the logarithm of the rate. Rows in the
file are not made again.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from lrnn_lm.files import words_of
from lrnn_lm.recipe import load_recipe
from lrnn_lm.train.build import build_trainer

from .jsonl import append_row, rows_to_continue

WIDTHS = (64, 128, 256, 512)
BASE = 128
RATES = tuple(0.001 * 2**k for k in range(5))
LAST = 10  # steps that the loss is the mean of


def run(width: int, rate: float, base: int | None, folder: Path) -> float:
    """The loss at the end of a run."""
    sizes = [f"model.hidden_size={width}", f"model.intermediate_size={2 * width}"]
    places = [f"train.runs_dir={folder}", f"name=w{width}-{rate:g}-{base}"]
    optim = [f"optim.lr={rate}", "optim.final_lr=0", *([f"optim.base_width={base}"] if base else [])]
    recipe = load_recipe(Path(__file__).with_name("width.yaml"), [*sizes, *places, *optim])
    trainer = build_trainer(recipe, Console(quiet=True))
    trainer.run()
    lines = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line][-LAST:]
    return math.inf if None in losses else sum(losses) / len(losses)


def best_rate(rows: list[dict[str, Any]]) -> float:
    """Of the rows of one width, between the rates tried."""
    rows = sorted(rows, key=lambda row: row["lr"])
    at = min(range(len(rows)), key=lambda i: rows[i]["loss"])
    if at in (0, len(rows) - 1):
        return rows[at]["lr"]
    left, middle, right = (rows[at + i]["loss"] for i in (-1, 0, 1))
    step = math.log(rows[at + 1]["lr"] / rows[at]["lr"])
    shift = 0.5 * (left - right) / (left - 2 * middle + right)
    return rows[at]["lr"] * math.exp(shift * step)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the best rate and its loss at each width, with the option and without it."""
    lines = [
        "| width | best rate, base_width | loss | best rate, without | loss |",
        "| --- | --- | --- | --- | --- |",
    ]
    for width in WIDTHS:
        cells = [str(width)]
        for base in (BASE, None):
            own = [row for row in rows if (row["width"], row["base_width"]) == (width, base)]
            cells += [f"{best_rate(own):.4f}", f"{min(row['loss'] for row in own):.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    try:
        rows = rows_to_continue(output, "width", "lr", "base_width", "loss")
    except (ValueError, OSError) as error:
        parser.error(words_of(error))
    done = {(row["width"], row["lr"], row["base_width"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        for key in [(w, r, b) for w in WIDTHS for b in (BASE, None) for r in RATES]:
            if key in done:
                continue
            width, rate, base = key
            loss = run(width, rate, base, Path(folder))
            rows.append({"width": width, "lr": rate, "base_width": base, "loss": round(loss, 4)})
            append_row(output, rows[-1])
    print(table(rows))


if __name__ == "__main__":
    main()
