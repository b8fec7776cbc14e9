"""Runs side by side: a picture of their losses, and a table of results, on screen and as Markdown."""

import math
from collections.abc import Sequence
from pathlib import Path

from ...runs.layout import RunFolder
from ..show import decimal, table_console
from .runs import Run, Score, read_run
from .synthetic import synthetic_table

_COLUMNS = ("run", "parameters", "tokens", "training loss", "validation loss")


def report(runs: Sequence[str | Path], output: Path | None = None) -> None:
    """Draw loss against tokens for one or several runs, and print their table.

    output: a picture (.png, .svg, .pdf), a Markdown file (.md, with the picture beside it), or a folder,
    which gets report.md and loss.png. Without it the picture goes to plots/loss.png of the run, or, for
    several runs, to comparison.png in the folder of the first. Raises ValueError for a run that is missing
    or has no step yet, and for a file that cannot be written.
    """
    if not runs:
        raise ValueError("no runs to report on")
    found = [read_run(folder) for folder in runs]
    picture, markdown = _targets(found, output)
    from .plot import draw

    try:
        draw(found, picture)
        if markdown is not None:
            text = to_markdown(found)
            markdown.write_text(f"{text}\n![Loss against tokens]({picture.name})\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"{error.filename or picture}: the report cannot be written: {error.strerror}"
        ) from error
    _print(found, [picture, *([markdown] if markdown else [])])


def to_markdown(runs: list[Run]) -> str:
    """The table of runs and, if any were scored, the table of scores, as Markdown."""
    text = _markdown_table(*_table(runs))
    if synthetic := synthetic_table(runs):
        text += "\n" + _markdown_table(*synthetic)
    scores = _score_rows(runs)
    if scores:
        text += "\n" + _markdown_table(["task", "metric", *(run.name for run in runs)], scores)
    return text


def _targets(runs: list[Run], output: Path | None) -> tuple[Path, Path | None]:
    """Where the picture goes, and where the Markdown goes, if it is asked for."""
    if output is None:
        alone = len(runs) == 1
        return (RunFolder(runs[0].path).loss_plot if alone else runs[0].path.parent / "comparison.png"), None
    output = Path(output).expanduser()
    suffix = output.suffix.lower()
    if suffix in (".png", ".svg", ".pdf"):
        return output, None
    if suffix in (".md", ".markdown"):
        return output.with_suffix(".png"), output
    if suffix and not output.is_dir():
        raise ValueError(f"{output}: a report is a picture (.png, .svg, .pdf), a .md file or a folder")
    return output / "loss.png", output / "report.md"


def _table(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and a row a run; bits per byte of text, accuracy of synthetic tasks, where some run has them."""
    measured = [
        key for key in ("bits_per_byte", "accuracy") if any(run.last(key) is not None for run in runs)
    ]
    header = [*_COLUMNS, *(key.replace("_", " ") for key in measured), "tokens/s"]
    rows = [
        [
            run.name,
            _count(run.parameters),
            _count(run.tokens),
            decimal(run.training_loss),
            decimal(run.last("validation_loss")),
            *(decimal(run.last(key)) for key in measured),
            _count(run.tokens_per_second),
        ]
        for run in runs
    ]
    return header, rows


def _score_rows(runs: list[Run]) -> list[list[str]]:
    """One row a task and metric, one column a run."""
    keys = dict.fromkeys(key for run in runs for key in run.scores)
    return [
        [task, metric, *(_score(run.scores.get((task, metric))) for run in runs)] for task, metric in keys
    ]


def _score(score: Score | None) -> str:
    if score is None:
        return ""
    text = decimal(score.value) + (f" ± {decimal(score.error)}" if score.error is not None else "")
    return text + (f" (first {score.limit})" if score.limit is not None else "")


def _count(number: float | None) -> str:
    """Three figures and a unit: 1234567 -> 1.23M."""
    if number is None:
        return ""
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= scale:
            scaled = number / scale
            return f"{scaled:.{max(0, 2 - int(math.log10(scaled)))}f}{unit}"
    return f"{number:.0f}"


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _print(runs: list[Run], written: list[Path]) -> None:
    from rich.table import Table

    console = table_console()
    tables = [(*_table(runs), 1)]
    if synthetic := synthetic_table(runs):
        tables.append((*synthetic, 1))
    if scores := _score_rows(runs):
        tables.append((["task", "metric", *(run.name for run in runs)], scores, 2))
    for header, rows, left in tables:
        table = Table()
        for i, title in enumerate(header):
            table.add_column(title, justify="left" if i < left else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for path in written:
        console.print(f"written to {path}", soft_wrap=True, highlight=False)
